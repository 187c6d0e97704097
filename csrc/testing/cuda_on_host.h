// CUDA for a CPU, so that g++ compiles the files of csrc/cuda and tests run them without a GPU.
//
// The threads of a block are fibers of one thread of the system. Barriers, shuffles, votes, atomics
// and asynchronous copies do what the device does, and a kernel that misuses them is refused:
// see cuda_on_host.cpp. Compile with -fsanitize=thread and no fusing of products with sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __shared__
#define __launch_bounds__(...)
#define KVTOOLS_UNSEEN \
  __attribute__((no_sanitize("thread"), noinline)) inline  // accesses are not checked

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

namespace kvtools::testing {

// Run `body` as every thread of every block; throws std::runtime_error for what no GPU would do.
void run(const char* kernel, dim3 grid, dim3 block, size_t shared,
         const std::function<void()>& body);

void* shared_memory();
void block_barrier();
// Wait for the whole warp. All of it must have come by the same `operation`.
enum class Warp { sync, shuffle, vote, product };
void warp_barrier(Warp operation);
// Values of the lanes of this thread's warp in its present operation, kMostValues for each.
constexpr int kMostValues = 6;
uint64_t* lane_values();
int lane();

// cp.async: `bytes` arrive, zero from `valid` on, when the group that they are in is waited for.
void copy_later(void* to, const void* from, int bytes, int valid);
void commit_copies();
void wait_for_copies(int groups_left);

void see_atomic(const void* p, size_t bytes);

template <class T>
KVTOOLS_UNSEEN T exchange(T value, int from) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  uint64_t* values = lane_values();
  values[lane()] = bits;
  warp_barrier(Warp::shuffle);
  std::memcpy(&value, &values[from & 31], sizeof value);
  return value;
}

KVTOOLS_UNSEEN uint32_t ballot(bool vote) {
  uint64_t* values = lane_values();
  values[lane()] = vote;
  warp_barrier(Warp::vote);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(values[i]) << i;
  return bits;
}

// mma.sync.m16n8k16: see csrc/cuda/ptx.h.
template <class T>
KVTOOLS_UNSEEN void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragment {
    float a[8], b[4];
  };
  static_assert(sizeof(Fragment) == 8 * kMostValues);
  auto* lanes = reinterpret_cast<Fragment*>(lane_values());
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const T* halves = reinterpret_cast<const T*>(words);
  Fragment& mine = lanes[lane()];
  for (int i = 0; i < 8; ++i) mine.a[i] = static_cast<float>(halves[i]);
  for (int i = 0; i < 4; ++i) mine.b[i] = static_cast<float>(halves[8 + i]);
  warp_barrier(Warp::product);
  const int i = lane() / 4, j = lane() % 4;
  for (int n = 0; n < 4; ++n) {
    const int down = n / 2, column = 2 * j + n % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k)
      sum += lanes[4 * i + k % 8 / 2].a[4 * (k / 8) + 2 * down + k % 2] *
             lanes[4 * column + k % 8 / 2].b[2 * (k / 8) + k % 2];
    c[n] += sum;
  }
}

template <class T, class F>
KVTOOLS_UNSEEN T update(T* p, F f) {
  see_atomic(p, sizeof(T));
  const T before = *p;
  *p = f(before);
  return before;
}

}  // namespace kvtools::testing

inline void __syncthreads() { kvtools::testing::block_barrier(); }
inline void __syncwarp() { kvtools::testing::warp_barrier(kvtools::testing::Warp::sync); }

template <class T>
KVTOOLS_UNSEEN T __shfl_sync(unsigned, T x, int from) {
  return kvtools::testing::exchange(x, from);
}
template <class T>
KVTOOLS_UNSEEN T __shfl_xor_sync(unsigned, T x, int mask) {
  return kvtools::testing::exchange(x, kvtools::testing::lane() ^ mask);
}
template <class T>
KVTOOLS_UNSEEN T __shfl_down_sync(unsigned, T x, int by) {
  const int from = kvtools::testing::lane() + by;
  return kvtools::testing::exchange(x, from < 32 ? from : from - by);
}
template <class T>
KVTOOLS_UNSEEN T __shfl_up_sync(unsigned, T x, int by) {
  const int from = kvtools::testing::lane() - by;
  return kvtools::testing::exchange(x, from >= 0 ? from : from + by);
}
KVTOOLS_UNSEEN unsigned __ballot_sync(unsigned, bool x) { return kvtools::testing::ballot(x); }
KVTOOLS_UNSEEN bool __any_sync(unsigned, bool x) { return kvtools::testing::ballot(x) != 0; }
KVTOOLS_UNSEEN bool __all_sync(unsigned, bool x) { return kvtools::testing::ballot(x) == ~0u; }

template <class T>
KVTOOLS_UNSEEN T atomicAdd(T* p, T x) {
  return kvtools::testing::update(p, [x](T old) { return old + x; });
}
template <class T>
KVTOOLS_UNSEEN T atomicMax(T* p, T x) {
  return kvtools::testing::update(p, [x](T old) { return old > x ? old : x; });
}
template <class T>
KVTOOLS_UNSEEN T atomicMin(T* p, T x) {
  return kvtools::testing::update(p, [x](T old) { return old < x ? old : x; });
}

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
// Bytes of y:x, chosen by the lowest three bits of each hexadecimal digit of `selector`.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= (bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const float2 x = __half22float2(a), y = __half22float2(b), z = __half22float2(c);
  return __floats2half2_rn(fmaf(x.x, y.x, z.x), fmaf(x.y, y.y, z.y));
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __int_as_float(int x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline int __float_as_int(float x) {
  int y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float __uint_as_float(unsigned x) { return __int_as_float(static_cast<int>(x)); }
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(__float_as_int(x)); }
using std::max;
using std::min;

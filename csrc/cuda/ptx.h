// What only PTX says: approximations, asynchronous copies and products of tensor cores. On the host
// they do the same, a warp's operations by exchange between its lanes.
#pragma once

#include <type_traits>

#include "warp.h"

namespace kvtools::cuda {

// 2^x to 2^-22 of it; zero instead of subnormal numbers, which saves half of the instructions.
__device__ inline float exp2_approximately(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// 1 / x to 2^-23 of it, of normal numbers.
__device__ inline float reciprocal_approximately(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

// (x & mask) | more in one instruction; of two constants the compiler makes two.
__device__ inline uint32_t masked(uint32_t x, uint32_t mask, uint32_t more) {
#ifdef __CUDACC__
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(more));
  return y;
#else
  return (x & mask) | more;
#endif
}

// Copy `Bytes`, of which `valid` are read and the others are zero, to shared memory. They are
// there once the group that they are committed in has been waited for, by the thread that copied.
template <int Bytes>
__device__ inline void copy_async(void* to, const void* from, int valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
#ifdef __CUDACC__
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(valid));
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(Bytes),
                 "r"(valid));
#else
  testing::copy_later(to, from, Bytes, valid);
#endif
}

__device__ inline void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  testing::commit_copies();
#endif
}

// Wait for all groups but the last `Left`.
template <int Left>
__device__ inline void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
#else
  testing::wait_for_copies(Left);
#endif
}

// Four matrices of 8 by 8 elements of 16 bits; lane l has the address of row l % 8 of matrix l / 8.
// Lane 4 i + j gets elements 2 j and 2 j + 1 of row i, or of column i if Transposed, of each.
template <bool Transposed>
__device__ inline void load_matrices(uint32_t (&x)[4], const char* row) {
#ifdef __CUDACC__
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at)
                 : "memory");
#else
  const int i = lane_index() / 4, j = lane_index() % 4;
  for (int m = 0; m < 4; ++m) {
    auto element = [&](int row_index, int column) -> uint32_t {
      const auto* from =
          reinterpret_cast<const uint16_t*>(testing::exchange(row, 8 * m + row_index));
      return from[column];
    };
    x[m] = Transposed ? element(2 * j, i) | element(2 * j + 1, i) << 16
                      : element(i, 2 * j) | element(i, 2 * j + 1) << 16;
  }
#endif
}

// Of 8 by 8 elements of 16 bits, of which lane 4 i + j has elements 2 j and 2 j + 1 of row i: those
// of column i.
__device__ inline uint32_t transpose(uint32_t x) {
#ifdef __CUDACC__
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
#else
  const int i = lane_index() / 4, j = lane_index() % 4;
  auto element = [&](int row) {
    return testing::exchange(x, 4 * row + i / 2) >> 16 * (i % 2) & 0xffff;
  };
  const uint32_t low = element(2 * j), high = element(2 * j + 1);
  return low | high << 16;
#endif
}

// c += a b of tiles 16 by 16 and 16 by 8 of T, __half or __nv_bfloat16. With lane 4 i + j,
// registers hold: a, rows i and i + 8, columns 2 j and 2 j + 1, then the same rows and columns
// greater by 8; b, of column i, rows 2 j and 2 j + 1, then 8 more; c, columns 2 j and 2 j + 1 of
// row i, then of row i + 8.
template <class T>
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  testing::multiply<T>(c, a, b0, b1);
#endif
}

}  // namespace kvtools::cuda

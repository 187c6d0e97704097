// What the lanes of a warp do together.
#pragma once

#include "cuda.h"

namespace kvtools::cuda {

__device__ inline int lane_index() { return threadIdx.x % kWarp; }

// x of the lane whose index differs in the bit `distance`. Structs have overloads.
template <class T>
__device__ inline T across(T x, int distance) {
  return __shfl_xor_sync(kAll, x, distance);
}

// f(a, b) of all lanes, in every lane; f must not mind the order.
template <class T, class F>
__device__ inline T reduce(T x, F f) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) x = f(x, across(x, distance));
  return x;
}

// Sum of x up to this lane's.
template <class T>
__device__ inline T sum_so_far(T x) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const T other = __shfl_up_sync(kAll, x, distance);
    if (lane_index() >= distance) x += other;
  }
  return x;
}

// A place of its own at the end of a list for each lane that wants one; `size` grows by as many.
__device__ inline int place_in(int& size, bool wanted) {
  const unsigned who = __ballot_sync(kAll, wanted);
  if (!who) return 0;
  int start = 0;
  if (lane_index() == 0) start = atomicAdd(&size, __popc(who));
  return __shfl_sync(kAll, start, 0) + __popc(who & ((1u << lane_index()) - 1));
}

template <class T>
__device__ inline T sum(T x) {
  return reduce(x, [](T a, T b) { return a + b; });
}

__device__ inline float greatest(float x) {
  return reduce(x, [](float a, float b) { return fmaxf(a, b); });
}

// A step of `sums`: lanes whose index has the bit Half take the upper half of 2 Half values.
template <int Half, int N>
__device__ inline void fold(float (&x)[N]) {
  if constexpr (Half > 0) {
    const bool upper = lane_index() & Half;
#pragma unroll
    for (int i = 0; i < Half; ++i) {
      const float given = upper ? x[i] : x[i + Half], kept = upper ? x[i + Half] : x[i];
      x[i] = kept + __shfl_xor_sync(kAll, given, Half);
    }
    fold<Half / 2>(x);
  }
}

// N sums at once, N a power of two: lane l gets that of x[l % N]. Takes a shuffle per value, not
// one per value and step, and consumes x.
template <int N>
__device__ inline float sums(float (&x)[N]) {
  fold<N / 2>(x);
#pragma unroll
  for (int distance = N; distance < kWarp; distance *= 2)
    x[0] += __shfl_xor_sync(kAll, x[0], distance);
  return x[0];
}

}  // namespace kvtools::cuda

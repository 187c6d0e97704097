// What the lanes of a warp do together.
#pragma once

#include "cuda.h"

namespace kvtools::cuda {

__device__ inline int lane_index() { return threadIdx.x % kWarp; }

// f(a, b) of all lanes, in every lane; f must not mind the order.
template <class T, class F>
__device__ inline T reduce(T x, F f) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2)
    x = f(x, __shfl_xor_sync(kAll, x, distance));
  return x;
}

template <class T>
__device__ inline T sum(T x) {
  return reduce(x, [](T a, T b) { return a + b; });
}

__device__ inline float greatest(float x) {
  return reduce(x, [](float a, float b) { return fmaxf(a, b); });
}

// N sums at once, N a power of two: lane l gets that of x[l % N]. Takes a shuffle per value, not
// one per value and step, and consumes x.
template <int N>
__device__ inline float sums(float (&x)[N]) {
  const int lane = lane_index();
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
      x[i] = kept + __shfl_xor_sync(kAll, given, half);
    }
  }
#pragma unroll
  for (int distance = N; distance < kWarp; distance *= 2)
    x[0] += __shfl_xor_sync(kAll, x[0], distance);
  return x[0];
}

}  // namespace kvtools::cuda

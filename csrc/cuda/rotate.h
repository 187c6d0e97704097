// The rotation of kvtools/reference/quant.py, of a head spread over a warp.
#pragma once

#include "warp.h"

namespace kvtools::cuda {

// ±1 / sqrt(b) of element i: signs are the bits of a multiplicative hash.
__device__ inline float sign(int i, float norm) {
  const uint32_t flipped = (i * 0x9E3779B1u << 15) & 0x80000000u;
  return __uint_as_float(__float_as_uint(norm) ^ flipped);
}

// Walsh-Hadamard transform in blocks of b, a power of two. Lane l holds elements l E to l E + E
// - 1.
template <int E>
__device__ inline void transform(float (&x)[E], int b) {
#pragma unroll
  for (int distance = 1; distance < E; distance *= 2)
    if (distance < b) {
#pragma unroll
      for (int i = 0; i < E; ++i)
        if (!(i & distance)) {
          const float low = x[i], high = x[i + distance];
          x[i] = low + high, x[i + distance] = low - high;
        }
    }
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2)
    if (distance * E < b) {
      const bool upper = lane_index() & distance;
#pragma unroll
      for (int i = 0; i < E; ++i) {
        const float other = __shfl_xor_sync(kAll, x[i], distance);
        x[i] = other + (upper ? -x[i] : x[i]);
      }
    }
}

// x @ rotation(d), with norm = 1 / sqrt(d & -d)
template <int E>
__device__ inline void rotate(float (&x)[E], int d, float norm) {
#pragma unroll
  for (int i = 0; i < E; ++i) x[i] *= sign(lane_index() * E + i, norm);
  transform(x, d & -d);
}

}  // namespace kvtools::cuda

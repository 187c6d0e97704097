// A head spread over a warp: lane l holds elements l E to l E + E - 1, zero from d on. It is
// rotated as in kvtools/reference/quant.py.
#pragma once

#include <cmath>

#include "format.h"
#include "warp.h"

namespace kvtools::cuda {

// Elements are `step` bytes apart.
template <int E>
__device__ inline void load_head(float (&x)[E], const char* from, Type type, int64_t step, int d) {
#pragma unroll
  for (int j = 0; j < E; ++j) {
    const int e = lane_index() * E + j;
    x[j] = e < d ? number_at(from + e * step, type) : 0;
  }
}

template <int E>
__device__ inline void store_head(const float (&x)[E], char* to, Type type, int d) {
#pragma unroll
  for (int j = 0; j < E; ++j) {
    const int e = lane_index() * E + j;
    if (e < d) put_number(x[j], to + e * size_of(type), type);
  }
}

// The frame of a token for a KV head, whatever its id: where its centers and its gains are.
struct Frame {
  const char *center = nullptr, *gain = nullptr;
  Type type = Type::f32;

  Frame() = default;
  __device__ Frame(const Frames& all, int64_t token, int64_t head) : type(all.x.type) {
    if (!all.of) return;
    const int64_t i = min(max(int64_t{all.of[token]}, int64_t{0}), all.count - 1);
    center = all.x.at(i, 0, head), gain = all.x.at(i, 1, head);
  }

  __device__ float gain_at(int e) const { return number_at(gain + e * size_of(type), type); }

  // Element e of a key, as it is stored.
  __device__ float stored(float x, int e) const {
    return gain ? (x - number_at(center + e * size_of(type), type)) * gain_at(e) : x;
  }
};

// What the rotation of heads of size d divides by, inverted.
inline float norm_of(int64_t d) { return static_cast<float>(1 / std::sqrt(double(d & -d))); }

// ±1 / sqrt(b) of element i: signs are the bits of a multiplicative hash.
__device__ inline float sign(int i, float norm) {
  const uint32_t flipped = (i * 0x9E3779B1u << 15) & 0x80000000u;
  return __uint_as_float(__float_as_uint(norm) ^ flipped);
}

// Walsh-Hadamard transform in blocks of b, a power of two.
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

// x @ rotation(d); `norm` is norm_of(d).
template <int E>
__device__ inline void rotate(float (&x)[E], int d, float norm) {
#pragma unroll
  for (int i = 0; i < E; ++i) x[i] *= sign(lane_index() * E + i, norm);
  transform(x, d & -d);
}

// x @ rotation(d).T
template <int E>
__device__ inline void rotate_back(float (&x)[E], int d, float norm) {
  transform(x, d & -d);
#pragma unroll
  for (int i = 0; i < E; ++i) x[i] *= sign(lane_index() * E + i, norm);
}

}  // namespace kvtools::cuda

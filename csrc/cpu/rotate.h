// The rotation of kvtools/reference/quant.py: random signs, then a normalised Walsh-Hadamard
// transform in blocks of b, the greatest power of two that divides d.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace kvtools::KVTOOLS_ISA {

constexpr uint32_t kHash = 0x9E3779B1;  // signs are a bit of multiples of it

// Sums and differences of the lanes at Distance.
template <int Distance>
inline f32 butterfly(f32 x) {
  if constexpr (Distance < kLanes) {
    const u32 upper = bit_cast<u32>((lane_index() & Distance) != 0);
    return exchange<Distance>(x) + bit_cast<f32>(bit_cast<u32>(x) ^ (upper << 31));
  } else {
    return x;
  }
}

// Butterflies inside a vector. A block shorter than a vector never crosses one.
inline f32 transform_lanes(f32 x, int64_t b) {
  if (b > 1) x = butterfly<1>(x);
  if (b > 2) x = butterfly<2>(x);
  if (b > 4) x = butterfly<4>(x);
  if (b > 8) x = butterfly<8>(x);
  return x;
}

// Butterflies of whole vectors.
inline void transform_blocks(float* x, int64_t d, int64_t b) {
  for (int64_t distance = kLanes; distance < b; distance *= 2)
    for (int64_t begin = 0; begin < d; begin += 2 * distance)
      for (int64_t i = begin; i < begin + distance; i += kLanes) {
        const f32 low = load(x + i), high = load(x + i + distance);
        store(x + i, low + high);
        store(x + i + distance, low - high);
      }
}

// x[i] = f(x[i], ±1 / sqrt(b)), a vector at a time.
template <class F>
inline void with_signs(float* x, int64_t d, int64_t b, F f) {
  const u32 norm = bit_cast<u32>(splat(1 / std::sqrt(static_cast<double>(b))));
  u32 hash = lane_index() * kHash;
  for (int64_t i = 0; i < d; i += kLanes, hash += kLanes * kHash) {
    const f32 sign = bit_cast<f32>(norm | ((hash << 15) & 0x80000000));
    if (i + kLanes <= d)
      store(x + i, f(load(x + i), sign));
    else
      store_part(x + i, f(load_part(x + i, d - i), sign), d - i);
  }
}

// x = x @ rotation(d)
inline void rotate(float* x, int64_t d) {
  const int64_t b = d & -d;
  with_signs(x, d, b, [b](f32 y, f32 sign) { return transform_lanes(y * sign, b); });
  transform_blocks(x, d, b);
}

// Butterflies of R vectors, as far as their blocks of b reach.
template <int R, int Distance = 1>
inline void transform(f32 (&x)[R], int64_t b = R) {
  if constexpr (Distance < R) {
    if (Distance >= b) return;
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
      if ((i & Distance) == 0) {
        const f32 low = x[i], high = x[i + Distance];
        x[i] = low + high, x[i + Distance] = low - high;
      }
    transform<R, 2 * Distance>(x, b);
  }
}

// Butterflies of vectors `step` to R step / 2 apart.
template <int R>
inline void transform_apart(f32* x, int64_t d, int64_t step) {
  for (int64_t begin = 0; begin < d; begin += R * step)
    for (int64_t e = begin; e < begin + step; ++e) {
      f32 some[R];
      for (int i = 0; i < R; ++i) some[i] = x[e + i * step];
      transform(some);
      for (int i = 0; i < R; ++i) x[e + i * step] = some[i];
    }
}

// rotate() of kLanes rows of whole vectors, each to a lane: x[e] gets element e of all.
inline void rotate_across(const float* const* rows, f32* x, int64_t d) {
  const int64_t b = d & -d;
  const auto norm = static_cast<float>(1 / std::sqrt(static_cast<double>(b)));
  for (int64_t begin = 0; begin < d; begin += kLanes) {
    f32 square[kLanes];
    for (int i = 0; i < kLanes; ++i) square[i] = load(rows[i] + begin);
    transpose(square);
    for (int i = 0; i < kLanes; ++i)
      square[i] *= static_cast<uint32_t>(begin + i) * kHash & 0x10000 ? -norm : norm;
    if (b >= kLanes)
      transform(square);
    else
      transform(square, b);
    std::copy_n(square, std::min<int64_t>(kLanes, d - begin), x + begin);
  }
  for (int64_t distance = kLanes; distance < b; distance *= 8)
    if (b == 2 * distance)
      transform_apart<2>(x, d, distance);
    else if (b == 4 * distance)
      transform_apart<4>(x, d, distance);
    else
      transform_apart<8>(x, d, distance);
}

// x = x @ rotation(d).T
inline void rotate_back(float* x, int64_t d) {
  const int64_t b = d & -d;
  transform_blocks(x, d, b);
  with_signs(x, d, b, [b](f32 y, f32 sign) { return transform_lanes(y, b) * sign; });
}

}  // namespace kvtools::KVTOOLS_ISA

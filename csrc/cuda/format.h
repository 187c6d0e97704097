// Formats of stored heads, as in kvtools/reference/quant.py: levels, and where codes lie.
#pragma once

#include "cuda.h"

namespace kvtools::cuda {

constexpr int kMostD = 256;  // the largest heads that are taken

// Levels lie at c (1 + kBend (c / kTop)²), with c from -kTop to kTop in steps of one. Codes are
// split into planes of kLow bits, the lowest, and kHigh bits.
template <int Bits>
struct Grid {
  static constexpr float kTop = ((1 << Bits) - 1) / 2.0f;
  static constexpr float kBend = Bits == 6 || Bits == 4 ? 0.5f : Bits == 3 ? 0.4f : 0;
  static constexpr float kCubic = kBend / (kTop * kTop);
  static constexpr float kGreatest = kTop * (1 + kBend);
  static constexpr int kLow = Bits == 6 ? 4 : Bits == 3 ? 2 : Bits, kHigh = Bits - kLow;

  __device__ static float level(float c) { return kBend > 0 ? c * (1 + kCubic * (c * c)) : c; }
};

// A number of any floating point type.
__device__ inline float number_at(const char* p, Type type) {
  switch (type) {
    case Type::f32:
      return *reinterpret_cast<const float*>(p);
    case Type::bf16:
      return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(p));
    default:
      return __half2float(*reinterpret_cast<const __half*>(p));
  }
}

__device__ inline void put_number(float x, char* p, Type type) {
  switch (type) {
    case Type::f32:
      *reinterpret_cast<float*>(p) = x;
      break;
    case Type::bf16:
      *reinterpret_cast<__nv_bfloat16*>(p) = __float2bfloat16_rn(x);
      break;
    default:
      *reinterpret_cast<__half*>(p) = __float2half_rn(x);
  }
}

}  // namespace kvtools::cuda

// Numbers and levels, as they are stored.
#pragma once

#include "../levels.h"
#include "cuda.h"

namespace kvtools::cuda {

constexpr int kMostD = 256;                            // the largest heads that are taken
constexpr float kLeastScale = 5.9604644775390625e-8f;  // 2^-24, in fp16

template <int Bits>
struct Grid : Levels<Bits> {
  using L = Levels<Bits>;
  __device__ static float level(float c) {
    return L::kBend > 0 ? c * (1 + L::kCubic * (c * c)) : c;
  }
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

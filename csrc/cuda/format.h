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

// A number of any floating point type. Those of 16 bits are moved as integers: csrc/testing does
// not see what a call takes or returns as a struct.
__device__ inline float number_at(const char* p, Type type) {
  switch (type) {
    case Type::f32:
      return *reinterpret_cast<const float*>(p);
    case Type::bf16:
      return __bfloat162float(__ushort_as_bfloat16(*reinterpret_cast<const uint16_t*>(p)));
    default:
      return __half2float(__ushort_as_half(*reinterpret_cast<const uint16_t*>(p)));
  }
}

__device__ inline void put_number(float x, char* p, Type type) {
  switch (type) {
    case Type::f32:
      *reinterpret_cast<float*>(p) = x;
      break;
    case Type::bf16:
      *reinterpret_cast<uint16_t*>(p) = __bfloat16_as_ushort(__float2bfloat16_rn(x));
      break;
    default:
      *reinterpret_cast<uint16_t*>(p) = __half_as_ushort(__float2half_rn(x));
  }
}

}  // namespace kvtools::cuda

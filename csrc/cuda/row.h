// A row of logits: what z its tokens have, their noise, and the scores and masses that follow,
// computed as in kvtools/reference/sampling.py.
#pragma once

#include "format.h"
#include "kernels.h"
#include "ptx.h"
#include "warp.h"

namespace kvtools::cuda {

using Mass = unsigned long long;  // 2^40 e^(z - best), rounded; or a number of tokens

constexpr int kEach = 8;  // tokens of a lane
constexpr int kGroup = Sampling::kGroup;
static_assert(kGroup == kEach * kWarp);

// x / y for all x, rounded as division is. Where nothing can overflow these are the steps that the
// compiler takes, too, but it would find the inverse anew for each x.
__device__ inline void divide(float (&x)[kEach], float y) {
  float inverse = reciprocal_approximately(y);
  inverse = fmaf(inverse, fmaf(-y, inverse, 1.0f), inverse);
  const float most = 0x1p-20f < y && y < 0x1p20f ? 0x1p100f : 0;
  unsigned left = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const bool fits = (0x1p-100f < fabsf(x[i])) & (fabsf(x[i]) < most);
    const float q = x[i] * inverse;
    x[i] = fits ? fmaf(inverse, fmaf(-y, q, x[i]), q) : x[i];
    left |= !fits << i;
  }
  if (!left) return;
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (left >> i & 1 && 0 < fabsf(x[i]) && fabsf(x[i]) < INFINITY) x[i] /= y;
}

// A row: its logits, and how it is sampled.
struct Row {
  const char* logits;
  Type type;
  int64_t step;  // bytes from a logit to the next
  int v, groups;
  bool vectors;  // whether 16 bytes may be read at once
  float temperature, top_p, min_p;
  int64_t top_k;

  __device__ Row(const Sample& p, int64_t i)
      : logits(p.logits.at(i)),
        type(p.logits.type),
        step(p.logits.stride[1] * size_of(type)),
        v(static_cast<int>(p.v)),
        groups((v + kGroup - 1) / kGroup),
        vectors(p.logits.stride[1] == 1 && reinterpret_cast<uintptr_t>(logits) % 16 == 0),
        temperature(p.temperature[i]),
        top_p(p.top_p[i]),
        min_p(p.min_p[i]),
        top_k(p.top_k[i]) {}

  // No && and ||, whose branches would have the logits wait for what decides.
  __device__ bool greedy() const { return temperature == 0; }
  __device__ bool cut() const { return (top_k > 0) & (top_k < v); }
  __device__ bool filtered() const { return (!greedy()) & (cut() | (top_p < 1) | (min_p > 0)); }
  __device__ bool noisy() const { return (!greedy()) & (!filtered()); }

  // Whether `weigh` puts tokens into bins: by mass, or by number where top-k is so large that the
  // greatest of the groups tell little.
  __device__ bool binned() const { return filtered() && (cut() ? top_k > groups / 2 : top_p < 1); }

  // z, which is logit / temperature, of tokens `first` to `first` + 7; -inf beyond the last.
  __device__ void load(int first, float (&z)[kEach]) const {
    load_logits(first, z);
    if (temperature != 0 && temperature != 1) divide(z, temperature);
  }

  __device__ void load_logits(int first, float (&z)[kEach]) const {
    const char* x = logits + first * step;
    uint32_t bits[kEach];
    if (vectors && first + kEach <= v) {
      const uint4* words = reinterpret_cast<const uint4*>(x);
      const uint4 low = words[0];
      const uint32_t in_low[] = {low.x, low.y, low.z, low.w};
      if (type == Type::f32) {
        const uint4 high = words[1];
        const uint32_t in_high[] = {high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) bits[i] = in_low[i], bits[i + 4] = in_high[i];
      } else {
#pragma unroll
        for (int i = 0; i < kEach; ++i) bits[i] = i % 2 ? in_low[i / 2] >> 16 : in_low[i / 2];
      }
    } else {
      const uint32_t none = type == Type::f32 ? 0xff800000 : type == Type::bf16 ? 0xff80 : 0xfc00;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        bits[i] = none;
        if (first + i < v)
          bits[i] = type == Type::f32 ? *reinterpret_cast<const uint32_t*>(x + i * step)
                                      : *reinterpret_cast<const uint16_t*>(x + i * step);
      }
    }
    if (type == Type::f32) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) z[i] = __uint_as_float(bits[i]);
    } else if (type == Type::bf16) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) z[i] = __uint_as_float(bits[i] << 16);
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i) z[i] = __half2float(__ushort_as_half(bits[i] & 0xffff));
    }
  }
};

// Philox4x32-10 of a row.
struct Noise {
  uint32_t position, key_0, key_1;

  __device__ Noise(const Sample& p, int64_t i)
      : position(static_cast<uint32_t>(p.position[i])),
        key_0(static_cast<uint32_t>(p.seed[i])),
        key_1(static_cast<uint32_t>(p.seed[i] >> 32)) {}

  // The words of tokens `first` to `first` + 3, of which `first` is a multiple of 4.
  __device__ void draw(int first, uint32_t* word) const {
    uint32_t c0 = first / 4, c1 = position, c2 = 0, c3 = 0;
#pragma unroll
    for (uint32_t round = 0; round < 10; ++round) {
      const uint64_t product_0 = uint64_t(c0) * 0xD2511F53, product_1 = uint64_t(c2) * 0xCD9E8D57;
      c0 = static_cast<uint32_t>(product_1 >> 32) ^ c1 ^ (key_0 + round * 0x9E3779B9);
      c2 = static_cast<uint32_t>(product_0 >> 32) ^ c3 ^ (key_1 + round * 0xBB67AE85);
      c1 = static_cast<uint32_t>(product_1), c3 = static_cast<uint32_t>(product_0);
    }
    word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
  }
};

__device__ inline float relative(float z, float base) {
  return exp2_approximately((z - base) * kLog2e);
}

// e^score is e / -log(1 - u), which is at most this, as -log(1 - u) >= 2 u / (2 - u). Few can win
// by it, and fp64 decides among them.
__device__ inline float bound_of(float e, uint32_t word) {
  const float u = fmaf(static_cast<float>(word), 0x1p-32f, 0x1p-33f);
  return e * (reciprocal_approximately(u) - 0.5f);
}

__device__ inline double score_of(float z, uint32_t word) {
  // 1 - u is exact, so its logarithm is as good as log1p(-u).
  return z - log(-log(1 - (word + 0.5) * 0x1p-32));
}

// 2^40 e^(z - best) as an integer; each step rounds as that of the reference.
__device__ inline Mass mass_of(float z, float best) {
  const float x = fminf((best - z) * kLog2e, 64.0f);
  const float shifted = x + 0x1.8p23f, r = (shifted - 0x1.8p23f) - x;
  float y = 0x1.41fbbcp-13f * r + 0x1.5f3e54p-10f;
  y = y * r + 0x1.3b2d4cp-7f;
  y = y * r + 0x1.c6aee8p-5f;
  y = y * r + 0x1.ebfbdcp-3f;
  y = y * r + 0x1.62e430p-1f;
  y = y * r + 1.0f;
  return llrintf(__uint_as_float(__float_as_uint(y) + ((40 - __float_as_uint(shifted)) << 23)));
}

}  // namespace kvtools::cuda

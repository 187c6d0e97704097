// Codes of stored heads as fp16, two at a time, as tensor cores take them; or one by one in fp32.
#pragma once

#include <type_traits>

#include "format.h"

namespace kvtools::cuda {

__device__ inline __half2 halves(uint32_t x) { return *reinterpret_cast<__half2*>(&x); }
__device__ inline uint32_t bits(__half2 x) { return *reinterpret_cast<uint32_t*>(&x); }

// Two numbers of T.
template <class T>
__device__ inline uint32_t packed(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 x = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
  } else {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
  }
}

// Codes of `Bits` bits as fp16.
template <int Bits>
struct Integers {
  using G = Grid<Bits>;
  static constexpr int kParts = 8 / G::kLow;  // elements that share a byte of the low plane
  struct Word {
    uint32_t low, high;
  };

  // Bytes `at` to `at` + 3 of the low plane, of `width` bytes, and what goes with them.
  __device__ static Word load(const char* row, int at, int width) {
    Word word{*reinterpret_cast<const uint32_t*>(row + at), 0};
    if constexpr (G::kHigh > 0) {
      const bool second = at >= width / 2;
      word.high = *reinterpret_cast<const uint32_t*>(row + width + (second ? at - width / 2 : at));
      word.high >>= second ? G::kHigh : 0;
    }
    return word;
  }

  __device__ static Word permute(const Word& a, const Word& b, unsigned selector) {
    return {__byte_perm(a.low, b.low, selector),
            G::kHigh > 0 ? __byte_perm(a.high, b.high, selector) : 0};
  }

  // Levels of the codes in bytes `byte` and `byte` + 2, of those that share it the `part`th.
  __device__ static uint32_t pair(const Word& word, int part, int byte) {
    // Where a code makes 2^Bits + code of the fp16 2^Bits.
    constexpr int kAt = 10 - Bits;
    constexpr uint32_t kLow = ((1 << G::kLow) - 1) << kAt,
                       kHigh = ((1 << G::kHigh) - 1) << (kAt + G::kLow), kBoth = 0x10001;
    auto shifted = [](uint32_t x, int by) { return by > 0 ? x >> by : x << -by; };
    const int from = part * G::kLow + 8 * byte;
    uint32_t x = (shifted(word.low, from - kAt) & kLow * kBoth) | (15 + Bits) * 1024 * kBoth;
    if constexpr (G::kHigh > 0) x |= shifted(word.high, from - kAt - G::kLow) & kHigh * kBoth;
    __half2 c = __hsub2(halves(x), __float2half2_rn((1 << Bits) + G::kTop));
    if constexpr (G::kBend > 0)
      c = __hmul2(c, __hfma2(__hmul2(c, c), __float2half2_rn(G::kCubic), __float2half2_rn(1)));
    return bits(c);
  }

  // The level of one code.
  __device__ static float value(int code) { return G::level(code - G::kTop); }
};

// fp8 (e4m3) as fp16. It has the layout of fp16 with an exponent less by 8, but for NaN.
struct Fp8 : Integers<8> {
  __device__ static uint32_t pair(const Word& word, int, int byte) {
    const uint32_t x = byte ? word.low : word.low << 8;
    const uint32_t magnitude = x & 0x7f007f00, nan = (magnitude + 0x01000100) & 0x80008000;
    const uint32_t y = (x & 0x80008000) | (magnitude | nan) >> 1;
    return bits(__hmul2(halves(y), __float2half2_rn(256)));
  }

  __device__ static float value(int code) {
    if ((code & 0x7f) == 0x7f) return NAN;
    return __uint_as_float((code & 0x80) << 24 | (code & 0x7f) << 20) * 0x1p120f;
  }
};

template <class F>
__device__ inline void with_codes(Format format, F f) {
  switch (format) {  // by itself: by `with_bits`, sm_90a spills
    case Format::fp8:
      return f(Fp8{});
    case Format::int8:
      return f(Integers<8>{});
    case Format::int6:
      return f(Integers<6>{});
    case Format::int4:
      return f(Integers<4>{});
    case Format::int3:
      return f(Integers<3>{});
    default:
      return f(Integers<2>{});
  }
}

// The logarithm of the number of elements that share a byte, of the low plane where there are two.
KVTOOLS_ANYWHERE inline int parts_log2(Format format) {
  switch (format) {
    case Format::int6:
    case Format::int4:
      return 1;
    case Format::int3:
    case Format::int2:
      return 2;
    default:
      return 0;
  }
}

KVTOOLS_ANYWHERE inline int high_bits(Format format) {
  return format == Format::int6 ? 2 : format == Format::int3 ? 1 : 0;
}

// Element e in fp32, scale left out.
__device__ inline float element_at(const Content& x, const char* row, int e, int d) {
  if (x.format == Format::none) return number_at(row + e * size_of(x.type), x.type);
  auto plane = [&](int byte, int bits) {
    const int width = d * bits / 8;
    return static_cast<uint8_t>(row[byte + e % width]) >> e / width * bits & ((1 << bits) - 1);
  };
  const int low = 8 >> parts_log2(x.format), high = high_bits(x.format);
  int code = plane(0, low);
  if (high) code |= plane(d * low / 8, high) << low;
  float value;
  with_codes(x.format, [&](auto codes) { value = decltype(codes)::value(code); });
  return value;
}

}  // namespace kvtools::cuda

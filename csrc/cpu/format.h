// Formats of stored heads, as in kvtools/reference/quant.py: levels, and how codes are packed.
// decode.h reads them.
#pragma once

#include <type_traits>

#include "simd.h"

namespace kvtools::KVTOOLS_ISA {

// Levels lie at c (1 + kBend (c / kTop)²), with c from -kTop to kTop in steps of one.
template <int Bits>
struct Grid {
  static constexpr float kTop = ((1 << Bits) - 1) / 2.0f;
  static constexpr float kBend = Bits == 6 || Bits == 4 ? 0.5f : Bits == 3 ? 0.4f : 0;
  static constexpr float kCubic = kBend / (kTop * kTop);
  static constexpr float kGreatest = kTop * (1 + kBend);

  static f32 level(f32 c) { return kBend > 0 ? c * (1 + kCubic * (c * c)) : c; }
};

// Call f with the bits of an integer format, as a type.
template <class F>
inline void with_bits(Format format, F f) {
  switch (format) {
    case Format::int8:
      return f(std::integral_constant<int, 8>{});
    case Format::int6:
      return f(std::integral_constant<int, 6>{});
    case Format::int4:
      return f(std::integral_constant<int, 4>{});
    case Format::int3:
      return f(std::integral_constant<int, 3>{});
    default:
      return f(std::integral_constant<int, 2>{});
  }
}

// A plane holds `Bits` bits of every code, from bit `Low` on, in w = d Bits / 8 bytes: those of
// elements j, j + w, ... in byte j, lowest bits first.
template <int Bits, int Low>
inline void pack_plane(const uint8_t* codes, int64_t w, uint8_t* plane) {
  for (int64_t j = 0; j < w; ++j) {
    int byte = 0;
    for (int i = 0; i < 8 / Bits; ++i)
      byte |= (codes[j + i * w] >> Low & ((1 << Bits) - 1)) << (Bits * i);
    plane[j] = byte;
  }
}

// 6 bits lie in planes of 4 and 2, and 3 in planes of 2 and 1; others in one.
template <int Bits>
inline void pack(const uint8_t* codes, int64_t d, uint8_t* packed) {
  if constexpr (Bits == 6 || Bits == 3) {
    constexpr int kLow = Bits == 6 ? 4 : 2;
    pack_plane<kLow, 0>(codes, d * kLow / 8, packed);
    pack_plane<Bits - kLow, kLow>(codes, d * (Bits - kLow) / 8, packed + d * kLow / 8);
  } else {
    pack_plane<Bits, 0>(codes, d * Bits / 8, packed);
  }
}

// Of at most 448 in magnitude; half to even.
inline u32 to_fp8(f32 x) {
  const u32 bits = bit_cast<u32>(x), magnitude = bits & 0x7fffffff;
  // Normal: rebias, round. Small: adding 2^14 lines the bits up, and rounds.
  const u32 normal = (magnitude - (120u << 23) + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  const u32 small = bit_cast<u32>(bit_cast<f32>(magnitude) + 0x1p14f) - 0x46800000;
  const u32 is_small = bit_cast<u32>(magnitude < (121u << 23));
  return (small & is_small) | (normal & ~is_small) | (bits >> 24 & 0x80);
}

}  // namespace kvtools::KVTOOLS_ISA

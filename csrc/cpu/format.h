// Formats of stored heads, as in kvtools/reference/quant.py: levels, and how codes are packed.
// decode.h reads them.
#pragma once

#include "../levels.h"
#include "simd.h"

namespace kvtools::KVTOOLS_ISA {

// Levels, of vectors.
template <int Bits>
struct Grid : Levels<Bits> {
  using L = Levels<Bits>;
  static f32 level(f32 c) { return L::kBend > 0 ? c * (1 + L::kCubic * (c * c)) : c; }
};

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

// All planes, one behind another.
template <int Bits>
inline void pack(const uint8_t* codes, int64_t d, uint8_t* packed) {
  constexpr int kLow = Levels<Bits>::kLow, kHigh = Levels<Bits>::kHigh;
  pack_plane<kLow, 0>(codes, d * kLow / 8, packed);
  if constexpr (kHigh > 0) pack_plane<kHigh, kLow>(codes, d * kHigh / 8, packed + d * kLow / 8);
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

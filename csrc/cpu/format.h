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
// elements j, j + w, ... in byte j, lowest bits first. Here four bytes of it are a word; each lane
// has a plane of its own.
template <int Bits, int Low>
inline void pack_plane(const u32* codes, int64_t w, u32* words) {
  constexpr uint32_t kMask = (1 << Bits) - 1;
  for (int64_t j = 0; j < w; j += 4) {
    u32 word{};
    for (int byte = 0; byte < 4 && j + byte < w; ++byte)
      for (int i = 0; i < 8 / Bits; ++i)
        word |= (codes[j + byte + i * w] >> Low & kMask) << (8 * byte + Bits * i);
    *words++ = word;
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

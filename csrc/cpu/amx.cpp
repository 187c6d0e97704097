#include "amx.h"

#include <cmath>

#if KVTOOLS_TILES
namespace kvtools::KVTOOLS_ISA {

// The product that attention takes, of fixed numbers of all magnitudes that fp32 adds well. What a
// processor rounds otherwise is small; tiles that lie otherwise differ by as much as there is.
bool tiles_agree() {
#if KVTOOLS_AMX
  constexpr int kSide = 2 * kTileSide, kSteps = 3, kDepth = kSteps * kTileDepth;
  uint16_t a[kSide][kDepth];
  uint32_t b[kDepth / 2][kSide];
  uint32_t state = 1;
  auto next = [&] {  // of either sign, in [1/16, 16)
    state = state * 1664525 + 1013904223;
    return static_cast<uint16_t>((state >> 31) << 15 | ((123 + (state >> 20) % 8) << 7) |
                                 (state >> 8 & 0x7f));
  };
  for (auto& row : a)
    for (auto& x : row) x = next();
  for (auto& row : b)
    for (auto& x : row) x = next() | static_cast<uint32_t>(next()) << 16;
  float found[kSide][kSide], expected[kSide][kSide];
  auto fill = [&](auto& c) {
    for (int r = 0; r < kSide; ++r)
      for (int i = 0; i < kSide; ++i) c[r][i] = r - i;
  };
  auto at = [](const auto* x) { return reinterpret_cast<const char*>(x); };
  const TileRows rows[] = {{at(a[0]), sizeof a[0], kTileBytes},
                           {at(a[kTileSide]), sizeof a[0], kTileBytes}};
  const TileRows columns{at(b[0]), sizeof b[0], kTileSide * sizeof b[0]};
  bool agree = true;
  for (bool add : {false, true}) {
    fill(found), fill(expected);
    multiply<EmulatedAmx, 2, 2>(rows, columns, kSteps, expected[0], kSide, add);
    {
      const TileConfig config(true);
      multiply<Amx, 2, 2>(rows, columns, kSteps, found[0], kSide, add);
    }
    // So many sums of so many products below 256 are rounded, each by half a unit.
    for (int r = 0; r < kSide; ++r)
      for (int i = 0; i < kSide; ++i)
        agree &= std::abs(found[r][i] - expected[r][i]) <= kDepth * 256 * kDepth * 0x1p-24f;
  }
  return agree;
#else
  return false;
#endif
}

}  // namespace kvtools::KVTOOLS_ISA
#endif

// Integer formats of stored heads, as in kvtools/reference/quant.py: where levels lie, and how the
// bits of a code are split.
#pragma once

#include <type_traits>

#include "params.h"

namespace kvtools {

// Levels lie at c (1 + kBend (c / kTop)²), with c from -kTop to kTop in steps of one. Codes are
// split into planes of kLow bits, the lowest, and kHigh bits.
template <int Bits>
struct Levels {
  static constexpr float kTop = ((1 << Bits) - 1) / 2.0f;
  static constexpr float kBend = Bits == 6 || Bits == 4 ? 0.5f : Bits == 3 ? 0.4f : 0;
  static constexpr float kCubic = kBend / (kTop * kTop);
  static constexpr float kGreatest = kTop * (1 + kBend);
  static constexpr int kLow = Bits == 6 ? 4 : Bits == 3 ? 2 : Bits, kHigh = Bits - kLow;
  // Ranges that are tried.
  static constexpr int kTries = Bits == 6 ? 3 : Bits == 4 ? 7 : Bits == 3 ? 10 : Bits == 2 ? 12 : 1;
};

// Call f with the bits of an integer format, as a type.
template <class F>
KVTOOLS_ANYWHERE inline void with_bits(Format format, F f) {
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

}  // namespace kvtools

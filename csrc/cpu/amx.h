// Products of matrices in bf16 by AMX. A tile has 16 rows of 64 bytes: 16 numbers of fp32, or 16
// pairs of bf16. Beside the instructions stands their emulation, for tests and the check of a
// processor.
#pragma once

#include <algorithm>

#include "isa.h"
#include "simd.h"

namespace kvtools::KVTOOLS_ISA {

#if !KVTOOLS_TILES
constexpr bool kTiles = false;
struct TileConfig {
  explicit TileConfig(bool) {}
};
#else
constexpr bool kTiles = true;
constexpr int kTileSide = 16;              // rows, and 32-bit words of a row
constexpr int kTileBytes = 4 * kTileSide;  // of a row
constexpr int kTileDepth = 2 * kTileSide;  // elements of bf16 in a row
static_assert(kLanes == kTileSide);

#if KVTOOLS_AMX
// Not by intrinsics: those of GCC take a tile's number as text, and do not say that they read
// memory. No compiler allocates tiles by itself.
struct Amx {
  template <int T>
  void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>
  void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
  }
  // C += A B, where a row of B has pairs, one of each column.
  template <int C, int A, int B>
  void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};
#endif

// The same as Intel documents it: sums over even and over odd elements, each by FMA from zero; then
// both are added, and that to C. Denormals count as zeros, as operands and as results.
struct EmulatedAmx {
  alignas(64) uint32_t tile[8][kTileSide][kTileSide];

  template <int T>
  void zero() {
    std::memset(tile[T], 0, sizeof tile[T]);
  }
  template <int T>
  void load(const void* from, int64_t stride) {
    for (int r = 0; r < kTileSide; ++r)
      std::memcpy(tile[T][r], static_cast<const char*>(from) + r * stride, kTileBytes);
  }
  template <int T>
  void store(void* to, int64_t stride) {
    for (int r = 0; r < kTileSide; ++r)
      std::memcpy(static_cast<char*>(to) + r * stride, tile[T][r], kTileBytes);
  }
  template <int C, int A, int B>
  void dot() {
    for (int r = 0; r < kTileSide; ++r) {
      f32 even{}, odd{};
      for (int i = 0; i < kTileSide; ++i) {
        const u32 a = u32{} + tile[A][r][i], b = load_bits<u32>(tile[B][i]);
        even = flushed(_mm512_fmadd_ps(high(a << 16), high(b << 16), even));
        odd = flushed(_mm512_fmadd_ps(high(a), high(b), odd));
      }
      const f32 c = flushed(load_bits<f32>(tile[C][r]));
      const f32 sum = flushed(c + flushed(even + odd));
      std::memcpy(tile[C][r], &sum, sizeof sum);
    }
  }

 private:
  static f32 flushed(f32 x) {
    const u32 bits = bit_cast<u32>(x), normal = bit_cast<u32>((bits & 0x7f800000) != 0);
    return bit_cast<f32>(bits & (normal | 0x80000000));
  }
  static f32 high(u32 pair) { return flushed(bit_cast<f32>(pair & 0xffff0000)); }
};

// While it lives, tiles are configured, if that is `wanted`; then they are as before: a library
// that keeps its configuration between calls, as oneDNN may, does not notice.
class TileConfig {
 public:
#if KVTOOLS_AMX
  explicit TileConfig(bool wanted) : set_(wanted) {
    if (!set_) return;
    Bytes ours{1};  // the palette, of 8 tiles
    for (int t = 0; t < 8; ++t) ours.row_bytes[t] = kTileBytes, ours.rows[t] = kTileSide;
    asm volatile("sttilecfg %0" : "=m"(before_));
    asm volatile("ldtilecfg %0" : : "m"(ours));
  }
  ~TileConfig() {
    if (!set_) return;
    if (before_.palette)
      asm volatile("ldtilecfg %0" : : "m"(before_));
    else
      asm volatile("tilerelease");
  }

 private:
  struct Bytes {
    uint8_t palette, start_row, zeros[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Bytes) == 64);

  const bool set_;
  Bytes before_;
#else
  explicit TileConfig(bool) {}
#endif
  TileConfig(const TileConfig&) = delete;
};

// Call f with a null pointer of what computes: the instructions, or their emulation.
template <class F>
inline void with_tiles(F f) {
#if KVTOOLS_AMX
  if (isa() == Isa::amx) return f(static_cast<Amx*>(nullptr));
#endif
  f(static_cast<EmulatedAmx*>(nullptr));
}

// Where the tiles of an operand lie: rows are `stride` bytes apart, tiles along the sum `step`.
struct TileRows {
  const char* at;
  int64_t stride, step;
};

// c (+)= a b for M tiles of rows and N of columns of c, up to 2 x 2, over `steps` tiles along the
// sum. Two tiles loaded for two products each: a load takes half the time of a product.
template <class Tiles, int M, int N>
inline void multiply(const TileRows* a, TileRows b, int64_t steps, float* c, int64_t width,
                     bool add) {
  Tiles tiles;
  const int64_t stride = width * sizeof *c;
  float* below = c + kTileSide * width;
  if (add) {
    tiles.template load<0>(c, stride);
    if constexpr (N > 1) tiles.template load<1>(c + kTileSide, stride);
    if constexpr (M > 1) tiles.template load<2>(below, stride);
    if constexpr (M > 1 && N > 1) tiles.template load<3>(below + kTileSide, stride);
  } else {
    tiles.template zero<0>();
    if constexpr (N > 1) tiles.template zero<1>();
    if constexpr (M > 1) tiles.template zero<2>();
    if constexpr (M > 1 && N > 1) tiles.template zero<3>();
  }
  const char *first = a[0].at, *second = a[M - 1].at;
  for (int64_t i = 0; i < steps; ++i) {
    tiles.template load<4>(first, a[0].stride);
    tiles.template load<6>(b.at, b.stride);
    tiles.template dot<0, 4, 6>();
    if constexpr (N > 1) {
      tiles.template load<7>(b.at + kTileBytes, b.stride);
      tiles.template dot<1, 4, 7>();
    }
    if constexpr (M > 1) {
      tiles.template load<5>(second, a[1].stride);
      tiles.template dot<2, 5, 6>();
    }
    if constexpr (M > 1 && N > 1) tiles.template dot<3, 5, 7>();
    first += a[0].step, second += a[M - 1].step, b.at += b.step;
  }
  tiles.template store<0>(c, stride);
  if constexpr (N > 1) tiles.template store<1>(c + kTileSide, stride);
  if constexpr (M > 1) tiles.template store<2>(below, stride);
  if constexpr (M > 1 && N > 1) tiles.template store<3>(below + kTileSide, stride);
}

// 16 rows as a tile's: in place where they are evenly spaced, else copied to `buffer`.
inline TileRows evenly(const char* const* rows, int64_t bytes, char* buffer) {
  const int64_t stride = rows[1] - rows[0];
  bool even = true;
  for (int i = 2; i < kTileSide; ++i) even &= rows[i] - rows[i - 1] == stride;
  if (even) return {rows[0], stride, kTileBytes};
  for (int i = 0; i < kTileSide; ++i) std::memcpy(buffer + i * bytes, rows[i], bytes);
  return {buffer, bytes, kTileBytes};
}
#endif

}  // namespace kvtools::KVTOOLS_ISA

// Stored keys and values to fp32, a vector at a time; what `quantize_kv` packed stays packed in
// memory. The scale is the caller's: it is one number per token.
#pragma once

#include "format.h"

namespace kvtools::KVTOOLS_ISA {

// Readers have `spot(e)`, where elements e, ..., e + kLanes - 1 are, and `(row, spot)`; n elements
// take `bytes(n)`.

template <class T>
struct ReadPlain {
  explicit ReadPlain(int64_t) {}
  static bool whole(int64_t d) { return d % kLanes == 0; }
  int64_t spot(int64_t e) const { return e; }
  int64_t bytes(int64_t n) const { return n * sizeof(T); }
  f32 operator()(const char* row, int64_t e) const {
    return load(reinterpret_cast<const T*>(row) + e);
  }
};

// float8_e4m3fn: no infinity, and only the greatest magnitude is NaN.
struct ReadFp8 {
  explicit ReadFp8(int64_t) {}
  static bool whole(int64_t d) { return d % kLanes == 0; }
  int64_t spot(int64_t e) const { return e; }
  int64_t bytes(int64_t n) const { return n; }
  f32 operator()(const char* row, int64_t e) const {
    const u32 x = load_bytes(row + e), magnitude = x & 0x7f;
    // The exponent is moved by a product, which is exact for denormals too.
    const f32 y = bit_cast<f32>(magnitude << 20) * 0x1p120f;
    const u32 nan = bit_cast<u32>(magnitude == 0x7f) & 0x7fc00000;
    return bit_cast<f32>(bit_cast<u32>(y) | nan | (x & 0x80) << 24);
  }
};

// Codes of 4 bits or less may carry other bits above their own where a table is looked up.
#if defined(__AVX512F__)
constexpr bool kTable = true;
#else
constexpr bool kTable = false;
#endif

template <int Bits>
inline f32 level(u32 code) {
  using G = Grid<Bits>;
#if defined(__AVX512F__)
  if constexpr (Bits <= 4) {  // one permutation looks up any 16 floats
    f32 table;
    for (int i = 0; i < 16; ++i) {
      const float c = i % (1 << Bits) - G::kTop;
      table[i] = c * (1 + G::kCubic * c * c);
    }
    return _mm512_permutexvar_ps(bit_cast<__m512i>(code), table);
  }
#endif
  return G::level(__builtin_convertvector(bit_cast<i32>(code), f32) - G::kTop);
}

// Bit planes: a run of bytes for the Low bits of all codes, then one for the High bits. Byte j of
// a run of w bytes has elements j, j + w, ..., lowest bits first.
template <int Low, int High = 0>
struct ReadPlanes {
  struct Spot {
    int64_t low, high;
    int low_shift;
    u32 high_shift;  // of each lane: a run of half a vector holds two parts of it
  };
  int64_t low, high;  // bytes in a run

  explicit ReadPlanes(int64_t d) : low(d * Low / 8), high(d * High / 8) {}
  static bool whole(int64_t d) {
    const int64_t high = d * High / 8;
    return d * Low / 8 % kLanes == 0 && (high % kLanes == 0 || 2 * high == kLanes);
  }
  int64_t bytes(int64_t n) const { return n * (Low + High) / 8; }
  Spot spot(int64_t e) const {
    Spot at{e, e, 0, u32{}};
    for (; at.low >= low; at.low -= low) at.low_shift += Low;  // a division would be slower
    if constexpr (High > 0) {
      for (; at.high >= high; at.high -= high) at.high_shift += High;
      if (2 * high == kLanes) at.high_shift += lane_index() / (kLanes / 2) * High;
      at.high += low;
    }
    return at;
  }
  u32 load_high(const char* p) const {
    if (2 * high != kLanes) return load_bytes(p);
    char twice[kLanes];
    std::memcpy(twice, p, kLanes / 2);
    std::memcpy(twice + kLanes / 2, p, kLanes / 2);
    return load_bytes(twice);
  }
  f32 operator()(const char* row, const Spot& at) const {
    u32 code = load_bytes(row + at.low);
    if constexpr (Low < 8) code = code >> at.low_shift;
    if constexpr (Low < 8 && (High > 0 || !kTable)) code &= (1 << Low) - 1;
    if constexpr (High > 0)
      code |= (load_high(row + at.high) >> at.high_shift & ((1 << High) - 1)) << Low;
    return level<Low + High>(code);
  }
  float one(const char* row, int64_t e) const {
    auto bits = [row](int64_t i, int64_t shift, int n) {
      return static_cast<unsigned char>(row[i]) >> shift & ((1 << n) - 1);
    };
    uint32_t code = bits(e % low, e / low * Low, Low);
    if constexpr (High > 0) code |= bits(low + e % high, e / high * High, High) << Low;
    return level<Low + High>(u32{} + code)[0];
  }
};

inline int64_t whole_vectors(int64_t d) { return (d + kLanes - 1) / kLanes * kLanes; }

// Elements [0, d) of a row, times `scale`, into `out`; zeros fill the last vector.
template <class T>
inline void decode_row(const ReadPlain<T>&, const char* row, int64_t d, float scale, float* out) {
  const T* x = reinterpret_cast<const T*>(row);
  int64_t e = 0;
  for (; e + kLanes <= d; e += kLanes) store(out + e, load(x + e) * scale);
  if (e < d) store(out + e, load_part(x + e, d - e) * scale);
}

inline void decode_row(const ReadFp8& read, const char* row, int64_t d, float scale, float* out) {
  int64_t e = 0;
  for (; e + kLanes <= d; e += kLanes) store(out + e, read(row, e) * scale);
  if (e < d) {
    char rest[kLanes] = {};
    std::memcpy(rest, row + e, d - e);
    store(out + e, read(rest, 0) * scale);
  }
}

template <int Low, int High>
inline void decode_row(const ReadPlanes<Low, High>& read, const char* row, int64_t d, float scale,
                       float* out) {
  if (read.whole(d)) {
    for (int64_t e = 0; e < d; e += kLanes) store(out + e, read(row, read.spot(e)) * scale);
    return;
  }
  std::memset(out + d, 0, (whole_vectors(d) - d) * sizeof(float));
  for (int64_t e = 0; e < d; ++e) out[e] = read.one(row, e) * scale;
}

// Call f with the reader of `content`.
template <class F>
inline void with_reader(const Content& content, int64_t d, F f) {
  switch (content.format) {
    case Format::none:
      with_type(content.type,
                [&](auto* kind) { f(ReadPlain<std::remove_pointer_t<decltype(kind)>>(d)); });
      break;
    case Format::fp8:
      f(ReadFp8(d));
      break;
    case Format::int8:
      f(ReadPlanes<8>(d));
      break;
    case Format::int6:
      f(ReadPlanes<4, 2>(d));
      break;
    case Format::int4:
      f(ReadPlanes<4>(d));
      break;
    case Format::int3:
      f(ReadPlanes<2, 1>(d));
      break;
    case Format::int2:
      f(ReadPlanes<2>(d));
      break;
  }
}

}  // namespace kvtools::KVTOOLS_ISA

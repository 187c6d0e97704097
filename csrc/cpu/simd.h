// Vectors of the compiler (GCC and clang), as wide as the instruction set that is compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "../params.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace kvtools::KVTOOLS_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using f32 = float __attribute__((vector_size(4 * kLanes)));
using i32 = int32_t __attribute__((vector_size(4 * kLanes)));
using u32 = uint32_t __attribute__((vector_size(4 * kLanes)));
using u16 = uint16_t __attribute__((vector_size(2 * kLanes)));
using u8 = uint8_t __attribute__((vector_size(kLanes)));

// 16-bit floats in memory.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <class To, class From>
inline To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

template <class V>
inline V load_bits(const void* p) {
  V x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// Integers in memory to 32 bits, and back. GCC 12 converts vectors element by element.

inline u32 load_bytes(const void* p) {
#if defined(__AVX512F__)
  return bit_cast<u32>(_mm512_cvtepu8_epi32(load_bits<__m128i>(p)));
#elif defined(__AVX2__)
  return bit_cast<u32>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(load_bits<u8>(p), u32);
#endif
}

inline u32 load_words(const void* p) {
#if defined(__AVX512F__)
  return bit_cast<u32>(_mm512_cvtepu16_epi32(load_bits<__m256i>(p)));
#elif defined(__AVX2__)
  return bit_cast<u32>(_mm256_cvtepu16_epi32(load_bits<__m128i>(p)));
#else
  return __builtin_convertvector(load_bits<u16>(p), u32);
#endif
}

inline void store_words(void* p, u32 x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bit_cast<__m512i>(x)));
#else
  u16 y = __builtin_convertvector(x, u16);
  std::memcpy(p, &y, sizeof y);
#endif
}

inline void store_bytes(void* p, u32 x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(bit_cast<__m512i>(x)));
#else
  u8 y = __builtin_convertvector(x, u8);
  std::memcpy(p, &y, sizeof y);
#endif
}

// Memory to fp32 and back.

inline f32 load(const float* p) { return load_bits<f32>(p); }

inline f32 load(const bf16* p) { return bit_cast<f32>(load_words(p) << 16); }

inline f32 load(const f16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  u32 h = load_words(p), magnitude = (h & 0x7fff) << 13;
  // The exponent is moved by a product, which is exact for denormals too; 31 is infinity or NaN.
  u32 special = bit_cast<u32>(magnitude >= (31u << 23)) & 0x7f800000;
  u32 x = bit_cast<u32>(bit_cast<f32>(magnitude) * 0x1p112f);
  return bit_cast<f32>(x | special | (h & 0x8000) << 16);
#endif
}

inline void store(float* p, f32 x) { std::memcpy(p, &x, sizeof x); }

// The high halves are x in bf16, rounded half to even, unless x is NaN.
inline u32 round_to_bf16(f32 x) {
  const u32 bits = bit_cast<u32>(x);
  return bits + 0x7fff + ((bits >> 16) & 1);
}

inline void store(bf16* p, f32 x) {
  u32 rounded = round_to_bf16(x) >> 16, quiet = (bit_cast<u32>(x) >> 16) | 0x40;
  u32 nan = bit_cast<u32>(x != x);
  store_words(p, (rounded & ~nan) | (quiet & nan));
}

inline void store(f16* p, f32 x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, 0));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, 0));
#else
  u32 bits = bit_cast<u32>(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Normal: rebias, round half to even. Small: adding 0.5 lines the bits up, and rounds.
  u32 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  u32 small = bit_cast<u32>(bit_cast<f32>(magnitude) + 0.5f) - 0x3f000000;
  u32 is_small = bit_cast<u32>(magnitude < (113u << 23));
  u32 is_large = bit_cast<u32>(magnitude >= 0x477ff000);
  u32 large = 0x7c00 | (bit_cast<u32>(magnitude > 0x7f800000) & 0x200);
  u32 y = (small & is_small) | (normal & ~is_small & ~is_large) | (large & is_large);
  store_words(p, sign | y);
#endif
}

// One element at a time: through a vector, so that it rounds alike.
template <class T>
inline float load_one(const T* p) {
  T x[kLanes] = {};
  x[0] = *p;
  return load(x)[0];
}
inline float load_one(const float* p) { return *p; }

template <class T>
inline void store_one(T* p, float x) {
  T y[kLanes];
  store(y, f32{x});
  *p = y[0];
}
inline void store_one(float* p, float x) { *p = x; }

// The first n < kLanes elements; zero behind them.
template <class T>
inline f32 load_part(const T* p, int n) {
  T x[kLanes] = {};
  std::memcpy(x, p, n * sizeof(T));
  return load(x);
}

template <class T>
inline void store_part(T* p, f32 x, int n) {
  T y[kLanes];
  store(y, x);
  std::memcpy(p, y, n * sizeof(T));
}

// Call f with a null pointer of the element type that `type` stands for.
template <class F>
inline void with_type(Type type, F f) {
  if (type == Type::f32)
    f(static_cast<float*>(nullptr));
  else if (type == Type::bf16)
    f(static_cast<bf16*>(nullptr));
  else
    f(static_cast<f16*>(nullptr));
}

inline float number_at(const char* p, Type type) {
  float x;
  with_type(type, [&](auto* kind) {
    x = load_one(reinterpret_cast<const std::remove_pointer_t<decltype(kind)>*>(p));
  });
  return x;
}

// Arithmetic.

inline f32 splat(float x) { return x - f32{}; }
inline f32 abs(f32 x) { return bit_cast<f32>(bit_cast<u32>(x) & 0x7fffffff); }
inline f32 select(i32 mask, f32 yes, f32 no) { return mask ? yes : no; }

// a > b ? a : b, which GCC does not make one instruction of; and a < b ? a : b.
inline f32 max(f32 a, f32 b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline f32 min(f32 a, f32 b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

template <int... I>
inline u32 lane_index(std::integer_sequence<int, I...>) {
  return u32{I...};
}

// 0, 1, 2, ...
inline u32 lane_index() { return lane_index(std::make_integer_sequence<int, kLanes>{}); }

template <int... I>
inline f32 shuffle(f32 a, f32 b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, i32{I...});
#endif
}

template <int Distance, int... I>
inline f32 exchange(f32 x, std::integer_sequence<int, I...>) {
  return shuffle(x, x, std::integer_sequence<int, (I ^ Distance)...>{});
}

// Lane i gets lane i xor Distance.
template <int Distance>
inline f32 exchange(f32 x) {
  return exchange<Distance>(x, std::make_integer_sequence<int, kLanes>{});
}

// sum + a.low * b.low + a.high * b.high, of pairs of bf16.
#if defined(__AVX512BF16__)
constexpr bool kDotsPairs = true;
inline f32 dot_pairs(f32 sum, u32 a, u32 b) {
  return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
}
#else
constexpr bool kDotsPairs = false;
inline f32 dot_pairs(f32 sum, u32 a, u32 b) {
  sum += bit_cast<f32>(a << 16) * bit_cast<f32>(b << 16);
  return sum + bit_cast<f32>(a & 0xffff0000) * bit_cast<f32>(b & 0xffff0000);
}
#endif

// x and y, which are finite, as pairs of bf16.
inline u32 to_pairs(f32 x, f32 y) {
  return round_to_bf16(x) >> 16 | (round_to_bf16(y) & 0xffff0000);
}

// The sum in every lane.
inline f32 sum_lanes(f32 x) {
  if constexpr (kLanes > 8) x += exchange<8 % kLanes>(x);
  if constexpr (kLanes > 4) x += exchange<4 % kLanes>(x);
  x += exchange<2>(x);
  return x + exchange<1>(x);
}

// The greatest in every lane.
inline f32 max_lanes(f32 x) {
  if constexpr (kLanes > 8) x = max(x, exchange<8 % kLanes>(x));
  if constexpr (kLanes > 4) x = max(x, exchange<4 % kLanes>(x));
  x = max(x, exchange<2>(x));
  return max(x, exchange<1>(x));
}

template <int Offset, int... I>
inline f32 zip_pairs(f32 a, f32 b, std::integer_sequence<int, I...>) {
  return shuffle(
      a, b, std::integer_sequence<int, ((I & ~3) + Offset + (I & 3) / 2 + (I & 1) * kLanes)...>{});
}
template <int Offset, int... I>
inline f32 zip_halves(f32 a, f32 b, std::integer_sequence<int, I...>) {
  return shuffle(
      a, b,
      std::integer_sequence<int, ((I & ~3) + Offset + (I & 1) + ((I & 2) ? kLanes : 0))...>{});
}

// What f makes of the lanes of each of four vectors; again in every four lanes.
template <class F>
inline f32 fold(f32 a, f32 b, f32 c, f32 d, F f) {
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
  f32 ab = f(zip_pairs<0>(a, b, lanes), zip_pairs<2>(a, b, lanes));
  f32 cd = f(zip_pairs<0>(c, d, lanes), zip_pairs<2>(c, d, lanes));
  f32 x = f(zip_halves<0>(ab, cd, lanes), zip_halves<2>(ab, cd, lanes));
  if constexpr (kLanes > 8) x = f(x, exchange<8 % kLanes>(x));
  if constexpr (kLanes > 4) x = f(x, exchange<4 % kLanes>(x));
  return x;
}

// Lane i is what f makes of the lanes of x[i], for i < n; of at most Most.
template <int Most = kLanes, class F>
inline f32 fold_each(const f32* x, int n, F f) {
  auto at = [&](int i) { return x[i < n ? i : n - 1]; };
  f32 all = fold(at(0), at(1), at(2), at(3), f);
  for (int i = 4; i < Most && i < n; i += 4) {
    const i32 here = bit_cast<i32>((lane_index() & ~3u) == static_cast<uint32_t>(i));
    all = select(here, fold(at(i), at(i + 1), at(i + 2), at(i + 3), f), all);
  }
  return all;
}

template <int Most = kLanes>
inline f32 sum_each(const f32* x, int n) {
  return fold_each<Most>(x, n, [](f32 a, f32 b) { return a + b; });
}
template <int Most = kLanes>
inline f32 max_each(const f32* x, int n) {
  return fold_each<Most>(x, n, [](f32 a, f32 b) { return max(a, b); });
}

// 2^x to 1 ulp; 0 below -126, and for -inf; NaN for NaN, whatever its bits.
inline f32 exp2(f32 x) {
  const f32 shift = splat(0x1.8p23f);  // to the nearest integer, which then sits in the low bits
  f32 n = x + shift;
  f32 r = x - (n - shift);
  f32 y = 1.535336188319500e-4f * r + 1.339887440266574e-3f;
  y = y * r + 9.618437357674640e-3f;
  y = y * r + 5.550332471162809e-2f;
  y = y * r + 2.402264791363012e-1f;
  y = y * r + 6.931472028550421e-1f;
  y = y * r + 1.0f;
  y = bit_cast<f32>(bit_cast<i32>(y) + (bit_cast<i32>(n) << 23));
  return select(x >= -126.0f, y, select(x < -126.0f, f32{}, x));
}

// tanh to 2 ulp: odd, so that small x keep their relative precision.
inline f32 tanh(f32 x) {
  const f32 square = x * x;
  f32 small = -5.70498872745e-3f * square + 2.06390887954e-2f;
  small = small * square - 5.37397155531e-2f;
  small = small * square + 1.33314422036e-1f;
  small = small * square - 3.33332819422e-1f;
  small = small * square * x + x;
  // NaN stays: of a NaN and a number, `max` and `min` take their second argument.
  const f32 clamped = min(splat(20.0f), max(splat(-20.0f), x));
  const f32 large = 1.0f - 2.0f / (exp2(2 * kLog2e * clamped) + 1.0f);
  return select(square < 0.390625f, small, large);
}

// a b, rounded: the compiler may not fuse it with a sum that follows.
inline f32 product(f32 a, f32 b) {
  f32 x = a * b;
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

// 64-bit lanes, half as many.
using u64 = uint64_t __attribute__((vector_size(4 * kLanes)));
using f64 = double __attribute__((vector_size(4 * kLanes)));
using f32_half = float __attribute__((vector_size(2 * kLanes)));

inline f64 widen(f32_half x) { return __builtin_convertvector(x, f64); }

// The 64-bit products of the low halves. GCC does not see that a product of the whole lanes would
// be the same where their high halves are 0.
inline u64 multiply_low(u64 a, u64 b) {
#if defined(__AVX512F__)
  return bit_cast<u64>(_mm512_mul_epu32(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<u64>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return bit_cast<u64>(_mm_mul_epu32(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

template <int... I>
inline u64 high_words(u64 x, std::integer_sequence<int, I...>) {
  const f32 y = bit_cast<f32>(x);
  return bit_cast<u64>(shuffle(y, y, std::integer_sequence<int, (I | 1)...>{}));
}

// The high halves, in both.
inline u64 high_words(u64 x) { return high_words(x, std::make_integer_sequence<int, kLanes>{}); }

// Whether any lane of a mask is set.
inline bool any(i32 mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(bit_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(bit_cast<__m256>(mask)) != 0;
#else
  int32_t found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found |= mask[lane];
  return found != 0;
#endif
}

// Puts the lanes that are set in `mask` at p, one behind another, and anything in the rest of a
// vector. How many they are.
inline int compress(float* p, f32 x, i32 mask) {
#if defined(__AVX512F__)
  const __mmask16 set = _mm512_movepi32_mask(bit_cast<__m512i>(mask));
  store(p, _mm512_maskz_compress_ps(set, x));
  return __builtin_popcount(set);
#else
  int count = 0;
  for (int lane = 0; lane < kLanes; ++lane) p[count] = x[lane], count -= mask[lane];
  return count;
#endif
}

// The lanes of a and b in turn: those of their first half, or of their second.
template <bool Second, int... I>
inline f32 zip(f32 a, f32 b, std::integer_sequence<int, I...>) {
  constexpr int first = Second ? kLanes / 2 : 0;
  return shuffle(a, b, std::integer_sequence<int, (first + I / 2 + I % 2 * kLanes)...>{});
}

// Element j of vector i to element i of vector j.
inline void transpose(f32 (&x)[kLanes]) {
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
#pragma GCC unroll 4
  for (int turns = 1; turns < kLanes; turns *= 2) {
    f32 y[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = zip<false>(x[i], x[i + kLanes / 2], lanes);
      y[2 * i + 1] = zip<true>(x[i], x[i + kLanes / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}

// Call f(constant, first) for groups of at most Most rows that make up `rows`.
template <int Most, class F>
inline void in_groups(int rows, F f) {
  int r = 0;
  for (; r + Most <= rows; r += Most) f(std::integral_constant<int, Most>{}, r);
  const int left = rows - r;
  if constexpr (Most > 1)
    if (left) in_groups<Most - 1>(left, [&](auto count, int i) { f(count, r + i); });
}

}  // namespace kvtools::KVTOOLS_ISA

// The inner loops of attention of few rows over codes of 8, 4 or 2 bits, with AVX-512: tile.h has
// those of all other formats and instruction sets.
#pragma once

#include "tile.h"

namespace kvtools::KVTOOLS_ISA {

// Weights of a chunk as integers of 16 bits; a row may take several, each of which adds what the
// ones before left.
struct Weights {
  static constexpr int kMostPieces = 2;  // as many come up to fp32
  int pieces;
  alignas(64) int16_t of[kFewRows * kMostPieces * kChunk];  // [rows][pieces][kChunk]
  float unit[kFewRows * kMostPieces];                       // what a one stands for
};

template <class Read>
struct Packed {
  static constexpr bool kHas = false;
};

#if defined(__AVX512F__)

using i16 = int16_t __attribute__((vector_size(4 * kLanes)));

// sum + a.low * b.low + a.high * b.high, of pairs of int16.
inline i32 dot_words(i32 sum, i16 a, i16 b) {
#if defined(__AVX512VNNI__)
  return bit_cast<i32>(
      _mm512_dpwssd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#else
  return sum + bit_cast<i32>(_mm512_madd_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#endif
}

// Levels are odd multiples of a half, or of 1/900 where they are bent: integers in that unit.
template <int Bits>
struct WholeLevels {
  static constexpr bool kBent = Grid<Bits>::kBend > 0;
  static_assert(!kBent || (Bits == 4 && Grid<Bits>::kBend == 0.5f));
  static constexpr float kUnit = kBent ? 1.0f / 900 : 0.5f;
  static constexpr int of(int code) {
    const int n = 2 * code - ((1 << Bits) - 1);
    return kBent ? n * (450 + n * n) : n;
  }
  static constexpr int kGreatest = of((1 << Bits) - 1);
  // Sums of weights times levels stay within 32 bits while those of weights stay within this; of
  // which rounding takes at most half a unit for each.
  static constexpr int kMostWeight = INT32_MAX / kGreatest - kChunk;
  // So many bits more has the second piece of a weight: it is at most half of the first's unit.
  static constexpr int kMore = 12;
  static_assert(int64_t{kChunk} << (kMore - 1) < kMostWeight);

  template <int... I>
  static i16 table(std::integer_sequence<int, I...>) {
    return i16{int16_t(of(I % (1 << Bits)))...};
  }
  // Codes may carry other bits above their own, but for 8 bits.
  static i16 look_up(i16 codes) {
    if constexpr (Bits == 8) return codes + codes - 255;
    const i16 all = table(std::make_integer_sequence<int, 32>{});
    return bit_cast<i16>(
        _mm512_permutexvar_epi16(bit_cast<__m512i>(codes), bit_cast<__m512i>(all)));
  }
};

// Bytes [0, size) of kLanes rows as words that lie along the rows: [size / 4][kChunk].
inline void turn(const char* const* rows, int64_t size, uint32_t* words) {
  for (int64_t byte = 0; byte < size; byte += 16, words += 4 * kChunk) {
    __m512i x[4];
    auto row = [&](int i) { return load_bits<__m128i>(rows[i] + byte); };
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm512_castsi128_si512(row(i));
      x[i] = _mm512_inserti32x4(x[i], row(i + 4), 1);
      x[i] = _mm512_inserti32x4(x[i], row(i + 8), 2);
      x[i] = _mm512_inserti32x4(x[i], row(i + 12), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    _mm512_storeu_si512(words, _mm512_unpacklo_epi64(a, c));
    _mm512_storeu_si512(words + kChunk, _mm512_unpackhi_epi64(a, c));
    _mm512_storeu_si512(words + 2 * kChunk, _mm512_unpacklo_epi64(b, d));
    _mm512_storeu_si512(words + 3 * kChunk, _mm512_unpackhi_epi64(b, d));
  }
}

template <int Bits>
struct Packed<ReadPlanes<Bits, 0>> {
  static constexpr bool kHas = true;
  static constexpr int kParts = 8 / Bits;  // elements of a byte, d / kParts apart

  // Of 8 bits, words are as many as elements are, and to turn them costs more than it saves.
  static bool scores_whole(int64_t d) { return Bits < 8 && d / kParts % 16 == 0; }
  static bool values_whole(int64_t d) { return d / kParts % (2 * kLanes) == 0; }

  // x[r][s] = q[r] · k[s], s < n rounded up to kLanes (so many `rows` must be readable). Slots lie
  // along the vectors, so that nothing is summed across them. `words` has room for a chunk.
  static void scores(const float* q, int rows_of_q, int64_t d, const char* const* rows,
                     const char* const* next, int n, uint32_t* words, float* x) {
    const int64_t run = d / kParts;
    for (int s = 0; s < n; s += kLanes) {
      for (int i = 0; i < kLanes; ++i) fetch(next[s + i], run);
      turn(rows + s, run, words + s);
    }
    in_groups<4>(rows_of_q, [&](auto count, int r) {
      constexpr int R = count.value;
      in_groups<R == 1 ? 4 : 2>((n + kLanes - 1) / kLanes, [&](auto vectors, int first) {
        const int64_t s = first * kLanes;
        score<R, vectors.value>(q + r * d, d, words + s, x + r * kChunk + s);
      });
    });
  }

  // Weights [rows][kChunk] of n slots, which are 0 behind them up to a whole vector, to integers;
  // `most` and `all` are their greatest and their sum. A NaN is in the sum, and so in the unit.
  static void round(const float* x, const float* most, const float* all, int rows, int n,
                    Weights& to) {
    using L = WholeLevels<Bits>;
    for (int r = 0; r < rows; ++r, x += kChunk) {
      // Of a NaN and a number the first is taken.
      const float unit = std::max(std::max(all[r] / L::kMostWeight, most[r] / 32767), 0x1p-100f);
      const float inverse = 1 / unit;
      for (int s = 0; s < n; s += kLanes) {
        f32 left = load(x + s) * inverse;
        for (int i = 0; i < to.pieces; ++i) {
          const __m512i whole = _mm512_cvtps_epi32(left);
          const __m256i words = _mm512_cvtepi32_epi16(whole);
          std::memcpy(to.of + (r * to.pieces + i) * kChunk + s, &words, sizeof words);
          left = (left - f32(_mm512_cvtepi32_ps(whole))) * static_cast<float>(1 << L::kMore);
        }
      }
      for (int i = 0; i < to.pieces; ++i)
        to.unit[r * to.pieces + i] = unit * L::kUnit / static_cast<float>(1 << i * L::kMore);
    }
  }

  // out[r] += sum over s of p[r][s] v[s], by pairs of slots.
  static void add(const char* const* rows, const char* const* next, int n, const Weights& p,
                  int count_of_rows, float* out, int64_t d) {
    constexpr int kAtOnce = kParts == 1 ? 1 : 2;  // parts of a byte
    const int64_t run = d / kParts;
    for (int64_t byte = 0; byte < run; byte += 2 * kLanes)
      for (int part = 0; part < kParts; part += kAtOnce)
        in_groups<6>(count_of_rows * p.pieces, [&](auto count, int first) {
          add_some<count.value, kAtOnce>(rows, part + first == 0 ? next : nullptr, n, p, first, out,
                                         d, byte, part);
        });
  }

 private:
  // R rows of `scores`, for V vectors of slots. Sums of few elements are summed, as a sum of all,
  // one by one, would be rounded more often.
  template <int R, int V>
  static void score(const float* q, int64_t d, const uint32_t* words, float* x) {
    constexpr int kWords = Bits / 2;  // with 16 elements
    const int64_t run = d / kParts;
    f32 all[R][V] = {};
    for (int64_t byte = 0; byte < run; byte += 4 * kWords, words += kWords * kChunk) {
      f32 sum[R][V] = {};
#pragma GCC unroll 16
      for (int i = 0; i < 32 * kWords; i += Bits) {
        const int word = i / 32, bit = i % 32;
        const float* element = q + byte + 4 * word + bit / 8 + bit % 8 / Bits * run;
        f32 k[V];
        for (int v = 0; v < V; ++v)
          k[v] = level<Bits>(load_bits<u32>(words + word * kChunk + v * kLanes) >> bit);
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < V; ++v) sum[r][v] += element[r * d] * k[v];
      }
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) all[r][v] += sum[r][v];
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) store(x + r * kChunk + v * kLanes, all[r][v]);
  }

  // For R pieces of weights and `Parts` of 2 kLanes bytes.
  template <int R, int Parts>
  static void add_some(const char* const* rows, const char* const* next, int n, const Weights& p,
                       int first, float* out, int64_t d, int64_t byte, int part) {
    using L = WholeLevels<Bits>;
    i32 sum[R][Parts][2] = {};
    const int16_t* weight = p.of + first * kChunk;
    for (int s = 0; s < n; s += 2) {
      auto load = [&](int slot) {
        return _mm512_cvtepu8_epi16(load_bits<__m256i>(rows[slot] + byte));
      };
      const __m512i a = load(s), b = load(s + 1);  // rows behind the last repeat it
      if (next) fetch(next[s] + byte, 32), fetch(next[s + 1] + byte, 32);
      const __m512i pair[] = {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)};
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < Parts; ++i) {
          const i16 v = L::look_up(bit_cast<i16>(_mm512_srli_epi16(pair[half], (part + i) * Bits)));
          for (int r = 0; r < R; ++r) {
            int32_t both;
            std::memcpy(&both, weight + r * kChunk + s, sizeof both);
            sum[r][i][half] = dot_words(sum[r][i][half], v, bit_cast<i16>(i32{} + both));
          }
        }
    }
    for (int r = 0; r < R; ++r) {
      float* row = out + (first + r) / p.pieces * d;
      for (int i = 0; i < Parts; ++i) {
        float* to = row + byte + (part + i) * (d / kParts);
        // Four lanes of the first half, four of the second, and so on.
        const __m512i low = bit_cast<__m512i>(sum[r][i][0]), high = bit_cast<__m512i>(sum[r][i][1]);
        const __m512i order =
            _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i later = _mm512_or_si512(order, _mm512_set1_epi32(8));
        auto put = [&](float* at, __m512i which) {
          const f32 x = _mm512_cvtepi32_ps(_mm512_permutex2var_epi32(low, which, high));
          store(at, kvtools::KVTOOLS_ISA::load(at) + x * p.unit[first + r]);
        };
        put(to, order), put(to + kLanes, later);
      }
    }
  }
};

#endif

}  // namespace kvtools::KVTOOLS_ISA

// The inner loops of attention of few rows over codes of 8, 4 or 2 bits, with AVX-512: tile.h has
// those of all other formats and instruction sets.
#pragma once

#include "tile.h"

namespace kvtools::KVTOOLS_ISA {

// Numbers are integers of 16 bits, of which one may take several: each adds what the ones before
// left.

// Weights of a chunk.
struct Weights {
  static constexpr int kMostPieces = 3;
  int least;                                                // of even weights: two come up to fp32
  int pieces;                                               // of this chunk
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
  // Sums of integers times levels stay within 32 bits while those of integers stay within this; of
  // which rounding takes at most half a unit for each of kChunk.
  static constexpr int kMost = INT32_MAX / kGreatest - kChunk;
  // So many bits more has the second piece of a number: it is at most half of the first's unit.
  static constexpr int kMore = 12;
  static_assert(int64_t{kChunk} << (kMore - 1) < kMost);

  // What a one stands for in numbers of which these are the greatest and the sum. A NaN is in the
  // sum, and so in the unit.
  static float unit(float most, float all) {
    // Of a NaN and a number the first is taken.
    return std::max(std::max(all / kMost, most / 32767), 0x1p-100f);
  }
  // Call f(piece, integers) for numbers in that unit.
  template <int Pieces, class F>
  static void in_pieces(f32 x, F f) {
    for (int i = 0; i < Pieces; ++i) {
      const __m512i whole = _mm512_cvtps_epi32(x);
      f(i, whole);
      if (i + 1 < Pieces) x = (x - f32(_mm512_cvtepi32_ps(whole))) * static_cast<float>(1 << kMore);
    }
  }

  template <int... I>
  static i16 table(std::integer_sequence<int, I...>) {
    return i16{int16_t(of(I % (1 << Bits)))...};
  }
  // Of the codes that lie `bit` bits up in each word of 16.
  static i16 look_up(__m512i words, int bit) {
    const i16 codes = bit_cast<i16>(_mm512_srli_epi16(words, bit));
    if constexpr (Bits == 8) return (bit ? codes : codes & 255) * 2 - 255;
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
  using L = WholeLevels<Bits>;
  static constexpr bool kHas = true;
  static constexpr int kParts = 8 / Bits;    // elements of a byte, d / kParts apart
  static constexpr int kShifts = 16 / Bits;  // elements of half a word
  static constexpr int kPieces = 2;          // of a query: scores come up to fp32
  static constexpr int kBlock = kChunk;      // elements of a query in a unit of their own

  // Of 8 bits, words are as many as elements are, and to turn them costs more than it saves.
  static bool scores_whole(int64_t d) { return Bits < 8 && d / kParts % 16 == 0; }
  static bool values_whole(int64_t d) { return d / kParts % (2 * kLanes) == 0; }

  // Words that a row of `round_q` takes.
  static int64_t size_of_q(int64_t d) { return kPieces * d / 2 + (d + kBlock - 1) / kBlock; }

  // A query as integers: pairs of elements that lie in one word, in the order in which `score`
  // finds them, [d / 2][kPieces]; then the unit of each block.
  static void round_q(const float* q, int64_t d, int32_t* to) {
    const int64_t run = d / kParts;
    float* unit = reinterpret_cast<float*>(to + kPieces * d / 2);
    for (int64_t begin = 0; begin < run; begin += kBlock / kParts) {
      const int64_t end = std::min(begin + kBlock / kParts, run);
      auto each = [&](auto f) {  // f(vector, first byte, part)
        for (int part = 0; part < kParts; ++part)
          for (int64_t byte = begin; byte < end; byte += kLanes)
            f(load(q + part * run + byte), byte, part);
      };
      f32 most{}, all{};
      each([&](f32 x, int64_t, int) { most = max(most, abs(x)), all += abs(x); });
      const float one = L::unit(max_lanes(most)[0], sum_lanes(all)[0]);
      *unit++ = one * L::kUnit;
      each([&](f32 x, int64_t byte, int part) {
        L::template in_pieces<kPieces>(x * (1 / one), [&](int piece, __m512i whole) {
          // Bytes 0 and 2 of a word make a pair, and 1 and 3.
          const __m512i low = _mm512_and_si512(whole, _mm512_set1_epi32(0xffff));
          const __m512i high = _mm512_slli_epi32(_mm512_shuffle_epi32(whole, _MM_PERM_DCDC), 16);
          const i32 pairs = bit_cast<i32>(_mm512_or_si512(low, high));
          int32_t* first = to + (byte / 4 * kShifts + part) * kPieces + piece;
          for (int i = 0; i < kLanes; i += 4, first += kShifts * kPieces)
            first[0] = pairs[i], first[kParts * kPieces] = pairs[i + 1];
        });
      });
    }
  }

  // x[r][s] = q[r] · k[s], s < n rounded up to kLanes (so many `rows` must be readable); q is what
  // `round_q` made of so many rows. Slots lie along the vectors, so that nothing is summed across
  // them. `words` has room for a chunk.
  static void scores(const int32_t* q, int rows_of_q, int64_t d, const char* const* rows,
                     const char* const* next, int n, uint32_t* words, float* x) {
    const int64_t run = d / kParts;
    for (int s = 0; s < n; s += kLanes) turn(rows + s, run, words + s);
    in_groups<4>(rows_of_q, [&](auto count, int r) {
      constexpr int R = count.value;
      in_groups<R == 1 ? 4 : 2>((n + kLanes - 1) / kLanes, [&](auto vectors, int first) {
        const int64_t s = first * kLanes;
        score<R, vectors.value>(q + r * size_of_q(d), d, words + s, x + r * kChunk + s,
                                r ? nullptr : next + s);
      });
    });
  }

  // Weights [rows][kChunk] of n slots, which are 0 behind them up to a whole vector, to integers;
  // `most` and `all` are their greatest and their sum.
  static void round(const float* x, const float* most, const float* all, int rows, int n,
                    Weights& to) {
    // Beside a weight that is most of all, what rounding takes off the others may be as much as
    // they are, and all of one sign: it takes a piece more.
    auto pieces_of = [&](int r) { return to.least + (all[r] * 16 < most[r] * n); };
    to.pieces = to.least;
    for (int r = 0; r < rows; ++r) to.pieces = std::max(to.pieces, pieces_of(r));
    in_groups<Weights::kMostPieces>(to.pieces, [&](auto pieces, int) {
      constexpr int P = pieces.value;
      for (int r = 0; r < rows; ++r) {
        const float unit = L::unit(most[r], all[r]), inverse = 1 / unit;
        // Rows are what they are by themselves.
        const int used = pieces_of(r);
        for (int s = 0; s < n; s += kLanes)
          L::template in_pieces<P>(load(x + r * kChunk + s) * inverse, [&](int i, __m512i whole) {
            const __m256i words = i < used ? _mm512_cvtepi32_epi16(whole) : _mm256_setzero_si256();
            std::memcpy(to.of + (r * P + i) * kChunk + s, &words, sizeof words);
          });
        for (int i = 0; i < P; ++i)
          to.unit[r * P + i] = unit * L::kUnit / static_cast<float>(1 << i * L::kMore);
      }
    });
  }

  // out[r] += sum over s of p[r][s] v[s], by pairs of slots.
  static void add(const char* const* rows, const char* const* next, int n, const Weights& p,
                  int count_of_rows, float* out, int64_t d) {
    for (int64_t byte = 0; byte < d / kParts; byte += 2 * kLanes)
      add_parts(std::make_integer_sequence<int, kParts / kAtOnce>{}, [&](auto turn) {
        constexpr int part = turn.value * kAtOnce;
        in_groups<6 / kAtOnce>(count_of_rows * p.pieces, [&](auto count, int first) {
          add_some<count.value, part>(rows, part + first == 0 ? next : nullptr, n, p, first, out, d,
                                      byte);
        });
      });
  }

 private:
  static constexpr int kAtOnce = kParts == 1 ? 1 : 2;  // parts of a byte that `add_some` takes

  template <int... I, class F>
  static void add_parts(std::integer_sequence<int, I...>, F f) {
    (f(std::integral_constant<int, I>{}), ...);
  }

  // R rows of `scores`, for V vectors of slots; the keys of `next` are fetched meanwhile.
  template <int R, int V>
  static void score(const int32_t* q, int64_t d, const uint32_t* words, float* x,
                    const char* const* next) {
    constexpr int kWords = kBlock * Bits / 32;
    const int64_t row = size_of_q(d), all = d * Bits / 32;  // words of a slot
    int64_t ahead = 0;
    const float* unit = reinterpret_cast<const float*>(q + kPieces * d / 2);
    for (int64_t left = all, first = true; left > 0; left -= kWords, first = false) {
      i32 sum[R][kPieces][V] = {};
      for (int64_t i = std::min<int64_t>(left, kWords); i > 0; --i) {
        const int32_t* of[R];
        for (int r = 0; r < R; ++r) of[r] = q + r * row;
#pragma GCC unroll 8
        for (int shift = 0; shift < kShifts; ++shift) {
          i16 k[V];
          for (int v = 0; v < V; ++v)
            k[v] = L::look_up(load_bits<__m512i>(words + v * kLanes), shift * Bits);
          for (int r = 0; r < R; ++r)
            for (int p = 0; p < kPieces; ++p) {
              const i16 pair = bit_cast<i16>(i32{} + of[r][shift * kPieces + p]);
              for (int v = 0; v < V; ++v) sum[r][p][v] = dot_words(sum[r][p][v], k[v], pair);
            }
        }
        words += kChunk, q += kShifts * kPieces;
        for (ahead += V * kLanes; next && ahead >= all; ahead -= all) fetch(*next++, d / kParts);
      }
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
          f32 y{};
          for (int p = kPieces - 1; p >= 0; --p)
            y = y * (1.0f / (1 << L::kMore)) +
                f32(_mm512_cvtepi32_ps(bit_cast<__m512i>(sum[r][p][v])));
          y *= unit[r * row];
          float* to = x + r * kChunk + v * kLanes;
          store(to, first ? y : load(to) + y);
        }
      ++unit;
    }
  }

  // For R pieces of weights and 2 kLanes bytes; four slots at a time.
  template <int R, int Part>
  static void add_some(const char* const* rows, const char* const* next, int n, const Weights& p,
                       int first, float* out, int64_t d, int64_t byte) {
    i32 sum[R][kAtOnce][2][2] = {};  // [part][byte of two][half of words]
    const int16_t* weight = p.of + first * kChunk;
    int s = 0;
    do {                           // rows behind the last repeat it
      auto load = [&](int slot) {  // and the one two behind it
        const __m512i x = _mm512_castsi256_si512(load_bits<__m256i>(rows[slot] + byte));
        return _mm512_inserti64x4(x, load_bits<__m256i>(rows[slot + 2] + byte), 1);
      };
      const __m512i a = load(s), b = load(s + 1);
      for (int i = 0; next && i < 4; ++i) fetch(next[s + i] + byte, 2 * kLanes);
      const __m512i pair[] = {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)};
      i16 both[R];
      for (int r = 0; r < R; ++r) {
        int32_t w, later;
        std::memcpy(&w, weight + r * kChunk + s, sizeof w);
        std::memcpy(&later, weight + r * kChunk + s + 2, sizeof later);
        both[r] = bit_cast<i16>(_mm512_mask_set1_epi32(_mm512_set1_epi32(w), 0xff00, later));
      }
      for (int i = 0; i < kAtOnce; ++i)
        for (int second = 0; second < 2; ++second)
          for (int half = 0; half < 2; ++half) {
            const i16 v = L::look_up(pair[half], (Part + i) * Bits + 8 * second);
            for (int r = 0; r < R; ++r) {
              i32& to = sum[r][i][second][half];
              to = dot_words(to, v, both[r]);
            }
          }
      s += 4;
    } while (s < n);
    for (int r = 0; r < R; ++r) {
      float* row = out + (first + r) / p.pieces * d;
      for (int i = 0; i < kAtOnce; ++i) {
        float* to = row + byte + (Part + i) * (d / kParts);
        // Of first and second bytes, words 0 to 3 and 8 to 11; and all others.
        __m512i x[2];
        for (int half = 0; half < 2; ++half) {
          const __m512i even = bit_cast<__m512i>(sum[r][i][0][half]);
          const __m512i odd = bit_cast<__m512i>(sum[r][i][1][half]);
          x[half] = _mm512_add_epi32(_mm512_shuffle_i64x2(even, odd, 0x44),
                                     _mm512_shuffle_i64x2(even, odd, 0xee));
        }
        const __m512i order =
            _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 16, 24, 17, 25, 18, 26, 19, 27);
        const __m512i later = _mm512_or_si512(order, _mm512_set1_epi32(4));
        auto put = [&](float* at, __m512i which) {
          const f32 y = _mm512_cvtepi32_ps(_mm512_permutex2var_epi32(x[0], which, x[1]));
          store(at, kvtools::KVTOOLS_ISA::load(at) + y * p.unit[first + r]);
        };
        put(to, order), put(to + kLanes, later);
      }
    }
  }
};

#endif

}  // namespace kvtools::KVTOOLS_ISA

// The inner loops of attention: scores of a chunk of slots against a tile of query rows, and the
// weighted sum of its values. Two forms. Few rows: a slot's vectors are read once, packed as they
// are, and dotted with each row. Many rows: the rows lie along the vectors.
#pragma once

#include "amx.h"
#include "decode.h"

namespace kvtools::KVTOOLS_ISA {

#if defined(__AVX512F__)  // 32 vector registers, or 16
constexpr int kTileVectors = 6, kValueRows = 6;
#else
constexpr int kTileVectors = 3, kValueRows = 3;
#endif
constexpr int kTileRows = kTileVectors * kLanes;  // rows of a tile at most
constexpr int kFewRows = 8;                       // up to so many the first form is faster
constexpr int kChunk = 64;                        // slots at a time, so that a chunk stays in L1

// Bring bytes [0, bytes) of a row that is read soon into the cache.
inline void fetch(const char* row, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b);
}

// x[r][s] = q[r] · k[s], s < n rounded up to 4 (so many `rows` must be readable).
template <int R, class Read>
inline void few_scores(const Read& read, const float* q, int64_t width, const char* const* rows,
                       const char* const* next, int n, float* x) {
  const int64_t bytes = read.bytes(width);
  for (int s = 0; s < n; s += 4) {
    for (int i = 0; i < 4; ++i) fetch(next[s + i], bytes);
    f32 sum[R][4] = {};
    for (int64_t e = 0; e < width; e += kLanes) {
      const auto spot = read.spot(e);
      f32 k[4];
      for (int i = 0; i < 4; ++i) k[i] = read(rows[s + i], spot);
      for (int r = 0; r < R; ++r) {
        const f32 qr = load(q + r * width + e);
        for (int i = 0; i < 4; ++i) sum[r][i] += qr * k[i];
      }
    }
    for (int r = 0; r < R; ++r) {
      const f32 four = sum_each<4>(sum[r], 4);
      std::memcpy(x + r * kChunk + s, &four, 4 * sizeof(float));
    }
  }
}

// Keys and values of the chunk that follows, fetched while scores are computed.
struct Ahead {
  const char *const *k, *const *v;
  int64_t k_bytes, v_bytes;  // of a row; 0 for nothing

  void operator()(int s) const { fetch(k[s], k_bytes), fetch(v[s], v_bytes); }
};

// x[s][r] = q[r] · k[s], with q as [d][rows]; s < n rounded up to T.
template <int V, int T>
inline void many_scores(const float* q, int64_t d, const char* const* rows, int n, float* x,
                        const Ahead& ahead) {
  for (int s = 0; s < n; s += T) {
    for (int i = 0; i < T; ++i) ahead(s + i);
    f32 sum[T][V] = {};
    const float* k[T];
    for (int i = 0; i < T; ++i) k[i] = reinterpret_cast<const float*>(rows[s + i]);
    for (int64_t e = 0; e < d; ++e) {
      f32 qe[V];
      for (int v = 0; v < V; ++v) qe[v] = load(q + e * kTileRows + v * kLanes);
      for (int i = 0; i < T; ++i)
        for (int v = 0; v < V; ++v) sum[i][v] += qe[v] * k[i][e];
    }
    for (int i = 0; i < T; ++i)
      for (int v = 0; v < V; ++v) store(x + (s + i) * kTileRows + v * kLanes, sum[i][v]);
  }
}

// out[r] += sum over s of p[r][s] v[s], for vectors [e, e + V kLanes); p has the given strides.
template <int R, int V, class Read>
inline void add_values(const Read& read, const char* const* rows, const char* const* next, int n,
                       const float* p, int64_t p_row, int64_t p_slot, float* out, int64_t width,
                       int64_t e) {
  const int64_t bytes = read.bytes(V * kLanes), from = read.bytes(e);
  f32 sum[R][V];
  decltype(read.spot(0)) spot[V];
  for (int v = 0; v < V; ++v) {
    spot[v] = read.spot(e + v * kLanes);
    for (int r = 0; r < R; ++r) sum[r][v] = load(out + r * width + e + v * kLanes);
  }
  for (int s = 0; s < n; ++s) {
    f32 x[V];
    for (int v = 0; v < V; ++v) x[v] = read(rows[s], spot[v]);
    if (next) fetch(next[s] + from, bytes);
    for (int r = 0; r < R; ++r) {
      const float weight = p[r * p_row + s * p_slot];
      for (int v = 0; v < V; ++v) sum[r][v] += weight * x[v];
    }
  }
  for (int v = 0; v < V; ++v)
    for (int r = 0; r < R; ++r) store(out + r * width + e + v * kLanes, sum[r][v]);
}

// The same for all vectors of R rows.
template <int R, class Read>
inline void add_values(const Read& read, const char* const* rows, const char* const* next, int n,
                       const float* p, int64_t p_row, int64_t p_slot, float* out, int64_t width) {
  int64_t e = 0;
  for (; e + 4 * kLanes <= width; e += 4 * kLanes)
    add_values<R, 4>(read, rows, next, n, p, p_row, p_slot, out, width, e);
  for (; e < width; e += kLanes)
    add_values<R, 1>(read, rows, next, n, p, p_row, p_slot, out, width, e);
}

// many_scores of keys in bf16, two elements at a time: q holds pairs, [d / 2][rows].
template <int V, int T>
inline void many_scores_of_pairs(const uint32_t* q, int64_t d, const char* const* rows, int n,
                                 float* x, const Ahead& ahead) {
  for (int s = 0; s < n; s += T) {
    for (int i = 0; i < T; ++i) ahead(s + i);
    f32 sum[T][V] = {};
    for (int64_t e = 0; e < d / 2; ++e) {
      u32 qe[V];
      for (int v = 0; v < V; ++v) qe[v] = load_bits<u32>(q + e * kTileRows + v * kLanes);
      for (int i = 0; i < T; ++i) {
        uint32_t k;
        std::memcpy(&k, rows[s + i] + e * sizeof k, sizeof k);
        for (int v = 0; v < V; ++v) sum[i][v] = dot_pairs(sum[i][v], qe[v], u32{} + k);
      }
    }
    for (int i = 0; i < T; ++i)
      for (int v = 0; v < V; ++v) store(x + (s + i) * kTileRows + v * kLanes, sum[i][v]);
  }
}

// out[r] += sum over pairs of slots; p is [pairs][kTileRows], v [pairs][width].
template <int R, int V>
inline void add_pairs(const uint32_t* v, int pairs, const uint32_t* p, float* out, int64_t width) {
  f32 sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) sum[r][i] = load(out + r * width + i * kLanes);
  for (int s = 0; s < pairs; ++s) {
    u32 x[V];
    for (int i = 0; i < V; ++i) x[i] = load_bits<u32>(v + s * width + i * kLanes);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < V; ++i)
        sum[r][i] = dot_pairs(sum[r][i], x[i], u32{} + p[s * kTileRows + r]);
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) store(out + r * width + i * kLanes, sum[r][i]);
}

#if KVTOOLS_TILES
// The same scores by tiles: 16 slots against 16 rows. `buffer` has room for 32 slots' keys.
template <class Tiles>
inline void scores_by_tiles(const uint32_t* q, int64_t d, const char* const* rows, int n, float* x,
                            int vectors, const Ahead& ahead, char* buffer) {
  const int64_t bytes = 2 * d, row_bytes = kTileRows * sizeof *q;
  for (int s = 0; s < n; s += 2 * kTileSide) {
    for (int i = s; i < std::min(n, s + 2 * kTileSide); ++i) ahead(i);
    const TileRows k[] = {evenly(rows + s, bytes, buffer),
                          evenly(rows + s + kTileSide, bytes, buffer + kTileSide * bytes)};
    in_groups<2>(vectors, [&](auto count, int v) {
      const TileRows b{reinterpret_cast<const char*>(q + v * kLanes), row_bytes,
                       kTileSide * row_bytes};
      float* c = x + s * kTileRows + v * kLanes;
      if (s + kTileSide < n)
        multiply<Tiles, 2, count.value>(k, b, d / kTileDepth, c, kTileRows, false);
      else
        multiply<Tiles, 1, count.value>(k, b, d / kTileDepth, c, kTileRows, false);
    });
  }
}

// add_pairs by tiles: the words of p are turned, so that a row's pairs of 32 slots lie together.
template <class Tiles>
inline void add_by_tiles(const uint32_t* v, int pairs, const uint32_t* p, int vectors, float* out,
                         int64_t width) {
  const int64_t p_bytes = kTileRows * sizeof *p, v_bytes = width * sizeof *v;
  auto weights = [&](int i) {
    return TileRows{reinterpret_cast<const char*>(p + i * kLanes), p_bytes,
                    2 * kTileSide * p_bytes};
  };
  in_groups<2>(vectors, [&](auto count, int i) {
    const TileRows a[] = {weights(i), weights(i + count.value - 1)};
    for (int64_t e = 0; e < width; e += 2 * kLanes)
      multiply<Tiles, count.value, 2>(
          a, {reinterpret_cast<const char*>(v + e), v_bytes, kTileSide * v_bytes},
          pairs / kTileSide, out + i * kLanes * width + e, width, true);
  });
}
#endif

}  // namespace kvtools::KVTOOLS_ISA

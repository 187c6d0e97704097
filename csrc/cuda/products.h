// Products of queries with keys, and of weights with values, that lie in shared memory.
//
// Those of 16-bit numbers and of codes are of tensor cores. What a lane reads from a slot is a word
// of codes, which holds elements that lie apart; so elements are numbered anew, which no sum over
// them sees, and results are put in order at the end. Exact products, of anything in fp32, are
// plain sums; there, tiles are decoded on their way.
#pragma once

#include "tile.h"

namespace kvtools::cuda {

// 16 query rows of a warp. As operands of products they stay in registers, or where heads are too
// large for that, with the thread in shared memory; exact ones are read where they lie.
template <int D, bool Exact>
class Queries {
 public:
  static constexpr bool kHeld = D <= 128;
  static constexpr int kShared = Exact || kHeld ? 0 : kThreads * D;  // bytes

  // Rows lane / 4 and lane / 4 + 8; `shared` is for the block.
  __device__ void load(const Attention& o, const Store& store, const char* low, const char* high,
                       char* shared) {
    if constexpr (Exact) {
      row_[0] = reinterpret_cast<const float*>(low);
      row_[1] = reinterpret_cast<const float*>(high);
      return;
    }
    kept_ = reinterpret_cast<uint4*>(shared) + threadIdx.x;
    const Format format = store.pages.k.format;
    const int d = o.d, c = lane_index() % 4;
    const int shift = parts_log2(format), width = d >> shift;
#pragma unroll
    for (int s = 0; s < D / 16; ++s) {
      uint32_t a[4] = {};
      if (format == Format::none) {
        const int e = 16 * s + 2 * c;
        if (e < d) a[0] = word_at(low, e), a[1] = word_at(high, e);
        if (e + 8 < d) a[2] = word_at(low, e + 8), a[3] = word_at(high, e + 8);
      } else {
        const int at = (s >> shift) * 16 + 4 * c, e = (s & ((1 << shift) - 1)) * width + at;
        if (at < width) {
          const uint32_t x[2] = {word_at(low, e), word_at(low, e + 2)},
                         y[2] = {word_at(high, e), word_at(high, e + 2)};
          a[0] = __byte_perm(x[0], x[1], 0x5410), a[1] = __byte_perm(y[0], y[1], 0x5410);
          a[2] = __byte_perm(x[0], x[1], 0x7632), a[3] = __byte_perm(y[0], y[1], 0x7632);
        }
      }
      if constexpr (kHeld) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a_[s][i] = a[i];
      } else {
        kept_[s * kThreads] = {a[0], a[1], a[2], a[3]};
      }
    }
  }

  // Products with 16 keys from `rows` on: with lane 4 i + j, of rows i, i, i + 8, i + 8 and columns
  // 2 j, 2 j + 1, 2 j, 2 j + 1; x[1] eight columns on.
  __device__ void multiply_keys(const Attention& o, const Store& store, const char* rows,
                                float (&x)[2][4]) const {
    const int pitch = store.layout.k.pitch, i = lane_index() / 4, j = lane_index() % 4;
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int n = 0; n < 4; ++n) x[t][n] = 0;
    if constexpr (Exact) {
      const char* row = rows + 2 * j * pitch;
      for (int e = 0; e < o.d; e += 4) {
        const float4 a[2] = {four_at(row_[0] + e), four_at(row_[1] + e)};
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const char* key = row + (8 * t + n) * pitch;
            const float4 b = four_at(reinterpret_cast<const float*>(key) + e);
#pragma unroll
            for (int r = 0; r < 2; ++r)
              x[t][2 * r + n] += fmaf(a[r].x, b.x, a[r].y * b.y) + fmaf(a[r].z, b.z, a[r].w * b.w);
          }
      }
    } else if (store.pages.k.format == Format::none) {
      const char* row =
          rows + (lane_index() / 16 * 8 + lane_index() % 8) * pitch + lane_index() / 8 % 2 * 16;
      auto plain = [&](auto* kind) {
        using T = std::remove_pointer_t<decltype(kind)>;
#pragma unroll
        for (int s = 0; s < D / 16; ++s) {
          uint32_t a[4], b[4];
          get(s, a);
          load_matrices<false>(b, row + 32 * s);
          multiply<T>(x[0], a, b[0], b[1]);
          multiply<T>(x[1], a, b[2], b[3]);
        }
      };
      if (store.pages.k.type == Type::bf16)
        plain(static_cast<__nv_bfloat16*>(nullptr));
      else
        plain(static_cast<__half*>(nullptr));
    } else {
      with_codes(store.pages.k.format, [&](auto codes) {
        using Codes = decltype(codes);
        constexpr int kParts = Codes::kParts;
        const int width = o.d / kParts;
#pragma unroll
        for (int s = 0; s < D / 16; s += kParts) {
          const int at = s / kParts * 16 + 4 * j;
          const auto first = Codes::load(rows + i * pitch, at, width);
          const auto second = Codes::load(rows + (i + 8) * pitch, at, width);
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            uint32_t a[4];
            get(s + part, a);
            multiply<__half>(x[0], a, Codes::pair(first, part, 0), Codes::pair(first, part, 1));
            multiply<__half>(x[1], a, Codes::pair(second, part, 0), Codes::pair(second, part, 1));
          }
        }
      });
    }
  }

 private:
  __device__ static uint32_t word_at(const char* row, int e) {
    return *reinterpret_cast<const uint32_t*>(row + 2 * e);
  }
  __device__ static float4 four_at(const float* p) { return *reinterpret_cast<const float4*>(p); }

  __device__ void get(int s, uint32_t (&a)[4]) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = a_[s][i];
    } else {
      const uint4 x = kept_[s * kThreads];
      a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w;
    }
  }

  const float* row_[2];
  uint32_t a_[kHeld ? D / 16 : 1][4];
  uint4* kept_;
};

// How many bytes of codes a lane takes at once from a value, as a logarithm: a word, or less where
// heads are small.
KVTOOLS_ANYWHERE constexpr int bytes_log2(int D, int parts_log2) {
  return D >> parts_log2 < 32 ? 1 : 2;
}

// The element of a head in column `column` of the n-th eight columns of what add_values adds to, or
// -1 where there is none.
template <int D, bool Exact>
__device__ inline int element_of(const Content& v, int d, int n, int column) {
  if (Exact || v.format == Format::none) return 8 * n + column < d ? 8 * n + column : -1;
  const int parts = parts_log2(v.format), bytes = bytes_log2(D, parts), width = d >> parts;
  const int at = (((n >> (parts + bytes)) * 8 + column) << bytes) + (n & ((1 << bytes) - 1));
  return at < width ? (n >> bytes & ((1 << parts) - 1)) * width + at : -1;
}

// Add products of weights p, as multiply_keys leaves them, with 16 values from `rows` on.
template <int D, bool Exact>
__device__ inline void add_values(const Attention& o, const Store& store, const char* rows,
                                  const float (&p)[2][4], float (&sum)[D / 8][4]) {
  const int pitch = store.layout.v.pitch, i = lane_index() / 4, j = lane_index() % 4;
  if constexpr (Exact) {
    float weight[2][kStep];
#pragma unroll
    for (int s = 0; s < kStep; ++s)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        weight[r][s] = __shfl_sync(kAll, p[s / 8][2 * r + s % 2], 4 * i + s % 8 / 2);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      if (8 * n >= o.d) break;
      float x[4] = {};
#pragma unroll
      for (int s = 0; s < kStep; ++s) {
        const auto value = *reinterpret_cast<const float2*>(rows + s * pitch + 4 * (8 * n + 2 * j));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          x[2 * r] = fmaf(weight[r][s], value.x, x[2 * r]);
          x[2 * r + 1] = fmaf(weight[r][s], value.y, x[2 * r + 1]);
        }
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) sum[n][m] += x[m];
    }
  } else if (store.pages.v.format == Format::none) {
    const char* row = rows + lane_index() % 16 * pitch + lane_index() / 16 * 16;
    auto plain = [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      const uint32_t a[4] = {packed<T>(p[0][0], p[0][1]), packed<T>(p[0][2], p[0][3]),
                             packed<T>(p[1][0], p[1][1]), packed<T>(p[1][2], p[1][3])};
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) {
        uint32_t b[4];
        load_matrices<true>(b, row + 16 * n);
        multiply<T>(sum[n], a, b[0], b[1]);
        multiply<T>(sum[n + 1], a, b[2], b[3]);
      }
    };
    if (store.pages.v.type == Type::bf16)
      plain(static_cast<__nv_bfloat16*>(nullptr));
    else
      plain(static_cast<__half*>(nullptr));
  } else {
    const uint32_t a[4] = {packed<__half>(p[0][0], p[0][1]), packed<__half>(p[0][2], p[0][3]),
                           packed<__half>(p[1][0], p[1][1]), packed<__half>(p[1][2], p[1][3])};
    with_codes(store.pages.v.format, [&](auto codes) {
      using Codes = decltype(codes);
      using Word = typename Codes::Word;
      constexpr int kParts = Codes::kParts, kBytes = 1 << bytes_log2(D, kParts / 2);
      constexpr int kTogether = kParts * kBytes;  // elements of a word
      const int width = o.d / kParts;
      const char* row = rows + 2 * j * pitch;
#pragma unroll
      for (int n = 0; n < D / 8; n += kTogether) {
        const int at = (n / kTogether * 8 + i) * kBytes;
        Word x[2][kBytes / 2];  // b[m] of two elements: slots 2 j + 8 m and the next
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const Word first = Codes::load(row + 8 * m * pitch, at & ~3, width);
          const Word second = Codes::load(row + (8 * m + 1) * pitch, at & ~3, width);
          x[m][0] = Codes::permute(first, second, at & 2 ? 0x7632 : 0x5410);
          if constexpr (kBytes == 4) x[m][1] = Codes::permute(first, second, 0x7632);
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int byte = 0; byte < kBytes; ++byte)
            multiply<__half>(sum[n + part * kBytes + byte], a,
                             Codes::pair(x[0][byte / 2], part, byte % 2),
                             Codes::pair(x[1][byte / 2], part, byte % 2));
      }
    });
  }
}

}  // namespace kvtools::cuda

// Tiles of keys and values: how they come to shared memory, and products with what lies there.
//
// Products of 16-bit numbers and of codes are those of tensor cores. A warp takes 16 slots at a
// time. What it reads from a slot is a word of codes, which holds elements that lie apart; so
// elements are numbered anew, which no sum over them sees, and results are put in order at the end.
//
// Exact products, of anything in fp32, are plain sums; there, tiles are decoded on their way.
#pragma once

#include <climits>

#include "format.h"
#include "ptx.h"

namespace kvtools::cuda {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kStep = 16;  // slots that a warp takes at a time, and query rows that it has

// Rows of keys or values in shared memory, in bytes: as they are stored, zero from `bytes` on up to
// `padded`. They are copied in units of `unit`, a row by 2^lanes_log2 lanes.
struct RowLayout {
  int bytes, padded, pitch, unit, lanes_log2;
};

// A stage: keys, values, and a few numbers for each slot.
struct Layout {
  RowLayout k, v;
  int slots, stages;

  KVTOOLS_ANYWHERE int v_at() const { return slots * k.pitch; }
  KVTOOLS_ANYWHERE int numbers_at() const { return v_at() + slots * v.pitch; }
  KVTOOLS_ANYWHERE int stage() const { return numbers_at() + slots * 12; }
};

// See TreeAttention.
struct Attention : TreeAttention {
  Layout layout;
  int group;
  float factor, cap;  // scores in base 2: of scores, or what they are in units of the cap; cap
  // In scratch memory:
  float *part_out, *part_lse, *mean;
  int32_t* part_seen;
  char* queries;
};

// Codes of `Bits` bits as fp16.
template <int Bits>
struct Integers {
  using G = Grid<Bits>;
  static constexpr int kParts = 8 / G::kLow;  // elements that share a byte of the low plane
  struct Word {
    uint32_t low, high;
  };

  // Bytes `at` to `at` + 3 of the low plane, of `width` bytes, and what goes with them.
  __device__ static Word load(const char* row, int at, int width) {
    Word word{*reinterpret_cast<const uint32_t*>(row + at), 0};
    if constexpr (G::kHigh > 0) {
      const bool second = at >= width / 2;
      word.high = *reinterpret_cast<const uint32_t*>(row + width + (second ? at - width / 2 : at));
      word.high >>= second ? G::kHigh : 0;
    }
    return word;
  }

  __device__ static Word permute(const Word& a, const Word& b, unsigned selector) {
    return {__byte_perm(a.low, b.low, selector),
            G::kHigh > 0 ? __byte_perm(a.high, b.high, selector) : 0};
  }

  // Levels of the codes in bytes `byte` and `byte` + 2, of those that share it the `part`th.
  __device__ static uint32_t pair(const Word& word, int part, int byte) {
    // Where a code makes 2^Bits + code of the fp16 2^Bits.
    constexpr int kAt = 10 - Bits;
    constexpr uint32_t kLow = ((1 << G::kLow) - 1) << kAt,
                       kHigh = ((1 << G::kHigh) - 1) << (kAt + G::kLow), kBoth = 0x10001;
    auto shifted = [](uint32_t x, int by) { return by > 0 ? x >> by : x << -by; };
    const int from = part * G::kLow + 8 * byte;
    uint32_t x = (shifted(word.low, from - kAt) & kLow * kBoth) | (15 + Bits) * 1024 * kBoth;
    if constexpr (G::kHigh > 0) x |= shifted(word.high, from - kAt - G::kLow) & kHigh * kBoth;
    __half2 c = __hsub2(halves(x), __float2half2_rn((1 << Bits) + G::kTop));
    if constexpr (G::kBend > 0)
      c = __hmul2(c, __hfma2(__hmul2(c, c), __float2half2_rn(G::kCubic), __float2half2_rn(1)));
    return bits(c);
  }

  __device__ static __half2 halves(uint32_t x) { return *reinterpret_cast<__half2*>(&x); }
  __device__ static uint32_t bits(__half2 x) { return *reinterpret_cast<uint32_t*>(&x); }
};

// fp8 (e4m3) as fp16. It has the layout of fp16 with an exponent less by 8.
struct Fp8 : Integers<8> {
  __device__ static uint32_t pair(const Word& word, int, int byte) {
    const uint32_t x = byte ? word.low : word.low << 8;
    return bits(__hmul2(halves((x & 0x80008000) | (x & 0x7f007f00) >> 1), __float2half2_rn(256)));
  }
};

template <class F>
__device__ inline void with_codes(Format format, F f) {
  switch (format) {
    case Format::fp8:
      return f(Fp8{});
    case Format::int8:
      return f(Integers<8>{});
    case Format::int6:
      return f(Integers<6>{});
    case Format::int4:
      return f(Integers<4>{});
    case Format::int3:
      return f(Integers<3>{});
    default:
      return f(Integers<2>{});
  }
}

// The logarithm of the number of elements that share a byte, of the low plane where there are two.
KVTOOLS_ANYWHERE inline int parts_log2(Format format) {
  switch (format) {
    case Format::int6:
    case Format::int4:
      return 1;
    case Format::int3:
    case Format::int2:
      return 2;
    default:
      return 0;
  }
}

KVTOOLS_ANYWHERE inline int high_bits(Format format) {
  return format == Format::int6 ? 2 : format == Format::int3 ? 1 : 0;
}

// Element e in fp32, scale left out.
__device__ inline float element_at(const Content& x, const char* row, int e, int d) {
  if (x.format == Format::none) return number_at(row + e * size_of(x.type), x.type);
  auto plane = [&](int byte, int bits) {
    const int width = d * bits / 8;
    return static_cast<uint8_t>(row[byte + e % width]) >> e / width * bits & ((1 << bits) - 1);
  };
  const int low = 8 >> parts_log2(x.format), high = high_bits(x.format);
  int code = plane(0, low);
  if (high) code |= plane(d * low / 8, high) << low;
  switch (x.format) {
    case Format::fp8:
      return __uint_as_float((code & 0x80) << 24 | (code & 0x7f) << 20) * 0x1p120f;
    case Format::int8:
      return Grid<8>::level(code - Grid<8>::kTop);
    case Format::int6:
      return Grid<6>::level(code - Grid<6>::kTop);
    case Format::int4:
      return Grid<4>::level(code - Grid<4>::kTop);
    case Format::int3:
      return Grid<3>::level(code - Grid<3>::kTop);
    default:
      return Grid<2>::level(code - Grid<2>::kTop);
  }
}

// Where a slot is.
struct Place {
  int page, offset;
};

__device__ inline Place find(const Attention& o, int node, int slot) {
  const unsigned size = static_cast<unsigned>(o.pages.page_size);
  const unsigned at = o.first[node] + slot;
  return {o.page[o.page_indptr[node] + at / size], static_cast<int>(at % size)};
}

// A tile of slots in shared memory.
struct Stage {
  const char *k, *v;
  const float *factor, *v_scale;  // of scores in units of products; of values
  const int* key;                 // position; behind every query for slots that do not count
};

// The slots [begin, end) of a node and a KV head, tile by tile. Some tiles ahead are on their way;
// each warp brings its share of their slots, of which a lane has what is known about one.
template <int D, bool Exact, bool Values>
class Tiles {
 public:
  __device__ Tiles(const Attention& o, char* shared, int node, int head, int begin, int end)
      : o_(o),
        shared_(shared),
        node_(node),
        head_(head),
        begin_(begin),
        end_(end),
        share_(o.layout.slots / kWarps) {}

  __device__ int count() const { return (end_ - begin_ + o_.layout.slots - 1) / o_.layout.slots; }

  __device__ void start() {
    const int ahead = o_.layout.stages - 1;
    for (int i = 0; i < ahead; ++i) {
      look_up(i);
      copy(i);
      note(i);
    }
    look_up(ahead);
  }

  // Tile i, once it is there.
  __device__ Stage wait(int i) {
    if (o_.layout.stages == 3)
      wait_for_copies<1>();
    else
      wait_for_copies<0>();
    __syncthreads();
    copy(i + o_.layout.stages - 1);
    look_up(i + o_.layout.stages);
    char* stage = stage_of(i);
    const auto* factor = reinterpret_cast<const float*>(stage + o_.layout.numbers_at());
    const float* v_scale = factor + o_.layout.slots;
    return {stage, stage + o_.layout.v_at(), factor, v_scale,
            reinterpret_cast<const int*>(v_scale + o_.layout.slots)};
  }

  // Tile i is done with.
  __device__ void release(int i) { note(i + o_.layout.stages - 1); }

 private:
  __device__ char* stage_of(int i) const {
    return shared_ + i % o_.layout.stages * o_.layout.stage();
  }

  __device__ void look_up(int i) {
    slot_ = begin_ + i * o_.layout.slots + threadIdx.x / kWarp * share_ + lane_index();
    live_ = lane_index() < share_ && slot_ < end_;
    if (live_) place_ = find(o_, node_, slot_);
  }

  // Start to bring the tile that was looked up.
  __device__ void copy(int i) {
    if (i < count()) {
      const Content &k = o_.pages.k, &v = o_.pages.v;
      char* stage = stage_of(i);
      factor_ = o_.factor, v_scale_ = 0, key_ = INT_MAX;
      float k_scale = 0;
      if (live_) {
        key_ = o_.pages.position.data ? *reinterpret_cast<const int*>(
                                            o_.pages.position.at(place_.page, head_, place_.offset))
                                      : o_.base[node_] + slot_;
        k_scale = scale_of(k);
        if (Values) v_scale_ = scale_of(v);
      }
      if (!Exact) factor_ *= k_scale;
      bring(stage, k, o_.layout.k, k_scale);
      if (Values) bring(stage + o_.layout.v_at(), v, o_.layout.v, v_scale_);
    }
    commit_copies();
  }

  // Write down what is known about the slots of the tile that was started last.
  __device__ void note(int i) {
    if (i >= count() || lane_index() >= share_) return;
    const int slots = o_.layout.slots, at = threadIdx.x / kWarp * share_ + lane_index();
    auto* numbers = reinterpret_cast<float*>(stage_of(i) + o_.layout.numbers_at());
    numbers[at] = factor_, numbers[slots + at] = v_scale_;
    reinterpret_cast<int*>(numbers)[2 * slots + at] = key_;
  }

  __device__ float scale_of(const Content& x) const {
    if (x.format == Format::none) return 1;
    const char* scale = x.scale.at(place_.page, head_, place_.offset);
    return __half2float(*reinterpret_cast<const __half*>(scale));
  }

  __device__ void bring(char* stage, const Content& x, const RowLayout& layout, float scale) const {
    const int64_t from =
        live_ ? reinterpret_cast<int64_t>(x.codes.at(place_.page, head_, place_.offset)) : 0;
    char* to = stage + threadIdx.x / kWarp * share_ * layout.pitch;
    if constexpr (Exact) {
      for (int s = 0; s < share_; ++s, to += layout.pitch) {
        const auto* row = reinterpret_cast<const char*>(__shfl_sync(kAll, from, s));
        const float unit = __shfl_sync(kAll, scale, s);
        const int d = static_cast<int>(o_.pages.d);
        for (int e = lane_index(); e < d; e += kWarp)
          reinterpret_cast<float*>(to)[e] = row ? element_at(x, row, e, d) * unit : 0;
      }
    } else {
      const int lanes = 1 << layout.lanes_log2, lane = lane_index() & (lanes - 1);
      for (int first = 0; first < share_; first += kWarp >> layout.lanes_log2) {
        const int s = first + (lane_index() >> layout.lanes_log2);
        const auto* row = reinterpret_cast<const char*>(__shfl_sync(kAll, from, s));
        if (s < share_) copy_row(to + s * layout.pitch, row, layout, lane, lanes);
      }
    }
  }

  __device__ static void copy_row(char* to, const char* from, const RowLayout& layout, int lane,
                                  int lanes) {
    const int bytes = from ? layout.bytes : 0;
    auto in_units = [&](auto unit) {
      constexpr int kUnit = decltype(unit)::value;
      for (int i = lane * kUnit; i < layout.padded; i += lanes * kUnit)
        copy_async<kUnit>(to + i, from ? from + i : nullptr, min(max(bytes - i, 0), kUnit));
    };
    switch (layout.unit) {
      case 16:
        return in_units(std::integral_constant<int, 16>{});
      case 8:
        return in_units(std::integral_constant<int, 8>{});
      case 4:
        return in_units(std::integral_constant<int, 4>{});
      default:
        for (int i = lane; i < layout.padded; i += lanes) to[i] = i < bytes ? from[i] : 0;
    }
  }

  const Attention& o_;
  char* const shared_;
  const int node_, head_, begin_, end_, share_;
  // This lane's slot of the tile that was looked up last, and of the one before, which was started.
  int slot_;
  bool live_;
  Place place_;
  float factor_, v_scale_;
  int key_;
};

// 16 query rows of a warp. As operands of products they stay in registers, or where heads are too
// large for that, with the thread in shared memory; exact ones are read where they lie.
template <int D, bool Exact>
class Queries {
 public:
  static constexpr bool kHeld = D <= 128;
  static constexpr int kShared = Exact || kHeld ? 0 : kThreads * D;  // bytes

  // Rows lane / 4 and lane / 4 + 8; `shared` is for the block.
  __device__ void load(const Attention& o, const char* low, const char* high, char* shared) {
    if constexpr (Exact) {
      row_[0] = reinterpret_cast<const float*>(low);
      row_[1] = reinterpret_cast<const float*>(high);
      return;
    }
    kept_ = reinterpret_cast<uint4*>(shared) + threadIdx.x;
    const Format format = o.pages.k.format;
    const int d = static_cast<int>(o.pages.d), c = lane_index() % 4;
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
  __device__ void multiply_keys(const Attention& o, const char* rows, float (&x)[2][4]) const {
    const int pitch = o.layout.k.pitch, i = lane_index() / 4, j = lane_index() % 4;
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int n = 0; n < 4; ++n) x[t][n] = 0;
    if constexpr (Exact) {
      const char* row = rows + 2 * j * pitch;
      for (int e = 0; e < o.pages.d; e += 4) {
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
    } else if (o.pages.k.format == Format::none) {
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
      if (o.pages.k.type == Type::bf16)
        plain(static_cast<__nv_bfloat16*>(nullptr));
      else
        plain(static_cast<__half*>(nullptr));
    } else {
      with_codes(o.pages.k.format, [&](auto codes) {
        using Codes = decltype(codes);
        constexpr int kParts = Codes::kParts;
        const int width = static_cast<int>(o.pages.d) / kParts;
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

// Two numbers of T.
template <class T>
__device__ inline uint32_t packed(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 x = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
  } else {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
  }
}

// Add products of weights p, as multiply_keys leaves them, with 16 values from `rows` on.
template <int D, bool Exact>
__device__ inline void add_values(const Attention& o, const char* rows, const float (&p)[2][4],
                                  float (&sum)[D / 8][4]) {
  const int pitch = o.layout.v.pitch, i = lane_index() / 4, j = lane_index() % 4;
  if constexpr (Exact) {
    float weight[2][kStep];
#pragma unroll
    for (int s = 0; s < kStep; ++s)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        weight[r][s] = __shfl_sync(kAll, p[s / 8][2 * r + s % 2], 4 * i + s % 8 / 2);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      if (8 * n >= o.pages.d) break;
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
  } else if (o.pages.v.format == Format::none) {
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
    if (o.pages.v.type == Type::bf16)
      plain(static_cast<__nv_bfloat16*>(nullptr));
    else
      plain(static_cast<__half*>(nullptr));
  } else {
    const uint32_t a[4] = {packed<__half>(p[0][0], p[0][1]), packed<__half>(p[0][2], p[0][3]),
                           packed<__half>(p[1][0], p[1][1]), packed<__half>(p[1][2], p[1][3])};
    with_codes(o.pages.v.format, [&](auto codes) {
      using Codes = decltype(codes);
      using Word = typename Codes::Word;
      constexpr int kParts = Codes::kParts, kBytes = 1 << bytes_log2(D, kParts / 2);
      constexpr int kTogether = kParts * kBytes;  // elements of a word
      const int width = static_cast<int>(o.pages.d) / kParts;
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

// Attention of few query rows, as in decoding. Slots are rows of the products and query rows
// columns, so that codes are operands as they come from shared memory: scores are K q, and what is
// found is V^T p. A warp has a stretch of the item's slots for itself and waits for no other before
// the end.
#include <cfloat>

#include "pieces.h"

namespace kvtools::cuda {
namespace {

// Of a multiprocessor of sm_90 there are as many blocks as memory or registers let.
template <int D, class F>
constexpr int kStages = !PieceLayout<D, F>::kCoded       ? 3
                        : PieceLayout<D, F>::kRow >= 128 ? 2
                                                         : 4;
template <int D, class F>
constexpr int kPlaces = PieceLayout<D, F>::kCoded ? 4
                        : D == 64                 ? 4
                                                  : 2;

// Query rows in shared memory begin in other banks.
template <int D>
constexpr int kQueryPitch = 2 * D + 16;

// What a warp leaves for the others.
template <int D>
struct Left {
  float sum[D / 16][4][kWarp];
  float base[kFewRows], mass[kFewRows];
  float unit;
};

template <int D, class F>
constexpr int kWarpBytes =
    std::max<int>(kStages<D, F> * PieceLayout<D, F>::kBytes, (sizeof(Left<D>) + 15) / 16 * 16);
template <int D, class F>
constexpr int kSharedBytes = kFewRows * kQueryPitch<D> + kWarps * kWarpBytes<D, F>;

// Which bytes of a row of codes a lane has of a key: word w of lane j of four.
template <class L>
KVTOOLS_ANYWHERE constexpr int key_byte(int w, int j) {
  constexpr int kRun = L::kRow < 64 ? L::kRow / 4 : 16;
  return 4 * w / kRun * 4 * kRun + j * kRun + 4 * w % kRun;
}

// The element of a head in row `row` of 16 of the n-th product with values.
template <int D, class F>
__device__ int element_in(int n, int row) {
  if constexpr (F::kBits == 16) return 16 * n + row;
  using L = PieceLayout<D, F>;
  return row % 8 * (L::kRow / 8) + n / F::kParts * 2 + row / 8 + n % F::kParts * L::kRow;
}

// Query rows as columns: lane 4 i + j has of row i what meets its part of a key.
template <int D, class F>
__device__ void load_queries(const char* row, uint32_t (&b)[D / 16][2]) {
  const int j = lane_index() % 4;
  auto word = [&](int e) { return *reinterpret_cast<const uint32_t*>(row + 2 * e); };
#pragma unroll
  for (int s = 0; s < D / 16; ++s) {
    if constexpr (F::kBits == 16) {
      b[s][0] = word(16 * s + 2 * j), b[s][1] = word(16 * s + 2 * j + 8);
    } else {
      using L = PieceLayout<D, F>;
      const int e = key_byte<L>(s / F::kParts, j) + s % F::kParts * L::kRow;
      const uint32_t low = word(e), high = word(e + 2);
      b[s][0] = __byte_perm(low, high, 0x5410), b[s][1] = __byte_perm(low, high, 0x7632);
    }
  }
}

// Words of T from shared memory, in as few loads as can be.
template <int Words>
__device__ void load_words(const char* from, uint32_t (&to)[Words]) {
  if constexpr (Words % 4 == 0) {
    const uint4 x = *reinterpret_cast<const uint4*>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else if constexpr (Words == 2) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    to[0] = x.x, to[1] = x.y;
  } else {
    to[0] = *reinterpret_cast<const uint32_t*>(from);
  }
}

// Products of 16 keys with query rows: with lane 4 i + j, of slots i, i, i + 8, i + 8 and rows
// 2 j, 2 j + 1, 2 j, 2 j + 1.
template <int D, class F>
__device__ void multiply_keys(const char* piece, const uint32_t (&q)[D / 16][2], float (&x)[4]) {
  using L = PieceLayout<D, F>;
  using T = typename F::Operand;
  const int lane = lane_index();
#pragma unroll
  for (int m = 0; m < 4; ++m) x[m] = 0;
  if constexpr (F::kBits == 16) {
#pragma unroll
    for (int s = 0; s < D / 16; ++s) {
      uint32_t a[4];
      load_matrices<false>(a, piece + swizzled<D>(lane % 16, lane / 16, 2 * s));
      multiply<T>(x, a, q[s][0], q[s][1]);
    }
  } else {
    constexpr int kWords = L::kRow / 16, kRun = kWords < 4 ? kWords : 4;
    const char* row = piece + lane / 4 * L::kKPitch;
#pragma unroll
    for (int w = 0; w < kWords; w += kRun) {
      uint32_t code[2][kRun];
#pragma unroll
      for (int down = 0; down < 2; ++down)
        load_words(row + down * 8 * L::kKPitch + key_byte<L>(w, lane % 4), code[down]);
#pragma unroll
      for (int r = 0; r < kRun; ++r) {
        uint32_t y[2][2 * F::kParts];
        F::expand(code[0][r], y[0]), F::expand(code[1][r], y[1]);
#pragma unroll
        for (int part = 0; part < F::kParts; ++part) {
          const uint32_t a[4] = {y[0][2 * part], y[1][2 * part], y[0][2 * part + 1],
                                 y[1][2 * part + 1]};
          const int s = (w + r) * F::kParts + part;
          multiply<T>(x, a, q[s][0], q[s][1]);
        }
      }
    }
  }
}

// Add products of 16 values with weights p of query rows, two registers of an operand.
template <int D, class F>
__device__ void add_values(const char* values, const uint32_t (&p)[2], float (&sum)[D / 16][4]) {
  using L = PieceLayout<D, F>;
  using T = typename F::Operand;
  const int lane = lane_index(), i = lane / 4, j = lane % 4;
  if constexpr (F::kBits == 16) {
#pragma unroll
    for (int s = 0; s < D / 16; ++s) {
      uint32_t a[4];
      const int slot = lane / 16 * 8 + lane % 8;
      load_matrices<true>(a, values + swizzled<D>(slot, lane / 8 % 2, 2 * s));
      multiply<T>(sum[s], a, p[0], p[1]);
    }
  } else {
    constexpr int kBytes = L::kRow / 8, kWords = kBytes < 4 ? 1 : kBytes / 4;
    const char* row = values + 2 * j * L::kVPitch + i * kBytes;
    uint32_t code[4][kWords];  // of slots 2 j, 2 j + 1, and eight on
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const char* from = row + (n / 2 * 8 + n % 2) * L::kVPitch;
      if constexpr (kBytes < 4)
        code[n][0] = *reinterpret_cast<const uint16_t*>(from);
      else
        load_words(from, code[n]);
    }
#pragma unroll
    for (int h = 0; h < kBytes / 2; ++h) {  // two bytes of each
      uint32_t y[2][2 * F::kParts];
#pragma unroll
      for (int n = 0; n < 2; ++n)
        F::expand(__byte_perm(code[2 * n][h / 2], code[2 * n + 1][h / 2], h % 2 ? 0x7632 : 0x5410),
                  y[n]);
#pragma unroll
      for (int part = 0; part < F::kParts; ++part) {
        const uint32_t a[4] = {y[0][2 * part], y[0][2 * part + 1], y[1][2 * part],
                               y[1][2 * part + 1]};
        multiply<T>(sum[h * F::kParts + part], a, p[0], p[1]);
      }
    }
  }
}

template <int D, class F>
__global__ void __launch_bounds__(kThreads, kPlaces<D, F>)
    few_kernel(__grid_constant__ const Attention o) {
  using L = PieceLayout<D, F>;
  using T = typename F::Operand;
  KVTOOLS_SHARED(char, shared);
  const Item item(o);
  if (item.rows > kFewRows || !is_mine(o)) return;
  const int warp = threadIdx.x / kWarp, lane = lane_index(), i = lane / 4, j = lane % 4;
  char* const prepared = &shared;
  char* const memory = prepared + kFewRows * kQueryPitch<D> + warp * kWarpBytes<D, F>;
  Pieces<D, F> pieces(item, warp, kWarps);
  const int count = pieces.left;
#pragma unroll
  for (int n = 0; n < kStages<D, F> - 1; ++n) pieces.copy(o, item.number, memory + n * L::kBytes);

  const Pages& store = o.stores[item.number];
  const Type type = L::kCoded ? Type::f16 : store.k.type;
  for (int row = warp; row < item.rows; row += kWarps)
    prepare<D>(o, store.k.format, item.token(row), item.head_q(row),
               prepared + row * kQueryPitch<D>, type);
  __syncthreads();
  uint32_t q[D / 16][2];
  load_queries<D, F>(prepared + min(i, item.rows - 1) * kQueryPitch<D>, q);
  // Of query rows 2 j and 2 j + 1.
  const int2 seen[2] = {seen_by(item, min(2 * j, item.rows - 1)),
                        seen_by(item, min(2 * j + 1, item.rows - 1))};
  const Window window(item, {max(seen[0].x, seen[1].x), min(seen[0].y, seen[1].y)});
  const bool paired = Pieces<D, F>::paired(store), placed = store.position.data;
  const float factor = o.factor * F::kUnit;

  float sum[D / 16][4];
#pragma unroll
  for (int s = 0; s < D / 16; ++s)
#pragma unroll
    for (int m = 0; m < 4; ++m) sum[s][m] = 0;
  float base[2] = {-FLT_MAX, -FLT_MAX}, mass[2] = {0, 0};  // of query rows 2 j and 2 j + 1
  float unit = L::kCoded ? kLeastScale : 1, inverse = 1 / unit;
  int first = pieces.first + warp * pieces.stretch * kPiece;
  char* tile = memory;
  char* free = memory + (kStages<D, F> - 1) * L::kBytes;
  char* const behind = memory + kStages<D, F> * L::kBytes;
  for (int n = 0; n < count; ++n) {
    wait_for_copies<kStages<D, F> - 2>();
    __syncwarp();
    pieces.copy(o, item.number, free);
    float x[4], scale[2] = {1, 1}, of_values[2] = {1, 1};  // of slots i and i + 8
    if constexpr (L::kCoded) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 both = scales<L>(tile, paired, i + 8 * half);
        scale[half] = both.x * factor, of_values[half] = both.y;
      }
    } else {
      scale[0] = scale[1] = factor;
    }
    multiply_keys<D, F>(tile, q, x);
#pragma unroll
    for (int m = 0; m < 4; ++m) x[m] *= scale[m / 2];
    if (!window.whole(first)) {
      char* const values = tile + L::kVAt;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int slot = first + i + 8 * half;
        const bool inside = slot >= item.begin && slot < item.end;
        const int key =
            placed ? reinterpret_cast<const int*>(tile + L::kPositionAt)[i + 8 * half] : slot;
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (!inside || key < seen[c].x || key > seen[c].y) x[2 * half + c] = -INFINITY;
        if (inside) continue;
        of_values[half] = 0;
        // What lies there may be no number.
        auto* row = reinterpret_cast<uint32_t*>(values + (i + 8 * half) * L::kVPitch);
#pragma unroll 1
        for (int w = j; w < L::kRow / 4; w += 4) row[w] = 0;
      }
      __syncwarp();
    }
    bool stays = of_values[0] <= unit && of_values[1] <= unit;
#pragma unroll
    for (int m = 0; m < 4; ++m) stays &= x[m] - base[m % 2] <= kMargin;
    if (!__all_sync(kAll, stays)) {
      float greatest = fmaxf(unit, fmaxf(of_values[0], of_values[1])), shrink[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float before = base[c];
        base[c] = fmaxf(before, fmaxf(x[c], x[2 + c]));
#pragma unroll
        for (int distance = 4; distance < kWarp; distance *= 2)
          base[c] = fmaxf(base[c], across(base[c], distance));
        shrink[c] = exp2_approximately(before - base[c]);
        mass[c] *= shrink[c];
      }
      if constexpr (L::kCoded) {
        greatest = cuda::greatest(greatest);
        const unsigned next = (__float_as_uint(greatest) + 0x7fffff) & 0x7f800000;
        inverse = __uint_as_float(0x7f000000 - next);
        shrink[0] *= unit * inverse, shrink[1] *= unit * inverse;
        unit = __uint_as_float(next);
      }
#pragma unroll
      for (int s = 0; s < D / 16; ++s)
#pragma unroll
        for (int m = 0; m < 4; ++m) sum[s][m] *= shrink[m % 2];
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      x[m] = exp2_approximately(x[m] - base[m % 2]);
      mass[m % 2] += x[m];
      if constexpr (L::kCoded) x[m] *= of_values[m / 2] * inverse;
    }
    uint32_t p[2] = {packed<T>(x[0], x[1]), packed<T>(x[2], x[3])};
    p[0] = transpose(p[0]), p[1] = transpose(p[1]);
    add_values<D, F>(tile + L::kVAt, p, sum);
    first += kPiece;
    free = tile;
    tile += L::kBytes;
    if (tile == behind) tile = memory;
  }
  wait_for_copies<0>();
  __syncwarp();

  auto& left = *reinterpret_cast<Left<D>*>(memory);
#pragma unroll
  for (int s = 0; s < D / 16; ++s)
#pragma unroll
    for (int m = 0; m < 4; ++m) left.sum[s][m][lane] = sum[s][m];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int distance = 4; distance < kWarp; distance *= 2) mass[c] += across(mass[c], distance);
    if (i == 0) left.base[2 * j + c] = base[c], left.mass[2 * j + c] = mass[c];
  }
  if (lane == 0) left.unit = unit * F::kUnit;
  __syncthreads();
  auto of = [&](int w) -> const Left<D>& {
    return *reinterpret_cast<const Left<D>*>(memory + (w - warp) * kWarpBytes<D, F>);
  };
  float weight[2][kWarps];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int row = 2 * j + c;
    float peak = -FLT_MAX, all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) peak = fmaxf(peak, of(w).base[row]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      weight[c][w] = exp2_approximately(of(w).base[row] - peak);
      all = fmaf(of(w).mass[row], weight[c][w], all);
      weight[c][w] *= of(w).unit;
    }
    // 0 where nothing is seen; a NaN, once seen, stays.
    const float over = all != 0 ? 1 / all : 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) weight[c][w] *= over;
    if (warp == 0 && i == 0 && row < item.rows) item.finish(row, peak, all, 0);
  }
  for (int s = warp; s < D / 16; s += kWarps)
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int row = 2 * j + m % 2;
      float y = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) y = fmaf(of(w).sum[s][m][lane], weight[m % 2][w], y);
      if (row < item.rows)
        o.part_out[item.result(row) * D + element_in<D, F>(s, i + m / 2 * 8)] = y;
    }
}

template <int D>
void launch_few(const Attention& o, const Pages& as, void* stream) {
  with_format(as, [&](auto format) {
    using F = decltype(format);
    launch("attend few", few_kernel<D, F>, blocks_of(o), kThreads, kSharedBytes<D, F>, stream, o);
  });
}

}  // namespace

void attend_few(const Attention& o, const Pages& as, void* stream) {
  return o.d == 64 ? launch_few<64>(o, as, stream) : launch_few<128>(o, as, stream);
}

}  // namespace kvtools::cuda

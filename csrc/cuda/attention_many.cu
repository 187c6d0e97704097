// Attention of many query rows, as of a prefix that rows share. A block has up to 128 rows at once
// and tiles of four pieces; each warp brings one of them, and brings its codes to 16 bits, once
// for all rows. Of rows a warp has 32, or 16 where there are no more than 64.
#include <cfloat>

#include "pieces.h"

namespace kvtools::cuda {
namespace {

constexpr int kTileRows = 16, kBlockRows = 2 * kTileRows * kWarps;

// Operands of products in shared memory: a piece of 16-bit numbers, codes or not.
template <int D>
using Operands = PieceLayout<D, Plain<__half>>;

// Codes are brought while the tile before is attended; numbers of 16 bits to the other of two
// buffers.
template <int D, class F>
struct Memory {
  using L = PieceLayout<D, F>;
  static constexpr int kQueryPitch = 2 * D + 16;
  static constexpr int kTile = kWarps * Operands<D>::kBytes;
  static constexpr int kTileAt = kBlockRows * kQueryPitch;
  static constexpr int kCodesAt = kTileAt + kTile;
  static constexpr int kNumbersAt = kCodesAt + (L::kCoded ? kWarps * L::kBytes : kTile);
  static constexpr int kBytes = kNumbersAt + (L::kCoded ? kWarps * kPiece * 8 : 0);
};

// What the rows of a warp have found: with lane 4 i + j, of rows i and i + 8 of each 16.
template <int D, int kTiles>
struct Sums {
  float sum[kTiles][D / 8][4];
  float base[kTiles][2], mass[kTiles][2];
  float unit;

  __device__ explicit Sums(float unit) : unit(unit) {
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
      base[r][0] = base[r][1] = -FLT_MAX, mass[r][0] = mass[r][1] = 0;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int m = 0; m < 4; ++m) sum[r][n][m] = 0;
    }
  }
};

// Rows of codes of a piece as rows of fp16.
template <int D, class F>
__device__ void unpack(const char* codes, int pitch, char* to) {
  constexpr int kRow = PieceLayout<D, F>::kRow, kChunks = kRow / 8;  // of eight bytes
  constexpr int kRows = kWarp / kChunks;                             // at once
  const int row = lane_index() / kChunks, chunk = lane_index() % kChunks;
  uint2 all[kPiece / kRows];
#pragma unroll
  for (int n = 0; n < kPiece; n += kRows)
    all[n / kRows] = *reinterpret_cast<const uint2*>(codes + row * pitch + chunk * 8 + n * pitch);
#pragma unroll
  for (int n = 0; n < kPiece; n += kRows) {
    const uint2 code = all[n / kRows];
    // As bytes 0, 2, 1, 3: neighbours go to the halves of a pair.
    uint32_t y[2][2 * F::kParts];
    F::expand(__byte_perm(code.x, code.x, 0x3120), y[0]);
    F::expand(__byte_perm(code.y, code.y, 0x3120), y[1]);
#pragma unroll
    for (int part = 0; part < F::kParts; ++part)
      *reinterpret_cast<uint4*>(to + swizzled<D>(row, chunk + part * kChunks, n % 8) +
                                n * 2 * D) = {y[0][2 * part], y[0][2 * part + 1], y[1][2 * part],
                                              y[1][2 * part + 1]};
  }
}

// Of a power of two.
__device__ inline float inverse(unsigned power) { return __uint_as_float(0x7f000000 - power); }

// Output of the rows of a warp from `row` on, of what they have found.
template <int D, class F, int kTiles>
__device__ void write(const Attention& o, int row, const Sums<D, kTiles>& found) {
  const Item item(o);
  const int i = lane_index() / 4, j = lane_index() % 4;
#pragma unroll
  for (int r = 0; r < kTiles; ++r)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int here = row + 16 * r + 8 * c + i;
      if (here >= item.rows) continue;
      // 0 where nothing is seen; a NaN, once seen, stays.
      const float mass = found.mass[r][c];
      const float by = mass != 0 ? found.unit * F::kUnit / mass : 0;
      float* out = o.part_out + item.result(here) * D + 2 * j;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        *reinterpret_cast<float2*>(out + 8 * n) = {found.sum[r][n][2 * c] * by,
                                                   found.sum[r][n][2 * c + 1] * by};
      if (j == 0) item.finish(here, found.base[r][c], mass, 0);
    }
}

// The rows of an item from row0 on.
template <int D, class F, int kTiles>
__device__ void attend(const Attention& o, int row0, char* queries) {
  using L = PieceLayout<D, F>;
  using M = Memory<D, F>;
  using T = typename F::Operand;
  const Item item(o);
  const Pages& store = o.stores[item.number];
  const int warp = threadIdx.x / kWarp, lane = lane_index(), i = lane / 4, j = lane % 4;
  char* const mine = queries + M::kCodesAt + warp * L::kBytes;
  auto* const numbers = reinterpret_cast<float2*>(queries + M::kNumbersAt);
  const bool paired = Pieces<D, F>::paired(store), placed = store.position.data;
  const float factor = o.factor * F::kUnit;
  // What is seen, behind the query.
  auto seen_of = [&](int row) {
    return reinterpret_cast<int2*>(queries + row * M::kQueryPitch + 2 * D);
  };
  constexpr int kWarpRows = kTileRows * kTiles;
  const int left = min(item.rows - row0, kWarps * kWarpRows), row = warp * kWarpRows;
  Pieces<D, F> pieces(item, warp, kWarps);
  // Numbers of 16 bits alternate between two tiles, codes are brought to the first.
  auto buffer = [&](int n) { return queries + M::kTileAt + (L::kCoded ? 0 : n % 2 * M::kTile); };
  auto own = [&](int n) { return buffer(n) + warp * Operands<D>::kBytes; };
  pieces.copy(o, item.number, L::kCoded ? mine : own(0));
  // The last row stands for those that there are not.
  for (int n = warp; n < kWarps * kWarpRows; n += kWarps) {
    const int from = row0 + min(n, left - 1);
    prepare<D>(o, store.k.format, item.token(from), item.head_q(from), queries + n * M::kQueryPitch,
               L::kCoded ? Type::f16 : store.k.type);
    const int2 seen = seen_by(item, from);
    if (lane == 0) *seen_of(n) = seen;
  }
  int2 common = {INT_MIN, INT_MAX};
#pragma unroll
  for (int n = 0; n < kWarpRows / 8; ++n) {
    const int2 seen = seen_by(item, row0 + min(row + 8 * n + i, left - 1));
    common = {max(common.x, seen.x), min(common.y, seen.y)};
  }
  const Window window(item, common);
  Sums<D, kTiles> found(L::kCoded ? kLeastScale : 1);
  for (int step = 0; step < pieces.stretch; ++step) {
    wait_for_copies<0>();
    __syncwarp();
    // Of the tile before nothing is read any more; all of this one is there behind the next
    // barrier.
    char* const piece = own(step);
    const int mine_first = pieces.first + (warp * pieces.stretch + step) * kPiece;
    if constexpr (L::kCoded) {
      __syncthreads();
      if (mine_first < item.end) {
        unpack<D, F>(mine, L::kKPitch, piece);
        unpack<D, F>(mine + L::kVAt, L::kVPitch, piece + Operands<D>::kVAt);
        if (lane < kPiece) {
          const int slot = mine_first + lane;
          float2 both = scales<L>(mine, paired, lane);
          if (slot < item.begin || slot >= item.end) both = {0, 0};
          numbers[warp * kPiece + lane] = {both.x * factor, both.y};
          if (placed)
            reinterpret_cast<int*>(piece + Operands<D>::kPositionAt)[lane] =
                reinterpret_cast<const int*>(mine + L::kPositionAt)[lane];
        }
      } else if (lane < kPiece) {
        numbers[warp * kPiece + lane] = {0, 0};
      }
      __syncwarp();
    }
    if (mine_first < item.begin || mine_first + kPiece > item.end) {
      // What lies there may be no number.
#pragma unroll 1
      for (int n = 0; n < kPiece; ++n) {
        if (mine_first + n >= item.begin && mine_first + n < item.end) continue;
        for (int w = lane; w < D / 2; w += kWarp)
#pragma unroll
          for (int at : {0, Operands<D>::kVAt})
            *reinterpret_cast<uint32_t*>(piece + at + n * 2 * D + 4 * w) = 0;
        if (placed && lane == 0)
          reinterpret_cast<int*>(piece + Operands<D>::kPositionAt)[n] = INT_MAX;
      }
    }
    __syncthreads();
    pieces.copy(o, item.number, L::kCoded ? mine : own(step + 1));

    // Two pieces at a time.
    if (row >= left) continue;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const char* const two = buffer(step) + 2 * pair * Operands<D>::kBytes;
      float x[kTiles][4][4];
#pragma unroll
      for (int r = 0; r < kTiles; ++r)
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
          for (int m = 0; m < 4; ++m) x[r][t][m] = 0;
#pragma unroll
      for (int s = 0; s < D / 16; ++s) {
        uint32_t a[kTiles][4], b[2][4];
#pragma unroll
        for (int r = 0; r < kTiles; ++r)
          load_matrices<false>(a[r], queries + (row + 16 * r + lane % 16) * M::kQueryPitch +
                                         lane / 16 * 16 + 32 * s);
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          load_matrices<false>(b[p],
                               two + p * Operands<D>::kBytes +
                                   swizzled<D>(lane / 16 * 8 + lane % 8, lane / 8 % 2, 2 * s));
#pragma unroll
          for (int r = 0; r < kTiles; ++r) {
            multiply<T>(x[r][2 * p], a[r], b[p][0], b[p][1]);
            multiply<T>(x[r][2 * p + 1], a[r], b[p][2], b[p][3]);
          }
        }
      }
      // Of this lane's two slots of eight: factors of scores, and scales of values.
      auto known = [&](int t) {
        return *reinterpret_cast<const float4*>(numbers + (2 * pair + t / 2) * kPiece + t % 2 * 8 +
                                                2 * j);
      };
      float largest = 0;  // of the scales
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        float scale[2] = {factor, factor};
        if constexpr (L::kCoded) {
          const float4 both = known(t);
          scale[0] = both.x, scale[1] = both.z;
          largest = fmaxf(largest, fmaxf(both.y, both.w));
        }
#pragma unroll
        for (int r = 0; r < kTiles; ++r)
#pragma unroll
          for (int m = 0; m < 4; ++m) x[r][t][m] *= scale[m % 2];
      }
      bool stays = !L::kCoded || largest <= found.unit;
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const int first = pieces.first + ((2 * pair + p) * pieces.stretch + step) * kPiece;
        if (window.whole(first)) continue;
        const auto* position =
            reinterpret_cast<const int*>(two + p * Operands<D>::kBytes + Operands<D>::kPositionAt);
#pragma unroll
        for (int c = 0; c < 2 * kTiles; ++c) {
          const int2 seen = *seen_of(row + 8 * c + i);
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const int at = n / 2 * 8 + 2 * j + n % 2, key = placed ? position[at] : first + at;
            if (key < seen.x || key > seen.y)
              x[c / 2][2 * p + n / 2][c % 2 * 2 + n % 2] = -INFINITY;
          }
        }
      }
      float peak[kTiles][2];
#pragma unroll
      for (int r = 0; r < kTiles; ++r)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          peak[r][c] = found.base[r][c];
#pragma unroll
          for (int t = 0; t < 4; ++t)
            peak[r][c] = fmaxf(peak[r][c], fmaxf(x[r][t][2 * c], x[r][t][2 * c + 1]));
          stays &= peak[r][c] - found.base[r][c] <= kMargin;
        }
      if (!__all_sync(kAll, stays)) {
        float rescale = 1;
        if constexpr (L::kCoded) {
          largest = greatest(fmaxf(largest, found.unit));
          const unsigned next = (__float_as_uint(largest) + 0x7fffff) & 0x7f800000;
          rescale = found.unit * inverse(next), found.unit = __uint_as_float(next);
        }
#pragma unroll
        for (int r = 0; r < kTiles; ++r) {
          float shrink[2];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float base = fmaxf(peak[r][c], across(peak[r][c], 1));
            base = fmaxf(base, across(base, 2));
            shrink[c] = exp2_approximately(found.base[r][c] - base);
            found.base[r][c] = base, found.mass[r][c] *= shrink[c];
            shrink[c] *= rescale;
          }
#pragma unroll
          for (int n = 0; n < D / 8; ++n)
#pragma unroll
            for (int m = 0; m < 4; ++m) found.sum[r][n][m] *= shrink[m / 2];
        }
      }
      __syncwarp();  // scales are read again, for want of registers
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        float of_values[2] = {1, 1};
        if constexpr (L::kCoded) {
          const float4 both = known(t);
          const float over = inverse(__float_as_uint(found.unit));
          of_values[0] = both.y * over, of_values[1] = both.w * over;
        }
#pragma unroll
        for (int r = 0; r < kTiles; ++r)
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            float& p = x[r][t][m];
            p = exp2_approximately(p - found.base[r][m / 2]);
            found.mass[r][m / 2] += p;
            if constexpr (L::kCoded) p *= of_values[m % 2];
          }
      }
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        uint32_t a[kTiles][4];
#pragma unroll
        for (int r = 0; r < kTiles; ++r)
#pragma unroll
          for (int n = 0; n < 4; ++n)
            a[r][n] = packed<T>(x[r][2 * p + n / 2][n % 2 * 2], x[r][2 * p + n / 2][n % 2 * 2 + 1]);
        const char* const values = two + p * Operands<D>::kBytes + Operands<D>::kVAt;
#pragma unroll
        for (int s = 0; s < D / 16; ++s) {
          uint32_t b[4];
          load_matrices<true>(b, values + swizzled<D>(lane % 16, lane / 16, 2 * s));
#pragma unroll
          for (int r = 0; r < kTiles; ++r) {
            multiply<T>(found.sum[r][2 * s], a[r], b[0], b[1]);
            multiply<T>(found.sum[r][2 * s + 1], a[r], b[2], b[3]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kTiles; ++r)
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2)
        found.mass[r][c] += across(found.mass[r][c], distance);
  wait_for_copies<0>();
  __syncthreads();
  write<D, F>(o, row0 + row, found);
}

template <int D, class F>
__global__ void __launch_bounds__(kThreads, 2) many_kernel(__grid_constant__ const Attention o) {
  KVTOOLS_SHARED(char, shared);
  if (Item(o).rows <= kFewRows || !is_mine(o)) return;
  const int rows = Item(o).rows;
  for (int row0 = 0; row0 < rows; row0 += kBlockRows)
    if (rows - row0 > kBlockRows / 2)
      attend<D, F, 2>(o, row0, &shared);
    else
      attend<D, F, 1>(o, row0, &shared);
}

template <int D>
void launch_many(const Attention& o, const Pages& as, void* stream) {
  with_format(as, [&](auto format) {
    using F = decltype(format);
    launch("attend many", many_kernel<D, F>, blocks_of(o), kThreads, Memory<D, F>::kBytes, stream,
           o);
  });
}

}  // namespace

void attend_many(const Attention& o, const Pages& as, void* stream) {
  return o.d == 64 ? launch_many<64>(o, as, stream) : launch_many<128>(o, as, stream);
}

}  // namespace kvtools::cuda

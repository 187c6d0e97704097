// Attention over a forest. A block takes a work item and a KV head; a row is a query head of a
// token, so that grouped heads share every load of keys. A warp has 16 rows. Where rows are few,
// warps share the slots of each tile, and merge what they found. What items leave of a token is
// merged by a second kernel; a third tells what own slots received.
#include <cmath>

#include "head.h"
#include "kernels.h"
#include "products.h"

namespace kvtools::cuda {
namespace {

constexpr float kLn2 = 0.6931471805599453f;

// On a multiprocessor at once, so that the compiler does not save more registers than that takes.
template <int D, bool Exact>
constexpr int kBlocks = D <= 64 && !Exact ? 4
                        : D <= 128        ? 3
                                          : 2;

using Shared = char;  // the first of many

// A head of a token to `queries`, rotated where keys are.
template <int D>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(__grid_constant__ const Attention o, Type type, float norm) {
  constexpr int E = D / kWarp;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= o.tokens * o.heads_q) return;
  const int d = static_cast<int>(o.pages.d);
  float x[E];
  load_head(x, o.q.at(row / o.heads_q, row % o.heads_q), o.q.type, size_of(o.q.type), d);
  if (o.pages.k.format != Format::none) rotate(x, d, norm);
  store_head(x, o.queries + row * d * size_of(type), type, d);
}

// The last position that a token sees.
__device__ int last_seen(const Attention& o, int64_t token) {
  const int position = o.position[token];
  return o.before && o.before[token] <= position ? max(o.before[token], INT_MIN + 1) - 1 : position;
}

// What rows have found: with lane 4 i + j, of rows i and i + 8.
template <int D>
struct Found {
  float sum[D / 8][4];  // weighted values in units of `unit`; see add_values
  float peak[2];        // greatest score
  float mass[2];        // sum of weights; of this lane's columns until `finish`
  int seen[2];          // slots, likewise
  float unit;           // a power of two that no scale of values exceeds so far, if they have one

  static constexpr int kNumbers = D / 2 + 6;

  __device__ void clear(bool scaled) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int m = 0; m < 4; ++m) sum[n][m] = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) peak[r] = -INFINITY, mass[r] = 0, seen[r] = 0;
    unit = scaled ? kLeastScale : 1;
  }

  __device__ void multiply(const float (&by)[2]) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int m = 0; m < 4; ++m) sum[n][m] *= by[m / 2];
  }

  __device__ void finish() {
    const float by[2] = {unit, unit};
    multiply(by);
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) {
        mass[r] += __shfl_xor_sync(kAll, mass[r], distance);
        seen[r] += __shfl_xor_sync(kAll, seen[r], distance);
      }
  }

  // For the same lane of another warp, in numbers a warp apart.
  __device__ void give(float* to) const {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) to[i * kWarp] = sum[i / 4][i % 4];
    to += D / 2 * kWarp;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      to[r * kWarp] = peak[r], to[(2 + r) * kWarp] = mass[r];
      to[(4 + r) * kWarp] = __int_as_float(seen[r]);
    }
  }

  __device__ void merge(const float* from) {
    const float* numbers = from + D / 2 * kWarp;
    float here[2], there[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float other = numbers[r * kWarp], both = fmaxf(peak[r], other);
      const float safe = both == -INFINITY ? 0 : both;
      here[r] = exp2f(peak[r] - safe), there[r] = exp2f(other - safe);
      peak[r] = both;
      mass[r] = fmaf(mass[r], here[r], numbers[(2 + r) * kWarp] * there[r]);
      seen[r] += __float_as_int(numbers[(4 + r) * kWarp]);
    }
#pragma unroll
    for (int i = 0; i < D / 2; ++i) {
      float& x = sum[i / 4][i % 4];
      x = fmaf(x, here[i % 4 / 2], from[i * kWarp] * there[i % 4 / 2]);
    }
  }
};

// What rows lane / 4 and lane / 4 + 8 of a warp see: positions above position - sliding up to last.
struct Bounds {
  int position[2], last[2];
};

// Scores in base 2 of 16 slots from `first` on of a tile: of what multiply_keys returns.
template <int D, bool Exact>
__device__ void score(const Attention& o, const Stage& tile, int first,
                      const Queries<D, Exact>& queries, float (&x)[2][4]) {
  queries.multiply_keys(o, tile.k + first * o.layout.k.pitch, x);
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int m = 0; m < 4; ++m)
      x[t][m] *= tile.factor[first + 8 * t + lane_index() % 4 * 2 + m % 2];
  if (o.cap > 0)
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i / 4][i % 4] = tanhf(x[i / 4][i % 4]) * o.cap;
}

// Add 16 slots from `first` on of a tile to what rows have found.
template <int D, bool Exact>
__device__ void attend(const Attention& o, const Stage& tile, int first,
                       const Queries<D, Exact>& queries, const Bounds& rows, Found<D>& found) {
  const int column = first + lane_index() % 4 * 2;
  bool visible[2][4], any = false;
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int key = tile.key[column + 8 * t + m % 2];
      visible[t][m] = key <= rows.last[m / 2] && rows.position[m / 2] - key < o.sliding;
      any |= visible[t][m];
      found.seen[m / 2] += visible[t][m];
    }
  if (!__any_sync(kAll, any)) return;

  float x[2][4];
  score<D, Exact>(o, tile, first, queries, x);
  float peak[2] = {found.peak[0], found.peak[1]}, shrink[2];
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      x[t][m] = visible[t][m] ? x[t][m] : -INFINITY;
      peak[m / 2] = fmaxf(peak[m / 2], x[t][m]);
    }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    peak[r] = fmaxf(peak[r], __shfl_xor_sync(kAll, peak[r], 1));
    peak[r] = fmaxf(peak[r], __shfl_xor_sync(kAll, peak[r], 2));
    const float safe = peak[r] == -INFINITY ? 0 : peak[r];
    shrink[r] = exp2f(found.peak[r] - safe);
    found.peak[r] = peak[r];
    found.mass[r] *= shrink[r];
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float& p = x[t][2 * r + n];
        p = exp2f(p - safe);
        found.mass[r] += p;
      }
  }
  if (!Exact && o.pages.v.format != Format::none) {
    float scale[2][2], greatest = found.unit;
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        scale[t][n] = tile.v_scale[column + 8 * t + n];
        greatest = fmaxf(greatest, scale[t][n]);
      }
    greatest = fmaxf(greatest, __shfl_xor_sync(kAll, greatest, 1));
    greatest = fmaxf(greatest, __shfl_xor_sync(kAll, greatest, 2));
    const unsigned unit = (__float_as_uint(greatest) + 0x7fffff) & 0x7f800000;
    const float inverse = __uint_as_float(0x7f000000 - unit);
    shrink[0] *= found.unit * inverse, shrink[1] *= found.unit * inverse;
    found.unit = __uint_as_float(unit);
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int m = 0; m < 4; ++m) x[t][m] *= scale[t][m % 2] * inverse;
  }
  if (__any_sync(kAll, shrink[0] != 1 || shrink[1] != 1)) found.multiply(shrink);
  add_values<D, Exact>(o, tile.v + first * o.layout.v.pitch, x, found.sum);
}

// Output, log-sum-exp and number of visible slots of each token of a work item, for a KV head.
template <int D, bool Exact>
__global__ void __launch_bounds__(kThreads, kBlocks<D, Exact>)
    attend_kernel(__grid_constant__ const Attention o) {
  KVTOOLS_SHARED(Shared, shared);
  const int32_t* item = o.item + 6 * int64_t(blockIdx.x);
  const int node = item[0], tokens_begin = item[1], part = item[5], head = blockIdx.y;
  const int rows = (item[2] - tokens_begin) * o.group, d = static_cast<int>(o.pages.d);
  const int begin = item[3], end = min(item[4], o.length[node]);
  const int warp = threadIdx.x / kWarp, lane = lane_index();
  char* const memory = &shared;
  char* const stages = memory + Queries<D, Exact>::kShared;
  for (int row0 = 0; row0 < rows; row0 += kWarps * kStep) {
    // Warps stand side by side over rows, and behind one another over slots.
    const int left = rows - row0, side = left <= kStep ? 1 : left <= 2 * kStep ? 2 : 4;
    const int deep = kWarps / side, depth = warp / side, place = warp % side;
    const int row = row0 + place * kStep + lane / 4;
    Bounds bounds;
    const char* query[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int here = min(row + 8 * i, rows - 1), token = o.token[tokens_begin + here / o.group];
      query[i] = o.q.at(token, head * o.group + here % o.group);
      bounds.position[i] = o.position[token];
      bounds.last[i] = last_seen(o, token);
    }
    Queries<D, Exact> queries;
    queries.load(o, query[0], query[1], memory);
    Found<D> found;
    found.clear(!Exact && o.pages.v.format != Format::none);
    Tiles<D, Exact, true> tiles(o, stages, node, head, begin, end);
    tiles.start();
    for (int i = 0; i < tiles.count(); ++i) {
      const Stage tile = tiles.wait(i);
      for (int first = depth * kStep; first < o.layout.slots; first += deep * kStep)
        attend<D, Exact>(o, tile, first, queries, bounds, found);
      tiles.release(i);
    }
    found.finish();
    __syncthreads();
    auto* given = reinterpret_cast<float*>(stages) + lane;
    for (int half = deep / 2; half > 0; half /= 2) {
      auto at = [&](int giver) {
        return given + (giver * side + place) * Found<D>::kNumbers * kWarp;
      };
      if (depth >= half && depth < 2 * half) found.give(at(depth - half));
      __syncthreads();
      if (depth < half) found.merge(at(depth));
      __syncthreads();
    }
    if (depth > 0) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int here = row + 8 * i, g = here % o.group;
      if (here >= rows) continue;
      const int64_t result = part + here / o.group;
      const int64_t at = result * o.heads_q + head * o.group + g;
      // 0 where nothing is seen; a NaN, once seen, stays.
      const float mass = found.mass[i], inverse = mass != 0 ? 1 / mass : 0;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int e = element_of<D, Exact>(o.pages.v, d, n, lane % 4 * 2 + m);
          if (e >= 0) o.part_out[at * d + e] = found.sum[n][2 * i + m] * inverse;
        }
      if (lane % 4) continue;
      o.part_lse[at] = mass != 0 ? (found.peak[i] + log2f(mass)) * kLn2 : -INFINITY;
      if (g == 0) o.part_seen[result * o.pages.heads + head] = found.seen[i];
    }
  }
}

// A query head of a token: its partial results, what is kept elsewhere and the sink in one.
template <int D>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(__grid_constant__ const Attention o, float norm) {
  constexpr int E = D / kWarp;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= o.tokens * o.heads_q) return;
  const int lane = lane_index(), d = static_cast<int>(o.pages.d);
  const int64_t token = row / o.heads_q, head = row % o.heads_q;
  const int begin = o.part_indptr[token], end = o.part_indptr[token + 1];
  auto result = [&](int i) { return o.part[i] * o.heads_q + head; };
  float peak = -INFINITY;
  int seen = 0;
  for (int i = begin + lane; i < end; i += kWarp) {
    peak = fmaxf(peak, o.part_lse[result(i)]);
    if (o.mean) seen += o.part_seen[o.part[i] * o.pages.heads + head / o.group];
  }
  peak = greatest(peak);
  const float safe = peak == -INFINITY ? 0 : peak;
  float mass = 0, x[E] = {};
  for (int i = begin; i < end; ++i) {
    const float weight = expf(o.part_lse[result(i)] - safe);
    mass += weight;
#pragma unroll
    for (int j = 0; j < E; ++j) {
      const int e = lane * E + j;
      if (e < d) x[j] = fmaf(weight, o.part_out[result(i) * d + e], x[j]);
    }
  }
  const float inverse = mass != 0 ? 1 / mass : 0, of_pages = mass != 0 ? peak + logf(mass) : peak;
#pragma unroll
  for (int j = 0; j < E; ++j) x[j] *= inverse;
  if (o.pages.v.format != Format::none) rotate_back(x, d, norm);

  float lse = of_pages;
  auto join = [&](float other, auto value) {
    if (lse == -INFINITY && other == -INFINITY) return;
    const float both = fmaxf(lse, other);
    const float here = expf(lse - both), there = expf(other - both), total = here + there;
#pragma unroll
    for (int j = 0; j < E; ++j)
      x[j] = fmaf(x[j], here / total, there != 0 ? value(lane * E + j) * (there / total) : 0);
    lse = both + logf(total);
  };
  if (o.state_out.data) {
    const char* state = o.state_out.at(token, head);
    join(*reinterpret_cast<const float*>(o.state_lse.at(token, head)), [&](int e) {
      return e < d ? number_at(state + e * size_of(o.state_out.type), o.state_out.type) : 0;
    });
  }
  if (o.sink.data) join(number_at(o.sink.at(head), o.sink.type), [](int) { return 0.0f; });
  store_head(x, o.out.at(token, head), o.out.type, d);
  if (o.mean) seen = sum(seen);
  if (lane) return;
  *reinterpret_cast<float*>(o.lse.at(token, head)) = lse;
  // What a slot of these pages gets on average: their share of the mass over their number.
  if (o.mean) o.mean[row] = expf(of_pages - lse) / seen;
}

// What slots of a row's own node received from all of the node's tokens, for a KV head.
template <int D, bool Exact>
__global__ void __launch_bounds__(kThreads, kBlocks<D, Exact>)
    track_kernel(__grid_constant__ const Attention o) {
  KVTOOLS_SHARED(Shared, shared);
  const int32_t* item = o.item + 6 * int64_t(blockIdx.x);
  const int node = item[0], head = blockIdx.y;
  const int tokens_begin = o.token_indptr[node], tokens_end = o.token_indptr[node + 1];
  // Items with the same slots and other tokens leave it to the first of them.
  if (!o.own[node] || item[1] != tokens_begin) return;
  const int begin = item[3], end = min(item[4], o.length[node]);
  const int lane = lane_index(), column = lane % 4 * 2;
  char* const memory = &shared;
  Tiles<D, Exact, false> tiles(o, memory + Queries<D, Exact>::kShared, node, head, begin, end);
  tiles.start();
  for (int i = 0; i < tiles.count(); ++i) {
    const Stage tile = tiles.wait(i);
    for (int first = threadIdx.x / kWarp * kStep; first < o.layout.slots; first += kWarps * kStep) {
      const int slot = begin + i * o.layout.slots + first;
      if (slot >= end) break;
      // Of columns 2 j, 2 j + 1 and the two that are eight on.
      float received[4] = {};
      for (int c = tokens_begin; c < tokens_end; ++c) {
        const int64_t token = o.token[c];
        const int position = o.position[token], last = last_seen(o, token);
        float p_sum[4] = {}, mean_sum = 0;
        unsigned above = 0;  // columns that some query head does not find low
        for (int g = lane / 4; g - lane / 4 < o.group; g += kStep) {
          const int64_t heads[2] = {head * o.group + min(g, o.group - 1),
                                    head * o.group + min(g + 8, o.group - 1)};
          Queries<D, Exact> queries;
          queries.load(o, o.q.at(token, heads[0]), o.q.at(token, heads[1]), memory);
          float x[2][4];
          score<D, Exact>(o, tile, first, queries, x);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            if (g + 8 * r >= o.group) continue;
            const float lse = *reinterpret_cast<const float*>(o.lse.at(token, heads[r]));
            const float mean = o.mean[token * o.heads_q + heads[r]];
            mean_sum += mean;
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              const int key = tile.key[first + n / 2 * 8 + column + n % 2];
              const bool visible = key <= last && position - key < o.sliding;
              const float p = visible ? exp2f(x[n / 2][2 * r + n % 2] - lse * kLog2e) : 0;
              p_sum[n] += p;
              above |= (p < mean ? 0u : 1u) << n;
            }
          }
        }
#pragma unroll
        for (int distance = 4; distance < kWarp; distance *= 2) {
#pragma unroll
          for (int n = 0; n < 4; ++n) p_sum[n] += __shfl_xor_sync(kAll, p_sum[n], distance);
          mean_sum += __shfl_xor_sync(kAll, mean_sum, distance);
          above |= __shfl_xor_sync(kAll, above, distance);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int at = n / 2 * 8 + column + n % 2;
          received[n] += p_sum[n] / o.group;
          if (!o.pages.history.data || lane >= 4 || slot + at >= end) continue;
          const bool low = o.whole_group ? !(above >> n & 1) : p_sum[n] < mean_sum;
          const int bit = static_cast<int>(floor_mod(position, o.window));
          const Place place = find(o, node, slot + at);
          unsigned& word = reinterpret_cast<unsigned*>(
              o.pages.history.at(place.page, head, place.offset))[bit / 32];
          const unsigned noted = low && tile.key[first + at] <= last;
          word = (word & ~(1u << bit % 32)) | noted << bit % 32;
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int at = n / 2 * 8 + column + n % 2;
        if (!o.pages.importance.data || lane >= 4 || slot + at >= end) continue;
        const Place place = find(o, node, slot + at);
        *reinterpret_cast<float*>(o.pages.importance.at(place.page, head, place.offset)) +=
            received[n];
      }
    }
    tiles.release(i);
  }
}

bool tracks(const TreeAttention& p) { return p.pages.importance.data || p.pages.history.data; }

// Whether products are taken in fp32.
bool exact_products(const TreeAttention& p) {
  auto exact = [&](const Content& x) {
    if (x.format == Format::none) return x.type != p.q.type;
    // Planes of fewer than four bits must come in words.
    return (parts_log2(x.format) == 2 || high_bits(x.format) > 0) && p.pages.d % 32 != 0;
  };
  return p.q.type == Type::f32 || exact(p.pages.k) || exact(p.pages.v);
}

// The type of queries as operands of products.
Type query_type(const TreeAttention& p) {
  if (exact_products(p)) return Type::f32;
  return p.pages.k.format == Format::none ? p.q.type : Type::f16;
}

// Whether queries cannot be read where they are.
bool prepares(const TreeAttention& p) {
  const int64_t words = reinterpret_cast<int64_t>(p.q.data) / 2 | p.q.stride[0] | p.q.stride[1];
  return p.pages.k.format != Format::none || exact_products(p) || words % 2;
}

// Divides scratch memory; returns its size.
int64_t place_scratch(Attention& o) {
  char* const begin = o.scratch;
  char* at = begin;
  auto take = [&](auto*& p, int64_t count, int64_t size) {
    p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(at);
    at += (count * size + 15) / 16 * 16;
  };
  const int64_t d = o.pages.d;
  take(o.part_out, o.parts * o.heads_q * d, 4);
  take(o.part_lse, o.parts * o.heads_q, 4);
  take(o.part_seen, o.parts * o.pages.heads, 4);
  if (tracks(o)) take(o.mean, o.tokens * o.heads_q, 4);
  if (prepares(o)) take(o.queries, o.tokens * o.heads_q * d, size_of(query_type(o)));
  return at - begin;
}

int bits_of(const Content& x) {
  return x.format == Format::none ? 8 * static_cast<int>(size_of(x.type))
                                  : kBits[static_cast<int>(x.format)];
}

RowLayout row_layout(const Content& x, int d, int padded_d, bool exact) {
  if (exact) return {4 * d, 4 * d, 4 * d + 16, 4, 5};
  const Paged& codes = x.codes;
  const int64_t together =
      reinterpret_cast<int64_t>(codes.data) | codes.page | codes.head | codes.slot;
  RowLayout y;
  y.unit = together % 16 == 0 ? 16 : together % 8 == 0 ? 8 : together % 4 == 0 ? 4 : 1;
  y.bytes = d * bits_of(x) / 8;
  y.padded = (padded_d * bits_of(x) / 8 + 15) / 16 * 16;
  y.pitch = (y.padded / 16 | 1) * 16;  // rows begin in other banks
  y.lanes_log2 = 0;
  while (y.lanes_log2 < 5 && y.unit << y.lanes_log2 < y.padded) ++y.lanes_log2;
  return y;
}

// Tiles of as many slots, and as many stages, as leave room for other blocks.
Layout layout_of(const Attention& o, int padded_d, bool exact) {
  const int d = static_cast<int>(o.pages.d);
  Layout y{row_layout(o.pages.k, d, padded_d, exact), row_layout(o.pages.v, d, padded_d, exact),
           kWarps * kStep, 2};
  while (y.slots > kStep && 2 * y.stage() > 72 << 10) y.slots /= 2;
  if (3 * y.stage() <= 48 << 10) y.stages = 3;
  return y;
}

template <int D, bool Exact>
void attend_and_track(Attention& o, float norm, void* stream) {
  o.layout = layout_of(o, D, Exact);
  const size_t queries = Queries<D, Exact>::kShared, stages = o.layout.stages * o.layout.stage(),
               merged = 2 * Found<D>::kNumbers * kWarp * sizeof(float);
  const dim3 items(static_cast<unsigned>(o.items), static_cast<unsigned>(o.pages.heads));
  const dim3 rows = blocks_of(o.tokens * o.heads_q, kWarps);
  if (o.items)
    launch("attend", attend_kernel<D, Exact>, items, kThreads, queries + std::max(stages, merged),
           stream, o);
  launch("merge", merge_kernel<D>, rows, kThreads, 0, stream, o, norm);
  if (o.items && o.mean) {
    o.layout.v = {};
    launch("track", track_kernel<D, Exact>, items, kThreads,
           queries + o.layout.stages * o.layout.stage(), stream, o);
  }
}

template <int D>
void run(Attention& o, void* stream) {
  const int64_t d = o.pages.d;
  const float norm = norm_of(d);
  const bool exact = exact_products(o);
  if (o.queries) {
    const Type type = query_type(o);
    launch("prepare", prepare_kernel<D>, blocks_of(o.tokens * o.heads_q, kWarps), kThreads, 0,
           stream, o, type, norm);
    o.q = {o.queries, type, {o.heads_q * d, d, 1}};
  }
  if (exact)
    attend_and_track<D, true>(o, norm, stream);
  else
    attend_and_track<D, false>(o, norm, stream);
}

}  // namespace

int64_t tree_attention_scratch(const TreeAttention& p) {
  Attention o{p};
  return place_scratch(o);
}

void tree_attention(const TreeAttention& p, void* stream) {
  Attention o{p};
  place_scratch(o);
  o.group = static_cast<int>(p.heads_q / p.pages.heads);
  o.factor = p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2e;
  o.cap = p.softcap * kLog2e;
  if (!p.sliding) o.sliding = INT_MAX;
  if (p.pages.d <= 64)
    run<64>(o, stream);
  else if (p.pages.d <= 128)
    run<128>(o, stream);
  else
    run<256>(o, stream);
}

}  // namespace kvtools::cuda

// Attention over a forest. A block takes a work item and a KV head; a row is a query head of a
// token, so that grouped heads share every load of keys. A warp has 16 rows. Where rows are few,
// warps share the slots of each tile, and merge what they found. What items leave of a token is
// merged by a second kernel; a third tells what own slots received.
#include <cmath>

#include "kernels.h"
#include "pieces.h"
#include "products.h"

namespace kvtools::cuda {
namespace {

// On a multiprocessor at once, so that the compiler does not save more registers than that takes.
template <int D, bool Exact>
constexpr int kBlocks = D <= 64 && !Exact ? 4
                        : D <= 128        ? 3
                                          : 2;

// Whether a block's queries are prepared in shared memory, in rows that begin in other banks.
template <int D, bool Exact>
constexpr bool kStaged = !Exact && Queries<D, Exact>::kHeld;
template <int D>
constexpr int kStagedPitch = 2 * D + 16;

using Shared = char;  // the first of many

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

// What rows lane / 4 and lane / 4 + 8 of a warp see: positions from `first` up to `last`.
struct Bounds {
  int first[2], last[2];
};

// Scores in base 2 of 16 slots from `first` on of a tile: of what multiply_keys returns.
template <int D, bool Exact>
__device__ void score(const Attention& o, const Store& store, const Stage& tile, int first,
                      const Queries<D, Exact>& queries, float (&x)[2][4]) {
  queries.multiply_keys(o, store, tile.k + first * store.layout.k.pitch, x);
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
__device__ void attend(const Attention& o, const Store& store, const Stage& tile, int first,
                       const Queries<D, Exact>& queries, const Bounds& rows, Found<D>& found) {
  const int column = first + lane_index() % 4 * 2;
  bool visible[2][4], any = false;
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int key = tile.key[column + 8 * t + m % 2];
      visible[t][m] = key >= rows.first[m / 2] && key <= rows.last[m / 2];
      any |= visible[t][m];
      found.seen[m / 2] += visible[t][m];
    }
  if (!__any_sync(kAll, any)) return;

  float x[2][4];
  score<D, Exact>(o, store, tile, first, queries, x);
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
  if (!Exact && store.pages.v.format != Format::none) {
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
  add_values<D, Exact>(o, store, tile.v + first * store.layout.v.pitch, x, found.sum);
}

// Output, log-sum-exp and number of visible slots of each token of a work item, for a KV head.
template <int D, bool Exact>
__global__ void __launch_bounds__(kThreads, kBlocks<D, Exact>)
    attend_kernel(__grid_constant__ const Attention o) {
  KVTOOLS_SHARED(Shared, shared);
  if (!is_mine(o)) return;
  const Item item(o);
  const int rows = item.rows, d = o.d, number = item.number;
  const int warp = threadIdx.x / kWarp, lane = lane_index();
  const Store store(o, number);
  const Format k_format = store.pages.k.format, v_format = store.pages.v.format;
  const bool prepared = o.prepared >> number & 1;
  char* const memory = &shared;
  char* const stages = memory + Queries<D, Exact>::kShared;
  char* const last_stage = stages + (store.layout.stages - 1) * store.layout.stage();
  for (int row0 = 0; row0 < rows; row0 += kWarps * kStep) {
    // Warps stand side by side over rows, and behind one another over slots.
    const int left = rows - row0, side = left <= kStep ? 1 : left <= 2 * kStep ? 2 : 4;
    const int deep = kWarps / side, depth = warp / side, place = warp % side;
    const int row = row0 + place * kStep + lane / 4;
    Tiles<D, Exact, true> tiles(o, store, stages, item.node, item.head, item.begin, item.end);
    tiles.start();
    // The last stage is free until the first tile is there. What does not fit is written where
    // the result will be.
    auto prepared_at = [&](int row) {
      if constexpr (kStaged<D, Exact>) return last_stage + (row - row0) * kStagedPitch<D>;
      return reinterpret_cast<char*>(o.part_out + item.result(row) * d);
    };
    if (prepared) {
      for (int i = row0 + warp; i < min(row0 + kWarps * kStep, rows); i += kWarps)
        prepare<D>(o, k_format, item.token(i), item.head_q(i), prepared_at(i),
                   operand_type(o, k_format, Exact));
      __syncthreads();
    }
    Bounds bounds;
    const char* query[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int here = min(row + 8 * i, rows - 1), token = item.token(here);
      query[i] = prepared ? prepared_at(here) : o.q.at(token, item.head_q(here));
      const Span span(o, number, token);
      bounds.first[i] = span.from(o, o.position[token]), bounds.last[i] = span.last;
    }
    Queries<D, Exact> queries;
    queries.load(o, store, query[0], query[1], memory);
    Found<D> found;
    found.clear(!Exact && v_format != Format::none);
    for (int i = 0; i < tiles.count(); ++i) {
      const Stage tile = tiles.wait(i);
      for (int first = depth * kStep; first < store.layout.slots; first += deep * kStep)
        attend<D, Exact>(o, store, tile, first, queries, bounds, found);
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
      const int here = row + 8 * i;
      if (here >= rows) continue;
      const int64_t at = item.result(here);
      // 0 where nothing is seen; a NaN, once seen, stays.
      const float mass = found.mass[i], inverse = mass != 0 ? 1 / mass : 0;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int e = element_of<D, Exact>(store.pages.v, d, n, lane % 4 * 2 + m);
          if (e >= 0) o.part_out[at * d + e] = found.sum[n][2 * i + m] * inverse;
        }
      if (lane % 4 == 0) item.finish(here, found.peak[i], mass, found.seen[i]);
    }
  }
}

// A query head of a token: its partial results, what is kept elsewhere and the sink in one. Where
// `queries` are wanted, it is prepared for keys of the first store.
template <int D>
__global__ void __launch_bounds__(kThreads) merge_kernel(__grid_constant__ const Attention o) {
  constexpr int E = D / kWarp;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= o.tokens * o.heads_q) return;
  const int lane = lane_index(), d = o.d;
  const int64_t token = row / o.heads_q;
  const int head = static_cast<int>(row % o.heads_q), kv_head = head / o.group;
  if (o.queries)
    prepare<D>(o, o.stores[0].k.format, token, head, o.queries + row * d * size_of(o.query_type),
               o.query_type);
  const int begin = o.part_indptr[token], end = o.part_indptr[token + 1];
  auto result = [&](int i) { return o.part[i] * o.heads_q + head; };
  float peak = -INFINITY;
  int seen = 0;
  for (int i = begin + lane; i < end; i += kWarp) {
    peak = fmaxf(peak, o.part_lse[result(i)]);
    if (o.mean && o.part_store[o.part[i]] == 0)
      seen += o.part_seen[o.part[i] * o.stores[0].heads + kv_head];
  }
  peak = greatest(peak);
  const float safe = peak == -INFINITY ? 0 : peak;
  float mass = 0, first_mass = 0, x[E] = {}, rotated[E] = {};
  for (int i = begin; i < end; ++i) {
    const int store = o.part_store[o.part[i]];
    const float weight = expf(o.part_lse[result(i)] - safe);
    mass += weight;
    if (store == 0) first_mass += weight;
    auto add = [&](float (&to)[E]) {
#pragma unroll
      for (int j = 0; j < E; ++j) {
        const int e = lane * E + j;
        if (e < d) to[j] = fmaf(weight, o.part_out[result(i) * d + e], to[j]);
      }
    };
    if (o.rotated >> store & 1)
      add(rotated);
    else
      add(x);
  }
  const float inverse = mass != 0 ? 1 / mass : 0;
  auto log_sum = [&](float of) { return of != 0 ? peak + logf(of) : -INFINITY; };
#pragma unroll
  for (int j = 0; j < E; ++j) x[j] *= inverse, rotated[j] *= inverse;
  if (o.rotated) {
    rotate_back(rotated, d, o.norm);
#pragma unroll
    for (int j = 0; j < E; ++j) x[j] = x[j] != 0 ? x[j] + rotated[j] : rotated[j];
  }

  float lse = log_sum(mass);
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
  // What a slot of the first store gets on average: their share of the mass over their number.
  if (o.mean) o.mean[row] = expf(log_sum(first_mass) - lse) / seen;
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
  if (!o.own[node] || o.store[node] || item[1] != tokens_begin) return;
  const Store store(o, 0);
  const Paged &importance = store.pages.importance, &history = store.pages.history;
  const int begin = item[3], end = min(item[4], o.length[node]);
  const int lane = lane_index(), column = lane % 4 * 2;
  char* const memory = &shared;
  Tiles<D, Exact, false> tiles(o, store, memory + Queries<D, Exact>::kShared, node, head, begin,
                               end);
  tiles.start();
  for (int i = 0; i < tiles.count(); ++i) {
    const Stage tile = tiles.wait(i);
    for (int first = threadIdx.x / kWarp * kStep; first < store.layout.slots;
         first += kWarps * kStep) {
      const int slot = begin + i * store.layout.slots + first;
      if (slot >= end) break;
      // Of columns 2 j, 2 j + 1 and the two that are eight on.
      float received[4] = {};
      for (int c = tokens_begin; c < tokens_end; ++c) {
        const int64_t token = o.token[c];
        const Span span(o, 0, token);
        const int position = o.position[token], from = span.from(o, position);
        float p_sum[4] = {}, mean_sum = 0;
        unsigned above = 0;  // columns that some query head does not find low
        for (int g = lane / 4; g - lane / 4 < o.group; g += kStep) {
          const int64_t heads[2] = {head * o.group + min(g, o.group - 1),
                                    head * o.group + min(g + 8, o.group - 1)};
          auto query = [&](int64_t head) {
            return o.queries ? o.queries + (token * o.heads_q + head) * o.d * size_of(o.query_type)
                             : o.q.at(token, head);
          };
          Queries<D, Exact> queries;
          queries.load(o, store, query(heads[0]), query(heads[1]), memory);
          float x[2][4];
          score<D, Exact>(o, store, tile, first, queries, x);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            if (g + 8 * r >= o.group) continue;
            const float lse = *reinterpret_cast<const float*>(o.lse.at(token, heads[r]));
            const float mean = o.mean[token * o.heads_q + heads[r]];
            mean_sum += mean;
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              const int key = tile.key[first + n / 2 * 8 + column + n % 2];
              const bool visible = key >= from && key <= span.last;
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
          if (!history.data || lane >= 4 || slot + at >= end) continue;
          const bool low = o.whole_group ? !(above >> n & 1) : p_sum[n] < mean_sum;
          const int bit = static_cast<int>(floor_mod(position, o.window));
          const Place place = find(o, store, node, slot + at);
          unsigned& word =
              reinterpret_cast<unsigned*>(history.at(place.page, head, place.offset))[bit / 32];
          const int key = tile.key[first + at];
          const unsigned noted = low && key >= span.first && key <= span.last;
          word = (word & ~(1u << bit % 32)) | noted << bit % 32;
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int at = n / 2 * 8 + column + n % 2;
        if (!importance.data || lane >= 4 || slot + at >= end) continue;
        const Place place = find(o, store, node, slot + at);
        *reinterpret_cast<float*>(importance.at(place.page, head, place.offset)) += received[n];
      }
    }
    tiles.release(i);
  }
}

bool tracks(const TreeAttention& p) {
  return p.stores[0].importance.data || p.stores[0].history.data;
}

// Whether products are taken in fp32.
bool exact_products(const TreeAttention& p) {
  auto exact = [&](const Content& x) {
    if (x.format == Format::none) return x.type != p.q.type;
    // Planes of fewer than four bits must come in words.
    return (parts_log2(x.format) == 2 || high_bits(x.format) > 0) && p.stores[0].d % 32 != 0;
  };
  return p.q.type == Type::f32 ||
         std::any_of(p.stores, p.stores + p.store_count,
                     [&](const Pages& x) { return exact(x.k) || exact(x.v); });
}

// Whether what meets keys of this format is not a query as it is given, or not where it is.
bool prepares(const TreeAttention& p, Format format) {
  const int64_t words = reinterpret_cast<int64_t>(p.q.data) / 2 | p.q.stride[0] | p.q.stride[1];
  return format != Format::none || p.frames.of || exact_products(p) || words % 2;
}

// Whether kernels for pieces of pages take a store: heads of 64 or 128 and formats that they are
// compiled for, pages of whole pieces, all of it in units of 16 bytes; and nothing asked of scores
// but weights. All else is for attend_kernel.
bool in_pieces(const TreeAttention& p, const Pages& x) {
  if (exact_products(p) || tracks(p) || p.softcap > 0) return false;
  const Format format = x.k.format;
  if (format != x.v.format || format == Format::int6 || format == Format::int3) return false;
  if ((x.d != 64 && x.d != 128) || x.page_size % kPiece) return false;
  auto aligned = [](const Paged& y, int64_t slot) {
    return (reinterpret_cast<int64_t>(y.data) | y.page | y.head | slot) % 16 == 0;
  };
  const Paged &k = x.k.scale, &v = x.v.scale, &position = x.position;
  const bool paired = k.slot == 4 && v.data == k.data + 2;
  const bool scaled = k.page == v.page && k.head == v.head && k.slot == v.slot && aligned(k, 0) &&
                      (paired || (k.slot == 2 && aligned(v, 0)));
  return aligned(x.k.codes, x.k.codes.slot) && aligned(x.v.codes, x.v.codes.slot) &&
         (format == Format::none || scaled) &&
         (!position.data || (position.slot == 4 && aligned(position, 0)));
}

// Divides scratch memory; returns its size.
int64_t place_scratch(Attention& o) {
  char* const begin = o.scratch;
  char* at = begin;
  auto take = [&](auto*& p, int64_t count, int64_t size) {
    p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(at);
    at += (count * size + 15) / 16 * 16;
  };
  const int64_t d = o.stores[0].d;
  take(o.part_out, o.parts * o.heads_q * d, 4);
  take(o.part_lse, o.parts * o.heads_q, 4);
  take(o.part_seen, o.parts * o.stores[0].heads, 4);
  take(o.part_store, o.parts, 4);
  if (tracks(o)) {
    const Format format = o.stores[0].k.format;
    take(o.mean, o.tokens * o.heads_q, 4);
    o.query_type = operand_type(o, format, exact_products(o));
    if (prepares(o, format)) take(o.queries, o.tokens * o.heads_q * d, size_of(o.query_type));
  }
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

// Tiles of as many slots, and as many stages, as leave room for other blocks; at most `most` bytes.
Layout layout_of(const Pages& x, int padded_d, bool exact, int most) {
  const int d = static_cast<int>(x.d);
  Layout y{row_layout(x.k, d, padded_d, exact), row_layout(x.v, d, padded_d, exact), kWarps * kStep,
           2};
  while (y.slots > kStep && 2 * y.stage() > std::min(72 << 10, most)) y.slots /= 2;
  if (3 * y.stage() <= 48 << 10) y.stages = 3;
  return y;
}

template <int D, bool Exact>
void run(Attention& o, void* stream) {
  constexpr int queries = Queries<D, Exact>::kShared;
  const int most = most_shared() - queries;
  size_t shared = 2 * Found<D>::kNumbers * kWarp * sizeof(float);  // results of warps
  for (int i = 0; i < o.store_count; ++i) {
    const Layout& y = o.layouts[i] = layout_of(o.stores[i], D, Exact, most);
    const bool prepared = prepares(o, o.stores[i].k.format);
    o.prepared |= prepared << i, o.rotated |= (o.stores[i].v.format != Format::none) << i;
    const int staged = prepared && kStaged<D, Exact> ? kWarps * kStep * kStagedPitch<D> : 0;
    const int size = (y.stages - 1) * y.stage() + std::max(y.stage(), staged);
    shared = std::max(shared, static_cast<size_t>(size));
  }
  const dim3 items = blocks_of(o);
  const dim3 rows = blocks_of(o.tokens * o.heads_q, kWarps);
  uint32_t rest = o.items ? (1u << o.store_count) - 1 : 0;
  // Stores of one format are taken together, items of more rows before those of few.
  for (int i = 0; i < o.store_count; ++i) {
    const Content& k = o.stores[i].k;
    if (!(rest >> i & 1) || !in_pieces(o, o.stores[i])) continue;
    o.mine = 0;
    for (int n = i; n < o.store_count; ++n) {
      const Pages& other = o.stores[n];
      if (other.k.format == k.format && other.k.type == k.type && in_pieces(o, other))
        o.mine |= 1u << n;
    }
    rest &= ~o.mine;
    // With a part for each item, all of them have one token.
    if (o.group > kFewRows || o.parts > o.items) attend_many(o, o.stores[i], stream);
    if (o.group <= kFewRows) attend_few(o, o.stores[i], stream);
  }
  o.mine = rest;
  if (rest) launch("attend", attend_kernel<D, Exact>, items, kThreads, queries + shared, stream, o);
  launch("merge", merge_kernel<D>, rows, kThreads, 0, stream, o);
  if (o.items && o.mean) {
    Layout& y = o.layouts[0];
    y.v = {};
    launch("track", track_kernel<D, Exact>, items, kThreads, queries + y.stages * y.stage(), stream,
           o);
  }
}

template <int D>
void run(Attention& o, void* stream) {
  if (exact_products(o))
    run<D, true>(o, stream);
  else
    run<D, false>(o, stream);
}

}  // namespace

int64_t tree_attention_scratch(const TreeAttention& p) {
  Attention o{p};
  return place_scratch(o);
}

void tree_attention(const TreeAttention& p, void* stream) {
  Attention o{p};
  place_scratch(o);
  o.group = static_cast<int>(p.heads_q / p.stores[0].heads), o.d = static_cast<int>(p.stores[0].d);
  o.norm = norm_of(o.d);
  o.factor = p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2e;
  o.cap = p.softcap * kLog2e;
  if (!p.sliding) o.sliding = int64_t{1} << 32;
  if (o.d <= 64)
    run<64>(o, stream);
  else if (o.d <= 128)
    run<128>(o, stream);
  else
    run<256>(o, stream);
}

}  // namespace kvtools::cuda

// What the kernels of attention share: of a work item, what its query rows see and how they are
// prepared; and which kernel takes which store.
#pragma once

#include "head.h"
#include "tile.h"

namespace kvtools::cuda {

constexpr float kLn2 = 0.6931471805599453f;

// The type of queries, as they meet keys of this format.
KVTOOLS_ANYWHERE inline Type operand_type(const TreeAttention& p, Format format, bool exact) {
  return exact ? Type::f32 : format == Format::none ? p.q.type : Type::f16;
}

// A head of a token, as it meets keys of this format, to `to`: divided by its gain, rotated where
// they are.
template <int D>
__device__ void prepare(const Attention& o, Format format, int64_t token, int head, char* to,
                        Type type) {
  float x[D / kWarp];
  load_head(x, o.q.at(token, head), o.q.type, size_of(o.q.type), o.d);
  const Frame frame(o.frames, token, head / o.group);
  if (frame.gain)
#pragma unroll
    for (int j = 0; j < D / kWarp; ++j) {
      const int e = lane_index() * (D / kWarp) + j;
      if (e < o.d) x[j] *= reciprocal_approximately(frame.gain_at(e));
    }
  if (format != Format::none) rotate(x, o.d, o.norm);
  store_head(x, to, type, o.d);
}

// Positions that a token sees in a store, but for `sliding`.
struct Span {
  int first = INT_MIN, last;

  __device__ Span(const Attention& o, int store, int64_t token) : last(o.position[token]) {
    if (!o.before) return;
    const int before = o.before[token];
    if (o.recent >> store & 1)
      first = before;
    else if (before <= last)
      last = max(before, INT_MIN + 1) - 1;
  }

  // The first that `sliding` leaves; `position` is the token's.
  __device__ int from(const Attention& o, int position) const {
    return static_cast<int>(max(int64_t{first}, position - o.sliding + 1));
  }
};

// Whether a block's item is of a store that the launch takes.
__device__ inline bool is_mine(const Attention& o) {
  return o.mine >> o.store[o.item[6 * int64_t(blockIdx.x)]] & 1;
}

// A work item, for a KV head. A row is a query head of a token.
struct Item {
  const Attention& o;
  const int head, node, tokens_begin, rows, begin, end, number;  // the last: of the store

  __device__ explicit Item(const Attention& o)
      : o(o),
        head(blockIdx.y),
        node(number_of(0)),
        tokens_begin(number_of(1)),
        rows((number_of(2) - tokens_begin) * o.group),
        begin(number_of(3)),
        end(min(number_of(4), o.length[node])),
        number(o.store[node]) {}

  __device__ int number_of(int i) const { return o.item[6 * int64_t(blockIdx.x) + i]; }
  __device__ int token(int row) const { return o.token[tokens_begin + row / o.group]; }
  __device__ int head_q(int row) const { return head * o.group + row % o.group; }
  __device__ int part(int row) const { return number_of(5) + row / o.group; }
  __device__ int64_t result(int row) const { return int64_t{part(row)} * o.heads_q + head_q(row); }

  // What is told of a row besides its output; by one thread.
  __device__ void finish(int row, float peak, float mass, int seen) const {
    o.part_lse[result(row)] = mass != 0 ? (peak + log2f(mass)) * kLn2 : -INFINITY;
    if (row % o.group) return;
    o.part_seen[part(row) * o.stores[0].heads + head] = seen;
    if (head == 0) o.part_store[part(row)] = number;
  }
};

// A block for each item and KV head.
inline dim3 blocks_of(const Attention& o) {
  return dim3(static_cast<unsigned>(o.items), static_cast<unsigned>(o.stores[0].heads));
}

// Kernels of their own, for heads of 64 or 128 that are stored in one way, for items of few rows
// and of more. They take the stores `o.mine`.
constexpr int kFewRows = 8;
void attend_few(const Attention& o, const Pages& as, void* stream);
void attend_many(const Attention& o, const Pages& as, void* stream);

}  // namespace kvtools::cuda

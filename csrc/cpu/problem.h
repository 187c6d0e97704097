// What the parts of attention share: the problem, how it is cut, and partial results.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "amx.h"
#include "decode.h"

namespace kvtools::KVTOOLS_ISA {

// Memory that a thread keeps between calls; what it holds is not kept.
template <class T, int Use>
T* scratch(size_t count) {
  constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kLine); }
  };
  thread_local std::unique_ptr<T, Free> memory;
  thread_local size_t size = 0;
  if (count > size) {
    memory.reset(static_cast<T*>(::operator new(count * sizeof(T), kLine)));
    size = count;
  }
  return memory.get();
}

// The arguments of `tree_attention`, and what follows from them.
struct Problem {
  const TreeAttention& p;
  const int64_t heads = p.stores[0].heads, group = p.heads_q / heads, d = p.stores[0].d;
  const int64_t width = whole_vectors(d);
  // Scores are kept before scaling, so that queries are not rounded once more; unit makes them
  // natural logarithms.
  const float unit = p.softcap == 0 && p.scale > 0 ? p.scale : 1;
  const float* rotated = nullptr;  // queries, as `load_query` has them, [t][hq][width]
  const bool tracks = p.stores[0].importance.data || p.stores[0].history.data;

  const int32_t* item(int64_t i) const { return p.item + 6 * i; }
  int64_t slots(int64_t i) const {
    return std::max(0, std::min(item(i)[4], p.length[item(i)[0]]) - item(i)[3]);
  }
  // Slots up to the last that any of its tokens sees, where they lie in order.
  int64_t seen(int64_t i) const {
    const int64_t all = slots(i);
    if (pages(i).position.data) return all;
    int64_t last = INT32_MIN;
    for (int64_t c = item(i)[1]; c < item(i)[2]; ++c)
      last = std::max<int64_t>(last, last_seen(p.token[c], store(i)));
    return std::clamp<int64_t>(last + 1 - p.base[item(i)[0]] - item(i)[3], 0, all);
  }
  int64_t rows(int64_t i) const { return (item(i)[2] - item(i)[1]) * group; }
  int64_t token(int64_t i, int64_t row) const { return p.token[item(i)[1] + row / group]; }
  int store(int64_t i) const { return p.store[item(i)[0]]; }
  const Pages& pages(int64_t i) const { return p.stores[store(i)]; }
  bool tracked(int64_t i) const { return tracks && store(i) == 0 && p.own[item(i)[0]]; }
  // Many rows take products of pairs: everything is in bf16, and queries are not scaled.
  bool in_pairs(const Pages& pages) const {
    auto is_bf16 = [](const Content& x) {
      return x.format == Format::none && x.type == Type::bf16;
    };
    return (kTiles || kDotsPairs) && p.q.type == Type::bf16 && is_bf16(pages.k) &&
           is_bf16(pages.v) && d % ((kTiles ? 2 : 4) * kLanes) == 0 && unit == p.scale &&
           !p.frames.of;
  }
  // The last position that a token sees in a store, and the last one that is too old for it there.
  int32_t last_seen(int64_t t, int store) const {
    return p.before && !recent(store) ? std::min(newest_old(t), p.position[t]) : p.position[t];
  }
  int32_t last_hidden(int64_t t, int store) const {
    return p.before && recent(store) ? newest_old(t) : INT32_MIN;
  }

  // Call f(page, offset, count, slot) for the runs of slots [begin, end) that lie in one page.
  template <class F>
  void walk(int64_t i, int64_t begin, int64_t end, F f) const {
    const int64_t node = item(i)[0], size = pages(i).page_size;
    const int64_t at = p.first[node] + begin;
    const int32_t* page = p.page + p.page_indptr[node] + at / size;
    int64_t offset = at % size;
    for (int64_t slot = begin; slot < end; offset = 0) {
      const int64_t count = std::min(size - offset, end - slot);
      f(*page++, offset, count, slot);
      slot += count;
    }
  }

 private:
  bool recent(int store) const { return p.recent >> store & 1; }
  int32_t newest_old(int64_t t) const { return std::max(p.before[t], INT32_MIN + 1) - 1; }
};

// A query head, scaled. Keys of a frame are stored times its gain, so it is divided by that.
inline void load_query(const Problem& o, int64_t t, int64_t head, float* to) {
  const TreeAttention& p = o.p;
  with_type(p.q.type, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    decode_row(ReadPlain<T>(o.d), p.q.at(t, head), o.d, p.scale / o.unit, to);
  });
  if (!p.frames.of) return;
  with_type(p.frames.x.type, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    const auto* gain = reinterpret_cast<const T*>(p.frames.x.at(p.frames.of[t], 1, head / o.group));
    int64_t e = 0;
    for (; e + kLanes <= o.d; e += kLanes) store(to + e, load(to + e) / load(gain + e));
    const int left = o.d - e;
    if (left) store_part(to + e, load_part(to + e, left) / load_part(gain + e, left), left);
  });
}

// Slots [begin, end) of a work item against rows [row, row + rows) of each of `heads` KV heads;
// the results of the first of these rows are at `at` among the partial ones.
struct Piece {
  int64_t item, head, heads, row, rows, begin, end, at;

  int64_t padded() const { return whole_vectors(rows); }
  int64_t results() const { return heads * padded(); }
};

// Partial results of rows: the sum of weighted values, the greatest score and the sum of weights.
struct Partial {
  float *sum, *peak, *mass;
  int32_t *seen, *next;  // slots that a row sees; another partial result of the same query head
  int32_t* store;        // what it is over
};

}  // namespace kvtools::KVTOOLS_ISA

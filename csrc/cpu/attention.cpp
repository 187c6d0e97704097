// Attention over a forest. Work items are cut into tiles of query rows (a row is a query head of a
// token); threads share the slots of all tiles evenly. Each piece leaves a partial result; the
// partial results of a query head are merged in fp32.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "isa.h"
#include "piece.h"
#include "rotate.h"

namespace kvtools::KVTOOLS_ISA {

void merge_states(const MergeStates& p, const Pool& pool) {
  constexpr int64_t kElements = 1 << 14;  // at least, per thread
  with_type(p.out.type, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    pool.split(
        p.b_size * p.h, kElements / std::max<int64_t>(p.d, 1), [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            const int64_t i = row / p.h, h = row % p.h;
            auto at = [&](const auto& x) {
              return reinterpret_cast<T*>(x.data) + i * x.stride[0] + h * x.stride[1];
            };
            auto lse_at = [&](const auto& x) -> float& {
              return reinterpret_cast<float*>(x.data)[i * x.stride[0] + h * x.stride[1]];
            };
            const float a_lse = lse_at(p.a_lse), b_lse = lse_at(p.b_lse);
            const bool empty = a_lse == -kInfinity && b_lse == -kInfinity;  // a NaN is not
            const float peak = std::max(a_lse, b_lse);
            const float a_mass = a_lse == -kInfinity ? 0 : std::exp(a_lse - peak);
            const float b_mass = b_lse == -kInfinity ? 0 : std::exp(b_lse - peak);
            const float lse = empty ? -kInfinity : peak + std::log(a_mass + b_mass);
            const float a = a_mass ? std::exp(a_lse - lse) : 0,
                        b = b_mass ? std::exp(b_lse - lse) : 0;
            lse_at(p.lse) = lse;
            auto merged = [&](f32 x, f32 y) {
              return (a != 0 ? a * x : f32{}) + (b != 0 ? b * y : f32{});
            };
            const T *x = at(p.a), *y = at(p.b);
            T* out = at(p.out);
            int64_t d = 0;
            for (; d + kLanes <= p.d; d += kLanes) store(out + d, merged(load(x + d), load(y + d)));
            const int left = p.d - d;
            if (left)
              store_part(out + d, merged(load_part(x + d, left), load_part(y + d, left)), left);
          }
        });
  });
}

namespace {

class Attention {
 public:
  Attention(const TreeAttention& p, const Pool& pool) : o_{p}, p_(p), pool_(pool) {
    for (int i = 1; i < p.store_count; ++i) mixed_ |= is_rotated(i) != is_rotated(0);
  }

  void run() {
    cut();
    const int64_t threads = cuts_.size() - 1;
    rotate_queries(threads);
    pool_.run(threads, [this](int64_t task) {
      for (int64_t i = cuts_[task]; i < cuts_[task + 1]; ++i)
        Tile(o_, pieces_[i], partial_, [this](int64_t item, int64_t head) {
          return o_.tracked(item) ? scores_ + logits_[item * o_.heads + head] : nullptr;
        });
    });
    link();
    pool_.split(p_.tokens, (p_.tokens + threads - 1) / threads, [this](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t h = 0; h < p_.heads_q; ++h) merge(t, h);
    });
    if (o_.tracks) track();
  }

 private:
  void cut();
  void rotate_queries(int64_t threads);
  void link();
  void merge(int64_t t, int64_t h);
  void track();
  void track(int64_t i, int64_t head);

  bool is_rotated(int store) const { return p_.stores[store].v.format != Format::none; }

  Problem o_;
  const TreeAttention& p_;
  const Pool& pool_;
  bool mixed_ = false;  // values of some stores are rotated, of others not
  std::vector<Piece> pieces_;
  std::vector<int64_t> seen_;    // slots of each item that are looked at
  std::vector<int64_t> cuts_;    // pieces of thread i: cuts_[i] to cuts_[i + 1]
  std::vector<int64_t> logits_;  // where those of (item, head) start, if it is tracked
  Partial partial_;
  float *scores_ = nullptr, *mean_ = nullptr;
  int32_t* first_ = nullptr;  // first partial result of a query head of a token
};

// Divide the work: pieces in order, and where each thread starts.
void Attention::cut() {
  const int64_t heads = o_.heads;
  // Of a slot, roughly in cycles: decoding its vectors, by format, and what each row adds.
  constexpr int kDecode[] = {1, 4, 1, 8, 4, 5, 4};
  auto cost = [&](const Pages& pages, int64_t rows) -> int64_t {
    if (rows == 0) return 0;
    const int64_t vectors = o_.width / kLanes;
    const int64_t decode =
        (kDecode[static_cast<int>(pages.k.format)] + kDecode[static_cast<int>(pages.v.format)]) *
        vectors;
    if (rows <= kFewRows) return (rows + 3) / 4 * decode + rows * (2 * vectors + 4);
    const int64_t each = !o_.in_pairs(pages) ? 2 * o_.d : kTiles ? o_.d / 16 + 16 : o_.d;
    return whole_vectors(rows) / kLanes * each + decode + o_.d / 2;
  };
  int64_t total = 0, scores = 0;
  seen_.resize(p_.items);
  for (int64_t i = 0; i < p_.items; ++i) {
    const int64_t n = o_.slots(i), rows = o_.rows(i), tiles = rows / kTileRows;
    const Pages& pages = o_.pages(i);
    seen_[i] = o_.tracked(i) ? n : o_.seen(i);
    total += heads * seen_[i] * (tiles * cost(pages, kTileRows) + cost(pages, rows % kTileRows));
    for (int64_t h = 0; o_.tracks && h < heads; ++h) {
      logits_.push_back(scores);
      if (o_.tracked(i)) scores += rows * n;
    }
  }
  constexpr int64_t kWorthAThread = 20000;
  const int64_t threads = std::clamp<int64_t>(total / kWorthAThread, 1, pool_.threads);
  int64_t spent = 0, results = 0;
  auto add = [&](int64_t i, int64_t head, int64_t count, int64_t row, int64_t rows) {
    const int64_t n = seen_[i], start = o_.item(i)[3], each = count * cost(o_.pages(i), rows);
    for (int64_t begin = 0, end; begin < n; begin = end) {
      end = n;
      if (const int64_t task = cuts_.size(); task < threads) {
        // Up to the end of this thread's share, in whole chunks.
        const int64_t left = std::max<int64_t>(total * task / threads - spent, 0);
        end = std::min(n, begin + (left / each + kChunk / 2) / kChunk * kChunk);
      }
      if (end > begin) {
        pieces_.push_back({i, head, count, row, rows, start + begin, start + end, results});
        results += pieces_.back().results();
        spent += (end - begin) * each;
      }
      if (end < n) cuts_.push_back(pieces_.size());
    }
  };
  cuts_.push_back(0);
  for (int64_t i = 0; i < p_.items; ++i) {
    const bool few = o_.rows(i) <= kFewRows;
    if (few && o_.rows(i) > 0) add(i, 0, heads, 0, o_.rows(i));
    for (int64_t h = 0; !few && h < heads; ++h)
      for (int64_t row = 0; row < o_.rows(i); row += kTileRows)
        add(i, h, 1, row, std::min<int64_t>(kTileRows, o_.rows(i) - row));
  }
  cuts_.push_back(pieces_.size());

  const int64_t queries = p_.tokens * p_.heads_q;
  partial_.sum = scratch<float, 2>(results * (o_.width + 2) + queries + scores);
  partial_.peak = partial_.sum + results * o_.width;
  partial_.mass = partial_.peak + results;
  mean_ = partial_.mass + results;
  scores_ = mean_ + queries;
  first_ = scratch<int32_t, 3>(queries + 3 * results);
  partial_.next = first_ + queries;
  partial_.seen = partial_.next + results;
  partial_.store = partial_.seen + results;
}

// Once for all stores whose keys are.
void Attention::rotate_queries(int64_t threads) {
  if (std::none_of(p_.stores, p_.stores + p_.store_count,
                   [](const Pages& x) { return x.k.format != Format::none; }))
    return;
  float* all = scratch<float, 7>(p_.tokens * p_.heads_q * o_.width);
  o_.rotated = all;
  pool_.split(p_.tokens, (p_.tokens + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t h = 0; h < p_.heads_q; ++h) {
        float* q = all + (t * p_.heads_q + h) * o_.width;
        load_query(o_, t, h, q);
        rotate(q, o_.d);
      }
  });
}

// Chain the partial results of each query head of each token.
void Attention::link() {
  std::fill_n(first_, p_.tokens * p_.heads_q, -1);
  for (const Piece& piece : pieces_)
    for (int64_t h = 0; h < piece.heads; ++h)
      for (int64_t r = 0; r < piece.rows; ++r) {
        const int64_t row = piece.row + r, at = piece.at + h * piece.padded() + r;
        const int64_t head = (piece.head + h) * o_.group + row % o_.group;
        int32_t& first = first_[o_.token(piece.item, row) * p_.heads_q + head];
        partial_.next[at] = first;
        first = static_cast<int32_t>(at);
      }
}

// The result of one query head of one token.
void Attention::merge(int64_t t, int64_t h) {
  const int64_t d = o_.d;
  const int32_t first = first_[t * p_.heads_q + h];
  float peak = -kInfinity, mass = 0, first_mass = 0;  // over all stores, and the first
  int64_t seen = 0;
  for (int32_t r = first; r >= 0; r = partial_.next[r]) peak = std::max(peak, partial_.peak[r]);
  // Quantised values, and so their sums, are rotated; others are not.
  const int64_t sums = mixed_ ? 2 * o_.width : o_.width;
  float *out = scratch<float, 4>(sums), *rotated = out + sums - o_.width;
  std::fill_n(out, sums, 0.0f);
  for (int32_t next = first; next >= 0;) {  // as many at a time as weights are found at once
    int32_t some[kLanes];
    float weights[kLanes] = {};
    int n = 0;
    for (; n < kLanes && next >= 0; next = partial_.next[next])
      some[n] = next, weights[n++] = partial_.peak[next];
    store(weights, exp2((load(weights) - peak) * (o_.unit * kLog2e)));
    for (int i = 0; i < n; ++i) {
      const int32_t r = some[i];
      seen += partial_.seen[r];
      if (partial_.mass[r] == 0) continue;  // where nothing is seen; a NaN, once seen, stays
      const float weight = weights[i];
      mass += weight * partial_.mass[r];
      if (partial_.store[r] == 0) first_mass += weight * partial_.mass[r];
      float* sum = is_rotated(partial_.store[r]) ? rotated : out;
      for (int64_t e = 0; e < o_.width; e += kLanes)
        store(sum + e, load(sum + e) + load(partial_.sum + r * o_.width + e) * weight);
    }
  }
  if (mass != 0)
    for (int64_t e = 0; e < sums; e += kLanes) store(out + e, load(out + e) / mass);
  if (mixed_ || is_rotated(0)) rotate_back(rotated, d);
  for (int64_t e = 0; mixed_ && e < o_.width; e += kLanes)
    store(out + e, load(out + e) + load(rotated + e));

  // What is kept elsewhere: another state, and the sink, which has no value.
  auto log_sum = [&](float x) { return x != 0 ? peak * o_.unit + std::log(x) : -kInfinity; };
  float lse = log_sum(mass);
  auto join = [&](float other, auto value) {
    if (lse == -kInfinity && other == -kInfinity) return;
    const float top = std::max(lse, other);
    const float both = top + std::log(std::exp(lse - top) + std::exp(other - top));
    const float a = std::exp(lse - both), b = std::exp(other - both);
    for (int64_t e = 0; e < d; e += kLanes) store(out + e, load(out + e) * a + value(e, b));
    lse = both;
  };
  if (p_.state_out.data) {
    const float other = reinterpret_cast<float*>(
        p_.state_lse.data)[t * p_.state_lse.stride[0] + h * p_.state_lse.stride[1]];
    with_type(p_.state_out.type, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      const T* x = reinterpret_cast<const T*>(p_.state_out.data) + t * p_.state_out.stride[0] +
                   h * p_.state_out.stride[1];
      join(other, [&](int64_t e, float b) {
        if (b == 0) return f32{};  // an empty state may hold anything
        return (e + kLanes <= d ? load(x + e) : load_part(x + e, d - e)) * b;
      });
    });
  }
  if (p_.sink.data)
    with_type(p_.sink.type, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      join(load_one(reinterpret_cast<const T*>(p_.sink.data) + h * p_.sink.stride[0]),
           [](int64_t, float) { return f32{}; });
    });

  if (o_.tracks) mean_[t * p_.heads_q + h] = std::exp(log_sum(first_mass) - lse) / seen;
  reinterpret_cast<float*>(p_.lse.data)[t * p_.lse.stride[0] + h * p_.lse.stride[1]] = lse;
  with_type(p_.out.type, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    T* y = reinterpret_cast<T*>(p_.out.data) + t * p_.out.stride[0] + h * p_.out.stride[1];
    for (int64_t e = 0; e < d; e += kLanes)
      if (e + kLanes <= d)
        store(y + e, load(out + e));
      else
        store_part(y + e, load(out + e), d - e);
  });
}

// Items with the same slots, for other tokens, go to one thread.
void Attention::track() {
  std::vector<int64_t> tracked, groups;
  for (int64_t i = 0; i < p_.items; ++i)
    if (o_.tracked(i)) tracked.push_back(i);
  auto slots = [&](int64_t i) { return std::make_pair(o_.item(i)[0], o_.item(i)[3]); };
  std::stable_sort(tracked.begin(), tracked.end(),
                   [&](int64_t a, int64_t b) { return slots(a) < slots(b); });
  for (size_t n = 0; n < tracked.size(); ++n)
    if (n == 0 || slots(tracked[n]) != slots(tracked[n - 1])) groups.push_back(n);
  const int64_t tasks = groups.size() * o_.heads;
  groups.push_back(tracked.size());
  pool_.run(tasks, [&](int64_t task) {
    const int64_t group = task / o_.heads;
    for (int64_t n = groups[group]; n < groups[group + 1]; ++n) track(tracked[n], task % o_.heads);
  });
}

// Importance and history of the slots of an item that one row owns.
void Attention::track(int64_t i, int64_t head) {
  const int64_t all = o_.slots(i), tokens = o_.item(i)[2] - o_.item(i)[1];
  if (all == 0) return;
  const Pages& pages = p_.stores[0];
  const float* logits = scores_ + logits_[i * o_.heads + head];
  const bool notes = pages.history.data;
  float* gained = scratch<float, 5>(whole_vectors(all));
  int32_t* low = scratch<int32_t, 6>(whole_vectors(all));
  std::fill_n(gained, whole_vectors(all), 0.0f);
  auto each_slot = [&](auto f) {  // f(page, offset in it, index among the item's slots)
    o_.walk(i, o_.item(i)[3], o_.item(i)[3] + all,
            [&](int64_t page, int64_t offset, int64_t count, int64_t slot) {
              for (int64_t j = 0; j < count; ++j) f(page, offset + j, slot + j - o_.item(i)[3]);
            });
  };
  for (int64_t c = 0; c < tokens; ++c, logits += o_.group * all) {
    const int64_t t = o_.token(i, c * o_.group), h = head * o_.group;
    const float* lse =
        reinterpret_cast<float*>(p_.lse.data) + t * p_.lse.stride[0] + h * p_.lse.stride[1];
    const float* mean = mean_ + t * p_.heads_q + h;
    float mean_sum = 0;
    for (int64_t g = 0; g < o_.group; ++g) mean_sum += mean[g];
    for (int64_t s = 0; s < all; s += kLanes) {
      f32 received{};
      i32 below = ~i32{};
      for (int64_t g = 0; g < o_.group; ++g) {
        const float* x = logits + g * all + s;
        const f32 logit = s + kLanes <= all ? load(x) : load_part(x, all - s);
        f32 weight = exp2((logit * o_.unit - lse[g * p_.lse.stride[1]]) * kLog2e);
        weight = select(logit == -kInfinity, f32{}, weight);  // unless lse is NaN, it is 0 already
        received += weight;
        below &= weight < mean[g];
      }
      if (!p_.whole_group) below = received < splat(mean_sum);
      store(gained + s, load(gained + s) + received / static_cast<float>(o_.group));
      std::memcpy(low + s, &below, sizeof below);
    }
    if (!notes) continue;
    const int32_t past = o_.last_seen(t, 0), hidden = o_.last_hidden(t, 0);
    const int64_t bit = floor_mod(p_.position[t], p_.window);
    each_slot([&](int64_t page, int64_t offset, int64_t s) {
      const int64_t key = pages.position.data
                              ? *reinterpret_cast<int32_t*>(pages.position.at(page, head, offset))
                              : p_.base[o_.item(i)[0]] + o_.item(i)[3] + s;
      uint32_t& word = reinterpret_cast<uint32_t*>(pages.history.at(page, head, offset))[bit / 32];
      const uint32_t noted = low[s] && key <= past && key > hidden;
      word = (word & ~(1u << bit % 32)) | noted << bit % 32;
    });
  }
  if (pages.importance.data)
    each_slot([&](int64_t page, int64_t offset, int64_t s) {
      *reinterpret_cast<float*>(pages.importance.at(page, head, offset)) += gained[s];
    });
}

}  // namespace

void tree_attention(const TreeAttention& p, const Pool& pool) { Attention(p, pool).run(); }

}  // namespace kvtools::KVTOOLS_ISA

// A tile of query rows against a range of slots: online softmax over chunks. A row is a query head
// of a token; the rows of a KV head and a work item lie together.
#pragma once

#include <algorithm>
#include <climits>

#include "packed.h"
#include "problem.h"

namespace kvtools::KVTOOLS_ISA {

class Tile {
 public:
  // `logits` is where the scores of (item, head) go, [rows][slots], or null.
  template <class Logits>
  Tile(const Problem& problem, const Piece& piece, const Partial& partial, const Logits& logits)
      : o_(problem),
        piece_(piece),
        pages_(problem.pages(piece.item)),
        store_(problem.store(piece.item)),
        partial_(partial),
        few_(piece.rows <= kFewRows),
        pairs_(!few_ && problem.in_pairs(pages_)) {
    whole_.least = problem.p.out.type == Type::bf16 ? 1 : 2;
    const int64_t q_size = few_ ? piece.heads * piece.rows * o_.width : o_.d * kTileRows;
    const int64_t whole_size = few_ ? q_size / o_.width * size_of_whole_q() : 0;
    q_ = scratch<float, 0>(q_size + 2 * kChunk * o_.width + kChunk * kTileRows + whole_size);
    k_tile_ = q_ + q_size, v_tile_ = k_tile_ + kChunk * o_.width;
    x_ = v_tile_ + kChunk * o_.width;
    whole_q_ = reinterpret_cast<int32_t*>(x_ + kChunk * kTileRows);
    with_reader(pages_.k, o_.d, [&](auto read) { k_bytes_ = read.bytes(o_.d); });
    with_reader(pages_.v, o_.d, [&](auto read) { v_bytes_ = read.bytes(o_.d); });
    for (int i = 0; i < kPointers; ++i)
      k_steps_[i] = i * pages_.k.codes.slot, v_steps_[i] = i * pages_.v.codes.slot;
    load_queries();
    load_bounds();
    for (int64_t h = 0; h < piece.heads; ++h)  // of the rows that there are
      std::fill_n(partial.sum + (piece.at + h * piece.padded()) * o_.width, piece.rows * o_.width,
                  0.0f);
    std::fill_n(partial.peak + piece.at, piece.results(), -kInfinity);
    std::fill_n(partial.mass + piece.at, piece.results(), 0.0f);
    std::fill_n(partial.seen + piece.at, piece.results(), 0);
    std::fill_n(partial.store + piece.at, piece.results(), store_);

    const TileConfig tiles(pairs_ && isa() == Isa::amx);
    // Chunk by chunk, and in each head by head, as pages lie in memory; while one is worked on
    // the next is fetched.
    Slots slots[2];
    const int64_t chunks = (piece.end - piece.begin + kChunk - 1) / kChunk;
    const int64_t steps = chunks * piece.heads;
    read(0, slots[0]);
    for (int64_t i = 0; i < steps; ++i) {
      Slots &now = slots[i % 2], &next = slots[(i + 1) % 2];
      if (i + 1 < steps)
        read(i + 1, next);
      else
        next = now;
      head_ = i % piece.heads;
      at_ = piece.at + head_ * piece.padded();
      logits_ = logits(piece.item, piece.head + head_);
      if (logits_) logits_ += piece.row * o_.slots(piece.item) + now.begin - o_.item(piece.item)[3];
      attend(now, next);
    }
  }

 private:
  static constexpr int kPaddedRows = std::max(kFewRows, kLanes);
  static constexpr int kPointers = kLanes / 2;  // of a vector
  static_assert(sizeof(char*) == sizeof(uint64_t));

  // A chunk of one KV head. Rows behind the last repeat it: they are read, not used.
  struct Slots {
    int64_t begin;
    int n;
    // Written by whole vectors.
    alignas(64) const char* k[kChunk + kPointers], *v[kChunk + kPointers];
    alignas(64) float k_scale[kChunk], v_scale[kChunk];
    alignas(64) int32_t key[kChunk];
    int32_t least, most;  // and those of the keys
  };

  template <class F>
  void with_turned(F f) const;
  int64_t size_of_whole_q() const;
  void load_queries();
  void load_bounds();
  void read(int64_t step, Slots& slots) const;
  void attend(Slots& now, const Slots& next);
  void few_weights(const Slots& now, bool clear, bool k_scaled, bool v_scaled, bool v_whole);
  void many_weights(const Slots& now, bool clear);
  void add_pairs_of(const Slots& now, float* sum);

  f32 capped(f32 x) const { return o_.p.softcap > 0 ? tanh(x / o_.p.softcap) * o_.p.softcap : x; }

  const Problem& o_;
  const Piece& piece_;
  const Pages& pages_;
  const int store_;
  const Partial& partial_;
  const bool few_, pairs_;        // many rows in bf16 go two elements, or slots, at a time
  float *q_, *k_tile_, *v_tile_;  // queries [heads][rows][width], or [d][kTileRows] for many rows
  int32_t* whole_q_;              // queries as integers, where `Packed` takes their products
  float* x_;                      // scores, then weights: [rows][kChunk], or [kChunk][kTileRows]
  float* logits_ = nullptr;
  int64_t k_bytes_, v_bytes_;  // of a slot
  int64_t head_ = 0, at_ = 0;  // of this step
  float shrink_[kTileRows];    // what a new greatest score takes off older results
  // A row sees the positions above `lower` up to `upper`.
  int32_t upper_[kTileRows], lower_[kTileRows];
  int32_t upper_least_, upper_most_, lower_least_, lower_most_;
  u64 k_steps_, v_steps_;                       // from slot to slot, of a vector of pointers
  float most_[kPaddedRows], all_[kPaddedRows];  // of the weights of a row
  Weights whole_;
};

// Call f with the form for packed keys, if it serves these.
template <class F>
void Tile::with_turned(F f) const {
  with_reader(pages_.k, o_.d, [&](auto read) {
    using Turned = Packed<decltype(read)>;
    if constexpr (Turned::kHas)
      if (few_ && Turned::scores_whole(o_.d)) f(Turned{});
  });
}

inline int64_t Tile::size_of_whole_q() const {
  int64_t size = 0;
  with_turned([&](auto turned) { size = turned.size_of_q(o_.d); });
  return size;
}

inline void Tile::load_queries() {
  const TreeAttention& p = o_.p;
  const bool rotated = pages_.k.format != Format::none;
  auto query = [&](int64_t h, int64_t r, float* to) {
    const int64_t row = piece_.row + r, t = o_.token(piece_.item, row);
    const int64_t head = (piece_.head + h) * o_.group + row % o_.group;
    if (rotated)
      std::memcpy(to, o_.rotated + (t * p.heads_q + head) * o_.width, o_.width * sizeof *to);
    else
      load_query(o_, t, head, to);
  };
  if (few_) {
    for (int64_t h = 0; h < piece_.heads; ++h)
      for (int64_t r = 0; r < piece_.rows; ++r) query(h, r, q_ + (h * piece_.rows + r) * o_.width);
    with_turned([&](auto turned) {
      for (int64_t i = 0; i < piece_.heads * piece_.rows; ++i)
        turned.round_q(q_ + i * o_.width, o_.d, whole_q_ + i * turned.size_of_q(o_.d));
    });
    return;
  }
  if (pairs_) {
    with_type(p.q.type, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      for (int64_t r = 0; r < piece_.rows; ++r) {
        const int64_t row = piece_.row + r, head = piece_.head * o_.group + row % o_.group;
        const T* x = reinterpret_cast<const T*>(p.q.at(o_.token(piece_.item, row), head));
        for (int64_t e = 0; e < o_.d / 2; ++e)
          std::memcpy(q_ + e * kTileRows + r, x + 2 * e, sizeof *q_);
      }
    });
    for (int64_t e = 0; e < o_.d / 2; ++e)
      std::fill(q_ + e * kTileRows + piece_.rows, q_ + e * kTileRows + piece_.padded(), 0.0f);
    return;
  }
  float* some = scratch<float, 1>(kLanes * o_.width);
  for (int64_t first = 0; first < piece_.rows; first += kLanes) {
    for (int64_t r = 0; r < kLanes; ++r)  // behind the last it is repeated
      query(0, std::min(first + r, piece_.rows - 1), some + r * o_.width);
    for (int64_t begin = 0; begin < o_.d; begin += kLanes) {
      f32 square[kLanes];
      for (int r = 0; r < kLanes; ++r) square[r] = load(some + r * o_.width + begin);
      transpose(square);
      for (int e = 0; e < kLanes && begin + e < o_.d; ++e)
        store(q_ + (begin + e) * kTileRows + first, square[e]);
    }
  }
}

inline void Tile::load_bounds() {
  upper_least_ = lower_least_ = INT_MAX, upper_most_ = lower_most_ = INT_MIN;
  for (int64_t r = 0; r < piece_.padded(); ++r) {
    const int64_t t = o_.token(piece_.item, piece_.row + std::min(r, piece_.rows - 1));
    const int32_t upper = upper_[r] = o_.last_seen(t, store_);
    const int64_t slid = o_.p.sliding ? o_.p.position[t] - o_.p.sliding : INT_MIN;
    const int32_t lower = lower_[r] = std::max<int64_t>(slid, o_.last_hidden(t, store_));
    upper_least_ = std::min(upper_least_, upper), upper_most_ = std::max(upper_most_, upper);
    lower_least_ = std::min(lower_least_, lower), lower_most_ = std::max(lower_most_, lower);
  }
}

// The halves of n words.
inline void split_words(const char* from, int64_t n, f16* low, f16* high) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const u32 both = load_bits<u32>(from + 4 * i);
    store_words(low + i, both & 0xffff), store_words(high + i, both >> 16);
  }
  for (; i < n; ++i) {
    std::memcpy(low + i, from + 4 * i, sizeof *low);
    std::memcpy(high + i, from + 4 * i + sizeof *low, sizeof *high);
  }
}

inline void Tile::read(int64_t step, Slots& slots) const {
  const Pages& pages = pages_;
  const int64_t head = piece_.head + step % piece_.heads, node = o_.item(piece_.item)[0];
  const int64_t begin = slots.begin = piece_.begin + step / piece_.heads * kChunk;
  slots.n = std::min<int64_t>(kChunk, piece_.end - begin);
  f16 k_scale[kChunk], v_scale[kChunk];
  // A slot's two scales may lie in one word.
  const Paged &k = pages.k.scale, &v = pages.v.scale;
  const bool in_words = k.data && v.data == k.data + sizeof(f16) && k.slot == 2 * sizeof(f16) &&
                        v.slot == k.slot && v.head == k.head && v.page == k.page;
  o_.walk(piece_.item, begin, begin + slots.n,
          [&](int64_t page, int64_t offset, int64_t count, int64_t slot) {
            const int64_t s = slot - begin;
            auto point = [&](const Paged& x, u64 steps, const char** rows) {
              u64 row = steps + reinterpret_cast<uint64_t>(x.at(page, head, offset));
              for (int64_t j = 0; j < count; j += kPointers, row += kPointers * x.slot)
                std::memcpy(rows + s + j, &row, sizeof row);
            };
            auto copy = [&](const Paged& x, auto* to) {
              const char* from = x.at(page, head, offset);
              if (x.slot == sizeof *to) std::memcpy(to + s, from, count * sizeof *to);
              for (int64_t j = 0; x.slot != sizeof *to && j < count; ++j, from += x.slot)
                std::memcpy(to + s + j, from, sizeof *to);
            };
            point(pages.k.codes, k_steps_, slots.k), point(pages.v.codes, v_steps_, slots.v);
            if (in_words)
              split_words(pages.k.scale.at(page, head, offset), count, k_scale + s, v_scale + s);
            if (!in_words && pages.k.scale.data) copy(pages.k.scale, k_scale);
            if (!in_words && pages.v.scale.data) copy(pages.v.scale, v_scale);
            if (pages.position.data) copy(pages.position, slots.key);
          });
  if (!pages.position.data)
    for (int s = 0; s < kChunk; ++s)
      slots.key[s] = static_cast<int32_t>(o_.p.base[node] + begin + s);
  slots.least = slots.key[0], slots.most = slots.key[slots.n - 1];
  for (int s = 0; pages.position.data && s < slots.n; ++s)
    slots.least = std::min(slots.least, slots.key[s]),
    slots.most = std::max(slots.most, slots.key[s]);
  std::fill(slots.k + slots.n, slots.k + kChunk, slots.k[slots.n - 1]);
  std::fill(slots.v + slots.n, slots.v + kChunk, slots.v[slots.n - 1]);
  std::fill(v_scale + slots.n, v_scale + whole_vectors(slots.n), f16{});  // their weight is 0
  for (int s = 0; s < slots.n; s += kLanes) {
    if (pages.k.scale.data) store(slots.k_scale + s, load(k_scale + s));
    if (pages.v.scale.data) store(slots.v_scale + s, load(v_scale + s));
  }
}

inline void Tile::attend(Slots& now, const Slots& next) {
  const Pages& pages = pages_;
  const int64_t d = o_.d, width = o_.width;
  const int n = now.n, rows = piece_.rows, vectors = piece_.padded() / kLanes;
  const bool dark = now.least > upper_most_ || now.most <= lower_least_;
  const bool clear = now.most <= upper_least_ && now.least > lower_most_;
  if (dark && !logits_) return;

  // Few rows are dotted with keys as they are stored, and scaled below. Else keys are decoded to a
  // tile, unless they are whole vectors of fp32.
  bool k_scaled = pages.k.format == Format::none, v_scaled = pages.v.format == Format::none;
  auto to_tile = [&](const auto& read, const char** from, const float* scale, float* tile,
                     bool scaled) {
    for (int s = 0; s < n; ++s) {
      decode_row(read, from[s], d, scaled ? 1.0f : scale[s], tile + s * width);
      from[s] = reinterpret_cast<const char*>(tile + s * width);
    }
    std::fill(from + n, from + kChunk, from[n - 1]);
  };
  auto plain = [&](const Content& x) {
    return x.format == Format::none && x.type == Type::f32 && d % kLanes == 0;
  };
  // Once is enough, so for the first vectors alone.
  const Ahead ahead[] = {{next.k, next.v, k_bytes_, v_bytes_}, {next.k, next.v, 0, 0}};
  with_reader(pages.k, d, [&](auto read) {
    auto few_rows = [&](const auto& reader) {
      in_groups<4>(rows, [&](auto count, int r) {
        few_scores<count.value>(reader, q_ + (head_ * rows + r) * width, width, now.k, next.k, n,
                                x_ + r * kChunk);
      });
    };
    using Turned = Packed<decltype(read)>;
    if constexpr (Turned::kHas)
      if (few_ && Turned::scores_whole(d))
        return Turned::scores(whole_q_ + head_ * rows * Turned::size_of_q(d), rows, d, now.k,
                              next.k, n, reinterpret_cast<uint32_t*>(k_tile_), x_);
    if (few_ && read.whole(d)) return few_rows(read);
    if (pairs_) {
      const auto* q = reinterpret_cast<uint32_t*>(q_);
#if KVTOOLS_TILES
      return with_tiles([&](auto* kind) {
        scores_by_tiles<std::remove_pointer_t<decltype(kind)>>(
            q, d, now.k, n, x_, vectors, ahead[0], reinterpret_cast<char*>(k_tile_));
      });
#else
      return in_groups<kTileVectors>(vectors, [&](auto count, int v) {
        constexpr int tokens = 4 * (kTileVectors / count.value > 1 ? 2 : 1);
        many_scores_of_pairs<count.value, tokens>(q + v * kLanes, d, now.k, n, x_ + v * kLanes,
                                                  ahead[v > 0]);
      });
#endif
    }
    if (!plain(pages.k)) to_tile(read, now.k, now.k_scale, k_tile_, k_scaled), k_scaled = true;
    if (few_) return few_rows(ReadPlain<float>(d));
    in_groups<kTileVectors>(vectors, [&](auto count, int v) {
      constexpr int tokens = 4 * (kTileVectors / count.value > 1 ? 2 : 1);
      many_scores<count.value, tokens>(q_ + v * kLanes, d, now.k, n, x_ + v * kLanes, ahead[v > 0]);
    });
  });

  bool v_direct = false, v_whole = false;
  with_reader(pages.v, d, [&](auto read) {
    using Whole = Packed<decltype(read)>;
    v_direct = few_ && read.whole(d);
    if constexpr (Whole::kHas) v_whole = v_direct && Whole::values_whole(d);
  });
  if (few_)
    few_weights(now, clear, k_scaled, v_scaled || !v_direct, v_whole);
  else
    many_weights(now, clear);
  if (o_.tracks && store_ == 0)
    for (int r = 0; r < rows; ++r)
      for (int s = 0; s < n; ++s)
        partial_.seen[at_ + r] += (now.key[s] <= upper_[r]) & (now.key[s] > lower_[r]);
  if (dark) return;

  float* sum = partial_.sum + at_ * width;
  for (int r = 0; r < rows; ++r)
    if (shrink_[r] != 1.0f)
      for (int64_t e = 0; e < width; e += kLanes)
        store(sum + r * width + e, load(sum + r * width + e) * shrink_[r]);
  if (pairs_) return add_pairs_of(now, sum);
  with_reader(pages.v, d, [&](auto read) {
    using Whole = Packed<decltype(read)>;
    if constexpr (Whole::kHas)
      if (v_whole) {
        Whole::round(x_, most_, all_, rows, n, whole_);
        return Whole::add(now.v, next.v, n, whole_, rows, sum, d);
      }
    if (v_direct)
      return in_groups<4>(rows, [&](auto count, int r) {
        add_values<count.value>(read, now.v, next.v, n, x_ + r * kChunk, kChunk, 1, sum + r * width,
                                width);
      });
    if (!plain(pages.v)) to_tile(read, now.v, now.v_scale, v_tile_, v_scaled);
    const int64_t row_step = few_ ? kChunk : 1, slot_step = few_ ? 1 : kTileRows;
    in_groups<kValueRows>(rows, [&](auto count, int r) {
      add_values<count.value>(ReadPlain<float>(d), now.v, nullptr, n, x_ + r * row_step, row_step,
                              slot_step, sum + r * width, width);
    });
  });
}

// Add the values of many rows, two slots at a time.
inline void Tile::add_pairs_of(const Slots& now, float* sum) {
  const int64_t width = o_.width;
  // Tiles take 16 pairs; what is behind the last slot is zero.
  const int pairs = kTiles ? (now.n + 31) / 32 * 16 : (now.n + 1) / 2;
  auto* v = reinterpret_cast<uint32_t*>(v_tile_);
  auto* p = reinterpret_cast<uint32_t*>(x_);  // in place: pairs lie before what they are made of
  for (int s = 0; s < pairs; ++s)
    for (int64_t e = 0; e < width; e += kLanes) {
      auto values = [&](int i) { return i < now.n ? load_words(now.v[i] + 2 * e) : u32{}; };
      const u32 pair = values(2 * s) | values(2 * s + 1) << 16;
      std::memcpy(v + s * width + e, &pair, sizeof pair);
    }
  auto weights = [&](int s, int64_t r) {
    auto of = [&](int i) { return i < now.n ? load(x_ + i * kTileRows + r) : f32{}; };
    return to_pairs(of(2 * s), of(2 * s + 1));
  };
  const int vectors = piece_.padded() / kLanes;
#if KVTOOLS_TILES
  for (int i = 0; i < vectors; ++i)
    for (int first = 0; first < pairs; first += kTileSide) {
      f32 turned[kLanes];
      for (int s = 0; s < kTileSide; ++s) turned[s] = bit_cast<f32>(weights(first + s, i * kLanes));
      transpose(turned);
      for (int r = 0; r < kTileSide; ++r)
        std::memcpy(p + (2 * first + r) * kTileRows + i * kLanes, &turned[r], sizeof turned[r]);
    }
  with_tiles([&](auto* kind) {
    add_by_tiles<std::remove_pointer_t<decltype(kind)>>(v, pairs, p, vectors, sum, width);
  });
#else
  for (int s = 0; s < pairs; ++s)
    for (int i = 0; i < vectors; ++i) {
      const u32 pair = weights(s, i * kLanes);
      std::memcpy(p + s * kTileRows + i * kLanes, &pair, sizeof pair);
    }
  for (int64_t e = 0; e < width; e += 4 * kLanes)
    in_groups<kValueRows>(piece_.rows, [&](auto count, int r) {
      add_pairs<count.value, 4>(v + e, pairs, p + r, sum + r * width + e, width);
    });
#endif
}

inline void Tile::few_weights(const Slots& now, bool clear, bool k_scaled, bool v_scaled,
                              bool v_whole) {
  const float octave = o_.unit * kLog2e;
  constexpr int kMost = std::min(kFewRows, kLanes);
  const bool simple = clear && o_.p.softcap == 0;
  const int rows = piece_.rows;
  f32 tops[kFewRows], totals[kFewRows], mosts[kFewRows], alls[kFewRows];  // across the lanes
  float safe[kPaddedRows];
  for (int r = 0; r < rows; ++r) {
    float* x = x_ + r * kChunk;
    f32 top = splat(-kInfinity);
    int s = 0;
    for (; simple && s + kLanes <= now.n; s += kLanes) {
      const f32 y = k_scaled ? load(x + s) : load(x + s) * load(now.k_scale + s);
      store(x + s, y);
      top = max(top, y);
    }
    for (; s < now.n; s += kLanes) {
      f32 y = load(x + s);
      if (!k_scaled) y *= load(now.k_scale + s);
      const i32 key = load_bits<i32>(now.key + s);
      i32 hidden = bit_cast<i32>(lane_index() >= static_cast<uint32_t>(now.n - s));
      if (!clear) hidden |= (key > upper_[r]) | (key <= lower_[r]);
      y = select(hidden, splat(-kInfinity), capped(y));
      store(x + s, y);
      top = max(top, y);
    }
    tops[r] = top;
  }
  if (logits_) {
    const int64_t all = o_.slots(piece_.item);
    for (int r = 0; r < rows; ++r)
      std::memcpy(logits_ + r * all, x_ + r * kChunk, now.n * sizeof *x_);
  }
  for (int64_t v = 0; v < piece_.padded(); v += kLanes) {
    float* peak = partial_.peak + at_ + v;
    const f32 old = load(peak), top = max(old, max_each<kMost>(tops + v, rows - v));
    const f32 base = select(top == -kInfinity, f32{}, top);
    store(safe + v, base);
    store(shrink_ + v, exp2((old - base) * octave));
    store(peak, top);
  }
  for (int r = 0; r < rows; ++r) {
    float* x = x_ + r * kChunk;
    const f32 base = splat(safe[r]);
    f32 all{}, most{}, sum{};
    for (int s = 0; s < now.n; s += kLanes) {
      f32 w = exp2((load(x + s) - base) * octave);
      all += w;
      if (!v_scaled) w *= load(now.v_scale + s);
      most = max(most, w), sum += w;
      store(x + s, w);
    }
    totals[r] = all, mosts[r] = most, alls[r] = sum;
  }
  for (int64_t v = 0; v < piece_.padded(); v += kLanes) {
    float* mass = partial_.mass + at_ + v;
    store(mass, load(mass) * load(shrink_ + v) + sum_each<kMost>(totals + v, rows - v));
    if (!v_whole) continue;
    store(most_ + v, max_each<kMost>(mosts + v, rows - v));
    store(all_ + v, sum_each<kMost>(alls + v, rows - v));
  }
}

inline void Tile::many_weights(const Slots& now, bool clear) {
  const float octave = o_.unit * kLog2e;
  for (int64_t v = 0; v < piece_.padded(); v += kLanes) {
    float *x = x_ + v, *peak = partial_.peak + at_ + v, *mass = partial_.mass + at_ + v;
    const i32 upper = load_bits<i32>(upper_ + v), lower = load_bits<i32>(lower_ + v);
    const f32 old = load(peak);
    f32 top = old;
    for (int s = 0; s < now.n; ++s) {
      f32 y = load(x + s * kTileRows);
      if (!clear || o_.p.softcap > 0) {
        const i32 hidden = (now.key[s] > upper) | (now.key[s] <= lower);
        y = select(hidden, splat(-kInfinity), capped(y));
        store(x + s * kTileRows, y);
      }
      top = max(top, y);
    }
    if (logits_) {
      const int64_t all = o_.slots(piece_.item);
      for (int64_t r = v; r < std::min(piece_.rows, v + kLanes); ++r)
        for (int s = 0; s < now.n; ++s) logits_[r * all + s] = x_[s * kTileRows + r];
    }
    const f32 safe = select(top == -kInfinity, f32{}, top);
    f32 total{};
    for (int s = 0; s < now.n; ++s) {
      const f32 w = exp2((load(x + s * kTileRows) - safe) * octave);
      total += w;
      store(x + s * kTileRows, w);
    }
    const f32 factor = exp2((old - safe) * octave);
    store(shrink_ + v, factor);
    store(mass, load(mass) * factor + total);
    store(peak, top);
  }
}

}  // namespace kvtools::KVTOOLS_ISA

#include <algorithm>
#include <tuple>
#include <vector>

#include "isa.h"
#include "simd.h"

namespace kvtools::KVTOOLS_ISA {
namespace {

constexpr int kKeys = 8;                // per product: their sums stay in registers
constexpr int64_t kChunk = 64 * kKeys;  // keys per task
constexpr float kLowest = -1e30f;       // finite, so that the difference of two is no NaN

// kLanes queries, one per lane, of each query head of a KV head. Probabilities are exp2(x - peak)
// / sum, with scores x in units of ln 2.
struct Window {
  float* q;     // [g, d, kLanes], scaled
  float* peak;  // [g, kLanes]
  float* sum;   // [g, kLanes]; in the end its inverse, 0 in lanes without a query
  float* mean;  // [g, kLanes]; of exp2(x - peak) over the keys beyond the sinks
  i32 now;      // positions; -1 in lanes without a query
};

// All windows, and what a thread needs to compute their scores.
class Scorer {
 public:
  explicit Scorer(const KeyScores& p)
      : p(p),
        windows((p.w + kLanes - 1) / kLanes),
        memory_(p.b * p.h * windows * p.g * (p.d + 3) * kLanes) {}

  Window window(int64_t b, int64_t h, int64_t i) {
    const int64_t states = p.g * kLanes;
    float* q = memory_.data() + ((b * p.h + h) * windows + i) * states * (p.d + 3);
    float* peak = q + states * p.d;
    const int64_t first = i * kLanes;
    const i32 lane = bit_cast<i32>(lane_index());
    const i32 now = lane + static_cast<int32_t>(p.s - p.w + first);
    const i32 none = lane >= static_cast<int32_t>(p.w - first);
    return {q, peak, peak + states, peak + 2 * states, now | none};
  }

  // The peak, sum and mean of a window: one pass over the keys.
  void reduce(int64_t b, int64_t h, int64_t i) {
    const Window window = this->window(b, h, i);
    load_queries(b, h, i, window);
    std::vector<float> keys(kKeys * p.d);
    const int64_t first = p.s - p.w + i * kLanes, end = std::min(first + kLanes, p.s);
    const int64_t begin = p.sliding ? std::max<int64_t>(first - p.sliding + 1, 0) : 0;
    for (int64_t s = begin / kKeys * kKeys; s < end; s += kKeys) {
      load_keys(b, h, s, keys.data());
      for (int64_t g = 0; g < p.g; ++g) {
        f32 x[kKeys];
        score(window, g, s, keys.data(), x);
        const f32 before = load(window.peak + g * kLanes);
        f32 peak = before;
        for (const f32& y : x) peak = max(peak, y);
        const f32 keep = exp2(before - peak);
        f32 sum = load(window.sum + g * kLanes) * keep,
            mean = load(window.mean + g * kLanes) * keep;
        for (int j = 0; j < kKeys; ++j) {
          const f32 e = exp2(x[j] - peak);
          sum += e;
          if (s + j >= p.sinks) mean += e;
        }
        store(window.peak + g * kLanes, peak);
        store(window.sum + g * kLanes, sum);
        store(window.mean + g * kLanes, mean);
      }
    }
    const f32 now = __builtin_convertvector(window.now, f32);
    const f32 sinks = splat(p.sinks);
    const f32 start = p.sliding ? max(now + (1.0f - p.sliding), sinks) : sinks;
    const f32 seen = max(now + 1 - start, splat(1));
    for (int64_t k = 0; k < p.g * kLanes; k += kLanes) {
      store(window.sum + k, select(window.now < 0, f32{}, 1 / load(window.sum + k)));
      // A NaN among the sinks spoils the mean, too.
      const f32 nan = load(window.sum + k) - load(window.sum + k);
      store(window.mean + k, load(window.mean + k) / seen + nan);
    }
  }

  // Mass and low counts of keys from `begin` on, from all windows.
  void accumulate(int64_t b, int64_t h, int64_t begin) {
    std::vector<float> keys(kKeys * p.d);
    float* mass_out = reinterpret_cast<float*>(p.mass.at(b, h));
    int32_t* low_out = reinterpret_cast<int32_t*>(p.low.at(b, h));
    for (int64_t s = begin; s < std::min(begin + kChunk, p.s); s += kKeys) {
      load_keys(b, h, s, keys.data());
      f32 mass[kKeys] = {};
      i32 low[kKeys] = {};
      for (int64_t i = 0; i < windows; ++i) {
        const Window window = this->window(b, h, i);
        f32 part[kKeys] = {}, mean{};
        i32 below[kKeys];
        for (int j = 0; j < kKeys; ++j) below[j] = window.now >= static_cast<int32_t>(s + j);
        for (int64_t g = 0; g < p.g; ++g) {
          f32 x[kKeys];
          score(window, g, s, keys.data(), x);
          const f32 peak = load(window.peak + g * kLanes), share = load(window.sum + g * kLanes);
          const f32 limit = load(window.mean + g * kLanes);
          mean += limit * share;
          for (int j = 0; j < kKeys; ++j) {
            const f32 e = exp2(x[j] - peak);
            part[j] += e * share;
            if (p.all) below[j] &= e < limit;
          }
        }
        for (int j = 0; j < kKeys; ++j) {
          mass[j] += part[j];
          low[j] -= p.all ? below[j] : below[j] & (part[j] < mean);
        }
      }
      for (int j = 0; j < std::min<int64_t>(kKeys, p.s - s); ++j) {
        mass_out[s + j] = sum_lanes(mass[j])[0] / p.g;
        low_out[s + j] = sum_lanes(__builtin_convertvector(low[j], f32))[0];
      }
    }
  }

  const KeyScores& p;
  const int64_t windows;  // per KV head

 private:
  void load_queries(int64_t b, int64_t h, int64_t i, const Window& window) const {
    // Scores come out in units of ln 2, or of the softcap where there is one.
    const float scale = p.softcap ? p.scale / p.softcap : p.scale * kLog2e;
    const int lanes = std::min<int64_t>(kLanes, p.w - i * kLanes);
    for (int64_t g = 0; g < p.g; ++g) {
      float* q = window.q + g * p.d * kLanes;
      std::fill(q, q + p.d * kLanes, 0.0f);
      with_type(p.q.type, [&](auto* kind) {
        for (int lane = 0; lane < lanes; ++lane) {
          const auto* x =
              reinterpret_cast<decltype(kind)>(p.q.at(b, h * p.g + g, i * kLanes + lane));
          for (int64_t d = 0; d < p.d; ++d) q[d * kLanes + lane] = load_one(x + d) * scale;
        }
      });
      float sink = p.sink.data ? number_at(p.sink.at(h * p.g + g), p.sink.type) * kLog2e : kLowest;
      if (sink < kLowest) sink = kLowest;  // -inf, but not NaN
      store(window.peak + g * kLanes, splat(sink));
      store(window.sum + g * kLanes, splat(p.sink.data ? 1 : 0));
      store(window.mean + g * kLanes, f32{});
    }
  }

  // Keys s, s + 1, ... in fp32; the last again behind the end, where no query sees it.
  void load_keys(int64_t b, int64_t h, int64_t s, float* keys) const {
    with_type(p.k.type, [&](auto* kind) {
      for (int j = 0; j < kKeys; ++j, keys += p.d) {
        const auto* k = reinterpret_cast<decltype(kind)>(p.k.at(b, h, std::min(s + j, p.s - 1)));
        int64_t d = 0;
        for (; d + kLanes <= p.d; d += kLanes) store(keys + d, load(k + d));
        if (d < p.d) store_part(keys + d, load_part(k + d, p.d - d), p.d - d);
      }
    });
  }

  void score(const Window& window, int64_t g, int64_t s, const float* keys, f32 (&x)[kKeys]) const {
    for (f32& y : x) y = f32{};
    const float* q = window.q + g * p.d * kLanes;
    for (int64_t d = 0; d < p.d; ++d) {
      const f32 column = load(q + d * kLanes);
      for (int j = 0; j < kKeys; ++j) x[j] += column * keys[j * p.d + d];
    }
    for (int j = 0; j < kKeys; ++j) {
      if (p.softcap) x[j] = tanh(x[j]) * (p.softcap * kLog2e);
      const int32_t key = s + j;
      i32 visible = window.now >= key;
      if (p.sliding) visible &= window.now - static_cast<int32_t>(p.sliding) < key;
      x[j] = select(visible, x[j], splat(-kInfinity));
    }
  }

  std::vector<float> memory_;
};

// An integer in the order of the number. Zeros are equal, and NaN comes last.
int64_t order_of(const char* p, Type type) {
  switch (type) {
    case Type::i64:
      return *reinterpret_cast<const int64_t*>(p);
    case Type::i32:
      return *reinterpret_cast<const int32_t*>(p);
    case Type::i16:
      return *reinterpret_cast<const int16_t*>(p);
    case Type::i8:
      return *reinterpret_cast<const int8_t*>(p);
    case Type::u8:
      return *reinterpret_cast<const uint8_t*>(p);
    default: {
      const float x = number_at(p, type);
      if (x != x) return INT64_MAX;
      const int32_t bits = bit_cast<int32_t>(x + 0.0f);
      return bits < 0 ? bits ^ INT32_MAX : bits;
    }
  }
}

}  // namespace

void key_scores(const KeyScores& p, const Pool& pool) {
  Scorer scorer(p);
  const int64_t windows = scorer.windows, chunks = (p.s + kChunk - 1) / kChunk;
  pool.run(p.b * p.h * windows, [&](int64_t task) {
    const int64_t head = task / windows;
    scorer.reduce(head / p.h, head % p.h, task % windows);
  });
  pool.run(p.b * p.h * chunks, [&](int64_t task) {
    const int64_t head = task / chunks;
    scorer.accumulate(head / p.h, head % p.h, task % chunks * kChunk);
  });
}

void select_victims(const SelectVictims& p, const Pool& pool) {
  constexpr int64_t kCandidates = 4096;  // at least, per thread
  constexpr int32_t kEmpty = INT32_MAX;  // position of a slot that holds no token
  using Key = std::tuple<int, int64_t, int64_t, int32_t, int32_t>;
  pool.split(p.n * p.h, kCandidates / p.s, [&](int64_t begin, int64_t end_head) {
    std::vector<Key> keys(p.s);
    for (int64_t head = begin; head < end_head; ++head) {
      const int64_t n = head / p.h, h = head % p.h;
      const int64_t below = integer_at(p.below, n), from = integer_at(p.from, n);
      for (int64_t s = 0; s < p.s; ++s) {
        const auto position = static_cast<int32_t>(integer_at(p.position, n, h, s));
        const bool empty = position == kEmpty;
        const bool is_protected = position < below || (position >= from && !empty);
        keys[s] = {is_protected - empty, order_of(p.score.at(n, h, s), p.score.type),
                   order_of(p.tie.at(n, h, s), p.tie.type), position, s};
      }
      const auto end = keys.begin() + p.count;
      if (end < keys.end()) std::nth_element(keys.begin(), end, keys.end());
      std::sort(keys.begin(), end);
      auto* index = reinterpret_cast<int32_t*>(p.index.at(n, h));
      for (auto key = keys.begin(); key < end; ++key) *index++ = std::get<4>(*key);
    }
  });
}

void compact_kv(const CompactKv& p, const Pool& pool) {
  constexpr int64_t kBytes = 1 << 16;  // at least, per thread
  int64_t bytes = 0;
  for (const CompactKv::Moved& moved : p.moved) bytes += moved.bytes;
  pool.split(p.heads, kBytes / (p.n * bytes), [&](int64_t begin, int64_t end) {
    std::vector<char> staged;  // sources may be targets, too
    for (int64_t h = begin; h < end; ++h)
      for (const CompactKv::Moved& moved : p.moved) {
        const Paged& x = moved.x;  // no structured binding: lambdas of C++17 cannot capture those
        const int64_t size = moved.bytes;
        if (!x.data) continue;
        staged.resize(p.n * size);
        auto at = [&](int64_t slot) { return x.at(slot / p.page_size, h, slot % p.page_size); };
        auto each = [&](auto f) {  // f(i, source, target)
          for (int64_t i = 0; i < p.n; ++i) {
            const int64_t from = integer_at(p.source, i, h), to = integer_at(p.target, i, h);
            if (from >= 0 && to >= 0) f(i, from, to);
          }
        };
        each([&](int64_t i, int64_t from, int64_t) {
          std::memcpy(&staged[i * size], at(from), size);
        });
        each([&](int64_t i, int64_t, int64_t to) { std::memcpy(at(to), &staged[i * size], size); });
      }
  });
}

}  // namespace kvtools::KVTOOLS_ISA

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "isa.h"
#include "simd.h"

namespace kvtools::KVTOOLS_ISA {
namespace {

constexpr int kBlock = 64;          // logits that share a peak
constexpr int kWords = 4 * kLanes;  // what the lanes draw from Philox at once
static_assert(kBlock % kWords == 0);

constexpr float kLowest = std::numeric_limits<float>::lowest();

// A row of logits / temperature, with -inf behind the last, and the greatest of each block.
struct Row {
  int64_t blocks;
  std::unique_ptr<float[]> z, peak;
  float best = -kInfinity;

  explicit Row(int64_t v)
      : blocks((v + kBlock - 1) / kBlock), z(new float[blocks * kBlock]), peak(new float[blocks]) {}
};

// A slice of a row: blocks first to last - 1.
struct Slice {
  int64_t first, last;
};

inline float below(float x) { return std::nextafter(x, -kInfinity); }

// Fills a slice of `row`; its greatest, or infinity for a NaN, which spoils a row just the same.
template <class T>
float scale(const T* logits, int64_t stride, int64_t v, float temperature, Row& row, Slice slice) {
  f32 best = splat(-kInfinity);
  i32 nan = {};
  for (int64_t b = slice.first; b < slice.last; ++b) {
    float* z = &row.z[b * kBlock];
    const T* x = logits + b * kBlock * stride;
    const int64_t n = std::min<int64_t>(kBlock, v - b * kBlock);
    f32 peak = splat(-kInfinity);
    auto put = [&](int i, f32 logit) {
      const f32 scaled = logit / temperature;
      store(z + i, scaled);
      nan |= scaled != scaled;
      peak = max(scaled, peak);
    };
    if (stride == 1 && n == kBlock) {
      for (int i = 0; i < kBlock; i += kLanes) put(i, load(x + i));
    } else {
      std::fill_n(z, kBlock, -kInfinity);
      for (int64_t i = 0; i < n; ++i) z[i] = load_one(x + i * stride);
      for (int i = 0; i < kBlock; i += kLanes) put(i, load(z + i));
    }
    row.peak[b] = max_lanes(peak)[0];
    best = max(peak, best);
  }
  return max_lanes(select(nan, splat(kInfinity), best))[0];
}

// 2^40 e^(z - best), rounded, summed over what exceeds a bound. Each step rounds as the
// specification does, so that these integers are everybody's.
struct Mass {
  float best;

  uint64_t above(float bound, const float* z, int64_t n) const {
    const f64 to_integer = f64{} + 0x1p52;
    u64 sum = {};
    for (int64_t i = 0; i < n; i += kLanes) {
      const f32 here = load(z + i);
      const f32 mass = select(here > bound, of(here), f32{});
      f32_half halves[2];
      std::memcpy(halves, &mass, sizeof mass);
      for (f32_half half : halves) sum += bit_cast<u64>(widen(half) + to_integer);
    }
    uint64_t total = 0;
    for (int lane = 0; lane < kLanes / 2; ++lane) total += sum[lane];
    return total - n * bit_cast<uint64_t>(0x1p52);
  }

 private:
  f32 of(f32 z) const {
    const f32 shift = splat(0x1.8p23f);
    const f32 x = min(product(best - z, splat(kLog2e)), splat(64.0f));
    const f32 whole = x + shift, r = (whole - shift) - x;
    f32 y = product(splat(0x1.41fbbcp-13f), r) + 0x1.5f3e54p-10f;
    y = product(y, r) + 0x1.3b2d4cp-7f;
    y = product(y, r) + 0x1.c6aee8p-5f;
    y = product(y, r) + 0x1.ebfbdcp-3f;
    y = product(y, r) + 0x1.62e430p-1f;
    y = product(y, r) + 1.0f;
    return bit_cast<f32>(bit_cast<i32>(y) + ((40 - bit_cast<i32>(whole)) << 23));
  }
};

struct Count {
  uint64_t above(float bound, const float* z, int64_t n) const {
    i32 count = {};
    for (int64_t i = 0; i < n; i += kLanes) count -= load(z + i) > bound;
    uint64_t total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += count[lane];
    return total;
  }
};

// Values at which a floor may lie.
struct List {
  std::unique_ptr<float[]> x;
  int64_t size = 0;

  explicit List(int64_t capacity) : x(new float[capacity + kLanes]) {}

  // Append those of z that reach `bound`.
  void collect(float bound, const float* z, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      x[size] = z[i];
      size += z[i] >= bound;
    }
  }

  // All of `row` that reach `bound`.
  void collect(float bound, const Row& row) {
    size = 0;
    for (int64_t b = 0; b < row.blocks; ++b)
      if (row.peak[b] >= bound) collect(bound, &row.z[b * kBlock], kBlock);
  }

  template <class Weight>
  uint64_t above(float bound, Weight weight) {
    std::fill_n(&x[size], kLanes, -kInfinity);
    return weight.above(bound, x.get(), (size + kLanes - 1) / kLanes * kLanes);
  }

  // The least value whose strictly greater ones weigh less than `wanted`; consumes the list. Halves
  // the interval of the values left and drops the side on which the answer is not.
  template <class Weight>
  float floor(Weight weight, double wanted) {
    uint64_t dropped = 0;  // weight of what was dropped above
    for (;;) {
      const auto [least, most] = extremes();
      if (least == most) return most;
      float pivot = least / 2 + most / 2;
      if (!(least <= pivot && pivot < most)) pivot = least;
      const uint64_t greater = dropped + above(pivot, weight);
      const bool lower = greater < wanted;
      if (lower) dropped = greater;
      int64_t left = 0;
      for (int64_t i = 0; i < size; ++i) {
        const float value = x[i];
        x[left] = value;
        left += (value <= pivot) == lower;
      }
      size = left;
    }
  }

 private:
  std::pair<float, float> extremes() {
    std::fill_n(&x[size], kLanes, x[0]);
    f32 least = splat(x[0]), most = least;
    for (int64_t i = 0; i < size; i += kLanes) {
      least = min(load(&x[i]), least);
      most = max(load(&x[i]), most);
    }
    return {-max_lanes(-least)[0], max_lanes(most)[0]};
  }
};

// The least z that passes the filters.
float lowest_kept(const Row& row, int64_t v, int64_t top_k, float top_p, float min_p,
                  uint64_t total, List& list) {
  const Mass mass{row.best};
  float floor = std::max(kLowest, static_cast<float>(row.best + std::log(double(min_p))));
  const bool cut = top_k > 0 && top_k < v;
  if (cut) {
    // The k-th greatest peak is no greater than the k-th greatest value.
    list.size = 0;
    list.collect(kLowest, row.peak.get(), row.blocks);
    const float bound = top_k < list.size ? list.floor(Count{}, top_k) : kLowest;
    list.collect(bound, row);
    const float kth = list.floor(Count{}, top_k);
    floor = std::max(floor, kth);
    if (top_p < 1) {
      list.collect(kth, row);
      total = list.above(kLowest, mass);
    }
  }
  if (top_p < 1) {
    const double wanted = double(top_p) * double(total);
    if (!cut) {
      // All v below this bound are lighter than what lies outside, with a factor 4 for rounding.
      const double outside = (double(total) - wanted) / (4.0 * v);
      list.collect(std::max<float>(kLowest, row.best + std::log(outside * 0x1p-40)), row);
    }
    floor = std::max(floor, list.floor(mass, wanted));
  }
  return floor;
}

// The words of Philox4x32-10 for kWords tokens from `token`, a multiple of 4.
void philox(uint64_t seed, uint32_t position, uint32_t token, uint32_t* words) {
  uint32_t key_0 = seed, key_1 = seed >> 32;
  u32 c0, c1 = u32{} + position, c2 = {}, c3 = {};
  for (int lane = 0; lane < kLanes; ++lane) c0[lane] = token / 4 + lane;
  for (int round = 0; round < 10; ++round) {
    u32 high_0, low_0, high_1, low_1;
    multiply(c0, 0xD2511F53, high_0, low_0);
    multiply(c2, 0xCD9E8D57, high_1, low_1);
    c0 = high_1 ^ c1 ^ key_0;
    c1 = low_1;
    c2 = high_0 ^ c3 ^ key_1;
    c3 = low_0;
    key_0 += 0x9E3779B9, key_1 += 0xBB67AE85;
  }
  const u32 even[] = {zip<false>(c0, c2), zip<true>(c0, c2)};
  const u32 odd[] = {zip<false>(c1, c3), zip<true>(c1, c3)};
  for (int half = 0; half < 2; ++half) {
    const u32 in_order[] = {zip<false>(even[half], odd[half]), zip<true>(even[half], odd[half])};
    std::memcpy(words + 2 * half * kLanes, in_order, sizeof in_order);
  }
}

struct Draw {
  double score = -kInfinity;
  int64_t token = -1;
};

// The winner of a slice: the greatest z + noise of what reaches `floor`, the lowest id on ties.
Draw draw(const Row& row, float floor, uint64_t seed, uint32_t position, Slice slice) {
  Draw winner;
  for (int64_t b = slice.first; b < slice.last; ++b) {
    if (row.peak[b] < floor) continue;
    for (int64_t first = b * kBlock; first < (b + 1) * kBlock; first += kWords) {
      const float* z = &row.z[first];
      uint32_t words[kWords];
      philox(seed, position, first, words);
      // Few can win, so a bound on the score comes first, and fp64 decides among those that it
      // lets through: -log(-log1p(-u)) <= -log(u), and the bits of a float, read as an integer,
      // are at most 2^23 (log2 + 127).
      const float slack = 1e-3f, from_bits = kLn2 * 0x1p-23f, highest = kLn2 * (127 + 31) + slack;
      const float least = static_cast<float>(winner.score - row.best);
      float bounds[kWords];
      f32 greatest = splat(-kInfinity);
      for (int i = 0; i < kWords; i += kLanes) {
        const i32 word = bit_cast<i32>(load_bits<u32>(words + i) >> 1);
        const i32 bits = bit_cast<i32>(__builtin_convertvector(word, f32));
        const f32 here = load(z + i);
        f32 bound = (here - row.best) + (highest - __builtin_convertvector(bits, f32) * from_bits);
        bound = select(here >= floor, bound, splat(-kInfinity));
        store(bounds + i, bound);
        greatest = max(greatest, bound);
      }
      if (max_lanes(greatest)[0] < least) continue;
      for (int i = 0; i < kWords; ++i) {
        if (z[i] < floor || bounds[i] < least) continue;
        const double u = (words[i] + 0.5) * 0x1p-32;
        const double score = z[i] - std::log(-std::log1p(-u));
        if (score > winner.score) winner = {score, first + i};
      }
    }
  }
  return winner;
}

// The first token with the greatest logit.
int64_t greatest(const Row& row) {
  const float* peak = std::find(&row.peak[0], &row.peak[row.blocks], row.best);
  const float* block = &row.z[(peak - &row.peak[0]) * kBlock];
  return std::find(block, block + kBlock, row.best) - &row.z[0];
}

// Draws the token of row i, whose slices go to `pool`.
template <class T>
void sample_row(const Sample& p, int64_t i, Row& row, List& list, const Pool& pool) {
  // f of every slice, reduced.
  auto over_slices = [&](auto f, auto reduce) {
    std::vector<decltype(f(Slice{}))> parts(pool.threads);
    pool.run(pool.threads, [&](int64_t task) {
      parts[task] = f(Slice{row.blocks * task / pool.threads,  //
                            row.blocks * (task + 1) / pool.threads});
    });
    for (int task = 1; task < pool.threads; ++task) parts[0] = reduce(parts[0], parts[task]);
    return parts[0];
  };
  const float temperature = p.temperature[i];
  const bool greedy = temperature == 0;
  const T* logits = reinterpret_cast<const T*>(p.logits.data) + i * p.logits.stride[0];
  row.best = over_slices(
      [&](Slice slice) {
        return scale(logits, p.logits.stride[1], p.v, greedy ? 1 : temperature, row, slice);
      },
      [](float a, float b) { return std::max(a, b); });
  p.token[i] = -1;
  p.logprob[i] = p.filtered_logprob[i] = NAN;
  if (!std::isfinite(row.best)) return;

  const Mass mass{row.best};
  auto mass_from = [&](float floor) {
    return over_slices(
        [&](Slice slice) {
          uint64_t sum = 0;
          for (int64_t b = slice.first, run; b < slice.last; b = run + 1) {
            for (run = b; run < slice.last && row.peak[run] >= floor;) ++run;
            sum += mass.above(below(floor), &row.z[b * kBlock], (run - b) * kBlock);
          }
          return sum;
        },
        std::plus<uint64_t>());
  };
  const uint64_t total = mass_from(kLowest);
  auto log_probability = [&](int64_t token, uint64_t sum) {
    return static_cast<float>((row.z[token] - row.best) - std::log(sum * 0x1p-40));
  };
  if (greedy) {
    p.token[i] = greatest(row);
    p.logprob[i] = log_probability(p.token[i], total);
    p.filtered_logprob[i] = 0;
    return;
  }
  const float floor = lowest_kept(row, p.v, p.top_k[i], p.top_p[i], p.min_p[i], total, list);
  const Draw winner =
      over_slices([&](Slice slice) { return draw(row, floor, p.seed[i], p.position[i], slice); },
                  [](Draw a, Draw b) { return b.score > a.score ? b : a; });
  p.token[i] = winner.token;
  p.logprob[i] = log_probability(winner.token, total);
  p.filtered_logprob[i] = log_probability(winner.token, floor > kLowest ? mass_from(floor) : total);
}

}  // namespace

void sample(const Sample& p, const Pool& pool) {
  const Pool alone{1, [](int64_t tasks, const std::function<void(int64_t)>& body) {
                     for (int64_t task = 0; task < tasks; ++task) body(task);
                   }};
  // As many rows as go evenly to the threads, then the others one by one, in slices.
  const int64_t share = p.b / pool.threads;
  with_type(p.logits.type, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    auto rows = [&](int64_t first, int64_t last, const Pool& slices) {
      if (first == last) return;
      Row row(p.v);
      List list(row.blocks * kBlock);
      for (int64_t i = first; i < last; ++i) sample_row<T>(p, i, row, list, slices);
    };
    pool.run(pool.threads, [&](int64_t task) { rows(task * share, (task + 1) * share, alone); });
    rows(share * pool.threads, p.b, pool);
  });
}

}  // namespace kvtools::KVTOOLS_ISA

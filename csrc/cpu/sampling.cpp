// Sampling in one pass over the logits, which finds the greatest of each block and sums of e^z.
//
// Few blocks matter after that, and bounds by their greatest tell which: only their tokens are
// divided by the temperature, weighed, or compared with noise. All of it is exact: bounds only tell
// where to look, and sums that decide are those of integers.
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

constexpr int kBlock = 64;               // logits that share a peak
constexpr int kChunk = kLanes * kBlock;  // logits that share a sum
constexpr int kUnroll = 4;               // vectors of a chunk that are summed apart
static_assert(kBlock % (kUnroll * kLanes) == 0);

constexpr float kLowest = std::numeric_limits<float>::lowest();

// A slice of a row: chunks first to last - 1.
struct Slice {
  int64_t first, last;
};

inline float below(float x) { return std::nextafter(x, -kInfinity); }

// 2^(x c) to 3 ulp, for x c <= 32 and x >= -125 / c; exact for 0, and NaN stays.
inline f32 exp2_of_product(f32 x, float c) {
  const f32 shift = splat(0x1.8p23f);
  const f32 shifted = x * c + shift, n = shifted - shift, r = x * c - n;
  f32 y = 1.326472731307149e-3f * r + 9.671512991189957e-3f;
  y = y * r + 5.550733581185341e-2f;
  y = y * r + 2.402224242687225e-1f;
  y = y * r + 6.931470036506653e-1f;
  y = y * r + 1.0f;
#if defined(__AVX512F__)
  return _mm512_scalef_ps(y, n);
#else
  return y * bit_cast<f32>((bit_cast<i32>(shifted) << 23) + 0x3f800000);
#endif
}

// A row of logits, whose z are logits / temperature. Division by it keeps their order, so that the
// greatest z is that of the greatest logit. Chunks are whole: behind the last logit is -inf.
template <class T>
class Row {
 public:
  const int64_t v, chunks, blocks;
  float best;                     // the greatest z, or not finite where none can be drawn
  double total;                   // sum of e^(z - best)
  std::unique_ptr<float[]> peak;  // the greatest z of each block

  explicit Row(const Sample& p)
      : v(p.v),
        chunks((v + kChunk - 1) / kChunk),
        blocks(chunks * kLanes),
        peak(new float[blocks]),
        step_(p.logits.stride[1]),
        copied_(step_ == 1 ? v / kChunk : 0),
        copy_(new T[(chunks - copied_) * kChunk]),
        base_(new float[chunks + kLanes]),
        sum_(new float[chunks + kLanes]) {}

  void start(const char* logits, float temperature) {
    logits_ = reinterpret_cast<const T*>(logits);
    temperature_ = temperature;
    per_logit_ = std::min<float>(kLog2e / temperature, -kLowest);
    least_ = std::max(-125.0f / per_logit_, kLowest);
  }

  // Reads a slice.
  void scan(Slice slice) {
    for (int64_t chunk = slice.first; chunk < slice.last; ++chunk) {
      if (chunk >= copied_) copy(chunk);
      const T* x = at(chunk * kLanes);
      f32 most[kLanes];
      for (int b = 0; b < kLanes; ++b) {
        most[b] = splat(-kInfinity);
        for (int i = 0; i < kBlock; i += kLanes) most[b] = max(load(x + b * kBlock + i), most[b]);
      }
      const f32 peaks = max_each(most, kLanes);
      store(&peak[chunk * kLanes], peaks / temperature_);
      const f32 base = max(max_lanes(peaks), splat(kLowest));
      f32 sums[kUnroll] = {};
      for (int i = 0; i < kChunk; i += kUnroll * kLanes)
        for (int j = 0; j < kUnroll; ++j) sums[j] += relative(load(x + i + j * kLanes), base);
      base_[chunk] = base[0];
      sum_[chunk] = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]))[0];
    }
  }

  // What all slices give; whether a token can be drawn. A NaN shows in the total.
  bool finish() {
    const float base = *std::max_element(&base_[0], &base_[chunks]);
    best = *std::max_element(&peak[0], &peak[blocks]);
    std::fill_n(&base_[chunks], kLanes, kLowest);
    std::fill_n(&sum_[chunks], kLanes, 0.0f);
    total = 0;
    for (int64_t i = 0; i < chunks; i += kLanes) {
      const f32 here = load(&sum_[i]) * relative(load(&base_[i]), splat(base));
      for (int lane = 0; lane < kLanes; ++lane) total += here[lane];
    }
    return std::isfinite(best) && total == total;
  }

  // How far `total` may be from the sum of masses, as a part of it. Either rounds each z, by its
  // size, and each exponent, whose mean is at most log2(v); masses are rounded to integers. All of
  // it at temperatures so low, or so high, that fp32 does not hold what `relative` needs.
  double error() const {
    if (per_logit_ == -kLowest || least_ == kLowest) return 1;
    return (2 * std::fabs(best) + 128) * 0x1p-24 + v * 0x1p-41;
  }

  float z(int64_t token) const {
    return load_one(at(token / kBlock) + token % kBlock) / temperature_;
  }

  // f(z) of the tokens of each block in [first, last) whose greatest reaches `bound`.
  template <class F>
  void each(int64_t first, int64_t last, float bound, F f) const {
    float z[kBlock];
    for (int64_t b = first; b < last; ++b) {
      if (!(peak[b] >= bound)) continue;
      for (int i = 0; i < kBlock; i += kLanes) store(z + i, load(at(b) + i) / temperature_);
      f(z);
    }
  }

  // The first token with the greatest z.
  int64_t greatest() const {
    int64_t token = (std::find(&peak[0], &peak[blocks], best) - &peak[0]) * kBlock;
    while (z(token) != best) ++token;
    return token;
  }

 private:
  const T* logits_;
  float temperature_, per_logit_, least_;
  const int64_t step_, copied_;  // chunks from `copied_` on are in copy_
  std::unique_ptr<T[]> copy_;
  std::unique_ptr<float[]> base_, sum_;  // of each chunk: its greatest logit, its sum beside that

  // e^(z - z of `base`), of logits that are no greater.
  f32 relative(f32 x, f32 base) const {
    return exp2_of_product(max(splat(least_), x - base), per_logit_);
  }

  const T* at(int64_t block) const {
    const int64_t copied = block - copied_ * kLanes;
    return copied < 0 ? logits_ + block * kBlock : &copy_[copied * kBlock];
  }

  void copy(int64_t chunk) {
    T* to = &copy_[(chunk - copied_) * kChunk];
    const int64_t first = chunk * kChunk, n = std::min<int64_t>(kChunk, v - first);
    for (int64_t i = 0; i < n; ++i) to[i] = logits_[(first + i) * step_];
    for (int64_t i = n; i < kChunk; ++i) store_one(to + i, -kInfinity);
  }
};

// 2^40 e^(z - best), rounded, summed over what exceeds a bound. Each step rounds as that of the
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

  // Append those of n values, which are whole vectors, that reach `bound`.
  void append(float bound, const float* z, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
      const f32 here = load(z + i);
      size += compress(&x[size], here, here >= bound);
    }
  }

  // The greatest of all blocks of `row`, or all its tokens, that reach `bound`.
  template <class T>
  void collect_peaks(float bound, const Row<T>& row) {
    size = 0;
    append(bound, row.peak.get(), row.blocks);
  }
  template <class T>
  void collect(float bound, const Row<T>& row) {
    size = 0;
    row.each(0, row.blocks, bound, [&](const float* z) { append(bound, z, kBlock); });
  }

  template <class Weight>
  uint64_t above(float bound, Weight weight) {
    std::fill_n(&x[size], kLanes, -kInfinity);
    return weight.above(bound, x.get(), (size + kLanes - 1) / kLanes * kLanes);
  }

  struct Floor {
    float z;
    uint64_t above, kept;  // weight of what is greater, and of that and what is equal
  };

  // The least value whose strictly greater ones weigh less than `wanted`; consumes the list. Halves
  // the interval of the values left and drops the side on which the answer is not.
  template <class Weight>
  Floor floor(Weight weight, double wanted) {
    uint64_t dropped = 0;  // weight of what was dropped above
    for (;;) {
      const auto [least, most] = extremes();
      if (least == most) return {most, dropped, dropped + above(kLowest, weight)};
      float pivot = least / 2 + most / 2;
      if (!(least <= pivot && pivot < most)) pivot = least;
      const uint64_t greater = dropped + above(pivot, weight);
      const bool lower = greater < wanted;
      if (lower) dropped = greater;
      std::fill_n(&x[size], kLanes, NAN);
      int64_t left = 0;
      for (int64_t i = 0; i < size; i += kLanes) {
        const f32 value = load(&x[i]);
        left += compress(&x[left], value, lower ? value <= pivot : value > pivot);
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

// The floor of top-p alone. `mass()` is that of all tokens, and takes a pass.
template <class T, class F>
List::Floor nucleus(const Row<T>& row, float top_p, List& list, F mass) {
  const Mass weight{row.best};
  double total = row.total * 0x1p40, error = row.error();
  for (;; total = mass(), error = 0) {
    const double wanted = top_p * (total * (1 + error));
    // All v below this bound are lighter than what lies outside, with a factor 4 for rounding.
    const double outside = (1 - double(top_p)) * total / (4.0 * row.v);
    float bound = std::max<float>(kLowest, row.best + std::log(outside * 0x1p-40));
    // Enough of the greatest of blocks are enough of all tokens.
    list.collect_peaks(bound, row);
    if (list.above(kLowest, weight) >= wanted) bound = list.floor(weight, wanted).z;
    list.collect(bound, row);
    if (error * list.size > 0.25) continue;  // among so many one is likely to be in doubt
    const List::Floor floor = list.floor(weight, wanted);
    // With a lesser total the floor could be higher.
    if (error == 0 || floor.above < top_p * (total * (1 - error))) return floor;
  }
}

// The least z that passes the filters, and the mass from there on; `mass(floor)` takes a pass.
template <class T, class F>
std::pair<float, uint64_t> lowest_kept(const Row<T>& row, int64_t top_k, float top_p, float min_p,
                                       List& list, F mass) {
  const Mass weight{row.best};
  const float lowest = std::max(kLowest, static_cast<float>(row.best + std::log(double(min_p))));
  List::Floor floor{kLowest, 0, 0};
  const bool cut = top_k > 0 && top_k < row.v;
  if (cut) {
    // The k-th greatest peak is no greater than the k-th greatest value.
    list.collect_peaks(kLowest, row);
    const float bound = top_k < list.size ? list.floor(Count{}, top_k).z : kLowest;
    list.collect(bound, row);
    floor.z = list.floor(Count{}, top_k).z;
    list.collect(floor.z, row);
    floor.kept = list.above(kLowest, weight);
    if (top_p < 1) floor = list.floor(weight, top_p * static_cast<double>(floor.kept));
  } else if (top_p < 1) {
    floor = nucleus(row, top_p, list, [&] { return mass(kLowest); });
  }
  if (lowest > floor.z) return {lowest, mass(lowest)};
  return {floor.z, floor.kept};
}

// Philox4x32-10 of a row. Words are in the low halves of lanes, as products leave them.
class Noise {
 public:
  Noise(uint64_t seed, uint32_t position) {
    for (int round = 0; round < 10; ++round) {
      key_[round][0] = static_cast<uint32_t>(seed) + round * 0x9E3779B9;
      key_[round][1] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85;
    }
    // What the rounds before know of position and key alone.
    first_ = position ^ key_[0][0];
    const uint64_t product = uint64_t(first_) * kMultiplier0;
    second_high_ = (product >> 32) ^ key_[1][1], second_low_ = product;
  }

  // Whether a word of the tokens of a block is `most` or less.
  bool reaches(int64_t block, uint32_t most) const {
    u32 least = ~u32{};
    for (int i = 0; i < kVectors; ++i) {
      u64 c[4];
      draw(block * kCounters + i * kHalf, c);
      for (u64 words : c) {
        const u32 here = bit_cast<u32>(words);
        least = here < least ? here : least;
      }
    }
    return any((least | bit_cast<u32>(u64{} + 0xffffffff00000000)) <= most);
  }

  // Those words, in the order of the tokens.
  void of_block(int64_t block, uint32_t (&words)[kBlock]) const {
    for (int i = 0; i < kVectors; ++i) {
      u64 c[4];
      draw(block * kCounters + i * kHalf, c);
      for (int lane = 0; lane < kHalf; ++lane)
        for (int j = 0; j < 4; ++j) words[4 * (i * kHalf + lane) + j] = c[j][lane];
    }
  }

 private:
  static constexpr int kHalf = kLanes / 2, kCounters = kBlock / 4, kVectors = kCounters / kHalf;
  static constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  uint64_t key_[10][2], first_, second_high_, second_low_;

  void draw(uint32_t counter, u64 (&c)[4]) const {
    u64 index;
    for (int lane = 0; lane < kHalf; ++lane) index[lane] = lane;
    const u64 multiplier_0 = u64{} + kMultiplier0, multiplier_1 = u64{} + kMultiplier1;
    u64 product_0 = multiply_low(index + counter, multiplier_0);
    u64 product_1 = multiply_low(high_words(product_0) ^ key_[0][1], multiplier_1);
    c[0] = high_words(product_1) ^ key_[1][0], c[1] = product_1;
    c[2] = product_0 ^ second_high_, c[3] = u64{} + second_low_;
    for (int round = 2; round < 10; ++round) {
      product_0 = multiply_low(c[0], multiplier_0), product_1 = multiply_low(c[2], multiplier_1);
      c[0] = high_words(product_1) ^ c[1] ^ key_[round][0], c[1] = product_1;
      c[2] = high_words(product_0) ^ c[3] ^ key_[round][1], c[3] = product_0;
    }
  }
};

// Who has the greatest z + noise, the lowest id on ties.
struct Draw {
  double score;
  int64_t token;

  void meet(double z, uint32_t word, int64_t other) {
    const double here = z - std::log(-std::log1p(-(word + 0.5) * 0x1p-32));
    if (here > score || (here == score && other < token)) score = here, token = other;
  }
};

// The winner of a slice, and of who came before, among what reaches `floor`.
template <class T>
Draw draw(const Row<T>& row, float floor, const Noise& noise, Draw winner, Slice slice) {
  // -log(-log1p(-u)) <= -log(u), so by a word above 2^32 e^(z - score) nobody wins. With some slack
  // for fp32, and for sums in fp64, which are rounded, too, as shows if logits are huge.
  const double slack = 0x1p-10 + 0x1p-51 * std::fabs(row.best);
  for (int64_t chunk = slice.first; chunk < slice.last; ++chunk) {
    const f32 ahead = load(&row.peak[chunk * kLanes]) - row.best;
    const float lead = static_cast<float>(row.best - winner.score + slack);
    float bound[kLanes];
    const f32 power = min((ahead + lead) * kLog2e + 32.0f, splat(32.0f));
    store(bound, exp2_of_product(max(splat(-125.0f), power), 1));
    for (int j = 0; j < kLanes; ++j) {
      const int64_t b = chunk * kLanes + j;
      if (bound[j] < 0.5f || row.peak[b] < floor) continue;
      const uint32_t most = bound[j] < 0x1p32f ? static_cast<uint32_t>(bound[j]) : ~0u;
      if (!noise.reaches(b, most)) continue;
      uint32_t words[kBlock];
      noise.of_block(b, words);
      for (int i = 0; i < kBlock; ++i) {
        if (words[i] > most) continue;
        const int64_t token = b * kBlock + i;
        const double z = row.z(token), u = (words[i] + 0.5) * 0x1p-32;
        if (z < floor || u > std::exp(static_cast<float>(z - winner.score + slack))) continue;
        winner.meet(z, words[i], token);
      }
    }
  }
  return winner;
}

// Draws the token of row i, whose slices go to `pool`.
template <class T>
void sample_row(const Sample& p, int64_t i, Row<T>& row, List& list, const Pool& pool) {
  auto over_slices = [&](auto f) {
    pool.run(pool.threads, [&](int64_t task) {
      f(task, Slice{row.chunks * task / pool.threads, row.chunks * (task + 1) / pool.threads});
    });
  };
  const float temperature = p.temperature[i];
  const bool greedy = temperature == 0;
  row.start(p.logits.at(i), greedy ? 1 : temperature);
  over_slices([&](int64_t, Slice slice) { row.scan(slice); });
  p.token[i] = -1;
  p.logprob[i] = p.filtered_logprob[i] = NAN;
  if (!row.finish()) return;

  auto mass_from = [&](float floor) {
    std::vector<uint64_t> parts(pool.threads);
    over_slices([&](int64_t task, Slice slice) {
      row.each(slice.first * kLanes, slice.last * kLanes, floor, [&](const float* z) {
        parts[task] += Mass{row.best}.above(below(floor), z, kBlock);
      });
    });
    uint64_t sum = 0;
    for (uint64_t part : parts) sum += part;
    return sum;
  };
  // Where z are so large that their rounding shows, it has to.
  if (row.error() > 0x1p-14) row.total = mass_from(kLowest) * 0x1p-40;
  int64_t token = row.greatest();
  double log_kept = 0;
  if (!greedy) {
    const auto [floor, kept] =
        lowest_kept(row, p.top_k[i], p.top_p[i], p.min_p[i], list, mass_from);
    const float lowest = floor;  // C++17 captures no part of a pair
    log_kept = std::log(floor > kLowest ? kept * 0x1p-40 : row.total);
    const Noise noise(p.seed[i], p.position[i]);
    Draw first{-kInfinity, token};
    uint32_t words[kBlock];
    noise.of_block(token / kBlock, words);
    first.meet(row.best, words[token % kBlock], token);
    std::vector<Draw> winners(pool.threads);
    over_slices(
        [&](int64_t task, Slice slice) { winners[task] = draw(row, lowest, noise, first, slice); });
    for (const Draw& other : winners)
      if (other.score > first.score || (other.score == first.score && other.token < first.token))
        first = other;
    token = first.token;
  }
  const double behind = row.z(token) - row.best;
  p.token[i] = token;
  p.logprob[i] = static_cast<float>(behind - std::log(row.total));
  p.filtered_logprob[i] = greedy ? 0 : static_cast<float>(behind - log_kept);
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
      Row<T> row(p);
      List list(row.blocks * kBlock);
      for (int64_t i = first; i < last; ++i) sample_row<T>(p, i, row, list, slices);
    };
    pool.run(pool.threads, [&](int64_t task) { rows(task * share, (task + 1) * share, alone); });
    rows(share * pool.threads, p.b, pool);
  });
}

}  // namespace kvtools::KVTOOLS_ISA

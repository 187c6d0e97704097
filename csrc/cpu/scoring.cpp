#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "isa.h"
#include "simd.h"

namespace kvtools::KVTOOLS_ISA {
namespace {

constexpr int64_t kIgnored = -100;

// Row i of x as n contiguous fp32: in place, or widened into `buffer`.
const float* floats(const Strided<2>& x, int64_t i, int64_t n, float* buffer) {
  const float* result = buffer;
  with_type(x.type, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    const T* row = reinterpret_cast<const T*>(x.data) + i * x.stride[0];
    if (x.stride[1] != 1) {
      for (int64_t j = 0; j < n; ++j) buffer[j] = load_one(row + j * x.stride[1]);
    } else if constexpr (std::is_same_v<T, float>) {
      result = row;
    } else {
      int64_t j = 0;
      for (; j + kLanes <= n; j += kLanes) store(buffer + j, load(row + j));
      for (; j < n; ++j) buffer[j] = load_one(row + j);
    }
  });
  return result;
}

float bias_of(const Strided<1>& bias, int64_t i) {
  float value = 0;
  if (bias.data)
    with_type(bias.type, [&](auto* kind) {
      value = load_one(reinterpret_cast<decltype(kind)>(bias.data) + i * bias.stride[0]);
    });
  return value;
}

float dot(const float* x, const float* y, int64_t n) {
  f32 sum = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load(x + i) * load(y + i);
  const int left = n - i;
  if (left) sum += load_part(x + i, left) * load_part(y + i, left);
  return sum_lanes(sum)[0];
}

// Log-odds from the logits of a head of k rows.
double margin_of(const float* logits, int64_t k) {
  const double a = logits[0];
  if (k == 1) return a;
  const double b = logits[1];
  if (k == 2) return a - b;
  const double c = logits[2], most = std::max(b, c);
  return most == -kInfinity ? most - a : most + std::log1p(std::exp(-std::abs(b - c))) - a;
}

double linked(Link link, double margin) {
  switch (link) {
    case Link::sigmoid:
      return 1 / (1 + std::exp(-margin));
    case Link::difference:
      return std::tanh(margin / 2);
    case Link::tanh:
      return std::tanh(margin);
    default:
      return margin;
  }
}

double log_sigmoid(double margin) {
  return std::min(margin, 0.0) - std::log1p(std::exp(-std::abs(margin)));
}

// The score of a rollout from its n steps.
double reduced(const StepScores& p, const float* margin, const float* prob, int64_t n) {
  if (n == 0) return NAN;
  auto sum = [&](auto f) {
    double total = 0;
    for (int64_t s = 0; s < n; ++s) total += f(s);
    return total;
  };
  // A NaN, once met, stays.
  auto extreme = [&](auto better) {
    double best = prob[0];
    for (int64_t s = 1; s < n; ++s)
      if (better(prob[s], best) || std::isnan(prob[s])) best = prob[s];
    return best;
  };
  auto least = [&] { return extreme([](double a, double b) { return a < b; }); };
  switch (p.reduce) {
    case Reduce::last:
      return prob[n - 1];
    case Reduce::min:
      return least();
    case Reduce::max:
      return extreme([](double a, double b) { return a > b; });
    case Reduce::mean:
      return sum([&](int64_t s) { return prob[s]; }) / n;
    case Reduce::sum:
      return sum([&](int64_t s) { return prob[s]; });
    // From margins: log(sigmoid(margin)) keeps what a probability rounded to 1 has lost.
    case Reduce::prod:
      return std::exp(sum([&](int64_t s) { return log_sigmoid(margin[s]); }));
    case Reduce::gmean:
      return std::exp(sum([&](int64_t s) { return log_sigmoid(margin[s]); }) / n);
    case Reduce::sum_logit:
      return sum([&](int64_t s) { return margin[s]; });
    default: {
      const double floor = least();
      auto weight = [&](int64_t s) { return std::exp((floor - prob[s]) / p.temperature); };
      return sum([&](int64_t s) { return weight(s) * prob[s]; }) / sum(weight);
    }
  }
}

// The matrix product of `token_logprobs`: kRows ids at a time against kVectors vectors of tokens,
// which fills the registers, over so much of the model's width that the tokens stay in L1.
constexpr int kRows = 6, kVectors = kLanes == 16 ? 4 : 2, kPanel = kVectors * kLanes;
constexpr int64_t kCached = 8192;         // numbers
constexpr int kTile = 8 * kRows;          // ids whose logits are held at once
constexpr int64_t kSegment = 16 * kTile;  // ids to a task: fixed, so that threads do not show
constexpr int64_t kTokens = 1024;         // tokens for which the head is read once

// tile[r, c] += weight[r] . x[:, c] for kRows ids and `Vectors` vectors of tokens.
template <int Vectors>
void multiply_add(const float* const* weight, const float* x, int64_t depth, float* tile) {
  constexpr int width = Vectors * kLanes;
  f32 sum[kRows][Vectors];
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < Vectors; ++c) sum[r][c] = load(tile + r * width + c * kLanes);
  for (int64_t i = 0; i < depth; ++i) {
    f32 column[Vectors];
    for (int c = 0; c < Vectors; ++c) column[c] = load(x + i * width + c * kLanes);
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < Vectors; ++c) sum[r][c] += weight[r][i] * column[c];
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < Vectors; ++c) store(tile + r * width + c * kLanes, sum[r][c]);
}

// The logits of kTile ids for a panel of m-wide tokens.
template <int Vectors>
void multiply(const float* const* weight, const float* panel, int64_t m, float* tile) {
  constexpr int width = Vectors * kLanes;
  std::fill_n(tile, kTile * width, 0.0f);
  constexpr int64_t depth = kCached / width;
  for (int64_t i = 0; i < m; i += depth)
    for (int r = 0; r < kTile; r += kRows) {
      const float* rows[kRows];
      for (int j = 0; j < kRows; ++j) rows[j] = weight[r + j] + i;
      multiply_add<Vectors>(rows, panel + i * width, std::min(depth, m - i), tile + r * width);
    }
}

template <int Vectors = kVectors>
void multiply(int vectors, const float* const* weight, const float* panel, int64_t m, float* tile) {
  if (vectors == Vectors)
    multiply<Vectors>(weight, panel, m, tile);
  else if constexpr (Vectors > 1)
    multiply<Vectors - 1>(vectors, weight, panel, m, tile);
}

// At most kTokens tokens, those of a panel side by side: [panel][m][token]. The last panel is as
// wide as it must be.
struct Panels {
  std::vector<float> x;
  int64_t size, m;

  Panels(const Strided<2>& hidden, const int64_t* token, int64_t size, int64_t m, const Pool& pool)
      : x(vectors(size) * kLanes * m), size(size), m(m) {
    pool.run(count(), [&](int64_t panel) {
      std::vector<float> buffer(m);
      const int64_t first = panel * kPanel;
      for (int64_t t = first; t < std::min(size, first + kPanel); ++t) {
        const float* row = floats(hidden, token[t], m, buffer.data());
        for (int64_t i = 0; i < m; ++i) x[first * m + i * width(panel) + t - first] = row[i];
      }
    });
  }

  static int64_t vectors(int64_t size) { return (size + kLanes - 1) / kLanes; }
  int64_t count() const { return (size + kPanel - 1) / kPanel; }
  int64_t width(int64_t panel) const {
    return std::min<int64_t>(kPanel, vectors(size) * kLanes - panel * kPanel);
  }
};

// What is known of some tokens' logits: sum e^x of x = logit - peak; and where entropies are wanted
// sum x e^x, and the first id with the peak.
struct Partial {
  std::vector<float> peak, sum, weighted;
  std::vector<int32_t> best;

  Partial(int64_t size, bool entropies)
      : peak(size, std::numeric_limits<float>::lowest()),
        sum(size),
        weighted(entropies ? size : 0),
        best(weighted.size()) {}

  // Add the n ids from `first` on, of a tile, to the vector of tokens at `offset`; the tile becomes
  // final logits.
  void add(const float* bias, float softcap, int32_t first, int n, float* tile, int64_t width,
           int64_t offset) {
    const f32 before = load(&peak[offset]);
    f32 most = before, total = {};
    for (int r = 0; r < n; ++r) {
      f32 logit = load(tile + r * width) + bias[r];
      if (softcap > 0) logit = softcap * tanh(logit / softcap);
      store(tile + r * width, logit);
      most = max(logit, most);
    }
    const f32 moved = exp2((before - most) * kLog2e);
    if (weighted.empty()) {
      for (int r = 0; r < n; ++r) total += exp2((load(tile + r * width) - most) * kLog2e);
    } else {
      // Of ids that are ruled out x e^x is 0, not NaN.
      auto finite = [](f32 x) { return max(x, splat(-1e30f)); };
      i32 id;
      std::memcpy(&id, &best[offset], sizeof id);
      f32 highest = before, sum_x = {};
      for (int r = 0; r < n; ++r) {
        const f32 logit = load(tile + r * width), x = logit - most, mass = exp2(x * kLog2e);
        id = logit > highest ? i32{} + (first + r) : id;
        highest = max(logit, highest);
        total += mass;
        sum_x += mass * finite(x);
      }
      const f32 old = load(&weighted[offset]) + load(&sum[offset]) * finite(before - most);
      store(&weighted[offset], old * moved + sum_x);
      std::memcpy(&best[offset], &id, sizeof id);
    }
    store(&sum[offset], load(&sum[offset]) * moved + total);
    store(&peak[offset], most);
  }
};

// out[t] += sign * log softmax(logits)[target], for `size` tokens that are at most kTokens; and if
// `entropies`, what else is wanted of the model.
void add_logprobs(const LanguageHead& head, const TokenLogprobs& p, const int64_t* token,
                  int64_t size, float sign, bool entropies, const Pool& pool) {
  const Panels panels(head.hidden, token, size, head.m, pool);
  const int64_t segments = (head.v + kSegment - 1) / kSegment;
  std::vector<Partial> partials(segments, Partial(Panels::vectors(size) * kLanes, entropies));
  std::vector<float> chosen(size);
  pool.run(segments, [&](int64_t segment) {
    std::vector<float> buffer(kTile * head.m), tile(kTile * kPanel);
    const int64_t end = std::min(head.v, (segment + 1) * kSegment);
    for (int64_t v = segment * kSegment; v < end; v += kTile) {
      const int n = std::min<int64_t>(kTile, end - v);
      const float* weight[kTile];
      float bias[kTile];
      for (int r = 0; r < kTile; ++r) {
        const int64_t row = std::min(v + r, end - 1);  // the last stands in for those behind it
        weight[r] = floats(head.weight, row, head.m, &buffer[r * head.m]);
        bias[r] = bias_of(head.bias, row);
      }
      for (int64_t panel = 0; panel < panels.count(); ++panel) {
        const int64_t first = panel * kPanel, width = panels.width(panel);
        multiply(width / kLanes, weight, &panels.x[first * head.m], head.m, tile.data());
        for (int64_t c = 0; c < width; c += kLanes)
          partials[segment].add(bias, p.softcap, v, n, &tile[c], width, first + c);
        for (int64_t t = first; t < std::min(size, first + width); ++t) {
          const int64_t r = p.target[token[t]] - v;
          if (0 <= r && r < n) chosen[t] = tile[r * width + t - first];
        }
      }
    }
  });
  for (int64_t t = 0; t < size; ++t) {
    double peak = -kInfinity, sum = 0, weighted = 0;
    const Partial* highest = nullptr;
    for (const Partial& part : partials)
      if (part.peak[t] > peak) {
        highest = &part;
        peak = part.peak[t];
      }
    for (const Partial& part : partials) {
      const double x = part.peak[t] - peak, mass = std::exp(x);
      sum += part.sum[t] * mass;
      if (entropies) weighted += mass * (part.weighted[t] + part.sum[t] * x);
    }
    p.logprob[token[t]] += sign * static_cast<float>(chosen[t] - (peak + std::log(sum)));
    if (!entropies) continue;
    p.entropy[token[t]] = std::log(sum) - weighted / sum;
    p.greedy[token[t]] = highest->best[t] == p.target[token[t]];
  }
}

}  // namespace

void step_scores(const StepScores& p, const Pool& pool) {
  std::vector<float> widened(p.k * p.m);
  const float* head[3];
  for (int64_t k = 0; k < p.k; ++k) head[k] = floats(p.weight, k, p.m, &widened[k * p.m]);
  // A thread is worth waking for some ten microseconds of work.
  pool.split(p.s, (1 << 17) / std::max<int64_t>(p.m, 1), [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(p.m);
    for (int64_t s = begin; s < end; ++s) {
      const float* row = floats(p.hidden, p.step[s], p.m, buffer.data());
      float logits[3] = {};
      for (int64_t k = 0; k < p.k; ++k) logits[k] = dot(row, head[k], p.m) + bias_of(p.bias, k);
      p.margin[s] = margin_of(logits, p.k);
      p.prob[s] = linked(p.link, p.margin[s]);
    }
  });
  for (int64_t r = 0; r < p.r; ++r) {
    const int64_t first = p.cu_steps[r];
    p.score[r] = reduced(p, p.margin + first, p.prob + first, p.cu_steps[r + 1] - first);
  }
}

void token_logprobs(const TokenLogprobs& p, const Pool& pool) {
  std::fill_n(p.logprob, p.t, 0.0f);
  if (p.entropy) {
    std::fill_n(p.entropy, p.t, 0.0f);
    std::fill_n(p.greedy, p.t, false);
  }
  std::vector<int64_t> token;
  for (int64_t t = 0; t < p.t; ++t)
    if (p.target[t] != kIgnored) token.push_back(t);
  for (size_t first = 0; first < token.size(); first += kTokens) {
    const int64_t size = std::min<int64_t>(kTokens, token.size() - first);
    add_logprobs(p.model, p, &token[first], size, 1, p.entropy, pool);
    if (p.reference.hidden.data) add_logprobs(p.reference, p, &token[first], size, -1, false, pool);
  }
  for (int64_t x = 0; x < p.x; ++x) {
    double sum = 0;
    for (int64_t t = p.cu_seqlens[x]; t < p.cu_seqlens[x + 1]; ++t) sum += p.logprob[t];
    p.sum[x] = sum;
  }
}

}  // namespace kvtools::KVTOOLS_ISA

// Scores of reasoning steps: a warp per step, then one per rollout.
#include <type_traits>

#include "format.h"
#include "kernels.h"
#include "warp.h"

namespace kvtools::cuda {
namespace {

constexpr int kWarps = 2;  // of a block: 256 steps are for all of a GPU

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

// A row of m numbers, with zeros behind it. A lane reads `kTogether` at once, and so `kAhead` times
// before it waits. These are contiguous and aligned, and m is a multiple of kTogether.
template <class T>
struct Vectors {
  static constexpr int kTogether = 8;
  struct alignas(16) Part {
    T x[kTogether];

    __device__ float operator[](int i) const { return to_float(x[i]); }
  };
  static constexpr int kAhead = 64 / sizeof(Part);
  const Part* data;
  int64_t m;

  __device__ Vectors(const Strided<2>& x, int64_t row, int64_t m)
      : data(reinterpret_cast<const Part*>(x.at(row))), m(m) {}

  __device__ Part at(int64_t first) const { return first < m ? data[first / kTogether] : Part{}; }
};

// Any row.
struct Numbers {
  static constexpr int kTogether = 1, kAhead = 4;
  struct Part {
    float x;

    __device__ float operator[](int) const { return x; }
  };
  const Strided<2>& x;
  int64_t row, m;

  __device__ Numbers(const Strided<2>& x, int64_t row, int64_t m) : x(x), row(row), m(m) {}

  __device__ Part at(int64_t i) const { return {i < m ? number_at(x.at(row, i), x.type) : 0}; }
};

__device__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// Log-odds by a head of K rows.
template <int K, class Hidden, class Head>
__device__ float margin_of(const StepScores& p, int64_t row) {
  constexpr int kStride = kWarp * Hidden::kTogether;
  constexpr int kAhead = Hidden::kAhead < Head::kAhead ? Hidden::kAhead : Head::kAhead;
  const Hidden hidden(p.hidden, row, p.m);
  float logit[K] = {};
  for (int64_t start = 0; start < p.m; start += kAhead * kStride) {
    const int64_t first = start + lane_index() * Hidden::kTogether;
    typename Hidden::Part x[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) x[j] = hidden.at(first + j * kStride);
    __syncwarp();  // or the compiler would put off reading, to save registers
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const auto y = Head(p.weight, k, p.m).at(first + j * kStride);
#pragma unroll
        for (int i = 0; i < Hidden::kTogether; ++i) logit[k] = fmaf(x[j][i], y[i], logit[k]);
      }
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    logit[k] = sum(logit[k]);
    if (p.bias.data) logit[k] += number_at(p.bias.at(k), p.bias.type);
  }
  if constexpr (K == 1) return logit[0];
  if constexpr (K == 2) return logit[0] - logit[1];
  if constexpr (K == 3) {
    const float a = logit[1], b = logit[2];
    const float gap = a == b ? 0 : fabsf(a - b);  // of infinities, too
    return fmaxf(a, b) + log1pf(expf(-gap)) - logit[0];
  }
}

__device__ float linked(Link link, float margin) {
  switch (link) {
    case Link::sigmoid:
      return 1 / (1 + expf(-margin));
    case Link::difference:
      return tanhf(margin / 2);
    case Link::tanh:
      return tanhf(margin);
    default:
      return margin;
  }
}

// The score of a rollout, by one warp and so always in the same order.
__device__ float reduced(const StepScores& p, int64_t begin, int64_t end) {
  if (begin >= end) return NAN;
  const float count = static_cast<float>(end - begin);
  auto total = [&](auto f) {
    float x = 0;
    for (int64_t s = begin + lane_index(); s < end; s += kWarp) x += f(s);
    return sum(x);
  };
  auto extreme = [&](auto better) {
    // A NaN, once met, stays.
    auto best = [&](float a, float b) { return better(b, a) || b != b ? b : a; };
    float x = p.prob[begin];
    for (int64_t s = begin + lane_index(); s < end; s += kWarp) x = best(x, p.prob[s]);
    return reduce(x, best);
  };
  auto less = [](float a, float b) { return a < b; };
  auto prob = [&](int64_t s) { return p.prob[s]; };
  auto margin = [&](int64_t s) { return p.margin[s]; };
  // From margins: log(sigmoid(margin)) keeps what a probability rounded to 1 has lost.
  auto log_prob = [&](int64_t s) { return -softplus(-p.margin[s]); };
  switch (p.reduce) {
    case Reduce::last:
      return p.prob[end - 1];
    case Reduce::min:
      return extreme(less);
    case Reduce::max:
      return extreme([](float a, float b) { return a > b; });
    case Reduce::mean:
      return total(prob) / count;
    case Reduce::sum:
      return total(prob);
    case Reduce::prod:
      return expf(total(log_prob));
    case Reduce::gmean:
      return expf(total(log_prob) / count);
    case Reduce::sum_logit:
      return total(margin);
    default: {
      const float least = extreme(less), temperature = static_cast<float>(p.temperature);
      auto weight = [&](int64_t s) { return expf((least - p.prob[s]) / temperature); };
      return total([&](int64_t s) { return weight(s) * p.prob[s]; }) / total(weight);
    }
  }
}

// The index of a warp among those of all blocks.
__device__ int64_t warp_index() { return int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; }

// Eight blocks: with no such number the compiler spills, to save registers that nobody misses.
template <int K, class Hidden, class Head>
__global__ void __launch_bounds__(kWarps* kWarp, 8)
    step_margins_kernel(__grid_constant__ const StepScores p) {
  const int64_t s = warp_index();
  if (s >= p.s) return;
  // Nobody has read the indices: what they say must not lead outside.
  const int64_t row = p.step[s];
  const bool there = row >= 0 && row < p.t;
  const float margin = there ? margin_of<K, Hidden, Head>(p, row) : NAN;
  if (lane_index() == 0) p.margin[s] = margin, p.prob[s] = linked(p.link, margin);
}

__global__ void __launch_bounds__(kWarps* kWarp)
    step_scores_kernel(__grid_constant__ const StepScores p) {
  const int64_t r = warp_index();
  if (r >= p.r) return;
  const int64_t begin = max(p.cu_steps[r], int64_t(0)), end = min(p.cu_steps[r + 1], p.s);
  const float score = reduced(p, begin, end);
  if (lane_index() == 0) p.score[r] = score;
}

template <class Hidden, class Head>
void run(const StepScores& p, void* stream) {
  auto* margins = p.k == 1   ? step_margins_kernel<1, Hidden, Head>
                  : p.k == 2 ? step_margins_kernel<2, Hidden, Head>
                             : step_margins_kernel<3, Hidden, Head>;
  if (p.s) launch("step_scores", margins, blocks_of(p.s, kWarps), kWarps * kWarp, 0, stream, p);
  launch("step_scores", step_scores_kernel, blocks_of(p.r, kWarps), kWarps * kWarp, 0, stream, p);
}

bool in_vectors(const Strided<2>& x, int64_t m) {
  return m % Vectors<float>::kTogether == 0 && x.stride[1] == 1 &&
         x.stride[0] * size_of(x.type) % 16 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

}  // namespace

void step_scores(const StepScores& p, void* stream) {
  const bool vectors = in_vectors(p.hidden, p.m) && in_vectors(p.weight, p.m);
  auto run_with = [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    if (vectors && p.weight.type == p.hidden.type)
      run<Vectors<T>, Vectors<T>>(p, stream);
    else if (vectors && p.weight.type == Type::f32)
      run<Vectors<T>, Vectors<float>>(p, stream);
    else
      run<Numbers, Numbers>(p, stream);
  };
  switch (p.hidden.type) {
    case Type::f32:
      return run_with(static_cast<float*>(nullptr));
    case Type::bf16:
      return run_with(static_cast<__nv_bfloat16*>(nullptr));
    default:
      return run_with(static_cast<__half*>(nullptr));
  }
}

}  // namespace kvtools::cuda

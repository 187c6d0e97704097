// Sampling in four launches.
//
// One block per row would leave most of a GPU idle. So `scan` spreads the rows over all of it: it
// reads the logits, a warp per group of 256, and leaves a few facts about each group. `finish`, a
// block per row, then reads again the few groups that matter: by their greatest where there are
// filters, else by a bound on what their tokens can score. In between `bound` draws the noise of
// rows without filters, where the greatest of a group lets it win, and reads only what may. What
// top-p alone keeps depends on all tokens: for such rows `weigh` reads the logits once more, and
// says in which narrow bin the floor lies. All of it is exact: bounds only tell where to look, and
// sums that decide are those of integers.
#include <cfloat>
#include <climits>

#include "row.h"

namespace kvtools::cuda {
namespace {

using Group = Sampling::Group;

constexpr int kBins = Sampling::kBins;
constexpr int kWarps = 8;           // of a block
constexpr int kFinishWarps = 16;    // of one of `finish`, if the row has as many groups
constexpr int kRounds = 4;          // groups that a warp weighs
constexpr int kNoiseRounds = 8;     // groups of which a warp draws noise
constexpr int kListed = 4096;       // values that a search keeps in shared memory
constexpr float kMassless = 29;     // so far below the best, mass rounds to zero
constexpr float kSlack = 0x1p-10f;  // for the errors of bounds on scores

// Bins are equally wide, from the best down; all that is lower is in the last.
struct Bins {
  bool by_mass;
  float best, per_z;

  // The nucleus holds no token with less than an equal share of what may be left out.
  __device__ Bins(const Row& row, float best)
      : by_mass(!row.cut()),
        best(best),
        per_z((kBins - 1) / (by_mass ? logf(row.v / (1 - row.top_p)) : kMassless)) {}

  __device__ int of(float z) const {
    return static_cast<int>(fminf((best - z) * per_z, kBins - 1));
  }
  // No more than what is in bin i, however that was rounded.
  __device__ float low(int i) const {
    return i == kBins - 1 ? -FLT_MAX : fmaxf(best - (i + 2) / per_z, -FLT_MAX);
  }
};

// f of all threads' x, in every thread; `none` is what f ignores. f must not mind the order.
template <class T, class F>
__device__ T over_block(T x, T none, F f, void* staged) {
  T* of_warp = static_cast<T*>(staged);
  const int lane = lane_index(), warps = blockDim.x / kWarp;
  x = reduce(x, f);
  __syncthreads();  // others may still read what was staged before
  if (lane == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  if (lane < warps) none = of_warp[lane];
  return reduce(none, f);
}

template <class T>
__device__ T greatest_of_block(T x, void* staged) {
  return over_block(x, -static_cast<T>(INFINITY), [](T a, T b) { return a > b ? a : b; }, staged);
}

template <class T>
__device__ T sum_of_block(T x, void* staged) {
  return over_block(x, T(0), [](T a, T b) { return a + b; }, staged);
}

__device__ float best_of(const Group* group, int groups, void* staged) {
  float best = -INFINITY;
  for (int g = threadIdx.x; g < groups; g += blockDim.x) best = fmaxf(best, group[g].peak);
  return greatest_of_block(best, staged);
}

// The facts about each group, but for noise.
__global__ void __launch_bounds__(kWarps* kWarp) scan_kernel(__grid_constant__ const Sampling s) {
  const int64_t i = blockIdx.x;
  const Row row(s.p, i);
  if (blockIdx.y == 0 && threadIdx.x < kBins) s.bin[i * kBins + threadIdx.x] = 0;
  const int g = blockIdx.y * kWarps + threadIdx.x / kWarp;
  if (g >= row.groups) return;
  float x[kEach], base = -INFINITY, total = 0;
  row.load_logits(g * kGroup + lane_index() * kEach, x);
#pragma unroll
  for (float here : x) base = fmaxf(base, here);
  base = greatest(base);
  // Division keeps their order, so that only the greatest is divided; but for quotients whose
  // rounding shows, divisors that have no inverse, and logits whose differences fp32 does not hold.
  const float divisor = row.greedy() ? 1 : row.temperature, peak = base / divisor;
  float per_logit = kLog2e / divisor;
  if (divisor < 0x1p-100f || divisor > 0x1p100f || !(fabsf(peak) <= 512)) {
    divide(x, divisor);
    base = peak == -INFINITY ? 0 : peak;
    per_logit = kLog2e;
  }
#pragma unroll
  for (float here : x) total += exp2_approximately((here - base) * per_logit);
  total = sum(total);  // NaN if any logit is
  if (lane_index() == 0) s.group[i * row.groups + g] = {peak, total, 0};
}

// The score of the token with the greatest z, which that of the winner reaches, in every thread.
__device__ double score_of_best(const Row& row, const Noise& noise, const Group* group, float best,
                                void* staged) {
  int g = INT_MAX;
  for (int other = threadIdx.x; other < row.groups; other += blockDim.x)
    if (group[other].peak == best) g = min(g, other);
  g = over_block(g, INT_MAX, [](int a, int b) { return min(a, b); }, staged);
  double score = -INFINITY;
  if (threadIdx.x < kWarp && g < row.groups) {
    float z[kEach];
    const int first = g * kGroup + lane_index() * kEach;
    row.load(first, z);
    int token = INT_MAX;
#pragma unroll
    for (int j = kEach - 1; j >= 0; --j)
      if (z[j] == best) token = first + j;
    token = reduce(token, [](int a, int b) { return min(a, b); });
    uint32_t word[4];
    noise.draw(token & ~3, word);
    const int at = token & 3;  // no index, for which the words would go to memory
    score = score_of(best, at < 2 ? (at ? word[1] : word[0]) : (at == 2 ? word[2] : word[3]));
  }
  return greatest_of_block(score, staged);
}

// For rows without filters, bounds on what the tokens of each group can score, where that is
// enough.
__global__ void __launch_bounds__(kWarps* kWarp) bound_kernel(__grid_constant__ const Sampling s) {
  KVTOOLS_SHARED(double, staged);
  const int64_t i = blockIdx.x;
  const Row row(s.p, i);
  if (!row.noisy()) return;
  const Noise noise(s.p, i);
  Group* group = s.group + i * row.groups;
  const float best = best_of(group, row.groups, &staged);
  if (!(fabsf(best) < INFINITY)) return;
  const double score = score_of_best(row, noise, group, best, &staged);
  const float lead = static_cast<float>(best - score + kSlack + 0x1p-51 * fabsf(best));
  for (int round = 0; round < kNoiseRounds; ++round) {
    const int g = (blockIdx.y * kNoiseRounds + round) * kWarps + threadIdx.x / kWarp;
    if (g >= row.groups) return;
    // By a word of more than 2^32 e^(z - score) nobody wins: -log(-log(1 - u)) <= -log(u).
    const float most = 0x1p32f * relative(group[g].peak - best, -lead);
    if (most < 0.5f) continue;
    const int first = g * kGroup + lane_index() * kEach;
    uint32_t word[kEach], least = ~0u;
    noise.draw(first, word), noise.draw(first + 4, word + 4);
#pragma unroll
    for (uint32_t here : word) least = min(least, here);
    if (!__any_sync(kAll, static_cast<float>(least) <= most)) continue;
    float z[kEach], bound = 0;
    row.load(first, z);
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      bound = fmaxf(bound, bound_of(relative(z[j], group[g].peak), word[j]));
    bound = greatest(bound);
    if (lane_index() == 0) group[g].bound = bound;
  }
}

struct WeighShared {
  uint32_t low[kRounds][kBins], high[kRounds][kBins];
  double staged[kWarps];
};

// What is in each bin of a row.
__global__ void __launch_bounds__(kWarps* kWarp) weigh_kernel(__grid_constant__ const Sampling s) {
  KVTOOLS_SHARED(WeighShared, shared);
  const int64_t i = blockIdx.x;
  const Row row(s.p, i);
  if (!row.binned()) return;
  const Group* group = s.group + i * row.groups;
  const Bins bins(row, best_of(group, row.groups, shared.staged));
  for (int j = threadIdx.x; j < kRounds * kBins; j += kWarps * kWarp)
    shared.low[0][j] = shared.high[0][j] = 0;
  __syncthreads();
  // Sums of 2,048 masses: of their low 21 bits, and of those above. Both fit in 32 bits, of which
  // shared memory adds fast.
  constexpr int kLow = 21;
  static_assert(kWarps * kGroup <= 1 << (32 - kLow));
  Mass rest = 0;
  for (int round = 0; round < kRounds; ++round) {
    const int g = (blockIdx.y * kRounds + round) * kWarps + threadIdx.x / kWarp;
    if (g >= row.groups || !(bins.best - group[g].peak < kMassless)) continue;
    float z[kEach];
    row.load(g * kGroup + lane_index() * kEach, z);
#pragma unroll
    for (float here : z) {
      const Mass mass = bins.by_mass ? mass_of(here, bins.best) : 1;
      const int bin = bins.of(here);
      if (bin == kBins - 1) {
        rest += mass;
      } else {
        atomicAdd(&shared.low[round][bin], static_cast<uint32_t>(mass) & ((1u << kLow) - 1));
        atomicAdd(&shared.high[round][bin], static_cast<uint32_t>(mass >> kLow));
      }
    }
  }
  rest = sum(rest);
  Mass* all = s.bin + i * kBins;
  if (lane_index() == 0 && rest) atomicAdd(&all[kBins - 1], rest);
  __syncthreads();
  if (threadIdx.x < kBins - 1) {
    Mass mass = 0;
    for (int round = 0; round < kRounds; ++round)
      mass += (static_cast<Mass>(shared.high[round][threadIdx.x]) << kLow) +
              shared.low[round][threadIdx.x];
    if (mass) atomicAdd(&all[threadIdx.x], mass);
  }
}

// What a round of a search finds: the weight above its pivot, and the values next to it.
struct Cut {
  Mass weight;
  float below, above;
};

__device__ Cut across(Cut x, int distance) {
  return {cuda::across(x.weight, distance), cuda::across(x.below, distance),
          cuda::across(x.above, distance)};
}

struct Draw {
  double score;
  int token;
};

__device__ Draw across(Draw x, int distance) {
  return {cuda::across(x.score, distance), cuda::across(x.token, distance)};
}

struct FinishShared {
  float list[kListed];
  int size;
  alignas(16) char staged[kFinishWarps * sizeof(Cut)];
};

// The block of a row.
struct Finish {
  const Row row;
  const Noise noise;
  const Group* group;
  const Mass* bin;
  FinishShared& shared;
  float best;

  __device__ Finish(const Sampling& s, int64_t i, FinishShared& shared)
      : row(s.p, i),
        noise(s.p, i),
        group(s.group + i * row.groups),
        bin(s.bin + i * kBins),
        shared(shared),
        best(best_of(group, row.groups, shared.staged)) {}

  // Sum of e^(z - best).
  __device__ double total() const {
    double total = 0;
    for (int g = threadIdx.x; g < row.groups; g += blockDim.x)
      total += group[g].sum * expf(group[g].peak - best);
    return sum_of_block(total, shared.staged);
  }

  // Of z, or where there are no filters of z + noise: no token of group g has more.
  __device__ float bound(int g) const {
    return row.noisy() ? group[g].peak + logf(group[g].bound) : group[g].peak;
  }

  // f(first token, z of it and of the seven behind it) for the groups whose bound reaches `low`.
  // Warps are whole when they call f.
  template <class F>
  __device__ void sweep(float low, F f) const {
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
    for (int base = warp; base < row.groups; base += blockDim.x) {
      const int g = base + lane_index() * warps;
      unsigned left = __ballot_sync(kAll, g < row.groups && bound(g) >= low);
      for (; left; left &= left - 1) {
        const int first = (base + (__ffs(left) - 1) * warps) * kGroup + lane_index() * kEach;
        float z[kEach];
        row.load(first, z);
        f(first, z);
      }
    }
  }

  // A search goes on among values between `least` and `most`: tokens, perhaps of one bin only, or
  // the greatest of the groups. Their weight is mass or number; `above` is that of greater ones.
  struct Search {
    bool peaks, by_mass;
    int bin;  // or -1
    float least, most;
    Mass above;
  };

  // f of all values of a search, and of some that are not between its ends.
  template <class F>
  __device__ void each(const Search& in, const Bins& bins, F f) const {
    if (in.peaks) {
      for (int g = threadIdx.x; g - lane_index() < row.groups; g += blockDim.x)
        f(g < row.groups ? group[g].peak : -INFINITY);
    } else {
      sweep(in.least, [&](int, const float (&z)[kEach]) {
#pragma unroll
        for (float here : z) f(in.bin < 0 || bins.of(here) == in.bin ? here : -INFINITY);
      });
    }
  }

  // Puts the values of a search into the list; how many there are, even if not all fit.
  __device__ int list(const Search& in, const Bins& bins) const {
    if (threadIdx.x == 0) shared.size = 0;
    __syncthreads();
    each(in, bins, [&](float z) {
      const bool inside = in.least <= z && z <= in.most;
      const int at = place_in(shared.size, inside);
      if (inside && at < kListed) shared.list[at] = z;
    });
    __syncthreads();
    return shared.size;
  }

  // The least value whose strictly greater ones weigh less than `wanted`; `least` if all do.
  __device__ float find(Search in, const Bins& bins, double wanted) const {
    int size = INT_MAX;
    while (in.least < in.most) {
      if (size > kListed) size = list(in, bins);
      float pivot = in.least / 2 + in.most / 2;
      if (!(in.least <= pivot && pivot < in.most)) pivot = in.least;
      const Cut none{0, in.least, in.most};
      Cut found = none;
      auto meet = [&](float z) {
        if (!(in.least <= z && z <= in.most)) return;
        if (z > pivot) {
          found.weight += in.by_mass ? mass_of(z, best) : 1;
          found.above = fminf(found.above, z);
        } else {
          found.below = fmaxf(found.below, z);
        }
      };
      if (size > kListed)
        each(in, bins, meet);
      else
        for (int i = threadIdx.x; i < size; i += blockDim.x) meet(shared.list[i]);
      auto join = [](Cut a, Cut b) {
        return Cut{a.weight + b.weight, fmaxf(a.below, b.below), fminf(a.above, b.above)};
      };
      found = over_block(found, none, join, shared.staged);
      const Mass greater = in.above + found.weight;
      if (static_cast<double>(greater) < wanted)
        in.most = found.below, in.above = greater;
      else
        in.least = found.above;
    }
    return in.most;
  }

  // Narrows a search to the bin in which it ends. For mass, `wanted` is a share, and is turned into
  // that of all.
  __device__ void narrow(Search& in, const Bins& bins, double& wanted) const {
    constexpr int kOwn = kBins / kWarp;  // bins of a lane
    const int lane = lane_index();
    Mass own[kOwn], sum = 0;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) sum += own[j] = bin[lane * kOwn + j];
    Mass before = sum_so_far(sum);
    if (in.by_mass) wanted *= static_cast<double>(__shfl_sync(kAll, before, kWarp - 1));
    before -= sum;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      if (static_cast<double>(before) < wanted) in.bin = lane * kOwn + j, in.above = before;
      before += own[j];
    }
    const unsigned reached = __ballot_sync(kAll, in.bin >= 0);
    const int last = kWarp - 1 - __clz(static_cast<int>(reached));
    in.bin = __shfl_sync(kAll, in.bin, last), in.above = __shfl_sync(kAll, in.above, last);
    in.least = bins.low(in.bin);
  }

  // The least z that passes the filters.
  __device__ float lowest_kept() const {
    const Bins bins(row, best);
    float low = -FLT_MAX;
    // The k-th greatest peak, which is no greater than the k-th greatest z; that; the nucleus.
#pragma unroll 1
    for (int step = 0; step < 3; ++step) {
      const bool by_mass = step == 2;
      if (by_mass ? row.top_p >= 1 : !row.cut() || (step == 0 && row.binned())) continue;
      Search in{step == 0, by_mass, -1, low, best, 0};
      double wanted = by_mass ? row.top_p : static_cast<double>(row.top_k);
      if (row.binned() && by_mass == bins.by_mass)
        narrow(in, bins, wanted);
      else if (by_mass)
        wanted *= static_cast<double>(mass_from(low));
      low = find(in, bins, wanted);
    }
    const double behind = log(static_cast<double>(row.min_p));
    return fmaxf(low, static_cast<float>(best + behind));
  }

  __device__ Mass mass_from(float floor) const {
    Mass mass = 0;
    sweep(floor, [&](int, const float (&z)[kEach]) {
#pragma unroll
      for (float here : z)
        if (here >= floor) mass += mass_of(here, best);
    });
    return sum_of_block(mass, shared.staged);
  }

  // The token with the greatest z + noise of those that reach `floor`, the lowest on ties; -1 if
  // none does, for parameters out of range. And the mass of them all, where there are filters.
  __device__ int draw(float floor, Mass& kept) const {
    // Groups that may hold the winner: at first, those with the greatest bound.
    float low = floor;
    if (row.noisy()) {
      low = -INFINITY;
      for (int g = threadIdx.x; g < row.groups; g += blockDim.x) low = fmaxf(low, bound(g));
      low = greatest_of_block(low, shared.staged);
    }
    Mass mass = 0;
    float most = -1, z_of_most = 0, enough = 0;
    uint32_t word_of_most = 0;
    const Draw none{-INFINITY, -1};
    Draw winner = none;
    auto better = [](Draw a, Draw b) {
      return a.score > b.score || (a.score == b.score && a.token < b.token) ? a : b;
    };
    // First whoever has the greatest bound, whose score is one to beat; then those that may.
#pragma unroll 1
    for (bool decide = row.greedy();; decide = true) {
      // With filters, a warp meets the tokens that it has met before.
      if (!decide || !row.filtered() || __any_sync(kAll, most >= enough))
        sweep(low, [&](int first, const float (&z)[kEach]) {
#pragma unroll
          for (int j = 0; j < kEach; j += 4) {
            if (!(fmaxf(fmaxf(z[j], z[j + 1]), fmaxf(z[j + 2], z[j + 3])) >= floor)) continue;
            uint32_t word[4];
            noise.draw(first + j, word);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const float here = z[j + k];
              if (!(here >= floor)) continue;
              const float bound = bound_of(relative(here, best), word[k]);
              if (!decide) {
                if (row.filtered()) mass += mass_of(here, best);
                if (bound > most) most = bound, z_of_most = here, word_of_most = word[k];
              } else if (bound >= enough) {
                const double score = row.greedy() ? 0 : score_of(here, word[k]);
                winner = better(winner, {score, first + j + k});
              }
            }
          }
        });
      if (decide) break;
      double score = -INFINITY;
      if (most == greatest_of_block(most, shared.staged)) score = score_of(z_of_most, word_of_most);
      score = greatest_of_block(score, shared.staged);
      // Sums in fp64 are rounded, too, which shows if logits are huge; as are those in `bound`.
      enough = expf(static_cast<float>(score - best) - kSlack - 0x1p-51f * fabsf(best));
      if (row.noisy()) low = static_cast<float>(score) - kSlack - 0x1p-22f * fabsf(best);
    }
    kept = sum_of_block(mass, shared.staged);
    return over_block(winner, none, better, shared.staged).token;
  }
};

// The token of a row and its log-probabilities.
__global__ void __launch_bounds__(kFinishWarps* kWarp, 1)
    finish_kernel(__grid_constant__ const Sampling s) {
  KVTOOLS_SHARED(FinishShared, shared);
  const int64_t i = blockIdx.x;
  const Finish finish(s, i, shared);
  const Row& row = finish.row;
  const float best = finish.best;
  const double total = finish.total();
  int token = -1;
  float logprob = NAN, filtered_logprob = NAN;
  if (fabsf(best) < INFINITY && total == total) {
    float floor = row.greedy() ? best : -FLT_MAX;
    if (row.filtered()) floor = finish.lowest_kept();
    Mass kept;
    token = finish.draw(floor, kept);
    if (threadIdx.x == 0 && token >= 0) {
      float z = number_at(row.logits + token * row.step, row.type);
      if (!row.greedy()) z /= row.temperature;
      const double behind = z - best;
      logprob = static_cast<float>(behind - log(total));
      filtered_logprob = row.greedy()     ? 0
                         : row.filtered() ? static_cast<float>(behind - log(kept * 0x1p-40))
                                          : logprob;
    }
  }
  if (threadIdx.x == 0) {
    s.p.token[i] = token;
    s.p.logprob[i] = logprob, s.p.filtered_logprob[i] = filtered_logprob;
  }
}

}  // namespace

void sample(const Sampling& s, void* stream) {
  const auto rows = static_cast<unsigned>(s.p.b);
  const auto groups = static_cast<unsigned>((s.p.v + kGroup - 1) / kGroup);
  auto parts = [&](unsigned size) { return dim3(rows, (groups + size - 1) / size); };
  launch("sample, scan", scan_kernel, parts(kWarps), kWarps * kWarp, 0, stream, s);
  launch("sample, bound", bound_kernel, parts(kWarps * kNoiseRounds), kWarps * kWarp,
         kWarps * sizeof(double), stream, s);
  launch("sample, weigh", weigh_kernel, parts(kWarps * kRounds), kWarps * kWarp,
         sizeof(WeighShared), stream, s);
  launch("sample, finish", finish_kernel, dim3(rows), std::min<int>(groups, kFinishWarps) * kWarp,
         sizeof(FinishShared), stream, s);
}

}  // namespace kvtools::cuda

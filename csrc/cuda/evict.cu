// Who goes: a block per row, KV head and part of the result.
#include <cstddef>
#include <type_traits>

#include "format.h"
#include "kernels.h"
#include "warp.h"

namespace kvtools::cuda {
namespace {

constexpr int kMostThreads = 1024, kEmpty = INT32_MAX;
constexpr int kSorted = 4096;         // keys that a block sorts in shared memory
constexpr int kPlaces = kSorted / 2;  // of the result, per block, where there are more tokens
constexpr int kSlack = kSorted / 4;   // keys sorted in vain, before these places and behind them
constexpr int kDigit = 11, kBins = 1 << kDigit;

// What a token is ordered by, as one number whose first word counts most: 2 bits of rank, 32 each
// of score and tie (64 if there are three words), 32 of position and 30 of slot. No two are equal.
template <int Words>
struct alignas(Words == 2 ? 16 : 8) Key {
  uint64_t word[Words];

  __device__ bool operator<(const Key& other) const {
    bool less = false;
#pragma unroll
    for (int i = Words - 1; i >= 0; --i)
      less = word[i] < other.word[i] || (word[i] == other.word[i] && less);
    return less;
  }
};

// An unsigned integer in the order of the number at p. Zeros are equal, and NaN comes last.
template <class Integer>
__device__ Integer order_of(const char* p, Type type) {
  constexpr Integer kSign = Integer(1) << (8 * sizeof(Integer) - 1);
  switch (type) {
    case Type::i64:
      return static_cast<Integer>(*reinterpret_cast<const int64_t*>(p)) ^ kSign;
    case Type::i32:
      return static_cast<Integer>(*reinterpret_cast<const int32_t*>(p)) ^ kSign;
    case Type::i16:
      return static_cast<Integer>(*reinterpret_cast<const int16_t*>(p)) ^ kSign;
    case Type::i8:
      return static_cast<Integer>(*reinterpret_cast<const int8_t*>(p)) ^ kSign;
    case Type::u8:
      return *reinterpret_cast<const uint8_t*>(p);
    default: {
      const float x = number_at(p, type);
      const uint32_t bits = __float_as_uint(x + 0.0f);
      return x != x ? ~Integer(0) : bits >> 31 ? ~bits : bits | 1u << 31;
    }
  }
}

// The tokens of a row and head.
template <int Words>
struct Tokens {
  using Integer = std::conditional_t<Words == 2, uint32_t, uint64_t>;
  const SelectVictims& p;
  int64_t n, h, below, from;

  __device__ Tokens(const SelectVictims& p, int64_t head)
      : p(p),
        n(head / p.h),
        h(head % p.h),
        below(integer_at(p.below, n)),
        from(integer_at(p.from, n)) {}

  __device__ Key<Words> key(int64_t s) const {
    const auto position = static_cast<int32_t>(integer_at(p.position, n, h, s));
    const bool empty = position == kEmpty;
    const bool is_protected = position < below || (position >= from && !empty);
    const uint64_t rank = 1 + is_protected - empty;
    const uint64_t score = order_of<Integer>(p.score.at(n, h, s), p.score.type);
    const uint64_t tie = order_of<Integer>(p.tie.at(n, h, s), p.tie.type);
    const uint64_t last = tie << 62 | uint64_t(position ^ 1u << 31) << 30 | s;
    if constexpr (Words == 2)
      return {{rank << 62 | score << 30 | tie >> 2, last}};
    else
      return {{rank << 62 | score >> 2, score << 62 | tie >> 2, last}};
  }
};

template <int Words>
struct Shared {
  int totals[kWarp];          // of warps
  int digit, before, inside;  // a digit, and how many keys have a lower one, and this
  int gathered;
  union {
    int bins[kBins];
    Key<Words> keys[kSorted];
  };
};

// The keys that have the bits of `prefix` where `mask` has ones: `size` of them, with `before` keys
// that are less.
template <int Words>
struct Range {
  Key<Words> prefix, mask;
  int before, size;

  __device__ bool holds(const Key<Words>& key) const {
    uint64_t differs = 0;
#pragma unroll
    for (int i = 0; i < Words; ++i) differs |= (key.word[i] ^ prefix.word[i]) & mask.word[i];
    return differs == 0;
  }
  __device__ Key<Words> last() const {
    Key<Words> key;
#pragma unroll
    for (int i = 0; i < Words; ++i) key.word[i] = prefix.word[i] | ~mask.word[i];
    return key;
  }
};

// A range of at most kSlack keys, among which is that with `place` keys before it: found digit by
// digit, by kMostThreads threads.
template <int Words>
__device__ Range<Words> narrow(const Tokens<Words>& tokens, Range<Words> range, int place,
                               Shared<Words>& shared) {
  constexpr int kEach = kBins / kMostThreads;
  const int warp = threadIdx.x / kWarp, lane = lane_index();
  for (int word = 0, shift = 64 - kDigit; range.size > kSlack;) {
    for (int i = threadIdx.x; i < kBins; i += kMostThreads) shared.bins[i] = 0;
    __syncthreads();
    for (int64_t s = threadIdx.x; s < tokens.p.s; s += kMostThreads) {
      const Key<Words> key = tokens.key(s);
      uint64_t bits = key.word[0];
#pragma unroll
      for (int i = 1; i < Words; ++i)
        if (i == word) bits = key.word[i];
      if (range.holds(key)) atomicAdd(&shared.bins[bits >> shift & (kBins - 1)], 1);
    }
    __syncthreads();
    // Which of its bins has the place is known to the thread with the sum of those before.
    int bin[kEach], total = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) total += bin[i] = shared.bins[threadIdx.x * kEach + i];
    int before = sum_so_far(total);
    if (lane == kWarp - 1) shared.totals[warp] = before;
    __syncthreads();
    before += range.before - total + sum(lane < warp ? shared.totals[lane] : 0);
#pragma unroll
    for (int i = 0; i < kEach; before += bin[i++])
      if (before <= place && place < before + bin[i])
        shared.digit = threadIdx.x * kEach + i, shared.before = before, shared.inside = bin[i];
    __syncthreads();
    range.before = shared.before, range.size = shared.inside;
#pragma unroll
    for (int i = 0; i < Words; ++i)
      if (i == word) {
        range.prefix.word[i] |= uint64_t(shared.digit) << shift;
        range.mask.word[i] |= ~uint64_t(0) << shift;
      }
    // The last digit of a word overlaps that before.
    if (shift == 0)
      ++word, shift = 64 - kDigit;
    else
      shift = max(shift - kDigit, 0);
  }
  return range;
}

// Bitonic; n is a power of two.
template <int Words>
__device__ void sort(Key<Words>* keys, int n) {
  for (int size = 2; size <= n; size *= 2)
    for (int span = size; span > 1; span /= 2) {
      const int half = span / 2;
      for (int i = threadIdx.x; i < n / 2; i += blockDim.x) {
        const int a = 2 * i - (i & (half - 1)), b = span == size ? a ^ (span - 1) : a + half;
        const Key<Words> low = keys[a], high = keys[b];
        if (high < low) keys[a] = high, keys[b] = low;
      }
      // So many keys in a row, and no others, are seen by one warp.
      const int next = span > 2 ? half : 2 * size;
      if (max(span, next) > 2 * kWarp)
        __syncthreads();
      else
        __syncwarp();
    }
}

template <int Words>
__global__ void __launch_bounds__(kMostThreads)
    select_victims_kernel(__grid_constant__ const SelectVictims p, int places) {
  KVTOOLS_SHARED(Shared<Words>, shared);
  const int64_t parts = (p.count + places - 1) / places, head = blockIdx.x / parts;
  const int begin = blockIdx.x % parts * places;
  const int end = static_cast<int>(begin + places < p.count ? begin + places : p.count);
  const Tokens<Words> tokens(p, head);
  const Range<Words> all{{}, {}, 0, static_cast<int>(p.s)};
  Range<Words> first = all, last = all;
  if (p.s > kSorted) {
    if (begin) first = narrow(tokens, all, begin, shared);
    last = narrow(tokens, all, end - 1, shared);
  }
  const Key<Words> lowest = first.prefix, highest = last.last();
  const int size = last.before + last.size - first.before;
  if (threadIdx.x == 0) shared.gathered = 0;
  __syncthreads();
  for (int64_t start = 0; start < p.s; start += blockDim.x) {
    const int64_t s = start + threadIdx.x;
    Key<Words> key;
    bool within = s < p.s;
    if (within) key = tokens.key(s), within = !(key < lowest || highest < key);
    const int at = place_in(shared.gathered, within);
    if (within) shared.keys[at] = key;
  }
  int padded = 1;
  while (padded < size) padded *= 2;
  for (int i = size + threadIdx.x; i < padded; i += blockDim.x)
#pragma unroll
    for (uint64_t& word : shared.keys[i].word) word = ~uint64_t(0);
  __syncthreads();
  sort(shared.keys, padded);
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const int place = first.before + i;
    if (begin <= place && place < end)
      *reinterpret_cast<int32_t*>(p.index.at(head / p.h, head % p.h, place)) =
          static_cast<int32_t>(shared.keys[i].word[Words - 1] & ((1u << 30) - 1));
  }
}

template <int Words>
void select_victims(const SelectVictims& p, void* stream) {
  // Few tokens are sorted as they are, all of them.
  const int64_t places = p.s > kSorted ? kPlaces : kSorted;
  const int64_t blocks = p.n * p.h * ((p.count + places - 1) / places);
  int sorted = 1;
  while (sorted < kSorted && sorted < p.s) sorted *= 2;
  launch("select_victims", select_victims_kernel<Words>, dim3(static_cast<unsigned>(blocks)),
         std::clamp(sorted / 2, kWarp, kMostThreads),
         offsetof(Shared<Words>, keys) + sorted * sizeof(Key<Words>), stream, p,
         static_cast<int>(places));
}

}  // namespace

void select_victims(const SelectVictims& p, void* stream) {
  if (p.score.type == Type::i64 || p.tie.type == Type::i64)
    select_victims<3>(p, stream);
  else
    select_victims<2>(p, stream);
}

}  // namespace kvtools::cuda

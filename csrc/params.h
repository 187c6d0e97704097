// What the kernels are told: pointers, sizes and strides. torch is not seen here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#ifdef __CUDACC__
#define KVTOOLS_ANYWHERE __host__ __device__  // on a GPU, too
#else
#define KVTOOLS_ANYWHERE
#endif

namespace kvtools {

// a modulo b > 0, never negative.
KVTOOLS_ANYWHERE inline int64_t floor_mod(int64_t a, int64_t b) { return (a % b + b) % b; }

enum class Type { f32, bf16, f16, i64, i32, i16, i8, u8 };
enum class Format { none, fp8, int8, int6, int4, int3, int2 };

KVTOOLS_ANYWHERE inline int64_t size_of(Type type) {
  return 0x11248224 >> 4 * static_cast<int>(type) & 15;
}

inline constexpr int kBits[] = {0, 8, 8, 6, 4, 3, 2};  // of codes, by format

// A tensor; strides in elements. `data` is null where it is absent.
template <int N>
struct Strided {
  char* data = nullptr;
  Type type = Type::f32;
  int64_t stride[N] = {};

  // The element, or the first of those along the axes that are left out.
  template <class... Index>
  KVTOOLS_ANYWHERE char* at(Index... index) const {
    static_assert(sizeof...(index) <= N);
    int64_t offset = 0;
    int axis = 0;
    ((offset += index * stride[axis++]), ...);
    return data + offset * size_of(type);
  }
};

// An element of a tensor of int32 or int64.
template <int N, class... Index>
KVTOOLS_ANYWHERE int64_t integer_at(const Strided<N>& x, Index... index) {
  const char* p = x.at(index...);
  return x.type == Type::i32 ? *reinterpret_cast<const int32_t*>(p)
                             : *reinterpret_cast<const int64_t*>(p);
}

// A vector of int32 or int64.
struct Integers : Strided<1> {
  KVTOOLS_ANYWHERE int64_t operator[](int64_t i) const { return integer_at(*this, i); }
};

// A vector of fp32.
struct Floats : Strided<1> {
  KVTOOLS_ANYWHERE float operator[](int64_t i) const {
    return *reinterpret_cast<const float*>(at(i));
  }
};

// A tensor whose first axes are page, KV head and slot; strides in bytes.
struct Paged {
  char* data = nullptr;
  int64_t page = 0, head = 0, slot = 0;

  KVTOOLS_ANYWHERE char* at(int64_t p, int64_t h, int64_t s) const {
    return data + p * page + h * head + s * slot;
  }
};

// Keys or values of a layer; `type` is that of unquantised ones.
struct Content {
  Paged codes, scale;
  Format format = Format::none;
  Type type = Type::f32;
};

// See KVPages in kvtools/ops/quant.py.
struct Pages {
  Content k, v;
  Paged position, importance, history;
  int64_t pages = 0, heads = 0, page_size = 0, d = 0, words = 0;
};

// The threads of the caller: runs body(0), ..., body(tasks - 1).
struct Pool {
  int threads = 1;
  void (*run)(int64_t tasks, const std::function<void(int64_t)>& body) = nullptr;

  // body(begin, end) for parts of [0, n), each of at least `least` if n is: what is worth a thread.
  template <class F>
  void split(int64_t n, int64_t least, F body) const {
    const int64_t tasks = std::clamp<int64_t>(n / std::max<int64_t>(least, 1), 1, threads);
    run(tasks, [&](int64_t task) { body(n * task / tasks, n * (task + 1) / tasks); });
  }
};

struct QuantizeKv {
  Strided<2> x;  // [rows, d]
  Content to;    // of one page and head, slot i for row i
  int64_t rows, d;
};

struct DequantizeKv {
  Content from;  // as in QuantizeKv
  Strided<2> out;
  int64_t rows, d;
};

// Keys are stored as (k - center) * gain, with those of the token's frame; `of` is null where they
// are stored as they are.
struct Frames {
  Strided<4> x;  // [frames, 2, h, d]: centers and gains
  const int32_t* of = nullptr;
  int64_t count = 0;
};

struct AppendKv {
  Strided<3> k, v;  // [t, h, d]
  Strided<2> slot, also_slot;
  Strided<1> position;
  Pages pages,
      also;  // the second, where the tokens are written again, only if `also_slot` is there
  Frames frames;
  int64_t t;
};

struct MergeStates {
  Strided<3> a, b, out;  // [b, h, d]
  Strided<2> a_lse, b_lse, lse;
  int64_t b_size, h, d;
};

inline constexpr int kMostStores = 4;

// See tree_attention and Plan in kvtools/ops/attention.py; I items of six numbers.
struct TreeAttention {
  Strided<3> q, out;  // [t, hq, d]
  Strided<2> lse;
  Pages stores[kMostStores];  // importance and history are in the first
  int32_t store_count;
  uint32_t recent;  // a bit for each store
  Frames frames;
  const int32_t *position, *before;  // [t]; `before` may be null
  const int32_t *page_indptr, *page, *first, *length, *base, *own, *store, *token, *item;
  int64_t items, tokens, heads_q;
  Strided<3> state_out;
  Strided<2> state_lse;
  Strided<1> sink;
  float scale, softcap;
  int64_t sliding, window;
  bool whole_group;  // low for a KV head means low for all of its query heads
  // The rest is for csrc/cuda.
  const int32_t *token_indptr, *part_indptr, *part;
  int64_t parts;
  char* scratch;
};

struct KeyScores {
  Strided<4> q, k;       // [b, h g, w, d], [b, h, s, d]
  Strided<1> sink;       // [h g]
  Strided<3> mass, low;  // [b, h, s]
  int64_t b, h, g, w, s, d;
  int64_t sinks, sliding;
  float scale, softcap;
  bool all;
};

struct SelectVictims {
  Strided<3> score, tie, position, index;  // [n, h, s]; index [n, h, count]
  Strided<1> below, from;
  int64_t n, h, s, count;
};

struct CompactKv {
  struct Moved {
    Paged x;
    int64_t bytes;  // of a slot
  };
  Strided<2> source, target;
  Moved moved[7];
  int64_t n, heads, page_size;
};

struct Sample {
  Strided<2> logits;  // [b, v]
  Integers seed, position, top_k;
  Floats temperature, top_p, min_p;
  int64_t* token;  // this and the next two: [b], contiguous
  float *logprob, *filtered_logprob;
  int64_t b, v;
};

enum class Link { sigmoid, difference, tanh, identity };
enum class Reduce { last, min, max, mean, sum, prod, gmean, sum_logit, softmin };

struct StepScores {
  Strided<2> hidden, weight;  // [t, m], [k, m]
  Strided<1> bias;            // [k]
  Integers step, cu_steps;    // [s], [r + 1]
  Link link;
  Reduce reduce;
  double temperature;
  float *margin, *prob, *score;  // [s], [s], [r], contiguous
  int64_t t, s, r, k, m;
};

struct LanguageHead {
  Strided<2> hidden, weight;  // [t, m], [v, m]
  Strided<1> bias;            // [v]
  int64_t v, m;
};

struct TokenLogprobs {
  LanguageHead model, reference;
  Integers target, cu_seqlens;  // [t], [x + 1]
  float softcap;
  float *logprob, *sum;  // [t], [x], contiguous
  float* entropy;        // [t], contiguous; or null, then `greedy` is too
  bool* greedy;
  int64_t t, x;
};

}  // namespace kvtools

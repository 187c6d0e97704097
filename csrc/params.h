// What the kernels are told: pointers, sizes and strides. torch is not seen here.
#pragma once

#include <cstdint>
#include <functional>

namespace kvtools {

enum class Type { f32, bf16, f16 };
enum class Format { none, fp8, int8, int6, int4, int3, int2 };

// A tensor; strides in elements. `data` is null where it is absent.
template <int N>
struct Strided {
  char* data = nullptr;
  Type type = Type::f32;
  int64_t stride[N] = {};
};

// A tensor whose first axes are page, KV head and slot; strides in bytes.
struct Paged {
  char* data = nullptr;
  int64_t page = 0, head = 0, slot = 0;

  char* at(int64_t p, int64_t h, int64_t s) const { return data + p * page + h * head + s * slot; }
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
};

struct MergeStates {
  Strided<3> a, b, out;  // [b, h, d]
  Strided<2> a_lse, b_lse, lse;
  int64_t b_size, h, d;
};

// A vector of int32 or, if `wide`, int64.
struct Integers {
  const char* data = nullptr;
  bool wide = false;
  int64_t stride = 0;

  int64_t operator[](int64_t i) const {
    i *= stride;
    return wide ? reinterpret_cast<const int64_t*>(data)[i]
                : reinterpret_cast<const int32_t*>(data)[i];
  }
};

// A vector of fp32.
struct Floats {
  const float* data = nullptr;
  int64_t stride = 0;

  float operator[](int64_t i) const { return data[i * stride]; }
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
  int64_t s, r, k, m;
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
  int64_t t, x;
};

}  // namespace kvtools

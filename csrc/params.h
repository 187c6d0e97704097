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

// See tree_attention and Plan in kvtools/ops/attention.py; I items of five numbers.
struct TreeAttention {
  Strided<3> q, out;  // [t, hq, d]
  Strided<2> lse;
  Pages pages;
  const int32_t *position, *before;  // [t]; `before` may be null
  const int32_t *page_indptr, *page, *first, *length, *base, *own, *token, *item;
  int64_t items, tokens, heads_q;
  Strided<3> state_out;
  Strided<2> state_lse;
  Strided<1> sink;
  float scale, softcap;
  int64_t sliding, window;
  bool whole_group;  // low for a KV head means low for all of its query heads
};

}  // namespace kvtools

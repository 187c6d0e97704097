// Registers the compiled kernels; the only file that sees torch, through its stable ABI. Schemas
// are declared in kvtools/ops; shapes and devices have been checked there.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "cpu/isa.h"

namespace kvtools {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    default:
      return Type::f32;
  }
}

template <int N>
Strided<N> strided(const Tensor& x) {
  Strided<N> y;
  y.data = static_cast<char*>(x.data_ptr());
  y.type = type_of(x);
  for (int i = 0; i < N; ++i) y.stride[i] = x.stride(i);
  return y;
}

Paged paged(const Tensor& x) {
  const auto size = static_cast<int64_t>(x.element_size());
  return {static_cast<char*>(x.data_ptr()), x.stride(0) * size, x.stride(1) * size,
          x.stride(2) * size};
}

Paged paged(const Optional& x) { return x ? paged(*x) : Paged{}; }

// The format for heads of size d, read off the dtype and the last axis.
Format format_of(const Tensor& codes, int64_t d) {
  if (codes.scalar_type() == ScalarType::Float8_e4m3fn) return Format::fp8;
  if (codes.scalar_type() != ScalarType::Byte) return Format::none;
  switch (codes.size(-1) * 8 / d) {
    case 8:
      return Format::int8;
    case 6:
      return Format::int6;
    case 4:
      return Format::int4;
    case 3:
      return Format::int3;
    default:
      return Format::int2;
  }
}

Content content(const Tensor& codes, const Optional& scale, int64_t d) {
  return {paged(codes), paged(scale), format_of(codes, d), type_of(codes)};
}

Pages pages_of(const Tensor& k, const Tensor& v, const Optional& k_scale, const Optional& v_scale,
               const Optional& position, const Optional& importance, const Optional& history,
               int64_t d) {
  return {content(k, k_scale, d),
          content(v, v_scale, d),
          paged(position),
          paged(importance),
          paged(history),
          k.size(0),
          k.size(1),
          k.size(2),
          d,
          history ? history->size(3) : 0};
}

void run(int64_t tasks, const std::function<void(int64_t)>& body) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

Pool pool() { return {static_cast<int>(torch::stable::get_num_threads()), run}; }

std::tuple<Tensor, Tensor> merge_states(Tensor a, Tensor a_lse, Tensor b, Tensor b_lse) {
  Tensor out = torch::stable::empty_like(a);
  Tensor lse = torch::stable::new_empty(a, a_lse.sizes(), ScalarType::Float);
  if (a.numel() || lse.numel())
    KVTOOLS_RUN(merge_states,
                {strided<3>(a), strided<3>(b), strided<3>(out), strided<2>(a_lse),
                 strided<2>(b_lse), strided<2>(lse), a.size(0), a.size(1), a.size(2)},
                pool());
  return {out, lse};
}

std::string cpu_isa(std::string name) {
  const char* before = use_isa(name.c_str());
  STD_TORCH_CHECK(before, "isa='", name, "' is not one that this processor has");
  return before;
}

}  // namespace
}  // namespace kvtools

STABLE_TORCH_LIBRARY_IMPL(kvtools, CPU, m) {
  m.impl("merge_states.cpu", TORCH_BOX(&kvtools::merge_states));
}

STABLE_TORCH_LIBRARY_IMPL(kvtools, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&kvtools::cpu_isa));
}

// Importing the module runs the registrations above; it holds nothing.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

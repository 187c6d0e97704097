// Registers the compiled kernels; the only file that sees torch, through its stable ABI. Schemas
// are declared in kvtools/ops; shapes and devices have been checked there.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
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

Integers integers(const Tensor& x) {
  return {static_cast<const char*>(x.data_ptr()), x.scalar_type() == ScalarType::Long, x.stride(0)};
}

Floats floats(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "expected fp32");
  return {static_cast<const float*>(x.data_ptr()), x.stride(0)};
}

std::tuple<Tensor, Tensor, Tensor> sample(Tensor logits, Tensor seed, Tensor position,
                                          Tensor temperature, Tensor top_k, Tensor top_p,
                                          Tensor min_p) {
  const int64_t b = logits.size(0), v = logits.size(1);
  Tensor token = torch::stable::new_empty(logits, {b}, ScalarType::Long);
  Tensor logprob = torch::stable::new_empty(logits, {b}, ScalarType::Float);
  Tensor filtered = torch::stable::new_empty(logits, {b}, ScalarType::Float);
  if (b)
    KVTOOLS_RUN(
        sample,
        {strided<2>(logits), integers(seed), integers(position), integers(top_k),
         floats(temperature), floats(top_p), floats(min_p), static_cast<int64_t*>(token.data_ptr()),
         static_cast<float*>(logprob.data_ptr()), static_cast<float*>(filtered.data_ptr()), b, v},
        pool());
  return {token, logprob, filtered};
}

template <int N>
Strided<N> strided(const Optional& x) {
  return x ? strided<N>(*x) : Strided<N>{};
}

// The place of `name` among `names`, which are in the order of an enum.
template <class Enum>
Enum named(const std::string& name, std::initializer_list<const char*> names) {
  const auto found = std::find(names.begin(), names.end(), name);
  STD_TORCH_CHECK(found != names.end(), "'", name, "' is unknown");
  return static_cast<Enum>(found - names.begin());
}

std::tuple<Tensor, Tensor, Tensor> step_scores(Tensor hidden, Tensor step, Tensor cu_steps,
                                               Tensor weight, Optional bias, std::string link,
                                               std::string reduce, double temperature) {
  const int64_t s = step.size(0), r = cu_steps.size(0) - 1;
  Tensor margin = torch::stable::new_empty(hidden, {s}, ScalarType::Float);
  Tensor prob = torch::stable::new_empty(hidden, {s}, ScalarType::Float);
  Tensor score = torch::stable::new_empty(hidden, {r}, ScalarType::Float);
  KVTOOLS_RUN(
      step_scores,
      {strided<2>(hidden), strided<2>(weight), strided<1>(bias), integers(step), integers(cu_steps),
       named<Link>(link, {"sigmoid", "difference", "tanh", "identity"}),
       named<Reduce>(
           reduce, {"last", "min", "max", "mean", "sum", "prod", "gmean", "sum_logit", "softmin"}),
       temperature, static_cast<float*>(margin.data_ptr()), static_cast<float*>(prob.data_ptr()),
       static_cast<float*>(score.data_ptr()), s, r, weight.size(0), weight.size(1)},
      pool());
  return {margin, prob, score};
}

LanguageHead language_head(const Tensor& hidden, const Tensor& weight, const Optional& bias) {
  return {strided<2>(hidden), strided<2>(weight), strided<1>(bias), weight.size(0), weight.size(1)};
}

std::tuple<Tensor, Tensor> token_logprobs(Tensor hidden, Tensor weight, Tensor target,
                                          Optional bias, double softcap, Optional cu_seqlens,
                                          Optional ref_hidden, Optional ref_weight,
                                          Optional ref_bias) {
  const int64_t t = target.size(0), x = cu_seqlens ? cu_seqlens->size(0) - 1 : 0;
  Tensor logprob = torch::stable::new_empty(hidden, {t}, ScalarType::Float);
  Tensor sum = torch::stable::new_empty(hidden, {x}, ScalarType::Float);
  KVTOOLS_RUN(token_logprobs,
              {language_head(hidden, weight, bias),
               ref_hidden ? language_head(*ref_hidden, *ref_weight, ref_bias) : LanguageHead{},
               integers(target), cu_seqlens ? integers(*cu_seqlens) : Integers{},
               static_cast<float>(softcap), static_cast<float*>(logprob.data_ptr()),
               static_cast<float*>(sum.data_ptr()), t, x},
              pool());
  return {logprob, sum};
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
  m.impl("sample.cpu", TORCH_BOX(&kvtools::sample));
  m.impl("step_scores.cpu", TORCH_BOX(&kvtools::step_scores));
  m.impl("token_logprobs.cpu", TORCH_BOX(&kvtools::token_logprobs));
}

STABLE_TORCH_LIBRARY_IMPL(kvtools, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&kvtools::cpu_isa));
}

// Importing the module runs the registrations above; it holds nothing.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

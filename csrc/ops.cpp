// Registers the compiled kernels; the only file that sees torch, through its stable ABI. Schemas
// are declared in kvtools/ops; shapes and devices have been checked there.
#include <Python.h>
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa.h"

// KVTOOLS_CUDA: 0 without csrc/cuda, 1 with it, 2 with it for the CPU (csrc/testing).
#if KVTOOLS_CUDA == 0
#define KVTOOLS_CUDA_DEVICE ""
#else
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"

#if KVTOOLS_CUDA == 1
#define KVTOOLS_CUDA_DEVICE "cuda"
#define KVTOOLS_CUDA_KEY CUDA
#else
#define KVTOOLS_CUDA_DEVICE "cpu"
#define KVTOOLS_CUDA_KEY CPU
#endif

#endif

namespace kvtools {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    case ScalarType::Long:
      return Type::i64;
    case ScalarType::Int:
      return Type::i32;
    case ScalarType::Short:
      return Type::i16;
    case ScalarType::Char:
      return Type::i8;
    case ScalarType::Byte:
    case ScalarType::Bool:
      return Type::u8;
    default:
      STD_TORCH_CHECK(false, "kernels in C++ do not take this dtype: use impl='reference'");
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

template <int N>
Strided<N> floats(const Tensor& x) {
  STD_TORCH_CHECK(type_of(x) <= Type::f16,
                  "kernels in C++ take float32, float16 and bfloat16 here");
  return strided<N>(x);
}

template <int N>
Strided<N> integers(const Tensor& x) {
  const Type type = type_of(x);
  STD_TORCH_CHECK(type == Type::i32 || type == Type::i64,
                  "slots and positions must be int32 or int64");
  return strided<N>(x);
}

// The kernels want the last axis contiguous.
Tensor with_unit_stride(const Tensor& x) {
  return x.stride(-1) == 1 ? x : torch::stable::contiguous(x);
}

Paged paged(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 || x.size(3) == 1 || x.stride(3) == 1,
                  "pages must be contiguous in their last axis");
  const auto size = static_cast<int64_t>(x.element_size());
  return {static_cast<char*>(x.data_ptr()), x.stride(0) * size, x.stride(1) * size,
          x.stride(2) * size};
}

Paged paged(const Optional& x, ScalarType type) {
  if (!x) return {};
  STD_TORCH_CHECK(x->scalar_type() == type,
                  "pages: scales must be float16, importance float32, "
                  "position and history int32");
  return paged(*x);
}

constexpr int kFormats = 7;
constexpr const char* kNames[kFormats] = {"none", "fp8", "int8", "int6", "int4", "int3", "int2"};

// The format for heads of size d, read off the dtype and the last axis.
Format format_of(const Tensor& codes, int64_t d) {
  if (codes.scalar_type() == ScalarType::Float8_e4m3fn) return Format::fp8;
  if (codes.scalar_type() != ScalarType::Byte) return Format::none;
  const auto* bits = std::find(kBits + 2, kBits + kFormats - 1, codes.size(-1) * 8 / d);
  return static_cast<Format>(bits - kBits);
}

Content content(const Tensor& codes, const Optional& scale, int64_t d) {
  const Format format = format_of(codes, d);
  return {paged(codes), paged(scale, ScalarType::Half), format,
          format == Format::none ? floats<3>(codes).type : Type::f32};
}

Pages pages_of(const Tensor& k, const Tensor& v, const Optional& k_scale, const Optional& v_scale,
               const Optional& position, const Optional& importance, const Optional& history,
               int64_t d) {
  return {content(k, k_scale, d),
          content(v, v_scale, d),
          paged(position, ScalarType::Int),
          paged(importance, ScalarType::Float),
          paged(history, ScalarType::Int),
          k.size(0),
          k.size(1),
          k.size(2),
          d,
          history ? history->size(3) : 0};
}

// A slot outside the pages would be a write outside memory. Negative ones are skipped.
void check_slots(const char* name, const Strided<2>& slot, int64_t n, int64_t heads,
                 int64_t slots) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t s = integer_at(slot, i, h);
      STD_TORCH_CHECK(s < slots, name, " holds slot ", s, ", which is not among the ", slots,
                      " of the pages");
    }
}

enum class Impl { cpu, cuda };

void check_head_size(Impl impl, int64_t d, int64_t multiple) {
  STD_TORCH_CHECK(impl == Impl::cpu || (d <= 256 && d % multiple == 0), "heads of size ", d,
                  ": impl='cuda' takes up to 256, in attention multiples of 8: use impl='triton'");
}

void run(int64_t tasks, const std::function<void(int64_t)>& body) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

Pool pool() { return {static_cast<int>(torch::stable::get_num_threads()), run}; }

#if KVTOOLS_CUDA
using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

// Looked up when it is first needed: a torch without CUDA lacks it, where this library has to load
// all the same. Python loads torch with RTLD_LOCAL, so that only a handle of its library finds it.
CurrentStream current_stream() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  static const auto found = [] {
    void* symbol = dlsym(RTLD_DEFAULT, kName);
    if (!symbol) {
      if (void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD))
        symbol = dlsym(torch, kName);
    }
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  STD_TORCH_CHECK(found, "impl='cuda' needs a torch that was built with CUDA: this one lacks ",
                  kName);
  return found;
}

// Calls `kernel` on the device and the current stream of x.
template <class Problem>
void run_cuda(void (*kernel)(const Problem&, void* stream), const Tensor& x, const Problem& p) {
  if (KVTOOLS_CUDA == 2) return kernel(p, nullptr);
  const CurrentStream stream_of = current_stream();
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream;
  TORCH_ERROR_CODE_CHECK(stream_of(x.get_device_index(), &stream));
  kernel(p, stream);
}
#define KVTOOLS_RUN_ON(impl, kernel, x, ...) \
  if constexpr (impl == Impl::cuda)          \
    run_cuda(cuda::kernel, x, __VA_ARGS__);  \
  else                                       \
    KVTOOLS_RUN(kernel, __VA_ARGS__, pool())
#else
#define KVTOOLS_RUN_ON(impl, kernel, x, ...) KVTOOLS_RUN(kernel, __VA_ARGS__, pool())
#endif

// Heads as one page of one KV head.
Content heads(const Tensor& codes, const Tensor& scale, Format format) {
  return {{static_cast<char*>(codes.data_ptr()), 0, 0, codes.size(-1)},
          {static_cast<char*>(scale.data_ptr()), 0, 0, 2},
          format};
}

// A contiguous tensor as rows of its last axis.
Strided<2> rows_of(const Tensor& x) {
  return {static_cast<char*>(x.data_ptr()), floats<1>(x).type, {x.size(-1), 1}};
}

template <Impl impl>
std::tuple<Tensor, Tensor> quantize_kv(Tensor x, std::string name) {
  const auto i = std::find(kNames, kNames + kFormats, name) - kNames;
  const auto format = static_cast<Format>(i);
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const int64_t d = shape.back();
  check_head_size(impl, d, 1);
  shape.back() = d * kBits[i] / 8;
  Tensor codes = torch::stable::new_empty(
      x, shape, format == Format::fp8 ? ScalarType::Float8_e4m3fn : ScalarType::Byte);
  shape.pop_back();
  Tensor scale = torch::stable::new_empty(x, shape, ScalarType::Half);
  if (x.numel()) {
    KVTOOLS_RUN_ON(impl, quantize_kv, x,
                   {rows_of(x), heads(codes, scale, format), scale.numel(), d});
  }
  return {codes, scale};
}

Tensor dequantize_kv(Tensor codes, Tensor scale, int64_t d, ScalarType dtype) {
  if (!codes.is_contiguous()) codes = torch::stable::contiguous(codes);
  if (!scale.is_contiguous()) scale = torch::stable::contiguous(scale);
  std::vector<int64_t> shape(codes.sizes().begin(), codes.sizes().end());
  shape.back() = d;
  Tensor out = torch::stable::new_empty(scale, shape, dtype);
  if (out.numel())
    KVTOOLS_RUN(dequantize_kv,
                {heads(codes, scale, format_of(codes, d)), rows_of(out), scale.numel(), d}, pool());
  return out;
}

const int32_t* int32(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int && x.is_contiguous(),
                  "positions and plans must be int32 and contiguous");
  return static_cast<const int32_t*>(x.data_ptr());
}

Frames frames(Impl impl, Optional& frame, Optional& frame_t) {
  if (!frame) return {};
  frame = with_unit_stride(*frame);
  if (!frame_t->is_contiguous()) frame_t = torch::stable::contiguous(*frame_t);
  Frames y{floats<4>(*frame), int32(*frame_t), frame->size(0)};
  for (int64_t t = 0; impl == Impl::cpu && t < frame_t->size(0); ++t)
    STD_TORCH_CHECK(y.of[t] >= 0 && y.of[t] < y.count, "frame_t holds ", y.of[t],
                    ", which is not among the ", y.count, " frames");
  return y;
}

template <Impl impl>
void append_kv(Tensor k_thd, Tensor v_thd, Tensor slot_th, Tensor k, Tensor v, Optional k_scale,
               Optional v_scale, Optional position_t, Optional position, Optional importance,
               Optional history, Optional also_th, Optional also_k, Optional also_v,
               Optional also_k_scale, Optional also_v_scale, Optional frame, Optional frame_t) {
  if (!k_thd.numel()) return;
  k_thd = with_unit_stride(k_thd);
  v_thd = with_unit_stride(v_thd);
  const int64_t d = k_thd.size(2);
  AppendKv p{};
  p.k = floats<3>(k_thd), p.v = floats<3>(v_thd), p.t = k_thd.size(0);
  p.slot = integers<2>(slot_th);
  p.pages = pages_of(k, v, k_scale, v_scale, position, importance, history, d);
  if (also_th) {
    p.also_slot = integers<2>(*also_th);
    p.also = pages_of(*also_k, *also_v, also_k_scale, also_v_scale, {}, {}, {}, d);
  }
  if (position) p.position = integers<1>(*position_t);
  p.frames = frames(impl, frame, frame_t);
  check_head_size(impl, d, 1);
  if (impl == Impl::cpu) {
    const auto slots = [](const Pages& x) { return x.pages * x.page_size; };
    check_slots("slot", p.slot, p.t, p.pages.heads, slots(p.pages));
    if (also_th) check_slots("also", p.also_slot, p.t, p.also.heads, slots(p.also));
  }
  KVTOOLS_RUN_ON(impl, append_kv, k_thd, p);
}

Strided<2> log_sums(const Tensor& lse) {
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float, "log-sum-exps must be float32");
  return strided<2>(lse);
}

template <Impl impl>
std::tuple<Tensor, Tensor> tree_attention(
    Tensor q, Tensor position_t, Tensor k, Tensor v, Optional k_scale, Optional v_scale,
    Optional position, Optional importance, Optional history, std::vector<Tensor> more,
    int64_t recent, Tensor page_indptr, Tensor page, Tensor first, Tensor length, Tensor base,
    Tensor own, Tensor store, Tensor token_indptr, Tensor token, Tensor item, Tensor part_indptr,
    Tensor part, Optional before_t, Optional frame, Optional frame_t, Optional state_out,
    Optional state_lse, Optional sink_h, double scale, double softcap, int64_t sliding,
    int64_t window, std::string group) {
  q = with_unit_stride(q);
  if (state_out) state_out = with_unit_stride(*state_out);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, q.sizes().slice(0, 2), ScalarType::Float);
  TreeAttention p{};
  p.q = floats<3>(q), p.out = strided<3>(out), p.lse = strided<2>(lse);
  const int64_t d = q.size(2);
  p.stores[0] = pages_of(k, v, k_scale, v_scale, position, importance, history, d);
  p.store_count = 1 + static_cast<int32_t>(more.size() / 5), p.recent = recent;
  STD_TORCH_CHECK(p.store_count <= kMostStores, "kernels in C++ take ", kMostStores, " stores");
  for (int i = 1; i < p.store_count; ++i) {
    const Tensor* x = &more[5 * (i - 1)];
    const auto present = [](const Tensor& y) { return y.numel() ? Optional(y) : Optional(); };
    p.stores[i] = pages_of(x[0], x[1], present(x[2]), present(x[3]), present(x[4]), {}, {}, d);
  }
  p.frames = frames(impl, frame, frame_t);
  p.position = int32(position_t), p.before = before_t ? int32(*before_t) : nullptr;
  p.page_indptr = int32(page_indptr), p.page = int32(page), p.first = int32(first);
  p.length = int32(length), p.base = int32(base), p.own = int32(own), p.store = int32(store);
  p.token = int32(token), p.item = int32(item);
  p.items = item.size(0), p.tokens = q.size(0), p.heads_q = q.size(1);
  if (state_out) p.state_out = floats<3>(*state_out), p.state_lse = log_sums(*state_lse);
  if (sink_h) p.sink = floats<1>(*sink_h);
  p.scale = scale, p.softcap = softcap, p.sliding = sliding, p.window = window;
  p.whole_group = group == "all";
#if KVTOOLS_CUDA
  Optional scratch;
  if (impl == Impl::cuda && q.numel()) {
    check_head_size(impl, d, 8);
    p.token_indptr = int32(token_indptr), p.part_indptr = int32(part_indptr);
    p.part = int32(part), p.parts = part.size(0);
    scratch = torch::stable::new_empty(q, {cuda::tree_attention_scratch(p)}, ScalarType::Byte);
    p.scratch = static_cast<char*>(scratch->data_ptr());
  }
#endif
  if (q.numel()) {
    KVTOOLS_RUN_ON(impl, tree_attention, q, p);
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor> merge_states(Tensor a, Tensor a_lse, Tensor b, Tensor b_lse) {
  a = with_unit_stride(a), b = with_unit_stride(b);
  Tensor out = torch::stable::empty_like(a);
  Tensor lse = torch::stable::new_empty(a, a_lse.sizes(), ScalarType::Float);
  if (a.numel() || lse.numel())
    KVTOOLS_RUN(merge_states,
                {floats<3>(a), floats<3>(b), strided<3>(out), log_sums(a_lse), log_sums(b_lse),
                 strided<2>(lse), a.size(0), a.size(1), a.size(2)},
                pool());
  return {out, lse};
}

std::tuple<Tensor, Tensor> key_scores(Tensor q, Tensor k, Optional sink_h, int64_t sinks,
                                      double scale, double softcap, int64_t sliding,
                                      std::string group) {
  q = with_unit_stride(q);
  k = with_unit_stride(k);
  const int64_t b = k.size(0), h = k.size(1), s = k.size(2);
  Tensor mass = torch::stable::new_empty(k, {b, h, s}, ScalarType::Float);
  Tensor low = torch::stable::new_empty(k, {b, h, s}, ScalarType::Int);
  if (mass.numel())
    KVTOOLS_RUN(
        key_scores,
        {floats<4>(q), floats<4>(k), sink_h ? floats<1>(*sink_h) : Strided<1>{}, strided<3>(mass),
         strided<3>(low), b, h, q.size(1) / h, q.size(2), s, k.size(3), sinks, sliding,
         static_cast<float>(scale), static_cast<float>(softcap), group == "all"},
        pool());
  return {mass, low};
}

template <Impl impl>
Tensor select_victims(Tensor score, Tensor tie, Tensor position, Tensor below, Tensor from,
                      int64_t count) {
  const int64_t n = score.size(0), h = score.size(1), s = score.size(2);
  STD_TORCH_CHECK(impl == Impl::cpu || s <= 1 << 30, "rows have more than 2^30 tokens");
  Tensor index = torch::stable::new_empty(score, {n, h, count}, ScalarType::Int);
  if (index.numel()) {
    KVTOOLS_RUN_ON(impl, select_victims, score,
                   {strided<3>(score), strided<3>(tie), integers<3>(position), strided<3>(index),
                    integers<1>(below), integers<1>(from), n, h, s, count});
  }
  return index;
}

void compact_kv(Tensor source, Tensor target, Tensor k, Tensor v, Optional k_scale,
                Optional v_scale, Optional position, Optional importance, Optional history) {
  const Optional tensors[] = {k, v, k_scale, v_scale, position, importance, history};
  CompactKv p{integers<2>(source), integers<2>(target), {}, source.size(0), k.size(1), k.size(2)};
  for (int i = 0; i < 7; ++i)
    if (const Optional& x = tensors[i]) {
      const int64_t elements = x->dim() == 4 ? x->size(3) : 1;
      p.moved[i] = {paged(*x), elements * static_cast<int64_t>(x->element_size())};
    }
  const int64_t slots = k.size(0) * p.page_size;
  check_slots("source_nh", p.source, p.n, p.heads, slots);
  check_slots("target_nh", p.target, p.n, p.heads, slots);
  if (p.n) KVTOOLS_RUN(compact_kv, p, pool());
}

Integers vector_of_integers(const Tensor& x) { return {integers<1>(x)}; }

Floats vector_of_floats(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "expected float32");
  return {strided<1>(x)};
}

template <Impl impl>
std::tuple<Tensor, Tensor, Tensor> sample(Tensor logits, Tensor seed, Tensor position,
                                          Tensor temperature, Tensor top_k, Tensor top_p,
                                          Tensor min_p) {
  const int64_t b = logits.size(0), v = logits.size(1);
  Tensor token = torch::stable::new_empty(logits, {b}, ScalarType::Long);
  Tensor logprob = torch::stable::new_empty(logits, {b}, ScalarType::Float);
  Tensor filtered = torch::stable::new_empty(logits, {b}, ScalarType::Float);
  if (!b) return {token, logprob, filtered};
  const Sample p{floats<2>(logits),
                 vector_of_integers(seed),
                 vector_of_integers(position),
                 vector_of_integers(top_k),
                 vector_of_floats(temperature),
                 vector_of_floats(top_p),
                 vector_of_floats(min_p),
                 static_cast<int64_t*>(token.data_ptr()),
                 static_cast<float*>(logprob.data_ptr()),
                 static_cast<float*>(filtered.data_ptr()),
                 b,
                 v};
  if constexpr (impl == Impl::cpu) {
    KVTOOLS_RUN(sample, p, pool());
  } else {
#if KVTOOLS_CUDA
    using S = cuda::Sampling;
    const int64_t groups = (v + S::kGroup - 1) / S::kGroup;
    Tensor group = torch::stable::new_empty(logits, {b, groups, 3}, ScalarType::Float);
    Tensor bin = torch::stable::new_empty(logits, {b, S::kBins}, ScalarType::Long);
    run_cuda<S>(cuda::sample, logits,
                {p, static_cast<S::Group*>(group.data_ptr()),
                 static_cast<unsigned long long*>(bin.data_ptr())});
#endif
  }
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

template <Impl impl>
std::tuple<Tensor, Tensor, Tensor> step_scores(Tensor hidden, Tensor step, Tensor cu_steps,
                                               Tensor weight, Optional bias, std::string link,
                                               std::string reduce, double temperature) {
  const int64_t s = step.size(0), r = cu_steps.size(0) - 1;
  Tensor margin = torch::stable::new_empty(hidden, {s}, ScalarType::Float);
  Tensor prob = torch::stable::new_empty(hidden, {s}, ScalarType::Float);
  Tensor score = torch::stable::new_empty(hidden, {r}, ScalarType::Float);
  const StepScores p{strided<2>(hidden),
                     strided<2>(weight),
                     strided<1>(bias),
                     vector_of_integers(step),
                     vector_of_integers(cu_steps),
                     named<Link>(link, {"sigmoid", "difference", "tanh", "identity"}),
                     named<Reduce>(reduce, {"last", "min", "max", "mean", "sum", "prod", "gmean",
                                            "sum_logit", "softmin"}),
                     temperature,
                     static_cast<float*>(margin.data_ptr()),
                     static_cast<float*>(prob.data_ptr()),
                     static_cast<float*>(score.data_ptr()),
                     hidden.size(0),
                     s,
                     r,
                     weight.size(0),
                     weight.size(1)};
  if (impl == Impl::cpu || r) {
    KVTOOLS_RUN_ON(impl, step_scores, hidden, p);
  }
  return {margin, prob, score};
}

LanguageHead language_head(const Tensor& hidden, const Tensor& weight, const Optional& bias) {
  return {strided<2>(hidden), strided<2>(weight), strided<1>(bias), weight.size(0), weight.size(1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprobs(Tensor hidden, Tensor weight,
                                                          Tensor target, Optional bias,
                                                          double softcap, Optional cu_seqlens,
                                                          Optional ref_hidden, Optional ref_weight,
                                                          Optional ref_bias, bool entropies) {
  const int64_t t = target.size(0), x = cu_seqlens ? cu_seqlens->size(0) - 1 : 0;
  const int64_t told = entropies ? t : 0;
  Tensor logprob = torch::stable::new_empty(hidden, {t}, ScalarType::Float);
  Tensor sum = torch::stable::new_empty(hidden, {x}, ScalarType::Float);
  Tensor entropy = torch::stable::new_empty(hidden, {told}, ScalarType::Float);
  Tensor greedy = torch::stable::new_empty(hidden, {told}, ScalarType::Bool);
  KVTOOLS_RUN(
      token_logprobs,
      {language_head(hidden, weight, bias),
       ref_hidden ? language_head(*ref_hidden, *ref_weight, ref_bias) : LanguageHead{},
       vector_of_integers(target), cu_seqlens ? vector_of_integers(*cu_seqlens) : Integers{},
       static_cast<float>(softcap), static_cast<float*>(logprob.data_ptr()),
       static_cast<float*>(sum.data_ptr()),
       entropies ? static_cast<float*>(entropy.data_ptr()) : nullptr,
       entropies ? static_cast<bool*>(greedy.data_ptr()) : nullptr, t, x},
      pool());
  return {logprob, sum, entropy, greedy};
}

std::string cpu_isa(std::string name) {
  const char* why = name == "auto" ? nullptr : lacks(name.c_str());
  STD_TORCH_CHECK(!why, "isa='", name, "': ", why ? why : "");
  return use_isa(name.c_str());
}

std::string cpu_lacks(std::string name) {
  const char* why = lacks(name.c_str());
  return why ? why : "";
}

}  // namespace
}  // namespace kvtools

STABLE_TORCH_LIBRARY_IMPL(kvtools, CPU, m) {
  m.impl("quantize_kv.cpu", TORCH_BOX(&kvtools::quantize_kv<kvtools::Impl::cpu>));
  m.impl("dequantize_kv.cpu", TORCH_BOX(&kvtools::dequantize_kv));
  m.impl("append_kv.cpu", TORCH_BOX(&kvtools::append_kv<kvtools::Impl::cpu>));
  m.impl("tree_attention.cpu", TORCH_BOX(&kvtools::tree_attention<kvtools::Impl::cpu>));
  m.impl("merge_states.cpu", TORCH_BOX(&kvtools::merge_states));
  m.impl("key_scores.cpu", TORCH_BOX(&kvtools::key_scores));
  m.impl("select_victims.cpu", TORCH_BOX(&kvtools::select_victims<kvtools::Impl::cpu>));
  m.impl("compact_kv.cpu", TORCH_BOX(&kvtools::compact_kv));
  m.impl("sample.cpu", TORCH_BOX(&kvtools::sample<kvtools::Impl::cpu>));
  m.impl("step_scores.cpu", TORCH_BOX(&kvtools::step_scores<kvtools::Impl::cpu>));
  m.impl("token_logprobs.cpu", TORCH_BOX(&kvtools::token_logprobs));
}

#if KVTOOLS_CUDA
STABLE_TORCH_LIBRARY_IMPL(kvtools, KVTOOLS_CUDA_KEY, m) {
  m.impl("quantize_kv.cuda", TORCH_BOX(&kvtools::quantize_kv<kvtools::Impl::cuda>));
  m.impl("append_kv.cuda", TORCH_BOX(&kvtools::append_kv<kvtools::Impl::cuda>));
  m.impl("select_victims.cuda", TORCH_BOX(&kvtools::select_victims<kvtools::Impl::cuda>));
  m.impl("step_scores.cuda", TORCH_BOX(&kvtools::step_scores<kvtools::Impl::cuda>));
  m.impl("sample.cuda", TORCH_BOX(&kvtools::sample<kvtools::Impl::cuda>));
  m.impl("tree_attention.cuda", TORCH_BOX(&kvtools::tree_attention<kvtools::Impl::cuda>));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(kvtools, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&kvtools::cpu_isa));
  m.impl("cpu_lacks", TORCH_BOX(&kvtools::cpu_lacks));
}

// Importing the module runs the registrations above. CUDA is the device whose tensors impl="cuda"
// takes: "cuda", "cpu" where kernels are run on the host for tests, or "" without them.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module) PyModule_AddStringConstant(module, "CUDA", KVTOOLS_CUDA_DEVICE);
  return module;
}

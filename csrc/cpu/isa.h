// The kernels of a CPU, compiled once per instruction set, each in a namespace of its own.
#pragma once

#include "../params.h"

#if defined(__x86_64__) || defined(_M_X64)
#define KVTOOLS_X86 1
#else
#define KVTOOLS_X86 0
#endif

// Whether the compiler knows the instructions of AMX: GCC's header, or clang's.
#if KVTOOLS_X86 && defined(__linux__) && \
    (__has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>))
#define KVTOOLS_AMX 1
#else
#define KVTOOLS_AMX 0
#endif

#define KVTOOLS_KERNELS(isa)                              \
  namespace kvtools::isa {                                \
  void quantize_kv(const QuantizeKv&, const Pool&);       \
  void dequantize_kv(const DequantizeKv&, const Pool&);   \
  void append_kv(const AppendKv&, const Pool&);           \
  void tree_attention(const TreeAttention&, const Pool&); \
  void merge_states(const MergeStates&, const Pool&);     \
  void key_scores(const KeyScores&, const Pool&);         \
  void select_victims(const SelectVictims&, const Pool&); \
  void compact_kv(const CompactKv&, const Pool&);         \
  void sample(const Sample&, const Pool&);                \
  void step_scores(const StepScores&, const Pool&);       \
  void token_logprobs(const TokenLogprobs&, const Pool&); \
  }

KVTOOLS_KERNELS(base)
#if KVTOOLS_X86
KVTOOLS_KERNELS(avx2)
KVTOOLS_KERNELS(avx512)
KVTOOLS_KERNELS(avx512bf16)
KVTOOLS_KERNELS(amx)

namespace kvtools::amx {
// Whether this processor's products of tiles are those of their emulation.
bool tiles_agree();
}  // namespace kvtools::amx
#endif

namespace kvtools {

// amx_emulated is amx without its instructions, for tests.
enum class Isa { base, avx2, avx512, avx512bf16, amx, amx_emulated };

// The widest that can run here, unless `use_isa` chose another.
Isa isa();

// Why the one of that name cannot run here; null where it can.
const char* lacks(const char* name);

// Choose one that can run, by name; "auto" for the widest. Returns the name in use before.
const char* use_isa(const char* name);

}  // namespace kvtools

// Call `kernel` of the instruction set in use.
#if KVTOOLS_X86
#define KVTOOLS_RUN(kernel, ...)                  \
  switch (::kvtools::isa()) {                     \
    case ::kvtools::Isa::amx:                     \
    case ::kvtools::Isa::amx_emulated:            \
      ::kvtools::amx::kernel(__VA_ARGS__);        \
      break;                                      \
    case ::kvtools::Isa::avx512bf16:              \
      ::kvtools::avx512bf16::kernel(__VA_ARGS__); \
      break;                                      \
    case ::kvtools::Isa::avx512:                  \
      ::kvtools::avx512::kernel(__VA_ARGS__);     \
      break;                                      \
    case ::kvtools::Isa::avx2:                    \
      ::kvtools::avx2::kernel(__VA_ARGS__);       \
      break;                                      \
    default:                                      \
      ::kvtools::base::kernel(__VA_ARGS__);       \
  }
#else
#define KVTOOLS_RUN(kernel, ...) ::kvtools::base::kernel(__VA_ARGS__)
#endif

#include "isa.h"

#include <atomic>
#include <cstring>

namespace kvtools {
namespace {

const char* const kNames[] = {"base", "avx2", "avx512", "avx512bf16"};

Isa widest() {
#if KVTOOLS_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")
               ? Isa::avx512bf16
               : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::base;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> value{widest()};
  return value;
}

}  // namespace

Isa isa() { return chosen().load(std::memory_order_relaxed); }

const char* use_isa(const char* name) {
  const char* before = kNames[static_cast<int>(isa())];
  Isa wanted = widest();
  if (std::strcmp(name, "auto") != 0) {
    int i = 0;
    while (i < 4 && std::strcmp(name, kNames[i]) != 0) ++i;
    if (i > static_cast<int>(wanted)) return nullptr;
    wanted = static_cast<Isa>(i);
  }
  chosen() = wanted;
  return before;
}

}  // namespace kvtools

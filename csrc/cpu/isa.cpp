#include "isa.h"

#include <atomic>
#include <cstring>

#if KVTOOLS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvtools {
namespace {

const char* const kNames[] = {"base", "avx2", "avx512", "avx512bf16", "amx", "amx-emulated"};
constexpr int kCount = sizeof kNames / sizeof *kNames;

const char* const kNone = "this processor does not have it";

// Why AMX cannot be used. The system must save its tiles, and give them to a process that asks.
const char* lacks_amx() {
#if KVTOOLS_AMX
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & d >> 24 & 1)) return kNone;
  __get_cpuid(1, &a, &b, &c, &d);
  constexpr unsigned kOsxsave = 1u << 27, kTiles = 3u << 17;  // configuration and data
  if (c & kOsxsave)
    asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  else
    a = 0;
  if ((a & kTiles) != kTiles) return "the operating system does not save the tiles of AMX";
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequest, kTileData))
    return "the operating system refuses AMX to this process (arch_prctl)";
  if (!amx::tiles_agree()) return "its products here are not those of its emulation";
  return nullptr;
#else
  return "the compiler of these kernels, or the system, has no AMX";
#endif
}

const char* lacks(Isa isa) {
  if (isa == Isa::base) return nullptr;
#if KVTOOLS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case Isa::avx2:
      return avx2 ? nullptr : kNone;
    case Isa::avx512:
      return avx512 ? nullptr : kNone;
    case Isa::avx512bf16:
      return vnni && __builtin_cpu_supports("avx512bf16") ? nullptr : kNone;
    case Isa::amx: {
      static const char* const why = vnni ? lacks_amx() : kNone;  // asked once
      return why;
    }
    default:
      return vnni ? nullptr : kNone;
  }
#else
  return kNone;
#endif
}

// The product of pairs of bf16 is slower than those of float32 on Intel's processors.
bool pays(Isa isa) {
#if KVTOOLS_X86
  return isa != Isa::avx512bf16 || __builtin_cpu_is("amd");
#else
  return true;
#endif
}

Isa widest() {
  int i = static_cast<int>(Isa::amx);
  while (lacks(static_cast<Isa>(i)) || !pays(static_cast<Isa>(i))) --i;
  return static_cast<Isa>(i);
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> value{widest()};
  return value;
}

// kCount if there is none of that name.
int index_of(const char* name) {
  int i = 0;
  while (i < kCount && std::strcmp(name, kNames[i]) != 0) ++i;
  return i;
}

}  // namespace

Isa isa() { return chosen().load(std::memory_order_relaxed); }

const char* lacks(const char* name) {
  const int i = index_of(name);
  return i < kCount ? lacks(static_cast<Isa>(i)) : "there is no such instruction set";
}

const char* use_isa(const char* name) {
  const char* before = kNames[static_cast<int>(isa())];
  const int i = index_of(name);
  chosen() = i < kCount ? static_cast<Isa>(i) : widest();
  return before;
}

}  // namespace kvtools

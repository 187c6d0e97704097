// Runs the check of AMX of csrc/cpu/amx.cpp as machine code. Where the processor or the system
// lacks AMX its instructions trap, and what Intel documents of them is done here, one element at a
// time.
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "../csrc/cpu/amx.cpp"

namespace kvtools {
Isa isa() { return Isa::amx; }
}  // namespace kvtools

namespace {

struct Config {
  uint8_t palette, start_row, zeros[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} config;
alignas(64) uint8_t tile[8][16][64];
int trapped;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "after %d instructions: %s\n", trapped, what);
  std::_Exit(1);
}

float flushed(float x) { return std::abs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

float element(const uint8_t* p) {
  const uint32_t bits = (p[0] | p[1] << 8) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return flushed(x);
}

void dot(int c, int a, int b) {
  require(c != a && a != b && b != c, "operands of a product are three tiles");
  for (int r = 0; r < config.rows[c]; ++r)
    for (int i = 0; i < config.row_bytes[c] / 4; ++i) {
      float sum[2] = {}, old;
      for (int k = 0; k < config.row_bytes[a] / 4; ++k)
        for (int half = 0; half < 2; ++half)
          sum[half] = flushed(std::fma(element(&tile[a][r][4 * k + 2 * half]),
                                       element(&tile[b][k][4 * i + 2 * half]), sum[half]));
      std::memcpy(&old, &tile[c][r][4 * i], sizeof old);
      old = flushed(flushed(old) + flushed(sum[0] + sum[1]));
      std::memcpy(&tile[c][r][4 * i], &old, sizeof old);
    }
}

// VEX.128.pp.0F38.W0 opcode modrm, with an address as it may be.
void execute(int, siginfo_t*, void* context) {
  constexpr int kRegisters[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                REG_R12, REG_R13, REG_R14, REG_R15};
  greg_t* regs = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* code = reinterpret_cast<const uint8_t*>(regs[REG_RIP]);
  ++trapped;
  require(code[0] == 0xc4 && (code[1] & 31) == 2 && !(code[2] & 0x84), "not an instruction of AMX");
  const int prefix = code[2] & 3, second = ~code[2] >> 3 & 15, opcode = code[3], modrm = code[4];
  const int mode = modrm >> 6, t = modrm >> 3 & 7, low = modrm & 7;
  auto extended = [&](int r, int bit) { return kRegisters[r | (code[1] >> bit & 1 ? 0 : 8)]; };
  const uint8_t* next = code + 5;
  uint8_t* at = nullptr;
  int64_t stride = 0;
  if (mode != 3) {
    const bool sib = low == 4, relative = mode == 0 && low == 5;
    require(sib || opcode != 0x4b, "tiles are addressed by base and index");
    int base = low;
    if (sib) {
      const int index = *next >> 3 & 7;
      base = *next & 7;
      if (index != 4 || !(code[1] & 0x40)) stride = regs[extended(index, 6)] << (*next >> 6);
      ++next;
      require(base != 5 || mode != 0, "an address without a base");
    }
    int32_t offset = 0;
    if (mode == 1) offset = static_cast<int8_t>(*next++);
    if (mode == 2 || relative) std::memcpy(&offset, next, sizeof offset), next += sizeof offset;
    at = reinterpret_cast<uint8_t*>(relative ? reinterpret_cast<greg_t>(next)
                                             : regs[extended(base, 5)]) +
         offset;
  }
  if (opcode == 0x49 && at) {
    at += stride;
    require(t == 0 && prefix < 2, "not LDTILECFG or STTILECFG");
    std::memcpy(prefix ? static_cast<void*>(at) : &config, prefix ? &config : (void*)at, 64);
    require(config.palette < 2, "there is no such palette");
    for (int i = 0; i < 16; ++i) {
      const int most = i < 8 ? 1 : 0;
      require(config.row_bytes[i] <= 64 * most && config.rows[i] <= 16 * most, "too large a tile");
      require(i > 13 || !config.zeros[i], "what is reserved is not zero");
    }
    if (!prefix) std::memset(tile, 0, sizeof tile);
  } else if (opcode == 0x49 && prefix == 0 && modrm == 0xc0) {
    config = {};
  } else {
    require(config.palette == 1, "tiles are not configured");
    if (opcode == 0x49 && prefix == 3 && low == 0)
      std::memset(tile[t], 0, sizeof tile[t]);
    else if (opcode == 0x4b && (prefix == 2 || prefix == 3))
      for (int r = 0; r < config.rows[t]; ++r, at += stride)
        std::memcpy(prefix == 2 ? at : tile[t][r], prefix == 2 ? tile[t][r] : at,
                    config.row_bytes[t]);
    else if (opcode == 0x5c && prefix == 2 && mode == 3)
      dot(t, low, second);
    else
      require(false, "an instruction of AMX that is not known");
  }
  regs[REG_RIP] = reinterpret_cast<greg_t>(next);
}

}  // namespace

int main() {
  struct sigaction action = {};
  action.sa_sigaction = execute;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
  syscall(SYS_arch_prctl, 0x1023, 18);  // where it is granted nothing traps
  Config before = {1}, after = {};
  before.rows[3] = 5, before.row_bytes[3] = 24;
  for (const Config& given : {Config{}, before}) {  // not configured; as somebody else left it
    asm volatile("ldtilecfg %0" : : "m"(given));
    require(kvtools::amx::tiles_agree(), "products are not those of the emulation");
    asm volatile("sttilecfg %0" : "=m"(after));
    require(std::memcmp(&after, &given, sizeof after) == 0, "tiles are configured otherwise");
  }
  std::printf("%d trapped\n", trapped);
}

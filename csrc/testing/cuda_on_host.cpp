// Runs a grid on the CPU, and refuses what a GPU would not do, or not do reliably:
// - accesses of one byte by two threads that no barrier orders, unless both read or are atomic;
// - shared memory that is read before it is written;
// - accesses that are not aligned, or outside memory where AddressSanitizer's library is loaded;
// - barriers and warp operations that some threads of the block, or lanes, never reach;
// - more shared memory than every architecture has.
//
// Accesses are seen because the kernels are compiled with -fsanitize=thread, whose calls end here
// instead of in its library.
#include "cuda_on_host.h"

#include <sys/mman.h>

#include <deque>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#ifndef __x86_64__
#error "kernels are run on the host on x86-64 only"
#endif

extern "C" {
// AddressSanitizer's, if it is there.
void* __asan_region_is_poisoned(void*, size_t) __attribute__((weak));
void __asan_unpoison_memory_region(const volatile void*, size_t) __attribute__((weak));

// Save the registers that a call keeps on this stack, its top in *from, and take up the stack `to`.
void kvtools_switch(void** from, void* to);
asm(R"(
.text
.type kvtools_switch, @function
kvtools_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size kvtools_switch, .-kvtools_switch
)");
}

namespace kvtools::testing {
namespace {

constexpr size_t kStack = 128 << 10, kMostThreads = 1024;
constexpr size_t kMostShared = 99 << 10;  // that a block may have where it is least, on sm_120

// When a thread last touched a byte.
struct Stamp {
  int32_t block = -1, epoch;  // barriers that its block had passed
  int16_t thread;
  uint16_t warp_epoch;  // __syncwarp that its warp had passed
  bool atomic;
};

struct Byte {
  Stamp write, read, other_read;  // the last reads of two threads
};

struct Copy {
  char* to;
  const char* from;
  int bytes, valid;
};

struct Fiber {
  enum State { ready, at_warp_operation, at_barrier, done } state;
  void* stack;
  std::vector<Copy> copies;  // of the group not committed yet
  std::deque<std::vector<Copy>> groups;
};

struct WarpState {
  uint64_t values[2][32 * kMostValues];
  int arrived = 0;
  uint32_t operations = 0;
  uint16_t syncs = 0;
  Warp operation;
};

class Grid {
 public:
  Grid(const char* kernel, dim3 block, size_t shared, const std::function<void()>& body)
      : body(body),
        kernel_(kernel),
        shared_(new char[shared ? shared : 1]),
        shared_bytes_(shared),
        fibers_(block.x),
        warps_(block.x / 32) {
    if (block.x % 32 || block.x > kMostThreads || block.y != 1 || block.z != 1)
      throw std::invalid_argument("a block must have 32 to 1024 threads, whole warps, in x");
    if (shared > kMostShared) throw std::invalid_argument("more shared memory than sm_120 has");
    stacks_ = static_cast<char*>(mmap(nullptr, kStack * block.x, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Grid() { munmap(stacks_, kStack * fibers_.size()); }

  void run_block(int index);
  void yield(Fiber::State state);
  void release_warp();
  [[noreturn]] void fail(const std::string& what);
  void access(const void* p, size_t bytes, bool write, bool aligned, bool atomic = false);
  void check_bounds(const void* p, size_t bytes, const char* verb);

  bool running() const { return running_; }
  Fiber& fiber() { return fibers_[current]; }
  WarpState& warp() { return warps_[current / 32]; }
  void* shared() { return shared_.get(); }

  const std::function<void()>& body;
  int current = 0;  // thread

 private:
  void start(int thread);
  void resume(int thread);
  void run_warp(int warp);
  bool ordered(const Stamp& before) const;

  const char* kernel_;
  std::unique_ptr<char[]> shared_;
  size_t shared_bytes_;
  std::vector<Fiber> fibers_;
  std::vector<WarpState> warps_;
  char* stacks_;
  void* scheduler_ = nullptr;
  std::string error_;
  int32_t block_ = 0, epoch_ = 0;
  bool running_ = false;

  static constexpr uintptr_t kPage = 1024;
  std::unordered_map<uintptr_t, std::unique_ptr<Byte[]>> memory_;
  uintptr_t last_page_ = 0;
  Byte* last_ = nullptr;
};

thread_local Grid* grid = nullptr;

void entry() {
  grid->body();
  grid->yield(Fiber::done);
}

void Grid::start(int thread) {
  Fiber& fiber = fibers_[thread];
  fiber.state = Fiber::ready;
  // What the last fiber here left: it has never returned.
  char* const stack = stacks_ + kStack * thread;
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack, kStack);
  fiber.copies.clear(), fiber.groups.clear();
  // As kvtools_switch leaves a stack: six registers, where to return to, and where `entry` would.
  auto* top = reinterpret_cast<void**>(stack + kStack) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack = top;
}

void Grid::resume(int thread) {
  current = thread, running_ = true;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  kvtools_switch(&scheduler_, fibers_[thread].stack);
  running_ = false;
  // The fibers are left as they are: nothing on their stacks needs to be destroyed.
  if (!error_.empty()) throw std::runtime_error(error_);
}

void Grid::yield(Fiber::State state) {
  Fiber& self = fiber();
  self.state = state;
  kvtools_switch(&self.stack, scheduler_);
}

void Grid::fail(const std::string& what) {
  std::ostringstream text;
  text << kernel_ << ", block " << block_ << ", thread " << current << ": " << what;
  error_ = text.str();
  if (running_) yield(Fiber::done);
  throw std::runtime_error(error_);
}

// Until each of its lanes is at a barrier of the block, or done.
void Grid::run_warp(int warp) {
  Fiber* lanes = &fibers_[32 * warp];
  for (bool ran = true; ran;) {
    ran = false;
    for (int lane = 0; lane < 32; ++lane)
      if (lanes[lane].state == Fiber::ready) resume(32 * warp + lane), ran = true;
  }
  for (int lane = 0; lane < 32; ++lane)
    if (lanes[lane].state == Fiber::at_warp_operation) {
      current = 32 * warp + lane;
      for (int other = 0; other < 32; ++other)
        if (lanes[other].state != Fiber::at_warp_operation)
          fail("waits for its warp, of which lane " + std::to_string(other) +
               (lanes[other].state == Fiber::done ? " has returned" : " waits at a barrier"));
    }
}

void Grid::release_warp() {
  Fiber* lanes = &fibers_[current / 32 * 32];
  for (int lane = 0; lane < 32; ++lane) lanes[lane].state = Fiber::ready;
}

void Grid::run_block(int index) {
  block_ = index, epoch_ = 0;
  for (size_t thread = 0; thread < fibers_.size(); ++thread) start(thread);
  for (WarpState& warp : warps_) warp = {};
  for (bool left = true; left;) {
    for (size_t warp = 0; warp < warps_.size(); ++warp) run_warp(warp);
    left = false;
    for (Fiber& fiber : fibers_)
      if (fiber.state == Fiber::at_barrier) fiber.state = Fiber::ready, left = true;
    ++epoch_;
  }
}

bool Grid::ordered(const Stamp& before) const {
  if (before.block < 0) return true;
  if (before.block != block_) return false;
  if (before.thread == current || before.epoch < epoch_) return true;
  return before.thread / 32 == current / 32 && before.warp_epoch < warps_[current / 32].syncs;
}

void Grid::check_bounds(const void* p, size_t bytes, const char* verb) {
  if (__asan_region_is_poisoned && __asan_region_is_poisoned(const_cast<void*>(p), bytes)) {
    std::ostringstream text;
    text << verb << ' ' << bytes << " bytes outside of memory, at " << p;
    fail(text.str());
  }
}

void Grid::access(const void* p, size_t bytes, bool write, bool aligned, bool atomic) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  const auto begin = reinterpret_cast<uintptr_t>(stacks_);
  if (begin <= address && address < begin + kStack * fibers_.size()) return;
  const char* verb = write ? "writes" : "reads";
  if (aligned && address % bytes) {
    std::ostringstream text;
    text << verb << ' ' << bytes << " bytes at once that are not aligned, at " << p;
    fail(text.str());
  }
  check_bounds(p, bytes, verb);
  const auto shared = reinterpret_cast<uintptr_t>(shared_.get());
  const bool is_shared = shared <= address && address < shared + shared_bytes_;
  const Stamp now{block_, epoch_, static_cast<int16_t>(current), warp().syncs, atomic};
  for (uintptr_t a = address; a < address + bytes; ++a) {
    if (a / kPage != last_page_ || !last_) {
      std::unique_ptr<Byte[]>& page = memory_[a / kPage];
      if (!page) page.reset(new Byte[kPage]);
      last_page_ = a / kPage, last_ = page.get();
    }
    Byte& byte = last_[a % kPage];
    const Stamp* other = nullptr;
    // Shared memory is a block's own.
    auto clashes = [&](const Stamp& before) {
      if (is_shared && before.block != block_) return false;
      return !(atomic && before.atomic) && !ordered(before);
    };
    if (clashes(byte.write)) other = &byte.write;
    if (write && clashes(byte.read)) other = &byte.read;
    if (write && clashes(byte.other_read)) other = &byte.other_read;
    if (other || (is_shared && !write && byte.write.block != block_)) {
      std::ostringstream text;
      text << verb << " byte " << (is_shared ? a - shared : a) << " of "
           << (is_shared ? "shared" : "global") << " memory, which ";
      if (other)
        text << "thread " << other->thread << " of block " << other->block
             << (other == &byte.write ? " writes" : " reads") << " with no barrier between them";
      else
        text << "the block has not written";
      fail(text.str());
    }
    if (write) {
      byte.write = now;
    } else {
      if (byte.read.block != now.block || byte.read.thread != now.thread)
        byte.other_read = byte.read;
      byte.read = now;
    }
  }
}

}  // namespace

void run(const char* kernel, dim3 blocks, dim3 threads, size_t shared,
         const std::function<void()>& body) {
  Grid here(kernel, threads, shared, body);
  grid = &here;
  struct Reset {
    ~Reset() { grid = nullptr; }
  } reset;
  gridDim = blocks, blockDim = threads;
  int index = 0;
  for (unsigned z = 0; z < blocks.z; ++z)
    for (unsigned y = 0; y < blocks.y; ++y)
      for (unsigned x = 0; x < blocks.x; ++x) {
        blockIdx = {x, y, z};
        here.run_block(index++);
      }
}

void* shared_memory() { return grid->shared(); }

int lane() { return grid->current % 32; }

void block_barrier() { grid->yield(Fiber::at_barrier); }

uint64_t* lane_values() { return grid->warp().values[grid->warp().operations % 2]; }

void warp_barrier(Warp operation) {
  WarpState& warp = grid->warp();
  if (warp.arrived && warp.operation != operation)
    grid->fail("is at another operation than other lanes of its warp");
  warp.operation = operation;
  if (++warp.arrived < 32) return grid->yield(Fiber::at_warp_operation);
  warp.arrived = 0;
  ++warp.operations;
  warp.syncs += operation == Warp::sync;
  grid->release_warp();
}

void copy_later(void* to, const void* from, int bytes, int valid) {
  grid->fiber().copies.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), bytes, valid});
}

void commit_copies() {
  Fiber& fiber = grid->fiber();
  fiber.groups.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}

void wait_for_copies(int groups_left) {
  Fiber& fiber = grid->fiber();
  for (; static_cast<int>(fiber.groups.size()) > groups_left; fiber.groups.pop_front())
    for (const Copy& copy : fiber.groups.front()) {
      if (copy.valid) grid->access(copy.from, copy.valid, false, false);
      grid->access(copy.to, copy.bytes, true, true);
      std::memcpy(copy.to, copy.from, copy.valid);
      std::memset(copy.to + copy.valid, 0, copy.bytes - copy.valid);
    }
}

void see_atomic(const void* p, size_t bytes) {
  if (grid) grid->access(p, bytes, true, true, true);
}

}  // namespace kvtools::testing

// What -fsanitize=thread calls.
namespace {

inline void seen(const void* p, size_t bytes, bool write, bool aligned) {
  if (kvtools::testing::grid && kvtools::testing::grid->running())
    kvtools::testing::grid->access(p, bytes, write, aligned);
}

}  // namespace

#define KVTOOLS_ACCESS(bytes)                                                  \
  void __tsan_read##bytes(void* p) { seen(p, bytes, false, true); }            \
  void __tsan_write##bytes(void* p) { seen(p, bytes, true, true); }            \
  void __tsan_unaligned_read##bytes(void* p) { seen(p, bytes, false, false); } \
  void __tsan_unaligned_write##bytes(void* p) { seen(p, bytes, true, false); }

extern "C" {
KVTOOLS_ACCESS(1)
KVTOOLS_ACCESS(2)
KVTOOLS_ACCESS(4)
KVTOOLS_ACCESS(8)
KVTOOLS_ACCESS(16)
void __tsan_read_range(void* p, size_t bytes) { seen(p, bytes, false, false); }
void __tsan_write_range(void* p, size_t bytes) { seen(p, bytes, true, false); }
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}

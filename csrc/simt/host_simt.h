// Host emulation of the CUDA execution model: enough of it to run this project's kernels unmodified, built to find
// faults.
//
// Every CUDA thread of a block is a fiber with its own stack; blocks run one after another. A thread runs until it
// meets a barrier or a warp collective, then the scheduler takes the next one, in an order shuffled by the seed and
// shuffled again on every pass. What a GPU would leave undefined ends the launch with `simt::Fault`, which names
// kernel, block, thread and line:
//
//   - threads of one block at different __syncthreads(), or one of them already returned
//   - a warp collective whose mask lacks the caller, names a lane that has returned, or differs between lanes that meet
//   - a shuffle that reads a lane outside the mask
//   - a deadlock
//   - an access past a launch's arrays (DeviceArray ends at a guard page) or past shared memory (borders are checked)
//
// Shared memory and scratch are filled with 0xff bytes (NaN in every float type) before use, so that a read before its
// write, the usual effect of a missing barrier, comes out as NaN. Not shown by this: memory ordering, bank conflicts,
// speed.
//
// One launch at a time in a process: the state is global and not guarded against threads.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__has_feature) && !defined(__SANITIZE_ADDRESS__)  // clang says it otherwise than gcc
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif

#if !defined(SIMT_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define SIMT_UCONTEXT 1
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

// ---- CUDA's own names
// ----------------------------------------------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace simt {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline float widen(BFloat16 x) { return from_bits(uint32_t{x.bits} << 16); }
inline float widen(Half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, exponent = (x.bits >> 10) & 0x1fu, fraction = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t wide = exponent == 31 ? 0xffu : exponent + 112;
  return from_bits(sign | (wide << 23) | (fraction << 13));
}

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- memory that notices
// --------------------------------------------------------------------------------------------------- An array that
// ends at an unreadable page and begins after one, filled with NaN bytes. The end is exact to 16 bytes (the alignment
// that vector loads need); the bytes between stay NaN.
class GuardedBytes {
 public:
  explicit GuardedBytes(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t padded = (bytes + 15) / 16 * 16;
    inner_ = (padded + page - 1) / page * page;
    length_ = inner_ + 2 * page;
    map_ = static_cast<unsigned char*>(mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map_ == MAP_FAILED) throw std::bad_alloc();
    if (inner_ != 0 && mprotect(map_ + page, inner_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    data_ = map_ + page + inner_ - padded;
    if (inner_ != 0) std::memset(map_ + page, 0xff, inner_);
#if SIMT_ASAN
    __asan_poison_memory_region(map_ + page, inner_ - padded);
    __asan_poison_memory_region(data_ + bytes, padded - bytes);
#endif
  }
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;
  ~GuardedBytes() {
#if SIMT_ASAN
    __asan_unpoison_memory_region(map_, length_);
#endif
    munmap(map_, length_);
  }
  unsigned char* data() const { return data_; }

 private:
  unsigned char* map_;
  unsigned char* data_;
  size_t inner_, length_;
};

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t count)
      : bytes_(std::make_unique<GuardedBytes>(static_cast<size_t>(count) * sizeof(T))), count_(count) {}
  DeviceArray(const T* source, int64_t count) : DeviceArray(count) {
    if (count != 0) std::memcpy(bytes_->data(), source, static_cast<size_t>(count) * sizeof(T));
  }
  T* data() const { return reinterpret_cast<T*>(bytes_->data()); }
  int64_t size() const { return count_; }

 private:
  std::unique_ptr<GuardedBytes> bytes_;
  int64_t count_;
};

// ---- fibers
// ----------------------------------------------------------------------------------------------------------------
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kStaticSharedLimit = 48 * 1024;
constexpr unsigned kWarpSize = 32;

enum class Wait : uint8_t { none, block, warp, returned };

struct Place {
  const char* file = "";
  int line = 0;
  bool operator==(const Place& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
};

struct Fiber {
  dim3 thread;
  unsigned rank = 0, warp = 0, lane = 0;
  Wait wait = Wait::none;
  // The collective this lane waits in, what it brings and what it takes away.
  const char* collective = "";
  unsigned mask = 0;
  Place place;
  uint64_t value = 0, result = 0;
  int source = 0;
  std::unique_ptr<GuardedBytes> stack;
#if defined(SIMT_UCONTEXT)
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
};

struct SharedSite {
  Place place;
  size_t bytes;
  std::unique_ptr<GuardedBytes> memory;
};

struct Machine {
  const char* kernel = "";
  dim3 grid, block, block_index;
  size_t dynamic_bytes = 0;
  std::unique_ptr<GuardedBytes> dynamic_memory;
  std::vector<SharedSite> sites;
  std::vector<std::unique_ptr<Fiber>> fibers;
  unsigned threads = 0, returned = 0, at_barrier = 0;
  Place barrier;
  const std::function<void()>* body = nullptr;
  Fiber* current = nullptr;
  std::string fault;
  std::mt19937_64 random;
  sigjmp_buf escape;
#if defined(SIMT_UCONTEXT)
  ucontext_t scheduler;
#else
  void* scheduler = nullptr;
#endif
#if SIMT_ASAN
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
#endif
};

inline Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

#if !defined(SIMT_UCONTEXT)
// Saves the callee-saved registers on the running stack, stores its pointer in *save and continues on `to`.
extern "C" void finecf_simt_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.weak finecf_simt_switch
.hidden finecf_simt_switch
.type finecf_simt_switch, @function
finecf_simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size finecf_simt_switch, .-finecf_simt_switch
)");
#else
asm(R"(
.text
.weak finecf_simt_switch
.hidden finecf_simt_switch
.type finecf_simt_switch, %function
finecf_simt_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size finecf_simt_switch, .-finecf_simt_switch
)");
#endif
#endif

// Leaves the running fiber; `final` when it will never be resumed.
inline void to_scheduler(bool final) {
  Machine& m = machine();
  Fiber* self = m.current;
#if SIMT_ASAN
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(final ? nullptr : &fake_stack, m.scheduler_stack, m.scheduler_stack_bytes);
#else
  (void) final;
#endif
#if defined(SIMT_UCONTEXT)
  swapcontext(&self->context, &m.scheduler);
#else
  finecf_simt_switch(&self->stack_pointer, m.scheduler);
#endif
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
}

inline void to_fiber(Fiber& fiber) {
  Machine& m = machine();
  m.current = &fiber;
#if SIMT_ASAN
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack->data(), kStackBytes);
#endif
#if defined(SIMT_UCONTEXT)
  swapcontext(&m.scheduler, &fiber.context);
#else
  finecf_simt_switch(&m.scheduler, fiber.stack_pointer);
#endif
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  m.current = nullptr;
}

inline std::string triple(const dim3& d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}
inline std::string where(const Place& place) { return std::string(place.file) + ":" + std::to_string(place.line); }
inline std::string who(const Fiber& fiber) {
  return "thread " + triple(fiber.thread) + " (warp " + std::to_string(fiber.warp) + ", lane " +
         std::to_string(fiber.lane) + ")";
}
inline std::string hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}
inline std::string at_work() {
  const Machine& m = machine();
  return std::string("kernel ") + m.kernel + ", block " + triple(m.block_index);
}

// Ends the launch: the running fiber stays where it is, the scheduler throws.
[[noreturn]] inline void fail(const Place& place, const std::string& what) {
  Machine& m = machine();
  m.fault = at_work() + ", " + who(*m.current) + " at " + where(place) + ": " + what;
  to_scheduler(true);
  std::abort();  // never resumed
}

inline void on_bad_access(int, siginfo_t* info, void*) {
  Machine& m = machine();
  if (m.current == nullptr) {  // not a kernel's doing: let the default action end the process
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  char address[32];
  std::snprintf(address, sizeof address, "%p", info->si_addr);
  m.fault =
      at_work() + ", " + who(*m.current) + ": access to " + address +
      ", outside every array of this launch and the thread's own stack; " +
      (m.current->place.line == 0 ? "it has not synchronised yet" : "last synchronised at " + where(m.current->place));
  m.current = nullptr;
  siglongjmp(m.escape, 1);
}

// Catches accesses to guard pages for as long as it lives. The sanitizer, where built in, has its own handler.
class AccessWatch {
 public:
  AccessWatch() {
#if !SIMT_ASAN
    static std::vector<unsigned char> spare(64 * 1024);
    stack_t stack{};
    stack.ss_sp = spare.data();
    stack.ss_size = spare.size();
    sigaltstack(&stack, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_bad_access;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &old_segv_);
    sigaction(SIGBUS, &action, &old_bus_);
#endif
  }
  ~AccessWatch() {
#if !SIMT_ASAN
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaction(SIGBUS, &old_bus_, nullptr);
    sigaltstack(&old_stack_, nullptr);
#endif
  }
  AccessWatch(const AccessWatch&) = delete;
  AccessWatch& operator=(const AccessWatch&) = delete;

 private:
  stack_t old_stack_{};
  struct sigaction old_segv_{}, old_bus_{};
};

inline void on_return() {
  Machine& m = machine();
  Fiber& self = *m.current;
  self.wait = Wait::returned;
  ++m.returned;
  if (m.at_barrier != 0) fail(m.barrier, "returned while another thread of the block waits there in __syncthreads()");
  for (unsigned rank = self.warp * kWarpSize; rank < std::min(m.threads, (self.warp + 1) * kWarpSize); ++rank) {
    const Fiber& other = *m.fibers[rank];
    if (other.wait == Wait::warp && (other.mask >> self.lane & 1u))
      fail(other.place,
           "returned, though lane " + std::to_string(other.lane) + " waits for it there in " + other.collective);
  }
}

inline void fiber_main() {
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &machine().scheduler_stack, &machine().scheduler_stack_bytes);
#endif
  (*machine().body)();
  on_return();
  to_scheduler(true);
  std::abort();  // never resumed
}

inline void arm(Fiber& fiber) {
  if (!fiber.stack) fiber.stack = std::make_unique<GuardedBytes>(kStackBytes);
  unsigned char* const bottom = fiber.stack->data();
#if SIMT_ASAN
  __asan_unpoison_memory_region(bottom, kStackBytes);
#endif
#if defined(SIMT_UCONTEXT)
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = bottom;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#else
  void** top = reinterpret_cast<void**>(bottom + kStackBytes);
  const auto entry = reinterpret_cast<void*>(&fiber_main);
#if defined(__x86_64__)
  *--top = nullptr;  // the caller fiber_main never returns to; keeps the ABI's alignment at its entry
  *--top = entry;
  for (int i = 0; i < 6; ++i) *--top = nullptr;
#else
  for (int i = 0; i < 20; ++i) *--top = nullptr;
  top[11] = entry;  // x30, the return address
#endif
  fiber.stack_pointer = top;
#endif
}

// ---- barriers and collectives
// ------------------------------------------------------------------------------------------------
inline void block_barrier(const Place& place) {
  Machine& m = machine();
  Fiber& self = *m.current;
  if (m.returned != 0 || (m.at_barrier != 0 && !(m.barrier == place))) {
    for (unsigned rank = 0; rank < m.threads; ++rank) {
      const Fiber& other = *m.fibers[rank];
      if (other.wait == Wait::returned) fail(place, "__syncthreads() after " + who(other) + " has returned");
      if (other.wait == Wait::block)
        fail(place, "divergent __syncthreads(): " + who(other) + " waits at " + where(other.place));
    }
  }
  m.barrier = place;
  self.place = place;
  self.collective = "__syncthreads";
  self.wait = Wait::block;
  if (++m.at_barrier == m.threads) {
    m.at_barrier = 0;
    for (unsigned rank = 0; rank < m.threads; ++rank) m.fibers[rank]->wait = Wait::none;
  }
  to_scheduler(false);
}

// Joins the lanes of `mask`; the last to come runs `finish(lanes)`, lanes[i] null outside the mask.
template <typename Finish>
uint64_t collective(const char* name, unsigned mask, uint64_t value, int source, const Place& place, Finish finish) {
  Machine& m = machine();
  Fiber& self = *m.current;
  if (!(mask >> self.lane & 1u))
    fail(place, std::string(name) + " with mask " + hex(mask) + ", which lacks the calling lane");
  self.collective = name;
  self.mask = mask;
  self.place = place;
  self.value = value;
  self.source = source;
  self.wait = Wait::warp;
  Fiber* lanes[kWarpSize] = {};
  bool all_here = true;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    const unsigned rank = self.warp * kWarpSize + lane;
    if (rank >= m.threads)
      fail(place, std::string(name) + " with mask " + hex(mask) + ": lane " + std::to_string(lane) +
                      " does not exist in this block");
    Fiber& other = *m.fibers[rank];
    if (other.wait == Wait::returned)
      fail(place, std::string(name) + " with mask " + hex(mask) + ": lane " + std::to_string(lane) + " has returned");
    lanes[lane] = &other;
    if (other.wait != Wait::warp) {
      all_here = false;
    } else if (other.mask != mask || other.collective != self.collective || !(other.place == place)) {
      // Lanes that wait for each other in different calls never meet; others may still come along.
      if (other.mask >> self.lane & 1u)
        fail(place, std::string(name) + " with mask " + hex(mask) + ": lane " + std::to_string(lane) +
                        " waits for this lane in " + other.collective + " with mask " + hex(other.mask) + " at " +
                        where(other.place));
      all_here = false;
    }
  }
  if (all_here) {
    finish(lanes);
    for (Fiber* lane : lanes)
      if (lane != nullptr) lane->wait = Wait::none;
  }
  to_scheduler(false);
  return self.result;
}

template <typename T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <typename T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// `source` is the absolute lane read, or -1 for the own value (a shuffle past its segment's edge).
template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source, const Place& place) {
  const uint64_t got = collective(name, mask, pack(value), source, place, [&](Fiber** lanes) {
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (lanes[lane] == nullptr) continue;
      const int from = lanes[lane]->source;
      if (from >= 0 && lanes[from] == nullptr)
        fail(place, std::string(name) + ": lane " + std::to_string(lane) + " reads lane " + std::to_string(from) +
                        ", which is outside the mask " + hex(mask));
      lanes[lane]->result = from < 0 ? lanes[lane]->value : lanes[from]->value;
    }
  });
  return unpack<T>(got);
}

inline unsigned vote(const char* name, unsigned mask, bool predicate, const Place& place) {
  return static_cast<unsigned>(collective(name, mask, predicate, 0, place, [](Fiber** lanes) {
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
      if (lanes[lane] != nullptr && lanes[lane]->value != 0) ballot |= 1u << lane;
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
      if (lanes[lane] != nullptr) lanes[lane]->result = ballot;
  }));
}

inline void check_width(int width, const Place& place) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    fail(place, "shuffle width " + std::to_string(width) + " is not a power of two up to 32");
}

// ---- shared memory
// -------------------------------------------------------------------------------------------------------------
inline unsigned char* static_shared_bytes(size_t bytes, const Place& place) {
  Machine& m = machine();
  size_t total = bytes;
  for (SharedSite& site : m.sites) {
    if (site.place == place) {
      if (site.bytes != bytes) fail(place, "one static shared array with two sizes");
      return site.memory->data();
    }
    total += site.bytes;
  }
  if (total > kStaticSharedLimit)
    fail(place, "static shared memory of " + std::to_string(total) + " bytes; 49152 is the limit");
  m.sites.push_back({place, bytes, std::make_unique<GuardedBytes>(bytes)});
  return m.sites.back().memory->data();
}
template <typename T>
T* static_shared(size_t count, const char* file, int line) {
  return reinterpret_cast<T*>(static_shared_bytes(count * sizeof(T), {file, line}));
}
template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(machine().dynamic_memory->data());
}

inline void poison(unsigned char* data, size_t bytes) {
  if (bytes != 0) std::memset(data, 0xff, bytes);
}

// The bytes between a shared array's end and its guard page must still be as they were filled.
inline void check_border(const unsigned char* data, size_t bytes, const std::string& name) {
  if (SIMT_ASAN) return;  // poisoned: the sanitizer has seen to it
  for (size_t i = bytes; i < (bytes + 15) / 16 * 16; ++i)
    if (data[i] != 0xff) throw Fault(at_work() + ": wrote past the end of " + name);
}

// ---- the scheduler
// ---------------------------------------------------------------------------------------------------------------
[[noreturn]] inline void report_deadlock() {
  const Machine& m = machine();
  std::string text = at_work() + ": deadlock;";
  Place last;
  for (unsigned rank = 0; rank < m.threads; ++rank) {
    const Fiber& fiber = *m.fibers[rank];
    if (fiber.wait == Wait::returned || fiber.place == last) continue;
    last = fiber.place;
    text += " " + who(fiber) + " waits in " + fiber.collective + " at " + where(fiber.place) + ";";
  }
  throw Fault(text);
}

// Gives every thread of the block turns until all have returned.
inline void run_threads() {
  Machine& m = machine();
  std::vector<unsigned> order(m.threads);
  for (unsigned rank = 0; rank < m.threads; ++rank) order[rank] = rank;
  while (m.returned < m.threads) {
    std::shuffle(order.begin(), order.end(), m.random);
    bool moved = false;
    for (const unsigned rank : order) {
      Fiber& fiber = *m.fibers[rank];
      if (fiber.wait != Wait::none) continue;
      moved = true;
      to_fiber(fiber);
      if (!m.fault.empty()) throw Fault(m.fault);
    }
    if (!moved) report_deadlock();
  }
}

inline void run_block() {
  Machine& m = machine();
  m.returned = m.at_barrier = 0;
  poison(m.dynamic_memory->data(), m.dynamic_bytes);
  for (SharedSite& site : m.sites) poison(site.memory->data(), site.bytes);
  for (unsigned rank = 0; rank < m.threads; ++rank) {
    Fiber& fiber = *m.fibers[rank];
    fiber.rank = rank;
    fiber.warp = rank / kWarpSize;
    fiber.lane = rank % kWarpSize;
    fiber.thread = dim3(rank % m.block.x, rank / m.block.x % m.block.y, rank / (m.block.x * m.block.y));
    fiber.wait = Wait::none;
    fiber.place = {};
    arm(fiber);
  }
  // A bad access comes back here from the signal handler; what run_threads held is lost with it, and the launch is
  // over.
  if (sigsetjmp(m.escape, 1) != 0) throw Fault(m.fault);
  run_threads();
  check_border(m.dynamic_memory->data(), m.dynamic_bytes, "dynamic shared memory");
  for (const SharedSite& site : m.sites)
    check_border(site.memory->data(), site.bytes, "the static shared array of " + where(site.place));
}

// Runs `body` once per thread of every block, blocks in an order drawn from the seed.
inline void launch(const char* kernel, dim3 grid, dim3 block, size_t dynamic_bytes, uint64_t seed,
                   const std::function<void()>& body) {
  Machine& m = machine();
  m.kernel = kernel;
  m.grid = grid;
  m.block = block;
  m.dynamic_bytes = dynamic_bytes;
  m.body = &body;
  m.fault.clear();
  m.random.seed(seed);
  m.threads = block.x * block.y * block.z;
  if (m.threads < 1 || m.threads > 1024)
    throw Fault(std::string("kernel ") + kernel + ": a block has 1 to 1024 threads, not " + std::to_string(m.threads));
  while (m.fibers.size() < m.threads) m.fibers.push_back(std::make_unique<Fiber>());
  m.sites.clear();
  m.dynamic_memory = std::make_unique<GuardedBytes>(dynamic_bytes);
  const AccessWatch watch;
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), m.random);
  for (const uint64_t i : order) {
    m.block_index = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                         static_cast<unsigned>(i / (uint64_t{grid.x} * grid.y)));
    run_block();
  }
}

// What a kernel was launched with.
struct Launch {
  std::string kernel;
  unsigned grid, block;
  size_t dynamic_bytes;
};

// The host's side of the launcher that the drivers in the *_kernel.cuh files are written against (its CUDA twin is
// common/cuda_launch.h): runs kernels in order, hands out scratch that lives as long as the launcher. With `only_plan`
// the launches are noted and not run, so that sizes can be asked about that would take minutes.
class HostLauncher {
 public:
  HostLauncher(uint64_t seed, size_t shared_limit, int multiprocessors, size_t scratch_budget, bool only_plan = false)
      : seed_(seed),
        shared_limit_(shared_limit),
        multiprocessors_(multiprocessors),
        scratch_budget_(scratch_budget),
        only_plan_(only_plan) {}

  template <typename... Parameters, typename... Arguments>
  void run(const char* name, void (*kernel)(Parameters...), unsigned grid, unsigned block, size_t shared,
           Arguments... arguments) {
    if (shared > shared_limit_)
      throw Fault(std::string("kernel ") + name + " asks for " + std::to_string(shared) +
                  " bytes of shared memory; the limit is " + std::to_string(shared_limit_));
    if (!only_plan_)
      launch(name, dim3(grid), dim3(block), shared, seed_++, [&] { kernel(static_cast<Parameters>(arguments)...); });
    launches_.push_back({name, grid, block, shared});
  }
  template <typename T>
  T* scratch(int64_t count) {
    const size_t bytes = only_plan_ ? 0 : static_cast<size_t>(count) * sizeof(T);
    scratch_.push_back(std::make_unique<GuardedBytes>(bytes));
    return reinterpret_cast<T*>(scratch_.back()->data());
  }
  size_t shared_limit() const { return shared_limit_; }
  size_t scratch_budget() const { return scratch_budget_; }
  int multiprocessors() const { return multiprocessors_; }
  // The launches so far, for tests that must know which path was taken and what it asked for.
  const std::vector<Launch>& launches() const { return launches_; }

 private:
  uint64_t seed_;
  size_t shared_limit_;
  int multiprocessors_;
  size_t scratch_budget_;
  bool only_plan_;
  std::vector<std::unique_ptr<GuardedBytes>> scratch_;
  std::vector<Launch> launches_;
};

}  // namespace simt

// ---- what kernels call
// -----------------------------------------------------------------------------------------------------------
#define threadIdx (::simt::machine().current->thread)
#define blockIdx (::simt::machine().block_index)
#define blockDim (::simt::machine().block)
#define gridDim (::simt::machine().grid)
#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_HERE) { ::simt::block_barrier({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_HERE) {
  ::simt::vote("__syncwarp", mask, false, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_HERE) {
  return ::simt::vote("__ballot_sync", mask, predicate != 0, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, SIMT_HERE) {
  return ::simt::vote("__any_sync", mask, predicate != 0, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_HERE) {
  return ::simt::vote("__all_sync", mask, predicate != 0, {file, line}) == mask;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_HERE) {
  ::simt::check_width(width, {file, line});
  const int lane = static_cast<int>(::simt::machine().current->lane), base = lane / width * width;
  return ::simt::shuffle("__shfl_sync", mask, value, base + (source & (width - 1)), {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
  ::simt::check_width(width, {file, line});
  const int lane = static_cast<int>(::simt::machine().current->lane), from = lane - static_cast<int>(delta);
  return ::simt::shuffle("__shfl_up_sync", mask, value, from >= lane / width * width ? from : -1, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
  ::simt::check_width(width, {file, line});
  const int lane = static_cast<int>(::simt::machine().current->lane), from = lane + static_cast<int>(delta);
  return ::simt::shuffle("__shfl_down_sync", mask, value, from < (lane / width + 1) * width ? from : -1, {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SIMT_HERE) {
  ::simt::check_width(width, {file, line});
  const int lane = static_cast<int>(::simt::machine().current->lane), from = lane ^ lane_mask;
  return ::simt::shuffle("__shfl_xor_sync", mask, value, from < (lane / width + 1) * width ? from : -1, {file, line});
}
#undef SIMT_HERE

// Threads switch only at synchronisation, so a plain read-modify-write is atomic here.
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <typename T>
T atomicSub(T* address, T value) {
  const T old = *address;
  *address = old - value;
  return old;
}
template <typename T>
T atomicMin(T* address, T value) {
  const T old = *address;
  *address = std::min(old, value);
  return old;
}
template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
template <typename T>
T atomicAnd(T* address, T value) {
  const T old = *address;
  *address = old & value;
  return old;
}
template <typename T>
T atomicOr(T* address, T value) {
  const T old = *address;
  *address = old | value;
  return old;
}
template <typename T>
T atomicXor(T* address, T value) {
  const T old = *address;
  *address = old ^ value;
  return old;
}
template <typename T>
T atomicExch(T* address, T value) {
  return std::exchange(*address, value);
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline unsigned __float_as_uint(float x) { return ::simt::unpack<unsigned>(::simt::pack(x)); }
inline float __uint_as_float(unsigned x) { return ::simt::from_bits(x); }

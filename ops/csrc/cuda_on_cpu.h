// CUDA kernels on the CPU, thread for thread, so that a test without a GPU runs the very .cu file that a GPU runs.
//
// Every CUDA thread is a fiber: a small stack and a saved stack pointer. A fiber runs until it has to wait in a barrier, a
// shuffle or a vote; then the next ready fiber of its block continues. Blocks run one after another, or spread over OpenMP
// threads with -fopenmp; a block never leaves the OS thread it started on. A launch returns when its kernel has ended.
// Plain CUDA C++ only: the names at the end of this file, no inline PTX, no launches from kernels.
//
// What is checked; each failure prints a sentence with the kernel and block and aborts the process:
//   - launches outside the limits of the hardware (sm_90);
//   - barriers, shuffles and votes that not all threads reach, where a GPU hangs, and threads that meet in different
//     __syncthreads() of the source, which CUDA leaves undefined;
//   - masks that omit the caller, and masks of shuffles and votes that name a lane that has exited or never existed;
//   - writes up to 256 bytes before or behind dynamic shared memory, which starts every block filled with 0xCD.
// Float atomics do not compile. A thread that overflows its stack (64 KiB) is a segmentation fault.
//
// Order: threads run in ascending order between barriers, and so do blocks. CUDA_ON_CPU_SEED=<n> in the environment, read at
// every launch, draws another order of blocks and another interleaving of threads, which then also switch at atomics and
// fences. The same n gives the same order; a result that depends on n shows a missing barrier.
//
// What a run here cannot show: races of plain reads and writes between two barriers, such as x += 1 for atomicAdd(&x, 1);
// misaligned vector loads. A kernel that spins on memory until another thread writes it never ends. fminf, fmaxf, expf and
// their like are those of <cmath>; fmaf and sqrtf are exact on both sides, and min and max of floats follow the GPU.
#pragma once

#if !defined(__x86_64__)
#error "cuda_on_cpu.h switches stacks with x86-64 instructions; another processor needs its own switch_stack."
#endif

#include <math.h>    // besides <cmath>: float overloads of exp, fabs, ... without std::, as CUDA has them
#include <sys/mman.h>

#include <cerrno>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>    // uses __attribute__((__noinline__)), so it must precede the macro below
#include <type_traits>
#include <utility>
#include <vector>

// ---- Qualifiers and types -------------------------------------------------------------------------------------------

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __shared__ static_assert(false, "shared memory comes from DYNAMIC_SHARED(type, name) only");

struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t { cudaSuccess = 0 };

// Hidden: libraries built from different versions of this header may live in one process, each with its own state. (Load
// them without RTLD_GLOBAL, which is the default, for the device functions of one must not call the state of another.)
#pragma GCC visibility push(hidden)

namespace cuda_on_cpu {

// ---- Fibers ---------------------------------------------------------------------------------------------------------

// Push the registers that a function must preserve, leave the stack pointer in *save, and continue where `to` was left.
// Jumping, not returning: a return to another stack always defeats the processor's return prediction.
__attribute__((naked, noipa)) inline void switch_stack(void** /*save: rdi*/, void* /*to: rsi*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "popq %rcx\n\t"
      "jmp *%rcx");
}

[[noreturn]] inline void die(const char* format, ...) __attribute__((format(printf, 1, 2)));
inline void die(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("cuda_on_cpu: ", stderr);
  vfprintf(stderr, format, arguments);
  fputs("\n", stderr);
  va_end(arguments);
  abort();
}

// Equal stacks in one mapping, each above memory that faults when touched. The guard is as large as the stack because a
// large local array may step over a single page.
class FiberStacks {
 public:
  FiberStacks() = default;
  FiberStacks(const FiberStacks&) = delete;
  FiberStacks& operator=(const FiberStacks&) = delete;
  ~FiberStacks() { release(); }

  void reserve(int count) {    // may move all stacks: no fiber may be alive
    if (count <= count_) return;
    release();
    void* base = mmap(nullptr, count * kStride, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) die("no address space for %d thread stacks: %s", count, strerror(errno));
    base_ = static_cast<char*>(base);
    count_ = count;
    for (int i = 0; i < count; ++i)
      if (mprotect(base_ + i * kStride + kGuardBytes, kStackBytes, PROT_READ | PROT_WRITE) != 0)
        die("no memory for %d thread stacks (vm.max_map_count may be too low): %s", count, strerror(errno));
  }

  // A stack pointer for switch_stack that enters `function` as if it had been called.
  void* prepare(int index, void (*function)()) const {
    // Tops at equal offsets in their pages would compete for the same few cache sets, hence the stagger.
    void** top = reinterpret_cast<void**>(base_ + (index + 1) * kStride - (index % 32) * 128);
    *--top = nullptr;    // the return address: there is none
    *--top = reinterpret_cast<void*>(function);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    return top;
  }

 private:
  static constexpr size_t kStackBytes = 64 << 10, kGuardBytes = 64 << 10, kStride = kStackBytes + kGuardBytes;

  void release() {
    if (base_) munmap(base_, count_ * kStride);
  }

  char* base_ = nullptr;
  int count_ = 0;
};

class RandomBits {    // splitmix64
 public:
  explicit RandomBits(uint64_t seed = 0) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>((next() >> 32) * bound >> 32); }
  int set_bit(unsigned bits) {    // the index of one of the set bits
    for (uint32_t skip = below(__builtin_popcount(bits)); skip > 0; --skip) bits &= bits - 1;
    return __builtin_ctz(bits);
  }

 private:
  uint64_t state_;
};

// ---- Threads, warps and blocks --------------------------------------------------------------------------------------

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xFFFFFFFFu;
constexpr unsigned kMaxThreadsPerBlock = 1024;
constexpr size_t kMaxSharedBytes = 227 << 10;
constexpr size_t kCanaryBytes = 256;    // on either side of shared memory; a multiple of its 16-byte alignment
constexpr unsigned char kSharedGarbage = 0xCD, kCanary = 0xA9;

struct Where {    // a line of the kernel; as a default argument it is the line of the call
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

enum class Operation { syncthreads, syncwarp, shfl, shfl_up, shfl_down, shfl_xor, ballot, any, all };

inline const char* name(Operation operation) {
  constexpr const char* names[] = {"__syncthreads",   "__syncwarp",    "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                   "__shfl_xor_sync", "__ballot_sync", "__any_sync",  "__all_sync"};
  return names[static_cast<int>(operation)];
}

class Block;

struct Thread {
  Block* block;
  uint3 index;
  int number, warp, lane;    // number: position in the block, x fastest
  void* stack_pointer;       // while it does not run
  Operation operation;       // what it waits in, or last waited in, with mask and place
  unsigned mask;
  Where where;
};

struct Meeting {    // lanes of a warp that wait for each other: same operation, same mask
  Operation operation;
  unsigned mask, arrived;
};

struct Warp {
  unsigned live, ready;    // lanes that have not exited; lanes that could run now
  int num_meetings;
  Meeting meetings[kWarpSize];
  // Per lane: what it brings to a meeting, and what it takes home. Two arrays, because the first to leave a meeting may
  // arrive at the next before the others have left.
  uint64_t brought[kWarpSize], taken[kWarpSize];
  uint8_t source[kWarpSize];
};

struct LaunchRecord {
  const char* kernel_name;
  dim3 grid, block;
  size_t shared_bytes;
  void (*call)(const void* kernel_call);
  const void* kernel_call;
  bool shuffled;
  uint64_t seed;
};

inline thread_local Thread* current_thread = nullptr;

inline Thread& self() { return *current_thread; }

// One block at a time on one OS thread.
class Block {
 public:
  const LaunchRecord* launch;
  uint3 index;

  void run(const LaunchRecord& record, int64_t block_number) {
    launch = &record;
    index = {static_cast<unsigned>(block_number % record.grid.x),
             static_cast<unsigned>(block_number / record.grid.x % record.grid.y),
             static_cast<unsigned>(block_number / record.grid.x / record.grid.y)};
    if (record.shuffled) {
      random_ = RandomBits(RandomBits(record.seed).next() ^ static_cast<uint64_t>(block_number));
      // Warps in step, or a warp far ahead of the others: each shows what the other hides.
      const uint32_t average_turns[] = {1, 8, 64, 1024};
      turns_of_a_warp_ = average_turns[random_.below(4)];
    }
    start_threads();
    fill_shared();
    resume(pick(), &runner_stack_pointer_);    // returns when the last thread has exited
    current_thread = nullptr;
    check_canaries();
  }

  void* shared() { return shared_.data() + kCanaryBytes; }

  void syncthreads(Thread& thread, Where where) {
    if (num_arrived_ > 0 && (where.line != barrier_.line || strcmp(where.file, barrier_.file) != 0))
      fail("thread %d is in the __syncthreads at %s:%d while others wait in the one at %s:%d", thread.number, where.file,
           where.line, barrier_.file, barrier_.line);
    wait_in(thread, Operation::syncthreads, kFullMask, where);
    barrier_ = where;
    ++num_arrived_;
    open_barrier_if_complete();
    switch_from(thread);
  }

  // Wait for all lanes of `mask`. Bring a value and, in a shuffle, the lane whose value to take home.
  uint64_t meet(Thread& thread, Operation operation, unsigned mask, uint64_t value, int source, Where where) {
    Warp& warp = warps_[thread.warp];
    const unsigned lane_bit = 1u << thread.lane;
    wait_in(thread, operation, mask, where);
    if (!(mask & lane_bit)) fail_mask(thread, "omits the calling", thread.lane, "");
    if (operation != Operation::syncwarp && (mask & ~warp.live)) fail_absent(thread, mask & ~warp.live);
    warp.brought[thread.lane] = value;
    warp.source[thread.lane] = static_cast<uint8_t>(source);
    int i = 0;
    while (i < warp.num_meetings && (warp.meetings[i].mask != mask || warp.meetings[i].operation != operation)) ++i;
    if (i == warp.num_meetings) warp.meetings[warp.num_meetings++] = {operation, mask, 0};
    warp.meetings[i].arrived |= lane_bit;
    close_if_complete(thread.warp, i);
    switch_from(thread);
    return warp.taken[thread.lane];
  }

  // A chance for other threads to run; nothing when the order of threads is fixed.
  void yield_if_shuffled(Thread& thread) {
    if (!launch->shuffled) return;
    make_ready(thread.warp, 1u << thread.lane);
    switch_from(thread);
  }

  [[noreturn]] __attribute__((format(printf, 2, 3), noinline, cold)) void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    print_block();
    vfprintf(stderr, format, arguments);
    fputs("\n", stderr);
    va_end(arguments);
    abort();
  }

 private:
  void start_threads() {
    const dim3 size = launch->block;
    const int num_threads = static_cast<int>(size.x * size.y * size.z);
    threads_.resize(num_threads);
    warps_.resize((num_threads + kWarpSize - 1) / kWarpSize);
    stacks_.reserve(num_threads);
    for (Warp& warp : warps_) warp.live = warp.ready = warp.num_meetings = 0;
    for (int i = 0; i < num_threads; ++i) {
      Thread& thread = threads_[i];
      thread.block = this;
      thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
      thread.number = i;
      thread.warp = i / kWarpSize;
      thread.lane = i % kWarpSize;
      thread.stack_pointer = stacks_.prepare(i, thread_main);
      warps_[thread.warp].live |= 1u << thread.lane;
    }
    num_live_ = num_threads;
    num_arrived_ = 0;
    ready_warps_ = 0;
    make_all_ready();
  }

  static void thread_main() {
    Thread& thread = self();
    thread.block->launch->call(thread.block->launch->kernel_call);
    thread.block->end(thread);
  }

  [[noreturn]] void end(Thread& thread) {
    Warp& warp = warps_[thread.warp];
    const unsigned lane_bit = 1u << thread.lane;
    warp.live &= ~lane_bit;
    --num_live_;
    for (int i = warp.num_meetings - 1; i >= 0; --i) {    // backwards: closing a meeting moves the last one to its place
      if (!(warp.meetings[i].mask & lane_bit)) continue;
      if (warp.meetings[i].operation != Operation::syncwarp)
        fail_absent(threads_[thread.warp * kWarpSize + __builtin_ctz(warp.meetings[i].arrived)], lane_bit);
      close_if_complete(thread.warp, i);
    }
    open_barrier_if_complete();
    if (num_live_ == 0) switch_stack(&thread.stack_pointer, runner_stack_pointer_);
    resume(pick(), &thread.stack_pointer);
    die("a thread that had exited was resumed");
  }

  // -- the scheduler

  void make_ready(int warp, unsigned lanes) {
    warps_[warp].ready |= lanes;
    if (warps_[warp].ready) ready_warps_ |= 1u << warp;
  }

  void make_all_ready() {
    const int num_warps = static_cast<int>(warps_.size());
    for (int warp = 0; warp < num_warps; ++warp) make_ready(warp, warps_[warp].live);
    last_warp_ = launch->shuffled ? static_cast<int>(random_.below(num_warps)) : 0;
  }

  Thread& pick() {    // takes a ready thread out of the ready ones
    if (!ready_warps_) fail_deadlock();
    int lane;
    if (launch->shuffled) {
      const bool stay = ready_warps_ >> last_warp_ & 1 && random_.below(turns_of_a_warp_) != 0;
      if (!stay) last_warp_ = random_.set_bit(ready_warps_);
      lane = random_.set_bit(warps_[last_warp_].ready);
    } else {
      if (!(ready_warps_ >> last_warp_ & 1)) last_warp_ = __builtin_ctz(ready_warps_);
      lane = __builtin_ctz(warps_[last_warp_].ready);
    }
    Warp& warp = warps_[last_warp_];
    warp.ready &= ~(1u << lane);
    if (!warp.ready) ready_warps_ &= ~(1u << last_warp_);
    return threads_[last_warp_ * kWarpSize + lane];
  }

  void resume(Thread& next, void** save) {
    current_thread = &next;
    switch_stack(save, next.stack_pointer);
  }

  void switch_from(Thread& thread) {
    Thread& next = pick();
    if (&next != &thread) resume(next, &thread.stack_pointer);
  }

  // -- barriers

  void wait_in(Thread& thread, Operation operation, unsigned mask, Where where) {
    thread.operation = operation;
    thread.mask = mask;
    thread.where = where;
  }

  void open_barrier_if_complete() {    // a thread that has exited counts as arrived
    if (num_arrived_ == 0 || num_arrived_ < num_live_) return;
    num_arrived_ = 0;
    make_all_ready();
  }

  void close_if_complete(int warp_number, int i) {
    Warp& warp = warps_[warp_number];
    const Meeting meeting = warp.meetings[i];
    if (meeting.mask & warp.live & ~meeting.arrived) return;
    warp.meetings[i] = warp.meetings[--warp.num_meetings];
    exchange(warp, meeting);
    make_ready(warp_number, meeting.arrived);
  }

  static void exchange(Warp& warp, const Meeting& meeting) {
    if (meeting.operation == Operation::syncwarp) return;
    if (meeting.operation < Operation::ballot) {
      uint64_t garbage;    // a GPU leaves the value of a lane outside the mask undefined
      memset(&garbage, kSharedGarbage, sizeof garbage);
      for (unsigned lanes = meeting.mask; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes), source = warp.source[lane];
        warp.taken[lane] = meeting.mask >> source & 1 ? warp.brought[source] : garbage;
      }
      return;
    }
    unsigned votes = 0;
    for (unsigned lanes = meeting.mask; lanes; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      votes |= static_cast<unsigned>(warp.brought[lane]) << lane;
    }
    const unsigned result = meeting.operation == Operation::ballot ? votes
                            : meeting.operation == Operation::any  ? votes != 0
                                                                   : votes == meeting.mask;
    for (unsigned lanes = meeting.mask; lanes; lanes &= lanes - 1) warp.taken[__builtin_ctz(lanes)] = result;
  }

  // -- shared memory

  void fill_shared() {
    shared_.resize(launch->shared_bytes + 2 * kCanaryBytes);    // operator new aligns to 16 bytes
    memset(shared_.data(), kCanary, kCanaryBytes);
    memset(shared_.data() + kCanaryBytes, kSharedGarbage, launch->shared_bytes);
    memset(shared_.data() + kCanaryBytes + launch->shared_bytes, kCanary, kCanaryBytes);
  }

  void check_canaries() {
    for (size_t i = 0; i < kCanaryBytes; ++i) {
      if (shared_[kCanaryBytes + launch->shared_bytes + i] != kCanary)
        fail("shared memory overrun: byte %zu of %zu was written", launch->shared_bytes + i, launch->shared_bytes);
      if (shared_[kCanaryBytes - 1 - i] != kCanary) fail("shared memory underrun: byte -%zu was written", i + 1);
    }
  }

  // -- failures

  void print_block() {
    fprintf(stderr, "cuda_on_cpu: kernel %s, block (%u, %u, %u): ", launch->kernel_name, index.x, index.y, index.z);
  }

  [[noreturn]] void fail_mask(const Thread& thread, const char* does, int lane, const char* why) {
    fail("%s at %s:%d by thread %d: the mask 0x%08X %s lane %d%s", name(thread.operation), thread.where.file,
         thread.where.line, thread.number, thread.mask, does, lane, why);
  }

  [[noreturn]] void fail_absent(const Thread& thread, unsigned absent) {
    const int lane = __builtin_ctz(absent);
    const bool existed = thread.warp * kWarpSize + lane < static_cast<int>(threads_.size());
    fail_mask(thread, "names", lane, existed ? ", which has exited" : ", which does not exist");
  }

  [[noreturn]] __attribute__((noinline, cold)) void fail_deadlock() {
    print_block();
    fputs("deadlock: no thread can run, and these are not reached by all live threads they wait for:\n", stderr);
    const auto is_live = [&](const Thread& thread) { return warps_[thread.warp].live >> thread.lane & 1; };
    const auto wait_together = [](const Thread& a, const Thread& b) {
      return a.operation == b.operation && a.mask == b.mask && a.where.line == b.where.line &&
             (a.warp == b.warp || a.operation == Operation::syncthreads);
    };
    std::vector<bool> told(threads_.size());
    for (const Thread& first : threads_) {
      if (!is_live(first) || told[first.number]) continue;
      int count = 0;
      for (const Thread& other : threads_) {
        if (!is_live(other) || !wait_together(first, other)) continue;
        told[other.number] = true;
        ++count;
      }
      fprintf(stderr, "  %s at %s:%d", name(first.operation), first.where.file, first.where.line);
      if (first.operation != Operation::syncthreads) fprintf(stderr, " with mask 0x%08X", first.mask);
      fprintf(stderr, ": %d of %d live threads, the first is thread %d\n", count, num_live_, first.number);
    }
    abort();
  }

  FiberStacks stacks_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<unsigned char> shared_;
  void* runner_stack_pointer_;    // of run(), while threads run
  RandomBits random_;
  uint32_t turns_of_a_warp_;
  unsigned ready_warps_;    // warps with a ready lane
  int last_warp_;           // goes on while it is ready, or for some turns under a seed
  int num_live_, num_arrived_;    // num_arrived_: in __syncthreads, at barrier_
  Where barrier_;
};

// ---- Launches -------------------------------------------------------------------------------------------------------

inline void check_launch(const LaunchRecord& record) {
  const dim3 grid = record.grid, block = record.block;
  const char* problem = nullptr;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7FFFFFFFu || grid.y > 0xFFFFu || grid.z > 0xFFFFu)
    problem = "a grid has 1..2147483647 x 1..65535 x 1..65535 blocks";
  else if (!block.x || !block.y || !block.z || block.x > kMaxThreadsPerBlock || block.y > kMaxThreadsPerBlock ||
           block.z > 64 || block.x * block.y * block.z > kMaxThreadsPerBlock)
    problem = "a block has 1..1024 threads, at most 64 of them along z";
  else if (record.shared_bytes > kMaxSharedBytes)
    problem = "a block has at most 227 KiB of shared memory";
  else if (current_thread)
    problem = "a kernel cannot launch another";
  if (problem)
    die("bad launch of kernel %s, grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of shared memory: %s", record.kernel_name,
        grid.x, grid.y, grid.z, block.x, block.y, block.z, record.shared_bytes, problem);
}

inline void read_seed(LaunchRecord& record) {
  const char* text = getenv("CUDA_ON_CPU_SEED");
  record.shuffled = text && *text;
  record.seed = 0;
  if (!record.shuffled) return;
  char* end;
  record.seed = strtoull(text, &end, 10);
  if (*end) die("CUDA_ON_CPU_SEED is not a number: %s", text);
}

inline Block& block_of_this_os_thread() {
  static thread_local Block block;
  return block;
}

inline void run_grid(LaunchRecord record) {
  check_launch(record);
  read_seed(record);
  const int64_t num_blocks = static_cast<int64_t>(record.grid.x) * record.grid.y * record.grid.z;
  std::vector<int64_t> order;
  if (record.shuffled) {
    RandomBits random(record.seed);
    for (int64_t i = 0; i < num_blocks; ++i) {    // Fisher-Yates, inside out
      const int64_t j = static_cast<int64_t>(random.next() % static_cast<uint64_t>(i + 1));
      order.push_back(i);
      std::swap(order[i], order[j]);
    }
  }
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic)
#endif
  for (int64_t i = 0; i < num_blocks; ++i) block_of_this_os_thread().run(record, record.shuffled ? order[i] : i);
}

// What LAUNCH makes: called with the kernel's arguments, it converts them once to the kernel's parameters, as <<<>>> does.
template <class... Parameters>
class Launch {
 public:
  Launch(const char* kernel_name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t)
      : kernel_name_(kernel_name), kernel_(kernel), grid_(grid), block_(block), shared_bytes_(shared_bytes) {}

  void operator()(Parameters... arguments) const {
    static_assert((!std::is_reference<Parameters>::value && ...), "a kernel takes its parameters by value");
    const auto kernel_call = [&] { kernel_(arguments...); };
    run_grid({kernel_name_, grid_, block_, shared_bytes_, [](const void* f) { (*static_cast<decltype(kernel_call)*>(f))(); },
              &kernel_call, false, 0});
  }

 private:
  const char* kernel_name_;
  void (*kernel_)(Parameters...);
  dim3 grid_, block_;
  size_t shared_bytes_;
};

// ---- Helpers of the functions below ---------------------------------------------------------------------------------

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
inline T shuffle(Operation operation, unsigned mask, T value, int source, Where where) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "a shuffle moves 4- or 8-byte numbers");
  Thread& thread = self();
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = thread.block->meet(thread, operation, mask, bits, source, where);
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned vote(Operation operation, unsigned mask, int predicate, Where where) {
  Thread& thread = self();
  return static_cast<unsigned>(thread.block->meet(thread, operation, mask, predicate != 0, 0, where));
}

// The first lane of the caller's segment of `width` lanes.
inline int segment_start(int width) {
  const Thread& thread = self();
  if (width < 1 || width > kWarpSize || (width & (width - 1)))
    thread.block->fail("the width of a shuffle is 1, 2, 4, 8, 16 or 32, not %d", width);
  return thread.lane & -width;
}

inline void yield_if_shuffled() {
  Thread& thread = self();
  thread.block->yield_if_shuffled(thread);
}

template <class T>
inline T fetch_max(T* address, T value) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

template <class T>
struct Exactly {    // a parameter type that takes no part in deduction
  typedef T type;
};

// Of floats as on the GPU: a number rather than NaN, and -0 below +0.
template <class T>
inline T smaller(T a, T b) {
  if constexpr (std::is_floating_point<T>::value) return b != b || a < b || (a == b && std::signbit(a)) ? a : b;
  return a < b ? a : b;
}
template <class T>
inline T larger(T a, T b) {
  if constexpr (std::is_floating_point<T>::value) return b != b || a > b || (a == b && !std::signbit(a)) ? a : b;
  return a > b ? a : b;
}

// ---- Functions of CUDA ----------------------------------------------------------------------------------------------

inline int last_launch_error() { return cudaSuccess; }    // a launch that fails here aborts

struct OnDevice {
  explicit OnDevice(int) {}
  ~OnDevice() {}
};

inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t = nullptr) {
  memset(pointer, value, bytes);
  return cudaSuccess;
}

inline void __syncthreads(Where where = Where::here()) {
  Thread& thread = self();
  thread.block->syncthreads(thread, where);
}

inline void __syncwarp(unsigned mask = kFullMask, Where where = Where::here()) {
  Thread& thread = self();
  thread.block->meet(thread, Operation::syncwarp, mask, 0, 0, where);
}

inline void __threadfence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  yield_if_shuffled();
}

// The source lanes follow the PTX instruction shfl.sync: lanes and distances count modulo 32, and a lane whose source lies
// beyond its segment keeps its own value (for xor, only a source in a later segment lies beyond).
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = kWarpSize, Where where = Where::here()) {
  const int first = segment_start(width);
  return shuffle(Operation::shfl, mask, value, first | (source & (width - 1)), where);
}

template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = kWarpSize, Where where = Where::here()) {
  const int first = segment_start(width), lane = self().lane;
  const int source = lane - static_cast<int>(delta % 32);
  return shuffle(Operation::shfl_up, mask, value, source >= first ? source : lane, where);
}

template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = kWarpSize, Where where = Where::here()) {
  const int last = segment_start(width) + width - 1, lane = self().lane;
  const int source = lane + static_cast<int>(delta % 32);
  return shuffle(Operation::shfl_down, mask, value, source <= last ? source : lane, where);
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = kWarpSize, Where where = Where::here()) {
  const int last = segment_start(width) + width - 1, lane = self().lane;
  const int source = lane ^ (lane_mask & 31);
  return shuffle(Operation::shfl_xor, mask, value, source <= last ? source : lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, Where where = Where::here()) {
  return vote(Operation::ballot, mask, predicate, where);
}
inline int __any_sync(unsigned mask, int predicate, Where where = Where::here()) {
  return static_cast<int>(vote(Operation::any, mask, predicate, where));
}
inline int __all_sync(unsigned mask, int predicate, Where where = Where::here()) {
  return static_cast<int>(vote(Operation::all, mask, predicate, where));
}

// Real atomics, for blocks may run on several OS threads.
#define CUDA_ON_CPU_ATOMICS(T)                                   \
  inline T atomicAdd(T* address, T value) {                      \
    yield_if_shuffled();                                         \
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); \
  }                                                              \
  inline T atomicOr(T* address, T value) {                       \
    yield_if_shuffled();                                         \
    return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);  \
  }                                                              \
  inline T atomicMax(T* address, T value) {                      \
    yield_if_shuffled();                                         \
    return fetch_max(address, value);                            \
  }
CUDA_ON_CPU_ATOMICS(int)
CUDA_ON_CPU_ATOMICS(unsigned)
CUDA_ON_CPU_ATOMICS(unsigned long long)
#undef CUDA_ON_CPU_ATOMICS

// Chosen for any other type only: of two equally good overloads the one that is no template wins.
template <class T>
inline T atomicAdd(T* address, typename Exactly<T>::type) {
  static_assert(!std::is_floating_point<T>::value,
                "float atomics are banned: the order of the additions, and so the result, changes from run to run");
  static_assert(std::is_floating_point<T>::value, "CUDA adds atomically to int, unsigned and unsigned long long only");
  return *address;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }

inline unsigned __float_as_uint(float value) { return bits_as<unsigned>(value); }
inline int __float_as_int(float value) { return bits_as<int>(value); }
inline float __uint_as_float(unsigned bits) { return bits_as<float>(bits); }
inline float __int_as_float(int bits) { return bits_as<float>(bits); }

template <class T>
inline T __ldg(const T* address) {
  return *address;
}

// CUDA's overloads and no more, so that a mixture nvcc finds ambiguous is ambiguous here, and the result has the same type.
#define CUDA_ON_CPU_MIN_MAX(Result, A, B)                       \
  inline Result min(A a, B b) { return smaller<Result>(a, b); } \
  inline Result max(A a, B b) { return larger<Result>(a, b); }
#define CUDA_ON_CPU_INTEGER_MIN_MAX(T)                    \
  CUDA_ON_CPU_MIN_MAX(T, T, T)                            \
  CUDA_ON_CPU_MIN_MAX(unsigned T, unsigned T, unsigned T) \
  CUDA_ON_CPU_MIN_MAX(unsigned T, T, unsigned T)          \
  CUDA_ON_CPU_MIN_MAX(unsigned T, unsigned T, T)
CUDA_ON_CPU_INTEGER_MIN_MAX(int)
CUDA_ON_CPU_INTEGER_MIN_MAX(long)
CUDA_ON_CPU_INTEGER_MIN_MAX(long long)
CUDA_ON_CPU_MIN_MAX(float, float, float)
CUDA_ON_CPU_MIN_MAX(double, double, double)
CUDA_ON_CPU_MIN_MAX(double, float, double)
CUDA_ON_CPU_MIN_MAX(double, double, float)
#undef CUDA_ON_CPU_INTEGER_MIN_MAX
#undef CUDA_ON_CPU_MIN_MAX

}  // namespace cuda_on_cpu

#pragma GCC visibility pop

// ---- Names of CUDA --------------------------------------------------------------------------------------------------

using cuda_on_cpu::last_launch_error, cuda_on_cpu::OnDevice, cuda_on_cpu::cudaMemsetAsync;
using cuda_on_cpu::__syncthreads, cuda_on_cpu::__syncwarp, cuda_on_cpu::__threadfence;
using cuda_on_cpu::__shfl_sync, cuda_on_cpu::__shfl_up_sync, cuda_on_cpu::__shfl_down_sync, cuda_on_cpu::__shfl_xor_sync;
using cuda_on_cpu::__ballot_sync, cuda_on_cpu::__any_sync, cuda_on_cpu::__all_sync;
using cuda_on_cpu::atomicAdd, cuda_on_cpu::atomicMax, cuda_on_cpu::atomicOr;
using cuda_on_cpu::__popc, cuda_on_cpu::__ffs, cuda_on_cpu::__clz, cuda_on_cpu::__ldg;
using cuda_on_cpu::__float_as_uint, cuda_on_cpu::__float_as_int, cuda_on_cpu::__uint_as_float, cuda_on_cpu::__int_as_float;
using cuda_on_cpu::min, cuda_on_cpu::max;

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  cuda_on_cpu::Launch(#kernel, kernel, grid, block, shared_bytes, stream)(__VA_ARGS__)
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(cuda_on_cpu::self().block->shared())

#define threadIdx (static_cast<const uint3&>(cuda_on_cpu::self().index))
#define blockIdx (static_cast<const uint3&>(cuda_on_cpu::self().block->index))
#define blockDim (cuda_on_cpu::self().block->launch->block)
#define gridDim (cuda_on_cpu::self().block->launch->grid)

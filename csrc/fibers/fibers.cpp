// The scheduler of fibers.h. On x86-64 a context switch is a dozen instructions (the C library's
// swapcontext calls the kernel twice); elsewhere it is swapcontext.
#include "fibers.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

#if defined(__x86_64__)
extern "C" void glm_fibers_switch(void** save, void* load);
asm(R"(
.text
.globl glm_fibers_switch
glm_fibers_switch:
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
)");
#endif

namespace glm::fibers {

int wave = 32;

namespace {

constexpr size_t stack_size = 128 * 1024;

enum class State { ready, at_barrier, at_shuffle, done };

// Where a flow of control was suspended.
struct Context {
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;  // for AddressSanitizer
};

struct Fiber {
  Context at;
  std::unique_ptr<char[]> stack;
  State state = State::done;
  // What it gives at its shuffles, in turn. It fills a slot again two shuffles later, and nobody
  // reaches the one between before it has read the slot.
  uint64_t slots[2] = {};
  unsigned shuffles = 0;  // in this block
};

std::vector<std::unique_ptr<Fiber>> fibers;
Context scheduler;
const void* scheduler_stack;
size_t scheduler_stack_size;
int current;
const std::function<void()>* body;
std::exception_ptr raised;
std::mt19937_64 shuffling;
std::mutex one_launch;

struct Region {
  void* start;
  size_t size;
};
std::vector<Region>& shared() {
  static std::vector<Region> all;
  return all;
}

void leave(Context& from, Context& to) {
#if defined(__x86_64__)
  glm_fibers_switch(&from.sp, to.sp);
#else
  swapcontext(&from.context, &to.context);
#endif
}

void yield(State state) {
  Fiber& f = *fibers[size_t(current)];
  f.state = state;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&f.at.fake_stack, scheduler_stack, scheduler_stack_size);
#endif
  leave(f.at, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.at.fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

// A fiber's whole life: one thread of one block after another.
void live() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  for (;;) {
    try {
      (*body)();
    } catch (...) {
      raised = std::current_exception();
    }
    yield(State::done);
  }
}

void begin(Fiber& f) {
  // new memory, since a stopped fiber leaves poisoned bytes behind
  f.stack.reset(new char[stack_size]);
#if defined(__x86_64__)
  // as after a call: 16-byte aligned but for the return address, which is `live`
  auto top = reinterpret_cast<uintptr_t>(f.stack.get() + stack_size) & ~uintptr_t(15);
  void** sp = reinterpret_cast<void**>(top) - 2;
  *sp = reinterpret_cast<void*>(&live);
  f.at.sp = sp - 6;
  std::fill(sp - 6, sp, nullptr);
#else
  getcontext(&f.at.context);
  f.at.context.uc_stack.ss_sp = f.stack.get();
  f.at.context.uc_stack.ss_size = stack_size;
  f.at.context.uc_link = nullptr;
  makecontext(&f.at.context, live, 0);
#endif
}

void resume(int thread) {
  Fiber& f = *fibers[size_t(thread)];
  current = thread;
  const unsigned t = unsigned(thread);
  threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
  f.state = State::ready;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler.fake_stack, f.stack.get(), stack_size);
#endif
  leave(scheduler, f.at);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
  if (raised) std::rethrow_exception(std::exchange(raised, nullptr));
}

std::vector<int> shuffled(int begin, int end) {
  std::vector<int> order(size_t(end - begin));
  std::iota(order.begin(), order.end(), begin);
  std::shuffle(order.begin(), order.end(), shuffling);
  return order;
}

int count(int begin, int end, State state) {
  int n = 0;
  for (int t = begin; t < end; ++t) n += fibers[size_t(t)]->state == state;
  return n;
}

// Runs one wave until each of its threads is done or waits for the block.
void run_wave(int begin, int end) {
  const std::vector<int> order = shuffled(begin, end);
  for (;;) {
    for (int t : order)
      if (fibers[size_t(t)]->state == State::ready) resume(t);
    const int shuffling_now = count(begin, end, State::at_shuffle);
    if (!shuffling_now) return;
    if (shuffling_now < end - begin)
      throw std::logic_error("block " + std::to_string(blockIdx.x) + ", threads " +
                             std::to_string(begin) + " to " + std::to_string(end - 1) + ": " +
                             std::to_string(shuffling_now) +
                             " of them at a shuffle, the others not; it takes the whole wave");
    for (int t = begin; t < end; ++t) fibers[size_t(t)]->state = State::ready;
  }
}

void run_block(int threads) {
  for (const Region& r : shared()) memset(r.start, 0xff, r.size);
  for (int t = 0; t < threads; ++t) {
    fibers[size_t(t)]->state = State::ready;
    fibers[size_t(t)]->shuffles = 0;
  }
  for (;;) {
    for (int w : shuffled(0, (threads + wave - 1) / wave))
      run_wave(w * wave, std::min(threads, (w + 1) * wave));
    const int waiting = count(0, threads, State::at_barrier);
    if (!waiting) return;
    if (waiting < threads)
      throw std::logic_error("block " + std::to_string(blockIdx.x) + ": " +
                             std::to_string(waiting) + " of " + std::to_string(threads) +
                             " threads at __syncthreads, the others have returned");
    for (int t = 0; t < threads; ++t) fibers[size_t(t)]->state = State::ready;
  }
}

}  // namespace

Shared::Shared(void* start, size_t size) { shared().push_back({start, size}); }

void barrier() { yield(State::at_barrier); }

void exchange(void* value, size_t size, int mask) {
  const int partner = (current / wave) * wave + ((current % wave) ^ mask);
  Fiber& mine = *fibers[size_t(current)];
  const unsigned slot = mine.shuffles++ % 2;
  memcpy(&mine.slots[slot], value, size);
  yield(State::at_shuffle);
  memcpy(value, &fibers[size_t(partner)]->slots[slot], size);
}

void run(dim3 grid, dim3 block, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const int threads = int(block.x * block.y * block.z);
  gridDim = grid, blockDim = block, body = &thread;
  while (int(fibers.size()) < threads) {
    fibers.push_back(std::make_unique<Fiber>());
    begin(*fibers.back());
  }
  try {
    for (int b : shuffled(0, int(grid.x * grid.y * grid.z))) {
      const unsigned i = unsigned(b);
      blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y));
      run_block(threads);
    }
  } catch (...) {
    for (auto& f : fibers) begin(*f);  // fibers stopped on the way start anew
    throw;
  }
}

}  // namespace glm::fibers

// Called by ctypes: sets the lanes of a wave, and the seed of all shuffling from now on.
extern "C" __attribute__((visibility("default"))) void glm_fibers_configure(int wave,
                                                                            uint64_t seed) {
  glm::fibers::wave = wave;
  glm::fibers::shuffling.seed(seed);
}

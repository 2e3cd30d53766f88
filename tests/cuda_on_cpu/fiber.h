// Fibers: stacks that one OS thread switches between. One runs at a time, started and resumed from
// the scheduler, to which it always returns. Included by emulator.cpp only.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>

#if !defined(__x86_64__)
#define FASTLR_EMULATOR_UCONTEXT
#endif
#if defined(FASTLR_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

// NOTE: [sanitizers]
// The sanitizers must be told of switches. Their functions are weak here and null where the program
// is linked without them. Under ThreadSanitizer each fiber is a thread to it, and no switch orders
// anything: only fibers that CUDA orders are, see Grid::order(). The emulation itself is compiled
// without -fsanitize=thread (and with -O1 at least), since its own data passes from fiber to fiber
// without such order. Its containers hold types of its own: the linker would merge, say,
// std::vector<void*>::push_back() with one that is compiled for the sanitizer elsewhere.
#if defined(__SANITIZE_THREAD__)
#error "compile emulator.cpp without -fsanitize=thread; link with it"
#endif
extern "C" {
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
[[gnu::weak]] void __asan_unpoison_memory_region(const volatile void* begin, size_t size);
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_destroy_fiber(void* fiber);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_set_fiber_name(void* fiber, const char* name);
[[gnu::weak]] void __tsan_acquire(void* address);
[[gnu::weak]] void __tsan_release(void* address);
}

#if !defined(FASTLR_EMULATOR_UCONTEXT)
extern "C" void fastlr_emulator_switch(void** save, void* next);
// Saves the registers that a call must preserve (System V ABI) on this stack and the stack pointer
// in *save, and goes on from the stack pointer `next`. The jump, in place of a return, is one that
// the processor predicts; the floating-point environment is the same for all fibers, see
// Grid::run().
asm(R"(
.pushsection .text
.globl fastlr_emulator_switch
.hidden fastlr_emulator_switch
.type fastlr_emulator_switch, @function
fastlr_emulator_switch:
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
  popq %rcx
  jmp *%rcx
.size fastlr_emulator_switch, .-fastlr_emulator_switch
.popsection
)");
#endif

namespace emulator {

inline bool under_thread_sanitizer() { return __tsan_create_fiber != nullptr; }

// How many threads ThreadSanitizer is asked to tell apart: it could some 8,000, but each costs it
// half a millisecond to create and all of them time whenever any two meet.
constexpr uint32_t kSanitizedThreads = 1024;

class Fiber {
 public:
  // Room for parameters of 32 KB, copied into a frame or two, in unoptimised code.
  static constexpr size_t kStackBytes = 256 << 10;

  // `body` runs when the fiber is first entered, and must not return.
  explicit Fiber(void (*body)(), size_t colour) : body_(body) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped_bytes_ = kStackBytes + page;
    mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (mapped_ == MAP_FAILED || mprotect(mapped_, page, PROT_NONE) != 0) {
      std::perror("no stack for a CUDA thread");
      std::abort();
    }
    stack_ = static_cast<char*>(mapped_) + page;
    if (under_thread_sanitizer()) sanitizer_fiber_ = __tsan_create_fiber(0);
    // Stacks that all begin at the same offset in a page would share few sets of the cache.
    const size_t used = kStackBytes - colour % 32 * 128;
#if defined(FASTLR_EMULATOR_UCONTEXT)
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = used;
    makecontext(&context_, &Fiber::start, 0);
#else
    void** top = reinterpret_cast<void**>(stack_ + used);
    *--top = nullptr;  // a return address: where debuggers stop
    *--top = reinterpret_cast<void*>(&Fiber::start);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    pointer_ = top;
#endif
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  ~Fiber() {
    if (sanitizer_fiber_) __tsan_destroy_fiber(sanitizer_fiber_);
    if (fence_) __tsan_destroy_fiber(fence_);
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack_, kStackBytes);
    munmap(mapped_, mapped_bytes_);
  }

  // From the scheduler: runs the fiber until it suspends.
  void resume() {
    current() = this;
    void* fake_stack = nullptr;
    if (__sanitizer_start_switch_fiber)
      __sanitizer_start_switch_fiber(&fake_stack, stack_, kStackBytes);
    if (sanitizer_fiber_) {
      scheduler().sanitizer_fiber = __tsan_get_current_fiber();
      __tsan_switch_to_fiber(sanitizer_fiber_, 1);
    }
#if defined(FASTLR_EMULATOR_UCONTEXT)
    swapcontext(&scheduler().context, &context_);
#else
    fastlr_emulator_switch(&scheduler().pointer, pointer_);
#endif
    if (__sanitizer_finish_switch_fiber)
      __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
    current() = nullptr;
  }

  // From the fiber: back to the scheduler.
  void suspend() {
    if (__sanitizer_start_switch_fiber)
      __sanitizer_start_switch_fiber(&fake_stack_, scheduler().bottom, scheduler().size);
    if (sanitizer_fiber_) __tsan_switch_to_fiber(scheduler().sanitizer_fiber, 1);
#if defined(FASTLR_EMULATOR_UCONTEXT)
    swapcontext(&context_, &scheduler().context);
#else
    fastlr_emulator_switch(&pointer_, scheduler().pointer);
#endif
    entered();
  }

  // Under ThreadSanitizer: what its reports call the fiber.
  void set_name(const char* name) { __tsan_set_fiber_name(sanitizer_fiber_, name); }

  // Under ThreadSanitizer: calls `f` as if the fiber did, or as if the scheduler did.
  template <typename F>
  void impersonate(F f) {
    if (sanitizer_fiber_) as(sanitizer_fiber_, f);
  }
  template <typename F>
  static void as_scheduler(F f) {
    if (under_thread_sanitizer() && current())
      as(scheduler().sanitizer_fiber, f);
    else
      f();
  }

  // Under ThreadSanitizer: keeps what the fiber has done until now, in a second fiber of the
  // sanitizer's, and lets those who acquire an address know of that much.
  void keep_state_for_atomics() {
    if (!fence_) as_scheduler([&] { fence_ = __tsan_create_fiber(0); });
    __tsan_release(this);
    as(fence_, [&] { __tsan_acquire(this); });
  }
  void publish_kept_state(void* address) {
    if (fence_) as(fence_, [&] { __tsan_release(address); });
  }

  static Fiber*& current() {
    static Fiber* fiber = nullptr;
    return fiber;
  }

  uint64_t last_launch = 0;  // that used it

 private:
  struct Scheduler {
    const void* bottom;
    size_t size;
    void* sanitizer_fiber;
#if defined(FASTLR_EMULATOR_UCONTEXT)
    ucontext_t context;
#else
    void* pointer;
#endif
  };
  static Scheduler& scheduler() {
    static Scheduler scheduler{};
    return scheduler;
  }

  template <typename F>
  static void as(void* fiber, F f) {
    void* const self = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber, 1);
    f();
    __tsan_switch_to_fiber(self, 1);
  }

  void entered() {
    if (__sanitizer_finish_switch_fiber)
      __sanitizer_finish_switch_fiber(fake_stack_, &scheduler().bottom, &scheduler().size);
  }

  static void start() {
    current()->entered();
    current()->body_();
    std::abort();
  }

  void (*body_)();
  void* mapped_;
  size_t mapped_bytes_;
  char* stack_;
  void* fake_stack_ = nullptr;
  void* sanitizer_fiber_ = nullptr;
  void* fence_ = nullptr;
#if defined(FASTLR_EMULATOR_UCONTEXT)
  ucontext_t context_;
#else
  void* pointer_;
#endif
};

// Idle fibers. Stacks are mapped when first needed and kept.
class FiberPool {
 public:
  explicit FiberPool(void (*body)()) : body_(body) {}

  Fiber* take(uint64_t launch) {
    // Threads that share a fiber look ordered to ThreadSanitizer: a launch uses a fiber once, while
    // it may have more.
    const bool unshared = under_thread_sanitizer() && created_ < kSanitizedThreads;
    if (idle_.empty() || (unshared && idle_.front()->last_launch == launch)) return create(launch);
    Fiber* fiber;
    if (under_thread_sanitizer()) {  // the one that has been idle longest
      fiber = idle_.front();
      idle_.pop_front();
    } else {  // the one whose stack is still in the cache
      fiber = idle_.back();
      idle_.pop_back();
    }
    fiber->last_launch = launch;
    return fiber;
  }

  void give_back(Fiber* fiber) { idle_.push_back(fiber); }

  // For a fiber that will not finish: nothing on its stack is destroyed.
  void discard(Fiber* fiber) {
    --created_;
    delete fiber;
  }

 private:
  Fiber* create(uint64_t launch) {
    Fiber* fiber = new Fiber(body_, created_++);
    fiber->last_launch = launch;
    return fiber;
  }

  void (*body_)();
  std::deque<Fiber*> idle_;
  size_t created_ = 0;
};

}  // namespace emulator

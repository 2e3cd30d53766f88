// One launch: its blocks, and the scheduler that runs their threads. Included by emulator.cpp only.
#pragma once

#include <algorithm>
#include <cfenv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"

namespace emulator {

// SplitMix64 (Steele, Lea and Flood, 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  uint32_t below(uint32_t end) {
    return static_cast<uint32_t>((next() >> 32) * end >> 32);  // bias below 2**-32 * end
  }

 private:
  uint64_t state_;
};

inline bool operator==(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

class Grid {
 public:
  // Runs a launch to its end.
  //
  // Args:
  //   resident: blocks in flight at once
  // Returns: empty, or what went wrong; the launch is then abandoned.
  std::string run(dim3 grid, dim3 block, uint64_t resident, Random& random, const Call& call);

  // What the kernel's threads call: see waiting.h.
  void* shared_storage(const void* key, size_t size, size_t align);
  int barrier(BarrierOp op, bool predicate, Site site);
  uint64_t warp(WarpOp op, unsigned mask, uint64_t value, int source, Site site);
  int lane() const { return static_cast<int>(thread_->index % kLanes); }
  void fence();
  void pause();
  void before_atomic(const volatile void* address, size_t size, Site site);
  void after_atomic(const volatile void* address);

 private:
  static constexpr uint32_t kLanes = 32;

  enum class State { kReady, kAtBarrier, kAtWarp, kExited };

  struct Address {
    void* value;
  };

  struct Thread {
    uint32_t index;
    uint3 position;
    State state;
    Fiber* fiber;  // null until it starts and after it ends
    Site site;     // where it waits
    WarpOp op;
    unsigned mask;
    int source;
    uint64_t value;
    uint64_t result;
    // For ThreadSanitizer: what it changed atomically since its last fence, and whether it has
    // passed a fence since it last did.
    std::vector<Address> atomics;
    bool fenced;
  };

  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  struct Shared {
    const void* key;
    std::unique_ptr<void, Free> memory;
  };

  struct Block {
    uint3 index;
    std::vector<Thread> threads;
    std::vector<Thread*> ready;  // what may run, in no order
    uint32_t exited;
    uint32_t at_warp;  // threads that wait for a warp operation
    uint32_t arrived;  // at the barrier
    uint32_t predicates;
    Site barrier_site;
    BarrierOp barrier_op;
    bool barrier_agreed;  // all that arrived did so at one place
    int barrier_result;
    std::vector<Shared> shared;
  };

  static void thread_body();
  void start_block(Block& block, uint64_t linear);
  void run_thread(Block& block);
  void finish_barrier(Block& block);
  void finish_warp(Block& block, const Thread& waiting);
  void exited(Block& block, Thread& thread);
  void order(const std::vector<Thread*>& threads);
  [[noreturn]] void fail(const char* what, Site site);
  void finish();
  std::string diagnose(const Block& block) const;

  FiberPool fibers_{&Grid::thread_body};
  std::vector<std::unique_ptr<Block>> resident_, idle_;
  std::vector<Shared> retired_;
  Block* block_ = nullptr;    // of the running thread
  Thread* thread_ = nullptr;  // running
  const Call* call_ = nullptr;
  Random* random_ = nullptr;
  uint64_t launch_ = 0;
  uint64_t idle_switches_ = 0;  // since a thread last ended or a barrier was last passed
  std::string failure_;
};

// One launch runs at a time. Never destroyed: fibers are kept, and exit is no time to unmap them.
inline Grid& running_grid() {
  static Grid& grid = *new Grid;
  return grid;
}

inline void Grid::thread_body() {
  for (;;) {
    Grid& grid = running_grid();
    // What the host did before the launch comes before the kernel, and the kernel before what the
    // host does after it.
    if (under_thread_sanitizer()) __tsan_acquire(&grid.launch_);
    (*grid.call_)();
    if (under_thread_sanitizer()) __tsan_release(&grid.failure_);
    grid.thread_->state = State::kExited;
    Fiber::current()->suspend();
  }
}

inline std::string Grid::run(dim3 grid, dim3 block, uint64_t resident, Random& random,
                             const Call& call) {
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint32_t threads = block.x * block.y * block.z;
  if (under_thread_sanitizer())
    resident = std::min<uint64_t>(resident, std::max(1u, kSanitizedThreads / threads));
  ++launch_;
  call_ = &call;
  random_ = &random;
  failure_.clear();
  idle_switches_ = 0;
  gridDim = grid;
  blockDim = block;
  if (under_thread_sanitizer()) __tsan_release(&launch_);
  // A GPU does not flush denormals, or round otherwise, because the host does.
  std::fenv_t host;
  std::fegetenv(&host);
  std::fesetenv(FE_DFL_ENV);

  // How long the scheduler stays with a block on average: from threads of all blocks mixed finely
  // to one block after the other.
  static constexpr uint32_t kStays[] = {1, 8, 64, 1024};
  const uint32_t stay = kStays[random.below(4)];

  std::vector<uint64_t> pending(blocks);
  for (uint64_t i = 0; i < blocks; ++i) pending[i] = i;
  size_t current = 0;
  bool choose = true;
  for (;;) {
    while (!pending.empty() && resident_.size() < resident) {
      std::swap(pending[random.next() % pending.size()], pending.back());
      if (idle_.empty()) idle_.push_back(std::make_unique<Block>());
      resident_.push_back(std::move(idle_.back()));
      idle_.pop_back();
      resident_.back()->threads.resize(threads);
      start_block(*resident_.back(), pending.back());
      pending.pop_back();
      choose = true;
    }
    if (resident_.empty()) break;
    if (choose || random.below(stay) == 0)
      current = random.below(static_cast<uint32_t>(resident_.size()));
    choose = false;
    Block& running = *resident_[current];
    run_thread(running);
    if (failure_.empty() && running.exited == threads) {
      // ThreadSanitizer would take another block's use of this memory for a race.
      for (Shared& shared : running.shared)
        if (under_thread_sanitizer()) retired_.push_back(std::move(shared));
      running.shared.clear();
      idle_.push_back(std::move(resident_[current]));
      resident_.erase(resident_.begin() + static_cast<std::ptrdiff_t>(current));
      choose = true;
    } else if (failure_.empty() && running.ready.empty()) {
      failure_ = diagnose(running);
    }
    if (!failure_.empty()) break;
  }
  std::fesetenv(&host);
  finish();
  return failure_;
}

inline void Grid::start_block(Block& block, uint64_t linear) {
  block.index.x = static_cast<unsigned>(linear % gridDim.x);
  block.index.y = static_cast<unsigned>(linear / gridDim.x % gridDim.y);
  block.index.z = static_cast<unsigned>(linear / gridDim.x / gridDim.y);
  block.ready.resize(block.threads.size());
  for (uint32_t i = 0; i < block.threads.size(); ++i) {
    Thread& thread = block.threads[i];
    block.ready[i] = &thread;
    thread.index = i;
    thread.position = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    thread.state = State::kReady;
    thread.fiber = nullptr;
    thread.atomics.clear();
    thread.fenced = false;
  }
  block.exited = block.at_warp = block.arrived = block.predicates = 0;
}

inline void Grid::run_thread(Block& block) {
  std::swap(block.ready[random_->below(static_cast<uint32_t>(block.ready.size()))],
            block.ready.back());
  Thread& thread = *block.ready.back();
  block.ready.pop_back();

  block_ = &block;
  thread_ = &thread;
  blockIdx = block.index;
  threadIdx = thread.position;
  if (!thread.fiber) {
    thread.fiber = fibers_.take(launch_);
    if (under_thread_sanitizer()) {
      const uint3 b = block.index, t = thread.position;
      char name[100];
      std::snprintf(name, sizeof(name), "block (%u,%u,%u) thread (%u,%u,%u)", b.x, b.y, b.z, t.x,
                    t.y, t.z);
      thread.fiber->set_name(name);
    }
  }
  thread.fiber->resume();
  if (thread.state == State::kExited) exited(block, thread);

  // Threads that spin on what never comes; this many switches take about half a second.
  constexpr uint64_t kPatience = 4'000'000;
  if (failure_.empty() && ++idle_switches_ == kPatience)
    failure_ = "no progress: no thread has ended or passed a barrier for " +
               std::to_string(kPatience) + " switches";
}

inline void Grid::exited(Block& block, Thread& thread) {
  fibers_.give_back(thread.fiber);
  thread.fiber = nullptr;
  ++block.exited;
  idle_switches_ = 0;
  if (block.at_warp == 0) return;
  // Who waits at a __syncwarp() need not wait for this one.
  const uint32_t first = thread.index / kLanes * kLanes;
  const uint32_t end =
      std::min<uint32_t>(first + kLanes, static_cast<uint32_t>(block.threads.size()));
  for (uint32_t i = first; i < end; ++i) {
    const Thread& other = block.threads[i];
    if (other.state == State::kAtWarp && other.op == WarpOp::kSync) finish_warp(block, other);
  }
}

// Ends the launch for the host, with whatever has not ended by itself.
inline void Grid::finish() {
  for (std::unique_ptr<Block>& block : resident_) {
    for (Thread& thread : block->threads) {
      if (!thread.fiber) continue;
      thread.fiber->impersonate([&] { __tsan_release(&failure_); });
      fibers_.discard(thread.fiber);
    }
  }
  if (under_thread_sanitizer()) __tsan_acquire(&failure_);
  retired_.clear();
  for (std::unique_ptr<Block>& block : resident_) {
    block->shared.clear();
    idle_.push_back(std::move(block));
  }
  resident_.clear();
}

// Lets another thread go on, perhaps.
inline void Grid::pause() {
  block_->ready.push_back(thread_);
  Fiber::current()->suspend();
}

inline void Grid::fail(const char* what, Site site) {
  failure_ = std::string(what) + " at " + site.file + ":" + std::to_string(site.line);
  Fiber::current()->suspend();
  std::abort();
}

}  // namespace emulator

// How a kernel's threads wait for each other and what that orders, and what is said of threads that
// wait in vain. Included by emulator.cpp only.
#pragma once

#include "grid.h"

namespace emulator {

// What each of these threads did comes before what each does next. They are suspended, but for the
// caller.
inline void Grid::order(const std::vector<Thread*>& threads) {
  if (!under_thread_sanitizer()) return;
  void* meeting = nullptr;  // fresh: nobody else's past hangs on it
  Fiber::as_scheduler([&] { meeting = std::malloc(1); });
  for (const Thread* thread : threads) thread->fiber->impersonate([&] { __tsan_release(meeting); });
  for (const Thread* thread : threads) thread->fiber->impersonate([&] { __tsan_acquire(meeting); });
  Fiber::as_scheduler([&] { std::free(meeting); });
}

inline void* Grid::shared_storage(const void* key, size_t size, size_t align) {
  std::vector<Shared>& shared = block_->shared;
  auto found = std::find_if(shared.begin(), shared.end(),
                            [&](const Shared& variable) { return variable.key == key; });
  if (found == shared.end()) {
    // In the scheduler's name: to ThreadSanitizer an allocation is a write.
    const size_t alignment = std::max(align, sizeof(void*));
    Fiber::as_scheduler([&] {
      void* memory = nullptr;
      if (posix_memalign(&memory, alignment, size) != 0) std::abort();
      std::memset(memory, 0xff, size);
      found = shared.insert(found, {key, std::unique_ptr<void, Free>(memory)});
      if (under_thread_sanitizer()) __tsan_release(&launch_);
    });
  }
  if (under_thread_sanitizer()) __tsan_acquire(&launch_);
  return found->memory.get();
}

inline int Grid::barrier(BarrierOp op, bool predicate, Site site) {
  Block& block = *block_;
  if (block.arrived == 0) {
    block.barrier_site = site;
    block.barrier_op = op;
    block.barrier_agreed = true;
  } else if (!(block.barrier_site == site) || block.barrier_op != op) {
    block.barrier_agreed = false;
  }
  ++block.arrived;
  block.predicates += predicate;
  thread_->state = State::kAtBarrier;
  thread_->site = site;
  if (block.arrived == block.threads.size() && block.barrier_agreed) finish_barrier(block);
  Fiber::current()->suspend();
  return block.barrier_result;
}

inline void Grid::finish_barrier(Block& block) {
  const uint32_t threads = block.arrived, predicates = block.predicates;
  block.barrier_result = block.barrier_op == BarrierOp::kCount ? static_cast<int>(predicates)
                         : block.barrier_op == BarrierOp::kAnd ? predicates == threads
                                                               : predicates != 0;
  block.arrived = block.predicates = 0;
  block.ready.resize(threads);
  for (uint32_t i = 0; i < threads; ++i) {
    block.threads[i].state = State::kReady;
    block.ready[i] = &block.threads[i];
  }
  order(block.ready);
  idle_switches_ = 0;
}

inline uint64_t Grid::warp(WarpOp op, unsigned mask, uint64_t value, int source, Site site) {
  Thread& thread = *thread_;
  thread.op = op;
  thread.mask = mask;
  thread.value = value;
  thread.source = source;
  thread.state = State::kAtWarp;
  ++block_->at_warp;
  thread.site = site;
  // A lane that its own mask does not name waits for ever, and is reported.
  if (mask >> lane() & 1) finish_warp(*block_, thread);
  Fiber::current()->suspend();
  return thread.result;
}

// Lets the lanes that meet `waiting` go on, where all have come.
inline void Grid::finish_warp(Block& block, const Thread& waiting) {
  const uint32_t first = waiting.index / kLanes * kLanes;
  Thread* const lanes = &block.threads[first];
  const uint32_t existing =
      std::min<uint32_t>(kLanes, static_cast<uint32_t>(block.threads.size()) - first);
  unsigned present = 0, ballot = 0;
  for (uint32_t i = 0; i < kLanes; ++i) {
    if (!(waiting.mask >> i & 1)) continue;
    if (i >= existing || lanes[i].state == State::kExited) {
      if (waiting.op == WarpOp::kSync) continue;
      return;
    }
    if (lanes[i].state != State::kAtWarp || lanes[i].op != waiting.op ||
        lanes[i].mask != waiting.mask || !(lanes[i].site == waiting.site))
      return;
    present |= 1u << i;
    ballot |= static_cast<unsigned>(lanes[i].value != 0) << i;
  }
  std::vector<Thread*> waiters;
  for (uint32_t i = 0; i < existing; ++i) {
    if (!(present >> i & 1)) continue;
    const uint32_t source = static_cast<uint32_t>(lanes[i].source);
    lanes[i].result = waiting.op == WarpOp::kBallot              ? ballot
                      : source < kLanes && present >> source & 1 ? lanes[source].value
                                                                 : ~uint64_t{0};
    lanes[i].state = State::kReady;
    --block.at_warp;
    block.ready.push_back(&lanes[i]);
    if (under_thread_sanitizer()) waiters.push_back(&lanes[i]);
  }
  // Of these operations only __syncwarp() orders memory.
  if (waiting.op == WarpOp::kSync) order(waiters);
}

// NOTE: [fences and atomics]
// Atomic operations are relaxed and order nothing by themselves. A fence makes them: those after it
// publish what came before the fence, and it acquires what those before it saw published. Both
// sides of a ticket therefore need one. The first atomic operation after a fence publishes itself
// too, and all before it, so that the last of several blocks may set their ticket back by a plain
// store.
inline void Grid::fence() {
  if (under_thread_sanitizer()) {
    for (const Address& address : thread_->atomics) __tsan_acquire(address.value);
    thread_->atomics.clear();
    thread_->fenced = true;
    Fiber::current()->keep_state_for_atomics();
  }
  pause();
}

inline void Grid::before_atomic(const volatile void* address, size_t size, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % size != 0) fail("misaligned atomic operation", site);
  pause();
  if (under_thread_sanitizer()) Fiber::current()->publish_kept_state(const_cast<void*>(address));
}

inline void Grid::after_atomic(const volatile void* address) {
  if (!under_thread_sanitizer()) return;
  void* const plain = const_cast<void*>(address);
  bool known = false;
  for (const Address& other : thread_->atomics) known |= other.value == plain;
  if (!known) thread_->atomics.push_back({plain});
  if (thread_->fenced) __tsan_release(plain);
  thread_->fenced = false;
}

// "block (1,0,0): 3 threads (0-2) wait at __syncthreads() kernels.cu:40, 1 thread (3) has exited".
inline std::string Grid::diagnose(const Block& block) const {
  struct Group {
    State state;
    Site site;
    unsigned mask;
    std::vector<uint32_t> threads;
  };
  std::vector<Group> groups;
  bool at_barrier = false, at_warp = false;
  for (const Thread& thread : block.threads) {
    at_barrier |= thread.state == State::kAtBarrier;
    at_warp |= thread.state == State::kAtWarp;
    const auto same = [&](const Group& group) {
      if (group.state != thread.state || thread.state == State::kExited)
        return group.state == thread.state;
      return group.site == thread.site &&
             (thread.state == State::kAtBarrier || group.mask == thread.mask);
    };
    auto group = std::find_if(groups.begin(), groups.end(), same);
    if (group == groups.end())
      group = groups.insert(group, {thread.state, thread.site, thread.mask, {}});
    group->threads.push_back(thread.index);
  }

  const auto number = [](auto value) { return std::to_string(value); };
  std::string text = !at_warp      ? "divergent barrier"
                     : !at_barrier ? "warp operation with lanes missing"
                                   : "deadlock";
  text += " in block (" + number(block.index.x) + "," + number(block.index.y) + "," +
          number(block.index.z) + "):";
  for (const Group& group : groups) {
    const std::vector<uint32_t>& threads = group.threads;
    text += &group == &groups.front() ? " " : ", ";
    text += number(threads.size()) + (threads.size() == 1 ? " thread (" : " threads (");
    for (size_t i = 0; i < threads.size();) {
      size_t end = i + 1;
      while (end < threads.size() && threads[end] == threads[end - 1] + 1) ++end;
      text += (i ? "," : "") + number(threads[i]);
      if (end > i + 1) text += "-" + number(threads[end - 1]);
      i = end;
    }
    if (group.state == State::kExited) {
      text += ") exited";
      continue;
    }
    text += ") at " + std::string(group.site.file) + ":" + number(group.site.line);
    if (group.state == State::kAtWarp) {
      char mask[40];
      std::snprintf(mask, sizeof(mask), " with mask 0x%08x", group.mask);
      text += mask;
    }
  }
  return text;
}

}  // namespace emulator

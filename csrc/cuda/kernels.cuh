// The CUDA kernels: one pass over many tensors, and the clocks.
#pragma once

#include <float.h>
#include <math.h>

#include <type_traits>

#include "../squares.h"
#include "tables.h"

// Storage that the threads of a block share. A build that runs these kernels on the host defines it
// otherwise.
#if !defined(FASTLR_SHARED)
#define FASTLR_SHARED(type, name) \
  using name##_type = type;       \
  __shared__ name##_type name
#endif

namespace fastlr {

constexpr int kThreads = 256;
static_assert(kThreads == kLanes, "see NOTE: [sums in lanes]");

// NOTE: [registers]
// A rule says how many blocks must fit on a multiprocessor; three leave 80 registers to a thread.
// Left to itself the compiler stops at 64 and spills: evaluating a schedule, as the last block
// does, takes more. 768 threads with three 16-byte loads each still have 36 KiB under way. Rules
// with two slots or more, stages, and doubles of the other rules take up to 128 registers, which
// two blocks leave: 512 threads with four loads each have 32 KiB under way. So have the 256 of one
// block, with all registers there are, of doubles of rules with two slots, and where stages come
// with doubles or with halves, which have up to ten loads: two for each wider tensor beside them.
template <typename R, typename P, bool kStaged>
constexpr int kResidentBlocks = kStaged          ? (std::is_same<P, float>::value ? 2 : 1)
                                : sizeof(P) == 8 ? R::kResidentBlocks - 1
                                                 : R::kResidentBlocks;
// Of those that measure a norm, where the compiler left to itself stops at 40 registers and spills;
// more blocks than four have no room on a multiprocessor of compute capability 7.5.
constexpr int kResidentNormBlocks = 4;

// NOTE: [kernel arguments]
// Gradients move from step to step, so their addresses are passed by value: no upload, and a CUDA
// graph keeps them. Arguments may take 4,096 bytes, from CUDA 12.1 on (toolkit and driver) 32,764.
constexpr int kSmallLaunch = 480;
constexpr int kLargeLaunch = 3900;

template <int kCapacity>
struct StepArguments : StepHead {
  const void* grads[kCapacity];
};
static_assert(sizeof(StepArguments<kSmallLaunch>) <= 4096, "the limit of every device");
static_assert(sizeof(StepArguments<kLargeLaunch>) <= 32764, "the limit from CUDA 12.1 on");

// What GradScaler tells the device about this step.
struct Amp {
  bool applied;
  bool invalid_scale;
  float inverse_scale;
};

__device__ inline Amp read_amp(const float* found_inf, const float* grad_scale) {
  Amp amp{true, false, 1.0f};
  const bool found = found_inf != nullptr && !(*found_inf == 0.0f);
  if (grad_scale != nullptr) {
    // Rounded to nearest, as the double reciprocal rounded to float32 is: 53 bits suffice for that.
    amp.inverse_scale = 1.0f / *grad_scale;
    amp.invalid_scale = !found && !(amp.inverse_scale >= FLT_MIN && amp.inverse_scale <= FLT_MAX);
  }
  amp.applied = !amp.invalid_scale && !found;
  return amp;
}

// Values of one vector access or two: 16 bytes of the narrower type.
template <typename P, typename M>
constexpr int kVector = 16 / (sizeof(P) < sizeof(M) ? sizeof(P) : sizeof(M));

// NOTE: [vector accesses]
// The addresses of tensors are read from tables, where nothing says that they are global memory,
// and the compiler may split a store of 16 bytes. Hence __ldca and __stwb: they are global, whole,
// and cached as plain accesses are.
template <typename T, int kCount>
__device__ inline void load_vector(T (&to)[kCount], const T* from) {
  uint4 raw[sizeof(to) / sizeof(uint4)];
#pragma unroll
  for (size_t i = 0; i < sizeof(to) / sizeof(uint4); ++i) {
    raw[i] = __ldca(reinterpret_cast<const uint4*>(from) + i);
  }
  memcpy(to, raw, sizeof(to));
}

template <typename T, int kCount>
__device__ inline void store_vector(T* to, const T (&from)[kCount]) {
  uint4 raw[sizeof(from) / sizeof(uint4)];
  memcpy(raw, from, sizeof(from));
#pragma unroll
  for (size_t i = 0; i < sizeof(from) / sizeof(uint4); ++i) {
    __stwb(reinterpret_cast<uint4*>(to) + i, raw[i]);
  }
}

// Elements before the first 16-byte boundary.
template <typename T>
__device__ inline int64_t misaligned_elements(const T* p) {
  return static_cast<int64_t>((0 - reinterpret_cast<uintptr_t>(p)) % 16 / sizeof(T));
}

template <typename T>
__device__ inline bool aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// A parameter's slots of state, of which those that are not live may be any pointers.
template <typename R, typename M>
struct Slots {
  M* at[R::kSlotCount];
};

// A master's part that is kept beside a parameter; of a wide one there is none.
template <typename P>
using rest_t = std::conditional_t<std::is_void<master_t<P>>::value, P, master_t<P>>;

// What a tensor's stages work on. E: how its average is stored; void: there are no stages.
template <typename P, typename E>
struct Stages {
  using C = compute_t<P>;

  E* averages;  // nullptr: none are kept
  Average<C> average;
  rest_t<P>* rests;  // nullptr: there are no masters
  bool by_chance;
  RandomKey key;
  int64_t first;

  __device__ E moved(E from, C p) const {
    E to;
    store(to, average.moved(load(from), p));
    return to;
  }

  __device__ C value_of(const P& p, const rest_t<P>& rest) const {
    if constexpr (!std::is_same<P, C>::value) {
      if (rests != nullptr) return joined(p, rest);
    }
    return load(p);
  }

  // Returns what the average moves towards.
  __device__ C keep(C value, P& p, rest_t<P>& rest, int64_t element) const {
    if constexpr (!std::is_same<P, C>::value) {
      if (rests != nullptr) {
        split(value, p, rest);
        return value;
      }
    }
    if constexpr (std::is_same<P, BFloat16>::value) {
      if (by_chance) {
        p = rounded_by_chance(value, random_bits(key, first + element));
        return load(p);
      }
    }
    store(p, value);
    return load(p);
  }
};
template <typename P>
struct Stages<P, void> {};

// Where an element's state lies, in each slot of a rule and of stages.
template <int kSlots>
struct SlotPlaces {
  int64_t slot[kSlots > 0 ? kSlots : 1];
  int64_t average;
  int64_t master;
};

// Which parameters are opposed is found by going through the rule once more, divisions, roots and
// all: where that makes no difference, every thread branches around it.
template <typename R, typename C, bool kStaged>
__device__ inline Form form_of(const Scalars<R, C>& s) {
  const bool spares = kStaged && s.around.of_opposed != s.around.of_parameter;
  return {s.around.live, false, s.around.coupled, kStaged, spares};
}

// One element, whose place in its parameter is that of p.
template <typename R, typename P, typename M, typename E>
__device__ inline void update_one(const Scalars<R, compute_t<P>>& s, P* p, int64_t element,
                                  const P& g, const Slots<R, M>& slots,
                                  [[maybe_unused]] const Stages<P, E>& stages,
                                  const SlotPlaces<R::kSlotCount>& at) {
  using C = compute_t<P>;
  constexpr bool kStaged = !std::is_void<E>::value;
  const Form form = form_of<R, C, kStaged>(s);
  [[maybe_unused]] rest_t<P> rest{};
  C value;
  if constexpr (kStaged) {
    if (stages.rests != nullptr) rest = stages.rests[at.master];
    value = stages.value_of(p[element], rest);
  } else {
    value = load(p[element]);
  }
  C values[R::kSlotCount];
#pragma unroll
  for (int k = 0; k < R::kSlotCount; ++k) {
    values[k] = is_live(form.live, k) ? static_cast<C>(load(slots.at[k][at.slot[k]])) : C(0);
  }
  update_element(s, form, value, load(g), values);
  if constexpr (kStaged) {
    P kept;
    const C target = stages.keep(value, kept, rest, element);
    p[element] = kept;
    if (stages.rests != nullptr) stages.rests[at.master] = rest;
    if (stages.averages != nullptr) {
      stages.averages[at.average] = stages.moved(stages.averages[at.average], target);
    }
  } else {
    store(p[element], value);
  }
#pragma unroll
  for (int k = 0; k < R::kSlotCount; ++k) {
    if (is_live(form.live, k)) store(slots.at[k][at.slot[k]], values[k]);
  }
}

// The elements begin .. end of tensors that lie in memory in one order, by all threads of the
// block. Vectors begin where the parameter is aligned, if gradient and state are aligned there too.
template <typename R, typename P, typename M, typename E>
__device__ inline void update_dense(const Scalars<R, compute_t<P>>& s, P* p, const P* g,
                                    const Slots<R, M>& slots,
                                    [[maybe_unused]] const Stages<P, E>& stages, int64_t begin,
                                    int64_t end) {
  constexpr bool kStaged = !std::is_void<E>::value;
  using C = compute_t<P>;
  constexpr int kWidth = kVector<P, M>;
  const uint32_t live = s.around.live;
  const Form form = form_of<R, C, kStaged>(s);
  int64_t head = begin + misaligned_elements(p + begin);
  bool all_aligned = aligned(g + head);
#pragma unroll
  for (int k = 0; k < R::kSlotCount; ++k) {
    all_aligned = all_aligned && (!is_live(live, k) || aligned(slots.at[k] + head));
  }
  if constexpr (kStaged) {
    const auto fits = [&](const auto* of_stage) {
      return of_stage == nullptr || aligned(of_stage + head);
    };
    all_aligned = all_aligned && fits(stages.averages) && fits(stages.rests);
  }
  const int64_t vectors = all_aligned && end > head ? (end - head) / kWidth : 0;
  if (vectors == 0) head = begin;
  // Not unrolled, which the registers would not do for: other threads hide the latency.
#pragma unroll 1
  for (int64_t v = threadIdx.x; v < vectors; v += kThreads) {
    const int64_t i = head + v * kWidth;
    P p_values[kWidth], g_values[kWidth];
    M slot_values[R::kSlotCount][kWidth];
    load_vector(p_values, p + i);
    load_vector(g_values, g + i);
#pragma unroll
    for (int k = 0; k < R::kSlotCount; ++k) {
      if (is_live(live, k)) load_vector(slot_values[k], slots.at[k] + i);
    }
    [[maybe_unused]] std::conditional_t<kStaged, E, P> averages[kWidth];
    [[maybe_unused]] rest_t<P> rests[kWidth];
    if constexpr (kStaged) {
      if (stages.averages != nullptr) load_vector(averages, stages.averages + i);
      if (stages.rests != nullptr) load_vector(rests, stages.rests + i);
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      C value;
      if constexpr (kStaged) {
        value = stages.value_of(p_values[e], rests[e]);
      } else {
        value = load(p_values[e]);
      }
      C values[R::kSlotCount];
#pragma unroll
      for (int k = 0; k < R::kSlotCount; ++k) {
        values[k] = is_live(live, k) ? static_cast<C>(load(slot_values[k][e])) : C(0);
      }
      update_element(s, form, value, load(g_values[e]), values);
      if constexpr (kStaged) {
        const C target = stages.keep(value, p_values[e], rests[e], i + e);
        if (stages.averages != nullptr) averages[e] = stages.moved(averages[e], target);
      } else {
        store(p_values[e], value);
      }
#pragma unroll
      for (int k = 0; k < R::kSlotCount; ++k) {
        if (is_live(live, k)) store(slot_values[k][e], values[k]);
      }
    }
    store_vector(p + i, p_values);
#pragma unroll
    for (int k = 0; k < R::kSlotCount; ++k) {
      if (is_live(live, k)) store_vector(slots.at[k] + i, slot_values[k]);
    }
    if constexpr (kStaged) {
      if (stages.averages != nullptr) store_vector(stages.averages + i, averages);
      if (stages.rests != nullptr) store_vector(stages.rests + i, rests);
    }
  }
  const int64_t rest = end - begin - vectors * kWidth;
  for (int64_t e = threadIdx.x; e < rest; e += kThreads) {
    const int64_t i = begin + e < head ? begin + e : begin + e + vectors * kWidth;
    SlotPlaces<R::kSlotCount> at;
#pragma unroll
    for (int k = 0; k < R::kSlotCount; ++k) at.slot[k] = i;
    at.average = at.master = i;
    update_one<R>(s, p, i, g[i], slots, stages, at);
  }
}

// Where an element lies, counted in the order of the layout's indices.
template <int kSlots>
struct Places {
  int64_t param;
  int64_t grad;
  SlotPlaces<kSlots> of;
};

template <int kSlots, bool kStaged = false>
__device__ inline Places<kSlots> places_of(const StridedLayout& layout, int64_t element) {
  Places<kSlots> at{};
  for (int d = layout.ndim - 1; d >= 0; --d) {
    const int64_t index = element % layout.shape[d];
    element /= layout.shape[d];
    at.param += index * layout.param[d];
    at.grad += index * layout.grad[d];
#pragma unroll
    for (int k = 0; k < kSlots; ++k) at.of.slot[k] += index * layout.slot[k][d];
    if constexpr (kStaged) {
      at.of.average += index * layout.slot[kEmaSlot][d];
      at.of.master += index * layout.slot[kMasterSlot][d];
    }
  }
  return at;
}

// The elements begin .. end, counted in the order of the layout's indices.
template <typename R, typename P, typename M, typename E>
__device__ inline void update_strided(const Scalars<R, compute_t<P>>& s, P* p, const P* g,
                                      const Slots<R, M>& slots, const Stages<P, E>& stages,
                                      const StridedLayout& layout, int64_t begin, int64_t end) {
  constexpr bool kStaged = !std::is_void<E>::value;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const Places<R::kSlotCount> at = places_of<R::kSlotCount, kStaged>(layout, i);
    update_one<R>(s, p, at.param, g[at.grad], slots, stages, at.of);
  }
}

// One element from global memory; see NOTE: [vector accesses].
__device__ inline float load_global(const float* from) { return __ldca(from); }
__device__ inline double load_global(const double* from) { return __ldca(from); }
template <typename Half>
__device__ inline float load_global(const Half* from) {
  return load(Half{__ldca(&from->bits)});
}

// The sum of what the threads of a block bring, each for its lane; in the first thread.
// See NOTE: [sums in lanes].
__device__ inline double sum_over_block(double lane) {
  FASTLR_SHARED(double[kLanes], lanes);
  lanes[threadIdx.x] = lane;
  __syncthreads();
  for (unsigned apart = kLanes / 2; apart > 0; apart /= 2) {
    if (threadIdx.x < apart) lanes[threadIdx.x] += lanes[threadIdx.x + apart];
    __syncthreads();
  }
  // Not in the others, which may get here when the first one already writes the next sum's.
  return threadIdx.x == 0 ? lanes[0] : 0.0;
}

// The sum of the squares of a chunk's gradients; in the first thread. All of them are read before
// it returns in any. layout: nullptr, or they are counted in the order of its indices. of(x): what
// of a gradient x is squared.
template <typename P, typename Of>
__device__ inline double sum_of_squares(const P* g, const StridedLayout* layout, int64_t begin,
                                        int64_t end, const Of& of) {
  double lane = 0.0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int64_t at = layout == nullptr ? i : places_of<0>(*layout, i).grad;
    lane = add_square(lane, of(load_global(g + at)));
  }
  return sum_over_block(lane);
}

// The last tensor of low .. count that begins at or before the chunk.
__device__ inline int32_t find_tensor(const DeviceTensor* tensors, int32_t low, int32_t count,
                                      int64_t chunk) {
  int32_t high = count;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (tensors[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Moves every group's clock and forms what its next update uses; by the threads of one block, which
// the next launch waits for. So what can be done side by side is: options, a thread each, and the
// scalars of the two compute types, each by half of the block, as threads of one warp take turns.
template <typename R>
__device__ inline void advance_clocks(const Clocks& clocks, int64_t updates, int64_t samples) {
  const int32_t groups = clocks.state->groups;
  for (int32_t i = threadIdx.x; i < groups * kOptionCount<R>; i += kThreads) {
    const int32_t group = i / kOptionCount<R>;
    evaluate_option(clocks.groups[group], clocks.clocks[group], i % kOptionCount<R>, updates,
                    samples);
  }
  __syncthreads();  // all options are there, and the ages that a step has counted up
  constexpr int32_t kHalf = kThreads / 2;
  for (int32_t i = threadIdx.x % kHalf; i < groups; i += kHalf) {
    GroupClock& clock = clocks.clocks[i];
    const int64_t age = told_apart<R>(clock.next_age);
    if (threadIdx.x < kHalf) {
      clock.updates += updates;
      clock.samples += samples;
      clock.age = age;
      const double* const of_stages = clock.options.value + kRuleOptionCount<R>;
      clock.stages = group_stages(of_stages, clock.updates);
      as<R>(clock.next).in_float = scalars<R, float>(clock.options, age, Unscaling{});
    } else {
      as<R>(clock.next).in_double = scalars<R, double>(clock.options, age, Unscaling{});
    }
  }
}

// NOTE: [the last block]
// Blocks finish in any order. Each draws a ticket when all its reads and writes are done; the one
// that draws the last knows that nobody reads the clocks any more, and moves them.
//
// Whether this block is that one; by all its threads.
__device__ inline bool is_last_block(DeviceState& state) {
  FASTLR_SHARED(bool, is_last);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(&state.ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

// The sum of the squares of gradients, whose chunks' sums are there; in the first thread.
__device__ inline double sum_of_range(const double* squares, int64_t begin, int64_t end) {
  double lane = 0.0;
  // Past the first-level cache, which does not see what other multiprocessors write.
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) lane += __ldcg(squares + i);
  return sum_over_block(lane);
}

template <typename R>
__device__ inline void finish(const StepHead& step, const Amp& amp) {
  DeviceState& state = *step.clocks.state;
  if (!is_last_block(state)) return;
  const bool measures_norm = step.squares != nullptr;
  double squared_norm = NAN;
  if (step.ends_step && measures_norm && amp.applied) {
    squared_norm =
        unscaled_squares(sum_of_range(step.squares, 0, step.step_chunks), amp.inverse_scale);
  }
  if (amp.applied) {
    for (int32_t i = threadIdx.x; i < step.count; i += kThreads) {
      const DeviceTensor& tensor = step.tensors[i];
      if (tensor.age == nullptr) continue;
      GroupClock& clock = step.clocks.clocks[tensor.group];
      if (as<R>(clock.next).in_double.around.live == 0) continue;
      const float age = *tensor.age + 1.0f;
      *tensor.age = age;
      if (tensor.leads_group) clock.next_age = static_cast<int64_t>(age);
    }
  }
  if (threadIdx.x == 0) {
    state.ticket = 0;
    if (step.ends_step) {
      state.last_skipped = !amp.applied;
      if (!step.norm_known) {
        state.norm_measured = measures_norm;
        state.squared_norm = squared_norm;
      }
    }
    if (amp.invalid_scale) state.invalid_scale = 1;
  }
  if (step.ends_step && amp.applied) advance_clocks<R>(step.clocks, 1, 0);
}

// The scalars for a tensor: its group's, where it has missed no update that its group's leader has
// made, or else its own, which the first thread forms for all. By all threads of the block.
template <typename R, typename C>
__device__ inline Scalars<R, C> scalars_of(const GroupClock& clock, const DeviceTensor& tensor) {
  using RuleScalars = Scalars<R, C>;
  const RuleScalars shared = as<R>(clock.next).in(C{});  // on its way while the age is
  const int64_t age = tensor.age == nullptr ? 0 : told_apart<R>(static_cast<int64_t>(*tensor.age));
  if (tensor.age == nullptr || age == clock.age) return shared;
  FASTLR_SHARED(RuleScalars, own);
  __syncthreads();  // the last tensor's are done with
  if (threadIdx.x == 0) own = scalars<R, C>(clock.options, age, Unscaling{});
  __syncthreads();
  return own;
}

// Calls visit(index, begin, end, square) for each chunk that is this block's: the elements of a
// tensor, and where the sum of their squares stands among those of the step. By all threads.
template <int kCapacity, typename Visit>
__device__ inline void for_each_chunk_of_block(const StepArguments<kCapacity>& step,
                                               const Visit& visit) {
  int32_t index = 0;
  for (int64_t chunk = blockIdx.x; chunk < step.chunks; chunk += gridDim.x) {
    index = find_tensor(step.tensors, index, step.count, chunk);
    const DeviceTensor& tensor = step.tensors[index];
    const int64_t of_tensor = chunk - tensor.first_chunk;
    const int64_t begin = of_tensor * kChunkElements;
    const int64_t end =
        begin + kChunkElements < tensor.numel ? begin + kChunkElements : tensor.numel;
    visit(index, begin, end, tensor.first_square + of_tensor);
  }
}

// The sum of a chunk's squares takes its place; by all threads.
template <bool kStrided, typename P, typename Of>
__device__ inline void measure_chunk(const StepHead& step, const DeviceTensor& tensor, const P* g,
                                     int64_t begin, int64_t end, int64_t square, const Of& of) {
  const StridedLayout* const layout = kStrided ? step.layouts + tensor.layout : nullptr;
  const double squares = sum_of_squares(g, layout, begin, end, of);
  if (threadIdx.x == 0) step.squares[square] = squares;
}

// NOTE: [stages on a device]
// Stages are in kernels of their own, beside which plain steps carry none of their instructions and
// registers. Whatever a stage can be told at run time it is: there is another loop only where an
// average is stored in another type.
//
// Calls visit(Stages) for how a tensor's average is stored, if it has one.
template <bool kStaged, typename P, typename Visit>
__device__ inline void with_stages([[maybe_unused]] const DeviceTensor& tensor,
                                   [[maybe_unused]] const GroupStages& of_group,
                                   const Visit& visit) {
  using C = compute_t<P>;
  if constexpr (!kStaged) {
    visit(Stages<P, void>{});
  } else {
    const auto visit_as = [&](auto* averages) {
      Stages<P, std::remove_pointer_t<decltype(averages)>> stages{};
      stages.averages = averages;
      stages.average = of_group.averaging.in(C{});
      stages.rests = static_cast<rest_t<P>*>(tensor.slot[kMasterSlot]);
      stages.by_chance = tensor.kept == Keeping::kStochastic;
      if (stages.by_chance) {
        stages.key = random_key(of_group.random, tensor.place);
        stages.first = tensor.first;
      }
      visit(stages);
    };
    void* const at = tensor.slot[kEmaSlot];
    if constexpr (!std::is_same<P, C>::value) {
      if (tensor.ema_type != StorageType::kFloat32) return visit_as(static_cast<P*>(at));
    }
    visit_as(static_cast<C*>(at));
  }
}

template <typename R, typename P, typename M, bool kStrided, bool kStaged, int kCapacity>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<R, P, kStaged>)
    step_kernel(const __grid_constant__ StepArguments<kCapacity> step) {
  using C = compute_t<P>;
  Amp amp = read_amp(step.clocks.found_inf, step.grad_scale);
  C factor = static_cast<C>(amp.inverse_scale);
  if (step.clips) {
    factor = step.clocks.state->factor(C{});
    amp.applied = amp.applied && factor == factor;  // a norm that is inf or NaN leaves none
  }
  const auto update = [&](int32_t index, int64_t begin, int64_t end, int64_t square) {
    const DeviceTensor& tensor = step.tensors[index];
    const P* g = static_cast<const P*>(step.grads[index]);
    P* p = static_cast<P*>(tensor.param);
    const GroupClock& clock = step.clocks.clocks[tensor.group];
    Scalars<R, C> s = scalars_of<R, C>(clock, tensor);
    if constexpr (kStaged) s.around.bound /= static_cast<C>(amp.inverse_scale);
    if (step.squares != nullptr) {
      measure_chunk<kStrided>(step, tensor, g, begin, end, square, [&](C x) {
        if constexpr (kStaged) return clipped(x, s.around.bound);
        return x;
      });
    }
    s.around.of_gradient *= factor;
    Slots<R, M> slots;
#pragma unroll
    for (int k = 0; k < R::kSlotCount; ++k) slots.at[k] = static_cast<M*>(tensor.slot[k]);
    with_stages<kStaged, P>(tensor, clock.stages, [&](const auto& stages) {
      if constexpr (kStrided) {
        update_strided<R>(s, p, g, slots, stages, step.layouts[tensor.layout], begin, end);
      } else {
        update_dense<R>(s, p, g, slots, stages, begin, end);
      }
    });
  };
  if (amp.applied) for_each_chunk_of_block(step, update);
  finish<R>(step, amp);
}

// Whether a step's norm is measured: not where it is known that the update is skipped, but for a
// scale where an inf is sought first, which judges none.
__device__ inline bool measures(const StepHead& step, const Amp& amp) {
  return amp.applied || (step.seeks_inf && amp.invalid_scale);
}

// Notes the norm of which these are the squares, what clips it, and where asked whether there is an
// inf or NaN. By one thread.
__device__ inline void end_norm(const StepHead& step, const Amp& amp, double squares) {
  DeviceState& state = *step.clocks.state;
  const double squared_norm = amp.applied ? unscaled_squares(squares, amp.inverse_scale) : NAN;
  const double factor = clipping_factor(squared_norm, step.max_norm, amp.inverse_scale);
  state.norm_measured = true;
  state.squared_norm = squared_norm;
  state.set_factor(factor);
  const bool finite = amp.applied ? factor == factor : squares <= DBL_MAX;
  if (finite || !step.clips || !measures(step, amp)) return;
  if (step.seeks_inf) {
    *step.clocks.found_inf = 1.0f;
  } else {
    state.nonfinite = 1;
  }
}

// Measures the gradients' norm; the last launch of them ends it, unless there are shares.
template <typename P, bool kStrided, int kCapacity>
__global__ void __launch_bounds__(kThreads, kResidentNormBlocks)
    norm_kernel(const __grid_constant__ StepArguments<kCapacity> step) {
  // Of what is read again at the end: to keep it takes registers, too. Where it is measured, there
  // are barriers between that and the write to found_inf.
  using C = compute_t<P>;
  const auto measure_with = [&](float inverse_scale) {
    for_each_chunk_of_block(step, [&](int32_t index, int64_t begin, int64_t end, int64_t square) {
      const DeviceTensor& tensor = step.tensors[index];
      const P* g = static_cast<const P*>(step.grads[index]);
      const GroupClock* const clocks = step.clocks.clocks;
      const double max_value =
          clocks == nullptr ? tensor.max_value : clocks[tensor.group].stages.max_value;
      const C bound = static_cast<C>(max_value) / static_cast<C>(inverse_scale);
      if (bound < static_cast<C>(INFINITY)) {
        const bool keeps_inf = step.seeks_inf;
        measure_chunk<kStrided>(step, tensor, g, begin, end, square, [&](C x) {
          const bool is_inf = x == static_cast<C>(INFINITY) || x == static_cast<C>(-INFINITY);
          return keeps_inf && is_inf ? x : clipped(x, bound);
        });
      } else {
        measure_chunk<kStrided>(step, tensor, g, begin, end, square, [](C x) { return x; });
      }
    });
  };
  const Amp before = read_amp(step.clocks.found_inf, step.grad_scale);
  if (measures(step, before)) measure_with(before.inverse_scale);
  DeviceState& state = *step.clocks.state;
  if (!is_last_block(state)) return;
  const Amp amp = read_amp(step.clocks.found_inf, step.grad_scale);
  const bool ends_norm = step.ends_step && !step.of_shares;
  double squares = NAN;
  if (ends_norm && measures(step, amp)) squares = sum_of_range(step.squares, 0, step.step_chunks);
  if (threadIdx.x != 0) return;
  state.ticket = 0;
  if (ends_norm) end_norm(step, amp, squares);
}

}  // namespace fastlr

// The CUDA kernels: one pass over many tensors, and the clocks.
#pragma once

#include <float.h>
#include <math.h>

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

// Blocks that must fit on a multiprocessor, which leaves 80 registers to a thread. Left to itself
// the compiler stops at 64 and spills: evaluating a schedule, as the last block does, takes more.
// 768 threads with three 16-byte loads each still have 36 KiB under way.
constexpr int kResidentBlocks = 3;

// NOTE: [kernel arguments]
// Gradients move from step to step, so their addresses are passed by value: no upload, and a CUDA
// graph keeps them. Arguments may take 4,096 bytes, from CUDA 12.1 on (toolkit and driver) 32,764.
constexpr int kSmallLaunch = 480;
constexpr int kLargeLaunch = 3900;

template <int kCapacity>
struct StepArguments {
  Clocks clocks;
  const DeviceTensor* tensors;
  const StridedLayout* layouts;
  const float* grad_scale;  // GradScaler's scale, or nullptr
  double* squares;          // sums over the chunks of all launches, or nullptr: not measured
  int64_t step_chunks;      // how many these are
  int64_t chunks;
  int32_t count;   // tensors
  bool ends_step;  // the last launch of a step on this device moves its clocks
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
  if (grad_scale != nullptr) {
    // Rounded to nearest, as the double reciprocal rounded to float32 is: 53 bits suffice for that.
    amp.inverse_scale = 1.0f / *grad_scale;
    amp.invalid_scale = !(amp.inverse_scale >= FLT_MIN && amp.inverse_scale <= FLT_MAX);
  }
  amp.applied = !amp.invalid_scale && (found_inf == nullptr || *found_inf == 0.0f);
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

// m is left alone without momentum and may then be any pointer.
template <typename P, typename M>
__device__ inline void update_one(const SgdScalars<compute_t<P>>& s, bool first, P& p, const P& g,
                                  M* m, int64_t m_at) {
  using C = compute_t<P>;
  C p_value = load(p);
  C m_value = 0;
  if (s.has_momentum && !first) m_value = static_cast<C>(load(m[m_at]));
  sgd_update(s, first, p_value, load(g), m_value);
  store(p, p_value);
  if (s.has_momentum) store(m[m_at], m_value);
}

// n elements that lie in memory in one order, by all threads of the block. Vectors begin where the
// parameter is aligned, if gradient and momentum are aligned there too.
template <typename P, typename M>
__device__ inline void update_dense(const SgdScalars<compute_t<P>>& s, bool first, P* p, const P* g,
                                    M* m, int64_t n) {
  constexpr int kWidth = kVector<P, M>;
  int64_t head = misaligned_elements(p);
  int64_t vectors = 0;
  if (aligned(g + head) && (!s.has_momentum || aligned(m + head)) && n > head) {
    vectors = (n - head) / kWidth;
  }
  if (vectors == 0) head = 0;
  // Not unrolled, which the registers would not do for: other threads hide the latency.
#pragma unroll 1
  for (int64_t v = threadIdx.x; v < vectors; v += kThreads) {
    const int64_t i = head + v * kWidth;
    P p_values[kWidth], g_values[kWidth];
    M m_values[kWidth];
    load_vector(p_values, p + i);
    load_vector(g_values, g + i);
    if (s.has_momentum && !first) load_vector(m_values, m + i);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      update_one(s, first, p_values[k], g_values[k], m_values, k);
    }
    store_vector(p + i, p_values);
    if (s.has_momentum) store_vector(m + i, m_values);
  }
  const int64_t rest = n - vectors * kWidth;
  for (int64_t k = threadIdx.x; k < rest; k += kThreads) {
    const int64_t i = k < head ? k : k + vectors * kWidth;
    update_one(s, first, p[i], g[i], m, i);
  }
}

// Where an element lies, counted in the order of the layout's indices.
struct Places {
  int64_t param = 0;
  int64_t grad = 0;
  int64_t momentum = 0;
};

__device__ inline Places places_of(const StridedLayout& layout, int64_t element) {
  Places at;
  for (int d = layout.ndim - 1; d >= 0; --d) {
    const int64_t index = element % layout.shape[d];
    element /= layout.shape[d];
    at.param += index * layout.param[d];
    at.grad += index * layout.grad[d];
    at.momentum += index * layout.momentum[d];
  }
  return at;
}

// The elements begin .. end, counted in the order of the layout's indices.
template <typename P, typename M>
__device__ inline void update_strided(const SgdScalars<compute_t<P>>& s, bool first, P* p,
                                      const P* g, M* m, const StridedLayout& layout, int64_t begin,
                                      int64_t end) {
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const Places at = places_of(layout, i);
    update_one(s, first, p[at.param], g[at.grad], m, at.momentum);
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
  return lanes[0];
}

// The sum of the squares of a chunk's gradients; in the first thread. All of them are read before
// it returns in any. layout: nullptr, or they are counted in the order of its indices.
template <typename P>
__device__ inline double sum_of_squares(const P* g, const StridedLayout* layout, int64_t begin,
                                        int64_t end) {
  double lane = 0.0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    lane = add_square(lane, load_global(g + (layout == nullptr ? i : places_of(*layout, i).grad)));
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

// Moves every group's clock; by the threads of one block. Returns after all of them have.
__device__ inline void advance_clocks(const Clocks& clocks, int64_t updates, int64_t samples) {
  for (int32_t i = threadIdx.x; i < clocks.state->groups; i += blockDim.x) {
    advance_clock(clocks.groups[i], clocks.clocks[i], updates, samples);
  }
}

// NOTE: [the last block]
// Blocks finish in any order. Each draws a ticket when all its reads and writes are done; the one
// that draws the last knows that nobody reads the clocks any more, and moves them.
template <int kCapacity>
__device__ inline void finish(const StepArguments<kCapacity>& step, const Amp& amp) {
  FASTLR_SHARED(bool, is_last);
  DeviceState& state = *step.clocks.state;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(&state.ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  double squared_norm = NAN;
  if (step.ends_step && step.squares != nullptr && amp.applied) {
    double lane = 0.0;
    // Past the first-level cache, which does not see what other multiprocessors write.
    for (int64_t i = threadIdx.x; i < step.step_chunks; i += kThreads) {
      lane += __ldcg(step.squares + i);
    }
    squared_norm = unscaled_squares(sum_over_block(lane), amp.inverse_scale);
  }
  if (amp.applied) {
    for (int32_t i = threadIdx.x; i < step.count; i += kThreads) {
      const DeviceTensor& tensor = step.tensors[i];
      if (tensor.initialized == nullptr) continue;
      if (step.clocks.clocks[tensor.group].next.in_double.has_momentum) *tensor.initialized = 1;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    state.ticket = 0;
    if (step.ends_step) {
      state.last_skipped = !amp.applied;
      state.norm_measured = step.squares != nullptr;
      state.squared_norm = squared_norm;
    }
    if (amp.invalid_scale) state.invalid_scale = 1;
  }
  if (step.ends_step && amp.applied) advance_clocks(step.clocks, 1, 0);
}

template <typename P, typename M, bool kStrided, int kCapacity>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    step_kernel(const __grid_constant__ StepArguments<kCapacity> step) {
  using C = compute_t<P>;
  const Amp amp = read_amp(step.clocks.found_inf, step.grad_scale);
  int32_t index = 0;
  for (int64_t chunk = blockIdx.x; amp.applied && chunk < step.chunks; chunk += gridDim.x) {
    index = find_tensor(step.tensors, index, step.count, chunk);
    const DeviceTensor& tensor = step.tensors[index];
    const int64_t begin = (chunk - tensor.first_chunk) * kChunkElements;
    const int64_t end =
        begin + kChunkElements < tensor.numel ? begin + kChunkElements : tensor.numel;
    const P* g = static_cast<const P*>(step.grads[index]);
    if (step.squares != nullptr) {
      const StridedLayout* const layout = kStrided ? step.layouts + tensor.layout : nullptr;
      const double squares = sum_of_squares(g, layout, begin, end);
      const int64_t at = tensor.first_square + (chunk - tensor.first_chunk);
      if (threadIdx.x == 0) step.squares[at] = squares;
    }
    P* p = static_cast<P*>(tensor.param);
    if (p == nullptr) continue;
    M* m = static_cast<M*>(tensor.momentum);
    SgdScalars<C> s = scalars_of(step.clocks.clocks[tensor.group].next, C{});
    set_inverse_scale(s, amp.inverse_scale);
    const bool first = tensor.initialized != nullptr && *tensor.initialized == 0;
    if constexpr (kStrided) {
      update_strided(s, first, p, g, m, step.layouts[tensor.layout], begin, end);
    } else {
      update_dense(s, first, p + begin, g + begin, m == nullptr ? m : m + begin, end - begin);
    }
  }
  finish(step, amp);
}

}  // namespace fastlr

// One step over tensors in host memory.
#pragma once

#include <vector>

#include "kernels.h"

namespace fastlr {

// What a step works on, without any of its memory.
struct HostStep {
  const Rule& rule;
  const std::vector<TensorRef>& tensors;
  const std::vector<StridedLayout>& layouts;  // that TensorRef::layout refers to
  const std::vector<AnyScalars>& scalars;
  const std::vector<int32_t>& scalars_of;  // which of them are each tensor's
  const std::vector<GroupStages>& stages;  // each group's

  const GroupStages* stages_of(const TensorRef& tensor) const {
    return tensor.staged ? &stages[tensor.group] : nullptr;
  }
};

// Applies the update to every tensor. threads: the most to use, >= 1. Where tensors share memory
// (in_order), one thread updates them in order, each seeing what the ones before it wrote.
void step_cpu(const HostStep& step, int threads, bool in_order);

// Memory for the sums of each chunk of some tensors.
struct ChunkSums {
  explicit ChunkSums(const std::vector<TensorRef>& tensors);

  std::vector<int64_t> first_chunks;  // of each tensor
  std::vector<double> sums;
};

// The same as step_cpu(), and returns the sum of the squares of the gradients that it read. Neither
// allocates anything.
double measured_step_cpu(const HostStep& step, int threads, bool in_order, ChunkSums& sums);

// The sum of the squares of all elements of the tensors' `grad`, clipped to max_value; nothing else
// of them is read.
double squared_norm_cpu(const std::vector<TensorRef>& tensors,
                        const std::vector<StridedLayout>& layouts, int threads);

// The SIMD level in use, by name, and the choice of another (for tests): the name must be usable.
const char* simd_level();
void set_simd_level(const char* name);

// The OpenMP runtime that parallel regions run on: the path of its library, or nullptr where there
// is none and every step runs on the calling thread.
const char* openmp_runtime();

}  // namespace fastlr

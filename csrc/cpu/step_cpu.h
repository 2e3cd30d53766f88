// One step over tensors in host memory.
#pragma once

#include <vector>

#include "kernels.h"

namespace fastlr {

// Applies the update to every tensor. layouts: what TensorRef::layout refers to; groups: what
// TensorRef::group refers to. threads: the most to use, >= 1. Where tensors share memory
// (in_order), one thread updates them in order, each seeing what the ones before it wrote.
void step_cpu(const std::vector<TensorRef>& tensors, const std::vector<StridedLayout>& layouts,
              const std::vector<GroupScalars>& groups, int threads, bool in_order);

// Values that lie in memory one after another.
struct DenseValues {
  StorageType type;
  int64_t item_size;  // bytes
  const void* data;
  int64_t numel;
};

// The sum of the squares of all values, each squared and added in double; the same on any number of
// threads and at any SIMD level.
double squared_norm_cpu(const std::vector<DenseValues>& tensors, int threads);

// The SIMD level in use, by name, and the choice of another (for tests): the name must be usable.
const char* simd_level();
void set_simd_level(const char* name);

// The OpenMP runtime that parallel regions run on: the path of its library, or nullptr where there
// is none and every step runs on the calling thread.
const char* openmp_runtime();

}  // namespace fastlr

// The CPU kernels of each SIMD level, and the choice between levels.
#pragma once

#include <vector>

#include "../rule.h"
#include "../stages.h"
#include "../tensors.h"

namespace fastlr {

// Updates the elements begin .. end of a tensor. layout: its StridedLayout, or nullptr. stages: its
// group's, or nullptr where it has none. lanes: what the squares of the gradient's elements are
// added to, the first to the first of kLanes, or nullptr; see NOTE: [sums in lanes].
using ChunkKernel = void (*)(const TensorRef& tensor, const StridedLayout* layout,
                             const AnyScalars& scalars, const GroupStages* stages, int64_t begin,
                             int64_t end, double* lanes);

// Adds the squares alone.
using SquaresKernel = void (*)(const TensorRef& tensor, const StridedLayout* layout, int64_t begin,
                               int64_t end, double* lanes);

struct SimdLevel {
  const char* name;
  const ChunkKernel* kernels;  // by the rules' indices
  SquaresKernel squares;
};

// The levels that were built and that this machine can run, the best last.
const std::vector<SimdLevel>& usable_simd_levels();

}  // namespace fastlr

// The CPU kernel of each SIMD level, and the choice between them.
#pragma once

#include <vector>

#include "../step.h"

namespace fastlr {

// Updates the elements begin .. end of a tensor. layout: its StridedLayout, or nullptr.
using ChunkKernel = void (*)(const TensorRef& tensor, const StridedLayout* layout,
                             const GroupScalars& scalars, int64_t begin, int64_t end);

// The sum of the squares of n <= kSquaresBlock elements, in double. The same at every level.
constexpr int64_t kSquaresBlock = 4096;
using SquaresKernel = double (*)(StorageType type, const void* data, int64_t n);

struct SimdLevel {
  const char* name;
  ChunkKernel kernel;
  SquaresKernel squares;
};

// The levels that were built and that this machine can run, the best last.
const std::vector<SimdLevel>& usable_simd_levels();

}  // namespace fastlr

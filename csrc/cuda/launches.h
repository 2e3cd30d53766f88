// How the tensors of a step are cut into launches, and the table that the launches read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "step_cuda.h"

namespace fastlr {

struct Launches {
  std::vector<DeviceTensor> tensors;
  std::vector<StridedLayout> layouts;
  // Their addresses are still to be set: `head.tensors` of each to its first one in device memory.
  std::vector<cuda::Launch> launches;
  std::vector<size_t> firsts;  // in `tensors`, one a launch
  int64_t chunks;              // of all launches
  // Of them, where each share's sums of squares begin, and where those of the last one end.
  std::vector<int64_t> shares;
};

// One launch for each kernel that is needed, or more where a launch cannot take all of its tensors;
// the last one ends the step. in_order: tensors share memory, so each has a launch of its own.
Launches cut_into_launches(const std::vector<TensorRef>& tensors,
                           const std::vector<StridedLayout>& layouts, bool in_order);

}  // namespace fastlr

// Which code works on a tensor: the CPU's kernels, or CUDA's on one of its devices.
#pragma once

#include <climits>
#include <cstddef>
#include <optional>

#include "dlpack.h"

namespace fastlr {

// The place of a tensor that the CPU's kernels work on. All others are devices, by number; see
// NOTE: [the runtime object].
constexpr int kHost = INT_MIN;

// The place of a tensor of the group of this index; nothing where no kernel was built for its
// device.
std::optional<int> place_of(dlpack::Device device, size_t group);

// Treats tensors in host memory as devices', whose kernels work on them; parameter groups are dealt
// out to so many devices. 0: not at all. For tests, with a CUDA that is emulated.
void route_host_to_cuda(int devices);

}  // namespace fastlr

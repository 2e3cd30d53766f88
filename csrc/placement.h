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

// Treats tensors in host memory as devices', whose kernels work on them; parameter groups are dealt
// out to so many devices. 0: not at all. For tests, with a CUDA that is emulated.
void route_host_to_cuda(int devices);
extern int host_devices;  // what was set

// The place of a tensor of the group of this index; nothing where no kernel was built for its
// device.
inline std::optional<int> place_of(dlpack::Device device, [[maybe_unused]] size_t group) {
  if (device.type == dlpack::kCpu && host_devices == 0) return kHost;
#if defined(FASTLR_HAS_CUDA)
  if (device.type == dlpack::kCpu) return -1 - static_cast<int>(group % host_devices);
  if (device.type == dlpack::kCuda) return device.id;
#endif
  return std::nullopt;
}

}  // namespace fastlr

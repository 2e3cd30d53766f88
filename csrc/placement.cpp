#include "placement.h"

namespace fastlr {
namespace {

int host_devices = 0;

}  // namespace

std::optional<int> place_of(dlpack::Device device, [[maybe_unused]] size_t group) {
  if (device.type == dlpack::kCpu && host_devices == 0) return kHost;
#if defined(FASTLR_HAS_CUDA)
  if (device.type == dlpack::kCpu) return -1 - static_cast<int>(group % host_devices);
  if (device.type == dlpack::kCuda) return device.id;
#endif
  return std::nullopt;
}

void route_host_to_cuda(int devices) { host_devices = devices; }

}  // namespace fastlr

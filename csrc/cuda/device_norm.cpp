#include "device_norm.h"

#include <stdexcept>
#include <utility>

#include "../owned.h"

namespace fastlr {

double DeviceNorm::measure(const std::vector<TensorRef>& tensors,
                           const std::vector<StridedLayout>& layouts) {
  const DeviceScope scope(runtime_, device_);
  if (scope.capturing()) {
    throw std::runtime_error(
        "measuring a norm waits for the device, which a CUDA graph cannot capture; do it outside "
        "the capture.");
  }
  if (!state_) {
    cuda::preload_norm(scope.device());
    Table memory(scope, sizeof(DeviceState));
    const DeviceState state{};
    memory.write(scope, 0, &state, sizeof state);
    state_ = std::move(memory);
  }
  state_.used_by(scope);
  std::vector<cuda::Launch> launches = tensors_.update(scope, tensors, layouts, false, true);
  if (launches.empty()) return 0.0;
  tensors_.used(scope);
  DeviceState state;
  const WithoutGil waiting_for_the_device;
  for (cuda::Launch& launch : launches) {
    launch.head.clocks = {reinterpret_cast<DeviceState*>(state_.data()), nullptr, nullptr, nullptr};
    cuda::launch_norm(scope.device(), scope.stream(), launch);
  }
  cuda::download(scope.device(), scope.stream(), &state, state_.data(), sizeof state);
  return state.squared_norm;
}

}  // namespace fastlr

#include "launches.h"

#include <algorithm>
#include <utility>

namespace fastlr {

Launches cut_into_launches(const std::vector<DeviceWork>& work,
                           const std::vector<StridedLayout>& layouts, bool in_order) {
  struct Item {
    const DeviceWork* work;
    int64_t first_square;
  };
  // Tensors of one kernel, in the order in which they came.
  struct Batch {
    StorageType type;
    StorageType momentum_type;
    bool strided;
    std::vector<Item> items;
  };
  Launches cut{};
  std::vector<Batch> batches;
  for (const DeviceWork& item : work) {
    const TensorRef& tensor = item.tensor;
    const bool strided = tensor.layout >= 0;
    const auto fits = [&](const Batch& batch) {
      return batch.type == tensor.type && batch.momentum_type == tensor.momentum_type &&
             batch.strided == strided;
    };
    auto batch = in_order ? batches.end() : std::find_if(batches.begin(), batches.end(), fits);
    if (batch == batches.end()) {
      batches.push_back({tensor.type, tensor.momentum_type, strided, {}});
      batch = batches.end() - 1;
    }
    batch->items.push_back({&item, cut.chunks});
    cut.chunks += chunks_of(tensor.numel);
  }

  for (const Batch& batch : batches) {
    const size_t capacity = static_cast<size_t>(cuda::launch_capacity(batch.strided));
    for (size_t begin = 0; begin < batch.items.size(); begin += capacity) {
      const size_t end = std::min(begin + capacity, batch.items.size());
      cuda::Launch launch{};
      launch.type = batch.type;
      launch.momentum_type = batch.momentum_type;
      launch.strided = batch.strided;
      cut.firsts.push_back(cut.tensors.size());
      for (size_t i = begin; i < end; ++i) {
        const DeviceWork& item = *batch.items[i].work;
        const TensorRef& tensor = item.tensor;
        DeviceTensor entry{};
        entry.param = tensor.param;
        entry.momentum = tensor.momentum;
        entry.initialized = item.initialized;
        entry.numel = tensor.numel;
        entry.first_chunk = launch.chunks;
        entry.first_square = batch.items[i].first_square;
        entry.group = tensor.group;
        entry.layout = -1;
        if (batch.strided) {
          entry.layout = static_cast<int32_t>(cut.layouts.size());
          cut.layouts.push_back(layouts[tensor.layout]);
        }
        launch.chunks += chunks_of(tensor.numel);
        launch.grads.push_back(tensor.grad);
        cut.tensors.push_back(entry);
      }
      cut.launches.push_back(std::move(launch));
    }
  }
  if (!cut.launches.empty()) cut.launches.back().ends_step = true;
  return cut;
}

}  // namespace fastlr

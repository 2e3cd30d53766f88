#include "launches.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <utility>

namespace fastlr {

Launches cut_into_launches(const std::vector<TensorRef>& tensors,
                           const std::vector<StridedLayout>& layouts, bool in_order) {
  struct Item {
    const TensorRef* tensor;
    int64_t first_square;
  };
  // Tensors of one kernel, in the order in which they came.
  struct Batch {
    StorageType type;
    StorageType state_type;
    bool strided;
    bool staged;
    std::vector<Item> items;
  };
  Launches cut{};
  // Sums stand share by share, and each one's in the order of its tensors.
  cut.shares.assign(2, 0);
  for (const TensorRef& tensor : tensors) {
    const size_t after = static_cast<size_t>(tensor.share) + 1;
    if (cut.shares.size() <= after) cut.shares.resize(after + 1, 0);
    cut.shares[after] += chunks_of(tensor.numel);
  }
  std::partial_sum(cut.shares.begin(), cut.shares.end(), cut.shares.begin());
  cut.chunks = cut.shares.back();
  std::vector<int64_t> next_square = cut.shares;
  std::vector<Batch> batches;
  for (const TensorRef& tensor : tensors) {
    const bool strided = tensor.layout >= 0;
    const auto fits = [&](const Batch& batch) {
      return batch.type == tensor.type && batch.state_type == tensor.state_type &&
             batch.strided == strided && batch.staged == tensor.staged;
    };
    auto batch = in_order ? batches.end() : std::find_if(batches.begin(), batches.end(), fits);
    if (batch == batches.end()) {
      batches.push_back({tensor.type, tensor.state_type, strided, tensor.staged, {}});
      batch = batches.end() - 1;
    }
    int64_t& square = next_square[static_cast<size_t>(tensor.share)];
    batch->items.push_back({&tensor, square});
    square += chunks_of(tensor.numel);
  }

  std::set<int32_t> led;  // groups
  for (const Batch& batch : batches) {
    const bool rare = batch.strided || batch.staged;
    const size_t capacity = static_cast<size_t>(cuda::launch_capacity(rare));
    for (size_t begin = 0; begin < batch.items.size(); begin += capacity) {
      const size_t end = std::min(begin + capacity, batch.items.size());
      cuda::Launch launch{};
      launch.type = batch.type;
      launch.state_type = batch.state_type;
      launch.strided = batch.strided;
      launch.staged = batch.staged;
      cut.firsts.push_back(cut.tensors.size());
      for (size_t i = begin; i < end; ++i) {
        const TensorRef& tensor = *batch.items[i].tensor;
        DeviceTensor entry{};
        entry.param = tensor.param;
        std::copy_n(tensor.slot, kMaxSlots, entry.slot);
        entry.age = tensor.step;
        entry.numel = tensor.numel;
        entry.first_chunk = launch.head.chunks;
        entry.first_square = batch.items[i].first_square;
        entry.group = tensor.group;
        entry.leads_group = tensor.step != nullptr && led.insert(tensor.group).second;
        entry.place = tensor.place;
        entry.first = tensor.first;
        entry.ema_type = tensor.ema_type;
        entry.kept = tensor.kept;
        entry.max_value = tensor.max_value;
        entry.layout = -1;
        if (batch.strided) {
          entry.layout = static_cast<int32_t>(cut.layouts.size());
          cut.layouts.push_back(layouts[tensor.layout]);
        }
        launch.head.chunks += chunks_of(tensor.numel);
        launch.grads.push_back(tensor.grad);
        cut.tensors.push_back(entry);
      }
      launch.head.count = static_cast<int32_t>(launch.grads.size());
      cut.launches.push_back(std::move(launch));
    }
  }
  if (!cut.launches.empty()) cut.launches.back().head.ends_step = true;
  return cut;
}

}  // namespace fastlr

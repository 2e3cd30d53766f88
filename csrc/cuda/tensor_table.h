// What the launches of one device read of a step's tensors, in the device's memory.
#pragma once

#include <vector>

#include "device_memory.h"
#include "launches.h"

namespace fastlr {

class TensorTable {
 public:
  // Plans the launches over these tensors and brings the table up to date with them. in_order:
  // tensors share memory, so each has a launch of its own. measures_norm: of the gradients.
  std::vector<cuda::Launch> update(const DeviceScope& scope, const std::vector<TensorRef>& tensors,
                                   const std::vector<StridedLayout>& layouts, bool in_order,
                                   bool measures_norm);

  // What launch_shares() takes, but for where the sums go: of the launches planned last.
  const Shares& shares() const { return shares_; }

  // To be called before the launches.
  void used(const DeviceScope& scope);
  // To be called where the launches are captured.
  void captured_in(GraphObjects& graph);

 private:
  void upload(const DeviceScope& scope, Launches& cut);

  Table tensors_;  // DeviceTensor[], StridedLayout[]
  Table squares_;  // double[]
  std::vector<DeviceTensor> uploaded_;
  std::vector<StridedLayout> uploaded_layouts_;
  Shares shares_{};
  bool tensors_captured_ = false;  // a graph reads the present table: it must not change
};

}  // namespace fastlr

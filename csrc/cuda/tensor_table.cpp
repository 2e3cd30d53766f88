#include "tensor_table.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include "../layout.h"

namespace fastlr {
namespace {

bool same(const StridedLayout& a, const StridedLayout& b) {
  return a.ndim == b.ndim && same_numbers(a.shape, b.shape, a.ndim) &&
         same_numbers(a.param, b.param, a.ndim) && same_numbers(a.grad, b.grad, a.ndim) &&
         std::equal(
             std::begin(a.slot), std::end(a.slot), std::begin(b.slot),
             [&](const auto& one, const auto& other) { return same_numbers(one, other, a.ndim); });
}

}  // namespace

void TensorTable::upload(const DeviceScope& scope, Launches& cut) {
  const size_t entry_bytes = cut.tensors.size() * sizeof(DeviceTensor);
  const size_t layout_bytes = cut.layouts.size() * sizeof(StridedLayout);
  const bool changed =
      cut.tensors.size() != uploaded_.size() || cut.layouts.size() != uploaded_layouts_.size() ||
      std::memcmp(cut.tensors.data(), uploaded_.data(), entry_bytes) != 0 ||
      !std::equal(cut.layouts.begin(), cut.layouts.end(), uploaded_layouts_.begin(),
                  [](const StridedLayout& a, const StridedLayout& b) { return same(a, b); });
  if (!changed) return;
  scope.refuse_capture(uploaded_.empty() ? "this is the optimizer's first step"
                                         : "parameters or their state have changed or moved");
  uploaded_.clear();  // until the upload is under way
  if (tensors_captured_ || tensors_.size() < entry_bytes + layout_bytes) {
    tensors_ = Table(scope, entry_bytes + layout_bytes);
    tensors_captured_ = false;
  }
  tensors_.used_by(scope);
  tensors_.write(scope, 0, cut.tensors.data(), entry_bytes);
  if (layout_bytes != 0) tensors_.write(scope, entry_bytes, cut.layouts.data(), layout_bytes);
  uploaded_ = std::move(cut.tensors);
  uploaded_layouts_ = std::move(cut.layouts);
}

std::vector<cuda::Launch> TensorTable::update(const DeviceScope& scope,
                                              const std::vector<TensorRef>& tensors,
                                              const std::vector<StridedLayout>& layouts,
                                              bool in_order, bool measures_norm) {
  Launches cut = cut_into_launches(tensors, layouts, in_order);
  if (cut.launches.empty()) return {};
  upload(scope, cut);
  // At least one, as a null pointer says that nothing is measured.
  const size_t squares_bytes = std::max<size_t>(cut.chunks, 1) * sizeof(double);
  if (measures_norm && squares_.size() < squares_bytes) {
    scope.refuse_capture("the gradients' norm was not measured before");
    squares_ = Table(scope, squares_bytes);
  }
  const DeviceTensor* const table = reinterpret_cast<const DeviceTensor*>(tensors_.data());
  for (size_t i = 0; i < cut.launches.size(); ++i) {
    StepHead& head = cut.launches[i].head;
    head.tensors = table + cut.firsts[i];
    head.layouts = reinterpret_cast<const StridedLayout*>(table + uploaded_.size());
    head.squares = measures_norm ? reinterpret_cast<double*>(squares_.data()) : nullptr;
    head.step_chunks = cut.chunks;
  }
  shares_ = {};
  shares_.squares = reinterpret_cast<const double*>(squares_.data());
  std::fill(std::begin(shares_.begin), std::end(shares_.begin), cut.chunks);
  std::copy(cut.shares.begin(), cut.shares.end(), shares_.begin);
  return std::move(cut.launches);
}

void TensorTable::used(const DeviceScope& scope) {
  for (Table* table : {&tensors_, &squares_}) {
    if (*table) table->used_by(scope);
  }
}

void TensorTable::captured_in(GraphObjects& graph) {
  graph.add(tensors_);
  graph.add(squares_);
  tensors_captured_ = true;
}

}  // namespace fastlr

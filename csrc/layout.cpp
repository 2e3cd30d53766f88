#include "layout.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace fastlr {

bool storage_type(dlpack::DataType type, StorageType& out) {
  const int bits = is_complex(type) ? type.bits / 2 : type.bits;
  if (type.lanes != 1) return false;
  if (type.code == dlpack::kBfloat && bits == 16) {
    out = StorageType::kBFloat16;
    return true;
  }
  if (type.code != dlpack::kFloat && type.code != dlpack::kComplex) return false;
  switch (bits) {
    case 16:
      out = StorageType::kFloat16;
      return true;
    case 32:
      out = StorageType::kFloat32;
      return true;
    case 64:
      out = StorageType::kFloat64;
      return true;
    default:
      return false;
  }
}

MemoryOrder memory_order(const TensorView& view) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  MemoryOrder order{1, 0, true, false};
  for (int32_t d = 0; d < view.ndim; ++d) {
    order.numel *= view.shape[d];
    if (view.shape[d] > 1) dims.emplace_back(view.strides[d], view.shape[d]);
  }
  if (order.numel == 0) return order;
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;  // the farthest element of the dimensions so far
  int64_t packed = 1;
  for (const auto& [stride, size] : dims) {
    order.overlapping = order.overlapping || stride <= reach;
    order.dense = order.dense && stride == packed;
    reach += (size - 1) * stride;
    packed *= size;
  }
  order.extent = reach + 1;
  return order;
}

bool strided_layout(const TensorView& p, const TensorView& g, const TensorView* m,
                    StridedLayout& out) {
  const int pair = is_complex(p.dtype) ? 2 : 1;
  std::vector<int32_t> dims;
  for (int32_t d = 0; d < p.ndim; ++d) {
    if (p.shape[d] != 1) dims.push_back(d);
  }
  if (dims.size() + pair - 1 > kMaxDims) return false;
  std::sort(dims.begin(), dims.end(),
            [&](int32_t a, int32_t b) { return p.strides[a] > p.strides[b]; });
  out = StridedLayout{};
  for (const int32_t d : dims) {
    const int32_t k = out.ndim++;
    out.shape[k] = p.shape[d];
    out.param[k] = p.strides[d] * pair;
    out.grad[k] = g.strides[d] * pair;
    out.momentum[k] = m == nullptr ? 0 : m->strides[d] * pair;
  }
  if (pair == 2) {
    const int32_t k = out.ndim++;
    out.shape[k] = 2;
    out.param[k] = out.grad[k] = out.momentum[k] = 1;
  }
  return true;
}

}  // namespace fastlr

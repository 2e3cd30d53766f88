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

namespace {

// Calls visit(offset), in elements, for each element of a tensor that has some.
template <typename Visit>
void for_each_offset(const TensorView& view, Visit visit) {
  std::vector<int64_t> index(static_cast<size_t>(view.ndim), 0);
  int64_t offset = 0;
  for (;;) {
    visit(offset);
    int32_t d = view.ndim - 1;
    for (; d >= 0; --d) {
      offset += view.strides[d];
      if (++index[static_cast<size_t>(d)] < view.shape[d]) break;
      offset -= view.strides[d] * view.shape[d];
      index[static_cast<size_t>(d)] = 0;
    }
    if (d < 0) return;
  }
}

}  // namespace

bool share_elements(const TensorView& a, const TensorView& b) {
  const MemoryOrder of_a = memory_order(a), of_b = memory_order(b);
  const int64_t bytes = a.dtype.bits / 8;
  const int64_t begin_a = reinterpret_cast<intptr_t>(a.data);
  const int64_t begin_b = reinterpret_cast<intptr_t>(b.data);
  if (of_a.numel == 0 || of_b.numel == 0 || begin_a + of_a.extent * bytes <= begin_b ||
      begin_b + of_b.extent * bytes <= begin_a) {
    return false;
  }
  const int64_t apart = begin_b - begin_a;
  if ((of_a.dense && of_b.dense) || apart % bytes != 0) return true;
  std::vector<bool> taken(static_cast<size_t>(of_a.extent));
  for_each_offset(a, [&](int64_t offset) { taken[static_cast<size_t>(offset)] = true; });
  bool found = false;
  for_each_offset(b, [&](int64_t offset) {
    const int64_t at = offset + apart / bytes;
    found = found || (at >= 0 && at < of_a.extent && taken[static_cast<size_t>(at)]);
  });
  return found;
}

bool strided_layout(const TensorView& p, const TensorView& g, const SlotViews& slots,
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
    for (int i = 0; i < kMaxSlots; ++i) {
      out.slot[i][k] = slots[i] == nullptr ? 0 : slots[i]->strides[d] * pair;
    }
  }
  if (pair == 2) {
    const int32_t k = out.ndim++;
    out.shape[k] = 2;
    out.param[k] = out.grad[k] = 1;
    for (auto& strides : out.slot) strides[k] = 1;
  }
  return true;
}

}  // namespace fastlr

// How tensors lie in memory: their element type, whether they are dense, and common strides.
#pragma once

#include <array>

#include "tensor_view.h"
#include "tensors.h"

namespace fastlr {

inline bool is_complex(dlpack::DataType type) { return type.code == dlpack::kComplex; }

inline bool same(dlpack::DataType a, dlpack::DataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

inline bool same(dlpack::Device a, dlpack::Device b) { return a.type == b.type && a.id == b.id; }

// A loop, as there are few dimensions and std::equal would call memcmp for each.
inline bool same_numbers(const int64_t* a, const int64_t* b, int32_t count) {
  for (int32_t i = 0; i < count; ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

inline bool same_shape(const TensorView& a, const TensorView& b) {
  return a.ndim == b.ndim && same_numbers(a.shape, b.shape, a.ndim);
}

// Whether two tensors of one shape lie in memory in one order. Strides of dimensions of size one,
// which are never taken, may differ.
inline bool same_order(const TensorView& a, const TensorView& b) {
  for (int32_t d = 0; d < a.ndim; ++d) {
    if (a.strides[d] != b.strides[d] && a.shape[d] != 1) return false;
  }
  return true;
}

// The type of a tensor's real numbers; false where there is no kernel for it.
bool storage_type(dlpack::DataType type, StorageType& out);

inline int64_t bytes(int64_t elements, dlpack::DataType type) { return elements * (type.bits / 8); }

// Whether two tensors' memory, so many elements of each, does not meet.
inline bool apart(const TensorView& a, int64_t extent_a, const TensorView& b, int64_t extent_b) {
  const char* const from_a = static_cast<const char*>(a.data);
  const char* const from_b = static_cast<const char*>(b.data);
  return from_a + bytes(extent_a, a.dtype) <= from_b || from_b + bytes(extent_b, b.dtype) <= from_a;
}

// PyTorch marks a tensor as conjugated or negated instead of computing it; its memory then holds
// other values than it says. Its public functions mark views of complex tensors only: complex ones,
// and real ones whose elements are two apart, which shows unless there is a single element.
inline bool may_be_lazy(const TensorView& view, int64_t numel, bool dense) {
  return is_complex(view.dtype) || numel == 1 || !dense;
}

struct MemoryOrder {
  int64_t numel;
  int64_t extent;    // elements from the first to one past the last in memory
  bool dense;        // no gaps
  bool overlapping;  // elements share memory, or it takes more than sorted strides to rule it out
};

MemoryOrder memory_order(const TensorView& view);

// Whether two tensors of one element type have an element in common. Where both have gaps, every
// element is looked at.
bool share_elements(const TensorView& a, const TensorView& b);

// The strides of a parameter, its gradient and its slots of state, of which some may be nullptr,
// over one index space, sorted so that the parameter's memory is walked forwards; complex numbers
// become a dimension of two. False where there are too many dimensions.
using SlotViews = std::array<const TensorView*, kMaxSlots>;
bool strided_layout(const TensorView& p, const TensorView& g, const SlotViews& slots,
                    StridedLayout& out);

}  // namespace fastlr

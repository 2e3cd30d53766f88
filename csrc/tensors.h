// What one step works on: tensors as plain pointers, and how their elements are cut into chunks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace fastlr {

enum class StorageType : int8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// One parameter with its gradient and state. Complex tensors appear as pairs of reals.
struct TensorRef {
  void* param;
  const void* grad;
  void* momentum;  // nullptr when the group has no momentum
  int64_t numel;
  int32_t group;
  int32_t layout;  // index of its StridedLayout, or -1: all three dense in the same order
  StorageType type;
  StorageType momentum_type;
  bool first;  // never updated before: momentum is written without being read
};
static_assert(std::is_trivially_copyable<TensorRef>::value, "tables of it are copied as bytes");

constexpr int kMaxDims = 64;  // PyTorch's own limit for elementwise kernels

// Strides, in elements, of tensors that do not lie in memory in one common order.
struct StridedLayout {
  int32_t ndim;
  int64_t shape[kMaxDims];
  int64_t param[kMaxDims];
  int64_t grad[kMaxDims];
  int64_t momentum[kMaxDims];
};

// The elements begin .. end of one tensor.
struct Chunk {
  int64_t tensor;
  int64_t begin;
  int64_t end;
};

// Calls visit(Chunk) for the part-th of `parts` equal shares of all elements, in order. The shares
// of all parts cover each element once. total: the sum of all numel. Shares begin at multiples of
// 64 elements, so that two threads rarely write to one cache line.
template <typename Visit>
void for_each_chunk(const std::vector<TensorRef>& tensors, int64_t total, int part, int parts,
                    Visit visit) {
  const auto boundary = [=](int64_t k) { return k == parts ? total : total / parts * k / 64 * 64; };
  const int64_t share_begin = boundary(part);
  const int64_t share_end = boundary(part + 1);
  int64_t first = 0;  // of the tensor, counted through all tensors
  for (size_t i = 0; i < tensors.size() && first < share_end; ++i) {
    const int64_t next = first + tensors[i].numel;
    const int64_t begin = share_begin > first ? share_begin : first;
    const int64_t end = share_end < next ? share_end : next;
    if (begin < end) visit(Chunk{static_cast<int64_t>(i), begin - first, end - first});
    first = next;
  }
}

}  // namespace fastlr

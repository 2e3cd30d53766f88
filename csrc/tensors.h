// What one step works on: tensors as plain pointers, and how their elements are cut into chunks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "rule.h"
#include "stages.h"

namespace fastlr {

enum class StorageType : int8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

inline bool is_half(StorageType type) {
  return type == StorageType::kBFloat16 || type == StorageType::kFloat16;
}

// NOTE: [shares]
// A DTensor is a process's part of a parameter. What sums up all gradients adds up the parts that
// it has in shares: of tensors that are cut along the same dimensions of the same mesh, whose
// processes then add theirs up along these. Share 0 are tensors that each process has whole, be
// they plain or replicas, which count once.
constexpr int kMaxShares = 16;

// One parameter with its gradient and state. Complex tensors appear as pairs of reals.
struct TensorRef {
  void* param;
  const void* grad;
  void* slot[kMaxSlots];  // nullptr where one is not live
  float* step;            // where its age is kept, or nullptr: see NOTE: [age]
  int64_t age;            // on the host
  int64_t numel;
  int32_t group;
  int32_t layout;  // index of its StridedLayout, or -1: all of them dense in the same order
  StorageType type;
  StorageType state_type;  // of the rule's slots
  StorageType ema_type;
  Keeping kept;
  bool averages;     // whether an average is kept, which of an empty tensor has no address
  bool staged;       // whether there is any stage to it
  int32_t place;     // among the optimizer's parameters
  int32_t share;     // see NOTE: [shares]; 0: none
  int64_t first;     // where in the whole parameter its first element stands, for random bits
  double max_value;  // what its gradient is clipped to element by element, or infinity
};
static_assert(std::is_trivially_copyable<TensorRef>::value, "tables of it are copied as bytes");

// Makes what a gradient is clipped to a bound of the scaled one; nothing: of none.
inline void bring_to_scale(TensorRef& tensor, std::optional<float> inverse_scale) {
  if (!inverse_scale) {
    tensor.max_value = std::numeric_limits<double>::infinity();
  } else if (tensor.type == StorageType::kFloat64) {
    tensor.max_value /= static_cast<double>(*inverse_scale);
  } else {  // rounded as where they are updated
    tensor.max_value = static_cast<float>(tensor.max_value) / *inverse_scale;
  }
}

constexpr int kMaxDims = 64;  // PyTorch's own limit for elementwise kernels

// Strides, in elements, of tensors that do not lie in memory in one common order.
struct StridedLayout {
  int32_t ndim;
  int64_t shape[kMaxDims];
  int64_t param[kMaxDims];
  int64_t grad[kMaxDims];
  int64_t slot[kMaxSlots][kMaxDims];
};

// The elements begin .. end of one tensor.
struct Chunk {
  int64_t tensor;
  int64_t begin;
  int64_t end;
};

// Elements that a CUDA block updates at a time, and whose squares are added up at a time: eight
// rounds of 256 threads with 16 bytes of float32. Fewer would search for their tensor too often,
// more would leave multiprocessors idle in networks of a million parameters. (On an H200, 2,048 to
// 8,192 are within 3 % of each other from 5 to 100 million elements.)
constexpr int64_t kChunkElements = 8192;

inline int64_t chunks_of(int64_t numel) { return (numel + kChunkElements - 1) / kChunkElements; }

// Calls visit(Chunk) for the part-th of `parts` about equal shares of all elements, in order. The
// shares of all parts cover each element once. total: the sum of all numel. Within a tensor, shares
// meet at multiples of `grain` elements.
template <typename Visit>
void for_each_chunk(const std::vector<TensorRef>& tensors, int64_t total, int part, int parts,
                    int64_t grain, Visit visit) {
  const auto boundary = [=](int64_t k) { return k == parts ? total : total / parts * k; };
  const int64_t share_begin = boundary(part);
  const int64_t share_end = boundary(part + 1);
  int64_t first = 0;  // of the tensor, counted through all tensors
  for (size_t i = 0; i < tensors.size() && first < share_end; ++i) {
    const int64_t numel = tensors[i].numel;
    const auto within = [&](int64_t place) {
      return place <= first ? 0 : place >= first + numel ? numel : (place - first) / grain * grain;
    };
    const int64_t begin = within(share_begin), end = within(share_end);
    if (begin < end) visit(Chunk{static_cast<int64_t>(i), begin, end});
    first += numel;
  }
}

}  // namespace fastlr

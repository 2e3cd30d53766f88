// Running averages, which move as torch.lerp does.
#pragma once

#include <stdint.h>

#include "numeric.h"

namespace fastlr {

// The average m moves towards x by the part 1 - decay of the way, from the end that is nearer.
template <typename T>
struct Average {
  T part;  // of the way from m to x, negative: from x to m
  Mask<T> from_start;

  FASTLR_HD_MEMBER_INLINED T moved(T m, T x) const {
    return fused_multiply_add(x - m, part, select(from_start, m, x));
  }
};

template <typename T>
FASTLR_HD Average<T> average(double decay) {
  const T part = static_cast<T>(1.0 - decay);
  const bool from_start = part < T(0.5);
  return {from_start ? part : part - T(1), mask_of<T>(from_start)};
}

}  // namespace fastlr

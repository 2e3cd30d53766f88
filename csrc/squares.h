// The sum of the squares of gradients, in double.
#pragma once

#include <math.h>
#include <stdint.h>

#include "numeric.h"

namespace fastlr {

// NOTE: [sums in lanes]
// A sum is added up in one order everywhere, so that it has the same bits on every device, with any
// number of threads, vectors of any width and gradients at any address: value i goes to lane
// i % 256, each lane adds its values in their order, and then lanes 128 apart are added, lanes 64
// apart, and so on. That is how the 256 threads of a CUDA block add, and CPUs' vectors can. A
// tensor's squares are so added in chunks of kChunkElements, and then the sums of all chunks.
constexpr int kLanes = 256;

// sum + x * x, rounded once. The square of a float is exact in double, so that where a fused
// addition is slow a plain one gives the same.
FASTLR_HD double add_square(double sum, double x) { return fused_multiply_add(x, x, sum); }
FASTLR_HD double add_square(double sum, float x) {
  const double value = x;
#if defined(__FP_FAST_FMA) || defined(__CUDA_ARCH__)
  return fused_multiply_add(value, value, sum);
#else
  return sum + value * value;
#endif
}

// The sum of lanes to which so many values were added, left in the first of them. Lanes that
// nothing was added to are zero, and need not be added.
FASTLR_HD double sum_of_lanes(double* lanes, int64_t values) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2) {
    if (apart >= values) continue;
    for (int k = 0; k < apart; ++k) lanes[k] += lanes[k + apart];
  }
  return lanes[0];
}

// What gradients are multiplied with so that their norm is max_norm at most, as torch's
// clip_grad_norm_ has it, and GradScaler's scale is taken out; NaN where the norm is not finite.
FASTLR_HD double clipping_factor(double squared_norm, double max_norm, float inverse_scale) {
  if (!(squared_norm <= 1.7976931348623157e308)) return NAN;
  const double clip = max_norm / (sqrt(squared_norm) + 1e-6);
  return inverse_scale * (clip < 1.0 ? clip : 1.0);
}

// A sum of squares without the scale that GradScaler has multiplied gradients with.
FASTLR_HD double unscaled_squares(double squares, float inverse_scale) {
  const double inverse = inverse_scale;
  return squares * inverse * inverse;
}

}  // namespace fastlr

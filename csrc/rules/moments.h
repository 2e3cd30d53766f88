// Running averages of squares of gradients, and what else rules share.
#pragma once

#include <math.h>

#include "../average.h"
#include "../numeric.h"
#include "../rule.h"
#include "../schedule.h"

namespace fastlr {

// base ** exponent for 0 <= base < 1 and exponent >= 1. On the host with the library's pow(), as
// Python takes powers; on devices more precisely than theirs, so that both agree but for a unit in
// the last place in one case out of fifty.
FASTLR_HD double power(double base, int64_t exponent) {
#if defined(__CUDA_ARCH__)
  return integer_power(base, exponent);
#else
  return pow(base, static_cast<double>(exponent));
#endif
}

// The square root as Python's x ** 0.5 has it, which is the library's pow(): in one case out of a
// thousand it is a unit in the last place off.
FASTLR_HD double root(double x) {
#if defined(__CUDA_ARCH__)
  return sqrt(x);
#else
  return pow(x, 0.5);
#endif
}

// The average of squares: v * decay + (1 - decay) * g * g.
template <typename T>
struct SquareAverage {
  T decay;
  T part;

  FASTLR_HD_MEMBER_INLINED T moved(T v, T g) const {
    return fused_multiply_add(part * g, g, v * decay);
  }
};

template <typename T>
FASTLR_HD SquareAverage<T> square_average(double decay) {
  return {static_cast<T>(decay), static_cast<T>(1.0 - decay)};
}

}  // namespace fastlr

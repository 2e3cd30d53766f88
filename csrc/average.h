// Running averages, which move as torch.lerp does, and the one that is kept of a parameter.
#pragma once

#include <stdint.h>

#include "numeric.h"

namespace fastlr {

// The average m moves towards x by the part 1 - decay of the way, from the end that is nearer.
template <typename T>
struct Average {
  T part;  // of the way from m to x, negative: from x to m
  Mask<T> from_start;

  FASTLR_HD_MEMBER T moved(T m, T x) const {
    return fused_multiply_add(x - m, part, select(from_start, m, x));
  }
};

template <typename T>
FASTLR_HD Average<T> average(double decay) {
  const T part = static_cast<T>(1.0 - decay);
  const bool from_start = part < T(0.5);
  return {from_start ? part : part - T(1), mask_of<T>(from_start)};
}

// How the averages of a group's parameters move at an update, in both compute types.
struct Averaging {
  Average<float> in_float;
  Average<double> in_double;

  FASTLR_HD_MEMBER const Average<float>& in(float) const { return in_float; }
  FASTLR_HD_MEMBER const Average<double>& in(double) const { return in_double; }
};

// warms_up: the decay grows with the updates before this one, as TensorFlow's
// ExponentialMovingAverage takes it. A decay of one, which stands for none, stays.
FASTLR_HD Averaging averaging(double decay, bool warms_up, int64_t updates) {
  const double t = static_cast<double>(updates);
  const double most = (1.0 + t) / (10.0 + t);
  if (warms_up && decay < 1.0 && most < decay) decay = most;
  return {average<float>(decay), average<double>(decay)};
}

}  // namespace fastlr

// Stochastic gradient descent with momentum, as torch.optim.SGD applies it (not Sutskever's form,
// which multiplies the learning rate into the momentum buffer). For each element:
//   g = fma(weight_decay, p, g)
//   m = fma(g, 1 - dampening, round(m * momentum)), at a parameter's first update m = g
//   u = nesterov ? fma(m, momentum, g) : m
//   p = fma(u, -lr, p)
// A coefficient of zero removes its term, so that it can neither create a NaN nor lose a signed
// zero.
#pragma once

#include "../numeric.h"

namespace fastlr {

// A group's hyperparameters for one update, as the user knows them.
struct SgdOptions {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  bool nesterov;
  bool maximize;
};

// The same in the form and type the update needs; derived values are formed in double, then
// rounded.
template <typename T>
struct SgdScalars {
  T neg_lr;
  T momentum;
  T one_minus_dampening;
  T weight_decay;
  T inverse_scale;
  bool has_momentum;
  bool has_weight_decay;
  bool has_scale;
  bool nesterov;
  bool maximize;
};

// inverse_scale: 1 / GradScaler's scale, rounded to float32 as torch's unscale_ does; 1 where
// unused.
template <typename T>
FASTLR_HD void set_inverse_scale(SgdScalars<T>& s, float inverse_scale) {
  s.inverse_scale = static_cast<T>(inverse_scale);
  s.has_scale = inverse_scale != 1.0f;
}

template <typename T>
FASTLR_HD SgdScalars<T> sgd_scalars(const SgdOptions& options, float inverse_scale) {
  SgdScalars<T> s;
  s.neg_lr = static_cast<T>(-options.lr);
  s.momentum = static_cast<T>(options.momentum);
  s.one_minus_dampening = static_cast<T>(1.0 - options.dampening);
  s.weight_decay = static_cast<T>(options.weight_decay);
  set_inverse_scale(s, inverse_scale);
  s.has_momentum = options.momentum != 0.0;
  s.has_weight_decay = options.weight_decay != 0.0;
  s.nesterov = options.nesterov;
  s.maximize = options.maximize;
  return s;
}

// One element: reads the gradient, updates parameter and momentum (which is left alone without
// one).
template <typename T>
FASTLR_HD void sgd_update(const SgdScalars<T>& s, bool first, T& p, T g, T& m) {
  g = s.has_scale ? g * s.inverse_scale : g;
  g = s.maximize ? -g : g;
  g = s.has_weight_decay ? fused_multiply_add(s.weight_decay, p, g) : g;
  T u = g;
  if (s.has_momentum) {
    m = first ? g : fused_multiply_add(g, s.one_minus_dampening, m * s.momentum);
    u = s.nesterov ? fused_multiply_add(m, s.momentum, g) : m;
  }
  p = fused_multiply_add(u, s.neg_lr, p);
}

}  // namespace fastlr

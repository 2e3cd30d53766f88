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
#include "../rule.h"

namespace fastlr {

struct Sgd {
  static constexpr const char* kName = "sgd";

  enum { kLr, kMomentum, kDampening, kWeightDecay, kNesterov, kMaximize };
  static constexpr Option kOptions[] = {
      {"lr", false, kNotNegative, ""},
      {"momentum", false, kBelowOne,
       "; from 1 on gradients are never forgotten and the buffer grows without bound"},
      {"dampening", false, kAnyNumber, ""},
      {"weight_decay", false, kNotNegative, ""},
      {"nesterov", true, kAnyNumber, ""},
      {"maximize", true, kAnyNumber, ""},
  };
  static constexpr int kScheduled = 2;
  static constexpr const char* kSlots[] = {"momentum_buffer"};

  static Conflict conflict(const Options& options) {
    if (options[kNesterov] != 0.0 && options[kDampening] != 0.0) {
      return {kDampening, "0 with nesterov=True"};
    }
    return {-1, nullptr};
  }

  static uint32_t live_slots(const Options& options, uint32_t driven) {
    return options[kMomentum] != 0.0 || (driven >> kMomentum & 1u) != 0 ? 1u : 0u;
  }
};

// A group's hyperparameters in the form and type the update needs; derived values are formed in
// double, then rounded.
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
FASTLR_HD SgdScalars<T> sgd_scalars(const Options& options, float inverse_scale) {
  SgdScalars<T> s;
  s.neg_lr = static_cast<T>(-options[Sgd::kLr]);
  s.momentum = static_cast<T>(options[Sgd::kMomentum]);
  s.one_minus_dampening = static_cast<T>(1.0 - options[Sgd::kDampening]);
  s.weight_decay = static_cast<T>(options[Sgd::kWeightDecay]);
  set_inverse_scale(s, inverse_scale);
  s.has_momentum = options[Sgd::kMomentum] != 0.0;
  s.has_weight_decay = options[Sgd::kWeightDecay] != 0.0;
  s.nesterov = options[Sgd::kNesterov] != 0.0;
  s.maximize = options[Sgd::kMaximize] != 0.0;
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

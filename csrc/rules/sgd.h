// Stochastic gradient descent with momentum, as torch.optim.SGD applies it (not Sutskever's form,
// which multiplies the learning rate into the momentum buffer), and, with decoupled weight decay,
// SGDW (arXiv 1711.05101). For each element:
//   m = fma(g, 1 - dampening, round(m * momentum)), at a parameter's first update m = g
//   u = nesterov ? fma(m, momentum, g) : m
//   p = fma(u, -lr, p)
// A coefficient of zero removes its term, so that it can neither create a NaN nor lose a signed
// zero.
#pragma once

#include "../numeric.h"
#include "../rule.h"

namespace fastlr {

struct Sgd : RuleDefaults {
  static constexpr const char* kName = "sgd";

  enum { kLr, kMomentum, kWeightDecay, kDampening, kNesterov, kMaximize, kDecoupled };
  static constexpr Option kOptions[] = {
      {"lr", false, kNotNegative},
      {"momentum", false, kBelowOne,
       "; from 1 on gradients are never forgotten and the buffer grows without bound"},
      {"weight_decay", false, kNotNegative},
      {"dampening", false, kAnyNumber},
      {"nesterov", true, kAnyNumber},
      {"maximize", true, kAnyNumber},
      {"decoupled_weight_decay", true, kAnyNumber},
  };
  static constexpr int kScheduled = 3;

  enum { kBuffer, kSlotCount };
  static constexpr const char* kSlots[] = {"momentum_buffer"};
  static constexpr uint32_t kLiveSets[] = {0b0, 0b1};  // that live_slots() returns
  static constexpr bool kCountsSteps = false;

  static Conflict conflict(const Options& options) {
    if (options[kNesterov] != 0.0 && options[kDampening] != 0.0) {
      return {kDampening, "0 with nesterov=True"};
    }
    return {-1, nullptr};
  }

  FASTLR_HD_MEMBER static uint32_t live_slots(const Options& options, uint32_t driven) {
    return options[kMomentum] != 0.0 || (driven >> kMomentum & 1u) != 0 ? 1u << kBuffer : 0u;
  }

  FASTLR_HD_MEMBER static bool decouples(const Options& options) {
    return options[kDecoupled] != 0.0;
  }

  template <typename T>
  struct Scalars {
    T neg_lr;
    T momentum;
    T of_gradient;  // 1 - dampening
    bool nesterov;
    bool first;
  };

  template <typename T>
  FASTLR_HD_MEMBER static Scalars<T> scalars(const Options& options, int64_t age) {
    Scalars<T> s;
    s.neg_lr = static_cast<T>(-options[kLr]);
    s.momentum = static_cast<T>(options[kMomentum]);
    s.first = age == 0;
    s.of_gradient = s.first ? T(1) : static_cast<T>(1.0 - options[kDampening]);
    s.nesterov = options[kNesterov] != 0.0;
    return s;
  }

  template <typename T>
  FASTLR_HD_INLINED void update(const Scalars<T>& s, uint32_t live, T& p, T g,
                                T (&slots)[kSlotCount]) {
    T& m = slots[kBuffer];
    T u = g;
    if (is_live(live, kBuffer)) {
      m = fused_multiply_add(g, s.of_gradient, s.first ? kNothing<T> : m * s.momentum);
      u = s.nesterov ? fused_multiply_add(m, s.momentum, g) : m;
    }
    p = fused_multiply_add(u, s.neg_lr, p);
  }
};

}  // namespace fastlr

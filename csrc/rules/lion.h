// Lion (Chen et al., arXiv 2302.06675, algorithm 2). For each element, after the decoupled weight
// decay:
//   p = fma(sign(fma(1 - beta1, g, m * beta1)), -lr, p)
//   m = fma(1 - beta2, g, m * beta2)
// The sign of zero is zero, and that of a NaN is a NaN, as in the authors' code: a gradient that is
// none shows in the parameter.
#pragma once

#include "moments.h"

namespace fastlr {

struct Lion : RuleDefaults {
  static constexpr const char* kName = "lion";

  enum { kLr, kBeta1, kBeta2, kWeightDecay, kMaximize };
  static constexpr Option kOptions[] = {
      {"lr", false, kNotNegative},
      {"beta1", false, kBelowOne, "", "betas", 0},
      {"beta2", false, kBelowOne, "", "betas", 1},
      {"weight_decay", false, kNotNegative},
      {"maximize", true, kAnyNumber},
  };
  static constexpr int kScheduled = 4;

  enum { kAverage, kSlotCount };
  static constexpr const char* kSlots[] = {"exp_avg"};
  static constexpr uint32_t kLiveSets[] = {0b1};  // that live_slots() returns
  static constexpr bool kCountsSteps = false;

  FASTLR_HD_MEMBER static uint32_t live_slots(const Options&, uint32_t) { return 1u << kAverage; }
  FASTLR_HD_MEMBER static bool decouples(const Options&) { return true; }

  template <typename T>
  struct Scalars {
    T beta1, one_minus_beta1;
    T beta2, one_minus_beta2;
    T neg_lr;
  };

  template <typename T>
  FASTLR_HD_MEMBER static Scalars<T> scalars(const Options& options, int64_t) {
    return {static_cast<T>(options[kBeta1]), static_cast<T>(1.0 - options[kBeta1]),
            static_cast<T>(options[kBeta2]), static_cast<T>(1.0 - options[kBeta2]),
            static_cast<T>(-options[kLr])};
  }

  template <typename T>
  FASTLR_HD_INLINED void update(const Scalars<T>& s, uint32_t, T& p, T g, T (&slots)[kSlotCount]) {
    T& m = slots[kAverage];
    const T u = fused_multiply_add(s.one_minus_beta1, g, m * s.beta1);
    m = fused_multiply_add(s.one_minus_beta2, g, m * s.beta2);
    const T sign = u > T(0) ? T(1) : u < T(0) ? T(-1) : u;
    p = fused_multiply_add(sign, s.neg_lr, p);
  }
};

}  // namespace fastlr

// Adagrad (Duchi, Hazan, Singer, JMLR 12, 2011), in the order of
// torch.optim.Adagrad(foreach=False). For each element, in the update that is its parameter's t-th:
//   a = fma(g, g, a), from initial_accumulator_value
//   p = p + (-lr / (1 + (t - 1) * lr_decay) * g) / (sqrt(a) + eps)
#pragma once

#include "moments.h"

namespace fastlr {

struct Adagrad : RuleDefaults {
  static constexpr const char* kName = "adagrad";

  enum { kLr, kWeightDecay, kLrDecay, kInitial, kEps, kMaximize };
  static constexpr Option kOptions[] = {
      {"lr", false, kNotNegative},       {"weight_decay", false, kNotNegative},
      {"lr_decay", false, kNotNegative}, {"initial_accumulator_value", false, kNotNegative},
      {"eps", false, kNotNegative},      {"maximize", true, kAnyNumber},
  };
  static constexpr int kScheduled = 2;

  enum { kSum, kSlotCount };
  static constexpr const char* kSlots[] = {"sum"};
  static constexpr uint32_t kLiveSets[] = {0b1};  // that live_slots() returns
  static constexpr bool kStartsWithState = true;

  FASTLR_HD_MEMBER static uint32_t live_slots(const Options&, uint32_t) { return 1u << kSum; }
  static double initial_state(const Options& options) { return options[kInitial]; }

  template <typename T>
  struct Scalars {
    T neg_lr;
    T eps;
  };

  template <typename T>
  FASTLR_HD_MEMBER static Scalars<T> scalars(const Options& options, int64_t age) {
    const double lr = options[kLr] / (1.0 + static_cast<double>(age) * options[kLrDecay]);
    return {static_cast<T>(-lr), static_cast<T>(options[kEps])};
  }

  template <typename T>
  FASTLR_HD_INLINED void update(const Scalars<T>& s, uint32_t, T& p, T g, T (&slots)[kSlotCount]) {
    const T a = slots[kSum] = fused_multiply_add(g, g, slots[kSum]);
    p = p + s.neg_lr * g / (square_root(a) + s.eps);
  }
};

}  // namespace fastlr

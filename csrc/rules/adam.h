// Adam (arXiv 1412.6980), AMSGrad (Reddi et al. 2018) and, with decoupled weight decay, AdamW
// (arXiv 1711.05101), in the order of torch.optim.Adam(foreach=False). For each element, in the
// update that is its parameter's t-th:
//   m = m + (1 - beta1) * (g - m), as torch.lerp takes it
//   v = fma((1 - beta2) * g, g, v * beta2)
//   n = max(n, v) with amsgrad, else v
//   p = p + (-lr / (1 - beta1 ** t) * m) / (sqrt(n) / sqrt(1 - beta2 ** t) + eps)
// The roots of n are rounded correctly. Of PyTorch's, where it takes them from MKL (builds for
// x86; on some CPUs only of more than a few dozen elements), some are one unit in the last place
// off: of float32 0.7 % with one CPU, 17 % with another.
#pragma once

#include "moments.h"

namespace fastlr {

struct Adam : RuleDefaults {
  static constexpr const char* kName = "adam";
  static constexpr int kResidentBlocks = 2;

  enum { kLr, kBeta1, kBeta2, kWeightDecay, kEps, kAmsgrad, kMaximize, kDecoupled };
  static constexpr Option kOptions[] = {
      {"lr", false, kNotNegative},
      {"beta1", false, kBelowOne, "", "betas", 0},
      {"beta2", false, kBelowOne, "", "betas", 1},
      {"weight_decay", false, kNotNegative},
      {"eps", false, kNotNegative},
      {"amsgrad", true, kAnyNumber},
      {"maximize", true, kAnyNumber},
      {"decoupled_weight_decay", true, kAnyNumber},
  };
  static constexpr int kScheduled = 4;

  enum { kFirst, kSecond, kLargest, kSlotCount };
  static constexpr const char* kSlots[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr uint32_t kLiveSets[] = {0b011, 0b111};  // that live_slots() returns

  FASTLR_HD_MEMBER static uint32_t live_slots(const Options& options, uint32_t) {
    return 1u << kFirst | 1u << kSecond | (options[kAmsgrad] != 0.0 ? 1u << kLargest : 0u);
  }

  FASTLR_HD_MEMBER static bool decouples(const Options& options) {
    return options[kDecoupled] != 0.0;
  }

  template <typename T>
  struct Scalars {
    Average<T> first;
    SquareAverage<T> second;
    T neg_step_size;
    T root_correction;
    T eps;
  };

  template <typename T>
  FASTLR_HD_MEMBER static Scalars<T> scalars(const Options& options, int64_t age) {
    const double correction1 = 1.0 - power(options[kBeta1], age + 1);
    const double correction2 = 1.0 - power(options[kBeta2], age + 1);
    Scalars<T> s;
    s.first = average<T>(options[kBeta1]);
    s.second = square_average<T>(options[kBeta2]);
    s.neg_step_size = static_cast<T>(-(options[kLr] / correction1));
    s.root_correction = static_cast<T>(root(correction2));
    s.eps = static_cast<T>(options[kEps]);
    return s;
  }

  template <typename T>
  static T rate(const Scalars<T>& s) {
    return s.neg_step_size;
  }

  template <typename T>
  FASTLR_HD_INLINED void update(const Scalars<T>& s, uint32_t live, T& p, T g,
                                T (&slots)[kSlotCount]) {
    const T m = slots[kFirst] = s.first.moved(slots[kFirst], g);
    const T v = slots[kSecond] = s.second.moved(slots[kSecond], g);
    const T n = is_live(live, kLargest) ? slots[kLargest] = larger(slots[kLargest], v) : v;
    p = p + s.neg_step_size * m / (square_root(n) / s.root_correction + s.eps);
  }
};

}  // namespace fastlr

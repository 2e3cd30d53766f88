// Adadelta (Zeiler, arXiv 1212.5701), in the order of torch.optim.Adadelta(foreach=False). For each
// element:
//   v = fma((1 - rho) * g, g, v * rho)
//   d = sqrt(a + eps) / sqrt(v + eps) * g
//   a = fma((1 - rho) * d, d, a * rho)
//   p = fma(d, -lr, p)
#pragma once

#include "moments.h"

namespace fastlr {

struct Adadelta : RuleDefaults {
  static constexpr const char* kName = "adadelta";
  static constexpr int kResidentBlocks = 2;

  enum { kLr, kRho, kWeightDecay, kEps, kMaximize };
  static constexpr Option kOptions[] = {
      {"lr", false, kNotNegative},
      {"rho", false, kUpToOne, "; above 1 the averages of squares grow without bound"},
      {"weight_decay", false, kNotNegative},
      {"eps", false, kNotNegative},
      {"maximize", true, kAnyNumber},
  };
  static constexpr int kScheduled = 3;

  enum { kSquares, kDeltas, kSlotCount };
  static constexpr const char* kSlots[] = {"square_avg", "acc_delta"};
  static constexpr uint32_t kLiveSets[] = {0b11};  // that live_slots() returns

  FASTLR_HD_MEMBER static uint32_t live_slots(const Options&, uint32_t) {
    return 1u << kSquares | 1u << kDeltas;
  }

  template <typename T>
  struct Scalars {
    SquareAverage<T> average;
    T neg_lr;
    T eps;
  };

  template <typename T>
  FASTLR_HD_MEMBER static Scalars<T> scalars(const Options& options, int64_t) {
    return {square_average<T>(options[kRho]), static_cast<T>(-options[kLr]),
            static_cast<T>(options[kEps])};
  }

  template <typename T>
  FASTLR_HD_INLINED void update(const Scalars<T>& s, uint32_t, T& p, T g, T (&slots)[kSlotCount]) {
    const T v = slots[kSquares] = s.average.moved(slots[kSquares], g);
    const T d = square_root(slots[kDeltas] + s.eps) / square_root(v + s.eps) * g;
    slots[kDeltas] = s.average.moved(slots[kDeltas], d);
    p = fused_multiply_add(d, s.neg_lr, p);
  }
};

}  // namespace fastlr

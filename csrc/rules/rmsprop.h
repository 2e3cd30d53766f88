// RMSprop (Hinton, lecture 6e of "Neural Networks for Machine Learning", 2012), centered as in
// Graves (arXiv 1308.0850), in the order of torch.optim.RMSprop(foreach=False). For each element:
//   v = fma((1 - alpha) * g, g, v * alpha)
//   a = a + (1 - alpha) * (g - a) with centered, as torch.lerp takes it
//   d = sqrt(centered ? fma(-a, a, v) : v) + eps
//   without momentum  p = p + (-lr * g) / d
//   with it           b = b * momentum + g / d;  p = fma(b, -lr, p)
#pragma once

#include "moments.h"

namespace fastlr {

struct Rmsprop : RuleDefaults {
  static constexpr const char* kName = "rmsprop";
  static constexpr int kResidentBlocks = 2;

  enum { kLr, kAlpha, kMomentum, kWeightDecay, kEps, kCentered, kMaximize };
  static constexpr Option kOptions[] = {
      {"lr", false, kNotNegative},
      {"alpha", false, kUpToOne, "; above 1 the average of squares grows without bound"},
      {"momentum", false, kBelowOne,
       "; from 1 on gradients are never forgotten and the buffer grows without bound"},
      {"weight_decay", false, kNotNegative},
      {"eps", false, kNotNegative},
      {"centered", true, kAnyNumber},
      {"maximize", true, kAnyNumber},
  };
  static constexpr int kScheduled = 4;

  enum { kSquares, kBuffer, kMean, kSlotCount };
  static constexpr const char* kSlots[] = {"square_avg", "momentum_buffer", "grad_avg"};
  static constexpr uint32_t kLiveSets[] = {0b001, 0b011, 0b101,
                                           0b111};  // that live_slots() returns

  FASTLR_HD_MEMBER static uint32_t live_slots(const Options& options, uint32_t driven) {
    const bool has_momentum = options[kMomentum] != 0.0 || (driven >> kMomentum & 1u) != 0;
    return 1u << kSquares | (has_momentum ? 1u << kBuffer : 0u) |
           (options[kCentered] != 0.0 ? 1u << kMean : 0u);
  }

  template <typename T>
  struct Scalars {
    SquareAverage<T> squares;
    Average<T> mean;
    T neg_lr;
    T momentum;
    T eps;
  };

  template <typename T>
  FASTLR_HD_MEMBER static Scalars<T> scalars(const Options& options, int64_t) {
    Scalars<T> s;
    s.squares = square_average<T>(options[kAlpha]);
    s.mean = average<T>(options[kAlpha]);
    s.neg_lr = static_cast<T>(-options[kLr]);
    s.momentum = static_cast<T>(options[kMomentum]);
    s.eps = static_cast<T>(options[kEps]);
    return s;
  }

  template <typename T>
  FASTLR_HD_INLINED void update(const Scalars<T>& s, uint32_t live, T& p, T g,
                                T (&slots)[kSlotCount]) {
    const T v = slots[kSquares] = s.squares.moved(slots[kSquares], g);
    T variance = v;
    if (is_live(live, kMean)) {
      const T a = slots[kMean] = s.mean.moved(slots[kMean], g);
      variance = fused_multiply_add(-a, a, v);
    }
    const T d = square_root(variance) + s.eps;
    if (is_live(live, kBuffer)) {
      const T b = slots[kBuffer] = slots[kBuffer] * s.momentum + g / d;
      p = fused_multiply_add(b, s.neg_lr, p);
    } else {
      p = p + s.neg_lr * g / d;
    }
  }
};

}  // namespace fastlr

// An element's whole life in a step: what every rule has around it, and the loop over elements in
// their compute type.
#pragma once

#include <stdint.h>

#include <new>
#include <type_traits>

#include "numeric.h"
#include "rule.h"

namespace fastlr {

// What happens to a gradient and a parameter before the rule sees them.
//
// Factors of 1 and -1 change no bit, so that they need no branch; a weight decay of zero would, as
// it turns an infinite parameter into a NaN.
template <typename T>
struct Around {
  T of_gradient;  // 1 / GradScaler's scale, rounded to float32 as torch's unscale_ does, times what
                  // clips the norm; negative with maximize
  T of_parameter;  // 1, less lr * weight_decay where that is decoupled
  T weight_decay;  // where it is coupled: added to the gradient, times the parameter
  bool coupled;
  bool plain;     // nothing happens to either
  uint32_t live;  // a bit for each slot that the update reads and writes
};

// For the updates of a group's parameters of one age; derived values are formed in double, then
// rounded.
template <typename R, typename T>
struct Scalars {
  Around<T> around;
  typename R::template Scalars<T> rule;
};

template <typename R, typename T>
FASTLR_HD Scalars<R, T> scalars(const Options& options, int64_t age, double factor) {
  const double decay = options[R::kWeightDecay];
  const bool decouples = R::decouples(options);
  Scalars<R, T> s;
  s.around.of_gradient = static_cast<T>(factor);
  if (options[R::kMaximize] != 0.0) s.around.of_gradient = -s.around.of_gradient;
  s.around.of_parameter = decouples ? static_cast<T>(1.0 - options[R::kLr] * decay) : T(1);
  s.around.coupled = decay != 0.0 && !decouples;
  s.around.weight_decay = static_cast<T>(decay);
  s.around.plain =
      !s.around.coupled && s.around.of_gradient == T(1) && s.around.of_parameter == T(1);
  s.around.live = R::live_slots(options, 0);
  s.rule = R::template scalars<T>(options, age);
  return s;
}

// In both compute types.
template <typename R>
struct GroupScalars {
  Scalars<R, float> in_float;
  Scalars<R, double> in_double;

  FASTLR_HD_MEMBER const Scalars<R, float>& in(float) const { return in_float; }
  FASTLR_HD_MEMBER const Scalars<R, double>& in(double) const { return in_double; }
};

template <typename R>
FASTLR_HD void form_scalars(const Options& options, int64_t age, double factor, AnyScalars& out) {
  static_assert(sizeof(GroupScalars<R>) <= sizeof out.bytes, "room for the rule's scalars");
  static_assert(std::is_trivially_copyable<GroupScalars<R>>::value, "copied as bytes");
  new (out.bytes) GroupScalars<R>{scalars<R, float>(options, age, factor),
                                  scalars<R, double>(options, age, factor)};
}

template <typename R, typename T>
bool in_range(const Options& options, int64_t age) {
  for (int i = 0; i < kOptionCount<R>; ++i) {
    if (!isfinite(static_cast<T>(options[i]))) return false;
  }
  const Scalars<R, T> s = scalars<R, T>(options, age, 1.0f);
  return isfinite(s.around.of_parameter) && isfinite(R::rate(s.rule));
}

template <typename R>
bool in_range(const Options& options, int64_t age, bool in_double) {
  return in_double ? in_range<R, double>(options, age) : in_range<R, float>(options, age);
}

template <typename R>
FASTLR_HD const GroupScalars<R>& as(const AnyScalars& scalars) {
  return *reinterpret_cast<const GroupScalars<R>*>(scalars.bytes);
}
template <typename R>
FASTLR_HD GroupScalars<R>& as(AnyScalars& scalars) {
  return *reinterpret_cast<GroupScalars<R>*>(scalars.bytes);
}

// One element: reads the gradient, updates the parameter and its state. live, plain, coupled: those
// of the scalars, as constants where a loop is made for them. What is called not plain may be;
// slots that are not live are nothing to read or to keep.
template <typename R, typename T>
FASTLR_HD_INLINED void update_element(const Scalars<R, T>& s, uint32_t live, bool plain,
                                      bool coupled, T& p, T g, T (&slots)[R::kSlotCount]) {
  if (!plain) {
    g = g * s.around.of_gradient;
    if (coupled) {
      g = fused_multiply_add(s.around.weight_decay, p, g);
    } else {  // to multiply by 1 as well costs up to a tenth of a step through main memory
      p = p * s.around.of_parameter;
    }
  }
  R::update(s.rule, live, p, g, slots);
}

}  // namespace fastlr

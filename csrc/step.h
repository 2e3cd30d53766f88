// An element's whole life in a step: what every rule has around it, and the loop over elements in
// their compute type.
#pragma once

#include <stdint.h>

#include <new>
#include <type_traits>

#include "numeric.h"
#include "rule.h"
#include "stages.h"

namespace fastlr {

// What happens to a gradient and a parameter before the rule sees them.
//
// Factors of 1 and -1 change no bit, so that they need no branch; a weight decay of zero would, as
// it turns an infinite parameter into a NaN.
template <typename T>
struct Around {
  T of_gradient;  // 1 / GradScaler's scale, rounded to float32 as torch's unscale_ does, times what
                  // clips the norm; negative with maximize
  T of_parameter;  // 1, less lr * weight_decay where that is decoupled ...
  T of_opposed;    // ... and of one that the rule moves away from zero, which may be spared that
  T weight_decay;  // where it is coupled: added to the gradient, times the parameter
  T bound;         // of a gradient with the scale that it brings along, or infinity
  bool coupled;
  bool plain;     // nothing happens to either
  bool staged;    // there is a bound, or opposed parameters are spared
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
FASTLR_HD Scalars<R, T> scalars(const Options& options, int64_t age, const Unscaling& unscaling) {
  const double* const of_stages = options.value + kRuleOptionCount<R>;
  const double decay = options[R::kWeightDecay];
  const bool decouples = R::decouples(options);
  const bool spares = of_stages[kCautious] != 0.0;
  Scalars<R, T> s;
  s.around.of_gradient = static_cast<T>(unscaling.factor);
  if (options[R::kMaximize] != 0.0) s.around.of_gradient = -s.around.of_gradient;
  s.around.of_parameter = decouples ? static_cast<T>(1.0 - options[R::kLr] * decay) : T(1);
  s.around.of_opposed = spares ? T(1) : s.around.of_parameter;
  s.around.bound =
      static_cast<T>(max_value_of(of_stages)) / static_cast<T>(unscaling.inverse_scale);
  s.around.staged = s.around.bound < static_cast<T>(INFINITY) || spares;
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
FASTLR_HD void form_scalars(const Options& options, int64_t age, const Unscaling& unscaling,
                            AnyScalars& out) {
  static_assert(sizeof(GroupScalars<R>) <= sizeof out.bytes, "room for the rule's scalars");
  static_assert(std::is_trivially_copyable<GroupScalars<R>>::value, "copied as bytes");
  new (out.bytes) GroupScalars<R>{scalars<R, float>(options, age, unscaling),
                                  scalars<R, double>(options, age, unscaling)};
}

template <typename R, typename T>
bool in_range(const Options& options, int64_t age) {
  for (int i = 0; i < kOptionCount<R>; ++i) {
    if (!isfinite(static_cast<T>(options[i]))) return false;
  }
  const Scalars<R, T> s = scalars<R, T>(options, age, Unscaling{});
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

// How far a parameter lies on the way that the rule is about to move it, which is the way of what
// it would make of a zero: above 0 where that is away from zero.
template <typename R, typename T>
FASTLR_HD_INLINED T ahead(const Scalars<R, T>& s, uint32_t live, T p, T g,
                          const T (&slots)[R::kSlotCount]) {
  T way = T(0);
  T copies[R::kSlotCount];
  for (int k = 0; k < R::kSlotCount; ++k) copies[k] = slots[k];
  R::update(s.rule, live, way, g, copies);
  return way > T(0) ? p : way < T(0) ? -p : T(0);
}

// What a loop over elements is made for. What is not called plain may be so, and what clips or
// spares need not; slots that are not live are nothing to read or to keep.
struct Form {
  uint32_t live;
  bool plain;
  bool coupled;
  bool clips;
  bool spares;
};

// One element: reads the gradient, updates the parameter and its state.
template <typename R, typename T>
FASTLR_HD_INLINED void update_element(const Scalars<R, T>& s, const Form& form, T& p, T g,
                                      T (&slots)[R::kSlotCount]) {
  if (form.clips) g = clipped(g, s.around.bound);
  if (!form.plain) {
    g = g * s.around.of_gradient;
    if (form.coupled) {
      g = fused_multiply_add(s.around.weight_decay, p, g);
    } else if (form.spares) {
      const bool opposed = ahead(s, form.live, p, g, slots) > T(0);
      p = p * (opposed ? s.around.of_opposed : s.around.of_parameter);
    } else {  // to multiply by 1 as well costs up to a tenth of a step through main memory
      p = p * s.around.of_parameter;
    }
  }
  R::update(s.rule, form.live, p, g, slots);
}

}  // namespace fastlr

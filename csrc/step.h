// The loop that applies an update rule to elements in their compute type.
#pragma once

#include "rules/sgd.h"
#include "schedule.h"
#include "tensors.h"

namespace fastlr {

// A group's scalars in both compute types.
struct GroupScalars {
  SgdScalars<float> in_float;
  SgdScalars<double> in_double;
};

FASTLR_HD const SgdScalars<float>& scalars_of(const GroupScalars& group, float) {
  return group.in_float;
}
FASTLR_HD const SgdScalars<double>& scalars_of(const GroupScalars& group, double) {
  return group.in_double;
}

// n elements of a parameter, its gradient and its momentum. `m` is left alone without momentum and
// may then be null. Iterations are independent even where p and g are the same memory.
template <typename T>
FASTLR_HD void update_chunk(const SgdScalars<T>& rule, bool first, T* p, const T* g, T* m,
                            int64_t n) {
  const SgdScalars<T> s = rule;
  if (s.has_momentum && !first) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) sgd_update(s, false, p[i], g[i], m[i]);
  } else if (s.has_momentum) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) sgd_update(s, true, p[i], g[i], m[i]);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      T unused = 0;
      sgd_update(s, false, p[i], g[i], unused);
    }
  }
}

}  // namespace fastlr

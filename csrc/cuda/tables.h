// What a step on a CUDA device works on: tables in device memory, read by kernels and written by
// the host, and the clocks, which the device itself moves.
#pragma once

#include "../schedule.h"
#include "../step.h"
#include "../tensors.h"

namespace fastlr {

// One parameter with its state, of which a norm needs nothing. Gradients change most often and
// travel in the kernel's arguments.
struct DeviceTensor {
  void* param;
  void* slot[kMaxSlots];  // nullptr where it is never live
  float* age;             // see NOTE: [age]; nullptr without state
  int64_t numel;
  int64_t first_chunk;   // counted from the launch's first tensor
  int64_t first_square;  // of its chunks' sums of squares, counted through the step's tensors
  int32_t group;
  int32_t layout;       // index of its StridedLayout, or -1
  int32_t leads_group;  // whether its age is what the group's scalars are formed for
  int32_t place;        // among the optimizer's parameters
  int64_t first;        // of its elements, in the whole parameter
  StorageType ema_type;
  Keeping kept;
  double max_value;  // what its gradient is clipped to where the launch has no groups
};
static_assert(std::is_trivially_copyable<DeviceTensor>::value, "uploaded as bytes");

// The schedule of one hyperparameter, or count == 0: it is the number in `options`.
struct DeviceSchedule {
  const Segment* segments;
  const double* table;
  int64_t count;
  int64_t start;  // clock at which the schedule's zero lies
  int64_t end;
  bool in_samples;
};

struct DeviceGroup {
  Options options;
  DeviceSchedule schedule[kMaxOptions];
};
static_assert(std::is_trivially_copyable<DeviceGroup>::value, "uploaded as bytes");

// A group's clock, and what its next update uses: evaluated once, so that blocks only load it.
struct GroupClock {
  int64_t updates;
  int64_t samples;
  Options options;   // of the next update; not in registers, where an index needs a stack
  AnyScalars next;   // for parameters ...
  int64_t age;       // ... of this age
  int64_t next_age;  // for which the next ones are to be formed
  GroupStages stages;
  bool past_end[kMaxOptions];  // an update was applied after this schedule's end
};
static_assert(std::is_trivially_copyable<GroupClock>::value, "uploaded as bytes");

// One a device.
struct DeviceState {
  int32_t groups;
  uint32_t ticket;        // blocks of the running launch that are done
  float last_skipped;     // 1 where the last step changed nothing because of found_inf ...
  int32_t invalid_scale;  // ... or since the last reset, because grad_scale has no usable inverse
  int32_t nonfinite;      // since the last reset, a norm that was to be clipped was inf or NaN
  int32_t norm_measured;  // whether the last step measured its gradients ...
  double squared_norm;    // ... and then what, NaN where it was skipped
  // What a step multiplies gradients with where it clips their norm; see clipping_factor().
  float factor_in_float;
  double factor_in_double;

  FASTLR_HD_MEMBER float factor(float) const { return factor_in_float; }
  FASTLR_HD_MEMBER double factor(double) const { return factor_in_double; }
  FASTLR_HD_MEMBER void set_factor(double factor) {
    factor_in_float = static_cast<float>(factor);
    factor_in_double = factor;
  }
};

// What both kinds of launches need to find and move the clocks.
struct Clocks {
  DeviceState* state;
  const DeviceGroup* groups;
  GroupClock* clocks;
  float* found_inf;  // the update is skipped where this is not zero; may be nullptr
};

// What a launch works on, but for the gradients.
struct StepHead {
  Clocks clocks;
  const DeviceTensor* tensors;  // in device memory, as what follows
  const StridedLayout* layouts;
  const float* grad_scale;  // GradScaler's scale, or nullptr
  double* squares;          // sums over the chunks of all launches, or nullptr: not measured
  int64_t step_chunks;      // how many these are
  int64_t chunks;           // of this launch
  double max_norm;          // where a norm is measured before the update: what it is clipped to
  bool seeks_inf;           // and then found_inf becomes 1 where it is inf or NaN
  int32_t count;            // tensors
  bool clips;               // a step multiplies gradients with the factor in DeviceState
  bool norm_known;          // a step's norm is there: it was measured before
  bool of_shares;           // a norm is more than this launch's: end_norm_kernel() says what it is
  bool ends_step;           // the last launch of a step on this device moves its clocks
};

// What there is of each share; see NOTE: [shares].
struct Shares {
  const double* squares;          // sums over the chunks of all launches
  double* sums;                   // one a share
  int64_t begin[kMaxShares + 2];  // of each one's chunks, and the end of the last one's
  int32_t count;                  // share 0 included
};

// Ages that make no difference to a rule are one.
template <typename R>
FASTLR_HD int64_t told_apart(int64_t age) {
  return R::kCountsSteps || age == 0 ? age : 1;
}

// Evaluates an option of a group's next update, when its clock is about to move on.
FASTLR_HD void evaluate_option(const DeviceGroup& group, GroupClock& clock, int option,
                               int64_t updates, int64_t samples) {
  double value = group.options.value[option];
  if (group.schedule[option].count != 0) {
    const DeviceSchedule& schedule = group.schedule[option];
    const int64_t before = (schedule.in_samples ? clock.samples : clock.updates) - schedule.start;
    if (updates != 0 && before > schedule.end) clock.past_end[option] = true;
    value = value_at(schedule.segments, schedule.count, schedule.table,
                     before + (schedule.in_samples ? samples : updates));
  }
  clock.options.value[option] = value;
}

}  // namespace fastlr

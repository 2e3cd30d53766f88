// The optimizer's parameter groups as Python keeps them: hyperparameters, schedules and clocks.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "rules/sgd.h"
#include "schedule.h"

namespace fastlr {

// A schedule in the form that value_at() reads.
struct NativeSchedule {
  std::vector<Segment> segments;
  std::vector<double> table;
  int64_t end;      // the clock at which its last value is reached, or kEndless
  bool in_samples;  // which clock it follows: samples, or updates
};

// The value at a clock >= 0, computed in the default floating-point environment.
double schedule_value(const NativeSchedule& schedule, int64_t clock);

// Finds the NativeSchedule behind the object that a Python schedule keeps as `_native`, or nullptr.
using NativeOf = const NativeSchedule* (*)(PyObject * native);

// A group's hyperparameters for the next update. Throws std::invalid_argument for a value out of
// range, and std::runtime_error where something else wrote a value that a schedule owns.
SgdOptions read_group(PyObject* group, Py_ssize_t index, NativeOf native_of);

// Moves every group's clock and writes what its schedules say at the new one.
void advance_groups(PyObject* groups, int64_t updates, int64_t samples, NativeOf native_of);

}  // namespace fastlr

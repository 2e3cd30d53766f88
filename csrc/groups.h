// The optimizer's parameter groups as Python keeps them: hyperparameters, schedules and clocks.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "owned.h"
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

// Where a group stands.
struct Clock {
  int64_t updates;
  int64_t samples;
};
Clock read_clock(PyObject* group);

// The schedule that drives one hyperparameter of a group, and where on it the group stands. All
// pointers are nullptr where the hyperparameter is a plain number, and borrowed from the group.
struct Driven {
  PyObject* owner = nullptr;
  PyObject* native = nullptr;
  const NativeSchedule* schedule = nullptr;
  int64_t start = 0;
  int64_t clock = 0;  // since start
};

struct GroupReading {
  SgdOptions options;  // for the next update
  Driven lr;
  Driven momentum;
  Clock clock;
};

// Throws std::invalid_argument for a value out of range, and std::runtime_error where something
// else wrote a value that a schedule owns.
GroupReading read_group(PyObject* group, Py_ssize_t index, NativeOf native_of);

// All of them, which must be dicts in a list.
std::vector<GroupReading> read_groups(PyObject* groups, NativeOf native_of);

// Warns, once each, that schedules of a group have ended before its clock. frames: from the warning
// up to the user's call.
void warn_past_end(PyObject* group, NativeOf native_of, int frames);

// Clocks that groups are about to stand at, with what their schedules say there. Everything is made
// and checked before write(), which allocates nothing and lets no Python code run: the groups move
// all together, and what goes with them is safe from errors and Ctrl-C.
class GroupMoves {
 public:
  void add(PyObject* group, const Clock& clock, NativeOf native_of);
  void write() const;

 private:
  struct Entry {
    Owned group;
    PyObject* key;  // one that the group has
    Owned value;
  };
  void add_scheduled(PyObject* group, PyObject* key, PyObject* schedule_key, PyObject* start_key,
                     const Clock& clock, NativeOf native_of);

  std::vector<Entry> entries_;
};

// Sets a group's clock and what its schedules say at it. A group that stands there already is left
// as it is, with whatever else was written into it: the next step says so.
void move_to(PyObject* group, const Clock& clock, NativeOf native_of);

// All groups' moves on from where they stand.
GroupMoves moves_on(PyObject* groups, int64_t updates, int64_t samples, NativeOf native_of);

// Updates every group by a dict of its own, all of them at once. The keys are strings that the
// groups have, so that nothing can fail halfway.
void update_groups(PyObject* groups, PyObject* changes);

}  // namespace fastlr

// The optimizer's parameter groups as Python keeps them: hyperparameters, schedules and clocks.
#pragma once

#include <Python.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "owned.h"
#include "rule.h"
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
  Options options;  // for the next update
  Driven driven[kMaxScheduled];
  uint32_t driven_options;  // a bit for each that has an owner
  uint32_t large_options;   // a bit for each beyond kLargeOption
  Clock clock;
};

// What is about to be written into groups. Everything is made and checked before write(), which
// allocates nothing and lets no Python code run: the groups move all together, and what goes with
// them is safe from errors and Ctrl-C.
class GroupMoves {
 public:
  // key: one that the group has.
  void add(PyObject* group, PyObject* key, Owned value) {
    entries_.push_back({Owned::borrow(group), key, std::move(value)});
  }
  // What is to be written there, borrowed, or nullptr.
  PyObject* last(PyObject* group, PyObject* key) const;
  void write() const;

 private:
  struct Entry {
    Owned group;
    PyObject* key;
    Owned value;
  };

  std::vector<Entry> entries_;
};

// Reads and writes the parameter groups of an optimizer of one rule.
class Groups {
 public:
  // Names that constructors have for keys of a group, and the keys: a group has none of them.
  using OtherNames = std::map<std::string, std::string>;

  Groups(const Rule& rule, NativeOf native_of, const OtherNames& other_names);

  const Rule& rule() const { return rule_; }

  // Throws std::invalid_argument for options out of range or in conflict. where: " of parameter
  // group 0", for messages.
  void check(const Options& options, const std::string& where) const;

  // "lr=1e+39 of parameter group 0": what of a group is beyond kLargeOption.
  std::string large_options(const GroupReading& group, Py_ssize_t index) const;

  // Throws as check() does, and std::runtime_error where something else wrote a value that a
  // schedule owns.
  GroupReading read(PyObject* group, Py_ssize_t index) const;
  // All of them, which must be dicts in a list.
  std::vector<GroupReading> read(PyObject* groups) const;

  // Throws std::runtime_error where something else wrote a value that a schedule owns, but for some
  // options: a bit for each.
  void check_owned(PyObject* group, Py_ssize_t index, uint32_t but_for) const;

  // Warns, once each, that schedules of a group have ended before its clock. frames: from the
  // warning up to the user's call.
  void warn_past_end(PyObject* group, int frames) const;

  // Sets a group's clock and what its schedules say at it. A group that stands there already is
  // left as it is, with whatever else was written into it: the next step says so.
  void move_to(PyObject* group, const Clock& clock) const;

  // All groups' moves on from where they stand: their clocks, with what their schedules say there.
  GroupMoves moves_on(PyObject* groups, int64_t updates, int64_t samples) const;

 private:
  // Keys of an option in a group's dict, made once: looking up an interned string is a pointer
  // comparison.
  struct Keys {
    PyObject* name;
    PyObject* value;  // the name, or that of the tuple
    PyObject* schedule;
    PyObject* start;
  };

  void refuse_other_names(PyObject* group, Py_ssize_t index) const;
  PyObject* value_of(PyObject* group, Py_ssize_t index, int option) const;
  double read_scheduled(PyObject* group, Py_ssize_t index, int option, const Driven& driven) const;
  // clock: where the group stands, or is about to.
  Driven driven_by(PyObject* group, const Keys& keys, const Clock& clock) const;
  void add_move(GroupMoves& moves, PyObject* group, const Clock& clock) const;

  const Rule& rule_;
  NativeOf native_of_;
  std::vector<Keys> keys_;  // one an option
  std::vector<std::pair<PyObject*, std::string>> other_names_;
};

// Updates every group by a dict of its own, all of them at once. The keys are strings that the
// groups have, so that nothing can fail halfway.
void update_groups(PyObject* groups, PyObject* changes);

}  // namespace fastlr

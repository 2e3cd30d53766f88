// All that the core knows of an update rule.
#pragma once

#include <math.h>
#include <stdint.h>

#include <string>

#include "host_device.h"

namespace fastlr {

constexpr int kMaxOptions = 8;
constexpr int kMaxScheduled = 4;

// A group's hyperparameters for one update, in the order of its rule's options; flags are 0 or 1.
struct Options {
  double value[kMaxOptions];

  FASTLR_HD_MEMBER double operator[](int option) const { return value[option]; }
};

// Where a number may lie. An infinite bound still asks for a finite number.
struct Range {
  double low;
  double high;
  bool without_low;
  bool without_high;

  bool bounds(double x) const {
    return (without_low ? x > low : x >= low) && (without_high ? x < high : x <= high);
  }
  bool holds(double x) const { return isfinite(x) && bounds(x); }
  std::string text() const;  // "in [0, 1)", "finite and >= 0"
};
constexpr Range kAnyNumber{-INFINITY, INFINITY, false, false};
constexpr Range kNotNegative{0.0, INFINITY, false, false};
constexpr Range kBelowOne{0.0, 1.0, false, true};

struct Option {
  const char* name;
  bool flag;
  Range range;         // of a number
  const char* reason;  // of the upper bound, or ""; follows the value that is beyond it
};

// Two options that do not go together.
struct Conflict {
  int option;            // the one to change, or -1: there is none
  const char* expected;  // "> 0 with nesterov=True"
};

// NOTE: [rules]
// The core loops over options; what they are called, where they lie and what they do, only the
// rule's own header in rules/ knows, and its Python class. Those that a schedule may drive come
// first.
struct Rule {
  const char* name;
  const Option* option;
  int options;
  int scheduled;            // how many of them a schedule may drive
  const char* const* slot;  // what its state is called, as torch's optimizers call it
  int slots;
  Conflict (*conflict)(const Options& options);
  // A bit for each slot of state that an update with these options reads or writes, or may do so at
  // another clock of the schedules. driven: a bit for each option that one drives.
  uint32_t (*live_slots)(const Options& options, uint32_t driven);
};

// The rule of this name, or nullptr.
const Rule* find_rule(const std::string& name);

}  // namespace fastlr

// All that the core knows of an update rule.
#pragma once

#include <math.h>
#include <stdint.h>

#include <string>
#include <vector>

#include "host_device.h"

namespace fastlr {

constexpr int kMaxOptions = 16;
constexpr int kMaxRuleSlots = 3;

// NOTE: [stages]
// What an update does besides its rule, for every rule alike: options, which follow the rule's own
// in a group's Options, and where there is state of its own a slot, at the same place whatever the
// rule. What it costs, only tensors pay that ask for it: see TensorRef::staged.
enum { kEmaSlot = kMaxRuleSlots, kMasterSlot, kMaxSlots };
constexpr uint32_t kRuleSlots = (1u << kMaxRuleSlots) - 1;  // a bit for each

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
constexpr Range kPositive{0.0, INFINITY, true, false};
constexpr Range kBelowOne{0.0, 1.0, false, true};
constexpr Range kUpToOne{0.0, 1.0, false, false};

struct Option {
  const char* name;
  bool flag;
  Range range;                  // of a number
  const char* reason = "";      // of the upper bound; follows the value that is beyond it
  const char* tuple = nullptr;  // the group's tuple that it stands in ...
  int place = 0;                // ... and where
  bool scheduled = false;       // whether a schedule may drive it
  double if_none = NAN;         // what None stands for; NaN: it must be a number

  bool may_be_none() const { return if_none == if_none; }
};

// The options of stages, in their order behind a rule's own. An average that never moves is none;
// zero, to which no gradient may be clipped, stands for no bound.
enum {
  kEmaDecay,
  kEmaWarmup,
  kMaxGradValue,
  kCautious,
  kMasterWeights,
  kStochasticRounding,
  kRoundingSeed,
  kStageOptionCount
};
constexpr Option kStageOptions[] = {
    {"ema_decay", false, kBelowOne, "", nullptr, 0, true, 1.0},
    {"ema_warmup", true, kAnyNumber},
    {"max_grad_value", false, kPositive, "", nullptr, 0, false, 0.0},
    {"cautious", true, kAnyNumber},
    {"master_weights", true, kAnyNumber},
    {"stochastic_rounding", true, kAnyNumber},
    {"rounding_seed", false, {0.0, 4294967295.0, false, false}},
};
static_assert(sizeof kStageOptions / sizeof kStageOptions[0] == kStageOptionCount, "one each");

// Two options that do not go together.
struct Conflict {
  int option;            // the one to change, or -1: there is none
  const char* expected;  // "> 0 with nesterov=True"
};

// What gradients bring along.
struct Unscaling {
  double factor = 1.0;  // they are multiplied with it: 1 / scale, times what clips their norm
  float inverse_scale = 1.0f;  // 1 / GradScaler's scale
};

// A group's scalars as a rule forms them: a GroupScalars of step.h, of which only the rule's own
// kernels know more than the size.
struct AnyScalars {
  alignas(8) unsigned char bytes[208];
};

// Of the rule's own options, which are also where those of stages begin, and of all.
template <typename R>
constexpr int kRuleOptionCount = sizeof R::kOptions / sizeof R::kOptions[0];
template <typename R>
constexpr int kOptionCount = kRuleOptionCount<R> + kStageOptionCount;

constexpr FASTLR_HD_MEMBER bool is_live(uint32_t live, int slot) {
  return (live >> slot & 1u) != 0;
}

// NOTE: [rules]
// The core loops over options and slots; what they are called, where they lie and what they do,
// only the rule's own header in rules/ knows, and its Python class. Of its own options those that a
// schedule may drive come first.
//
// NOTE: [age]
// How many applied updates a parameter's state has seen, 0 for none: torch's "step". Scalars follow
// from a group's options and an age. The state of a rule that does not count keeps none on the
// host: there it is 0 without a tensor in each live slot and 1 with them.
struct Rule {
  const char* name;
  int index;  // in the list of rules
  const Option* option;
  int options;
  int rule_options;  // of these the rule's own; those of stages follow
  const char*
      slot[kMaxSlots];     // what its state is called, as torch's optimizers call it, or nullptr
  uint32_t always_live;    // a bit for each slot that every update reads and writes
  bool counts_steps;       // torch's optimizer has a "step" in its state
  bool starts_with_state;  // torch's has it before the first update, and so have files
  Conflict (*conflict)(const Options& options);
  // A bit for each slot of state that an update with these options reads or writes, or may do so at
  // another clock of the schedules. driven: a bit for each option that one drives.
  uint32_t (*live_slots)(const Options& options, uint32_t driven);
  // What every element of new state is.
  double (*initial_state)(const Options& options);
  // For the next update of a parameter of this age. unscaling: of its gradient.
  void (*scalars)(const Options& options, int64_t age, const Unscaling& unscaling, AnyScalars& out);
  // Whether the options, and what follows from them at an age, are finite in the compute type. They
  // are as long as no option is larger than kLargeOption.
  bool (*in_range)(const Options& options, int64_t age, bool in_double);
};

// Below the square root of the largest float32.
constexpr double kLargeOption = 1e19;

// What a rule has that says nothing else.
struct RuleDefaults {
  static constexpr bool kCountsSteps = true;
  static constexpr bool kStartsWithState = false;
  static constexpr int kResidentBlocks = 3;  // see NOTE: [registers] in cuda/kernels.cuh
  static Conflict conflict(const Options&) { return {-1, nullptr}; }
  static double initial_state(const Options&) { return 0.0; }
  // Whether weight decay shrinks the parameter instead of adding to the gradient.
  FASTLR_HD_MEMBER static bool decouples(const Options&) { return false; }
  // The scalar with which an update grows.
  template <typename S>
  static auto rate(const S& scalars) {
    return scalars.neg_lr;
  }
};

// The rule of this name, or nullptr.
const Rule* find_rule(const std::string& name);
// What other rules' state is called that this one's is not.
std::vector<std::string> slots_of_other_rules(const Rule& rule);

}  // namespace fastlr

// What the core is told of each rule.
#include "rules.h"

#include <set>

#include "rule.h"
#include "step.h"

namespace fastlr {
namespace {

template <typename R>
constexpr uint32_t always_live() {
  uint32_t live = ~0u;
  for (const uint32_t set : R::kLiveSets) live &= set;
  return live;
}

// A rule's own options and those of stages.
template <typename R>
struct AllOptions {
  Option option[kOptionCount<R>];
};
template <typename R>
constexpr AllOptions<R> all_options() {
  AllOptions<R> all{};
  for (int i = 0; i < kRuleOptionCount<R>; ++i) {
    all.option[i] = R::kOptions[i];
    all.option[i].scheduled = i < R::kScheduled;
  }
  for (int i = 0; i < kStageOptionCount; ++i) {
    all.option[kRuleOptionCount<R> + i] = kStageOptions[i];
  }
  return all;
}
template <typename R>
constexpr AllOptions<R> kAllOptions = all_options<R>();

template <typename R>
uint32_t live_slots(const Options& options, uint32_t driven) {
  constexpr int kDecay = kRuleOptionCount<R> + kEmaDecay;
  const bool averages = options[kDecay] < 1.0 || (driven >> kDecay & 1u) != 0;
  const bool masters = options[kRuleOptionCount<R> + kMasterWeights] != 0.0;
  return R::live_slots(options, driven) | (averages ? 1u << kEmaSlot : 0u) |
         (masters ? 1u << kMasterSlot : 0u);
}

template <typename R>
Conflict conflict(const Options& options) {
  const Conflict of_rule = R::conflict(options);
  if (of_rule.option >= 0) return of_rule;
  constexpr int kFirst = kRuleOptionCount<R>;
  if (options[kFirst + kMasterWeights] != 0.0 && options[kFirst + kStochasticRounding] != 0.0) {
    return {kFirst + kStochasticRounding,
            "False with master_weights=True, of which rounding loses nothing"};
  }
  if (options[kFirst + kCautious] != 0.0 && !R::decouples(options)) {
    return {kFirst + kCautious,
            "False where weight decay is added to the gradient; it needs an optimizer that decays "
            "decoupled, as with decoupled_weight_decay=True"};
  }
  return {-1, nullptr};
}

template <typename R>
constexpr Rule rule_of(int index) {
  static_assert(kOptionCount<R> <= kMaxOptions, "room for its options");
  static_assert(sizeof R::kSlots / sizeof R::kSlots[0] == R::kSlotCount, "a name for each slot");
  static_assert(R::kSlotCount <= kMaxRuleSlots, "room for its slots");
  Rule rule{R::kName,
            index,
            kAllOptions<R>.option,
            kOptionCount<R>,
            kRuleOptionCount<R>,
            {},
            always_live<R>(),
            R::kCountsSteps,
            R::kStartsWithState,
            &conflict<R>,
            &live_slots<R>,
            &R::initial_state,
            &form_scalars<R>,
            &in_range<R>};
  for (int k = 0; k < R::kSlotCount; ++k) rule.slot[k] = R::kSlots[k];
  rule.slot[kEmaSlot] = "ema";
  rule.slot[kMasterSlot] = "master";
  return rule;
}

enum {
#define FASTLR_INDEX(rule) kIndexOf##rule,
  FASTLR_FOR_EACH_RULE(FASTLR_INDEX)
#undef FASTLR_INDEX
};

constexpr Rule kRules[] = {
#define FASTLR_RULE(rule) rule_of<rule>(kIndexOf##rule),
    FASTLR_FOR_EACH_RULE(FASTLR_RULE)
#undef FASTLR_RULE
};

std::string bound(double value) {
  std::string text = std::to_string(value);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  return text;
}

}  // namespace

std::string Range::text() const {
  if (isinf(high)) {
    if (isinf(low)) return "finite";
    return std::string("finite and ") + (without_low ? "> " : ">= ") + bound(low);
  }
  return std::string("in ") + (without_low ? "(" : "[") + bound(low) + ", " + bound(high) +
         (without_high ? ")" : "]");
}

const Rule* find_rule(const std::string& name) {
  for (const Rule& rule : kRules) {
    if (name == rule.name) return &rule;
  }
  return nullptr;
}

std::vector<std::string> slots_of_other_rules(const Rule& rule) {
  std::set<std::string> names;
  for (const Rule& other : kRules) {
    for (const char* const name : other.slot) {
      if (name != nullptr) names.insert(name);
    }
  }
  for (const char* const name : rule.slot) {
    if (name != nullptr) names.erase(name);
  }
  return {names.begin(), names.end()};
}

}  // namespace fastlr

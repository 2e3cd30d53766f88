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

template <typename R>
constexpr Rule rule_of(int index) {
  static_assert(kOptionCount<R> <= kMaxOptions && R::kScheduled <= kMaxScheduled,
                "room for its options");
  static_assert(sizeof R::kSlots / sizeof R::kSlots[0] == R::kSlotCount, "a name for each slot");
  static_assert(R::kSlotCount <= kMaxSlots, "room for its slots");
  return {R::kName,     index,          R::kOptions,       kOptionCount<R>,  R::kScheduled,
          R::kSlots,    R::kSlotCount,  always_live<R>(),  R::kCountsSteps,  R::kStartsWithState,
          &R::conflict, &R::live_slots, &R::initial_state, &form_scalars<R>, &in_range<R>};
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
  for (const Rule& other : kRules) names.insert(other.slot, other.slot + other.slots);
  for (int k = 0; k < rule.slots; ++k) names.erase(rule.slot[k]);
  return {names.begin(), names.end()};
}

const Rule& any_rule() { return kRules[0]; }

}  // namespace fastlr

// The update rules that there are.
#include "rule.h"
#include "rules/sgd.h"

namespace fastlr {
namespace {

template <typename R>
constexpr Rule rule_of() {
  constexpr int kOptions = sizeof R::kOptions / sizeof R::kOptions[0];
  static_assert(kOptions <= kMaxOptions && R::kScheduled <= kMaxScheduled, "room for its options");
  constexpr int kSlots = sizeof R::kSlots / sizeof R::kSlots[0];
  return {R::kName,  R::kOptions, kOptions,     R::kScheduled,
          R::kSlots, kSlots,      &R::conflict, &R::live_slots};
}

constexpr Rule kRules[] = {
    rule_of<Sgd>(),
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

}  // namespace fastlr

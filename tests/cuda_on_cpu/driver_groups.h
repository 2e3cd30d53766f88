// Parameter groups with schedules, and what these say by the plain formulas of their documentation.
#pragma once

#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "native/cases.h"
#include "schedule.h"

namespace fastlr {

struct Scheduled {
  std::vector<Segment> segments;
  std::vector<double> table;
  int64_t start = 0;
  int64_t end = kEndless;
  bool in_samples = false;
  std::function<double(int64_t)> value;  // by the clock since `start`
};

inline Segment segment(Curve curve) {
  Segment s{};
  s.curve = curve;
  s.tick = s.period = s.count = 1;
  s.factor = 1.0;
  s.limit = kEndless;
  return s;
}

// PyTorch's CyclicLR.
inline Scheduled cycle(double base, double top, int64_t up, int64_t down, Decay decay,
                       double gamma = 0) {
  Scheduled s;
  Segment rise_and_fall = segment(Curve::kCycle);
  rise_and_fall.decay = decay;
  rise_and_fall.start = base;
  rise_and_fall.end = top;
  rise_and_fall.up = static_cast<double>(up);
  rise_and_fall.span = static_cast<double>(up + down);
  rise_and_fall.gamma = gamma;
  s.segments = {rise_and_fall};
  s.value = [=](int64_t clock) {
    const double e = static_cast<double>(clock), total = static_cast<double>(up + down);
    const double ratio = static_cast<double>(up) / total;
    const double number = std::floor(1 + e / total);
    const double x = 1 + e / total - number;
    const double part = x <= ratio ? x / ratio : (x - 1) / (ratio - 1);
    const double scale = decay == Decay::kHalving  ? 1 / std::pow(2.0, number - 1)
                         : decay == Decay::kHeight ? std::pow(gamma, e)
                                                   : 1.0;
    return base + (top - base) * part * scale;
  };
  return s;
}

inline Scheduled tabulated(const std::vector<double>& values) {
  Scheduled s;
  Segment all = segment(Curve::kTable);
  s.end = all.limit = static_cast<int64_t>(values.size()) - 1;
  s.segments = {all};
  s.table = values;
  s.value = [=](int64_t clock) { return values[static_cast<size_t>(std::min(clock, s.end))]; };
  return s;
}

// Two segments: a line, then a constant.
inline Scheduled line_of_samples(double from, double to, int64_t steps) {
  Scheduled s;
  Segment line = segment(Curve::kLine), rest = segment(Curve::kConstant);
  line.start = from;
  line.end = to;
  line.span = static_cast<double>(steps);
  line.limit = steps;
  rest.begin = rest.origin = steps;
  rest.start = to;
  s.segments = {line, rest};
  s.end = steps;
  s.in_samples = true;
  s.value = [=](int64_t clock) {
    const double part = static_cast<double>(clock) / static_cast<double>(steps);
    return clock >= steps ? to : (to - from) * part + from;
  };
  return s;
}

// A parameter group of a rule, and where it stands.
struct Group {
  const Rule* rule;
  Values options;
  std::map<std::string, Scheduled> driven;  // the options that a schedule drives
  int64_t updates = 0;
  int64_t samples = 0;
  int64_t age = 0;  // of the leader's state, for which the scalars are formed when the clock moves
  bool past_end = false;

  Group(const Rule& rule, const Values& options) : rule(&rule), options(options) {}

  // Lets a schedule drive an option from a clock on, at which the group then stands.
  Group& drive(const std::string& option, Scheduled schedule, int64_t start = 0) {
    schedule.start = start;
    if (start != 0) updates = age = start;
    driven[option] = std::move(schedule);
    return *this;
  }

  int64_t local(const Scheduled& s) const { return (s.in_samples ? samples : updates) - s.start; }
  // The slots that are live at some clock.
  uint32_t slots(const Reference& reference) const {
    Values ever = options;
    for (const auto& entry : driven) ever[entry.first] = 0.5;
    return live_slots(reference, ever);
  }
  Values now() const {
    Values now = options;
    for (const auto& [option, schedule] : driven) now[option] = schedule.value(local(schedule));
    return now;
  }
  void move(int64_t more_updates, int64_t more_samples) {
    for (const auto& entry : driven) {
      if (more_updates != 0 && local(entry.second) > entry.second.end) past_end = true;
    }
    updates += more_updates;
    samples += more_samples;
  }
};

constexpr unsigned kGroupsOfTensors = 9;

// Groups of each of the reference's options, some of them driven by schedules, and more groups than
// a block has threads, whose clocks move all the same.
inline std::vector<Group> make_groups(const Rule& rule, const Reference& reference) {
  std::vector<Group> groups;
  for (size_t i = 0; i < kGroupsOfTensors; ++i)
    groups.emplace_back(rule, reference.options[i % reference.options.size()]);
  groups[1].drive("lr", cycle(0.01, 0.1, 3, 2, Decay::kHalving));             // triangular2
  groups[2].drive("lr", cycle(0.001, 0.03, 2, 2, Decay::kHeight, 0.9), 997);  // exp_range
  groups[4].drive("lr", tabulated({0.1, 0.05, 0.025}));                       // which ends
  groups[5].drive("lr", line_of_samples(0.1, 0.01, 300));
  // The rule's others: cycled, and through zero to an end.
  for (int k = 1; k < rule.options; ++k) {
    if (!rule.option[k].scheduled) continue;
    const std::string option = rule.option[k].name;
    groups[2].drive(option, cycle(0.95, 0.85, 2, 2, Decay::kNone), 997);
    groups[4].drive(option, tabulated({0.0, 0.5, 0.0, 0.9}));
  }
  while (groups.size() < 300) {
    groups.emplace_back(rule, reference.options[0]);
    groups.back().options["lr"] = static_cast<double>(groups.size());
  }
  return groups;
}

}  // namespace fastlr

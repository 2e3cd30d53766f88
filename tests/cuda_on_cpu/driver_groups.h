// Parameter groups with schedules, and what these say by the plain formulas of their documentation.
#pragma once

#include <cmath>
#include <functional>
#include <utility>
#include <vector>

#include "native/cases.h"
#include "schedule.h"

namespace fastlr {

struct Scheduled {
  std::vector<Segment> segments;  // empty: a number
  std::vector<double> table;
  int64_t start = 0;
  int64_t end = kEndless;
  bool in_samples = false;
  std::function<double(int64_t)> value;  // by the clock since `start`
};

inline Scheduled number(double value) {
  Scheduled s;
  s.value = [=](int64_t) { return value; };
  return s;
}

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

// A parameter group, and where it stands.
struct Group {
  SgdOptions options;
  Scheduled lr;
  Scheduled momentum;
  int64_t updates = 0;
  int64_t samples = 0;
  bool past_end = false;

  Group(const SgdOptions& options)
      : options(options), lr(number(options.lr)), momentum(number(options.momentum)) {}
  Group(const SgdOptions& options, Scheduled lr, int64_t start)
      : options(options), lr(std::move(lr)), momentum(number(options.momentum)) {
    this->lr.start = start;
    updates = start;
  }

  int64_t local(const Scheduled& s) const { return (s.in_samples ? samples : updates) - s.start; }
  bool ended(const Scheduled& s) const { return !s.segments.empty() && local(s) > s.end; }
  bool has_buffers() const { return !momentum.segments.empty() || options.momentum != 0; }
  SgdOptions now() const {
    SgdOptions now = options;
    now.lr = lr.value(local(lr));
    now.momentum = momentum.value(local(momentum));
    return now;
  }
  void move(int64_t more_updates, int64_t more_samples) {
    if (more_updates != 0 && (ended(lr) || ended(momentum))) past_end = true;
    updates += more_updates;
    samples += more_samples;
  }
};

inline std::vector<Group> make_groups() {
  // lr, momentum, dampening, weight_decay, nesterov, maximize
  std::vector<Group> groups;
  groups.emplace_back(SgdOptions{0.1, 0.0, 0.0, 0.01, false, false});  // without momentum
  groups.emplace_back(SgdOptions{0, 0.9, 0.0, 5e-4, true, false},
                      cycle(0.01, 0.1, 3, 2, Decay::kHalving), 0);  // triangular2
  groups.emplace_back(SgdOptions{0, 0, 0.0, 0.0, false, false},
                      cycle(0.001, 0.03, 2, 2, Decay::kHeight, 0.9), 997);  // exp_range, and
  groups.back().momentum = cycle(0.95, 0.85, 2, 2, Decay::kNone);           // cycled momentum
  groups.back().momentum.start = 997;
  groups.emplace_back(SgdOptions{0.03, 0.9, 0.1, 5e-4, false, true});
  groups.emplace_back(SgdOptions{0, 0, 0.5, 0.0, false, false}, tabulated({0.1, 0.05, 0.025}), 0);
  groups.back().momentum = tabulated({0.0, 0.5, 0.0, 0.9});  // through zero, and both end
  groups.emplace_back(SgdOptions{0, 0.5, 0.0, 0.1, true, true}, line_of_samples(0.1, 0.01, 300), 0);
  // More groups than a block has threads, whose clocks move all the same.
  while (groups.size() < 300)
    groups.emplace_back(SgdOptions{static_cast<double>(groups.size()), 0, 0, 0, false, false});
  return groups;
}
constexpr unsigned kGroupsOfTensors = 6;

}  // namespace fastlr

#include "device_plan.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <utility>

namespace fastlr {
namespace {

bool same(const Options& a, const Options& b) {
  return std::equal(std::begin(a.value), std::end(a.value), std::begin(b.value));
}

// What the device must be told: the numbers that no schedule owns.
Options unscheduled(const GroupReading& group) {
  Options options = group.options;
  for (int i = 0; i < kMaxOptions; ++i) {
    if (group.driven[i].owner != nullptr) options.value[i] = 0.0;
  }
  return options;
}

}  // namespace

size_t DevicePlan::state_bytes(size_t capacity) {
  return sizeof(DeviceState) + capacity * (sizeof(GroupClock) + sizeof(DeviceGroup));
}

Clocks DevicePlan::clocks(const Table& table, size_t capacity, float* found_inf) {
  char* const data = table.data();
  return {reinterpret_cast<DeviceState*>(data),
          reinterpret_cast<const DeviceGroup*>(data + sizeof(DeviceState) +
                                               capacity * sizeof(GroupClock)),
          reinterpret_cast<GroupClock*>(data + sizeof(DeviceState)), found_inf};
}

Clocks DevicePlan::clocks(float* found_inf) const { return clocks(state_, capacity_, found_inf); }

// The stages that are kernels' own and no slot tells of: a bit for each.
uint32_t DevicePlan::stages(const GroupReading& group) const {
  const double* const option = group.options.value + rule_.rule_options;
  uint32_t stages = 0;
  for (const int stage : {kMaxGradValue, kCautious, kMasterWeights, kStochasticRounding}) {
    stages |= (option[stage] != 0.0 ? 1u : 0u) << stage;
  }
  return stages;
}

void DevicePlan::check_groups(const std::vector<GroupReading>& groups) const {
  for (size_t i = 0; i < std::min(groups.size(), seen_.size()); ++i) {
    const uint32_t live = rule_.live_slots(groups[i].options, groups[i].driven_options);
    for (int slot = 0; slot < kMaxSlots; ++slot) {
      if ((live & seen_[i].slots_not_in_graph) >> slot & 1u) {
        throw std::runtime_error("parameter group " + std::to_string(i) + " now needs a " +
                                 rule_.slot[slot] +
                                 ", but a CUDA graph captured its step without one; capture the "
                                 "graph anew with a new optimizer.");
      }
    }
    const uint32_t now = stages(groups[i]), captured = seen_[i].stages_in_graph.value_or(now);
    for (int stage = 0; stage < kStageOptionCount; ++stage) {
      if (((now ^ captured) >> stage & 1u) == 0) continue;
      throw std::runtime_error(
          "a CUDA graph captured the step of parameter group " + std::to_string(i) +
          ((captured >> stage & 1u) != 0 ? " with " : " without ") + kStageOptions[stage].name +
          ", which cannot change any more; capture the graph anew with a new optimizer.");
    }
  }
  if (captured_ && groups.size() > capacity_) {
    throw std::runtime_error("a CUDA graph has captured this optimizer's step with room for " +
                             std::to_string(capacity_) +
                             " parameter groups; add parameter groups before the capture.");
  }
}

// What has changed since `seen_`.
DevicePlan::Changes DevicePlan::changes(const std::vector<GroupReading>& groups) const {
  Changes changes{};
  if (seen_.size() != groups.size()) return {true, true, true};
  for (size_t i = 0; i < groups.size(); ++i) {
    const GroupReading& group = groups[i];
    const Seen& seen = seen_[i];
    changes.clocks = changes.clocks || group.clock.updates != seen.clock.updates ||
                     group.clock.samples != seen.clock.samples;
    changes.numbers = changes.numbers || !same(unscheduled(group), seen.options);
    for (int k = 0; k < kMaxOptions; ++k) {
      const Driven& driven = group.driven[k];
      changes.schedules = changes.schedules || driven.native != seen.native[k].get();
      changes.numbers = changes.numbers || driven.start != seen.start[k];
    }
  }
  changes.numbers = changes.numbers || changes.schedules;
  return changes;
}

// A table of the groups' schedules: the segments of all, then the values of all their tables.
DevicePlan::Schedules DevicePlan::upload_schedules(const DeviceScope& scope,
                                                   const std::vector<GroupReading>& groups) {
  std::vector<Segment> segments;
  std::vector<double> values;
  for (const GroupReading& group : groups) {
    for (const Driven& driven : group.driven) {
      if (driven.schedule == nullptr) continue;
      const NativeSchedule& schedule = *driven.schedule;
      segments.insert(segments.end(), schedule.segments.begin(), schedule.segments.end());
      values.insert(values.end(), schedule.table.begin(), schedule.table.end());
    }
  }
  Schedules schedules;
  if (segments.empty()) return schedules;
  schedules.values_at = segments.size() * sizeof(Segment);
  const size_t value_bytes = values.size() * sizeof(double);
  schedules.table = Table(scope, schedules.values_at + value_bytes);
  schedules.table.write(scope, 0, segments.data(), schedules.values_at);
  if (value_bytes != 0) {
    schedules.table.write(scope, schedules.values_at, values.data(), value_bytes);
  }
  return schedules;
}

// The groups' table entries, with schedules as upload_schedules() has placed them.
std::vector<DeviceGroup> DevicePlan::entries(const std::vector<GroupReading>& groups,
                                             const Schedules& schedules) {
  const char* const data = schedules.table.data();
  const Segment* segments_at = reinterpret_cast<const Segment*>(data);
  const double* values_at = reinterpret_cast<const double*>(data + schedules.values_at);
  std::vector<DeviceGroup> entries;
  for (const GroupReading& group : groups) {
    DeviceGroup entry{};
    entry.options = unscheduled(group);
    for (int k = 0; k < kMaxOptions; ++k) {
      const Driven& driven = group.driven[k];
      if (driven.schedule == nullptr) continue;
      DeviceSchedule& placed = entry.schedule[k];
      placed.segments = segments_at;
      placed.table = values_at;
      placed.count = static_cast<int64_t>(driven.schedule->segments.size());
      placed.start = driven.start;
      placed.end = driven.schedule->end;
      placed.in_samples = driven.schedule->in_samples;
      segments_at += driven.schedule->segments.size();
      values_at += driven.schedule->table.size();
    }
    entries.push_back(entry);
  }
  return entries;
}

std::vector<DevicePlan::Seen> DevicePlan::seen_of(const std::vector<GroupReading>& groups) const {
  std::vector<Seen> seen(groups.size());
  for (size_t i = 0; i < groups.size(); ++i) {
    seen[i].options = unscheduled(groups[i]);
    for (int k = 0; k < kMaxOptions; ++k) {
      seen[i].native[k] = Owned::borrow(groups[i].driven[k].native);
      seen[i].start[k] = groups[i].driven[k].start;
    }
    seen[i].clock = groups[i].clock;
    seen[i].live_slots = rule_.live_slots(groups[i].options, groups[i].driven_options);
    seen[i].stages = stages(groups[i]);
    if (i >= seen_.size()) continue;
    seen[i].slots_not_in_graph = seen_[i].slots_not_in_graph;
    seen[i].stages_in_graph = seen_[i].stages_in_graph;
  }
  return seen;
}

// Whatever needs memory, or lets Python code run, comes before the first write to a table that is
// in use: where it fails, the device goes on as before.
void DevicePlan::set_groups(const DeviceScope& scope, const std::vector<GroupReading>& groups,
                            bool force) {
  const Changes changed = changes(groups);
  if (!force && !changed.clocks && !changed.numbers) return;
  scope.refuse_capture("a schedule, hyperparameter or clock has changed");
  check_groups(groups);

  const bool grows = groups.size() > capacity_;
  DeviceState state{};
  Table grown;
  size_t capacity = capacity_;
  if (grows) {
    cuda::preload(scope.device(), rule_);
    if (ready()) state = read(scope, false, false).state;
    // Room for many: what a graph has captured cannot move to a larger table.
    capacity = std::max<size_t>(64, 2 * groups.size());
    grown = Table(scope, state_bytes(capacity));
  }
  state.groups = static_cast<int32_t>(groups.size());
  Schedules replaced;
  if (changed.schedules) replaced = upload_schedules(scope, groups);
  Schedules& schedules = changed.schedules ? replaced : schedules_;
  std::vector<DeviceGroup> entries_there;
  if (changed.numbers || grows) entries_there = entries(groups, schedules);
  std::vector<GroupClock> clocks_there;
  if (force || changed.clocks || grows) {
    clocks_there.resize(groups.size());
    for (size_t i = 0; i < groups.size(); ++i) {
      clocks_there[i].updates = groups[i].clock.updates;
      clocks_there[i].samples = groups[i].clock.samples;
      clocks_there[i].next_age = groups[i].clock.updates;  // most often; the next step finds out
    }
  }
  std::vector<Seen> seen = seen_of(groups);
  const bool writes_state = grows || !ready();
  Table& table = grows ? grown : state_;
  table.used_by(scope);
  if (schedules.table) schedules.table.used_by(scope);
  if (changed.schedules || grows) table.hold("schedules", schedules.table);

  const Clocks to = clocks(table, capacity, nullptr);
  const auto write = [&](const void* at, const void* from, size_t bytes) {
    table.write_at_once(scope, static_cast<const char*>(at) - table.data(), from, bytes);
  };
  if (!entries_there.empty()) {
    write(to.groups, entries_there.data(), entries_there.size() * sizeof(DeviceGroup));
  }
  if (writes_state) {
    write(to.state, &state, sizeof state);
  } else if (groups.size() != seen_.size()) {
    write(&to.state->groups, &state.groups, sizeof state.groups);
  }
  if (!clocks_there.empty()) {
    write(to.clocks, clocks_there.data(), clocks_there.size() * sizeof(GroupClock));
  }
  cuda::launch_clock(scope.device(), scope.stream(), rule_, to, 0, 0, false);
  if (grows) state_ = std::move(grown);
  if (changed.schedules) schedules_ = std::move(replaced);
  capacity_ = capacity;
  seen_ = std::move(seen);
}

void DevicePlan::prepare(const DeviceScope& scope, const std::vector<TensorRef>& tensors,
                         const std::vector<StridedLayout>& layouts, bool in_order,
                         bool measures_norm, std::optional<NormPass> norm_pass) {
  norm_pass_ = norm_pass;
  measures_norm_ = measures_norm || norm_pass;
  if (norm_pass) cuda::preload_norm(scope.device());
  if (norm_pass && norm_pass->share_count != 0 && !share_sums_) {
    scope.refuse_capture("the norm of distributed gradients was not measured before");
    share_sums_ = Table(scope, (1 + kMaxShares) * sizeof(double));
  }
  launches_ = tensors_.update(scope, tensors, layouts, in_order, measures_norm_);
  const bool staged = std::any_of(launches_.begin(), launches_.end(),
                                  [](const cuda::Launch& launch) { return launch.staged; });
  if (staged) cuda::preload(scope.device(), rule_, true);
}

void DevicePlan::launch_norm(const DeviceScope& scope, float* found_inf, const float* grad_scale) {
  for (cuda::Launch& launch : launches_) {
    launch.head.clocks = clocks(found_inf);
    launch.head.grad_scale = grad_scale;
    launch.head.max_norm = norm_pass_->max_norm;
    launch.head.seeks_inf = norm_pass_->seeks_inf;
    launch.head.clips = norm_pass_->decides();
    launch.head.of_shares = norm_pass_->share_count != 0;
    cuda::launch_norm(scope.device(), scope.stream(), launch);
  }
}

// Here and in the other processes, in the stream's order; the host waits for nothing.
void DevicePlan::end_norm_of_shares(const DeviceScope& scope) {
  Shares shares = tensors_.shares();
  shares.sums = reinterpret_cast<double*>(share_sums_.data());
  shares.count = 1 + norm_pass_->share_count;
  cuda::launch_shares(scope.device(), scope.stream(), shares);
  checked(PyObject_CallMethod(scope.runtime(), "add_up_shares_in", "OO", norm_pass_->shares,
                              share_sums_.tensor()));
  cuda::launch_end_norm(scope.device(), scope.stream(), launches_.back().head, shares.sums,
                        shares.count);
}

void DevicePlan::launch(const DeviceScope& scope, float* found_inf, const float* grad_scale,
                        std::optional<double> factor, int64_t samples, GraphObjects graph) {
  tensors_.used(scope);
  if (scope.capturing()) {
    for (Seen& seen : seen_) {
      seen.slots_not_in_graph |= ~seen.live_slots;
      seen.stages_in_graph = seen.stages;
    }
    tensors_.captured_in(graph);
    graph.add(share_sums_);
  }
  use_clocks(scope, std::move(graph));
  if (factor) {
    DeviceState state{};
    state.set_factor(*factor);
    constexpr size_t kBegin = offsetof(DeviceState, factor_in_float);
    state_.write_at_once(scope, kBegin, &state.factor_in_float, sizeof state - kBegin);
  }
  if (norm_pass_) {
    if (share_sums_) share_sums_.used_by(scope);
    {
      const WithoutGil waiting_for_room_in_the_stream;
      launch_norm(scope, found_inf, grad_scale);
    }
    if (norm_pass_->share_count != 0) end_norm_of_shares(scope);
  }
  const WithoutGil waiting_for_room_in_the_stream;  // and no Python code from here on
  for (cuda::Launch& launch : launches_) {
    launch.head.clocks = clocks(found_inf);
    launch.head.grad_scale = grad_scale;
    launch.head.clips = factor || (norm_pass_ && norm_pass_->decides());
    launch.head.norm_known = factor || norm_pass_;
    if (norm_pass_) launch.head.squares = nullptr;
    cuda::launch_step(scope.device(), scope.stream(), rule_, launch);
  }
  if (launches_.empty()) launch_clock(scope, 1, 0, found_inf);
  if (samples != 0) launch_clock(scope, 0, samples, nullptr);
}

// To be called before each launch.
void DevicePlan::use_clocks(const DeviceScope& scope, GraphObjects graph) {
  state_.used_by(scope);
  if (schedules_.table) schedules_.table.used_by(scope);
  if (!scope.capturing()) return;
  captured_ = true;
  graph.add(state_);
  graph.keep(scope);
}

void DevicePlan::launch_clock(const DeviceScope& scope, int64_t updates, int64_t samples,
                              float* found_inf) {
  cuda::launch_clock(scope.device(), scope.stream(), rule_, clocks(found_inf), updates, samples,
                     measures_norm_);
}

void DevicePlan::advance_samples(const DeviceScope& scope, int64_t samples) {
  use_clocks(scope, {});
  launch_clock(scope, 0, samples, nullptr);
}

void DevicePlan::agree(size_t group, const Clock& clock) {
  if (group < seen_.size()) seen_[group].clock = clock;
}

Owned DevicePlan::last_skipped(PyObject* runtime) const {
  return checked(PyObject_CallMethod(runtime, "float_at", "On", state_.tensor(),
                                     static_cast<Py_ssize_t>(offsetof(DeviceState, last_skipped))));
}

DevicePlan::Reading DevicePlan::read(const DeviceScope& scope, bool reset, bool others_run) {
  Reading reading;
  reading.clocks.resize(seen_.size());
  const size_t clock_bytes = reading.clocks.size() * sizeof(GroupClock);
  std::vector<char> image(sizeof(DeviceState) + clock_bytes);
  download(scope, image.data(), state_.data(), image.size(), others_run);
  std::memcpy(&reading.state, image.data(), sizeof(DeviceState));
  std::memcpy(reading.clocks.data(), image.data() + sizeof(DeviceState), clock_bytes);
  const int32_t none = 0;
  if (reset && reading.state.invalid_scale != 0) {
    state_.write(scope, offsetof(DeviceState, invalid_scale), &none, sizeof none);
  }
  if (reset && reading.state.nonfinite != 0) {
    state_.write(scope, offsetof(DeviceState, nonfinite), &none, sizeof none);
  }
  return reading;
}

}  // namespace fastlr

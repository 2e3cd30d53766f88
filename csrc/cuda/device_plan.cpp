#include "device_plan.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace fastlr {
namespace {

bool same(const SgdOptions& a, const SgdOptions& b) {
  return a.lr == b.lr && a.momentum == b.momentum && a.dampening == b.dampening &&
         a.weight_decay == b.weight_decay && a.nesterov == b.nesterov && a.maximize == b.maximize;
}

// What the device must be told: the numbers that no schedule owns.
SgdOptions unscheduled(const GroupReading& group) {
  SgdOptions options = group.options;
  if (group.lr.owner != nullptr) options.lr = 0.0;
  if (group.momentum.owner != nullptr) options.momentum = 0.0;
  return options;
}

bool may_have_momentum(const GroupReading& group) {
  return group.momentum.owner != nullptr || group.options.momentum != 0.0;
}

}  // namespace

Clocks DevicePlan::clocks(const float* found_inf) const {
  char* const data = state_.data();
  return {reinterpret_cast<DeviceState*>(data),
          reinterpret_cast<const DeviceGroup*>(data + sizeof(DeviceState) +
                                               capacity_ * sizeof(GroupClock)),
          reinterpret_cast<GroupClock*>(data + sizeof(DeviceState)), found_inf};
}

void DevicePlan::check_groups(const std::vector<GroupReading>& groups) const {
  for (size_t i = 0; i < std::min(groups.size(), seen_.size()); ++i) {
    if (may_have_momentum(groups[i]) && seen_[i].lacks_momentum_in_graph) {
      throw std::runtime_error("parameter group " + std::to_string(i) +
                               " got a momentum, but a CUDA graph captured its step without one, "
                               "so that it has no momentum buffers; capture the graph anew with a "
                               "new optimizer.");
    }
  }
  if (captured_ && groups.size() > capacity_) {
    throw std::runtime_error("a CUDA graph has captured this optimizer's step with room for " +
                             std::to_string(capacity_) +
                             " parameter groups; add parameter groups before the capture.");
  }
}

void DevicePlan::set_groups(const DeviceScope& scope, const std::vector<GroupReading>& groups,
                            bool force) {
  const bool clocks_changed = force || seen_.size() != groups.size() ||
                              !std::equal(groups.begin(), groups.end(), seen_.begin(),
                                          [](const GroupReading& group, const Seen& seen) {
                                            return group.clock.updates == seen.clock.updates &&
                                                   group.clock.samples == seen.clock.samples;
                                          });
  const bool schedules_changed = seen_.size() != groups.size() ||
                                 !std::equal(groups.begin(), groups.end(), seen_.begin(),
                                             [](const GroupReading& group, const Seen& seen) {
                                               return group.lr.native == seen.lr.get() &&
                                                      group.momentum.native == seen.momentum.get();
                                             });
  const bool numbers_changed =
      schedules_changed || !std::equal(groups.begin(), groups.end(), seen_.begin(),
                                       [](const GroupReading& group, const Seen& seen) {
                                         return same(unscheduled(group), seen.options) &&
                                                group.lr.start == seen.lr_start &&
                                                group.momentum.start == seen.momentum_start;
                                       });
  if (!clocks_changed && !numbers_changed) return;
  scope.refuse_capture("a schedule, hyperparameter or clock has changed");
  check_groups(groups);

  const bool grows = groups.size() > capacity_;
  DeviceState state{};
  if (grows) {
    cuda::preload(scope.device());
    if (ready()) state = read(scope, false).state;
    // Room for many: what a graph has captured cannot move to a larger table.
    capacity_ = std::max<size_t>(64, 2 * groups.size());
    state_ =
        Table(scope, sizeof(DeviceState) + capacity_ * (sizeof(GroupClock) + sizeof(DeviceGroup)));
  }
  state_.used_by(scope);
  const Clocks to = clocks(nullptr);
  const auto write = [&](const void* at, const void* from, size_t bytes) {
    state_.write(scope, static_cast<const char*>(at) - state_.data(), from, bytes);
  };

  if (schedules_changed) {
    size_t segments = 0, values = 0;
    for (const GroupReading& group : groups) {
      for (const Driven* driven : {&group.lr, &group.momentum}) {
        if (driven->schedule == nullptr) continue;
        segments += driven->schedule->segments.size();
        values += driven->schedule->table.size();
      }
    }
    schedules_ = Table();
    const size_t bytes = segments * sizeof(Segment) + values * sizeof(double);
    if (bytes != 0) {
      schedules_ = Table(scope, bytes);
      std::vector<char> image(bytes);
      size_t segments_at = 0, values_at = segments * sizeof(Segment);
      for (const GroupReading& group : groups) {
        for (const Driven* driven : {&group.lr, &group.momentum}) {
          if (driven->schedule == nullptr) continue;
          const NativeSchedule& schedule = *driven->schedule;
          const size_t segment_bytes = schedule.segments.size() * sizeof(Segment);
          const size_t value_bytes = schedule.table.size() * sizeof(double);
          std::memcpy(image.data() + segments_at, schedule.segments.data(), segment_bytes);
          if (value_bytes != 0) {
            std::memcpy(image.data() + values_at, schedule.table.data(), value_bytes);
          }
          segments_at += segment_bytes;
          values_at += value_bytes;
        }
      }
      schedules_.write(scope, 0, image.data(), bytes);
    }
  }
  if (schedules_) schedules_.used_by(scope);
  if (schedules_changed || grows) state_.hold("schedules", schedules_);

  if (numbers_changed || grows) {
    size_t segments = 0;
    for (const GroupReading& group : groups) {
      for (const Driven* driven : {&group.lr, &group.momentum}) {
        if (driven->schedule != nullptr) segments += driven->schedule->segments.size();
      }
    }
    const Segment* segments_at = reinterpret_cast<const Segment*>(schedules_.data());
    const double* values_at = reinterpret_cast<const double*>(segments_at + segments);
    const auto place = [&](const Driven& driven) {
      DeviceSchedule placed{};
      if (driven.schedule == nullptr) return placed;
      placed.segments = segments_at;
      placed.table = values_at;
      placed.count = static_cast<int64_t>(driven.schedule->segments.size());
      placed.start = driven.start;
      placed.end = driven.schedule->end;
      placed.in_samples = driven.schedule->in_samples;
      segments_at += driven.schedule->segments.size();
      values_at += driven.schedule->table.size();
      return placed;
    };
    std::vector<DeviceGroup> entries;
    for (const GroupReading& group : groups) {
      DeviceGroup entry{};
      entry.options = unscheduled(group);
      entry.lr = place(group.lr);
      entry.momentum = place(group.momentum);
      entries.push_back(entry);
    }
    write(to.groups, entries.data(), entries.size() * sizeof(DeviceGroup));
  }
  state.groups = static_cast<int32_t>(groups.size());
  if (grows || !ready()) {
    write(to.state, &state, sizeof state);
  } else if (groups.size() != seen_.size()) {
    write(&to.state->groups, &state.groups, sizeof state.groups);
  }
  if (clocks_changed || grows) {
    std::vector<GroupClock> entries(groups.size());
    for (size_t i = 0; i < groups.size(); ++i) {
      entries[i].updates = groups[i].clock.updates;
      entries[i].samples = groups[i].clock.samples;
    }
    write(to.clocks, entries.data(), entries.size() * sizeof(GroupClock));
  }
  cuda::launch_clock(scope.device(), scope.stream(), to, 0, 0, false);

  std::vector<Seen> seen(groups.size());
  for (size_t i = 0; i < groups.size(); ++i) {
    const bool lacks_momentum = i < seen_.size() && seen_[i].lacks_momentum_in_graph;
    seen[i] = {unscheduled(groups[i]),
               Owned::borrow(groups[i].lr.native),
               Owned::borrow(groups[i].momentum.native),
               groups[i].lr.start,
               groups[i].momentum.start,
               groups[i].clock,
               lacks_momentum};
  }
  seen_ = std::move(seen);
}

void DevicePlan::prepare(const DeviceScope& scope, const std::vector<DeviceWork>& work,
                         const std::vector<StridedLayout>& layouts, bool in_order,
                         bool measures_norm) {
  measures_norm_ = measures_norm;
  launches_ = tensors_.update(scope, work, layouts, in_order, measures_norm);
}

void DevicePlan::launch(const DeviceScope& scope, const float* found_inf, const float* grad_scale,
                        GraphObjects graph) {
  tensors_.used(scope);
  if (scope.capturing()) {
    for (Seen& seen : seen_) {
      if (!seen.momentum && seen.options.momentum == 0.0) seen.lacks_momentum_in_graph = true;
    }
    tensors_.captured_in(graph);
  }
  if (launches_.empty()) return launch_clock(scope, 1, 0, found_inf, std::move(graph));
  use_clocks(scope, std::move(graph));
  const WithoutGil waiting_for_room_in_the_stream;
  for (cuda::Launch& launch : launches_) {
    launch.clocks = clocks(found_inf);
    launch.grad_scale = grad_scale;
    cuda::launch_step(scope.device(), scope.stream(), launch);
  }
}

// To be called before each launch.
void DevicePlan::use_clocks(const DeviceScope& scope, GraphObjects graph) {
  state_.used_by(scope);
  if (schedules_) schedules_.used_by(scope);
  if (!scope.capturing()) return;
  captured_ = true;
  graph.add(state_);
  graph.keep(scope);
}

void DevicePlan::launch_clock(const DeviceScope& scope, int64_t updates, int64_t samples,
                              const float* found_inf, GraphObjects graph) {
  use_clocks(scope, std::move(graph));
  cuda::launch_clock(scope.device(), scope.stream(), clocks(found_inf), updates, samples,
                     measures_norm_);
}

void DevicePlan::advance_samples(const DeviceScope& scope, int64_t samples) {
  launch_clock(scope, 0, samples, nullptr, {});
}

void DevicePlan::agree(size_t group, const Clock& clock) {
  if (group < seen_.size()) seen_[group].clock = clock;
}

DevicePlan::Reading DevicePlan::read(const DeviceScope& scope, bool reset_invalid_scale) {
  Reading reading;
  reading.clocks.resize(seen_.size());
  const size_t clock_bytes = reading.clocks.size() * sizeof(GroupClock);
  std::vector<char> image(sizeof(DeviceState) + clock_bytes);
  download(scope, image.data(), state_.data(), image.size());
  std::memcpy(&reading.state, image.data(), sizeof(DeviceState));
  std::memcpy(reading.clocks.data(), image.data() + sizeof(DeviceState), clock_bytes);
  if (reset_invalid_scale && reading.state.invalid_scale != 0) {
    const int32_t none = 0;
    state_.write(scope, offsetof(DeviceState, invalid_scale), &none, sizeof none);
  }
  return reading;
}

}  // namespace fastlr

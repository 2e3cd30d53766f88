// What one CUDA device holds for an optimizer: its tables, clocks and schedules, as torch tensors.
#pragma once

#include <Python.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "../groups.h"
#include "../owned.h"
#include "device_memory.h"
#include "tensor_table.h"

namespace fastlr {

// Why the gradients' norm is measured before the update.
struct NormPass {
  double max_norm;   // what it is clipped to, or infinity
  bool seeks_inf;    // found_inf becomes 1 where it is inf or NaN
  PyObject* shares;  // what the runtime knows each share but share 0 by: a list
  int32_t share_count;

  // Whether the update depends on it.
  bool decides() const { return seeks_inf || std::isfinite(max_norm); }
};

class DevicePlan {
 public:
  explicit DevicePlan(const Rule& rule) : rule_(rule) {}

  // Throws for groups that the graphs of this device cannot take.
  void check_groups(const std::vector<GroupReading>& groups) const;

  // Brings the tables of groups, clocks and schedules up to date with the host's.
  // force: the host's clocks count, even where they have not changed since they last agreed.
  void set_groups(const DeviceScope& scope, const std::vector<GroupReading>& groups,
                  bool force = false);

  // Plans the launches of a step and brings the table of tensors up to date. in_order: tensors
  // share memory, so each has a launch of its own. measures_norm: of the gradients. norm_pass: that
  // these launches begin with.
  void prepare(const DeviceScope& scope, const std::vector<TensorRef>& tensors,
               const std::vector<StridedLayout>& layouts, bool in_order, bool measures_norm,
               std::optional<NormPass> norm_pass);

  // Launches what prepare() planned. found_inf, grad_scale: on this device, or nullptr. factor:
  // what clips the norm of more gradients than this device's. samples: by which the clock of
  // samples moves, also where the update is skipped. graph: what else these launches refer to, for
  // the graph that captures them. Where Python code raises an error, nothing was launched.
  void launch(const DeviceScope& scope, float* found_inf, const float* grad_scale,
              std::optional<double> factor, int64_t samples, GraphObjects graph);

  // Moves the clock of samples.
  void advance_samples(const DeviceScope& scope, int64_t samples);

  // The host's clocks have moved along with the device's.
  void agree(size_t group, const Clock& clock);

  // Waits for the device. reset: what is to be reported once. others_run: other threads meanwhile.
  struct Reading {
    DeviceState state;
    std::vector<GroupClock> clocks;
  };
  Reading read(const DeviceScope& scope, bool reset, bool others_run);

  // Where it has DeviceState's last_skipped: a tensor that shares the table's memory.
  Owned last_skipped(PyObject* runtime) const;

  bool captured() const { return captured_; }
  // Whether its clocks are set: not where the first step failed before.
  bool ready() const { return !seen_.empty(); }

 private:
  // What a group's table entry was made from.
  struct Seen {
    Options options{};  // without what schedules say
    Owned native[kMaxOptions];
    int64_t start[kMaxOptions] = {};
    Clock clock{};
    uint32_t live_slots = 0;
    uint32_t stages = 0;
    uint32_t slots_not_in_graph = 0;          // a graph has captured it without these ...
    std::optional<uint32_t> stages_in_graph;  // ... and with just these
  };
  struct Changes {
    bool clocks;
    bool schedules;
    bool numbers;
  };

  struct Schedules {
    Table table;           // Segment[], double[] ...
    size_t values_at = 0;  // ... which begin here
  };

  uint32_t stages(const GroupReading& group) const;
  Changes changes(const std::vector<GroupReading>& groups) const;
  static Schedules upload_schedules(const DeviceScope& scope,
                                    const std::vector<GroupReading>& groups);
  static std::vector<DeviceGroup> entries(const std::vector<GroupReading>& groups,
                                          const Schedules& schedules);
  std::vector<Seen> seen_of(const std::vector<GroupReading>& groups) const;
  static size_t state_bytes(size_t capacity);
  static Clocks clocks(const Table& table, size_t capacity, float* found_inf);
  Clocks clocks(float* found_inf) const;
  void use_clocks(const DeviceScope& scope, GraphObjects graph);
  void launch_norm(const DeviceScope& scope, float* found_inf, const float* grad_scale);
  void end_norm_of_shares(const DeviceScope& scope);
  void launch_clock(const DeviceScope& scope, int64_t updates, int64_t samples, float* found_inf);

  const Rule& rule_;
  bool captured_ = false;

  size_t capacity_ = 0;  // groups that the table of groups has room for
  Table state_;          // DeviceState, GroupClock[capacity], DeviceGroup[capacity]
  Schedules schedules_;
  std::vector<Seen> seen_;

  TensorTable tensors_;
  Table share_sums_;  // double[1 + kMaxShares]
  std::vector<cuda::Launch> launches_;
  bool measures_norm_ = false;
  std::optional<NormPass> norm_pass_;
};

}  // namespace fastlr

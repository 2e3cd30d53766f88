// A step: one update of everything that was gathered, on the host and on devices.
#pragma once

#include <Python.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cpu/step_cpu.h"
#include "gather.h"
#include "owned.h"

#if defined(FASTLR_HAS_CUDA)
#include "cuda/devices.h"
#endif

namespace fastlr {

// NOTE: [all or nothing]
// Memory can run out in a step, and Ctrl-C and errors can come up wherever Python code runs: in
// what the runtime object does, and in the hash of a tensor. So whatever can fail comes first:
// reading and checking, new state and the room for it in the optimizer's, the clocks' next
// values, the memory of the step itself. Then come the devices; and last what cannot fail and lets
// no Python code run: new state and clocks take their places, and the elements are updated. An
// error therefore means that nothing has changed (of several devices, those that were launched
// before it have), and Ctrl-C during the update is seen when it is complete.
class Plan {
 public:
  // runtime: see Gathering and NOTE: [the runtime object]; besides, read_amp(found_inf, grad_scale)
  // returns what the host makes of these: the inverse scale, or None where the update is to be
  // skipped; and will_write(parameters) is told which are about to be updated.
  Plan(const Rule& rule, PyObject* runtime, NativeOf native_of,
       const Groups::OtherNames& other_names);

  const Rule& rule() const { return groups_.rule(); }

  // Of a group's options, in their order; nothing for None.
  using Values = std::vector<std::optional<double>>;

  // Throws std::invalid_argument for values that are out of range or in conflict; see
  // Groups::check.
  void check(const Values& values, const std::string& where) const;

  // The slots of state that an update with these values reads, by name, and what new ones hold.
  std::vector<std::string> live_slots(const Values& values) const;
  double initial_state(const Values& values) const;

  // Throws std::runtime_error where something else wrote a value that a schedule of the group at
  // this index owns, but for these options.
  void check_owned(PyObject* param_groups, Py_ssize_t index,
                   const std::vector<std::string>& but_for) const;

  // Writes what schedules say at the groups' clocks.
  void publish(PyObject* param_groups) const { groups_.moves_on(param_groups, 0, 0).write(); }

  // What a step is told besides what it works on.
  struct Settings {
    PyObject* found_inf;  // GradScaler's tensors, or None
    PyObject* grad_scale;
    bool seeks_inf;  // the norm is measured before the update, and found_inf becomes 1 where it is
                     // inf or NaN: a float32 where the first gradient is
    int threads;     // of the host, the most to use
    bool measures_norm;  // so that squared_norm() tells the gradients'
    double max_norm;  // what it is clipped to before the update, or infinity; it is measured then
    bool raises;      // where that norm is inf or NaN; else the update is skipped
    int64_t samples;  // by which the samples clock moves, also where the update is skipped

    // Whether the norm must be known before the update.
    bool norm_first() const { return seeks_inf || std::isfinite(max_norm); }
    bool tells_norm() const { return measures_norm || norm_first(); }
  };

  // One update of all parameters that have a gradient; see NOTE: [all or nothing]. param_groups,
  // state: the optimizer's own.
  void step(PyObject* param_groups, PyObject* state, const Settings& settings);

  // Keeps steps off until release(), as parameters are not themselves; throws where one is running.
  void hold();
  void release() { held_ = false; }

  // Whether the last step was skipped, as far as the host knows.
  bool skipped() const { return skipped_; }
  void set_skipped(bool skipped) { skipped_ = skipped; }

  // The same as a device has it, for steps of which the host does not know: a float32 there that is
  // not 0 where the last step was skipped, or None without devices.
  Owned skipped_on_device() const;

  // The sum of the squares of all elements of the last step's gradients, without GradScaler's
  // scale; NaN where GradScaler had the update skipped. Waits for the devices. A float, or None
  // where the last step, or the graph that was replayed last, did not measure it.
  PyObject* squared_norm();

  // Moves the samples clock of host and devices.
  void advance_samples(PyObject* param_groups, int64_t samples);

  // Throws while a CUDA graph is being captured: `what` would change what it refers to.
  void refuse_capture(const char* what);

  // Hands schedules, hyperparameters and clocks to the devices at once, so that captured graphs
  // follow them.
  void push(PyObject* param_groups);

  // Waits for the devices and brings the groups' clocks, and skipped(), up to date with theirs.
  void sync(PyObject* param_groups);

  // Whether a CUDA graph has captured a step.
  bool captured() const;

 private:
  // The host's part of a step, with all the memory that it takes.
  struct HostPart {
    std::vector<TensorRef> among_others;  // where only some of the tensors are the host's
    std::vector<AnyScalars> scalars;      // one for each age in each group
    std::vector<int32_t> scalars_of;      // each tensor's
    std::vector<GroupStages> stages;      // each group's
    std::optional<ChunkSums> sums;
  };

  void run(PyObject* param_groups, PyObject* state, const Settings& settings);
  void skip(PyObject* param_groups, const Settings& settings, std::optional<double> squares);
  void move(const GroupMoves& moves, PyObject* param_groups);
  bool uses_host() const;
  bool on_one_device() const;
  bool all_on_host() const;
  bool clips_values() const;
  std::vector<TensorRef> tensors_on_host() const;
  std::optional<float> read_amp(PyObject* found_inf, PyObject* grad_scale) const;
  double measure_share(int share, std::optional<float> inverse_scale, int threads);
  double measure_norm(std::optional<float> inverse_scale, bool keeps_inf, int threads);
  std::optional<float> scale_to_clip_by(PyObject* grad_scale) const;
  GivenOptions given(const Values& values) const;
  HostPart prepare_on_host(const Unscaling& unscaling, bool measures_norm) const;
  double step_on_host(HostPart& part, int threads, bool in_order) const;

  Owned runtime_;
  Groups groups_;
  Gathering gathering_;
  bool stepping_ = false;
  bool held_ = false;
  bool skipped_ = false;
  bool raises_ = false;                 // see Settings, of the last step
  std::optional<double> squared_norm_;  // the host's share, of the last step that Python made

#if defined(FASTLR_HAS_CUDA)
  bool host_must_catch_up() const;

  Devices devices_;
  bool devices_stepped_ = false;  // not where the host alone knew that a step was to be skipped
  bool norm_on_devices_ = false;  // theirs is to be added
#endif
};

}  // namespace fastlr

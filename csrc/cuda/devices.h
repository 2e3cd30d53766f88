// All CUDA devices of an optimizer: a step over them, and what the host learns from them.
#pragma once

#include <Python.h>

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "../gather.h"
#include "device_norm.h"
#include "device_plan.h"

namespace fastlr {

class Devices {
 public:
  // runtime: see NOTE: [the runtime object]; borrowed.
  Devices(PyObject* runtime, const Rule& rule) : runtime_(runtime), rule_(rule) {}

  bool any() const;
  bool knows(int device) const;
  // Whether a CUDA graph has captured a step.
  bool captured() const;
  // Whether the host's clocks are surely the devices'.
  bool host_is_exact() const { return host_is_exact_ && !captured(); }

  // One step on every device that there is, or that gathered tensors are on; prepared everywhere
  // before it is launched anywhere. found_inf, grad_scale: tensors or None. with_host: the host
  // takes part in the step and has read found_inf. in_order: tensors share memory. measures_norm:
  // so that squared_norm() tells the gradients'. norm_pass: before the update, where all gradients
  // are on one device; where it seeks inf, found_inf is a float32 there. factor: what clips the
  // norm, where gradients are elsewhere too. samples: by which the clock of samples moves, also
  // where the update is skipped. Returns whether the step was captured instead of run.
  bool step(const Gathering& gathering, PyObject* found_inf, PyObject* grad_scale, bool with_host,
            bool in_order, bool measures_norm, std::optional<NormPass> norm_pass,
            std::optional<double> factor, int64_t samples);

  // The sum of the squares of a share's gathered gradients on all devices. Waits for these.
  // inverse_scale: see bring_to_scale().
  double measure(const Gathering& gathering, int share, std::optional<float> inverse_scale);

  // Moves the samples clock of every device; false where that was captured instead of done.
  bool advance_samples(int64_t samples);

  // The host's clocks after a step that ran.
  void agree(PyObject* param_groups);

  // Throws while a CUDA graph is being captured: `what` would change what it refers to.
  void refuse_capture(const char* what);

  // Hands schedules, hyperparameters and clocks to every device. Where one cannot take them, an
  // error is thrown before any is told.
  void push(const std::vector<GroupReading>& groups);

  // Brings the host's groups to the devices' clocks. Returns whether the last step was skipped.
  // raises: for updates that were skipped as the norm that was to be clipped was not finite.
  bool sync(PyObject* param_groups, const Groups& groups, bool raises);
  // On a device, 1 where it skipped the last step that was launched, as a float32 like found_inf;
  // None without devices.
  Owned last_skipped() const;
  // The sum of the squares of the last step's gradients, NaN where it was skipped; nothing where it
  // did not measure them.
  std::optional<double> squared_norm();

 private:
  DevicePlan& plan(int device);
  void check(const std::vector<GroupReading>& groups);
  template <typename Visit>
  void on_each_device(Visit visit);
  std::vector<DevicePlan::Reading> read(const char* what, bool reset, bool others_run);

  PyObject* runtime_;
  const Rule& rule_;
  std::map<int, DevicePlan> plans_;
  std::map<int, DeviceNorm> norms_;
  bool host_is_exact_ = true;
  uint64_t moves_ = 0;  // counts what has moved, or is about to move, a clock
};

}  // namespace fastlr

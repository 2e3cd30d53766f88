// A step: one update of everything that was gathered, on the host and on devices.
#pragma once

#include <Python.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gather.h"
#include "owned.h"

#if defined(FASTLR_HAS_CUDA)
#include "cuda/devices.h"
#endif

namespace fastlr {

class Plan {
 public:
  // runtime: see Gathering and NOTE: [the runtime object]; besides, read_amp(found_inf, grad_scale)
  // returns what the host makes of these: the inverse scale, or None where the update is to be
  // skipped.
  Plan(const Rule& rule, PyObject* runtime, NativeOf native_of);

  const Rule& rule() const { return groups_.rule(); }

  // Throws std::invalid_argument for the values of a group's options, in their order, that are out
  // of range or in conflict; see Groups::check.
  void check(const std::vector<double>& values, const std::string& where) const;

  // Writes what schedules say at the groups' clocks.
  void publish(PyObject* param_groups) const { groups_.advance(param_groups, 0, 0); }

  // What a step is told besides what it works on.
  struct Settings {
    PyObject* found_inf;  // GradScaler's tensors, or None
    PyObject* grad_scale;
    int threads;         // of the host, the most to use
    bool measures_norm;  // so that squared_norm() tells the gradients'
  };

  // One update of all parameters that have a gradient. Everything is checked, and new momentum
  // buffers are allocated, before the first byte is written; then state and clocks move.
  // param_groups, state: the optimizer's own. Returns the updated parameters, a new list, or None
  // where the host knows that the update is to be skipped.
  PyObject* step(PyObject* param_groups, PyObject* state, const Settings& settings);

  // The sum of the squares of all elements of the last step's gradients, without GradScaler's
  // scale; NaN where the update was skipped. Waits for the devices. A float, or None where the last
  // step, or the graph that was replayed last, did not measure it.
  PyObject* squared_norm();

  // Moves the samples clock of host and devices.
  void advance_samples(PyObject* param_groups, int64_t samples);

  // Throws while a CUDA graph is being captured: `what` would change what it refers to.
  void refuse_capture(const char* what);

  // Hands schedules, hyperparameters and clocks to the devices at once, so that captured graphs
  // follow them.
  void push(PyObject* param_groups);
  // After state was loaded: every buffer holds something but those of the listed parameters.
  void loaded(PyObject* uninitialized);

  // Waits for the devices and brings the groups' clocks up to date with theirs. Returns whether the
  // last step was skipped, None where there is no device.
  PyObject* sync(PyObject* param_groups);
  // A new list of the parameters on devices whose momentum buffers hold nothing yet, as every
  // update so far was skipped. Waits for the devices.
  PyObject* uninitialized();

  // Whether a CUDA graph has captured a step.
  bool captured() const;

 private:
  PyObject* run(PyObject* param_groups, PyObject* state, const Settings& settings);
  void advance(PyObject* param_groups, int64_t updates, int64_t samples);
  bool uses_host() const;
  double step_on_host(float inverse_scale, const Settings& settings, bool in_order);

  Owned runtime_;
  Groups groups_;
  Gathering gathering_;
  bool stepping_ = false;
  std::optional<double> squared_norm_;  // the host's share, of the last step that Python made

#if defined(FASTLR_HAS_CUDA)
  bool host_must_catch_up() const;

  Devices devices_;
  bool devices_stepped_ = false;  // not where the host alone knew that a step was to be skipped
#endif
};

}  // namespace fastlr

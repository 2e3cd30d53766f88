// A step's bookkeeping: which tensors an optimizer holds, where they lie now, and what a step does.
#pragma once

#include <Python.h>

#include <climits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "groups.h"
#include "layout.h"
#include "owned.h"
#include "step.h"
#include "tensor_view.h"
#include "tensors.h"

#if defined(FASTLR_HAS_CUDA)
#include "cuda/devices.h"
#endif

namespace fastlr {

// NOTE: [what is cached]
// Parameters, gradients and state may move, change their type or be replaced between any two steps,
// so each step reads every pointer, type, shape and stride again. The plan keeps only what follows
// from them and is slow to find: whether a parameter is dense, the dict that holds its state,
// whether tensors overlap. Each is compared with what it was derived from before it is used.
class SgdPlan {
  // Where a tensor is updated: kNoDevice by the CPU's kernels, otherwise by CUDA's on the device of
  // this number (see NOTE: [the runtime object]).
  static constexpr int kNoDevice = INT_MIN;

 public:
  // runtime: see NOTE: [the runtime object]; besides, new_momentum(parameter, group) returns a new
  // tensor for the parameter's momentum, gradient_like(parameter, gradient) a copy of the gradient
  // that lies in memory as the parameter does, read_amp(found_inf, grad_scale) what the host makes
  // of these: the inverse scale, or None where the update is to be skipped.
  SgdPlan(PyObject* runtime, NativeOf native_of);

  // One update of all parameters that have a gradient. Everything is checked, and new momentum
  // buffers are allocated, before the first byte is written; then state and clocks move.
  // param_groups, state: the optimizer's own. found_inf, grad_scale: GradScaler's tensors, or None.
  // Returns the updated parameters, a new list, or None where the host knows that the update is to
  // be skipped.
  PyObject* step(PyObject* param_groups, PyObject* state, PyObject* found_inf, PyObject* grad_scale,
                 int threads);

  // Moves the samples clock of host and devices.
  void advance_samples(PyObject* param_groups, int64_t samples);

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

  // Treats tensors in host memory as a device's, which the CUDA launcher updates; parameter groups
  // are dealt out to so many devices. 0: not at all. For tests, with a CUDA that is emulated.
  static void route_host_to_cuda(int devices) { host_devices_ = devices; }

 private:
  struct Parameter {
    PyObject* tensor = nullptr;
    PyObject* state = nullptr;  // its inner dict, or nullptr
    // What `order` follows from.
    dlpack::DataType dtype{0, 0, 0};
    std::vector<int64_t> shape;
    std::vector<int64_t> strides;
    MemoryOrder order{};
  };
  // Where a parameter stands, for messages.
  struct Place {
    PyObject* group;
    Py_ssize_t group_index;
    Py_ssize_t index;
  };
  // What a tensor of this step comes from.
  struct Source {
    size_t parameter;
    int device;
    PyObject* momentum;  // its buffer, or nullptr
  };
  // A parameter that is about to get its first momentum buffer.
  struct NewMomentum {
    size_t parameter;
    size_t tensor;
    Place place;
    TensorView param_view;
    TensorView grad_view;
    Owned buffer;
  };

  PyObject* run(PyObject* param_groups, PyObject* state, PyObject* found_inf, PyObject* grad_scale,
                int threads);
  void forget_step();
  void synchronize(PyObject* param_groups, PyObject* state);
  bool states_unchanged(PyObject* state) const;
  void gather(const Place& place, size_t position);
  TensorView read(PyObject* tensor, const char* what, const Place& place);
  void classify(Parameter& parameter, const TensorView& view, const Place& place) const;
  void attach_momentum(const Place& place, const Parameter& parameter, PyObject* buffer,
                       const TensorView& p, const TensorView& g, TensorRef& ref);
  void set_layout(const Place& place, const Parameter& parameter, const TensorView& p,
                  const TensorView& g, const TensorView* m, TensorRef& ref);
  void will_write(const void* data, int64_t extent, dlpack::DataType type);
  bool written_memory_overlaps();

  int device_of(const TensorView& p, const Place& place) const;
  void read_groups(PyObject* param_groups);
  void gather_all(PyObject* param_groups);
  void advance(PyObject* param_groups, int64_t updates, int64_t samples);
  bool uses_host() const;
  void step_on_host(float inverse_scale, int threads, bool in_order);

  Owned runtime_;
  NativeOf native_of_;
  TensorReader reader_;
  std::vector<Parameter> parameters_;
  std::vector<std::pair<PyObject*, PyObject*>> states_seen_;

  bool stepping_ = false;
  static int host_devices_;

#if defined(FASTLR_HAS_CUDA)
  bool host_must_catch_up() const;

  Devices devices_;
#endif

  // Filled by each step, empty between steps.
  std::vector<GroupReading> groups_;
  std::vector<TensorRef> tensors_;
  std::vector<Source> sources_;  // of tensors_, one each
  std::vector<StridedLayout> layouts_;
  std::vector<NewMomentum> new_momenta_;
  std::vector<Owned> updated_;
  std::vector<Owned> kept_alive_;  // gradients and buffers, until the step is done
  std::vector<std::pair<const char*, const char*>> written_;  // memory that the step writes

  std::vector<std::pair<const char*, const char*>> written_seen_;
  bool overlap_seen_ = false;
};

}  // namespace fastlr

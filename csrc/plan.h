// A step's bookkeeping: which tensors an optimizer holds, where they lie now, and what a step does.
#pragma once

#include <Python.h>

#include <string>
#include <utility>
#include <vector>

#include "groups.h"
#include "layout.h"
#include "owned.h"
#include "step.h"
#include "tensor_view.h"
#include "tensors.h"

namespace fastlr {

// NOTE: [what is cached]
// Parameters, gradients and state may move, change their type or be replaced between any two steps,
// so each step reads every pointer, type, shape and stride again. The plan keeps only what follows
// from them and is slow to find: whether a parameter is dense, the dict that holds its state,
// whether tensors overlap. Each is compared with what it was derived from before it is used.
class SgdPlan {
 public:
  // allocate(parameter, group) returns a new tensor for the parameter's momentum.
  SgdPlan(PyObject* allocate, NativeOf native_of);

  // One update of all parameters that have a gradient. Everything is checked, and new momentum
  // buffers are allocated, before the first byte is written; then state and clocks move.
  // param_groups, state: the optimizer's own. Returns the updated parameters, a new list.
  PyObject* step(PyObject* param_groups, PyObject* state, float inverse_scale, int threads);

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
  // A parameter that is about to get its first momentum buffer.
  struct NewMomentum {
    size_t parameter;
    size_t tensor;
    Place place;
    TensorView param_view;
    TensorView grad_view;
    Owned buffer;
  };

  PyObject* run(PyObject* param_groups, PyObject* state, float inverse_scale, int threads);
  void forget_step();
  void synchronize(PyObject* param_groups, PyObject* state);
  bool states_unchanged(PyObject* state) const;
  void gather(const Place& place, size_t position, bool has_momentum);
  TensorView read(PyObject* tensor, const char* what, const Place& place);
  void classify(Parameter& parameter, const TensorView& view, const Place& place) const;
  void attach_momentum(const Place& place, const Parameter& parameter, PyObject* buffer,
                       const TensorView& p, const TensorView& g, TensorRef& ref);
  void set_layout(const Place& place, const Parameter& parameter, const TensorView& p,
                  const TensorView& g, const TensorView* m, TensorRef& ref);
  void will_write(const void* data, int64_t extent, dlpack::DataType type);
  bool written_memory_overlaps();

  Owned allocate_;
  NativeOf native_of_;
  TensorReader reader_;
  std::vector<Parameter> parameters_;
  std::vector<std::pair<PyObject*, PyObject*>> states_seen_;

  bool stepping_ = false;

  // Filled by each step, empty between steps.
  std::vector<TensorRef> tensors_;
  std::vector<StridedLayout> layouts_;
  std::vector<GroupScalars> groups_;
  std::vector<NewMomentum> new_momenta_;
  std::vector<Owned> updated_;
  std::vector<Owned> kept_alive_;  // gradients and buffers, until the step is done
  std::vector<std::pair<const char*, const char*>> written_;  // memory that the step writes

  std::vector<std::pair<const char*, const char*>> written_seen_;
  bool overlap_seen_ = false;
};

}  // namespace fastlr

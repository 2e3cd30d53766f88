// What a step works on: which tensors an optimizer holds, and where they lie now.
#pragma once

#include <Python.h>

#include <string>
#include <utility>
#include <vector>

#include "groups.h"
#include "layout.h"
#include "owned.h"
#include "placement.h"
#include "tensor_view.h"
#include "tensors.h"

namespace fastlr {

// NOTE: [what is cached]
// Parameters, gradients and state may move, change their type or be replaced between any two steps,
// so each step reads every pointer, type, shape and stride again. What is kept is only what follows
// from them and is slow to find: whether a parameter is dense, the dict that holds its state,
// whether tensors overlap. Each is compared with what it was derived from before it is used.
class Gathering {
 public:
  // What a tensor of this step comes from.
  struct Source {
    PyObject* parameter;
    int place;           // where it is updated
    PyObject* momentum;  // its buffer, or nullptr
  };

  // runtime: an object with the methods new_momentum(parameter, group), which returns a new tensor
  // for the parameter's momentum, gradient_like(parameter, gradient), a copy of the gradient that
  // lies in memory as the parameter does, and has_no_values(tensor), whether it is nothing but a
  // shape; borrowed.
  Gathering(PyObject* runtime, const Groups& reader) : runtime_(runtime), group_reader_(reader) {}

  // Reads and checks groups, and every tensor of a parameter that has a gradient.
  void read(PyObject* param_groups, PyObject* state);
  // Allocates the momentum buffers that are missing.
  void add_momenta();
  // Makes room for them in the optimizer's state, under the keys that they will have.
  void reserve_momenta(PyObject* state);
  // Puts them there. Allocates nothing and lets no Python code run, so that it cannot fail.
  void store_momenta();
  // Forgets everything but what is cached, and takes back the room where nothing was stored.
  void clear();

  const std::vector<GroupReading>& groups() const { return groups_; }
  const std::vector<TensorRef>& tensors() const { return tensors_; }
  const std::vector<Source>& sources() const { return sources_; }  // of tensors(), one each
  const std::vector<StridedLayout>& layouts() const { return layouts_; }
  // The parameters, a new list; to be called once a step.
  Owned take_parameters();
  // Whether the order of the updates matters: one writes memory that another writes, or reads as
  // its gradient.
  bool in_order();

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
  // What was added to the optimizer's state for a buffer to come: nothing, a key with the value
  // None in the parameter's dict, or that dict.
  enum class Room { kNone, kKey, kDict };
  // A parameter that is about to get its first momentum buffer.
  struct NewMomentum {
    size_t parameter;
    size_t tensor;  // kNoTensor: the parameter is nothing but a shape, and so is the buffer
    Place place;
    TensorView param_view;
    TensorView grad_view;
    Owned buffer;
    Owned state;              // the dict that it goes to
    Room room = Room::kNone;  // that was made for it
  };

  static constexpr size_t kNoTensor = static_cast<size_t>(-1);
  using Bytes = std::pair<const char*, const char*>;  // from the first to one past the last
  // A gradient, and where its own parameter begins.
  struct Read {
    Bytes bytes;
    const char* parameter;

    bool operator==(const Read& other) const {
      return bytes == other.bytes && parameter == other.parameter;
    }
  };

  void synchronize(PyObject* param_groups, PyObject* state);
  void take_back_room();
  bool states_unchanged(PyObject* state) const;
  void gather_all(PyObject* param_groups, PyObject* state);
  void gather(const Place& place, size_t position);
  void gather_shape(const Place& place, size_t position);
  bool has_no_values(PyObject* tensor) const;
  PyObject* momentum_buffer(const Parameter& parameter) const;
  int64_t check_gradient_memory(const Place& place, const Parameter& parameter, const TensorView& p,
                                const TensorView& g) const;
  bool reads_what_another_writes(const Read& read) const;
  TensorView read_tensor(PyObject* tensor, const char* what, const Place& place);
  void classify(Parameter& parameter, const TensorView& view, const Place& place) const;
  int updated_on(const TensorView& p, const Place& place) const;
  void attach_momentum(const Place& place, const Parameter& parameter, PyObject* buffer,
                       const TensorView& p, const TensorView& g, TensorRef& ref);
  void set_layout(const Place& place, const Parameter& parameter, const TensorView& p,
                  const TensorView& g, const TensorView* m, TensorRef& ref);
  void will_write(const void* data, int64_t extent, dlpack::DataType type);

  PyObject* runtime_;
  const Groups& group_reader_;
  TensorReader reader_;

  // Cached.
  std::vector<Parameter> parameters_;
  std::vector<std::pair<PyObject*, PyObject*>> states_seen_;
  std::vector<Bytes> written_seen_;
  std::vector<Bytes> written_sorted_;
  std::vector<Read> read_seen_;
  bool writes_meet_ = false;
  bool in_order_ = false;

  // Filled by each step, empty between steps.
  std::vector<GroupReading> groups_;
  std::vector<TensorRef> tensors_;
  std::vector<Source> sources_;
  std::vector<StridedLayout> layouts_;
  std::vector<NewMomentum> new_momenta_;
  PyObject* state_ = nullptr;  // in which there is room for them
  std::vector<Owned> parameters_read_;
  std::vector<Owned> kept_alive_;   // gradients and buffers, until the step is done
  std::vector<Bytes> written_;      // memory that the step writes
  std::vector<Read> gradients_at_;  // and reads as gradients
  // Gradients are copied before the step, for a faster one, unless an update changes them.
  bool may_copy_ = true;
  bool copied_ = false;
};

}  // namespace fastlr

// What a step works on: which tensors an optimizer holds, and where they lie now.
#pragma once

#include <Python.h>

#include <array>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "groups.h"
#include "layout.h"
#include "overlaps.h"
#include "owned.h"
#include "placement.h"
#include "shares.h"
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
    int place;                  // where it is updated
    PyObject* slot[kMaxSlots];  // its state, nullptr where it is not live ...
    PyObject* step;             // ... and where its age is kept, or nullptr
  };

  // runtime: an object with the attribute float32, the type that a group may ask state to be kept
  // in, and the methods new_state(parameter, dtype), new_average(parameter, dtype) and
  // new_master(parameter), which return a new tensor for the parameter's state,
  // new_step(parameter), one of a single number, fill(tensors, value), which makes all numbers in a
  // list of them the value, begin_stages(tensors, parameters), which makes averages and masters
  // what they are before the first update of the parameter beside them, gradient_like(parameter,
  // gradient), a copy of the gradient that lies in memory as the parameter does,
  // has_no_values(tensor), whether it is nothing but a shape, is_half(tensor); and of DTensors what
  // KnownShares needs, and redistributed(gradient, parameter), a gradient that is cut as its
  // parameter is; borrowed.
  Gathering(PyObject* runtime, const Groups& reader);

  // Reads and checks groups, and every tensor of a parameter that has a gradient.
  void read(PyObject* param_groups, PyObject* state);
  // Allocates the state that is missing.
  void add_state();
  // Makes room for it in the optimizer's state, under the keys that it will have.
  void reserve_state(PyObject* state);
  // Puts it there. Allocates nothing and lets no Python code run, so that it cannot fail.
  void store_state();
  // Forgets everything but what is cached, and takes back the room where nothing was stored.
  void clear();

  const std::vector<GroupReading>& groups() const { return groups_; }
  const std::vector<TensorRef>& tensors() const { return tensors_; }
  const std::vector<Source>& sources() const { return sources_; }  // of tensors(), one each
  const std::vector<StridedLayout>& layouts() const { return layouts_; }
  // What stands for each share but share 0, a list; of all parameters, those without a gradient
  // too, so that it is the same in every process.
  PyObject* shares() const { return shares_.known(); }
  int share_count() const { return shares_.count(); }
  // The parameters, a new list; to be called once a step.
  Owned take_parameters();
  // Whether the order of the updates matters: one writes memory that another writes, or reads as
  // its gradient.
  bool in_order() { return overlaps_.found(); }

 private:
  struct Parameter {
    PyObject* tensor = nullptr;
    PyObject* state = nullptr;  // its inner dict, or nullptr
    // What `order` follows from.
    dlpack::DataType dtype{0, 0, 0};
    std::vector<int64_t> shape;
    std::vector<int64_t> strides;
    MemoryOrder order{};
    Cut cut;
  };
  // Where a parameter stands, for messages.
  struct Place {
    PyObject* group;
    Py_ssize_t group_index;
    Py_ssize_t index;

    // "parameter 3 of group 0, shape (64, 3, 7, 7)", with its name where the optimizer knows it.
    std::string describe() const;
  };
  // A parameter and its gradient as this step finds them.
  struct Views {
    TensorView p;
    TensorView g;
    bool alike;      // in one order
    int64_t extent;  // elements of g from the first to one past the last in memory
  };
  // The tensors that the optimizer's state has, or is to have, for one parameter: slots, then step.
  static constexpr int kMaxEntries = kMaxSlots + 1;
  using Entries = std::array<PyObject*, kMaxEntries>;
  // A parameter that is about to get some of its state.
  struct NewState {
    size_t parameter;
    size_t tensor;  // kNoTensor: the parameter is nothing but a shape, and so is its state
    Place place;
    uint32_t missing;  // a bit for each entry
    int64_t age;       // of what is there, where `step` is missing
    bool in_float32;   // the rule's slots
    Views views;
    Entries there;
    std::array<Owned, kMaxEntries> made;
    Owned state;            // the dict that they go to
    uint32_t room = 0;      // a bit for each key that was added to it, with the value None ...
    bool has_room = false;  // ... and whether it was added to the optimizer's state
  };

  // What of a group holds for all its parameters.
  struct Traits {
    bool in_float32;           // whether it keeps state in float32 ...
    bool averages_in_float32;  // ... and averages of half parameters
    uint32_t live;             // a bit for each slot of a half parameter ...
    uint32_t live_on_device;   // ... where schedules move on by themselves
    Keeping of_halves;
    double max_value;  // what gradients are clipped to element by element, or infinity
    bool staged;       // whatever its parameters are
  };

  const Traits& traits(const Place& place) const {
    return traits_[static_cast<size_t>(place.group_index)];
  }

  static constexpr size_t kNoTensor = static_cast<size_t>(-1);

  void synchronize(PyObject* param_groups, PyObject* state);
  void refuse_repeated(PyObject* param_groups);
  bool keeps_float32(PyObject* group, Py_ssize_t index, PyObject* key) const;
  void take_back_room();
  bool states_unchanged(PyObject* state) const;
  void gather_all(PyObject* param_groups, PyObject* state);
  void gather(const Place& place, size_t position);
  void gather_shape(const Place& place, size_t position);
  bool has_no_values(PyObject* tensor) const;
  PyObject* memory_of(const Place& place, const Parameter& parameter, PyObject* tensor, int of,
                      const char* what) const;
  Owned settled(const Parameter& parameter, size_t position, Owned gradient);
  bool answers(const char* question, PyObject* tensor) const;
  Traits traits_of(PyObject* group, Py_ssize_t index, const GroupReading& reading) const;
  bool has_type(int slot, dlpack::DataType type, const TensorRef& ref) const;
  std::string type_of_slot(const Place& place, int slot, const TensorRef& ref) const;
  void refuse_chance(const Place& place) const;
  PyObject* find(const Parameter& parameter, PyObject* key) const;
  uint32_t find_state(const Parameter& parameter, uint32_t live, bool with_step,
                      Entries& found) const;
  void see_gradient(const Parameter& parameter, Views& views) const;
  void check_gradient_memory(const Place& place, const Parameter& parameter,
                             const Views& views) const;
  TensorView read_tensor(PyObject* tensor, const char* what, const Place& place);
  void classify(Parameter& parameter, const TensorView& view, const Place& place) const;
  int updated_on(const TensorView& p, const Place& place) const;
  void attach_state(const Place& place, const Parameter& parameter, const Entries& entries,
                    const Views& views, TensorRef& ref);
  int64_t attach_slot(const Place& place, const Parameter& parameter, int slot, PyObject* tensor,
                      const Views& views, const TensorRef& ref, TensorView& view, bool& alike);
  void attach_step(const Place& place, const Parameter& parameter, PyObject* step,
                   const Views& views, const SlotViews& slots,
                   const std::array<int64_t, kMaxSlots>& extents, TensorRef& ref);
  void check_range(const Place& place, const TensorRef& ref, int updated_by) const;
  void set_source(Source& source, const Entries& entries);
  Owned new_slot(const NewState& added, int slot) const;
  void set_layout(const Place& place, const Parameter& parameter, const Views& views,
                  const SlotViews& slots, bool slots_alike, TensorRef& ref);

  PyObject* runtime_;
  Owned float32_;
  const Groups& group_reader_;
  TensorReader reader_;
  std::array<PyObject*, kMaxEntries> keys_{};  // in a parameter's state; nullptr: no such slot

  // Cached.
  std::vector<Parameter> parameters_;
  KnownShares shares_;
  std::vector<std::pair<PyObject*, PyObject*>> states_seen_;
  Overlaps overlaps_;

  // Filled by each step, empty between steps.
  std::vector<GroupReading> groups_;
  std::vector<Traits> traits_;  // of groups_, one each
  std::vector<TensorRef> tensors_;
  std::vector<Source> sources_;
  std::vector<StridedLayout> layouts_;
  std::vector<NewState> new_state_;
  PyObject* state_ = nullptr;  // in which there is room for it
  std::vector<Owned> parameters_read_;
  std::vector<Owned> kept_alive_;  // gradients and state, until the step is done
  // What processes have exchanged for this step, by the parameters' positions: once, though
  // gradients may be gathered twice.
  std::map<size_t, Owned> settled_;
  // Gradients are copied before the step, for a faster one, unless an update changes them.
  bool may_copy_ = true;
  bool copied_ = false;
};

}  // namespace fastlr

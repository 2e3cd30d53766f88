// The state of an optimizer's parameters: what is there is checked, what is missing is made.
#include "gather.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "messages.h"

namespace fastlr {

// An entry of the parameter's state, borrowed, or nullptr.
PyObject* Gathering::find(const Parameter& parameter, PyObject* key) const {
  if (parameter.state == nullptr) return nullptr;
  PyObject* found = PyDict_GetItemWithError(parameter.state, key);
  if (found == nullptr && PyErr_Occurred()) throw PythonError();
  return found == Py_None ? nullptr : found;
}

// The live entries of the parameter's state. Returns a bit for each that is missing.
uint32_t Gathering::find_state(const Parameter& parameter, uint32_t live, bool with_step,
                               Entries& found) const {
  uint32_t missing = 0;
  found = {};
  for (int k = 0; k < kMaxSlots; ++k) {
    if (!is_live(live, k)) continue;
    found[k] = find(parameter, keys_[k]);
    missing |= (found[k] == nullptr ? 1u : 0u) << k;
  }
  if (!with_step) return missing;
  found[kMaxSlots] = find(parameter, keys_[kMaxSlots]);
  return missing | (found[kMaxSlots] == nullptr ? 1u : 0u) << kMaxSlots;
}

bool Gathering::has_type(int slot, dlpack::DataType type, const TensorRef& ref) const {
  if (slot == kMasterSlot && ref.type == StorageType::kBFloat16) {
    return type.code == dlpack::kInt && type.bits == 16;
  }
  const StorageType expected = slot == kMasterSlot ? StorageType::kFloat32
                               : slot == kEmaSlot  ? ref.ema_type
                                                   : ref.state_type;
  StorageType found;
  return storage_type(type, found) && found == expected;
}

// In words.
std::string Gathering::type_of_slot(const Place& place, int slot, const TensorRef& ref) const {
  if (slot == kMasterSlot) return ref.type == StorageType::kBFloat16 ? "int16" : "float32";
  if (slot != kEmaSlot && ref.kept == Keeping::kMaster) return "float32 with master_weights=True";
  const bool is_average = slot == kEmaSlot;
  const bool in_float32 = is_average ? traits(place).averages_in_float32 : traits(place).in_float32;
  const bool takes_float32 = in_float32 && (!is_average || is_half(ref.type));
  return std::string(takes_float32 ? "float32" : "its own type") + " with " +
         (is_average ? "ema_dtype=" : "state_dtype=") + (in_float32 ? "torch.float32" : "None");
}

void Gathering::set_layout(const Place& place, const Parameter& parameter, const Views& views,
                           const SlotViews& slots, bool slots_alike, TensorRef& ref) {
  ref.numel = parameter.order.numel * (is_complex(views.p.dtype) ? 2 : 1);
  ref.layout = -1;
  if (parameter.order.numel <= 1) return;
  if (parameter.order.dense && views.alike && slots_alike) return;
  StridedLayout layout;
  if (!strided_layout(views.p, views.g, slots, layout)) {
    refuse(place.describe() + " has more than " + std::to_string(kMaxDims) +
           " dimensions and lies in another order than its gradient or state.");
  }
  ref.layout = static_cast<int32_t>(layouts_.size());
  layouts_.push_back(layout);
}

// Reads and checks one tensor of state. Returns how far its elements reach.
int64_t Gathering::attach_slot(const Place& place, const Parameter& parameter, int slot,
                               PyObject* tensor, const Views& views, const TensorRef& ref,
                               TensorView& m, bool& alike) {
  const char* const name = group_reader_.rule().slot[slot];
  const TensorView &p = views.p, &g = views.g;
  const auto the_slot = [&] { return std::string("the ") + name + " of " + place.describe(); };
  PyObject* const memory = memory_of(place, parameter, tensor, slot, name);
  m = read_tensor(memory, name, place);
  if (!same_shape(p, m)) refuse(the_slot() + " has shape " + shape_of(tensor) + ".");
  if (!same(p.device, m.device)) {
    refuse(
        the_slot() + " is on " + device_name(m.device) + " and the parameter on " +
        device_name(p.device) +
        ". Move the model before building the optimizer, or load the optimizer's state_dict again "
        "after moving it.");
  }
  if (is_complex(m.dtype) != is_complex(p.dtype) || !has_type(slot, m.dtype, ref)) {
    refuse(the_slot() + " has " + type_name(m.dtype) + "; a parameter of " + type_name(p.dtype) +
           " takes " + type_of_slot(place, slot, ref) +
           ". Load the optimizer's state_dict again to convert it.");
  }
  if (m.data == nullptr && parameter.order.numel > 0) {
    refuse(the_slot() + " has no memory of its own.");
  }
  int64_t extent = parameter.order.extent;
  bool dense = parameter.order.dense;
  alike = same_order(p, m);
  if (!alike) {
    const MemoryOrder order = memory_order(m);
    if (order.overlapping) {
      refuse(the_slot() + " has elements that share memory; replace it by a clone() of it.");
    }
    extent = order.extent;
    dense = order.dense;
  }
  if (may_be_lazy(m, parameter.order.numel, dense) && TensorReader::is_lazy(memory)) {
    refuse(the_slot() + " is a lazily conjugated or negated view; replace it by " + name +
           ".resolve_conj().resolve_neg().");
  }
  if (!apart(m, extent, g, views.extent) && (!same(m.dtype, g.dtype) || share_elements(m, g))) {
    refuse("the gradient of " + place.describe() + " shares memory with its own " + name +
           "; give it a clone() of the gradient.");
  }
  if (!apart(m, extent, p, parameter.order.extent) &&
      (!same(m.dtype, p.dtype) || share_elements(m, p))) {
    refuse(the_slot() + " shares memory with the parameter; replace it by a clone() of it.");
  }
  return extent;
}

// Reads and checks where a parameter's age is kept, and on the host the age.
void Gathering::attach_step(const Place& place, const Parameter& parameter, PyObject* step,
                            const Views& views, const SlotViews& slots,
                            const std::array<int64_t, kMaxSlots>& extents, TensorRef& ref) {
  const TensorView& p = views.p;
  TensorView view = read_tensor(step, "step", place);
  StorageType type;
  if (!storage_type(view.dtype, type) || type != StorageType::kFloat32 || is_complex(view.dtype) ||
      memory_order(view).numel != 1 || view.data == nullptr || !same(view.device, p.device)) {
    refuse("the step of " + place.describe() + " must be one float32 on " + device_name(p.device) +
           ", got " + type_name(view.dtype) + " of shape " + shape_of(step) + " on " +
           device_name(view.device) + ". Load the optimizer's state_dict again to convert it.");
  }
  const auto meets = [&](const TensorView& other, int64_t extent) {
    return !apart(view, 1, other, extent) &&
           (!same(view.dtype, other.dtype) || share_elements(view, other));
  };
  const char* shared = meets(p, parameter.order.extent) ? "the parameter"
                       : meets(views.g, views.extent)   ? "the gradient"
                                                        : nullptr;
  for (int k = 0; k < kMaxSlots; ++k) {
    if (slots[k] != nullptr && meets(*slots[k], extents[k])) {
      shared = group_reader_.rule().slot[k];
    }
  }
  if (shared != nullptr) {
    refuse("the step of " + place.describe() + " shares memory with " + shared +
           "; replace it by a clone() of it.");
  }
  ref.step = static_cast<float*>(view.data);
  if (view.device.type != dlpack::kCpu || updated_on(p, place) != kHost) return;
  if (!(*ref.step >= 0.0f && *ref.step < 0x1p62f && *ref.step == std::floor(*ref.step))) {
    refuse("the step of " + place.describe() + " must be a number of updates, got " +
           std::to_string(*ref.step) + ".");
  }
  ref.age = static_cast<int64_t>(*ref.step);
}

void Gathering::attach_state(const Place& place, const Parameter& parameter, const Entries& entries,
                             const Views& views, TensorRef& ref) {
  const Rule& rule = group_reader_.rule();
  std::array<TensorView, kMaxSlots> slot_views;
  std::array<int64_t, kMaxSlots> extents{};
  SlotViews slots{};
  bool all_alike = true;
  for (int k = 0; k < kMaxSlots; ++k) {
    if (entries[k] == nullptr) continue;
    TensorView& m = slot_views[k];
    bool alike;
    extents[k] = attach_slot(place, parameter, k, entries[k], views, ref, m, alike);
    all_alike = all_alike && alike;
    for (int other = 0; other < k; ++other) {
      if (slots[other] == nullptr) continue;
      const auto both = [&] {
        return std::string("the ") + rule.slot[k] + " and the " + rule.slot[other] + " of " +
               place.describe();
      };
      if (!apart(m, extents[k], *slots[other], extents[other]) &&
          share_elements(m, *slots[other])) {
        refuse(both() + " share memory; replace one by a clone() of it.");
      }
    }
    ref.slot[k] = m.data;
    slots[k] = &m;
  }
  set_layout(place, parameter, views, slots, all_alike, ref);
  for (int k = 0; k < kMaxSlots; ++k) {
    if (slots[k] != nullptr) overlaps_.writes(slots[k]->data, bytes(extents[k], slots[k]->dtype));
  }
  if (entries[kMaxSlots] != nullptr)
    attach_step(place, parameter, entries[kMaxSlots], views, slots, extents, ref);
}

// Notes the state that a tensor of the step works on.
void Gathering::set_source(Source& source, const Entries& entries) {
  std::copy_n(entries.begin(), kMaxSlots, source.slot);
  source.step = entries[kMaxSlots];
  for (PyObject* entry : entries) {
    if (entry != nullptr) kept_alive_.push_back(Owned::borrow(entry));
  }
}

// An uninitialized tensor for a slot.
Owned Gathering::new_slot(const NewState& added, int slot) const {
  PyObject* const parameter = parameters_[added.parameter].tensor;
  if (slot == kMasterSlot) {
    return checked(PyObject_CallMethod(runtime_, "new_master", "O", parameter));
  }
  const bool is_average = slot == kEmaSlot;
  const bool in_float32 = is_average ? traits(added.place).averages_in_float32 : added.in_float32;
  return checked(PyObject_CallMethod(runtime_, is_average ? "new_average" : "new_state", "OO",
                                     parameter, in_float32 ? float32_.get() : Py_None));
}

void Gathering::add_state() {
  const Rule& rule = group_reader_.rule();
  const auto append = [](Owned& list, PyObject* tensor) {
    if (!list) list = checked(PyList_New(0));
    if (PyList_Append(list.get(), tensor) != 0) throw PythonError();
  };
  std::map<double, Owned> to_fill;  // lists of new tensors, by their numbers
  Owned of_stages, begin_as;        // lists of new averages and masters, and of their parameters
  for (NewState& added : new_state_) {
    const Parameter& parameter = parameters_[added.parameter];
    const GroupReading& group = groups_[static_cast<size_t>(added.place.group_index)];
    for (int k = 0; k < kMaxEntries; ++k) {
      if ((added.missing >> k & 1u) == 0) continue;
      if (k == kMaxSlots) {
        added.made[k] = checked(PyObject_CallMethod(runtime_, "new_step", "O", parameter.tensor));
        append(to_fill[static_cast<double>(added.age)], added.made[k].get());
        continue;
      }
      added.made[k] = new_slot(added, k);
      if (k >= kMaxRuleSlots) {
        append(of_stages, added.made[k].get());
        append(begin_as, parameter.tensor);
      } else {
        append(to_fill[rule.initial_state(group.options)], added.made[k].get());
      }
    }
  }
  if (of_stages) {
    checked(PyObject_CallMethod(runtime_, "begin_stages", "OO", of_stages.get(), begin_as.get()));
  }
  for (const auto& [value, tensors] : to_fill) {
    checked(PyObject_CallMethod(runtime_, "fill", "Od", tensors.get(), value));
  }
  for (NewState& added : new_state_) {
    const Parameter& parameter = parameters_[added.parameter];
    Entries entries = added.there;
    for (int k = 0; k < kMaxEntries; ++k) {
      if (added.made[k]) entries[k] = added.made[k].get();
    }
    if (added.tensor != kNoTensor) {
      attach_state(added.place, parameter, entries, added.views, tensors_[added.tensor]);
      set_source(sources_[added.tensor], entries);
    }
    added.state =
        parameter.state != nullptr ? Owned::borrow(parameter.state) : checked(PyDict_New());
  }
}

void Gathering::reserve_state(PyObject* state) {
  state_ = state;
  for (NewState& added : new_state_) {
    for (int k = 0; k < kMaxEntries; ++k) {
      if (!added.made[k]) continue;
      PyObject* found = PyDict_GetItemWithError(added.state.get(), keys_[k]);
      if (found != nullptr) continue;  // None, which stands for no tensor
      if (PyErr_Occurred() || PyDict_SetItem(added.state.get(), keys_[k], Py_None) != 0) {
        throw PythonError();
      }
      added.room |= 1u << k;
    }
    const Parameter& parameter = parameters_[added.parameter];
    if (parameter.state != nullptr) continue;
    added.has_room = true;  // a tensor's hash is Python code, which Ctrl-C can stop at any time
    if (PyObject_SetItem(state, parameter.tensor, added.state.get()) != 0) throw PythonError();
  }
}

void Gathering::store_state() {
  for (NewState& added : new_state_) {
    for (int k = 0; k < kMaxEntries; ++k) {
      if (!added.made[k]) continue;
      if (PyDict_SetItem(added.state.get(), keys_[k], added.made[k].get()) != 0) {
        throw PythonError();
      }
    }
    added.room = 0;
    added.has_room = false;
  }
}

void Gathering::take_back_room() {
  for (NewState& added : new_state_) {
    if (added.has_room) {
      PyObject* const parameter = parameters_[added.parameter].tensor;
      // Once more where another Ctrl-C stops it: the step raises anyway.
      if (PyObject_DelItem(state_, parameter) != 0 && !PyErr_ExceptionMatches(PyExc_KeyError)) {
        PyErr_Clear();
        PyObject_DelItem(state_, parameter);
      }
    }
    for (int k = 0; k < kMaxEntries && !added.has_room; ++k) {
      if ((added.room >> k & 1u) != 0) PyDict_DelItem(added.state.get(), keys_[k]);
    }
    PyErr_Clear();
    added.room = 0;
    added.has_room = false;
  }
}

}  // namespace fastlr

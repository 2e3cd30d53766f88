#include "gather.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <optional>
#include <stdexcept>
#include <unordered_set>

#include "build_info.h"

namespace fastlr {
namespace {

struct Names {
  PyObject* params = PyUnicode_InternFromString("params");
  PyObject* step = PyUnicode_InternFromString("step");
  PyObject* state_dtype = PyUnicode_InternFromString("state_dtype");
  PyObject* ema_dtype = PyUnicode_InternFromString("ema_dtype");
  PyObject* mesh = PyUnicode_InternFromString("mesh");
  PyObject* placements = PyUnicode_InternFromString("placements");
};

const Names& names() {
  static const Names all;
  return all;
}

std::string text_of(PyObject* object) {
  const Owned text(object == nullptr ? nullptr : PyObject_Str(object));
  const char* utf8 = text ? PyUnicode_AsUTF8(text.get()) : nullptr;
  if (utf8 == nullptr) {
    PyErr_Clear();
    return "unknown";
  }
  return utf8;
}

std::string shape_of(PyObject* tensor) {
  const Owned size(PyObject_GetAttrString(tensor, "shape"));
  const Owned shape(size ? PySequence_Tuple(size.get()) : nullptr);
  return text_of(shape.get());
}

// "parameter 3 of group 0, shape (64, 3, 7, 7)", with its name where the optimizer knows it.
template <typename Place>
std::string describe(const Place& place) {
  std::string result =
      "parameter " + std::to_string(place.index) + " of group " + std::to_string(place.group_index);
  PyObject* param_names = PyDict_GetItemString(place.group, "param_names");
  if (param_names != nullptr && PyList_Check(param_names) &&
      place.index < PyList_GET_SIZE(param_names)) {
    result += " (" + text_of(PyList_GET_ITEM(param_names, place.index)) + ")";
  }
  PyObject* params = PyDict_GetItemWithError(place.group, names().params);
  return result + ", shape " + shape_of(PyList_GET_ITEM(params, place.index));
}

// Whether two tensors' memory, so many elements of each, does not meet.
bool apart(const TensorView& a, int64_t extent_a, const TensorView& b, int64_t extent_b) {
  const char* const from_a = static_cast<const char*>(a.data);
  const char* const from_b = static_cast<const char*>(b.data);
  return from_a + extent_a * (a.dtype.bits / 8) <= from_b ||
         from_b + extent_b * (b.dtype.bits / 8) <= from_a;
}

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

// Whether a tensor method without arguments (is_conj, is_neg) returns true.
bool holds(PyObject* tensor, const char* method) {
  const Owned answer = checked(PyObject_CallMethod(tensor, method, nullptr));
  return answer.get() == Py_True;
}

// PyTorch marks a tensor as conjugated or negated instead of computing it; its memory then holds
// other values than it says. Its public functions mark views of complex tensors only: complex ones,
// and real ones whose elements are two apart, which shows unless there is a single element.
bool may_be_lazy(const TensorView& view, int64_t numel, bool dense) {
  return is_complex(view.dtype) || numel == 1 || !dense;
}

bool is_lazy(PyObject* tensor) { return holds(tensor, "is_conj") || holds(tensor, "is_neg"); }

}  // namespace

Gathering::Gathering(PyObject* runtime, const Groups& reader)
    : runtime_(runtime),
      float32_(checked(PyObject_GetAttrString(runtime, "float32"))),
      group_reader_(reader),
      shares_(checked(PyList_New(0))) {
  for (int k = 0; k < kMaxSlots; ++k) {
    const char* const name = reader.rule().slot[k];
    if (name == nullptr) continue;
    keys_[k] = PyUnicode_InternFromString(name);  // for as long as the process lives, as all are
    if (keys_[k] == nullptr) throw PythonError();
  }
}

TensorView Gathering::read_tensor(PyObject* tensor, const char* what, const Place& place) {
  TensorView view;
  if (reader_.read(tensor, view)) return view;
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  const Owned owned_type(type), owned_value(value), owned_traceback(traceback);
  const std::string reason = text_of(value);
  const Owned layout(PyObject_GetAttrString(tensor, "layout"));
  const std::string layout_name = text_of(layout.get());
  PyErr_Clear();
  if (!layout) {
    refuse(std::string("the ") + what + " of " + describe(place) + " must be a tensor, got a " +
           Py_TYPE(tensor)->tp_name + ".");
  }
  if (layout_name != "torch.strided") {
    refuse(std::string("the ") + what + " of " + describe(place) + " has layout " + layout_name +
           ", fastlr updates dense tensors only. Make it dense (nn.Embedding(..., sparse=False), "
           "grad.to_dense()), or give this parameter to another optimizer.");
  }
  if (has_no_values(tensor)) {
    refuse(std::string("the ") + what + " of " + describe(place) +
           " is a meta or fake tensor without memory, and the parameter is not.");
  }
  refuse(std::string("cannot read the ") + what + " of " + describe(place) + ": " + reason);
}

void Gathering::classify(Parameter& parameter, const TensorView& view, const Place& place) const {
  parameter.dtype = {0, 0, 0};  // until everything below holds
  StorageType type;
  if (!storage_type(view.dtype, type)) {
    refuse(describe(place) + " has " + type_name(view.dtype) +
           "; supported are float16, bfloat16, float32, float64 and the complex types.");
  }
  const MemoryOrder order = memory_order(view);
  if (order.overlapping) {
    refuse(describe(place) +
           " has elements that share memory (an expanded or overlapping view), so they cannot be "
           "updated one by one; give the optimizer a clone() of it.");
  }
  parameter.shape.assign(view.shape, view.shape + view.ndim);
  parameter.strides.assign(view.strides, view.strides + view.ndim);
  parameter.order = order;
  parameter.dtype = view.dtype;
}

void Gathering::set_layout(const Place& place, const Parameter& parameter, const Views& views,
                           const SlotViews& slots, bool slots_alike, TensorRef& ref) {
  ref.numel = parameter.order.numel * (is_complex(views.p.dtype) ? 2 : 1);
  ref.layout = -1;
  if (parameter.order.numel <= 1) return;
  if (parameter.order.dense && views.alike && slots_alike) return;
  StridedLayout layout;
  if (!strided_layout(views.p, views.g, slots, layout)) {
    refuse(describe(place) + " has more than " + std::to_string(kMaxDims) +
           " dimensions and lies in another order than its gradient or state.");
  }
  ref.layout = static_cast<int32_t>(layouts_.size());
  layouts_.push_back(layout);
}

constexpr int kOfGradient = kMaxSlots;

// Whether the specification of a slot or gradient says the same as its parameter's of which part is
// where. of: the slot, or kOfGradient.
bool Gathering::cut_alike(const Parameter& parameter, PyObject* spec, int of) const {
  PyObject* const own = parameter.spec.get();
  if (spec == own) return true;
  if (spec == nullptr || own == nullptr) return false;
  if (spec == parameter.alike[of].get()) return true;
  for (PyObject* const name : {names().mesh, names().placements}) {
    const Owned one = checked(PyObject_GetAttr(own, name));
    const Owned two = checked(PyObject_GetAttr(spec, name));
    if (one.get() == two.get()) continue;
    const int same = PyObject_RichCompareBool(one.get(), two.get(), Py_EQ);
    if (same < 0) throw PythonError();
    if (same == 0) return false;
  }
  parameter.alike[of] = Owned::borrow(spec);
  return true;
}

// The tensor that has the memory of one of a parameter's; refused where that is not cut as the
// parameter is.
PyObject* Gathering::memory_of(const Place& place, const Parameter& parameter, PyObject* tensor,
                               int of, const char* what) const {
  const TensorReader::Part part = TensorReader::part(tensor);
  if (cut_alike(parameter, part.spec, of)) return part.local != nullptr ? part.local : tensor;
  const auto described = [](PyObject* spec) {
    return spec == nullptr ? std::string("a plain tensor") : "a DTensor, " + text_of(spec);
  };
  refuse(
      std::string("the ") + what + " of " + describe(place) + " is " + described(part.spec) +
      ", and the parameter " + described(parameter.spec.get()) +
      ". Shard the model before building the optimizer, or load the optimizer's state_dict again "
      "after it.");
}

// A gradient that is cut as its parameter is: where a DTensor's is not, or is still on its way,
// processes exchange what they have.
Owned Gathering::settled(const Parameter& parameter, size_t position, Owned gradient) {
  const TensorReader::Part part = TensorReader::part(gradient.get());
  if (!parameter.spec || part.local == nullptr) return gradient;  // memory_of() judges
  if (cut_alike(parameter, part.spec, kOfGradient) && TensorReader::is_plain(part.local)) {
    return gradient;
  }
  Owned& exchanged = settled_[position];
  if (!exchanged) {
    exchanged = checked(
        PyObject_CallMethod(runtime_, "redistributed", "OO", gradient.get(), parameter.tensor));
  }
  return Owned::borrow(exchanged.get());
}

// Notes how a parameter is cut.
void Gathering::see_part(const Place& place, Parameter& parameter, PyObject* spec) {
  parameter.spec = Owned();
  parameter.alike = {};
  parameter.share = 0;
  parameter.first = 0;
  if (spec == nullptr) return;
  const Owned part = checked(PyObject_CallMethod(runtime_, "part", "O", parameter.tensor));
  PyObject* const share = PyTuple_GetItem(part.get(), 0);
  PyObject* const first = PyTuple_GetItem(part.get(), 1);
  if (first == nullptr) throw PythonError();
  const int64_t first_element = PyLong_AsLongLong(first);
  if (PyErr_Occurred()) throw PythonError();
  if (share != Py_None) {
    Py_ssize_t known = PySequence_Contains(shares_.get(), share) == 1
                           ? PySequence_Index(shares_.get(), share)
                           : PyList_GET_SIZE(shares_.get());
    if (known < 0 || PyErr_Occurred()) throw PythonError();
    if (known == kMaxShares) {
      refuse(describe(place) + " is cut in another way than those before it, which are cut in " +
             std::to_string(kMaxShares) +
             " ways, the most of an optimizer; give it one of its own.");
    }
    if (known == PyList_GET_SIZE(shares_.get()) && PyList_Append(shares_.get(), share) != 0) {
      throw PythonError();
    }
    parameter.share = static_cast<int32_t>(known) + 1;
  }
  parameter.first = first_element;
  parameter.spec = Owned::borrow(spec);
}

// What the runtime says of a tensor. To be called without a Python error set.
bool Gathering::answers(const char* question, PyObject* tensor) const {
  return checked(PyObject_CallMethod(runtime_, question, "O", tensor)).get() == Py_True;
}

// Meta and fake tensors.
bool Gathering::has_no_values(PyObject* tensor) const { return answers("has_no_values", tensor); }

Gathering::Traits Gathering::traits_of(PyObject* group, Py_ssize_t index,
                                       const GroupReading& reading) const {
  const Rule& rule = group_reader_.rule();
  const double* const option = reading.options.value + rule.rule_options;
  Traits traits{};
  traits.in_float32 = keeps_float32(group, index, names().state_dtype);
  traits.averages_in_float32 = keeps_float32(group, index, names().ema_dtype);
  traits.live = rule.live_slots(reading.options, 0);
  traits.live_on_device = rule.live_slots(reading.options, reading.driven_options);
  traits.of_halves = option[kMasterWeights] != 0.0        ? Keeping::kMaster
                     : option[kStochasticRounding] != 0.0 ? Keeping::kStochastic
                                                          : Keeping::kNearest;
  traits.max_value = max_value_of(option);
  traits.staged = std::isfinite(traits.max_value) || option[kCautious] != 0.0;
  return traits;
}

// Notes memory that the step will write.
void Gathering::will_write(const void* data, int64_t extent, dlpack::DataType type) {
  if (extent == 0) return;
  const char* begin = static_cast<const char*>(data);
  written_.emplace_back(begin, begin + extent * (type.bits / 8));
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

// Reads and checks one tensor of state. Returns how far its elements reach.
int64_t Gathering::attach_slot(const Place& place, const Parameter& parameter, int slot,
                               PyObject* tensor, const Views& views, const TensorRef& ref,
                               TensorView& m, bool& alike) {
  const char* const name = group_reader_.rule().slot[slot];
  const TensorView &p = views.p, &g = views.g;
  const auto the_slot = [&] { return std::string("the ") + name + " of " + describe(place); };
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
  if (may_be_lazy(m, parameter.order.numel, dense) && is_lazy(memory)) {
    refuse(the_slot() + " is a lazily conjugated or negated view; replace it by " + name +
           ".resolve_conj().resolve_neg().");
  }
  if (!apart(m, extent, g, views.extent) && (!same(m.dtype, g.dtype) || share_elements(m, g))) {
    refuse("the gradient of " + describe(place) + " shares memory with its own " + name +
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
    refuse("the step of " + describe(place) + " must be one float32 on " + device_name(p.device) +
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
    refuse("the step of " + describe(place) + " shares memory with " + shared +
           "; replace it by a clone() of it.");
  }
  ref.step = static_cast<float*>(view.data);
  if (view.device.type != dlpack::kCpu || updated_on(p, place) != kHost) return;
  if (!(*ref.step >= 0.0f && *ref.step < 0x1p62f && *ref.step == std::floor(*ref.step))) {
    refuse("the step of " + describe(place) + " must be a number of updates, got " +
           std::to_string(*ref.step) + ".");
  }
  ref.age = static_cast<int64_t>(*ref.step);
}

// Refuses numbers that would make a parameter infinite, or keep it from moving. updated_by: a
// device's age is not known; there the corrections for bias, which end, are left out.
void Gathering::check_range(const Place& place, const TensorRef& ref, int updated_by) const {
  const GroupReading& group = groups_[static_cast<size_t>(place.group_index)];
  const bool in_double = ref.type == StorageType::kFloat64;
  const int64_t age = updated_by == kHost ? ref.age : int64_t{1} << 62;
  if (group_reader_.rule().in_range(group.options, age, in_double)) return;
  const std::string type = in_double ? "float64" : "float32";
  refuse(group_reader_.large_options(group, place.group_index) + " leads beyond the range of " +
         type + ", in which " + describe(place) + " is computed; give it a smaller one" +
         (in_double ? "." : ", or make it float64."));
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
               describe(place);
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
    if (slots[k] != nullptr) will_write(slots[k]->data, extents[k], slots[k]->dtype);
  }
  if (entries[kMaxSlots] != nullptr)
    attach_step(place, parameter, entries[kMaxSlots], views, slots, extents, ref);
}

int Gathering::updated_on(const TensorView& p, const Place& place) const {
  const std::optional<int> found = place_of(p.device, static_cast<size_t>(place.group_index));
  if (found) return *found;
#if defined(FASTLR_HAS_CUDA)
  const std::string reason = "fastlr updates tensors on the CPU and on CUDA devices";
#else
  const std::string reason =
      "this build of fastlr updates tensors on the CPU only: " + std::string(kCudaStatus) + ". " +
      kCudaRemedy;
#endif
  refuse(describe(place) + " is on " + device_name(p.device) + ", but " + reason + ".");
}

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
  found[kMaxSlots] = find(parameter, names().step);
  return missing | (found[kMaxSlots] == nullptr ? 1u : 0u) << kMaxSlots;
}

// A step of a parameter without values, as memory estimators and deferred initialisation make it:
// it gets state of its kind, and nothing is computed.
void Gathering::gather_shape(const Place& place, size_t position) {
  const Parameter& parameter = parameters_[position];
  const Traits& of_group = traits(place);
  const Rule& rule = group_reader_.rule();
  const bool has_master =
      of_group.of_halves == Keeping::kMaster && answers("is_half", parameter.tensor);
  uint32_t live = of_group.live;
  if (!has_master) live &= ~(1u << kMasterSlot);
  Entries entries;
  const uint32_t missing = find_state(parameter, live, rule.counts_steps, entries);
  if (missing != 0) {
    const bool in_float32 = has_master || of_group.in_float32;
    new_state_.push_back(
        {position, kNoTensor, place, missing, 0, in_float32, {}, entries, {}, Owned()});
  }
  parameters_read_.push_back(Owned::borrow(parameter.tensor));
}

// Notes how the gradient lies.
void Gathering::see_gradient(const Parameter& parameter, Views& views) const {
  views.alike = same_order(views.p, views.g);
  views.extent = views.alike ? parameter.order.extent : memory_order(views.g).extent;
}

// Refuses a gradient that has elements in common with its own parameter, as the order of reads and
// writes would decide the result; all of them, each at its own place, are fine.
void Gathering::check_gradient_memory(const Place& place, const Parameter& parameter,
                                      const Views& views) const {
  const TensorView &p = views.p, &g = views.g;
  const bool same_places = views.alike && p.data == g.data;
  if (!same_places && !apart(p, parameter.order.extent, g, views.extent) && share_elements(p, g)) {
    refuse("the gradient of " + describe(place) +
           " shares memory with the parameter, at other places than its own elements'; give it a "
           "clone() of the gradient.");
  }
}

void Gathering::refuse_chance(const Place& place) const {
  refuse("stochastic_rounding is for bfloat16, and " + describe(place) +
         " has float16; give its group master_weights=True instead.");
}

void Gathering::gather(const Place& place, size_t position) {
  Parameter& parameter = parameters_[position];
  PyObject* tensor = parameter.tensor;
  Owned held = Owned::borrow(tensor);  // a getter of gradients may be anybody's code
  const TensorReader::Part part = TensorReader::part(tensor);
  if (part.spec != parameter.spec.get()) see_part(place, parameter, part.spec);
  PyObject* const memory = part.local != nullptr ? part.local : tensor;
  Owned held_memory = Owned::borrow(memory);
  Owned grad = checked(reader_.gradient(tensor));
  if (grad.get() == Py_None) return;

  Views views;
  TensorView &p = views.p, &g = views.g;
  const bool readable = reader_.read(memory, p);
  if (!readable || p.data == nullptr) {
    PyErr_Clear();
    if (has_no_values(tensor)) return gather_shape(place, position);
    if (!readable) p = read_tensor(memory, "data", place);  // says why
  }
  if (!same(p.dtype, parameter.dtype) || static_cast<size_t>(p.ndim) != parameter.shape.size() ||
      !same_numbers(p.shape, parameter.shape.data(), p.ndim) ||
      !same_numbers(p.strides, parameter.strides.data(), p.ndim)) {
    classify(parameter, p, place);
  }
  const int updated_by = updated_on(p, place);
  if (p.data == nullptr && parameter.order.numel > 0) {
    refuse(describe(place) + " is a " + Py_TYPE(tensor)->tp_name +
           " without memory of its own (a FakeTensor or other wrapper); give the optimizer plain "
           "tensors or DTensors.");
  }
  grad = settled(parameter, position, std::move(grad));
  grad = Owned::borrow(memory_of(place, parameter, grad.get(), kOfGradient, "gradient"));
  g = read_tensor(grad.get(), "gradient", place);
  if (!same(p.dtype, g.dtype)) {
    refuse("the gradient of " + describe(place) + " has " + type_name(g.dtype) +
           " and the parameter " + type_name(p.dtype) + "; convert the gradient.");
  }
  if (!same(p.device, g.device)) {
    refuse("the gradient of " + describe(place) + " is on " + device_name(g.device) +
           " and the parameter on " + device_name(p.device) + ".");
  }
  if (!same_shape(p, g)) {
    refuse("the gradient of " + describe(place) + " has shape " + shape_of(grad.get()) + ".");
  }
  if (g.data == nullptr && parameter.order.numel > 0) {
    refuse("the gradient of " + describe(place) + " is a " + Py_TYPE(grad.get())->tp_name +
           " without plain memory of its own.");
  }
  if (may_be_lazy(p, parameter.order.numel, parameter.order.dense) && is_lazy(memory)) {
    refuse(describe(place) +
           " is a lazily conjugated or negated view; give the optimizer a parameter made from "
           "resolve_conj().resolve_neg().");
  }
  see_gradient(parameter, views);
  if (may_be_lazy(g, parameter.order.numel, parameter.order.dense && views.alike) &&
      is_lazy(grad.get())) {
    grad = checked(PyObject_CallMethod(grad.get(), "resolve_conj", nullptr));
    grad = checked(PyObject_CallMethod(grad.get(), "resolve_neg", nullptr));
    g = read_tensor(grad.get(), "gradient", place);
    see_gradient(parameter, views);
  }

  check_gradient_memory(place, parameter, views);
  if (views.extent != 0) {
    const char* const begin = static_cast<const char*>(g.data);
    gradients_at_.push_back(
        {{begin, begin + views.extent * (g.dtype.bits / 8)}, static_cast<const char*>(p.data)});
  }

  if (may_copy_ && updated_by != kHost && parameter.order.dense && !views.alike) {
    copied_ = true;
    grad = checked(PyObject_CallMethod(runtime_, "gradient_like", "OO", memory, grad.get()));
    g = read_tensor(grad.get(), "gradient", place);
    see_gradient(parameter, views);
  }

  const Traits& of_group = traits(place);
  StorageType type;
  storage_type(p.dtype, type);
  const bool half = is_half(type);
  const Keeping kept = half ? of_group.of_halves : Keeping::kNearest;
  if (kept == Keeping::kStochastic && type == StorageType::kFloat16) refuse_chance(place);
  const bool in_float32 = of_group.in_float32 || kept == Keeping::kMaster;

  // In its place at once, and not read again: a processor waits where it reads as one word, as to
  // copy it, what has just been written as several.
  static constexpr TensorRef kEmpty{};
  TensorRef& ref = tensors_.emplace_back(kEmpty);
  ref.param = p.data;
  ref.grad = g.data;
  ref.group = static_cast<int32_t>(place.group_index);
  ref.place = static_cast<int32_t>(position);
  ref.share = parameter.share;
  ref.first = parameter.first;
  ref.max_value = of_group.max_value;
  ref.type = type;
  ref.kept = kept;
  ref.state_type = in_float32 ? StorageType::kFloat32 : type;
  ref.ema_type = half && of_group.averages_in_float32 ? StorageType::kFloat32 : type;
  will_write(p.data, parameter.order.extent, p.dtype);

  // A device moves its schedules itself, and may meet another value than the host expects.
  const Rule& rule = group_reader_.rule();
  uint32_t live = updated_by == kHost ? of_group.live : of_group.live_on_device;
  if (kept != Keeping::kMaster) live &= ~(1u << kMasterSlot);
  const bool averages = is_live(live, kEmaSlot);
  ref.averages = averages;
  ref.staged = of_group.staged || averages || kept != Keeping::kNearest;
  const uint32_t of_rule = live & kRuleSlots;
  const bool with_step = of_rule != 0 && (rule.counts_steps || updated_by != kHost);
  Entries entries;
  uint32_t missing = find_state(parameter, live, with_step, entries);
  const bool has_begun = (of_rule & ~missing) != 0;
  if (rule.counts_steps && (missing >> kMaxSlots & 1u) != 0 && has_begun) {
    refuse("the state of " + describe(place) +
           " has no step, so that nothing says how many updates it has seen. Load the optimizer's "
           "state_dict again, or remove the state to start anew.");
  }
  if (const uint32_t lost = missing & rule.always_live;
      rule.counts_steps && lost != 0 && (has_begun || entries[kMaxSlots] != nullptr)) {
    int slot = 0;
    while ((lost >> slot & 1u) == 0) ++slot;
    refuse("the state of " + describe(place) + " has no " + rule.slot[slot] +
           ", which its other parts say that it has had. Load the optimizer's state_dict again, or "
           "remove the state to start anew.");
  }
  const bool has_slots = (missing & of_rule) == 0;
  // As on the host: whoever deletes a buffer there is has its parameter begin anew.
  if (with_step && !rule.counts_steps && !has_slots) missing |= 1u << kMaxSlots;
  ref.age = has_slots ? 1 : 0;
  Source& source = sources_.emplace_back();
  source.parameter = tensor;
  source.place = updated_by;
  if (missing == 0) {
    attach_state(place, parameter, entries, views, ref);
    set_source(source, entries);
  } else {
    const int64_t age = !rule.counts_steps && has_slots ? 1 : 0;
    new_state_.push_back({position,
                          tensors_.size() - 1,
                          place,
                          missing,
                          age,
                          in_float32,
                          views,
                          entries,
                          {},
                          Owned()});
  }
  const GroupReading& group = groups_[static_cast<size_t>(place.group_index)];
  if (group.large_options != 0) check_range(place, ref, updated_by);
  parameters_read_.push_back(std::move(held));
  if (memory != tensor) parameters_read_.push_back(std::move(held_memory));
  kept_alive_.push_back(std::move(grad));
}

bool Gathering::states_unchanged(PyObject* state) const {
  if (static_cast<size_t>(PyDict_Size(state)) != states_seen_.size()) return false;
  Py_ssize_t cursor = 0;
  PyObject *key, *value;
  for (const auto& seen : states_seen_) {
    if (!PyDict_Next(state, &cursor, &key, &value)) return false;
    if (seen.first != key || seen.second != value) return false;
  }
  return true;
}

// Of a parameter that is listed twice, a step would count one update and make two.
void Gathering::refuse_repeated(PyObject* param_groups) {
  std::unordered_set<PyObject*> seen;
  size_t position = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(param_groups); ++i) {
    PyObject* const group = PyList_GET_ITEM(param_groups, i);
    PyObject* const params = PyDict_GetItemWithError(group, names().params);
    for (Py_ssize_t j = 0; j < PyList_GET_SIZE(params); ++j, ++position) {
      if (seen.insert(parameters_[position].tensor).second) continue;
      parameters_.clear();  // so that the next step looks again
      refuse(describe(Place{group, i, j}) +
             " is in the parameter groups twice, where its state counts one update a step; list it "
             "once.");
    }
  }
}

// Brings the list of parameters and their state dicts up to date with the optimizer's.
void Gathering::synchronize(PyObject* param_groups, PyObject* state) {
  if (!PyList_Check(param_groups) || !PyDict_Check(state)) {
    throw std::invalid_argument("param_groups must be a list of dicts and state a dict");
  }
  size_t position = 0;
  bool changed = false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(param_groups); ++i) {
    PyObject* group = PyList_GET_ITEM(param_groups, i);
    PyObject* params =
        PyDict_Check(group) ? PyDict_GetItemWithError(group, names().params) : nullptr;
    if (params == nullptr || !PyList_Check(params)) {
      throw std::invalid_argument("parameter group " + std::to_string(i) +
                                  " must be a dict with a list of tensors under \"params\"");
    }
    for (Py_ssize_t j = 0; j < PyList_GET_SIZE(params); ++j, ++position) {
      PyObject* tensor = PyList_GET_ITEM(params, j);
      if (position == parameters_.size()) parameters_.emplace_back();
      if (parameters_[position].tensor == tensor) continue;
      parameters_[position] = Parameter();
      parameters_[position].tensor = tensor;
      changed = true;
    }
  }
  changed = changed || position != parameters_.size();
  parameters_.resize(position);
  if (changed && group_reader_.rule().counts_steps) refuse_repeated(param_groups);
  if (!changed && states_unchanged(state)) return;

  for (Parameter& parameter : parameters_) {
    PyObject* inner = PyDict_GetItemWithError(state, parameter.tensor);
    if (inner == nullptr && PyErr_Occurred()) throw PythonError();
    if (inner != nullptr && !PyDict_Check(inner)) {
      throw std::invalid_argument("the optimizer's state must hold a dict for each parameter");
    }
    parameter.state = inner;
  }
  states_seen_.clear();
  Py_ssize_t cursor = 0;
  PyObject *key, *value;
  while (PyDict_Next(state, &cursor, &key, &value)) states_seen_.emplace_back(key, value);
}

// Of sorted writes that do not meet each other.
bool Gathering::reads_what_another_writes(const Read& read) const {
  auto write = std::upper_bound(written_sorted_.begin(), written_sorted_.end(), read.bytes.first,
                                [](const char* at, const Bytes& w) { return at < w.second; });
  for (; write != written_sorted_.end() && write->first < read.bytes.second; ++write) {
    if (write->first != read.parameter) return true;
  }
  return false;
}

// Found anew only for what has moved, which gradients often do.
bool Gathering::in_order() {
  const bool moved = written_ != written_seen_;
  if (moved) {
    written_seen_ = written_;
    written_sorted_ = written_;
    std::sort(written_sorted_.begin(), written_sorted_.end());
    writes_meet_ = false;
    for (size_t i = 1; i < written_sorted_.size(); ++i) {
      writes_meet_ = writes_meet_ || written_sorted_[i].first < written_sorted_[i - 1].second;
    }
  }
  const bool all_anew = moved || in_order_ || gradients_at_.size() != read_seen_.size();
  if (!all_anew && gradients_at_ == read_seen_) return in_order_;
  in_order_ = writes_meet_;
  for (size_t i = 0; i < gradients_at_.size() && !in_order_; ++i) {
    if (all_anew || !(gradients_at_[i] == read_seen_[i])) {
      in_order_ = reads_what_another_writes(gradients_at_[i]);
    }
  }
  read_seen_ = gradients_at_;
  return in_order_;
}

// Whether a group's state_dtype or ema_dtype is float32.
bool Gathering::keeps_float32(PyObject* group, Py_ssize_t index, PyObject* key) const {
  PyObject* const dtype = PyDict_GetItemWithError(group, key);
  if (dtype == Py_None || dtype == float32_.get()) return dtype != Py_None;
  if (dtype == nullptr && PyErr_Occurred()) throw PythonError();
  refuse(std::string(PyUnicode_AsUTF8(key)) + " of parameter group " + std::to_string(index) +
         " must be None, which keeps state in its parameter's type, or torch.float32, got " +
         (dtype == nullptr ? "nothing" : text_of(dtype)));
}

void Gathering::read(PyObject* param_groups, PyObject* state) {
  may_copy_ = true;
  settled_.clear();
  gather_all(param_groups, state);
  if (copied_ && in_order()) {
    may_copy_ = false;
    gather_all(param_groups, state);
  }
  settled_.clear();
}

void Gathering::gather_all(PyObject* param_groups, PyObject* state) {
  clear();
  synchronize(param_groups, state);
  groups_ = group_reader_.read(param_groups);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(param_groups); ++i) {
    PyObject* const group = PyList_GET_ITEM(param_groups, i);
    traits_.push_back(traits_of(group, i, groups_[static_cast<size_t>(i)]));
  }
  size_t position = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(param_groups); ++i) {
    PyObject* group = PyList_GET_ITEM(param_groups, i);
    PyObject* const params = PyDict_GetItemWithError(group, names().params);
    for (Py_ssize_t j = 0; j < PyList_GET_SIZE(params); ++j, ++position) {
      if (position == parameters_.size() ||
          parameters_[position].tensor != PyList_GET_ITEM(params, j)) {
        break;
      }
      gather({group, i, j}, position);
    }
  }
  if (position != parameters_.size()) {
    throw std::runtime_error("the parameter groups have changed during the step");
  }
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

PyObject* Gathering::key_of(int entry) const {
  return entry == kMaxSlots ? names().step : keys_[static_cast<size_t>(entry)];
}

void Gathering::reserve_state(PyObject* state) {
  state_ = state;
  for (NewState& added : new_state_) {
    for (int k = 0; k < kMaxEntries; ++k) {
      if (!added.made[k]) continue;
      PyObject* found = PyDict_GetItemWithError(added.state.get(), key_of(k));
      if (found != nullptr) continue;  // None, which stands for no tensor
      if (PyErr_Occurred() || PyDict_SetItem(added.state.get(), key_of(k), Py_None) != 0) {
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
      if (PyDict_SetItem(added.state.get(), key_of(k), added.made[k].get()) != 0) {
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
      if ((added.room >> k & 1u) != 0) PyDict_DelItem(added.state.get(), key_of(k));
    }
    PyErr_Clear();
    added.room = 0;
    added.has_room = false;
  }
}

Owned Gathering::take_parameters() {
  Owned list = checked(PyList_New(static_cast<Py_ssize_t>(parameters_read_.size())));
  for (size_t i = 0; i < parameters_read_.size(); ++i) {
    PyList_SET_ITEM(list.get(), static_cast<Py_ssize_t>(i), parameters_read_[i].release());
  }
  return list;
}

void Gathering::clear() {
  if (!new_state_.empty()) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);  // what stopped the step
    take_back_room();
    PyErr_Restore(type, value, traceback);
  }
  groups_.clear();
  traits_.clear();
  tensors_.clear();
  sources_.clear();
  layouts_.clear();
  new_state_.clear();
  parameters_read_.clear();
  kept_alive_.clear();
  written_.clear();
  gradients_at_.clear();
  copied_ = false;
  reader_.clear();
}

}  // namespace fastlr

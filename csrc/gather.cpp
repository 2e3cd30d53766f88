#include "gather.h"

#include <cmath>
#include <optional>
#include <stdexcept>
#include <unordered_set>

#include "build_info.h"
#include "messages.h"

namespace fastlr {
namespace {

struct Names {
  PyObject* params = PyUnicode_InternFromString("params");
  PyObject* state_dtype = PyUnicode_InternFromString("state_dtype");
  PyObject* ema_dtype = PyUnicode_InternFromString("ema_dtype");
};

const Names& names() {
  static const Names all;
  return all;
}

}  // namespace

std::string Gathering::Place::describe() const {
  std::string result =
      "parameter " + std::to_string(index) + " of group " + std::to_string(group_index);
  PyObject* const param_names = PyDict_GetItemString(group, "param_names");
  if (param_names != nullptr && PyList_Check(param_names) && index < PyList_GET_SIZE(param_names)) {
    result += " (" + str_of(PyList_GET_ITEM(param_names, index)) + ")";
  }
  PyObject* const params = PyDict_GetItemWithError(group, names().params);
  return result + ", shape " + shape_of(PyList_GET_ITEM(params, index));
}

Gathering::Gathering(PyObject* runtime, const Groups& reader)
    : runtime_(runtime),
      float32_(checked(PyObject_GetAttrString(runtime, "float32"))),
      group_reader_(reader),
      shares_(runtime) {
  for (int k = 0; k < kMaxEntries; ++k) {
    const char* const name = k == kMaxSlots ? "step" : reader.rule().slot[k];
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
  const std::string reason = str_of(value);
  const Owned layout(PyObject_GetAttrString(tensor, "layout"));
  const std::string layout_name = str_of(layout.get());
  PyErr_Clear();
  if (!layout) {
    refuse(std::string("the ") + what + " of " + place.describe() + " must be a tensor, got a " +
           Py_TYPE(tensor)->tp_name + ".");
  }
  if (layout_name != "torch.strided") {
    refuse(std::string("the ") + what + " of " + place.describe() + " has layout " + layout_name +
           ", fastlr updates dense tensors only. Make it dense (nn.Embedding(..., sparse=False), "
           "grad.to_dense()), or give this parameter to another optimizer.");
  }
  if (has_no_values(tensor)) {
    refuse(std::string("the ") + what + " of " + place.describe() +
           " is a meta or fake tensor without memory, and the parameter is not.");
  }
  refuse(std::string("cannot read the ") + what + " of " + place.describe() + ": " + reason);
}

void Gathering::classify(Parameter& parameter, const TensorView& view, const Place& place) const {
  parameter.dtype = {0, 0, 0};  // until everything below holds
  StorageType type;
  if (!storage_type(view.dtype, type)) {
    refuse(place.describe() + " has " + type_name(view.dtype) +
           "; supported are float16, bfloat16, float32, float64 and the complex types.");
  }
  const MemoryOrder order = memory_order(view);
  if (order.overlapping) {
    refuse(place.describe() +
           " has elements that share memory (an expanded or overlapping view), so they cannot be "
           "updated one by one; give the optimizer a clone() of it.");
  }
  parameter.shape.assign(view.shape, view.shape + view.ndim);
  parameter.strides.assign(view.strides, view.strides + view.ndim);
  parameter.order = order;
  parameter.dtype = view.dtype;
}

// The tensor that has the memory of one of a parameter's; refused where that is not cut as the
// parameter is.
PyObject* Gathering::memory_of(const Place& place, const Parameter& parameter, PyObject* tensor,
                               int of, const char* what) const {
  const TensorReader::Part part = TensorReader::part(tensor);
  if (cut_alike(parameter.cut, part.spec, of)) return part.local != nullptr ? part.local : tensor;
  const auto described = [](PyObject* spec) {
    return spec == nullptr ? std::string("a plain tensor") : "a DTensor, " + str_of(spec);
  };
  refuse(
      std::string("the ") + what + " of " + place.describe() + " is " + described(part.spec) +
      ", and the parameter " + described(parameter.cut.spec.get()) +
      ". Shard the model before building the optimizer, or load the optimizer's state_dict again "
      "after it.");
}

// A gradient that is cut as its parameter is: where a DTensor's is not, or is still on its way,
// processes exchange what they have.
Owned Gathering::settled(const Parameter& parameter, size_t position, Owned gradient) {
  const TensorReader::Part part = TensorReader::part(gradient.get());
  if (!parameter.cut.spec || part.local == nullptr) return gradient;  // memory_of() judges
  if (cut_alike(parameter.cut, part.spec, kOfGradient) && TensorReader::is_plain(part.local)) {
    return gradient;
  }
  Owned& exchanged = settled_[position];
  if (!exchanged) {
    exchanged = checked(
        PyObject_CallMethod(runtime_, "redistributed", "OO", gradient.get(), parameter.tensor));
  }
  return Owned::borrow(exchanged.get());
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

// Refuses numbers that would make a parameter infinite, or keep it from moving. updated_by: a
// device's age is not known; there the corrections for bias, which end, are left out.
void Gathering::check_range(const Place& place, const TensorRef& ref, int updated_by) const {
  const GroupReading& group = groups_[static_cast<size_t>(place.group_index)];
  const bool in_double = ref.type == StorageType::kFloat64;
  const int64_t age = updated_by == kHost ? ref.age : int64_t{1} << 62;
  if (group_reader_.rule().in_range(group.options, age, in_double)) return;
  const std::string type = in_double ? "float64" : "float32";
  refuse(group_reader_.large_options(group, place.group_index) + " leads beyond the range of " +
         type + ", in which " + place.describe() + " is computed; give it a smaller one" +
         (in_double ? "." : ", or make it float64."));
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
  refuse(place.describe() + " is on " + device_name(p.device) + ", but " + reason + ".");
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
    refuse("the gradient of " + place.describe() +
           " shares memory with the parameter, at other places than its own elements'; give it a "
           "clone() of the gradient.");
  }
}

void Gathering::refuse_chance(const Place& place) const {
  refuse("stochastic_rounding is for bfloat16, and " + place.describe() +
         " has float16; give its group master_weights=True instead.");
}

void Gathering::gather(const Place& place, size_t position) {
  Parameter& parameter = parameters_[position];
  PyObject* tensor = parameter.tensor;
  Owned held = Owned::borrow(tensor);  // a getter of gradients may be anybody's code
  const TensorReader::Part part = TensorReader::part(tensor);
  if (part.spec != parameter.cut.spec.get() && !shares_.find(tensor, part.spec, parameter.cut)) {
    refuse(place.describe() + " is cut in another way than those before it, which are cut in " +
           std::to_string(kMaxShares) + " ways, the most of an optimizer; give it one of its own.");
  }
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
    refuse(place.describe() + " is a " + Py_TYPE(tensor)->tp_name +
           " without memory of its own (a FakeTensor or other wrapper); give the optimizer plain "
           "tensors or DTensors.");
  }
  grad = settled(parameter, position, std::move(grad));
  grad = Owned::borrow(memory_of(place, parameter, grad.get(), kOfGradient, "gradient"));
  g = read_tensor(grad.get(), "gradient", place);
  if (!same(p.dtype, g.dtype)) {
    refuse("the gradient of " + place.describe() + " has " + type_name(g.dtype) +
           " and the parameter " + type_name(p.dtype) + "; convert the gradient.");
  }
  if (!same(p.device, g.device)) {
    refuse("the gradient of " + place.describe() + " is on " + device_name(g.device) +
           " and the parameter on " + device_name(p.device) + ".");
  }
  if (!same_shape(p, g)) {
    refuse("the gradient of " + place.describe() + " has shape " + shape_of(grad.get()) + ".");
  }
  if (g.data == nullptr && parameter.order.numel > 0) {
    refuse("the gradient of " + place.describe() + " is a " + Py_TYPE(grad.get())->tp_name +
           " without plain memory of its own.");
  }
  if (may_be_lazy(p, parameter.order.numel, parameter.order.dense) &&
      TensorReader::is_lazy(memory)) {
    refuse(place.describe() +
           " is a lazily conjugated or negated view; give the optimizer a parameter made from "
           "resolve_conj().resolve_neg().");
  }
  see_gradient(parameter, views);
  if (may_be_lazy(g, parameter.order.numel, parameter.order.dense && views.alike) &&
      TensorReader::is_lazy(grad.get())) {
    grad = checked(PyObject_CallMethod(grad.get(), "resolve_conj", nullptr));
    grad = checked(PyObject_CallMethod(grad.get(), "resolve_neg", nullptr));
    g = read_tensor(grad.get(), "gradient", place);
    see_gradient(parameter, views);
  }

  check_gradient_memory(place, parameter, views);
  overlaps_.reads(g.data, bytes(views.extent, g.dtype), p.data);

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
  ref.share = parameter.cut.share;
  ref.first = parameter.cut.first;
  ref.max_value = of_group.max_value;
  ref.type = type;
  ref.kept = kept;
  ref.state_type = in_float32 ? StorageType::kFloat32 : type;
  ref.ema_type = half && of_group.averages_in_float32 ? StorageType::kFloat32 : type;
  overlaps_.writes(p.data, bytes(parameter.order.extent, p.dtype));

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
    refuse("the state of " + place.describe() +
           " has no step, so that nothing says how many updates it has seen. Load the optimizer's "
           "state_dict again, or remove the state to start anew.");
  }
  if (const uint32_t lost = missing & rule.always_live;
      rule.counts_steps && lost != 0 && (has_begun || entries[kMaxSlots] != nullptr)) {
    int slot = 0;
    while ((lost >> slot & 1u) == 0) ++slot;
    refuse("the state of " + place.describe() + " has no " + rule.slot[slot] +
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
      refuse(Place{group, i, j}.describe() +
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

// Whether a group's state_dtype or ema_dtype is float32.
bool Gathering::keeps_float32(PyObject* group, Py_ssize_t index, PyObject* key) const {
  PyObject* const dtype = PyDict_GetItemWithError(group, key);
  if (dtype == Py_None || dtype == float32_.get()) return dtype != Py_None;
  if (dtype == nullptr && PyErr_Occurred()) throw PythonError();
  refuse(std::string(PyUnicode_AsUTF8(key)) + " of parameter group " + std::to_string(index) +
         " must be None, which keeps state in its parameter's type, or torch.float32, got " +
         (dtype == nullptr ? "nothing" : str_of(dtype)));
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
  overlaps_.clear();
  copied_ = false;
  reader_.clear();
}

}  // namespace fastlr

#include "gather.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "build_info.h"

namespace fastlr {
namespace {

struct Names {
  PyObject* params = PyUnicode_InternFromString("params");
  PyObject* momentum_buffer = PyUnicode_InternFromString("momentum_buffer");
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

void Gathering::set_layout(const Place& place, const Parameter& parameter, const TensorView& p,
                           const TensorView& g, const TensorView* m, TensorRef& ref) {
  ref.numel = parameter.order.numel * (is_complex(p.dtype) ? 2 : 1);
  ref.layout = -1;
  if (parameter.order.numel <= 1) return;
  if (parameter.order.dense && same_order(p, g) && (m == nullptr || same_order(p, *m))) return;
  StridedLayout layout;
  if (!strided_layout(p, g, m, layout)) {
    refuse(describe(place) + " has more than " + std::to_string(kMaxDims) +
           " dimensions and lies in another order than its gradient or momentum.");
  }
  ref.layout = static_cast<int32_t>(layouts_.size());
  layouts_.push_back(layout);
}

// Meta and fake tensors. To be called without a Python error set.
bool Gathering::has_no_values(PyObject* tensor) const {
  return checked(PyObject_CallMethod(runtime_, "has_no_values", "O", tensor)).get() == Py_True;
}

// Notes memory that the step will write.
void Gathering::will_write(const void* data, int64_t extent, dlpack::DataType type) {
  if (extent == 0) return;
  const char* begin = static_cast<const char*>(data);
  written_.emplace_back(begin, begin + extent * (type.bits / 8));
}

void Gathering::attach_momentum(const Place& place, const Parameter& parameter, PyObject* buffer,
                                const TensorView& p, const TensorView& g, TensorRef& ref) {
  TensorView m = read_tensor(buffer, "momentum_buffer", place);
  if (!same_shape(p, m)) {
    refuse("the momentum_buffer of " + describe(place) + " has shape " + shape_of(buffer) + ".");
  }
  if (!same(p.device, m.device)) {
    refuse(
        "the momentum_buffer of " + describe(place) + " is on " + device_name(m.device) +
        " and the parameter on " + device_name(p.device) +
        ". Move the model before building the optimizer, or load the optimizer's state_dict again "
        "after moving it.");
  }
  const bool fits = storage_type(m.dtype, ref.momentum_type) &&
                    is_complex(m.dtype) == is_complex(p.dtype) &&
                    (ref.momentum_type == ref.type || ref.momentum_type == StorageType::kFloat32);
  if (!fits) {
    refuse("the momentum_buffer of " + describe(place) + " has " + type_name(m.dtype) +
           "; a parameter of " + type_name(p.dtype) +
           " takes its own type or float32. Load the optimizer's state_dict again to convert it.");
  }
  if (is_complex(m.dtype) && is_lazy(buffer)) {
    refuse("the momentum_buffer of " + describe(place) +
           " is a lazily conjugated view; replace it by momentum_buffer.resolve_conj().");
  }
  if (m.data == nullptr && parameter.order.numel > 0) {
    refuse("the momentum_buffer of " + describe(place) + " has no memory of its own.");
  }
  ref.momentum = m.data;
  set_layout(place, parameter, p, g, &m, ref);
  int64_t extent = parameter.order.extent;
  if (!same_order(p, m)) {
    const MemoryOrder order = memory_order(m);
    if (order.overlapping) {
      refuse("the momentum_buffer of " + describe(place) +
             " has elements that share memory; replace it by a clone() of it.");
    }
    extent = order.extent;
  }
  const int64_t gradient_extent =
      same_order(p, g) ? parameter.order.extent : memory_order(g).extent;
  if (!apart(m, extent, g, gradient_extent) && (!same(m.dtype, g.dtype) || share_elements(m, g))) {
    refuse("the gradient of " + describe(place) +
           " shares memory with its own momentum_buffer; give it a clone() of the gradient.");
  }
  will_write(m.data, extent, m.dtype);
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

// The parameter's buffer, borrowed, or nullptr.
PyObject* Gathering::momentum_buffer(const Parameter& parameter) const {
  if (parameter.state == nullptr) return nullptr;
  PyObject* buffer = PyDict_GetItemWithError(parameter.state, names().momentum_buffer);
  if (buffer == nullptr && PyErr_Occurred()) throw PythonError();
  return buffer == Py_None ? nullptr : buffer;
}

// A step of a parameter without values, as memory estimators and deferred initialisation make it:
// it gets a buffer of its kind, and nothing is computed.
void Gathering::gather_shape(const Place& place, size_t position) {
  const Parameter& parameter = parameters_[position];
  const GroupReading& group = groups_[static_cast<size_t>(place.group_index)];
  const uint32_t live = group_reader_.rule().live_slots(group.options, 0);
  if (live != 0 && momentum_buffer(parameter) == nullptr) {
    new_momenta_.push_back({position, kNoTensor, place, {}, {}, Owned(), Owned(), Room::kNone});
  }
  parameters_read_.push_back(Owned::borrow(parameter.tensor));
}

// Refuses a gradient that has elements in common with its own parameter, as the order of reads and
// writes would decide the result; all of them, each at its own place, are fine. Returns how far the
// gradient's elements reach.
int64_t Gathering::check_gradient_memory(const Place& place, const Parameter& parameter,
                                         const TensorView& p, const TensorView& g) const {
  const bool alike = same_order(p, g);
  const int64_t extent = alike ? parameter.order.extent : memory_order(g).extent;
  const bool same_places = alike && p.data == g.data;
  if (!same_places && !apart(p, parameter.order.extent, g, extent) && share_elements(p, g)) {
    refuse("the gradient of " + describe(place) +
           " shares memory with the parameter, at other places than its own elements'; give it a "
           "clone() of the gradient.");
  }
  return extent;
}

void Gathering::gather(const Place& place, size_t position) {
  Parameter& parameter = parameters_[position];
  PyObject* tensor = parameter.tensor;
  Owned held = Owned::borrow(tensor);  // a getter of gradients may be anybody's code
  Owned grad = checked(reader_.gradient(tensor));
  if (grad.get() == Py_None) return;

  TensorView p;
  const bool readable = reader_.read(tensor, p);
  if (!readable || p.data == nullptr) {
    PyErr_Clear();
    if (has_no_values(tensor)) return gather_shape(place, position);
    if (!readable) p = read_tensor(tensor, "data", place);  // says why
  }
  if (!same(p.dtype, parameter.dtype) || static_cast<size_t>(p.ndim) != parameter.shape.size() ||
      !same_numbers(p.shape, parameter.shape.data(), p.ndim) ||
      !same_numbers(p.strides, parameter.strides.data(), p.ndim)) {
    classify(parameter, p, place);
  }
  const int updated_by = updated_on(p, place);
  if (p.data == nullptr && parameter.order.numel > 0) {
    refuse(
        describe(place) + " is a " + Py_TYPE(tensor)->tp_name +
        " without memory of its own (a DTensor, FakeTensor or other wrapper); give the optimizer "
        "the local tensors.");
  }
  TensorView g = read_tensor(grad.get(), "gradient", place);
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
  if (may_be_lazy(p, parameter.order.numel, parameter.order.dense) && is_lazy(tensor)) {
    refuse(describe(place) +
           " is a lazily conjugated or negated view; give the optimizer a parameter made from "
           "resolve_conj().resolve_neg().");
  }
  if (may_be_lazy(g, parameter.order.numel, parameter.order.dense && same_order(p, g)) &&
      is_lazy(grad.get())) {
    grad = checked(PyObject_CallMethod(grad.get(), "resolve_conj", nullptr));
    grad = checked(PyObject_CallMethod(grad.get(), "resolve_neg", nullptr));
    g = read_tensor(grad.get(), "gradient", place);
  }

  const int64_t gradient_extent = check_gradient_memory(place, parameter, p, g);
  if (gradient_extent != 0) {
    const char* const begin = static_cast<const char*>(g.data);
    gradients_at_.push_back(
        {{begin, begin + gradient_extent * (g.dtype.bits / 8)}, static_cast<const char*>(p.data)});
  }

  if (may_copy_ && updated_by != kHost && parameter.order.dense && !same_order(p, g)) {
    copied_ = true;
    grad = checked(PyObject_CallMethod(runtime_, "gradient_like", "OO", tensor, grad.get()));
    g = read_tensor(grad.get(), "gradient", place);
  }

  TensorRef ref{};
  ref.param = p.data;
  ref.grad = g.data;
  ref.group = static_cast<int32_t>(place.group_index);
  storage_type(p.dtype, ref.type);
  ref.momentum_type = ref.type;
  will_write(p.data, parameter.order.extent, p.dtype);

  // A device moves its momentum itself, and may meet another value than the host expects.
  const GroupReading& group = groups_[static_cast<size_t>(place.group_index)];
  const uint32_t driven = updated_by == kHost ? 0 : group.driven_options;
  const bool has_momentum = group_reader_.rule().live_slots(group.options, driven) != 0;
  PyObject* buffer = nullptr;
  if (!has_momentum) {
    set_layout(place, parameter, p, g, nullptr, ref);
  } else {
    buffer = momentum_buffer(parameter);
    if (buffer == nullptr) {
      ref.first = true;
      new_momenta_.push_back(
          {position, tensors_.size(), place, p, g, Owned(), Owned(), Room::kNone});
    } else {
      attach_momentum(place, parameter, buffer, p, g, ref);
      kept_alive_.push_back(Owned::borrow(buffer));
    }
  }
  tensors_.push_back(ref);
  sources_.push_back({tensor, updated_by, buffer});
  parameters_read_.push_back(std::move(held));
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

void Gathering::read(PyObject* param_groups, PyObject* state) {
  may_copy_ = true;
  gather_all(param_groups, state);
  if (!copied_ || !in_order()) return;
  may_copy_ = false;
  gather_all(param_groups, state);
}

void Gathering::gather_all(PyObject* param_groups, PyObject* state) {
  clear();
  synchronize(param_groups, state);
  groups_ = group_reader_.read(param_groups);
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

void Gathering::add_momenta() {
  for (NewMomentum& added : new_momenta_) {
    const Parameter& parameter = parameters_[added.parameter];
    added.buffer = checked(
        PyObject_CallMethod(runtime_, "new_momentum", "OO", parameter.tensor, added.place.group));
    if (added.tensor != kNoTensor) {
      attach_momentum(added.place, parameter, added.buffer.get(), added.param_view, added.grad_view,
                      tensors_[added.tensor]);
      sources_[added.tensor].momentum = added.buffer.get();
    }
    added.state =
        parameter.state != nullptr ? Owned::borrow(parameter.state) : checked(PyDict_New());
  }
}

void Gathering::reserve_momenta(PyObject* state) {
  state_ = state;
  for (NewMomentum& added : new_momenta_) {
    PyObject* found = PyDict_GetItemWithError(added.state.get(), names().momentum_buffer);
    if (found != nullptr) continue;  // None, which stands for no buffer
    if (PyErr_Occurred() ||
        PyDict_SetItem(added.state.get(), names().momentum_buffer, Py_None) != 0) {
      throw PythonError();
    }
    const Parameter& parameter = parameters_[added.parameter];
    added.room = Room::kKey;
    if (parameter.state != nullptr) continue;
    added.room = Room::kDict;  // a tensor's hash is Python code, which Ctrl-C can stop at any time
    if (PyObject_SetItem(state, parameter.tensor, added.state.get()) != 0) throw PythonError();
  }
}

void Gathering::store_momenta() {
  for (NewMomentum& added : new_momenta_) {
    if (PyDict_SetItem(added.state.get(), names().momentum_buffer, added.buffer.get()) != 0) {
      throw PythonError();
    }
    added.room = Room::kNone;
  }
}

void Gathering::take_back_room() {
  for (NewMomentum& added : new_momenta_) {
    if (added.room == Room::kKey) {
      PyDict_DelItem(added.state.get(), names().momentum_buffer);
    } else if (added.room == Room::kDict) {
      PyObject* const parameter = parameters_[added.parameter].tensor;
      // Once more where another Ctrl-C stops it: the step raises anyway.
      if (PyObject_DelItem(state_, parameter) != 0 && !PyErr_ExceptionMatches(PyExc_KeyError)) {
        PyErr_Clear();
        PyObject_DelItem(state_, parameter);
      }
    }
    PyErr_Clear();
    added.room = Room::kNone;
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
  if (!new_momenta_.empty()) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);  // what stopped the step
    take_back_room();
    PyErr_Restore(type, value, traceback);
  }
  groups_.clear();
  tensors_.clear();
  sources_.clear();
  layouts_.clear();
  new_momenta_.clear();
  parameters_read_.clear();
  kept_alive_.clear();
  written_.clear();
  gradients_at_.clear();
  copied_ = false;
  reader_.clear();
}

}  // namespace fastlr

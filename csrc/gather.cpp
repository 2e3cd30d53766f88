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
  will_write(m.data, extent, m.dtype);
}

int Gathering::updated_on(const TensorView& p, const Place& place) const {
  const std::optional<int> found = place_of(p.device, static_cast<size_t>(place.group_index));
  if (found) return *found;
#if defined(FASTLR_HAS_CUDA)
  const std::string reason = "fastlr updates tensors on the CPU and on CUDA devices";
#else
  const std::string reason =
      "this build of fastlr updates tensors on the CPU only: " + std::string(kCudaStatus);
#endif
  refuse(describe(place) + " is on " + device_name(p.device) + ", but " + reason + ".");
}

void Gathering::gather(const Place& place, size_t position) {
  Parameter& parameter = parameters_[position];
  PyObject* tensor = parameter.tensor;
  Owned grad = checked(reader_.gradient(tensor));
  if (grad.get() == Py_None) return;

  const TensorView p = read_tensor(tensor, "data", place);
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

  if (updated_by != kHost && parameter.order.dense && !same_order(p, g)) {
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
  const bool has_momentum =
      group.options.momentum != 0.0 || (updated_by != kHost && group.momentum.owner != nullptr);
  PyObject* buffer = nullptr;
  if (!has_momentum) {
    set_layout(place, parameter, p, g, nullptr, ref);
  } else {
    if (parameter.state) {
      buffer = PyDict_GetItemWithError(parameter.state, names().momentum_buffer);
      if (buffer == nullptr && PyErr_Occurred()) throw PythonError();
    }
    if (buffer == nullptr || buffer == Py_None) {
      ref.first = true;
      buffer = nullptr;
      new_momenta_.push_back({position, tensors_.size(), place, p, g, Owned(), Owned()});
    } else {
      attach_momentum(place, parameter, buffer, p, g, ref);
      kept_alive_.push_back(Owned::borrow(buffer));
    }
  }
  tensors_.push_back(ref);
  sources_.push_back({tensor, updated_by, buffer});
  parameters_read_.push_back(Owned::borrow(tensor));
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

// Found anew only when any of the memory has moved.
bool Gathering::writes_overlap() {
  if (written_ == written_seen_) return overlap_seen_;
  written_seen_ = written_;
  std::sort(written_.begin(), written_.end());
  overlap_seen_ = false;
  for (size_t i = 1; i < written_.size(); ++i) {
    overlap_seen_ = overlap_seen_ || written_[i].first < written_[i - 1].second;
  }
  return overlap_seen_;
}

void Gathering::read(PyObject* param_groups, PyObject* state) {
  clear();
  synchronize(param_groups, state);
  groups_ = read_groups(param_groups, native_of_);
  size_t position = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(param_groups); ++i) {
    PyObject* group = PyList_GET_ITEM(param_groups, i);
    const Py_ssize_t size = PyList_GET_SIZE(PyDict_GetItemWithError(group, names().params));
    for (Py_ssize_t j = 0; j < size; ++j, ++position) gather({group, i, j}, position);
  }
}

void Gathering::add_momenta() {
  for (NewMomentum& added : new_momenta_) {
    const Parameter& parameter = parameters_[added.parameter];
    added.buffer = checked(
        PyObject_CallMethod(runtime_, "new_momentum", "OO", parameter.tensor, added.place.group));
    attach_momentum(added.place, parameter, added.buffer.get(), added.param_view, added.grad_view,
                    tensors_[added.tensor]);
    sources_[added.tensor].momentum = added.buffer.get();
    added.state =
        parameter.state != nullptr ? Owned::borrow(parameter.state) : checked(PyDict_New());
  }
}

void Gathering::store_momenta(PyObject* state) {
  for (const NewMomentum& added : new_momenta_) {
    if (PyDict_SetItem(added.state.get(), names().momentum_buffer, added.buffer.get()) != 0 ||
        PyObject_SetItem(state, parameters_[added.parameter].tensor, added.state.get()) != 0) {
      throw PythonError();
    }
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
  groups_.clear();
  tensors_.clear();
  sources_.clear();
  layouts_.clear();
  new_momenta_.clear();
  parameters_read_.clear();
  kept_alive_.clear();
  written_.clear();
  reader_.clear();
}

}  // namespace fastlr

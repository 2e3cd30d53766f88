#include "plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "build_info.h"
#include "cpu/float_environment.h"
#include "cpu/step_cpu.h"

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

SgdPlan::SgdPlan(PyObject* allocate, NativeOf native_of)
    : allocate_(Owned::borrow(allocate)), native_of_(native_of) {}

TensorView SgdPlan::read(PyObject* tensor, const char* what, const Place& place) {
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

void SgdPlan::classify(Parameter& parameter, const TensorView& view, const Place& place) const {
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

void SgdPlan::set_layout(const Place& place, const Parameter& parameter, const TensorView& p,
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
void SgdPlan::will_write(const void* data, int64_t extent, dlpack::DataType type) {
  if (extent == 0) return;
  const char* begin = static_cast<const char*>(data);
  written_.emplace_back(begin, begin + extent * (type.bits / 8));
}

void SgdPlan::attach_momentum(const Place& place, const Parameter& parameter, PyObject* buffer,
                              const TensorView& p, const TensorView& g, TensorRef& ref) {
  TensorView m = read(buffer, "momentum_buffer", place);
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

void SgdPlan::gather(const Place& place, size_t position, bool has_momentum) {
  Parameter& parameter = parameters_[position];
  PyObject* tensor = parameter.tensor;
  Owned grad = checked(reader_.gradient(tensor));
  if (grad.get() == Py_None) return;

  const TensorView p = read(tensor, "data", place);
  if (!same(p.dtype, parameter.dtype) || static_cast<size_t>(p.ndim) != parameter.shape.size() ||
      !same_numbers(p.shape, parameter.shape.data(), p.ndim) ||
      !same_numbers(p.strides, parameter.strides.data(), p.ndim)) {
    classify(parameter, p, place);
  }
  if (p.device.type != dlpack::kCpu) {
    refuse(describe(place) + " is on " + device_name(p.device) +
           ", but this build of fastlr updates tensors on the CPU only: " + kCudaStatus + ".");
  }
  if (p.data == nullptr && parameter.order.numel > 0) {
    refuse(
        describe(place) + " is a " + Py_TYPE(tensor)->tp_name +
        " without memory of its own (a DTensor, FakeTensor or other wrapper); give the optimizer "
        "the local tensors.");
  }
  TensorView g = read(grad.get(), "gradient", place);
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
    g = read(grad.get(), "gradient", place);
  }

  TensorRef ref{};
  ref.param = p.data;
  ref.grad = g.data;
  ref.group = static_cast<int32_t>(place.group_index);
  storage_type(p.dtype, ref.type);
  ref.momentum_type = ref.type;
  will_write(p.data, parameter.order.extent, p.dtype);

  if (!has_momentum) {
    set_layout(place, parameter, p, g, nullptr, ref);
  } else {
    PyObject* buffer = nullptr;
    if (parameter.state) {
      buffer = PyDict_GetItemWithError(parameter.state, names().momentum_buffer);
      if (buffer == nullptr && PyErr_Occurred()) throw PythonError();
    }
    if (buffer == nullptr || buffer == Py_None) {
      ref.first = true;
      new_momenta_.push_back({position, tensors_.size(), place, p, g, Owned()});
    } else {
      attach_momentum(place, parameter, buffer, p, g, ref);
      kept_alive_.push_back(Owned::borrow(buffer));
    }
  }
  tensors_.push_back(ref);
  updated_.push_back(Owned::borrow(tensor));
  kept_alive_.push_back(std::move(grad));
}

bool SgdPlan::states_unchanged(PyObject* state) const {
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
void SgdPlan::synchronize(PyObject* param_groups, PyObject* state) {
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

// Whether two of the step's writes touch the same memory; found anew only when any of it has moved.
bool SgdPlan::written_memory_overlaps() {
  if (written_ == written_seen_) return overlap_seen_;
  written_seen_ = written_;
  std::sort(written_.begin(), written_.end());
  overlap_seen_ = false;
  for (size_t i = 1; i < written_.size(); ++i) {
    overlap_seen_ = overlap_seen_ || written_[i].first < written_[i - 1].second;
  }
  return overlap_seen_;
}

void SgdPlan::forget_step() {
  tensors_.clear();
  layouts_.clear();
  groups_.clear();
  new_momenta_.clear();
  updated_.clear();
  kept_alive_.clear();
  written_.clear();
  reader_.clear();
}

PyObject* SgdPlan::step(PyObject* param_groups, PyObject* state, float inverse_scale, int threads) {
  if (stepping_) {
    throw std::runtime_error(
        "step() is already running on this optimizer, in another thread or further up the stack");
  }
  struct Stepping {
    explicit Stepping(SgdPlan& p) : plan(p) { plan.stepping_ = true; }
    ~Stepping() {
      plan.forget_step();
      plan.stepping_ = false;
    }
    SgdPlan& plan;
  } const stepping(*this);
  return run(param_groups, state, inverse_scale, threads);
}

PyObject* SgdPlan::run(PyObject* param_groups, PyObject* state, float inverse_scale, int threads) {
  synchronize(param_groups, state);
  size_t position = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(param_groups); ++i) {
    PyObject* group = PyList_GET_ITEM(param_groups, i);
    const SgdOptions options = read_group(group, i, native_of_);
    {
      const DefaultFloatEnvironment environment;
      groups_.push_back({sgd_scalars<float>(options, inverse_scale),
                         sgd_scalars<double>(options, inverse_scale)});
    }
    const Py_ssize_t size = PyList_GET_SIZE(PyDict_GetItemWithError(group, names().params));
    for (Py_ssize_t j = 0; j < size; ++j, ++position) {
      gather({group, i, j}, position, options.momentum != 0.0);
    }
  }
  for (NewMomentum& added : new_momenta_) {
    const Parameter& parameter = parameters_[added.parameter];
    added.buffer = checked(PyObject_CallFunctionObjArgs(allocate_.get(), parameter.tensor,
                                                        added.place.group, nullptr));
    attach_momentum(added.place, parameter, added.buffer.get(), added.param_view, added.grad_view,
                    tensors_[added.tensor]);
  }
  std::vector<Owned>
      new_states;  // the dicts that the new buffers go to, made while nothing is written
  for (const NewMomentum& added : new_momenta_) {
    PyObject* tensor = parameters_[added.parameter].tensor;
    Owned inner(PyObject_GetItem(state, tensor));  // a defaultdict adds an empty one
    if (!inner) {
      if (!PyErr_ExceptionMatches(PyExc_KeyError)) throw PythonError();
      PyErr_Clear();
      inner = checked(PyDict_New());
      if (PyObject_SetItem(state, tensor, inner.get()) != 0) throw PythonError();
    }
    new_states.push_back(std::move(inner));
  }
  const bool serial = written_memory_overlaps();
  Owned updated = checked(PyList_New(static_cast<Py_ssize_t>(updated_.size())));
  for (size_t i = 0; i < updated_.size(); ++i) {
    PyList_SET_ITEM(updated.get(), static_cast<Py_ssize_t>(i), updated_[i].release());
  }

  Py_BEGIN_ALLOW_THREADS;
  step_cpu(tensors_, layouts_, groups_, threads, serial);
  Py_END_ALLOW_THREADS;

  for (size_t i = 0; i < new_momenta_.size(); ++i) {
    if (PyDict_SetItem(new_states[i].get(), names().momentum_buffer,
                       new_momenta_[i].buffer.get()) != 0) {
      throw PythonError();
    }
  }
  advance_groups(param_groups, 1, 0, native_of_);
  return updated.release();
}

}  // namespace fastlr

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

bool is_complex(dlpack::DataType type) { return type.code == dlpack::kComplex; }

bool same(dlpack::DataType a, dlpack::DataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

bool same(dlpack::Device a, dlpack::Device b) { return a.type == b.type && a.id == b.id; }

// The type of a tensor's real numbers; false where there is no kernel for it.
bool storage_type(dlpack::DataType type, StorageType& out) {
  const int bits = is_complex(type) ? type.bits / 2 : type.bits;
  if (type.lanes != 1) return false;
  if (type.code == dlpack::kBfloat && bits == 16) {
    out = StorageType::kBFloat16;
    return true;
  }
  if (type.code != dlpack::kFloat && type.code != dlpack::kComplex) return false;
  switch (bits) {
    case 16:
      out = StorageType::kFloat16;
      return true;
    case 32:
      out = StorageType::kFloat32;
      return true;
    case 64:
      out = StorageType::kFloat64;
      return true;
    default:
      return false;
  }
}

// A loop, as there are few dimensions and std::equal would call memcmp for each.
bool same_numbers(const int64_t* a, const int64_t* b, int32_t count) {
  for (int32_t i = 0; i < count; ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

bool same_shape(const TensorView& a, const TensorView& b) {
  return a.ndim == b.ndim && same_numbers(a.shape, b.shape, a.ndim);
}

// Whether two tensors of one shape lie in memory in one order. Strides of dimensions of size one,
// which are never taken, may differ.
bool same_order(const TensorView& a, const TensorView& b) {
  for (int32_t d = 0; d < a.ndim; ++d) {
    if (a.strides[d] != b.strides[d] && a.shape[d] != 1) return false;
  }
  return true;
}

// Whether a tensor method without arguments (is_conj, is_neg) returns true.
bool holds(PyObject* tensor, const char* method) {
  const Owned answer = checked(PyObject_CallMethod(tensor, method, nullptr));
  return answer.get() == Py_True;
}

// PyTorch marks a tensor as conjugated or negated instead of computing it; its memory then holds
// other values than it says. Only views of complex tensors are marked: complex ones, or real ones
// whose elements are two apart or that have a single element.
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
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  int64_t numel = 1;
  for (int32_t d = 0; d < view.ndim; ++d) {
    numel *= view.shape[d];
    if (view.shape[d] > 1) dims.emplace_back(view.strides[d], view.shape[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;  // the farthest element of the dimensions so far
  int64_t packed = 1;
  bool dense = true;
  for (const auto& dim : dims) {
    if (numel > 0 && dim.first <= reach) {
      refuse(describe(place) +
             " has elements that share memory (an expanded or overlapping view), so they cannot be "
             "updated one by one; give the optimizer a clone() of it.");
    }
    dense = dense && dim.first == packed;
    reach += (dim.second - 1) * dim.first;
    packed *= dim.second;
  }
  parameter.shape.assign(view.shape, view.shape + view.ndim);
  parameter.strides.assign(view.strides, view.strides + view.ndim);
  parameter.numel = numel;
  parameter.extent = numel == 0 ? 0 : reach + 1;
  parameter.dense = dense;
  parameter.dtype = view.dtype;
}

void SgdPlan::set_layout(const Place& place, const Parameter& parameter, const TensorView& p,
                         const TensorView& g, const TensorView* m, TensorRef& ref) {
  const int pair = is_complex(p.dtype) ? 2 : 1;
  ref.numel = parameter.numel * pair;
  ref.layout = -1;
  if (parameter.numel <= 1) return;
  if (parameter.dense && same_order(p, g) && (m == nullptr || same_order(p, *m))) return;

  std::vector<int32_t> dims;
  for (int32_t d = 0; d < p.ndim; ++d) {
    if (p.shape[d] != 1) dims.push_back(d);
  }
  if (dims.size() + pair - 1 > kMaxDims) {
    refuse(describe(place) + " has more than " + std::to_string(kMaxDims) +
           " dimensions and lies in another order than its gradient or momentum.");
  }
  // In the order of the parameter's memory, farthest first.
  std::sort(dims.begin(), dims.end(),
            [&](int32_t a, int32_t b) { return p.strides[a] > p.strides[b]; });
  StridedLayout layout{};
  for (const int32_t d : dims) {
    const int32_t k = layout.ndim++;
    layout.shape[k] = p.shape[d];
    layout.param[k] = p.strides[d] * pair;
    layout.grad[k] = g.strides[d] * pair;
    layout.momentum[k] = m == nullptr ? 0 : m->strides[d] * pair;
  }
  if (pair == 2) {
    const int32_t k = layout.ndim++;
    layout.shape[k] = 2;
    layout.param[k] = layout.grad[k] = layout.momentum[k] = 1;
  }
  ref.layout = static_cast<int32_t>(layouts_.size());
  layouts_.push_back(layout);
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
  if (m.data == nullptr && parameter.numel > 0) {
    refuse("the momentum_buffer of " + describe(place) + " has no memory of its own.");
  }
  ref.momentum = m.data;
  set_layout(place, parameter, p, g, &m, ref);
  const int64_t pair = is_complex(p.dtype) ? 2 : 1;
  int64_t reach = 0;
  for (int32_t d = 0; d < m.ndim; ++d) {
    if (m.shape[d] > 1) reach += (m.shape[d] - 1) * m.strides[d];
  }
  if (parameter.numel > 0) {
    const char* begin = static_cast<const char*>(m.data);
    written_.emplace_back(begin, begin + (reach + 1) * pair * storage_bytes(ref.momentum_type));
  }
}

void SgdPlan::gather(const Place& place, size_t position, bool has_momentum) {
  Parameter& parameter = parameters_[position];
  PyObject* tensor = parameter.tensor.get();
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
  if (p.data == nullptr && parameter.numel > 0) {
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
  if (g.data == nullptr && parameter.numel > 0) {
    refuse("the gradient of " + describe(place) + " is a " + Py_TYPE(grad.get())->tp_name +
           " without memory of its own.");
  }
  if (may_be_lazy(p, parameter.numel, parameter.dense) && is_lazy(tensor)) {
    refuse(describe(place) +
           " is a lazily conjugated or negated view; give the optimizer a parameter made from "
           "resolve_conj().resolve_neg().");
  }
  if (may_be_lazy(g, parameter.numel, parameter.dense && same_order(p, g)) && is_lazy(grad.get())) {
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
  if (parameter.numel > 0) {
    const int64_t bytes = storage_bytes(ref.type) * (is_complex(p.dtype) ? 2 : 1);
    const char* begin = static_cast<const char*>(p.data);
    written_.emplace_back(begin, begin + parameter.extent * bytes);
  }

  if (!has_momentum) {
    set_layout(place, parameter, p, g, nullptr, ref);
  } else {
    PyObject* buffer = nullptr;
    if (parameter.state) {
      buffer = PyDict_GetItemWithError(parameter.state.get(), names().momentum_buffer);
      if (buffer == nullptr && PyErr_Occurred()) throw PythonError();
    }
    if (buffer == nullptr || buffer == Py_None) {
      ref.first = true;
      new_momenta_.push_back({position, tensors_.size(), place, p, g, Owned()});
    } else {
      if (hold_references_ && buffer != parameter.momentum) {
        parameter.momentum_held.hold(buffer);
        parameter.momentum = buffer;
      }
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
      if (parameters_[position].tensor.get() == tensor) continue;
      parameters_[position] = Parameter();
      parameters_[position].tensor = Owned::borrow(tensor);
      changed = true;
    }
  }
  changed = changed || position != parameters_.size();
  parameters_.resize(position);
  if (!changed && states_unchanged(state)) return;

  hold_references_ = hold_references();
  for (Parameter& parameter : parameters_) {
    if (hold_references_) parameter.held.hold(parameter.tensor.get());
    PyObject* inner = PyDict_GetItemWithError(state, parameter.tensor.get());
    if (inner == nullptr && PyErr_Occurred()) throw PythonError();
    if (inner != nullptr && !PyDict_Check(inner)) {
      throw std::invalid_argument("the optimizer's state must hold a dict for each parameter");
    }
    parameter.state = Owned::borrow(inner);
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

PyObject* SgdPlan::step(PyObject* param_groups, PyObject* state, float inverse_scale, int threads) {
  tensors_.clear();
  layouts_.clear();
  groups_.clear();
  new_momenta_.clear();
  updated_.clear();
  kept_alive_.clear();
  written_.clear();
  reader_.clear();

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
    added.buffer = checked(PyObject_CallFunctionObjArgs(allocate_.get(), parameter.tensor.get(),
                                                        added.place.group, nullptr));
    attach_momentum(added.place, parameter, added.buffer.get(), added.param_view, added.grad_view,
                    tensors_[added.tensor]);
  }
  const bool serial = written_memory_overlaps();
  Owned updated = checked(PyList_New(static_cast<Py_ssize_t>(updated_.size())));
  for (size_t i = 0; i < updated_.size(); ++i) {
    PyList_SET_ITEM(updated.get(), static_cast<Py_ssize_t>(i), updated_[i].release());
  }

  Py_BEGIN_ALLOW_THREADS;
  step_cpu(tensors_, layouts_, groups_, threads, serial);
  Py_END_ALLOW_THREADS;

  for (NewMomentum& added : new_momenta_) {
    PyObject* tensor = parameters_[added.parameter].tensor.get();
    const Owned inner =
        checked(PyObject_GetItem(state, tensor));  // a defaultdict adds an empty one
    if (PyDict_SetItem(inner.get(), names().momentum_buffer, added.buffer.get()) != 0) {
      throw PythonError();
    }
  }
  advance_groups(param_groups, 1, 0, native_of_);
  kept_alive_.clear();
  new_momenta_.clear();
  return updated.release();
}

}  // namespace fastlr

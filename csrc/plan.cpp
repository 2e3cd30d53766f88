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

int SgdPlan::host_devices_ = 0;

SgdPlan::SgdPlan(PyObject* runtime, NativeOf native_of)
    : runtime_(Owned::borrow(runtime)),
      native_of_(native_of)
#if defined(FASTLR_HAS_CUDA)
      ,
      devices_(runtime)
#endif
{
}

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

int SgdPlan::device_of(const TensorView& p, const Place& place) const {
#if defined(FASTLR_HAS_CUDA)
  if (p.device.type == dlpack::kCpu) {
    return host_devices_ == 0 ? kNoDevice
                              : -1 - static_cast<int>(place.group_index) % host_devices_;
  }
  if (p.device.type == dlpack::kCuda) return p.device.id;
  const std::string reason = "fastlr updates tensors on the CPU and on CUDA devices";
#else
  if (p.device.type == dlpack::kCpu) return kNoDevice;
  const std::string reason =
      "this build of fastlr updates tensors on the CPU only: " + std::string(kCudaStatus);
#endif
  refuse(describe(place) + " is on " + device_name(p.device) + ", but " + reason + ".");
}

void SgdPlan::gather(const Place& place, size_t position) {
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
  const int device = device_of(p, place);
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

  if (device != kNoDevice && parameter.order.dense && !same_order(p, g)) {
    grad = checked(PyObject_CallMethod(runtime_.get(), "gradient_like", "OO", tensor, grad.get()));
    g = read(grad.get(), "gradient", place);
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
      group.options.momentum != 0.0 || (device != kNoDevice && group.momentum.owner != nullptr);
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
      new_momenta_.push_back({position, tensors_.size(), place, p, g, Owned()});
    } else {
      attach_momentum(place, parameter, buffer, p, g, ref);
      kept_alive_.push_back(Owned::borrow(buffer));
    }
  }
  tensors_.push_back(ref);
  sources_.push_back({position, device, buffer});
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
  groups_.clear();
  tensors_.clear();
  sources_.clear();
  layouts_.clear();
  new_momenta_.clear();
  updated_.clear();
  kept_alive_.clear();
  written_.clear();
  reader_.clear();
}

PyObject* SgdPlan::step(PyObject* param_groups, PyObject* state, PyObject* found_inf,
                        PyObject* grad_scale, int threads) {
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
  return run(param_groups, state, found_inf, grad_scale, threads);
}

void SgdPlan::read_groups(PyObject* param_groups) {
  groups_.clear();
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(param_groups); ++i) {
    groups_.push_back(read_group(PyList_GET_ITEM(param_groups, i), i, native_of_));
  }
}

void SgdPlan::gather_all(PyObject* param_groups) {
  size_t position = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(param_groups); ++i) {
    PyObject* group = PyList_GET_ITEM(param_groups, i);
    const Py_ssize_t size = PyList_GET_SIZE(PyDict_GetItemWithError(group, names().params));
    for (Py_ssize_t j = 0; j < size; ++j, ++position) gather({group, i, j}, position);
  }
}

// Whether the host itself updates tensors, or has the clock to itself.
bool SgdPlan::uses_host() const {
  bool alone = sources_.empty();
#if defined(FASTLR_HAS_CUDA)
  alone = alone && !devices_.any();
#endif
  return alone || std::any_of(sources_.begin(), sources_.end(),
                              [](const Source& source) { return source.device == kNoDevice; });
}

void SgdPlan::step_on_host(float inverse_scale, int threads, bool in_order) {
  std::vector<GroupScalars> scalars;
  {
    const DefaultFloatEnvironment environment;
    for (const GroupReading& group : groups_) {
      scalars.push_back({sgd_scalars<float>(group.options, inverse_scale),
                         sgd_scalars<double>(group.options, inverse_scale)});
    }
  }
  size_t kept = 0;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (sources_[i].device == kNoDevice) tensors_[kept++] = tensors_[i];
  }
  tensors_.resize(kept);
  const WithoutGil other_threads_run;
  step_cpu(tensors_, layouts_, scalars, threads, in_order);
}

PyObject* SgdPlan::run(PyObject* param_groups, PyObject* state, PyObject* found_inf,
                       PyObject* grad_scale, int threads) {
  synchronize(param_groups, state);
  read_groups(param_groups);
  gather_all(param_groups);
#if defined(FASTLR_HAS_CUDA)
  if (host_must_catch_up()) {
    devices_.sync(param_groups, native_of_);
    forget_step();
    read_groups(param_groups);
    gather_all(param_groups);
  }
#endif

  const bool with_host = uses_host();
  float inverse_scale = 1.0f;
  if (with_host && (found_inf != Py_None || grad_scale != Py_None)) {
    const Owned answer =
        checked(PyObject_CallMethod(runtime_.get(), "read_amp", "OO", found_inf, grad_scale));
    if (answer.get() == Py_None) return Py_NewRef(Py_None);
    inverse_scale = static_cast<float>(PyFloat_AsDouble(answer.get()));
    if (PyErr_Occurred()) throw PythonError();
  }

  for (NewMomentum& added : new_momenta_) {
    const Parameter& parameter = parameters_[added.parameter];
    added.buffer = checked(PyObject_CallMethod(runtime_.get(), "new_momentum", "OO",
                                               parameter.tensor, added.place.group));
    attach_momentum(added.place, parameter, added.buffer.get(), added.param_view, added.grad_view,
                    tensors_[added.tensor]);
    sources_[added.tensor].momentum = added.buffer.get();
  }
  std::vector<Owned> new_states;  // the dicts that the new buffers go to
  for (const NewMomentum& added : new_momenta_) {
    PyObject* inner = parameters_[added.parameter].state;
    new_states.push_back(inner != nullptr ? Owned::borrow(inner) : checked(PyDict_New()));
  }
  const bool in_order = written_memory_overlaps();
  Owned updated = checked(PyList_New(static_cast<Py_ssize_t>(updated_.size())));
  for (size_t i = 0; i < updated_.size(); ++i) {
    PyList_SET_ITEM(updated.get(), static_cast<Py_ssize_t>(i), updated_[i].release());
  }

  bool captured = false;
#if defined(FASTLR_HAS_CUDA)
  std::vector<DeviceItem> items;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const Source& source = sources_[i];
    if (source.device == kNoDevice) continue;
    items.push_back(
        {source.device, tensors_[i], parameters_[source.parameter].tensor, source.momentum});
  }
  if (!items.empty() || devices_.any()) {
    captured = devices_.step(items, layouts_, groups_, found_inf, grad_scale, with_host, in_order);
  }
#endif
  if (with_host) step_on_host(inverse_scale, threads, in_order);

  for (size_t i = 0; i < new_momenta_.size(); ++i) {
    PyObject* tensor = parameters_[new_momenta_[i].parameter].tensor;
    if (PyDict_SetItem(new_states[i].get(), names().momentum_buffer,
                       new_momenta_[i].buffer.get()) != 0 ||
        PyObject_SetItem(state, tensor, new_states[i].get()) != 0) {
      throw PythonError();
    }
  }
  if (!captured) advance(param_groups, 1, 0);
  return updated.release();
}

// Moves the host's clocks along with what the devices were told.
void SgdPlan::advance(PyObject* param_groups, int64_t updates, int64_t samples) {
  advance_groups(param_groups, updates, samples, native_of_);
#if defined(FASTLR_HAS_CUDA)
  devices_.agree(param_groups);
#endif
}

void SgdPlan::advance_samples(PyObject* param_groups, int64_t samples) {
#if defined(FASTLR_HAS_CUDA)
  if (!devices_.advance_samples(samples)) return;
#endif
  advance(param_groups, 0, samples);
}

void SgdPlan::push(PyObject* param_groups) {
  read_groups(param_groups);
#if defined(FASTLR_HAS_CUDA)
  devices_.push(groups_);
#endif
  groups_.clear();
}

void SgdPlan::loaded([[maybe_unused]] PyObject* uninitialized) {
#if defined(FASTLR_HAS_CUDA)
  devices_.set_initialized(uninitialized);
#endif
}

PyObject* SgdPlan::sync([[maybe_unused]] PyObject* param_groups) {
#if defined(FASTLR_HAS_CUDA)
  if (devices_.any()) {
    const bool skipped = devices_.sync(param_groups, native_of_);
    return Py_NewRef(skipped ? Py_True : Py_False);
  }
#endif
  return Py_NewRef(Py_None);
}

PyObject* SgdPlan::uninitialized() {
#if defined(FASTLR_HAS_CUDA)
  return devices_.uninitialized();
#else
  return checked(PyList_New(0)).release();
#endif
}

bool SgdPlan::captured() const {
#if defined(FASTLR_HAS_CUDA)
  return devices_.captured();
#else
  return false;
#endif
}

#if defined(FASTLR_HAS_CUDA)
// Where the host updates tensors, or a device is new, the host's clocks are what counts.
bool SgdPlan::host_must_catch_up() const {
  if (!devices_.any() || devices_.host_is_exact()) return false;
  return uses_host() || std::any_of(sources_.begin(), sources_.end(), [&](const Source& source) {
           return source.device != kNoDevice && !devices_.knows(source.device);
         });
}
#endif

}  // namespace fastlr

#include "device_memory.h"

#include <algorithm>
#include <stdexcept>

#include "../tensor_view.h"

namespace fastlr {
namespace {

template <typename... Arguments>
Owned call(PyObject* object, const char* method, const char* format, Arguments... arguments) {
  return checked(PyObject_CallMethod(object, method, format, arguments...));
}

}  // namespace

[[noreturn]] void cannot_capture(const std::string& what) {
  throw std::runtime_error(
      what +
      ", which a CUDA graph cannot capture. Run a step with the same parameters, gradients and "
      "hyperparameters before the capture, on a side stream, as the documentation of "
      "torch.cuda.graph shows.");
}

DeviceScope::DeviceScope(PyObject* runtime, int device) : runtime_(runtime), device_(device) {
  guard_ = call(runtime, "enter", "i", device);
  try {
    const Owned stream = call(runtime, "stream", "i", device);
    stream_ = static_cast<cuda::Stream>(PyLong_AsUnsignedLongLong(stream.get()));
    if (PyErr_Occurred()) throw PythonError();
    capturing_ = cuda::is_capturing(this->device(), stream_);
  } catch (...) {
    leave();
    throw;
  }
}

void DeviceScope::leave() {
  if (!guard_) return;
  PyObject *type, *value, *traceback;  // an error on its way out must survive the call
  PyErr_Fetch(&type, &value, &traceback);
  const Owned left(PyObject_CallMethod(runtime_, "leave", "O", guard_.get()));
  if (!left) PyErr_WriteUnraisable(runtime_);
  guard_ = Owned();
  PyErr_Restore(type, value, traceback);
}

Table::Table(PyObject* runtime, int device, size_t size, const DeviceScope& scope)
    : tensor_(call(runtime, "new_bytes", "in", device, static_cast<Py_ssize_t>(size))),
      size_(size),
      streams_{scope.stream()} {
  TensorReader reader;
  TensorView view;
  if (!reader.read(tensor_.get(), view)) throw PythonError();
  data_ = static_cast<char*>(view.data);
}

void Table::used_by(PyObject* runtime, int device, const DeviceScope& scope) {
  if (scope.capturing()) return;  // a captured table is kept anyway
  if (std::find(streams_.begin(), streams_.end(), scope.stream()) != streams_.end()) return;
  call(runtime, "record_stream", "Oi", tensor_.get(), device);
  streams_.push_back(scope.stream());
}

}  // namespace fastlr

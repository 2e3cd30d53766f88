#include "device_memory.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <stdexcept>

#include "../tensor_view.h"

namespace fastlr {
namespace {

template <typename... Arguments>
Owned call(PyObject* object, const char* method, const char* format, Arguments... arguments) {
  return checked(PyObject_CallMethod(object, method, format, arguments...));
}

struct Kept {
  std::vector<Owned> objects;
  Kept* next;
};

// CUDA takes its own copy of so much and returns at once. Of more it may copy what fits into its
// buffers and wait for the stream to make room.
constexpr size_t kAtOnce = 64 << 10;

// Of graphs that have gone; waiting for a thread that holds the GIL and may call CUDA.
std::atomic<Kept*> released{nullptr};

int drop_released(void*) {
  for (Kept* kept = released.exchange(nullptr); kept != nullptr;) {
    Kept* const next = kept->next;
    delete kept;
    kept = next;
  }
  return 0;
}

// Called by CUDA, in any thread, where no function of CUDA may be called: freeing a tensor may do
// so.
void on_graph_gone(void* object) {
  Kept* const kept = static_cast<Kept*>(object);
  kept->next = released.load();
  while (!released.compare_exchange_weak(kept->next, kept)) {
  }
  // Where the queue is full, the next scope drops them.
  if (Py_IsInitialized()) Py_AddPendingCall(&drop_released, nullptr);
}

}  // namespace

void DeviceScope::refuse_capture(const std::string& what) const {
  if (!capturing_) return;
  throw std::runtime_error(
      what +
      ", which a CUDA graph cannot capture. Run a step with the same parameters, gradients and "
      "hyperparameters before the capture, on a side stream, as the documentation of "
      "torch.cuda.graph shows.");
}

DeviceScope::DeviceScope(PyObject* runtime, int device) : runtime_(runtime), device_(device) {
  drop_released(nullptr);
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
  Owned left(PyObject_CallMethod(runtime_, "leave", "O", guard_.get()));
  if (!left && PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) {
    PyErr_Clear();
    left = Owned(PyObject_CallMethod(runtime_, "leave", "O", guard_.get()));
    PyErr_SetInterrupt();  // again, where it can be raised
  }
  if (!left) PyErr_WriteUnraisable(runtime_);
  guard_ = Owned();
  PyErr_Restore(type, value, traceback);
}

Table::Table(const DeviceScope& scope, size_t size)
    : tensor_(
          call(scope.runtime(), "new_bytes", "in", scope.number(), static_cast<Py_ssize_t>(size))),
      size_(size),
      streams_{scope.stream()} {
  TensorReader reader;
  TensorView view;
  if (!reader.read(tensor_.get(), view)) throw PythonError();
  data_ = static_cast<char*>(view.data);
}

void Table::used_by(const DeviceScope& scope) {
  if (scope.capturing()) return;  // the graph keeps what it refers to
  if (std::find(streams_.begin(), streams_.end(), scope.stream()) != streams_.end()) return;
  call(scope.runtime(), "record_stream", "Oi", tensor_.get(), scope.number());
  streams_.push_back(scope.stream());
}

void Table::write(const DeviceScope& scope, size_t offset, const void* from, size_t bytes) const {
  if (bytes <= kAtOnce) return write_at_once(scope, offset, from, bytes);
  scope.refuse_capture("memory of the device would be written");
  char* const readable = static_cast<char*>(const_cast<void*>(from));
  const Owned view =
      checked(PyMemoryView_FromMemory(readable, static_cast<Py_ssize_t>(bytes), PyBUF_READ));
  call(scope.runtime(), "upload", "OnO", tensor_.get(), static_cast<Py_ssize_t>(offset),
       view.get());
}

void Table::write_at_once(const DeviceScope& scope, size_t offset, const void* from,
                          size_t bytes) const {
  scope.refuse_capture("memory of the device would be written");
  for (size_t at = 0; at < bytes; at += kAtOnce) {
    cuda::upload(scope.device(), scope.stream(), data_ + offset + at,
                 static_cast<const char*>(from) + at, std::min(kAtOnce, bytes - at));
  }
}

void Table::hold(const char* name, const Table& other) const {
  PyObject* const held = other ? other.tensor() : Py_None;
  if (PyObject_SetAttrString(tensor_.get(), name, held) != 0) throw PythonError();
}

void download(const DeviceScope& scope, void* to, const void* from, size_t bytes, bool others_run) {
  std::optional<WithoutGil> other_threads_run;
  if (others_run) other_threads_run.emplace();
  cuda::download(scope.device(), scope.stream(), to, from, bytes);
}

void GraphObjects::keep(const DeviceScope& scope) {
  const cuda::Graph graph = cuda::captured_graph(scope.device(), scope.stream());
  cuda::keep_with_graph(graph, new Kept{std::move(objects_), nullptr}, &on_graph_gone);
}

}  // namespace fastlr

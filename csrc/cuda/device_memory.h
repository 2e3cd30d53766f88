// Memory and streams of CUDA devices, as PyTorch hands them out.
#pragma once

#include <Python.h>

#include <cstddef>
#include <string>
#include <vector>

#include "../owned.h"
#include "step_cuda.h"

namespace fastlr {

// NOTE: [the runtime object]
// PyTorch owns memory and streams, and is reached through a Python object with these methods
// (fastlr/optim/_runtime.py). A device is its index, or a negative number: -1 is host memory that
// the launcher updates as device 0, -2 as device 1, and so on, in tests where CUDA is emulated.
//   new_bytes(device, size) -> tensor          uninitialized memory
//   enter(device) -> guard; leave(guard)       makes it PyTorch's current device
//   stream(device) -> int                      its current stream
//   record_stream(tensor, device)              the current stream uses it too
//   on_device(number, device) -> tensor        a float32 there

// Where a step's work on one device goes: entered on construction, left at the end of the scope.
class DeviceScope {
 public:
  DeviceScope(PyObject* runtime, int device);
  ~DeviceScope() { leave(); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  // Its index, as the launcher knows it.
  int device() const { return device_ < 0 ? -1 - device_ : device_; }
  cuda::Stream stream() const { return stream_; }
  bool capturing() const { return capturing_; }

 private:
  void leave();

  PyObject* runtime_;
  int device_;
  Owned guard_;
  cuda::Stream stream_;
  bool capturing_;
};

// Memory on a device that one plan reads and writes.
//
// NOTE: [memory of a device]
// PyTorch's caching allocator hands freed memory out again in the order of the stream that it was
// allocated on. A table used on another stream is therefore recorded there, once, and stays
// reserved until that stream has passed its release. What a captured graph refers to is kept for as
// long as the plan lives, as replays do not tell us of themselves.
class Table {
 public:
  Table() = default;
  Table(PyObject* runtime, int device, size_t size, const DeviceScope& scope);

  // To be called before each use.
  void used_by(PyObject* runtime, int device, const DeviceScope& scope);

  char* data() const { return data_; }
  size_t size() const { return size_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  Owned tensor_;
  char* data_ = nullptr;
  size_t size_ = 0;
  std::vector<cuda::Stream> streams_;
};

// Throws, as `what` is nothing that a CUDA graph can capture.
[[noreturn]] void cannot_capture(const std::string& what);

}  // namespace fastlr

// Memory and streams of CUDA devices, as PyTorch hands them out.
#pragma once

#include <Python.h>

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "../owned.h"
#include "step_cuda.h"

namespace fastlr {

// NOTE: [the runtime object]
// PyTorch owns memory and streams, and is reached through a Python object with these methods
// (fastlr/_runtime.py). A device is its index, or a negative number: -1 is host memory that
// the launcher updates as device 0, -2 as device 1, and so on, in tests where CUDA is emulated.
//   new_bytes(device, size) -> tensor          uninitialized memory
//   enter(device) -> guard; leave(guard)       makes it PyTorch's current device
//   stream(device) -> int                      its current stream
//   record_stream(tensor, device)              the current stream uses it too
//   on_device(number, device) -> tensor        a float32 there
//   float_at(tensor, offset) -> tensor         the float32 that lies there
//   upload(tensor, offset, bytes)              in the current stream's order, without waiting for
//   it

// Where a step's work on one device goes: entered on construction, left at the end of the scope.
class DeviceScope {
 public:
  DeviceScope(PyObject* runtime, int device);
  ~DeviceScope() { leave(); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  PyObject* runtime() const { return runtime_; }
  int number() const { return device_; }  // as the runtime object knows it
  // Its index, as the launcher knows it.
  int device() const { return device_ < 0 ? -1 - device_ : device_; }
  cuda::Stream stream() const { return stream_; }
  bool capturing() const { return capturing_; }

  // Throws while a graph is being captured: `what` is nothing that one can capture.
  void refuse_capture(const std::string& what) const;

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
// reserved until that stream has passed its release. What a captured graph refers to belongs to
// that graph as well, see GraphObjects, as replays do not tell us of themselves.
class Table {
 public:
  Table() = default;
  Table(const DeviceScope& scope, size_t size);

  // To be called before each use.
  void used_by(const DeviceScope& scope);

  // Copies to the bytes from `offset` on; `from` may be reused on return. Waits for nothing.
  void write(const DeviceScope& scope, size_t offset, const void* from, size_t bytes) const;

  // The same without taking any memory, for less than a megabyte: of more CUDA might wait.
  void write_at_once(const DeviceScope& scope, size_t offset, const void* from, size_t bytes) const;

  // Keeps another one, or none, for as long as its own memory, which points there.
  void hold(const char* name, const Table& other) const;

  PyObject* tensor() const { return tensor_.get(); }
  char* data() const { return data_; }
  size_t size() const { return size_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  Owned tensor_;
  char* data_ = nullptr;
  size_t size_ = 0;
  std::vector<cuda::Stream> streams_;
};

// Copies from the device and waits for it. others_run: other threads meanwhile.
void download(const DeviceScope& scope, void* to, const void* from, size_t bytes, bool others_run);

// Python objects that a graph being captured refers to. It keeps them alive: after keep() they go
// when the graph and its last replay have gone, whatever became of the optimizer.
class GraphObjects {
 public:
  void add(Owned object) { objects_.push_back(std::move(object)); }
  void add(const Table& table) {
    if (table) add(Owned::borrow(table.tensor()));
  }
  void keep(const DeviceScope& scope);

 private:
  std::vector<Owned> objects_;
};

}  // namespace fastlr

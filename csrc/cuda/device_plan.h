// What one CUDA device holds for an optimizer: its tables, clocks and schedules, as torch tensors.
#pragma once

#include <Python.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../groups.h"
#include "../layout.h"
#include "../owned.h"
#include "launches.h"

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

class DevicePlan {
 public:
  // runtime: borrowed; device: see NOTE: [the runtime object].
  DevicePlan(PyObject* runtime, int device) : runtime_(runtime), device_(device) {}

  // Brings the tables of groups, clocks and schedules up to date with the host's.
  // force: the host's clocks count, even where they have not changed since they last agreed.
  void set_groups(const DeviceScope& scope, const std::vector<GroupReading>& groups,
                  bool force = false);

  // Plans the launches of a step and brings the table of tensors up to date. in_order: tensors
  // share memory, so each has a launch of its own.
  void prepare(const DeviceScope& scope, const std::vector<DeviceWork>& work,
               const std::vector<StridedLayout>& layouts, bool in_order);

  // Launches what prepare() planned. found_inf, grad_scale: on this device, or nullptr.
  void launch(const DeviceScope& scope, const float* found_inf, const float* grad_scale);

  // A tensor that a graph refers to stays alive as long as the plan.
  void keep(PyObject* tensor) { kept_tensors_.push_back(Owned::borrow(tensor)); }

  // Moves the clocks without an update of tensors; updates: 0, or 1 where found_inf allows.
  void advance(const DeviceScope& scope, int64_t updates, int64_t samples, const float* found_inf);

  // The host's clocks have moved along with the device's.
  void agree(size_t group, const Clock& clock);

  // Waits for the device. reset_invalid_scale: so that it is reported once.
  struct Reading {
    DeviceState state;
    std::vector<GroupClock> clocks;
  };
  Reading read(const DeviceScope& scope, bool reset_invalid_scale);

  bool captured() const { return captured_; }
  // Whether its clocks are set: not where the first step failed before.
  bool ready() const { return !seen_.empty(); }

 private:
  // What a group's table entry was made from.
  struct Seen {
    SgdOptions options;  // without what schedules say
    Owned lr;
    Owned momentum;
    int64_t lr_start;
    int64_t momentum_start;
    Clock clock;
    bool lacks_momentum_in_graph;  // a graph has captured it without
  };

  Clocks clocks(const float* found_inf) const;
  void keep(Table&& table);

  PyObject* runtime_;
  int device_;
  bool captured_ = false;

  size_t capacity_ = 0;  // groups that the table of groups has room for
  Table state_;          // DeviceState, GroupClock[capacity], DeviceGroup[capacity]
  Table schedules_;      // Segment[], double[]
  std::vector<Seen> seen_;

  Table tensors_;  // DeviceTensor[], StridedLayout[]
  bool tensors_captured_ = false;
  std::vector<DeviceTensor> uploaded_;
  std::vector<StridedLayout> uploaded_layouts_;
  std::vector<cuda::Launch> launches_;

  std::vector<Table> kept_tables_;
  std::vector<Owned> kept_tensors_;
};

}  // namespace fastlr

// The squared norm of tensors on one CUDA device.
#pragma once

#include <Python.h>

#include <vector>

#include "device_memory.h"
#include "tensor_table.h"

namespace fastlr {

class DeviceNorm {
 public:
  // runtime: see NOTE: [the runtime object]; borrowed.
  DeviceNorm(PyObject* runtime, int device) : runtime_(runtime), device_(device) {}

  // The sum of the squares of all elements of the tensors' `grad`. Waits for the device.
  double measure(const std::vector<TensorRef>& tensors, const std::vector<StridedLayout>& layouts);

 private:
  PyObject* runtime_;
  int device_;
  Table state_;  // DeviceState
  TensorTable tensors_;
};

}  // namespace fastlr

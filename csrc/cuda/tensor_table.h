// What the launches of one device read of a step's tensors, in the device's memory.
#pragma once

#include <Python.h>

#include <vector>

#include "device_memory.h"
#include "launches.h"

namespace fastlr {

class TensorTable {
 public:
  // runtime: see NOTE: [the runtime object]; borrowed.
  TensorTable(PyObject* runtime, int device) : runtime_(runtime), device_(device) {}

  // Plans the launches over these tensors and brings the table up to date with them. in_order:
  // tensors share memory, so each has a launch of its own. measures_norm: of the gradients.
  std::vector<cuda::Launch> update(const DeviceScope& scope, const std::vector<DeviceWork>& work,
                                   const std::vector<StridedLayout>& layouts, bool in_order,
                                   bool measures_norm);

  // To be called before the launches.
  void used(const DeviceScope& scope);

 private:
  void upload(const DeviceScope& scope, Launches& cut);
  void replace(Table& table, size_t size, const DeviceScope& scope);

  PyObject* runtime_;
  int device_;

  Table tensors_;  // DeviceTensor[], StridedLayout[]
  Table squares_;  // double[]
  std::vector<DeviceTensor> uploaded_;
  std::vector<StridedLayout> uploaded_layouts_;

  bool captured_ = false;          // any table, by a graph ...
  bool tensors_captured_ = false;  // ... and the present one of tensors
  std::vector<Table> kept_;
};

}  // namespace fastlr

// Reading a torch.Tensor: pointer, type, device, shape and strides, without libtorch.
#pragma once

#include <Python.h>

#include <cstdint>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "tensors.h"

namespace fastlr {

// A tensor's memory as seen for the length of one step. shape and strides belong to the tensor, or
// to the TensorReader that read it; byte_offset is always zero.
using TensorView = dlpack::Tensor;

// Reads tensors through PyTorch's DLPack exchange API (PyTorch 2.10 and newer: no Python call at
// all), or through data_ptr() and its like where that is missing or switched off.
class TensorReader {
 public:
  // Fills `view`; false with a Python error set where the tensor has no memory to read (sparse,
  // meta). A view with data == nullptr and elements belongs to a tensor without memory of its own
  // (DTensor, FakeTensor), which the caller must refuse.
  bool read(PyObject* tensor, TensorView& view);

  // The tensor's `grad`, a new reference; nullptr with a Python error set.
  static PyObject* gradient(PyObject* tensor);

  // NOTE: [distributed tensors]
  // Of a torch.distributed.tensor.DTensor: the tensor that holds this process's part of it, and the
  // specification that says which part that is; borrowed. Nothing (local == nullptr) of any other.
  struct Part {
    PyObject* local;
    PyObject* spec;
  };
  static Part part(PyObject* tensor);
  // Whether a tensor's memory holds its values: not where its type dispatches by itself.
  static bool is_plain(PyObject* tensor);
  // Whether a tensor is marked as conjugated or negated, and its memory is not yet.
  static bool is_lazy(PyObject* tensor);

  // Forgets shapes that earlier reads had to copy; views that point to them end.
  void clear() { copied_.clear(); }

  static bool exchange_enabled() { return exchange_enabled_; }
  static void set_exchange_enabled(bool enabled) { exchange_enabled_ = enabled; }
  // Whether PyTorch's tensor type offers an exchange API of the version that this file understands.
  static bool exchange_available(PyObject* tensor_type);

 private:
  bool read_attributes(PyObject* tensor, bool has_memory, TensorView& view);

  static bool exchange_enabled_;
  std::deque<std::vector<int64_t>> copied_;
};

// "float32", "complex64", ... for messages.
std::string type_name(dlpack::DataType type);
std::string device_name(dlpack::Device device);

}  // namespace fastlr

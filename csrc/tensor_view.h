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

// NOTE: [held references]
// PyTorch 2.13 takes the interpreter lock and touches the Python object whenever the C++ references
// to a tensor go from one to two, which every read of it does and undoes: 30 of the 50 ns that a
// read takes, and as much again when the version counter is increased. A second reference that is
// held all the time saves both. It keeps nothing alive that the optimizer's own reference does not,
// and the pointer that it was given at its creation is never used: `p.data = ...` changes the
// tensor in place. torch.utils.swap_tensors wants a single reference; hence none is held where
// modules are converted by swapping (torch.__future__.set_swap_module_params_on_conversion), see
// hold_references().
class HeldReference {
 public:
  HeldReference() = default;
  HeldReference(HeldReference&& other) noexcept : held_(std::exchange(other.held_, nullptr)) {}
  HeldReference& operator=(HeldReference&& other) noexcept {
    release();
    held_ = std::exchange(other.held_, nullptr);
    return *this;
  }
  ~HeldReference() { release(); }

  // Holds a reference to a tensor, in place of the one before; none where the exchange API gives
  // none.
  void hold(PyObject* tensor);

 private:
  void release();
  dlpack::ManagedTensor* held_ = nullptr;
};

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

  // Forgets shapes that earlier reads had to copy; views that point to them end.
  void clear() { copied_.clear(); }

  static bool exchange_enabled() { return exchange_enabled_; }
  static void set_exchange_enabled(bool enabled) { exchange_enabled_ = enabled; }
  // Whether PyTorch's tensor type offers an exchange API of the version that this file understands.
  static bool exchange_available(PyObject* tensor_type);

 private:
  bool read_attributes(PyObject* tensor, TensorView& view);

  static bool exchange_enabled_;
  std::deque<std::vector<int64_t>> copied_;
};

// Whether references may be held, see NOTE [held references].
bool hold_references();

// "float32", "complex64", ... for messages.
std::string type_name(dlpack::DataType type);
std::string device_name(dlpack::Device device);

}  // namespace fastlr

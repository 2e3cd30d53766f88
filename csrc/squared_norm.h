// The squared norm of any tensors, added up where they lie.
#pragma once

#include <Python.h>

#include <map>

#include "owned.h"

#if defined(FASTLR_HAS_CUDA)
#include "cuda/device_norm.h"
#endif

namespace fastlr {

class SquaredNorm {
 public:
  // runtime: see NOTE: [the runtime object].
  explicit SquaredNorm(PyObject* runtime) : runtime_(Owned::borrow(runtime)) {}

  // The sum of the squares of all elements of the tensors, a list. threads: of the host, the most
  // to use. Waits for the devices. Appends to `others`, a list, the tensors that no kernel here
  // reads. By one thread at a time.
  double measure(PyObject* tensors, int threads, PyObject* others);

 private:
  Owned runtime_;
  bool measuring_ = false;
#if defined(FASTLR_HAS_CUDA)
  std::map<int, DeviceNorm> devices_;
#endif
};

}  // namespace fastlr

#include "squared_norm.h"

#include <optional>
#include <stdexcept>
#include <vector>

#include "cpu/step_cpu.h"
#include "layout.h"
#include "placement.h"
#include "tensor_view.h"

namespace fastlr {
namespace {

// What the kernels of one place read.
struct Gradients {
  std::vector<TensorRef> tensors;
  std::vector<StridedLayout> layouts;

  // False where no kernel can.
  bool add(const TensorView& view) {
    TensorRef ref{};
    if (!storage_type(view.dtype, ref.type)) return false;
    const MemoryOrder order = memory_order(view);
    if (view.data == nullptr && order.numel != 0) return false;
    ref.state_type = ref.type;
    bring_to_scale(ref, std::nullopt);
    ref.grad = view.data;
    ref.numel = order.numel * (is_complex(view.dtype) ? 2 : 1);
    ref.layout = -1;
    if (!order.dense) {
      StridedLayout layout;
      if (!strided_layout(view, view, {}, layout)) return false;
      ref.layout = static_cast<int32_t>(layouts.size());
      layouts.push_back(layout);
    }
    tensors.push_back(ref);
    return true;
  }
};

}  // namespace

double SquaredNorm::measure(PyObject* tensors, int threads, PyObject* others) {
  if (measuring_) throw std::runtime_error("a norm is being measured already, in another thread");
  struct Measuring {
    explicit Measuring(bool& flag) : flag(flag) { flag = true; }
    ~Measuring() { flag = false; }
    bool& flag;
  } const measuring(measuring_);
  TensorReader reader;
  std::map<int, Gradients> places;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); ++i) {
    PyObject* const tensor = PyList_GET_ITEM(tensors, i);
    TensorView view;
    std::optional<int> place;
    if (reader.read(tensor, view)) place = place_of(view.device, 0);
    PyErr_Clear();
    if (place && places[*place].add(view)) continue;
    if (PyList_Append(others, tensor) != 0) throw PythonError();
  }
  double sum = 0.0;
  for (const auto& [place, gradients] : places) {
    if (place == kHost) {
      const WithoutGil other_threads_run;
      sum += squared_norm_cpu(gradients.tensors, gradients.layouts, threads);
      continue;
    }
#if defined(FASTLR_HAS_CUDA)
    DeviceNorm& device = devices_.try_emplace(place, runtime_.get(), place).first->second;
    sum += device.measure(gradients.tensors, gradients.layouts);
#endif
  }
  return sum;
}

}  // namespace fastlr

#include "step_cuda.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "kernels.cuh"

namespace fastlr::cuda {
namespace {

// Throws for a failed call, by its name.
void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // what is reported here is not reported again
  if (error == cudaErrorInsufficientDriver) {
    throw std::runtime_error(std::string(call) + " failed: the CUDA driver supports version " +
                             version_text(driver_version()) + ", but fastlr was built with CUDA " +
                             version_text(runtime_version()) +
                             ". Update the driver, or build fastlr with an older toolkit.");
  }
  throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}

cudaStream_t native(Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }

void use_device(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

template <int kCapacity>
using StepKernel = void (*)(StepArguments<kCapacity>);

// Strided parameters are rare: they have no kernels with large arguments, which would only take
// longer to build.
template <typename P, typename M, int kCapacity>
StepKernel<kCapacity> step_kernel_of(bool strided) {
  if constexpr (kCapacity == kSmallLaunch) {
    if (strided) return &step_kernel<P, M, true, kCapacity>;
  }
  return &step_kernel<P, M, false, kCapacity>;
}

template <typename P, int kCapacity>
StepKernel<kCapacity> step_kernel_of(bool wide_momentum, bool strided) {
  return wide_momentum ? step_kernel_of<P, float, kCapacity>(strided)
                       : step_kernel_of<P, P, kCapacity>(strided);
}

template <int kCapacity>
StepKernel<kCapacity> step_kernel_of(StorageType type, StorageType momentum_type, bool strided) {
  const bool wide = type != momentum_type;
  switch (type) {
    case StorageType::kFloat64:
      return step_kernel_of<double, kCapacity>(wide, strided);
    case StorageType::kBFloat16:
      return step_kernel_of<BFloat16, kCapacity>(wide, strided);
    case StorageType::kFloat16:
      return step_kernel_of<Float16, kCapacity>(wide, strided);
    default:
      return step_kernel_of<float, float, kCapacity>(strided);
  }
}

// How many blocks of each kernel a device holds at a time: the size of a persistent grid.
using Residency = std::map<const void*, int64_t>;
std::map<int, Residency>& residencies() {
  static std::map<int, Residency> all;
  return all;
}

template <typename Kernel>
void load(Residency& residency, Kernel* kernel, int multiprocessors) {
  int blocks = 0;
  // Loads the kernel, which CUDA otherwise puts off until its first launch.
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)),
        "cudaFuncGetAttributes");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  residency[reinterpret_cast<const void*>(kernel)] =
      static_cast<int64_t>(std::max(blocks, 1)) * multiprocessors;
}

bool has_large_arguments() {
#if CUDART_VERSION >= 12010
  return driver_version() >= 12010;
#else
  return false;
#endif
}

template <int kCapacity>
void load_step_kernels(Residency& residency, int multiprocessors) {
  constexpr StorageType kTypes[] = {StorageType::kFloat32, StorageType::kFloat64,
                                    StorageType::kBFloat16, StorageType::kFloat16};
  for (const StorageType type : kTypes) {
    for (const StorageType momentum_type : {type, StorageType::kFloat32}) {
      for (const bool strided : {false, true}) {
        if (strided && kCapacity != kSmallLaunch) continue;
        load(residency, step_kernel_of<kCapacity>(type, momentum_type, strided), multiprocessors);
      }
    }
  }
}

template <typename... Parameters, typename... Arguments>
void launch_kernel(void (*kernel)(Parameters...), int64_t blocks, Stream stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = native(stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "cudaLaunchKernelEx");
}

template <int kCapacity>
void launch_step_of(int device, Stream stream, const Launch& launch) {
  StepArguments<kCapacity> step;
  step.clocks = launch.clocks;
  step.tensors = launch.tensors;
  step.layouts = launch.layouts;
  step.grad_scale = launch.grad_scale;
  step.chunks = launch.chunks;
  step.count = static_cast<int32_t>(launch.grads.size());
  step.ends_step = launch.ends_step;
  std::copy(launch.grads.begin(), launch.grads.end(), step.grads);
  std::fill(step.grads + launch.grads.size(), step.grads + kCapacity, nullptr);
  const auto kernel = step_kernel_of<kCapacity>(launch.type, launch.momentum_type, launch.strided);
  const int64_t resident = residencies().at(device).at(reinterpret_cast<const void*>(kernel));
  const int64_t blocks = std::max<int64_t>(1, std::min(launch.chunks, resident));
  launch_kernel(kernel, blocks, stream, step);
}

int32_t capacity_limit = 0;

}  // namespace

int32_t launch_capacity(bool strided) {
  const int32_t most = has_large_arguments() && !strided ? kLargeLaunch : kSmallLaunch;
  return capacity_limit == 0 ? most : std::min(capacity_limit, most);
}

void limit_launch_capacity(int32_t limit) { capacity_limit = limit; }

void preload(int device) {
  if (residencies().count(device) != 0) return;
  use_device(device);
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  Residency residency;
  load(residency, &clock_kernel, multiprocessors);
  load_step_kernels<kSmallLaunch>(residency, multiprocessors);
#if CUDART_VERSION >= 12010
  if (has_large_arguments()) load_step_kernels<kLargeLaunch>(residency, multiprocessors);
#endif
  residencies()[device] = std::move(residency);
}

bool is_capturing(int device, Stream stream) {
  use_device(device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(native(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

void upload(int device, Stream stream, void* to, const void* from, size_t bytes) {
  use_device(device);
  // From pageable memory: the call returns when CUDA has taken its own copy of it.
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, native(stream)),
        "cudaMemcpyAsync");
}

void download(int device, Stream stream, void* to, const void* from, size_t bytes) {
  use_device(device);
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, native(stream)),
        "cudaMemcpyAsync");
  check(cudaStreamSynchronize(native(stream)), "cudaStreamSynchronize");
}

void launch_step(int device, Stream stream, const Launch& launch) {
  use_device(device);
#if CUDART_VERSION >= 12010
  if (launch.grads.size() > static_cast<size_t>(kSmallLaunch)) {
    return launch_step_of<kLargeLaunch>(device, stream, launch);
  }
#endif
  launch_step_of<kSmallLaunch>(device, stream, launch);
}

void launch_clock(int device, Stream stream, const Clocks& clocks, int64_t updates,
                  int64_t samples) {
  use_device(device);
  launch_kernel(&clock_kernel, 1, stream, clocks, updates, samples);
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

std::string version_text(int version) {
  if (version == 0) return "none";
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace fastlr::cuda

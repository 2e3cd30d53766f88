// How the launcher loads and launches kernels. Instantiated once for each size of arguments, in a
// file of its own: a driver that knows the small ones only then need not load the others.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <map>

#include "../rules.h"
#include "kernels.cuh"
#include "step_cuda.h"

namespace fastlr::cuda {

// Throws for a failed call, by its name.
void check(cudaError_t error, const char* call);

// How many blocks of each kernel a device holds at a time: the size of a persistent grid.
using Residency = std::map<const void*, int64_t>;

// What is done with the kernels of one rule, or of the norm, and one size of arguments.
struct Kernels {
  void (*load)(Residency& residency, int multiprocessors, bool staged);
  void (*launch)(const Residency& residency, Stream stream, const Launch& launch);
};

// By the rules' indices: those of kLargeLaunch, from CUDA 12.1 on.
extern const Kernels kLargeKernels[];
extern const Kernels kLargeNormKernels;

template <int kCapacity>
using StepKernel = void (*)(StepArguments<kCapacity>);

// Strided parameters are rare, and a stage's bytes take longer than another launch: neither has
// kernels with large arguments, which would only take longer to build.
template <typename R, typename P, typename M, int kCapacity>
StepKernel<kCapacity> step_kernel_of(bool strided, bool staged) {
  if constexpr (kCapacity == kSmallLaunch) {
    if (strided && staged) return &step_kernel<R, P, M, true, true, kCapacity>;
    if (strided) return &step_kernel<R, P, M, true, false, kCapacity>;
    if (staged) return &step_kernel<R, P, M, false, true, kCapacity>;
  }
  return &step_kernel<R, P, M, false, false, kCapacity>;
}

template <typename R, typename P, int kCapacity>
StepKernel<kCapacity> step_kernel_of(bool wide_state, bool strided, bool staged) {
  return wide_state ? step_kernel_of<R, P, float, kCapacity>(strided, staged)
                    : step_kernel_of<R, P, P, kCapacity>(strided, staged);
}

template <typename R, int kCapacity>
StepKernel<kCapacity> step_kernel_of(StorageType type, StorageType state_type, bool strided,
                                     bool staged) {
  const bool wide = type != state_type;
  switch (type) {
    case StorageType::kFloat64:
      return step_kernel_of<R, double, kCapacity>(wide, strided, staged);
    case StorageType::kBFloat16:
      return step_kernel_of<R, BFloat16, kCapacity>(wide, strided, staged);
    case StorageType::kFloat16:
      return step_kernel_of<R, Float16, kCapacity>(wide, strided, staged);
    default:
      return step_kernel_of<R, float, float, kCapacity>(strided, staged);
  }
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

constexpr StorageType kStorageTypes[] = {StorageType::kFloat32, StorageType::kFloat64,
                                         StorageType::kBFloat16, StorageType::kFloat16};

template <typename R, int kCapacity>
void load_step_kernels(Residency& residency, int multiprocessors, bool staged) {
  for (const StorageType type : kStorageTypes) {
    for (const StorageType state_type : {type, StorageType::kFloat32}) {
      for (const bool strided : {false, true}) {
        if ((strided || staged) && kCapacity != kSmallLaunch) continue;
        load(residency, step_kernel_of<R, kCapacity>(type, state_type, strided, staged),
             multiprocessors);
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
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "cudaLaunchKernelEx");
}

template <int kCapacity>
void launch_with(StepKernel<kCapacity> kernel, const Residency& residency, Stream stream,
                 const Launch& launch) {
  StepArguments<kCapacity> step;
  static_cast<StepHead&>(step) = launch.head;
  std::copy(launch.grads.begin(), launch.grads.end(), step.grads);
  std::fill(step.grads + launch.grads.size(), step.grads + kCapacity, nullptr);
  const int64_t resident = residency.at(reinterpret_cast<const void*>(kernel));
  const int64_t blocks = std::max<int64_t>(1, std::min(launch.head.chunks, resident));
  launch_kernel(kernel, blocks, stream, step);
}

template <typename R, int kCapacity>
void launch_step_of(const Residency& residency, Stream stream, const Launch& launch) {
  launch_with<kCapacity>(
      step_kernel_of<R, kCapacity>(launch.type, launch.state_type, launch.strided, launch.staged),
      residency, stream, launch);
}

template <typename R, int kCapacity>
constexpr Kernels kernels_of() {
  return {&load_step_kernels<R, kCapacity>, &launch_step_of<R, kCapacity>};
}

template <typename P, int kCapacity>
StepKernel<kCapacity> norm_kernel_of(bool strided) {
  if constexpr (kCapacity == kSmallLaunch) {
    if (strided) return &norm_kernel<P, true, kCapacity>;
  }
  return &norm_kernel<P, false, kCapacity>;
}

template <int kCapacity>
StepKernel<kCapacity> norm_kernel_of(StorageType type, bool strided) {
  switch (type) {
    case StorageType::kFloat64:
      return norm_kernel_of<double, kCapacity>(strided);
    case StorageType::kBFloat16:
      return norm_kernel_of<BFloat16, kCapacity>(strided);
    case StorageType::kFloat16:
      return norm_kernel_of<Float16, kCapacity>(strided);
    default:
      return norm_kernel_of<float, kCapacity>(strided);
  }
}

template <int kCapacity>
void load_norm_kernels(Residency& residency, int multiprocessors, bool) {
  for (const StorageType type : kStorageTypes) {
    for (const bool strided : {false, true}) {
      if (strided && kCapacity != kSmallLaunch) continue;
      load(residency, norm_kernel_of<kCapacity>(type, strided), multiprocessors);
    }
  }
}

template <int kCapacity>
void launch_norm_of(const Residency& residency, Stream stream, const Launch& launch) {
  launch_with<kCapacity>(norm_kernel_of<kCapacity>(launch.type, launch.strided), residency, stream,
                         launch);
}

template <int kCapacity>
constexpr Kernels norm_kernels() {
  return {&load_norm_kernels<kCapacity>, &launch_norm_of<kCapacity>};
}

}  // namespace fastlr::cuda

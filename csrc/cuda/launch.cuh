// How the launcher loads and launches kernels. Instantiated once for each size of arguments, in a
// file of its own: a driver that knows the small ones only then need not load the others.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <map>

#include "kernels.cuh"
#include "step_cuda.h"

namespace fastlr::cuda {

// Throws for a failed call, by its name.
void check(cudaError_t error, const char* call);

// How many blocks of each kernel a device holds at a time: the size of a persistent grid.
using Residency = std::map<const void*, int64_t>;

// Those of kLargeLaunch, from CUDA 12.1 on.
void load_large_kernels(Residency& residency, int multiprocessors);
void launch_large_step(const Residency& residency, Stream stream, const Launch& launch);

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
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "cudaLaunchKernelEx");
}

template <int kCapacity>
void launch_step_of(const Residency& residency, Stream stream, const Launch& launch) {
  StepArguments<kCapacity> step;
  step.clocks = launch.clocks;
  step.tensors = launch.tensors;
  step.layouts = launch.layouts;
  step.grad_scale = launch.grad_scale;
  step.squares = launch.squares;
  step.step_chunks = launch.step_chunks;
  step.chunks = launch.chunks;
  step.count = static_cast<int32_t>(launch.grads.size());
  step.ends_step = launch.ends_step;
  std::copy(launch.grads.begin(), launch.grads.end(), step.grads);
  std::fill(step.grads + launch.grads.size(), step.grads + kCapacity, nullptr);
  const auto kernel = step_kernel_of<kCapacity>(launch.type, launch.momentum_type, launch.strided);
  const int64_t resident = residency.at(reinterpret_cast<const void*>(kernel));
  const int64_t blocks = std::max<int64_t>(1, std::min(launch.chunks, resident));
  launch_kernel(kernel, blocks, stream, step);
}

}  // namespace fastlr::cuda

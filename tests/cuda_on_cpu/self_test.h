// What the emulation's self-test is written with.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#include "emulator.h"

#if !defined(FASTLR_SHARED)
#define FASTLR_SHARED(type, name) \
  using name##_type = type;       \
  __shared__ name##_type name
#endif

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::printf("%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
      std::printf("last failure: %s\n", emulator::last_failure().c_str()); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

inline constexpr unsigned kAll = 0xffffffff;

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

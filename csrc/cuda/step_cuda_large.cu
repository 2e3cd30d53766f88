// The launches of many tensors; see NOTE: [kernel arguments] in kernels.cuh.
#include "launch.cuh"

#if CUDART_VERSION >= 12010

namespace fastlr::cuda {

void load_large_kernels(Residency& residency, int multiprocessors) {
  load_step_kernels<kLargeLaunch>(residency, multiprocessors);
}

void launch_large_step(const Residency& residency, Stream stream, const Launch& launch) {
  launch_step_of<kLargeLaunch>(residency, stream, launch);
}

}  // namespace fastlr::cuda

#endif

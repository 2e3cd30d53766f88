// The launches of many tensors; see NOTE: [kernel arguments] in kernels.cuh.
#include "launch.cuh"

#if CUDART_VERSION >= 12010

namespace fastlr::cuda {

const Kernels kLargeKernels[] = {
#define FASTLR_KERNELS(rule) kernels_of<rule, kLargeLaunch>(),
    FASTLR_FOR_EACH_RULE(FASTLR_KERNELS)
#undef FASTLR_KERNELS
};
const Kernels kLargeNormKernels = norm_kernels<kLargeLaunch>();

}  // namespace fastlr::cuda

#endif

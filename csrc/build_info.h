// What this build contains, for build_info() and error messages.
#pragma once

namespace fastlr {

#if defined(FASTLR_HAS_CUDA)
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

// Which CUDA it was built with, or why with none; FASTLR_CUDA_STATUS comes from the build.
constexpr const char* kCudaStatus = FASTLR_CUDA_STATUS;

// How to get a build with CUDA.
constexpr const char* kCudaRemedy =
    "Build it where there is an nvcc: pip install --force-reinstall --no-deps "
    "-C cmake.define.FASTLR_CUDA=ON, and fastlr's folder";

}  // namespace fastlr

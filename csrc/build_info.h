// What this build contains, for build_info() and error messages.
#pragma once

namespace fastlr {

constexpr const char* kCudaStatus = "this version of fastlr contains no CUDA kernels";

}  // namespace fastlr

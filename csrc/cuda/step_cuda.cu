#include "step_cuda.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "launch.cuh"

namespace fastlr::cuda {

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

namespace {

// Moves the clocks without an update of tensors: after a change of them, of schedules or of
// hyperparameters, for samples consumed, and for a step that has no tensor on this device.
template <typename R>
__global__ void __launch_bounds__(kThreads)
    clock_kernel(const __grid_constant__ Clocks clocks, int64_t updates, int64_t samples,
                 bool measures_norm) {
  const Amp amp = read_amp(clocks.found_inf, nullptr);
  if (updates != 0 && threadIdx.x == 0) {
    clocks.state->last_skipped = !amp.applied;
    clocks.state->norm_measured = measures_norm;
    clocks.state->squared_norm = amp.applied ? 0.0 : NAN;
  }
  advance_clocks<R>(clocks, amp.applied ? updates : 0, samples);
}

// The sums of the squares of each share's gradients; a block each.
__global__ void __launch_bounds__(kThreads, kResidentNormBlocks)
    shares_kernel(const __grid_constant__ Shares shares) {
  const int64_t begin = shares.begin[blockIdx.x], end = shares.begin[blockIdx.x + 1];
  const double sum = sum_of_range(shares.squares, begin, end);
  if (threadIdx.x == 0) shares.sums[blockIdx.x] = sum;
}

// Ends a norm of which these are the sums. By one thread.
__global__ void __launch_bounds__(kThreads, kResidentNormBlocks)
    end_norm_kernel(const __grid_constant__ StepHead step, const double* sums, int32_t count) {
  if (threadIdx.x != 0) return;
  double squares = 0.0;
  for (int32_t i = 0; i < count; ++i) squares += sums[i];
  end_norm(step, read_amp(step.clocks.found_inf, step.grad_scale), squares);
}

cudaStream_t native(Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }

void use_device(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

constexpr Kernels kSmallKernels[] = {
#define FASTLR_KERNELS(rule) kernels_of<rule, kSmallLaunch>(),
    FASTLR_FOR_EACH_RULE(FASTLR_KERNELS)
#undef FASTLR_KERNELS
};
constexpr Kernels kSmallNormKernels = norm_kernels<kSmallLaunch>();

using ClockKernel = void (*)(Clocks, int64_t, int64_t, bool);
constexpr ClockKernel kClockKernels[] = {
#define FASTLR_KERNEL(rule) &clock_kernel<rule>,
    FASTLR_FOR_EACH_RULE(FASTLR_KERNEL)
#undef FASTLR_KERNEL
};

// What was found out when kernels were loaded, by device and rule, or kNorm, and whether those with
// stages. Steps of several optimizers may run at a time.
constexpr int kNorm = -1;
std::map<std::tuple<int, int, bool>, Residency> residencies;
std::mutex residencies_mutex;

const Residency* find_residency(int device, int kernels, bool staged) {
  const std::lock_guard<std::mutex> lock(residencies_mutex);
  const auto found = residencies.find({device, kernels, staged});
  return found == residencies.end() ? nullptr : &found->second;
}

bool has_large_arguments() {
#if CUDART_VERSION >= 12010
  return driver_version() >= 12010;
#else
  return false;
#endif
}

int32_t capacity_limit = 0;

// Of a rule, or kNorm.
const Kernels& small_kernels(int kernels) {
  return kernels == kNorm ? kSmallNormKernels : kSmallKernels[kernels];
}
const Kernels& large_kernels([[maybe_unused]] int kernels) {
#if CUDART_VERSION >= 12010
  return kernels == kNorm ? kLargeNormKernels : kLargeKernels[kernels];
#else
  throw std::logic_error("there are no kernels with large arguments");
#endif
}

void load_kernels(int kernels, bool staged, Residency& residency, int multiprocessors) {
  small_kernels(kernels).load(residency, multiprocessors, staged);
  if (has_large_arguments()) large_kernels(kernels).load(residency, multiprocessors, staged);
}

void launch_kernels(int kernels, int device, Stream stream, const Launch& launch) {
  use_device(device);
  const bool is_small = launch.grads.size() <= static_cast<size_t>(kSmallLaunch);
  (is_small ? small_kernels(kernels) : large_kernels(kernels))
      .launch(*find_residency(device, kernels, kernels != kNorm && launch.staged), stream, launch);
}

}  // namespace

int32_t launch_capacity(bool rare) {
  const int32_t most = has_large_arguments() && !rare ? kLargeLaunch : kSmallLaunch;
  return capacity_limit == 0 ? most : std::min(capacity_limit, most);
}

void limit_launch_capacity(int32_t limit) { capacity_limit = limit; }

namespace {

// load(residency, multiprocessors): of all kernels that there are of a kind.
template <typename Load>
void load_once(int device, int kernels, bool staged, Load load) {
  if (find_residency(device, kernels, staged) != nullptr) return;
  use_device(device);
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  Residency residency;
  load(residency, multiprocessors);
  const std::lock_guard<std::mutex> lock(residencies_mutex);
  residencies.emplace(std::make_tuple(device, kernels, staged), std::move(residency));
}

}  // namespace

void preload(int device, const Rule& rule, bool staged) {
  load_once(device, rule.index, staged, [&](Residency& residency, int multiprocessors) {
    load(residency, kClockKernels[rule.index], multiprocessors);
    load_kernels(rule.index, staged, residency, multiprocessors);
  });
}

void preload_norm(int device) {
  load_once(device, kNorm, false, [](Residency& residency, int multiprocessors) {
    load(residency, &shares_kernel, multiprocessors);
    load(residency, &end_norm_kernel, multiprocessors);
    load_kernels(kNorm, false, residency, multiprocessors);
  });
}

bool is_capturing(int device, Stream stream) {
  use_device(device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(native(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

Graph captured_graph(int device, Stream stream) {
  use_device(device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
  check(cudaStreamGetCaptureInfo(native(stream), &status, nullptr, &graph),
        "cudaStreamGetCaptureInfo");
#else
  check(cudaStreamGetCaptureInfo_v2(native(stream), &status, nullptr, &graph),
        "cudaStreamGetCaptureInfo_v2");
#endif
  if (status != cudaStreamCaptureStatusActive) {
    throw std::runtime_error("the stream is not, or no longer, being captured in a CUDA graph");
  }
  return reinterpret_cast<Graph>(graph);
}

void keep_with_graph(Graph graph, void* object, void (*destroy)(void*)) {
  cudaUserObject_t kept;
  cudaError_t error =
      cudaUserObjectCreate(&kept, object, destroy, 1, cudaUserObjectNoDestructorSync);
  if (error != cudaSuccess) destroy(object);
  check(error, "cudaUserObjectCreate");
  error = cudaGraphRetainUserObject(reinterpret_cast<cudaGraph_t>(graph), kept, 1,
                                    cudaGraphUserObjectMove);
  if (error != cudaSuccess) cudaUserObjectRelease(kept, 1);
  check(error, "cudaGraphRetainUserObject");
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

void launch_step(int device, Stream stream, const Rule& rule, const Launch& launch) {
  launch_kernels(rule.index, device, stream, launch);
}

void launch_norm(int device, Stream stream, const Launch& launch) {
  launch_kernels(kNorm, device, stream, launch);
}

void launch_shares(int device, Stream stream, const Shares& shares) {
  use_device(device);
  launch_kernel(&shares_kernel, shares.count, stream, shares);
}

void launch_end_norm(int device, Stream stream, const StepHead& head, const double* sums,
                     int32_t count) {
  use_device(device);
  launch_kernel(&end_norm_kernel, 1, stream, head, sums, count);
}

void launch_clock(int device, Stream stream, const Rule& rule, const Clocks& clocks,
                  int64_t updates, int64_t samples, bool measures_norm) {
  use_device(device);
  launch_kernel(kClockKernels[rule.index], 1, stream, clocks, updates, samples, measures_norm);
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

// The part of CUDA that the project uses, for the host: with this directory first on the include
// path, plain g++ compiles the .cu files (kernels and launcher) as C++, and emulator.cpp runs their
// kernels on the CPU. Semantics are those of the CUDA C++ Programming Guide; what it leaves
// undefined is reported where that is possible, see emulator.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>  // uses the word __noinline__, which becomes a macro below
#include <tuple>
#include <type_traits>
#include <utility>

#define CUDART_VERSION 12010

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))

// Declares storage that a block's threads share, in the real build
//   using name##_type = type; __shared__ name##_type name;
// As there, each such line (of each instantiation, in a template) is one variable.
#define FASTLR_SHARED(type, name)                 \
  using name##_type = type;                       \
  static char name##_key;                         \
  name##_type& name = *static_cast<name##_type*>( \
      emulator::shared_storage(&name##_key, sizeof(name##_type), alignof(name##_type)))

struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline void __stwb(uint4* to, uint4 value) { *to = value; }
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Written by the emulation whenever another thread of a kernel goes on.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

namespace emulator {

struct Site {
  const char* file;
  int line;
};

enum class BarrierOp { kNone, kCount, kAnd, kOr };
enum class WarpOp { kSync, kShuffle, kBallot };

void* shared_storage(const void* key, size_t size, size_t align);
int barrier(BarrierOp op, bool predicate, Site site);
// Waits for the lanes in `mask`; returns the value that lane `source` brought (all ones where that
// lane takes no part), or for kBallot the lanes whose value is not zero.
uint64_t warp(WarpOp op, unsigned mask, uint64_t value, int source, Site site);
int lane();
void fence();
void pause();
void before_atomic(const volatile void* address, size_t size, Site site);
void after_atomic(const volatile void* address);

template <typename T>
struct Identity {
  using type = T;
};

template <typename T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                "CUDA shuffles values of 4 and 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp(WarpOp::kShuffle, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The read-modify-write itself is relaxed and atomic, so that ThreadSanitizer tells it from a plain
// access and orders nothing by it.
template <typename T, typename Update>
T atomic_update(T* address, Site site, Update update) {
  before_atomic(address, sizeof(T), site);
  T old, desired;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    desired = update(old);
  } while (!__atomic_compare_exchange(address, &old, &desired, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED));
  after_atomic(address);
  return old;
}

template <typename T, typename... Allowed>
constexpr bool is_any_of = (std::is_same<T, Allowed>::value || ...);

}  // namespace emulator

// Where a call stands in the source: evaluated at the call, as default arguments are.
#define EMULATOR_SITE emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

inline void __syncthreads(EMULATOR_SITE) {
  emulator::barrier(emulator::BarrierOp::kNone, false, site);
}
inline int __syncthreads_count(int predicate, EMULATOR_SITE) {
  return emulator::barrier(emulator::BarrierOp::kCount, predicate != 0, site);
}
inline int __syncthreads_and(int predicate, EMULATOR_SITE) {
  return emulator::barrier(emulator::BarrierOp::kAnd, predicate != 0, site);
}
inline int __syncthreads_or(int predicate, EMULATOR_SITE) {
  return emulator::barrier(emulator::BarrierOp::kOr, predicate != 0, site);
}

inline void __syncwarp(unsigned mask = 0xffffffff, EMULATOR_SITE) {
  emulator::warp(emulator::WarpOp::kSync, mask, 0, 0, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return static_cast<unsigned>(
      emulator::warp(emulator::WarpOp::kBallot, mask, predicate != 0, 0, site));
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return __ballot_sync(mask, predicate, site) == mask;
}
// `width` cuts the warp into sections; a lane that names a source outside its own section gets its
// own value (__shfl_xor_sync may also look into earlier sections).
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, EMULATOR_SITE) {
  const int begin = emulator::lane() & ~(width - 1);
  return emulator::shuffle(mask, value, begin + (source & (width - 1)), site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATOR_SITE) {
  const int lane = emulator::lane(), source = lane - static_cast<int>(delta);
  return emulator::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATOR_SITE) {
  const int lane = emulator::lane(), source = lane + static_cast<int>(delta);
  return emulator::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, EMULATOR_SITE) {
  const int lane = emulator::lane(), source = lane ^ lanes;
  return emulator::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, site);
}

inline void __threadfence() { emulator::fence(); }
// Orders nothing that another block sees; nor here, more strictly than CUDA, what another thread of
// the same block sees by an atomic operation.
inline void __threadfence_block() { emulator::pause(); }

template <typename T>
T atomicAdd(T* address, typename emulator::Identity<T>::type value, EMULATOR_SITE) {
  static_assert(emulator::is_any_of<T, int, unsigned, unsigned long long, float, double>);
  return emulator::atomic_update(address, site, [&](T old) { return old + value; });
}
template <typename T>
T atomicMax(T* address, typename emulator::Identity<T>::type value, EMULATOR_SITE) {
  static_assert(emulator::is_any_of<T, int, unsigned, long long, unsigned long long>);
  return emulator::atomic_update(address, site, [&](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicExch(T* address, typename emulator::Identity<T>::type value, EMULATOR_SITE) {
  static_assert(emulator::is_any_of<T, int, unsigned, unsigned long long, float>);
  return emulator::atomic_update(address, site, [&](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, typename emulator::Identity<T>::type compare,
            typename emulator::Identity<T>::type value, EMULATOR_SITE) {
  static_assert(emulator::is_any_of<T, int, unsigned, unsigned long long>);
  return emulator::atomic_update(address, site,
                                 [&](T old) { return old == compare ? value : old; });
}

// Loads and stores with a cache hint.
template <typename T>
T __ldca(const T* address) {
  return *address;
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, typename emulator::Identity<T>::type value) {
  *address = value;
}

#if !defined(__GLIBC_PREREQ) || !__GLIBC_PREREQ(2, 41)  // from 2.41 on <cmath> has it
inline double cospi(double x) {
  constexpr double kPi = 3.14159265358979323846;
  const double part = std::fabs(std::fmod(x, 2.0));  // exact
  const double to_whole = part > 1.0 ? 2.0 - part : part;
  if (to_whole < 0.25) return std::cos(kPi * to_whole);
  if (to_whole <= 0.75) return std::sin(kPi * (0.5 - to_whole));
  return -std::cos(kPi * (1.0 - to_whole));
}
#endif

// The values of enumerations are CUDA's.
#define EMULATOR_ERRORS(X)                                                                      \
  X(cudaSuccess, 0, "no error")                                                                 \
  X(cudaErrorInvalidValue, 1, "invalid argument")                                               \
  X(cudaErrorMemoryAllocation, 2, "out of memory")                                              \
  X(cudaErrorInitializationError, 3, "initialization error")                                    \
  X(cudaErrorCudartUnloading, 4, "driver shutting down")                                        \
  X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                         \
  X(cudaErrorInsufficientDriver, 35, "driver version is insufficient for runtime version")      \
  X(cudaErrorInvalidDeviceFunction, 98, "invalid device function")                              \
  X(cudaErrorNoDevice, 100, "no CUDA-capable device is detected")                               \
  X(cudaErrorInvalidDevice, 101, "invalid device ordinal")                                      \
  X(cudaErrorNoKernelImageForDevice, 209, "no kernel image is available for execution")         \
  X(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")                             \
  X(cudaErrorNotReady, 600, "device not ready")                                                 \
  X(cudaErrorIllegalAddress, 700, "an illegal memory access was encountered")                   \
  X(cudaErrorLaunchOutOfResources, 701, "too many resources requested for launch")              \
  X(cudaErrorMisalignedAddress, 716, "misaligned address")                                      \
  X(cudaErrorLaunchFailure, 719, "unspecified launch failure")                                  \
  X(cudaErrorNotSupported, 801, "operation not supported")                                      \
  X(cudaErrorStreamCaptureUnsupported, 900, "operation not permitted when stream is capturing") \
  X(cudaErrorStreamCaptureInvalidated, 901,                                                     \
    "operation failed due to a previous error during capture")                                  \
  X(cudaErrorUnknown, 999, "unknown error")

#define EMULATOR_ENUMERATOR(name, value, text) name = value,
enum cudaError { EMULATOR_ERRORS(EMULATOR_ENUMERATOR) };
#undef EMULATOR_ENUMERATOR
typedef cudaError cudaError_t;

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4
};
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxBlocksPerMultiprocessor = 106
};
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone = 0,
  cudaStreamCaptureStatusActive = 1,
  cudaStreamCaptureStatusInvalidated = 2
};

typedef struct CUstream_st* cudaStream_t;
typedef struct CUgraph_st* cudaGraph_t;
typedef struct CUgraphNode_st* cudaGraphNode_t;
typedef struct CUuserObject_st* cudaUserObject_t;
typedef void (*cudaHostFn_t)(void* object);

constexpr unsigned cudaUserObjectNoDestructorSync = 1;
constexpr unsigned cudaGraphUserObjectMove = 1;
typedef struct cudaLaunchAttribute_st cudaLaunchAttribute;  // none is emulated

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  size_t constSizeBytes;
  size_t localSizeBytes;
  int maxThreadsPerBlock;
  int numRegs;
  int ptxVersion;
  int binaryVersion;
};

typedef struct cudaLaunchConfig_st {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
} cudaLaunchConfig_t;

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function);
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t size, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemsetAsync(void* target, int value, size_t size, cudaStream_t stream = nullptr);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                        unsigned long long* id = nullptr,
                                        cudaGraph_t* graph = nullptr,
                                        const cudaGraphNode_t** dependencies = nullptr,
                                        size_t* number_of_dependencies = nullptr);
cudaError_t cudaUserObjectCreate(cudaUserObject_t* made, void* object, cudaHostFn_t destroy,
                                 unsigned references, unsigned flags);
cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count = 1);
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object,
                                      unsigned count = 1, unsigned flags = 0);

namespace emulator {

// A kernel with its copied arguments.
struct Call {
  virtual ~Call() = default;
  virtual void operator()() const = 0;
};

template <typename... Parameters>
struct CallOf final : Call {
  void (*kernel)(Parameters...);
  // A parameter may be a reference: its value is copied all the same, once for all threads.
  std::tuple<std::decay_t<Parameters>...> arguments;

  template <typename... Arguments>
  CallOf(void (*kernel)(Parameters...), Arguments&&... arguments)
      : kernel(kernel), arguments(std::forward<Arguments>(arguments)...) {}
  void operator()() const override { std::apply(kernel, arguments); }
};

template <typename... Parameters>
constexpr size_t parameter_bytes() {
  size_t end = 0;
  ((end = (end + alignof(Parameters) - 1) / alignof(Parameters) * alignof(Parameters) +
          sizeof(Parameters)),
   ...);
  return end;
}

cudaError_t occupancy(int* blocks, const void* function, int threads, size_t shared);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* function, size_t parameter_bytes,
                   std::shared_ptr<const Call> call);

}  // namespace emulator

template <typename Function>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Function* function) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(function));
}

template <typename Function>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function function,
                                                          int threads, size_t shared) {
  return emulator::occupancy(blocks, reinterpret_cast<const void*>(function), threads, shared);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable<std::decay_t<Parameters>>::value && ...),
                "CUDA copies kernel parameters as bytes");
  return emulator::launch(*config, reinterpret_cast<const void*>(kernel),
                          emulator::parameter_bytes<std::decay_t<Parameters>...>(),
                          std::make_shared<const emulator::CallOf<Parameters...>>(
                              kernel, std::forward<Arguments>(arguments)...));
}

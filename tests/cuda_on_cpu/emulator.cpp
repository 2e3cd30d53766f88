// The emulated CUDA runtime: devices, streams, launches, copies, captures.
#include "emulator.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <utility>

#include "cuda_runtime.h"
#include "grid.h"
#include "waiting.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

struct CUuserObject_st {
  void* object;
  cudaHostFn_t destroy;
  unsigned references;
};

namespace emulator {
namespace {

struct Graph {
  std::vector<std::function<cudaError_t()>> nodes;
  std::vector<cudaUserObject_t> objects;  // a reference to each
  bool valid = true;
};

// The process's one emulated driver, with all its devices. Calls from several host threads take
// turns.
struct Runtime {
  std::mutex mutex;
  Random random{0};
  int multiprocessors = 1;
  int blocks_per_multiprocessor = 1;
  int driver_version = 12010;
  int device_count = 1;
  std::string failure;
  Statistics statistics;
  std::set<const void*> loaded_kernels;
  bool held = false;
  std::condition_variable_any let_go;
  std::map<cudaStream_t, Graph> captures;
  std::map<int64_t, Graph> graphs;
  int64_t next_graph = 1;

  Runtime() { seed(0); }

  void seed(uint64_t value) {
    random = Random(value);
    multiprocessors = 1 + static_cast<int>(random.below(3));
    blocks_per_multiprocessor = 1 + static_cast<int>(random.below(2));
  }

  // What every call of the API returns before it does anything.
  cudaError_t state() const {
    if (driver_version / 1000 < CUDART_VERSION / 1000) return cudaErrorInsufficientDriver;
    if (device_count == 0) return cudaErrorNoDevice;
    return failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
  }

  // The capture on this stream, or null.
  Graph* capturing(cudaStream_t stream) {
    const auto found = captures.find(stream);
    return found == captures.end() ? nullptr : &found->second;
  }

  void load(const void* kernel, bool capturing) {
    if (loaded_kernels.insert(kernel).second && capturing) ++statistics.loads_in_capture;
  }

  cudaError_t run(const cudaLaunchConfig_t& config, const Call& call) {
    const uint64_t resident = static_cast<uint64_t>(multiprocessors * blocks_per_multiprocessor);
    failure = running_grid().run(config.gridDim, config.blockDim, resident, random, call);
    if (failure.empty()) return cudaSuccess;
    std::fprintf(stderr, "emulated CUDA: %s\n", failure.c_str());
    return cudaErrorLaunchFailure;
  }
};

// Never destroyed: other objects' destructors may still call.
Runtime& runtime() {
  static Runtime& runtime = *new Runtime;
  return runtime;
}

using Lock = std::lock_guard<std::mutex>;

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t refuse_in_capture(Graph& graph) {
  graph.valid = false;
  return report(cudaErrorStreamCaptureUnsupported);
}

cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// A function of the runtime's may be called when the last reference goes only as CUDA allows it:
// not at all. With the runtime locked, a call would never return, which shows it.
void drop(cudaUserObject_t object, unsigned count) {
  object->references -= count;
  if (object->references != 0) return;
  object->destroy(object->object);
  delete object;
}

void release(const Graph& graph) {
  for (const cudaUserObject_t object : graph.objects) drop(object, 1);
}

bool fits_a_device(dim3 grid, dim3 block) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return grid.x >= 1 && grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 &&
         grid.z <= 65535 && threads >= 1 && threads <= 1024 && block.z <= 64;
}

}  // namespace

void* shared_storage(const void* key, size_t size, size_t align) {
  return running_grid().shared_storage(key, size, align);
}
int barrier(BarrierOp op, bool predicate, Site site) {
  return running_grid().barrier(op, predicate, site);
}
uint64_t warp(WarpOp op, unsigned mask, uint64_t value, int source, Site site) {
  return running_grid().warp(op, mask, value, source, site);
}
int lane() { return running_grid().lane(); }
void fence() { running_grid().fence(); }
void pause() { running_grid().pause(); }
void before_atomic(const volatile void* address, size_t size, Site site) {
  running_grid().before_atomic(address, size, site);
}
void after_atomic(const volatile void* address) { running_grid().after_atomic(address); }

cudaError_t occupancy(int* blocks, const void* function, int threads, size_t) {
  Runtime& r = runtime();
  const Lock lock(r.mutex);
  if (r.state() != cudaSuccess) return report(r.state());
  if (threads < 1 || threads > 1024) return report(cudaErrorInvalidValue);
  r.load(function, !r.captures.empty());
  *blocks = r.blocks_per_multiprocessor;
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* function, size_t parameter_bytes,
                   std::shared_ptr<const Call> call) {
  Runtime& r = runtime();
  const Lock lock(r.mutex);
  if (r.state() != cudaSuccess) return report(r.state());
  Graph* const graph = r.capturing(config.stream);
  if (graph && !graph->valid) return report(cudaErrorStreamCaptureInvalidated);
  if (!fits_a_device(config.gridDim, config.blockDim)) return report(cudaErrorInvalidConfiguration);
  if (config.dynamicSmemBytes != 0 || config.numAttrs != 0) return report(cudaErrorNotSupported);
  if (parameter_bytes > (r.driver_version >= 12010 ? 32764u : 4096u))
    return report(cudaErrorInvalidValue);

  r.load(function, graph != nullptr);
  const dim3 grid = config.gridDim, block = config.blockDim;
  std::vector<Launch>& recent = r.statistics.recent_launches;
  if (recent.size() == 256) recent.erase(recent.begin());
  recent.push_back({current_device,
                    reinterpret_cast<uintptr_t>(config.stream),
                    {grid.x, grid.y, grid.z},
                    {block.x, block.y, block.z},
                    parameter_bytes,
                    graph != nullptr});
  ++r.statistics.launches;
  if (!graph) return report(r.run(config, *call));
  graph->nodes.push_back([&r, config, call] {
    ++r.statistics.replayed_launches;
    return r.run(config, *call);
  });
  return cudaSuccess;
}

void set_seed(uint64_t seed) {
  const Lock lock(runtime().mutex);
  runtime().seed(seed);
}

void set_driver_version(int version) {
  const Lock lock(runtime().mutex);
  runtime().driver_version = version;
}

void set_device_count(int count) {
  const Lock lock(runtime().mutex);
  runtime().device_count = count;
}

Statistics statistics() {
  const Lock lock(runtime().mutex);
  return runtime().statistics;
}

void reset_statistics() {
  const Lock lock(runtime().mutex);
  runtime().statistics = {};
}

void hold_streams() {
  const Lock lock(runtime().mutex);
  runtime().held = true;
}

void let_streams_go() {
  const Lock lock(runtime().mutex);
  runtime().held = false;
  runtime().let_go.notify_all();
}

std::string last_failure() {
  const Lock lock(runtime().mutex);
  return runtime().failure;
}

void reset_failure() {
  const Lock lock(runtime().mutex);
  runtime().failure.clear();
  last_error = cudaSuccess;
}

void begin_capture(uintptr_t stream) {
  Runtime& r = runtime();
  const Lock lock(r.mutex);
  if (!r.captures.emplace(stream_of(stream), Graph{}).second)
    throw std::runtime_error("the stream is capturing already");
}

int64_t end_capture(uintptr_t stream) {
  Runtime& r = runtime();
  const Lock lock(r.mutex);
  const auto found = r.captures.find(stream_of(stream));
  if (found == r.captures.end()) throw std::runtime_error("the stream is not capturing");
  Graph graph = std::move(found->second);
  r.captures.erase(found);
  if (!graph.valid) {
    release(graph);
    throw std::runtime_error("the capture was invalidated");
  }
  r.graphs[r.next_graph] = std::move(graph);
  return r.next_graph++;
}

void replay(int64_t number) {
  Runtime& r = runtime();
  const Lock lock(r.mutex);
  const auto found = r.graphs.find(number);
  if (found == r.graphs.end()) throw std::runtime_error("no such graph");
  cudaError_t error = r.state();
  for (const std::function<cudaError_t()>& node : found->second.nodes)
    if (error == cudaSuccess) error = node();
  if (report(error) != cudaSuccess)
    throw std::runtime_error(std::string(cudaGetErrorName(error)) + " " + r.failure);
}

void destroy(int64_t number) {
  Runtime& r = runtime();
  const Lock lock(r.mutex);
  const auto found = r.graphs.find(number);
  if (found == r.graphs.end()) throw std::runtime_error("no such graph");
  release(found->second);
  r.graphs.erase(found);
}

}  // namespace emulator

using namespace emulator;

#define EMULATOR_CASE(name, value, text) \
  case name:                             \
    return pick(#name, text);
template <typename Pick>
static const char* describe(cudaError_t error, Pick pick) {
  switch (error) { EMULATOR_ERRORS(EMULATOR_CASE) }
  return "unrecognized error code";
}
const char* cudaGetErrorName(cudaError_t error) {
  return describe(error, [](const char* name, const char*) { return name; });
}
const char* cudaGetErrorString(cudaError_t error) {
  return describe(error, [](const char*, const char* text) { return text; });
}

cudaError_t cudaPeekAtLastError() {
  const Lock lock(runtime().mutex);
  return runtime().failure.empty() ? last_error : cudaErrorLaunchFailure;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = cudaPeekAtLastError();
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaDriverGetVersion(int* version) {
  const Lock lock(runtime().mutex);
  *version = runtime().driver_version;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  Runtime& r = runtime();
  const Lock lock(r.mutex);
  *count = r.state() == cudaErrorInsufficientDriver ? 0 : r.device_count;
  return report(r.state());
}

cudaError_t cudaGetDevice(int* device) {
  Runtime& r = runtime();
  const Lock lock(r.mutex);
  *device = current_device;
  return report(r.state());
}

cudaError_t cudaSetDevice(int device) {
  Runtime& r = runtime();
  const Lock lock(r.mutex);
  ++r.statistics.set_device_calls;
  if (r.state() != cudaSuccess) return report(r.state());
  if (device < 0 || device >= r.device_count) return report(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  Runtime& r = runtime();
  const Lock lock(r.mutex);
  if (r.state() != cudaSuccess) return report(r.state());
  if (device < 0 || device >= r.device_count) return report(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 << 10;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = warpSize;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = r.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 1024 * r.blocks_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = r.blocks_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
  }
  return report(cudaErrorInvalidValue);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  Runtime& r = runtime();
  const Lock lock(r.mutex);
  if (r.state() != cudaSuccess) return report(r.state());
  if (!function) return report(cudaErrorInvalidDeviceFunction);
  r.load(function, !r.captures.empty());
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t size, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  Runtime& r = runtime();
  const Lock lock(r.mutex);
  ++r.statistics.copies;
  if (r.state() != cudaSuccess) return report(r.state());
  if (Graph* const graph = r.capturing(stream)) {
    if (!graph->valid) return report(cudaErrorStreamCaptureInvalidated);
    if (kind != cudaMemcpyDeviceToDevice) return refuse_in_capture(*graph);
    graph->nodes.push_back([=] {
      std::memmove(target, source, size);
      return cudaSuccess;
    });
    return cudaSuccess;
  }
  r.statistics.last_copy_device = current_device;
  if (kind == cudaMemcpyHostToDevice) r.statistics.uploaded_bytes += static_cast<int64_t>(size);
  if (kind == cudaMemcpyDeviceToHost) r.statistics.downloaded_bytes += static_cast<int64_t>(size);
  if (size) std::memmove(target, source, size);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* target, int value, size_t size, cudaStream_t stream) {
  Runtime& r = runtime();
  const Lock lock(r.mutex);
  ++r.statistics.memsets;
  if (r.state() != cudaSuccess) return report(r.state());
  if (Graph* const graph = r.capturing(stream)) {
    if (!graph->valid) return report(cudaErrorStreamCaptureInvalidated);
    graph->nodes.push_back([=] {
      std::memset(target, value, size);
      return cudaSuccess;
    });
    return cudaSuccess;
  }
  if (size) std::memset(target, value, size);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Runtime& r = runtime();
  const Lock lock(r.mutex);
  ++r.statistics.stream_synchronizations;
  if (r.state() != cudaSuccess) return report(r.state());
  if (Graph* const graph = r.capturing(stream)) return refuse_in_capture(*graph);
  const bool gone_on =
      r.let_go.wait_for(r.mutex, std::chrono::seconds(20), [&] { return !r.held; });
  return gone_on ? cudaSuccess : report(cudaErrorUnknown);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  Runtime& r = runtime();
  const Lock lock(r.mutex);
  if (r.state() != cudaSuccess) return report(r.state());
  const Graph* const graph = r.capturing(stream);
  *status = !graph         ? cudaStreamCaptureStatusNone
            : graph->valid ? cudaStreamCaptureStatusActive
                           : cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                        unsigned long long*, cudaGraph_t* graph,
                                        const cudaGraphNode_t**, size_t*) {
  const cudaError_t error = cudaStreamIsCapturing(stream, status);
  if (error != cudaSuccess || graph == nullptr) return error;
  Runtime& r = runtime();
  const Lock lock(r.mutex);
  *graph = reinterpret_cast<cudaGraph_t>(r.capturing(stream));
  return cudaSuccess;
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t* made, void* object, cudaHostFn_t destroy,
                                 unsigned references, unsigned flags) {
  const Lock lock(runtime().mutex);
  if (!made || !destroy || references == 0 || flags != cudaUserObjectNoDestructorSync) {
    return report(cudaErrorInvalidValue);
  }
  *made = new CUuserObject_st{object, destroy, references};
  return cudaSuccess;
}

cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count) {
  const Lock lock(runtime().mutex);
  if (!object || count == 0 || count > object->references) return report(cudaErrorInvalidValue);
  drop(object, count);
  return cudaSuccess;
}

cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count,
                                      unsigned flags) {
  const Lock lock(runtime().mutex);
  if (!graph || !object || count != 1) return report(cudaErrorInvalidValue);
  if (flags != cudaGraphUserObjectMove) object->references += count;
  reinterpret_cast<Graph*>(graph)->objects.push_back(object);
  return cudaSuccess;
}

// Checks the emulation itself with small kernels of known results.
//   self_test              every check; prints "ok"
//   self_test fault NAME   one kernel with a planted fault that only a sanitizer sees
// The kernels and calls are CUDA's: nvcc compiles this file too.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "emulator.h"
#include "planted_faults.h"
#include "self_test.h"

namespace {

// A stream other than the default one.
const cudaStream_t kStream = reinterpret_cast<cudaStream_t>(0x1000);
constexpr uintptr_t kStreamNumber = 0x1000;

template <typename... Parameters, typename... Arguments>
cudaError_t launch_on_stream(void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = config.blockDim = dim3(1);
  config.stream = kStream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

bool throws(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

// Indices.

__global__ void count_visits(int* visits) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  ++visits[block * blockDim.x * blockDim.y * blockDim.z + thread];
}

void check_indices() {
  for (const dim3 grid : {dim3(1), dim3(7), dim3(3, 2, 4)}) {
    for (const dim3 block : {dim3(1), dim3(33), dim3(5, 3, 2), dim3(1024)}) {
      std::vector<int> visits(grid.x * grid.y * grid.z * block.x * block.y * block.z);
      CHECK(launch(count_visits, grid, block, visits.data()) == cudaSuccess);
      CHECK(std::count(visits.begin(), visits.end(), 1) == static_cast<int>(visits.size()));
    }
  }
  int value;
  for (const dim3 grid : {dim3(0), dim3(1, 65536)})
    CHECK(launch(count_visits, grid, dim3(1), &value) == cudaErrorInvalidConfiguration);
  for (const dim3 block : {dim3(0), dim3(1025), dim3(1, 1, 65)})
    CHECK(launch(count_visits, dim3(1), block, &value) == cudaErrorInvalidConfiguration);
  CHECK(cudaPeekAtLastError() == cudaErrorInvalidConfiguration);
  CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess);
}

// Shared memory.

template <typename T>
__device__ void poison_of(T* out) {
  FASTLR_SHARED(T, first);
  FASTLR_SHARED(T[3], rest);
  if (threadIdx.x == 0) {
    out[0] = first;
    first = 1;  // neither another variable nor the next block sees it
    for (int i = 0; i < 3; ++i) out[1 + i] = rest[i];
  }
}

__global__ void read_poison(unsigned* words, double* doubles) {
  poison_of(words + 4 * blockIdx.x);
  poison_of(doubles + 4 * blockIdx.x);
}

void check_shared_memory() {
  unsigned words[40] = {};
  double doubles[40] = {};
  CHECK(launch(read_poison, dim3(10), dim3(40), words, doubles) == cudaSuccess);
  for (const unsigned word : words) CHECK(word == 0xffffffff);
  for (const double value : doubles) CHECK(std::isnan(value));
}

// Barriers and warps.

__global__ void sum_by_barriers(const int* values, int* sum, int* votes) {
  FASTLR_SHARED(int[256], partial);
  const unsigned i = threadIdx.x;
  partial[i] = values[i];
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (i < half) partial[i] += partial[i + half];
  }
  const int odd = __syncthreads_count(values[i] % 2);
  const int all_positive = __syncthreads_and(values[i] > 0);
  const int any_large = __syncthreads_or(values[i] > 255);
  if (i == 0) {
    *sum = partial[0];
    votes[0] = odd;
    votes[1] = all_positive;
    votes[2] = any_large;
  }
}

template <typename T>
__global__ void sum_by_shuffles(const T* values, T* sum) {
  FASTLR_SHARED(T[8], sums);
  T value = values[threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_down_sync(kAll, value, lanes);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  value = threadIdx.x < 8 ? sums[threadIdx.x] : T(0);
  for (int lanes = 4; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAll, value, lanes);
  if (threadIdx.x == 0) *sum = value;
}

void check_reductions() {
  std::vector<int> values(256);
  for (int i = 0; i < 256; ++i) values[i] = i;
  const std::vector<double> doubles(values.begin(), values.end());
  const std::vector<float> floats(values.begin(), values.end());
  for (uint64_t seed = 0; seed < 10; ++seed) {
    emulator::set_seed(seed);
    int sum = 0, votes[3] = {};
    CHECK(launch(sum_by_barriers, dim3(1), dim3(256), values.data(), &sum, votes) == cudaSuccess);
    CHECK(sum == 32640 && votes[0] == 128 && votes[1] == 0 && votes[2] == 0);
    double of_doubles = 0;
    float of_floats = 0;
    CHECK(launch(sum_by_shuffles<double>, dim3(1), dim3(256), doubles.data(), &of_doubles) ==
          cudaSuccess);
    CHECK(launch(sum_by_shuffles<float>, dim3(1), dim3(256), floats.data(), &of_floats) ==
          cudaSuccess);
    CHECK(of_doubles == 32640 && of_floats == 32640);
  }
}

struct Lane {
  int index, up, down, exchanged, any, all;
  long long wide;
  unsigned ballot;
};

__global__ void exchange(Lane* lanes, int width) {
  const int i = threadIdx.x, value = 100 + i;
  Lane& lane = lanes[i];
  // Two halves of a warp that go different ways.
  if (i < 16) {
    lane.index = __shfl_sync(0xffffu, value, 3, width);
  } else {
    lane.index = __shfl_sync(0xffff0000u, value, 19, width);
  }
  lane.up = __shfl_up_sync(kAll, value, 2, width);
  lane.down = __shfl_down_sync(kAll, value, 2, width);
  lane.exchanged = __shfl_xor_sync(kAll, value, 5, width);
  lane.wide = __shfl_sync(kAll, static_cast<long long>(value) << 40, 31);
  lane.ballot = __ballot_sync(kAll, i % 3 == 0);
  lane.any = __any_sync(kAll, i == 7);
  lane.all = __all_sync(kAll, i != 7);
  __syncwarp();
  lane.index += lanes[i ^ 1].ballot != lane.ballot;  // written before __syncwarp()
}

void check_warps() {
  unsigned thirds = 0;
  for (int i = 0; i < 32; i += 3) thirds |= 1u << i;
  for (const int width : {32, 16, 8}) {
    Lane lanes[32];
    CHECK(launch(exchange, dim3(1), dim3(32), lanes, width) == cudaSuccess);
    for (int i = 0; i < 32; ++i) {
      const int begin = i / width * width, end = begin + width;
      CHECK(lanes[i].index == 100 + begin + (i < 16 ? 3 : 19) % width);
      CHECK(lanes[i].up == 100 + (i - 2 < begin ? i : i - 2));
      CHECK(lanes[i].down == 100 + (i + 2 >= end ? i : i + 2));
      CHECK(lanes[i].exchanged == 100 + (i ^ 5));
      CHECK(lanes[i].wide == 131LL << 40);
      CHECK(lanes[i].ballot == thirds && lanes[i].any == 1 && lanes[i].all == 0);
    }
  }
}

// Atomics, and order between blocks.

__global__ void update_atomically(int* ints, unsigned* words, unsigned long long* longs,
                                  float* floats, double* doubles) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(ints, -1);
  atomicMax(ints + 1, i);
  atomicAdd(words, 1u);
  atomicExch(words + 1, 7u);
  atomicAdd(longs, 1ull << 40);
  for (unsigned long long seen = atomicAdd(longs + 1, 0ull), expected = ~seen; seen != expected;) {
    expected = seen;
    seen = atomicCAS(longs + 1, expected, expected + i);
  }
  atomicAdd(floats, 0.5f);
  atomicAdd(doubles, 0.25);
}

// Tickets in place of a plain read of what others write.
__global__ void take_turns(int* turns, unsigned* next) {
  turns[atomicAdd(next, 1u)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

// Each block leaves its part; the one that comes last adds them up.
__global__ void add_by_last_block(const int* values, int* partial, unsigned* ticket, int* sum,
                                  unsigned* last_block) {
  FASTLR_SHARED(bool, is_last);
  FASTLR_SHARED(int, part);
  if (threadIdx.x == 0) part = 0;
  __syncthreads();
  atomicAdd(&part, values[blockIdx.x * blockDim.x + threadIdx.x]);
  __syncthreads();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = part;
    __threadfence();
    is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last || threadIdx.x != 0) return;
  *sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) *sum += partial[i];
  *last_block = blockIdx.x;
  *ticket = 0;
}

void check_atomics() {
  int ints[2] = {};
  unsigned words[2] = {};
  unsigned long long longs[2] = {};
  float floats = 0;
  double doubles = 0;
  CHECK(launch(update_atomically, dim3(4), dim3(32), ints, words, longs, &floats, &doubles) ==
        cudaSuccess);
  CHECK(ints[0] == -128 && ints[1] == 127 && words[0] == 128 && words[1] == 7);
  CHECK(longs[0] == 128ull << 40 && longs[1] == 127 * 64 && floats == 64 && doubles == 32);
}

void check_orders() {
  const auto turns_of = [](uint64_t seed) {
    emulator::set_seed(seed);
    std::vector<int> turns(6 * 32);
    unsigned next = 0;
    CHECK(launch(take_turns, dim3(6), dim3(32), turns.data(), &next) == cudaSuccess);
    return turns;
  };
  std::set<std::vector<int>> orders;
  std::set<int> first_blocks, last_blocks, residents;
  bool mixed = false;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    const std::vector<int> turns = turns_of(seed);
    CHECK(turns == turns_of(seed));
    orders.insert(turns);
    first_blocks.insert(turns.front() / 32);
    last_blocks.insert(turns.back() / 32);
    int changes = 0;
    for (size_t i = 1; i < turns.size(); ++i) changes += turns[i] / 32 != turns[i - 1] / 32;
    mixed |= changes > 48;
    std::vector<int> sorted = turns;
    std::sort(sorted.begin(), sorted.end());
    for (int i = 0; i < 6 * 32; ++i) CHECK(sorted[i] == i);
    int multiprocessors = 0, blocks = 0;
    CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0) ==
          cudaSuccess);
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, take_turns, 32, 0) == cudaSuccess);
    residents.insert(multiprocessors * blocks);
  }
  CHECK(orders.size() == 60 && first_blocks.size() == 6 && last_blocks.size() == 6 && mixed);
  CHECK((residents == std::set<int>{1, 2, 3, 4, 6}));
}

void check_last_block() {
  std::vector<int> values(5 * 64);
  for (int i = 0; i < 5 * 64; ++i) values[i] = i;
  std::set<unsigned> last_blocks;
  for (uint64_t seed = 0; seed < 100; ++seed) {
    emulator::set_seed(seed);
    int partial[5], sum = 0;
    unsigned ticket = 0, last_block = 0;
    CHECK(launch(add_by_last_block, dim3(5), dim3(64), values.data(), partial, &ticket, &sum,
                 &last_block) == cudaSuccess);
    CHECK(sum == 160 * 319 && ticket == 0);
    last_blocks.insert(last_block);
  }
  CHECK(last_blocks.size() == 5);

  int values_of_blocks[4], sum = 0;
  unsigned ticket = 0;
  CHECK(launch(publish<true, true>, dim3(4), dim3(1), values_of_blocks, &ticket, &sum) ==
        cudaSuccess);
  CHECK(sum == 4);
}

// Failures.

__global__ void wait_at_two_places() {
  if (threadIdx.x < 3) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
constexpr int kFirstPlace = __LINE__ - 5, kSecondPlace = __LINE__ - 3;

__global__ void leave_before_barrier() {
  if (threadIdx.x >= 60) return;
  __syncthreads();
}

__global__ void shuffle_without_some(int* out) {
  if (threadIdx.x % 32 == 5) return;
  out[threadIdx.x] = __shfl_sync(kAll, 1, 0);
}

__global__ void shuffle_outside_mask(int* out) { *out = __shfl_sync(2u, 1, 0); }

__global__ void wait_for_each_other(int* out) {
  if (threadIdx.x == 0) {
    __syncthreads();
    __syncwarp();
  } else {
    __syncwarp();
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void sync_those_left(int* out) {
  if (threadIdx.x % 3 != 0) return;
  __syncwarp();
  out[threadIdx.x] = 1;
}

__global__ void spin(unsigned* flag) {
  while (atomicAdd(flag, 0u) == 0) {
  }
}

__global__ void add_misaligned(char* bytes) {
  atomicAdd(reinterpret_cast<unsigned*>(bytes + 2), 1u);
}

__global__ void do_nothing() {}

void expect_failure(cudaError_t error, const std::vector<std::string>& parts) {
  CHECK(error == cudaErrorLaunchFailure);
  const std::string message = emulator::last_failure();
  for (const std::string& part : parts) {
    if (message.find(part) != std::string::npos) continue;
    std::printf("no \"%s\" in \"%s\"\n", part.c_str(), message.c_str());
    std::exit(1);
  }
  // It sticks.
  int device;
  CHECK(launch(do_nothing, dim3(1), dim3(1)) == cudaErrorLaunchFailure);
  CHECK(cudaGetDevice(&device) == cudaErrorLaunchFailure);
  CHECK(cudaGetLastError() == cudaErrorLaunchFailure);
  CHECK(cudaGetLastError() == cudaErrorLaunchFailure);
  emulator::reset_failure();
  CHECK(emulator::last_failure().empty() && cudaGetLastError() == cudaSuccess);
  CHECK(launch(do_nothing, dim3(3), dim3(256)) == cudaSuccess);
}

void check_failures() {
  int out[64] = {};
  for (uint64_t seed = 0; seed < 10; ++seed) {
    emulator::set_seed(seed);
    CHECK(launch(sync_those_left, dim3(1), dim3(40), out) == cudaSuccess);
  }
  CHECK(std::count(out, out + 40, 1) == 14);
  const auto at = [](int line) { return "self_test.cpp:" + std::to_string(line); };
  expect_failure(launch(wait_at_two_places, dim3(1), dim3(8)),
                 {"divergent barrier in block (0,0,0)", "3 threads (0-2) at ", at(kFirstPlace),
                  "5 threads (3-7) at ", at(kSecondPlace)});
  expect_failure(
      launch(leave_before_barrier, dim3(1, 3), dim3(64)),
      {"divergent barrier in block (0,", "60 threads (0-59) at ", "4 threads (60-63) exited"});
  expect_failure(launch(shuffle_without_some, dim3(1), dim3(64), out),
                 {"warp operation with lanes missing", "with mask 0xffffffff", "exited"});
  expect_failure(launch(shuffle_without_some, dim3(1), dim3(4), out),
                 {"warp operation with lanes missing", "4 threads (0-3)"});
  expect_failure(launch(shuffle_outside_mask, dim3(1), dim3(1), out),
                 {"warp operation with lanes missing", "1 thread (0)", "mask 0x00000002"});
  expect_failure(launch(wait_for_each_other, dim3(1), dim3(32), out),
                 {"deadlock in block (0,0,0)", "1 thread (0) at ", "31 threads (1-31) at "});
  unsigned flag = 0;
  expect_failure(launch(spin, dim3(2), dim3(32), &flag), {"no progress"});
  alignas(8) char bytes[8] = {};
  expect_failure(launch(add_misaligned, dim3(1), dim3(1), bytes),
                 {"misaligned atomic operation at ", "cpp:"});
}

// Parameters.

template <size_t kBytes>
struct Bulk {
  unsigned char bytes[kBytes];
};

template <typename T>
__global__ void read_parameter(const __grid_constant__ T bulk, int* sum) {
  if (threadIdx.x == 0) *sum = bulk.bytes[0] + bulk.bytes[sizeof(bulk.bytes) - 1];
}

#if !defined(__CUDACC__)
// What the emulation allows beyond CUDA: one copy for all threads, instead of one for each.
void read_reference(const Bulk<4000>& bulk, const Bulk<4000>* original, int* sum) {
  if (threadIdx.x == 0) *sum = &bulk == original ? 0 : bulk.bytes[7];
}
#endif

__global__ void change_parameter(int value, int* out) {
  value += static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = value;
}

template <size_t kBytes>
cudaError_t pass() {
  Bulk<kBytes> bulk{};
  bulk.bytes[0] = 3;
  bulk.bytes[kBytes - 1] = 4;
  int sum = 0;
  const cudaError_t error = launch(read_parameter<Bulk<kBytes>>, dim3(1), dim3(256), bulk, &sum);
  CHECK(sum == (error == cudaSuccess ? 7 : 0));
  return error;
}

void check_parameters() {
  constexpr size_t kPointer = sizeof(void*);
  CHECK(pass<32760 - kPointer>() == cudaSuccess);
#if !defined(__CUDACC__)  // nvcc refuses to compile it
  CHECK(pass<32768 - kPointer>() == cudaErrorInvalidValue);
#endif
  emulator::set_driver_version(12000);
  CHECK(pass<4096 - kPointer>() == cudaSuccess);
  CHECK(pass<4096 - kPointer + 1>() == cudaErrorInvalidValue);  // the pointer is aligned
  emulator::set_driver_version(12010);
  cudaGetLastError();

#if !defined(__CUDACC__)
  Bulk<4000> bulk{};
  bulk.bytes[7] = 5;
  int sum = 0;
  CHECK(launch(read_reference, dim3(1), dim3(2), bulk, &bulk, &sum) == cudaSuccess && sum == 5);
#endif

  int out[100];
  CHECK(launch(change_parameter, dim3(1), dim3(100), 1000, out) == cudaSuccess);
  for (int i = 0; i < 100; ++i) CHECK(out[i] == 1000 + i);
}

// The runtime: devices, copies, captures.

void check_devices() {
  int version = 0, count = -1, device = -1;
  emulator::set_device_count(2);
  emulator::reset_statistics();
  CHECK(cudaGetDeviceCount(&count) == cudaSuccess && count == 2);
  CHECK(cudaSetDevice(1) == cudaSuccess && cudaGetDevice(&device) == cudaSuccess && device == 1);
  std::thread([] {  // each host thread has its own
    int device = -1;
    CHECK(cudaGetDevice(&device) == cudaSuccess && device == 0);
    CHECK(launch(do_nothing, dim3(2, 3), dim3(4)) == cudaSuccess);
  })
      .join();
  CHECK(launch(do_nothing, dim3(5), dim3(6)) == cudaSuccess);
  CHECK(cudaSetDevice(2) == cudaErrorInvalidDevice && cudaSetDevice(0) == cudaSuccess);
  const emulator::Statistics statistics = emulator::statistics();
  CHECK(statistics.launches == 2 && statistics.set_device_calls == 3);
  const emulator::Launch& first = statistics.recent_launches[0];
  CHECK(first.device == 0 && first.grid[0] == 2 && first.grid[1] == 3 && first.block[0] == 4);
  CHECK(statistics.recent_launches[1].device == 1);

  emulator::set_device_count(0);
  CHECK(cudaGetDeviceCount(&count) == cudaErrorNoDevice && count == 0);
  CHECK(launch(do_nothing, dim3(1), dim3(1)) == cudaErrorNoDevice);
  emulator::set_device_count(1);
  for (const int driver : {0, 11080}) {
    emulator::set_driver_version(driver);
    CHECK(cudaDriverGetVersion(&version) == cudaSuccess && version == driver);
    CHECK(cudaSetDevice(0) == cudaErrorInsufficientDriver);
    CHECK(launch(do_nothing, dim3(1), dim3(1)) == cudaErrorInsufficientDriver);
  }
  emulator::set_driver_version(12010);
  CHECK(cudaRuntimeGetVersion(&version) == cudaSuccess && version == CUDART_VERSION);
  CHECK(std::string(cudaGetErrorName(cudaErrorNoDevice)) == "cudaErrorNoDevice");
  cudaGetLastError();
}

void check_copies() {
  emulator::reset_statistics();
  const int source[3] = {1, 2, 3};
  int target[3] = {}, back[3] = {};
  CHECK(cudaMemcpyAsync(target, source, 12, cudaMemcpyHostToDevice, kStream) == cudaSuccess);
  CHECK(cudaMemcpyAsync(back, target, 8, cudaMemcpyDeviceToHost, kStream) == cudaSuccess);
  CHECK(cudaMemcpyAsync(target, target + 2, 4, cudaMemcpyDeviceToDevice, kStream) == cudaSuccess);
  CHECK(cudaMemsetAsync(target + 1, 0xff, 4, kStream) == cudaSuccess);
  CHECK(cudaStreamSynchronize(kStream) == cudaSuccess);
  CHECK(back[0] == 1 && back[1] == 2 && back[2] == 0);
  CHECK(target[0] == 3 && target[1] == -1 && target[2] == 3);
  const emulator::Statistics statistics = emulator::statistics();
  CHECK(statistics.copies == 3 && statistics.memsets == 1);
  CHECK(statistics.stream_synchronizations == 1);
  CHECK(statistics.uploaded_bytes == 12 && statistics.downloaded_bytes == 8);
}

__global__ void add_scaled(int* sum, int value) { *sum = 10 * *sum + value; }

__global__ void never_loaded() {}

void check_captures() {
  const auto status = [] {
    cudaStreamCaptureStatus status;
    CHECK(cudaStreamIsCapturing(kStream, &status) == cudaSuccess);
    return status;
  };
  int sum = 0, other = 0, value = 1;
  cudaFuncAttributes attributes;
  CHECK(cudaFuncGetAttributes(&attributes, add_scaled) == cudaSuccess);
  CHECK(status() == cudaStreamCaptureStatusNone);
  emulator::reset_statistics();
  emulator::begin_capture(kStreamNumber);
  CHECK(throws([] { emulator::begin_capture(kStreamNumber); }));
  CHECK(status() == cudaStreamCaptureStatusActive);
  CHECK(launch_on_stream(add_scaled, &sum, value) == cudaSuccess);
  value = 2;  // too late for the first launch
  CHECK(launch_on_stream(add_scaled, &sum, value) == cudaSuccess);
  CHECK(cudaMemcpyAsync(&other, &sum, 4, cudaMemcpyDeviceToDevice, kStream) == cudaSuccess);
  CHECK(launch(do_nothing, dim3(1), dim3(1)) == cudaSuccess);  // another stream
  CHECK(emulator::statistics().loads_in_capture == 0);
  CHECK(launch_on_stream(never_loaded) == cudaSuccess);
  CHECK(emulator::statistics().loads_in_capture == 1);
  CHECK(sum == 0 && other == 0);
  const int64_t graph = emulator::end_capture(kStreamNumber);
  CHECK(status() == cudaStreamCaptureStatusNone && sum == 0);
  emulator::replay(graph);
  CHECK(sum == 12 && other == 12);
  emulator::replay(graph);
  CHECK(sum == 1212 && other == 1212);
  CHECK(emulator::statistics().launches == 4 && emulator::statistics().replayed_launches == 6);
  emulator::destroy(graph);
  CHECK(throws([&] { emulator::replay(graph); }) && throws([&] { emulator::destroy(graph); }));

  const std::function<cudaError_t()> forbidden[] = {
      [&] { return cudaMemcpyAsync(&other, &sum, 4, cudaMemcpyHostToDevice, kStream); },
      [&] { return cudaMemcpyAsync(&other, &sum, 4, cudaMemcpyDeviceToHost, kStream); },
      [&] { return cudaMemcpyAsync(&other, &sum, 4, cudaMemcpyDefault, kStream); },
      [] { return cudaStreamSynchronize(kStream); },
  };
  for (const auto& call : forbidden) {
    emulator::begin_capture(kStreamNumber);
    CHECK(call() == cudaErrorStreamCaptureUnsupported);
    CHECK(status() == cudaStreamCaptureStatusInvalidated);
    CHECK(launch_on_stream(add_scaled, &sum, 3) == cudaErrorStreamCaptureInvalidated);
    CHECK(throws([] { emulator::end_capture(kStreamNumber); }));
    CHECK(status() == cudaStreamCaptureStatusNone);
  }
  cudaGetLastError();
}

// Arithmetic, loads and stores.

template <typename T>
__global__ void copy_with_hints(const T* from, T* to) {
  to[0] = __ldg(from);
  to[1] = __ldcg(from + 1);
  __stcs(to + 2, __ldcs(from + 2));
}

__global__ void half_of(const float* value, float* out, double* cosines) {
  *out = *value / 2;
  for (int i = 0; i <= 16; ++i) cosines[i] = cospi(i / 8.0 - 1.0);
}

void check_arithmetic() {
  float tiny = 1.2e-38f, half = 0;  // the half is a denormal number
  double cosines[17];
#if defined(__SSE__)
  const unsigned control = _mm_getcsr();
  _mm_setcsr(control | 0x8040);  // flushes denormals
#endif
  CHECK(launch(half_of, dim3(1), dim3(1), &tiny, &half, cosines) == cudaSuccess);
#if defined(__SSE__)
  CHECK((_mm_getcsr() & 0x8040) == 0x8040);
  _mm_setcsr(control);
#endif
  CHECK(half == tiny / 2 && half > 0);
  for (int i = 0; i <= 16; ++i)
    CHECK(std::fabs(cosines[i] - std::cos(3.14159265358979323846 * (i / 8.0 - 1.0))) < 2e-16);
  CHECK(cosines[0] == -1 && cosines[4] == 0 && cosines[8] == 1 && cosines[12] == 0);
  float4 from[3] = {{1, 2, 3, 4}, {5, 6, 7, 8}, {9, 10, 11, 12}}, to[3] = {};
  CHECK(launch(copy_with_hints<float4>, dim3(1), dim3(1), from, to) == cudaSuccess);
  CHECK(std::memcmp(from, to, sizeof(from)) == 0);
  static_assert(alignof(float4) == 16 && alignof(uint4) == 16 && alignof(int4) == 16);
  static_assert(alignof(double2) == 16 && alignof(float2) == 8 && alignof(uint2) == 8);
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3 && std::string(arguments[1]) == "fault") return fault(arguments[2]) ? 0 : 2;
  check_indices();
  check_shared_memory();
  check_reductions();
  check_warps();
  check_atomics();
  check_orders();
  check_last_block();
  check_failures();
  check_parameters();
  check_devices();
  check_copies();
  check_captures();
  check_arithmetic();
  std::puts("ok");
}

// What tests see and set of the emulated CUDA: seeds, devices, statistics, failures and graphs.
// Plain functions, to be called between launches.
//
// A .cu file is compiled by g++ -std=c++17 -x c++ with this directory first on the include path;
// the project's vector accesses need -fno-strict-aliasing, equal results -ffp-contract=off.
// emulator.cpp is linked in; it is compiled with -O1 at least, and never with -fsanitize=thread.
//
// A launch runs to its end before it returns, all in the calling OS thread: one fiber per CUDA
// thread, those of all resident blocks in flight together. At barriers, warp operations, atomic
// operations and fences another one goes on, by chance. A loop that waits for another thread must
// therefore contain one of these. What a launch cannot recover from makes it fail, see
// last_failure(): threads of a block at different barriers, or some gone while others wait; lanes
// that a warp operation's mask names missing (__syncwarp() does not wait for those that have
// ended); threads that wait for each other or for what never comes; misaligned atomic operations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

// Decides the order in which threads and blocks run from now on, and how many blocks are resident
// (multiprocessors times blocks on each).
void set_seed(uint64_t seed);

// Versions as in cudaDriverGetVersion, 12010 at first: 0 is a machine without a driver. From 12010
// on kernels may have 32,764 bytes of parameters, else 4,096.
void set_driver_version(int version);
void set_device_count(int count);  // 1 at first

struct Launch {
  int device;
  uintptr_t stream;
  unsigned grid[3];
  unsigned block[3];
  size_t parameter_bytes;
  bool captured;  // recorded, not run
};

struct Statistics {
  int64_t launches = 0;  // run at once or recorded by a capture; replays are counted apart
  int64_t replayed_launches = 0;
  int64_t copies = 0;  // calls of cudaMemcpyAsync
  int64_t uploaded_bytes = 0;
  int64_t downloaded_bytes = 0;
  int64_t memsets = 0;
  int64_t stream_synchronizations = 0;
  int64_t set_device_calls = 0;
  // Kernels that a capture was the first to touch: lazy loading may then have to synchronise.
  int64_t loads_in_capture = 0;
  int last_copy_device = -1;
  std::vector<Launch> recent_launches;  // the last 256, oldest first
};
Statistics statistics();
void reset_statistics();  // kernels stay loaded

// While held, a thread that waits for a stream goes on waiting until it is let go; not for ever:
// after 20 seconds its call fails, as where the thread that should let it go waits for this one.
void hold_streams();
void let_streams_go();

// Why a launch returned cudaErrorLaunchFailure; empty where none did. As in CUDA that error sticks:
// every later call returns it, until reset_failure().
std::string last_failure();
void reset_failure();

// While a stream captures, launches on it are recorded with their arguments instead of run. What
// CUDA forbids meanwhile (all host memory counts as pageable) returns
// cudaErrorStreamCaptureUnsupported and invalidates the capture. Here the default stream, 0, can
// capture too: that of CPU tensors. These functions throw
// std::runtime_error where CUDA's would return an error; end_capture also for an invalid capture.
void begin_capture(uintptr_t stream);
int64_t end_capture(uintptr_t stream);  // the graph's number
void replay(int64_t graph);
void destroy(int64_t graph);

}  // namespace emulator

// The CUDA launcher: plain functions over raw device pointers and a stream. Each makes its device
// the calling thread's current one and leaves it so: the caller holds PyTorch's device guard.
// Errors are std::runtime_error and name the CUDA call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "tables.h"

namespace fastlr::cuda {

// A cudaStream_t, as PyTorch's Stream.cuda_stream gives it.
using Stream = uintptr_t;
// A cudaGraph_t.
using Graph = uintptr_t;

// One launch: tensors of one storage type and one type of state.
struct Launch {
  StorageType type;
  StorageType state_type;
  bool strided;
  bool staged;  // each of its tensors has a stage, or none
  StepHead head;
  std::vector<const void*> grads;  // one a tensor; at most launch_capacity()
};

// The most tensors that one launch takes; see NOTE: [kernel arguments] in kernels.cuh. rare: of
// strided tensors, or with stages. A lower limit may be set for tests; 0: none.
int32_t launch_capacity(bool rare);
void limit_launch_capacity(int32_t limit);

// Loads every kernel of a rule, those with or those without stages, and finds out how many of its
// blocks a device holds. What is loaded only at its first launch could not be captured.
void preload(int device, const Rule& rule, bool staged = false);
// The same for the kernels that measure a norm.
void preload_norm(int device);

bool is_capturing(int device, Stream stream);
// The graph that the stream is capturing.
Graph captured_graph(int device, Stream stream);
// Calls destroy(object) when the graph has gone, and its last replay with it; or, where this
// throws, now. In any thread: no function of CUDA may be called from there.
void keep_with_graph(Graph graph, void* object, void (*destroy)(void*));

// Copies to the device in the stream's order; `from`, of at most 64 KiB, may be reused on return.
void upload(int device, Stream stream, void* to, const void* from, size_t bytes);
// Copies from the device and waits for it.
void download(int device, Stream stream, void* to, const void* from, size_t bytes);

// preload() comes first.
void launch_step(int device, Stream stream, const Rule& rule, const Launch& launch);
// Measures the norm of a launch's gradients, and where it ends the step what clips all of them;
// preload_norm() comes first.
void launch_norm(int device, Stream stream, const Launch& launch);
// Adds up each share's sums of squares, which launch_norm() has left.
void launch_shares(int device, Stream stream, const Shares& shares);
// Ends a norm of shares: of `count` sums. head: of any of its launches.
void launch_end_norm(int device, Stream stream, const StepHead& head, const double* sums,
                     int32_t count);
// Moves a device's clocks; updates: 0, or 1 where found_inf allows. measures_norm: of an update's
// gradients, which are none.
void launch_clock(int device, Stream stream, const Rule& rule, const Clocks& clocks,
                  int64_t updates, int64_t samples, bool measures_norm);

// As CUDA counts versions, 12010 for 12.1; the driver's is 0 where there is none.
int runtime_version();
int driver_version();
std::string version_text(int version);  // "12.1", or "none"

}  // namespace fastlr::cuda

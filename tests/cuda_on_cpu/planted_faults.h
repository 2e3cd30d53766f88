// Kernels with faults that leave the right result, or none: only a sanitizer sees them.
#pragma once

#include <string>

#include "self_test.h"

namespace {

__global__ void count_plainly(unsigned* count) { ++*count; }

__global__ void read_without_barrier(int* out) {
  FASTLR_SHARED(int[64], values);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void read_without_warp_barrier(int* out) {
  FASTLR_SHARED(int[64], values);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __shfl_sync(kAll, 1, 0);  // exchanges values, orders nothing
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

// What a barrier separates must not be separated in the next round too: here a second is missing.
__global__ void reuse_without_barrier(int* out) {
  FASTLR_SHARED(int, value);
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) value = round;
    __syncthreads();
    out[threadIdx.x] = value;
  }
}

// A ticket, and what it stands for left out of its fences' reach.
template <bool kFenceBefore, bool kFenceAfter>
__global__ void publish(int* values, unsigned* ticket, int* sum) {
  values[blockIdx.x] = 1;
  if (kFenceBefore) __threadfence();
  const bool is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  if (kFenceAfter) __threadfence();
  if (!is_last) return;
  for (unsigned i = 0; i < gridDim.x; ++i) *sum += values[i];
}

// A fence reaches no further than the next atomic operation.
__global__ void publish_after_fence(int* values, unsigned* ticket, int* sum) {
  __threadfence();
  atomicAdd(ticket + 1, 1u);
  values[blockIdx.x] = 1;
  const bool is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  __threadfence();
  if (!is_last) return;
  for (unsigned i = 0; i < gridDim.x; ++i) *sum += values[i];
}

__global__ void write_past_shared(int* out) {
  FASTLR_SHARED(int[32], values);
  int* const first = values;  // whose length only AddressSanitizer knows
  first[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[0];
}

__global__ void load_vector(const int* from, int4* to) {
  *to = *reinterpret_cast<const int4*>(from);
}

// Runs one; the fault itself does no harm.
bool fault(const std::string& name) {
  alignas(16) int values[64] = {};
  int sum = 0;
  unsigned tickets[2] = {};
  unsigned* const ticket = tickets;
  const dim3 one(1), four(4), warps(64);
  cudaError_t error = cudaErrorUnknown;
  if (name == "counter") error = launch(count_plainly, one, warps, ticket);
  if (name == "counter-of-blocks") error = launch(count_plainly, four, one, ticket);
  if (name == "barrier") error = launch(read_without_barrier, one, warps, values);
  if (name == "warp-barrier") error = launch(read_without_warp_barrier, one, warps, values);
  if (name == "second-barrier") error = launch(reuse_without_barrier, one, warps, values);
  if (name == "no-fence-before")
    error = launch(publish<false, true>, four, one, values, ticket, &sum);
  if (name == "no-fence-after")
    error = launch(publish<true, false>, four, one, values, ticket, &sum);
  if (name == "fence-too-early")
    error = launch(publish_after_fence, four, one, values, ticket, &sum);
  if (name == "past-shared") error = launch(write_past_shared, one, dim3(33), values);
  int4 to;
  if (name == "misaligned-vector") error = launch(load_vector, one, one, values + 1, &to);
  return error == cudaSuccess;
}

}  // namespace

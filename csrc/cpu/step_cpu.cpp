#include "step_cpu.h"

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../squares.h"
#include "float_environment.h"

// NOTE: [one OpenMP runtime]
// This file is compiled with -fopenmp but the extension is not linked to an OpenMP library: the
// symbols resolve to the runtime that PyTorch, imported first, has already loaded. A second runtime
// would bring a second pool of threads that compete with PyTorch's. The weak reference lets the
// extension load, and run on one thread, where PyTorch was built without OpenMP.
#if defined(_OPENMP)
#include <omp.h>
#pragma weak GOMP_parallel
#pragma weak omp_get_thread_num
#pragma weak omp_get_num_threads
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
#endif

namespace fastlr {

#define FASTLR_DECLARE_LEVEL(level)                                                         \
  extern const ChunkKernel kernels_##level[];                                               \
  void squares_##level(const TensorRef& tensor, const StridedLayout* layout, int64_t begin, \
                       int64_t end, double* lanes)
#if defined(FASTLR_X86_LEVELS)
FASTLR_DECLARE_LEVEL(x86_64_v2);
FASTLR_DECLARE_LEVEL(x86_64_v3);
FASTLR_DECLARE_LEVEL(x86_64_v4);
#endif
FASTLR_DECLARE_LEVEL(baseline);
#undef FASTLR_DECLARE_LEVEL

const std::vector<SimdLevel>& usable_simd_levels() {
  static const std::vector<SimdLevel> levels = [] {
    std::vector<SimdLevel> found{{"baseline", kernels_baseline, squares_baseline}};
#if defined(FASTLR_X86_LEVELS)
    if (__builtin_cpu_supports("x86-64-v2"))
      found.push_back({"x86-64-v2", kernels_x86_64_v2, squares_x86_64_v2});
    if (__builtin_cpu_supports("x86-64-v3"))
      found.push_back({"x86-64-v3", kernels_x86_64_v3, squares_x86_64_v3});
    if (__builtin_cpu_supports("x86-64-v4"))
      found.push_back({"x86-64-v4", kernels_x86_64_v4, squares_x86_64_v4});
#endif
    return found;
  }();
  return levels;
}

namespace {

SimdLevel& chosen_level() {
  static SimdLevel level = usable_simd_levels().back();
  return level;
}

// Below this many elements a step is shorter than waking the other threads takes (a few
// microseconds). Where tensors are so small on average, most of a step is finding them, which one
// thread does: the others would only wait, and keep what they updated in caches of their own.
constexpr int64_t kSerialElements = 16384;
constexpr int64_t kSerialMean = 256;

// NOTE: [after a fork]
// A forked process has the data of its parent's OpenMP threads and not the threads: GCC's runtime
// waits for them forever. Whether there were any cannot be asked, so that forked processes step on
// the calling thread, with the same results.
bool in_forked_process = false;

#if !defined(_WIN32)
[[maybe_unused]] const int at_fork =
    pthread_atfork(nullptr, nullptr, [] { in_forked_process = true; });
#endif

bool has_openmp() {
#if defined(_OPENMP)
  return GOMP_parallel != nullptr;
#else
  return false;
#endif
}

// Calls share(part, parts) for each part, on a thread of its own each. elements: how much work it
// is, in so many tensors.
template <typename Share>
void in_parallel(int64_t elements, size_t tensors, int threads, Share share) {
  const auto run_share = [&](int part, int parts) {
    const DefaultFloatEnvironment environment;
    share(part, parts);
  };
  const bool small =
      elements < kSerialElements || elements < kSerialMean * static_cast<int64_t>(tensors);
  const bool alone = threads <= 1 || small || in_forked_process;
  if (alone || !has_openmp()) return run_share(0, 1);
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  run_share(omp_get_thread_num(), omp_get_num_threads());
#endif
}

}  // namespace

const char* simd_level() { return chosen_level().name; }

void set_simd_level(const char* name) {
  std::string usable;
  for (const SimdLevel& level : usable_simd_levels()) {
    if (std::strcmp(level.name, name) == 0) {
      chosen_level() = level;
      return;
    }
    usable += (usable.empty() ? "" : ", ") + std::string(level.name);
  }
  throw std::invalid_argument(std::string("simd level must be one of ") + usable + ", got " + name);
}

const char* openmp_runtime() {
#if defined(_OPENMP)
  Dl_info info;
  if (has_openmp() && dladdr(reinterpret_cast<void*>(&GOMP_parallel), &info) != 0) {
    return info.dli_fname;
  }
#endif
  return nullptr;
}

namespace {

// Shares of a plain step meet at multiples of so many elements: threads then rarely write to one
// cache line.
constexpr int64_t kGrain = 64;

int64_t elements_of(const std::vector<TensorRef>& tensors) {
  int64_t total = 0;
  for (const TensorRef& tensor : tensors) total += tensor.numel;
  return total;
}

const StridedLayout* layout_of(const TensorRef& tensor, const std::vector<StridedLayout>& layouts) {
  return tensor.layout < 0 ? nullptr : &layouts[tensor.layout];
}

// Calls visit(tensor, layout, begin, end, lanes) for each chunk of kChunkElements, and returns the
// sum over all chunks of what it adds to the lanes.
template <typename Visit>
double sum_over_chunks(const std::vector<TensorRef>& tensors,
                       const std::vector<StridedLayout>& layouts, int threads, ChunkSums& memory,
                       Visit visit) {
  std::vector<double>& sums = memory.sums;
  const int64_t total = elements_of(tensors);
  in_parallel(total, tensors.size(), threads, [&](int part, int parts) {
    for_each_chunk(tensors, total, part, parts, kChunkElements, [&](const Chunk& share) {
      const TensorRef& tensor = tensors[share.tensor];
      const StridedLayout* const layout = layout_of(tensor, layouts);
      for (int64_t begin = share.begin; begin < share.end; begin += kChunkElements) {
        const int64_t end = std::min(begin + kChunkElements, share.end);
        double lanes[kLanes] = {};
        visit(static_cast<size_t>(share.tensor), layout, begin, end, lanes);
        sums[memory.first_chunks[share.tensor] + begin / kChunkElements] =
            sum_of_lanes(lanes, end - begin);
      }
    });
  });
  const DefaultFloatEnvironment environment;
  double lanes[kLanes] = {};
  for (size_t i = 0; i < sums.size(); ++i) lanes[i % kLanes] += sums[i];
  return sum_of_lanes(lanes, static_cast<int64_t>(sums.size()));
}

}  // namespace

ChunkSums::ChunkSums(const std::vector<TensorRef>& tensors) {
  int64_t chunks = 0;
  for (const TensorRef& tensor : tensors) {
    first_chunks.push_back(chunks);
    chunks += chunks_of(tensor.numel);
  }
  sums.resize(static_cast<size_t>(chunks));
}

void step_cpu(const HostStep& step, int threads, bool in_order) {
  const int64_t total = elements_of(step.tensors);
  const ChunkKernel kernel = chosen_level().kernels[step.rule.index];
  in_parallel(total, step.tensors.size(), in_order ? 1 : threads, [&](int part, int parts) {
    for_each_chunk(step.tensors, total, part, parts, kGrain, [&](const Chunk& chunk) {
      const TensorRef& tensor = step.tensors[chunk.tensor];
      kernel(tensor, layout_of(tensor, step.layouts), step.scalars[step.scalars_of[chunk.tensor]],
             step.stages_of(tensor), chunk.begin, chunk.end, nullptr);
    });
  });
}

double measured_step_cpu(const HostStep& step, int threads, bool in_order, ChunkSums& sums) {
  const ChunkKernel kernel = chosen_level().kernels[step.rule.index];
  return sum_over_chunks(
      step.tensors, step.layouts, in_order ? 1 : threads, sums,
      [&](size_t tensor, const StridedLayout* layout, int64_t begin, int64_t end, double* lanes) {
        kernel(step.tensors[tensor], layout, step.scalars[step.scalars_of[tensor]],
               step.stages_of(step.tensors[tensor]), begin, end, lanes);
      });
}

double squared_norm_cpu(const std::vector<TensorRef>& tensors,
                        const std::vector<StridedLayout>& layouts, int threads) {
  ChunkSums sums(tensors);
  const SquaresKernel kernel = chosen_level().squares;
  return sum_over_chunks(
      tensors, layouts, threads, sums,
      [&](size_t tensor, const StridedLayout* layout, int64_t begin, int64_t end, double* lanes) {
        kernel(tensors[tensor], layout, begin, end, lanes);
      });
}

}  // namespace fastlr

#include "step_cpu.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

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

#define FASTLR_DECLARE_KERNEL(level)                                            \
  void update_##level(const TensorRef& tensor, const StridedLayout* layout,     \
                      const GroupScalars& scalars, int64_t begin, int64_t end); \
  double squares_##level(StorageType type, const void* data, int64_t n)
#if defined(FASTLR_X86_LEVELS)
FASTLR_DECLARE_KERNEL(x86_64_v2);
FASTLR_DECLARE_KERNEL(x86_64_v3);
FASTLR_DECLARE_KERNEL(x86_64_v4);
#endif
FASTLR_DECLARE_KERNEL(baseline);
#undef FASTLR_DECLARE_KERNEL

const std::vector<SimdLevel>& usable_simd_levels() {
  static const std::vector<SimdLevel> levels = [] {
    std::vector<SimdLevel> found{{"baseline", update_baseline, squares_baseline}};
#if defined(FASTLR_X86_LEVELS)
    if (__builtin_cpu_supports("x86-64-v2"))
      found.push_back({"x86-64-v2", update_x86_64_v2, squares_x86_64_v2});
    if (__builtin_cpu_supports("x86-64-v3"))
      found.push_back({"x86-64-v3", update_x86_64_v3, squares_x86_64_v3});
    if (__builtin_cpu_supports("x86-64-v4"))
      found.push_back({"x86-64-v4", update_x86_64_v4, squares_x86_64_v4});
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
// microseconds).
constexpr int64_t kSerialElements = 16384;

bool has_openmp() {
#if defined(_OPENMP)
  return GOMP_parallel != nullptr;
#else
  return false;
#endif
}

// Calls share(part, parts) for each part, on a thread of its own each. elements: how much work it
// is.
template <typename Share>
void in_parallel(int64_t elements, int threads, Share share) {
  const auto run_share = [&](int part, int parts) {
    const DefaultFloatEnvironment environment;
    share(part, parts);
  };
  if (threads <= 1 || elements < kSerialElements || !has_openmp()) return run_share(0, 1);
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

void step_cpu(const std::vector<TensorRef>& tensors, const std::vector<StridedLayout>& layouts,
              const std::vector<GroupScalars>& groups, int threads, bool in_order) {
  int64_t total = 0;
  for (const TensorRef& tensor : tensors) total += tensor.numel;
  const ChunkKernel kernel = chosen_level().kernel;
  in_parallel(total, in_order ? 1 : threads, [&](int part, int parts) {
    for_each_chunk(tensors, total, part, parts, [&](const Chunk& chunk) {
      const TensorRef& tensor = tensors[chunk.tensor];
      const StridedLayout* layout = tensor.layout < 0 ? nullptr : &layouts[tensor.layout];
      kernel(tensor, layout, groups[tensor.group], chunk.begin, chunk.end);
    });
  });
}

double squared_norm_cpu(const std::vector<DenseValues>& tensors, int threads) {
  struct Block {
    StorageType type;
    const char* data;
    int64_t size;
  };
  std::vector<Block> blocks;
  int64_t total = 0;
  for (const DenseValues& tensor : tensors) {
    const char* const data = static_cast<const char*>(tensor.data);
    for (int64_t begin = 0; begin < tensor.numel; begin += kSquaresBlock) {
      blocks.push_back({tensor.type, data + begin * tensor.item_size,
                        std::min(kSquaresBlock, tensor.numel - begin)});
    }
    total += tensor.numel;
  }
  std::vector<double> sums(blocks.size());
  const SquaresKernel squares = chosen_level().squares;
  in_parallel(total, threads, [&](int part, int parts) {
    const size_t begin = blocks.size() * static_cast<size_t>(part) / static_cast<size_t>(parts);
    const size_t end = blocks.size() * static_cast<size_t>(part + 1) / static_cast<size_t>(parts);
    for (size_t i = begin; i < end; ++i) {
      sums[i] = squares(blocks[i].type, blocks[i].data, blocks[i].size);
    }
  });
  const DefaultFloatEnvironment environment;
  double result = 0.0;
  for (const double sum : sums) result += sum;
  return result;
}

}  // namespace fastlr

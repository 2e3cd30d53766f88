// Compiled by nvcc in a test: what the CPU and the GPU share is accepted as device code, for every
// type.
#include "rules/sgd.h"
#include "schedule.h"
#include "step.h"

namespace fastlr {

template <typename P, typename M>
__global__ void update(SgdOptions options, float inverse_scale, P* p, const P* g, M* m, int64_t n) {
  using C = compute_t<P>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const SgdScalars<C> scalars = sgd_scalars<C>(options, inverse_scale);
  C param = load(p[i]);
  C momentum = load(m[i]);
  sgd_update(scalars, false, param, load(g[i]), momentum);
  store(p[i], param);
  store(m[i], momentum);
}

template <typename T>
__global__ void update_in_chunks(GroupScalars group, T* p, const T* g, T* m, Chunk chunk) {
  update_chunk(scalars_of(group, T{}), false, p + chunk.begin, g + chunk.begin, m + chunk.begin,
               chunk.end - chunk.begin);
}

__global__ void evaluate(const Segment* segments, int64_t count, const double* table, int64_t clock,
                         double* value) {
  *value = value_at(segments, count, table, clock);
}

template __global__ void update(SgdOptions, float, float*, const float*, float*, int64_t);
template __global__ void update(SgdOptions, float, double*, const double*, double*, int64_t);
template __global__ void update(SgdOptions, float, double*, const double*, float*, int64_t);
template __global__ void update(SgdOptions, float, BFloat16*, const BFloat16*, BFloat16*, int64_t);
template __global__ void update(SgdOptions, float, BFloat16*, const BFloat16*, float*, int64_t);
template __global__ void update(SgdOptions, float, Float16*, const Float16*, Float16*, int64_t);
template __global__ void update(SgdOptions, float, Float16*, const Float16*, float*, int64_t);
template __global__ void update_in_chunks(GroupScalars, float*, const float*, float*, Chunk);
template __global__ void update_in_chunks(GroupScalars, double*, const double*, double*, Chunk);

}  // namespace fastlr

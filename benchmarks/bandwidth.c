/* The memory traffic of a step without its arithmetic: reads a parameter, a gradient and some slots of state,
 * one to three, writes all but the gradient. */
#include <stdint.h>

/* Reads the gradient alone, as a pass that measures its norm does. */
uint32_t read_all(const uint32_t *g, int64_t n, int threads) {
  uint32_t all = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(^ : all)
  for (int64_t i = 0; i < n; ++i) all ^= g[i];
  return all;
}

void touch(uint32_t *p, const uint32_t *g, uint32_t *const *slots, int count, int64_t n, int threads) {
  uint32_t *const m = slots[0], *const v = slots[count > 1], *const w = slots[count - 1];
  if (count == 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      p[i] ^= g[i];
      m[i] ^= g[i];
    }
  } else if (count == 2) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      p[i] ^= g[i];
      m[i] ^= g[i];
      v[i] ^= g[i];
    }
  } else {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      p[i] ^= g[i];
      m[i] ^= g[i];
      v[i] ^= g[i];
      w[i] ^= g[i];
    }
  }
}

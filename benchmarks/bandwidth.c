/* The memory traffic of an SGD-momentum step without its arithmetic: reads three arrays, writes two. */
#include <stdint.h>

void touch(uint32_t *p, const uint32_t *g, uint32_t *m, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    p[i] ^= g[i];
    m[i] ^= g[i];
  }
}

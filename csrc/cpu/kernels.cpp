// The CPU kernels. Compiled once for each SIMD level, which names their entry points
// (FASTLR_SIMD_LEVEL).
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include <optional>
#include <type_traits>

#include "../squares.h"
#include "../step.h"

namespace fastlr {
namespace {

// Elements staged at a time where the stored type is not the compute type or not in one common
// order: three blocks of doubles are 12 KiB, which stays in a first-level cache.
constexpr int64_t kBlock = 512;

template <typename C, typename T>
void load_dense(C* to, const T* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
}

template <typename T, typename C>
void store_dense(T* to, const C* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(to[i], from[i]);
}

#if defined(__F16C__)
void load_dense(float* to, const Float16* from, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  for (; i < n; ++i) to[i] = load(from[i]);
}

void store_dense(Float16* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  for (; i < n; ++i) store(to[i], from[i]);
}
#endif

// Adds the squares of n values to the lanes, the first to the first.
// Not inlined: steps that measure nothing shall not carry it.
template <typename C>
[[gnu::noinline]] void add_squares(double* lanes, const C* values, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] = add_square(lanes[k], values[i + k]);
  }
  for (int64_t k = 0; i + k < n; ++k) lanes[k] = add_square(lanes[k], values[i + k]);
}

// Blocks follow each other in the lanes, so each begins at the first.
static_assert(kBlock % kLanes == 0, "a block ends with the last lane");

template <typename C>
[[gnu::noinline]] void update_in_place(const SgdScalars<C>& s, bool first, C* p, const C* g, C* m,
                                       int64_t n) {
  update_chunk(s, first, p, g, m, n);
}

template <typename C>
void measured_update_in_place(const SgdScalars<C>& s, bool first, C* p, const C* g, C* m, int64_t n,
                              double* lanes) {
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = n - i < kBlock ? n - i : kBlock;
    add_squares(lanes, g + i, count);
    update_in_place(s, first, p + i, g + i, m == nullptr ? m : m + i, count);
  }
}

template <typename P, typename M>
void update_dense(const SgdScalars<compute_t<P>>& s, bool first, P* p, const P* g, M* m, int64_t n,
                  double* lanes) {
  using C = compute_t<P>;
  C p_block[kBlock], g_block[kBlock], m_block[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = n - i < kBlock ? n - i : kBlock;
    load_dense(p_block, p + i, count);
    load_dense(g_block, g + i, count);
    if (s.has_momentum && !first) load_dense(m_block, m + i, count);
    if (lanes != nullptr) add_squares(lanes, g_block, count);
    update_chunk(s, first, p_block, g_block, m_block, count);
    store_dense(p + i, p_block, count);
    if (s.has_momentum) store_dense(m + i, m_block, count);
  }
}

// Walks through a strided layout in row-major order of its indices.
class Cursor {
 public:
  Cursor(const StridedLayout& layout, int64_t index) : layout_(layout) {
    for (int d = layout.ndim - 1; d >= 0; --d) {
      index_[d] = index % layout.shape[d];
      index /= layout.shape[d];
      param += index_[d] * layout.param[d];
      grad += index_[d] * layout.grad[d];
      momentum += index_[d] * layout.momentum[d];
    }
  }

  void advance() {
    for (int d = layout_.ndim - 1; d >= 0; --d) {
      param += layout_.param[d];
      grad += layout_.grad[d];
      momentum += layout_.momentum[d];
      if (++index_[d] < layout_.shape[d]) return;
      param -= layout_.shape[d] * layout_.param[d];
      grad -= layout_.shape[d] * layout_.grad[d];
      momentum -= layout_.shape[d] * layout_.momentum[d];
      index_[d] = 0;
    }
  }

  int64_t param = 0;
  int64_t grad = 0;
  int64_t momentum = 0;

 private:
  const StridedLayout& layout_;
  int64_t index_[kMaxDims];
};

template <typename P, typename M>
void update_strided(const SgdScalars<compute_t<P>>& s, bool first, P* p, const P* g, M* m,
                    const StridedLayout& layout, int64_t begin, int64_t end, double* lanes) {
  using C = compute_t<P>;
  C p_block[kBlock], g_block[kBlock], m_block[kBlock];
  Cursor reader(layout, begin);
  Cursor writer(layout, begin);
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = end - i < kBlock ? end - i : kBlock;
    for (int64_t k = 0; k < count; ++k, reader.advance()) {
      p_block[k] = load(p[reader.param]);
      g_block[k] = load(g[reader.grad]);
      if (s.has_momentum && !first) m_block[k] = load(m[reader.momentum]);
    }
    if (lanes != nullptr) add_squares(lanes, g_block, count);
    update_chunk(s, first, p_block, g_block, m_block, count);
    for (int64_t k = 0; k < count; ++k, writer.advance()) {
      store(p[writer.param], p_block[k]);
      if (s.has_momentum) store(m[writer.momentum], m_block[k]);
    }
  }
}

template <typename P, typename M>
void update(const TensorRef& tensor, const StridedLayout* layout, const GroupScalars& scalars,
            int64_t begin, int64_t end, double* lanes) {
  using C = compute_t<P>;
  const SgdScalars<C>& s = scalars_of(scalars, C{});
  P* p = static_cast<P*>(tensor.param);
  const P* g = static_cast<const P*>(tensor.grad);
  M* m = static_cast<M*>(tensor.momentum);
  if (layout != nullptr) {
    return update_strided(s, tensor.first, p, g, m, *layout, begin, end, lanes);
  }
  p += begin;
  g += begin;
  if (m != nullptr) m += begin;
  if constexpr (std::is_same<P, C>::value && std::is_same<M, C>::value) {
    if (lanes == nullptr) return update_in_place(s, tensor.first, p, g, m, end - begin);
    measured_update_in_place(s, tensor.first, p, g, m, end - begin, lanes);
  } else {
    update_dense(s, tensor.first, p, g, m, end - begin, lanes);
  }
}

template <typename P>
void update(const TensorRef& tensor, const StridedLayout* layout, const GroupScalars& scalars,
            int64_t begin, int64_t end, double* lanes) {
  if (tensor.momentum_type == tensor.type) {
    update<P, P>(tensor, layout, scalars, begin, end, lanes);
  } else {
    update<P, float>(tensor, layout, scalars, begin, end, lanes);
  }
}

template <typename T>
void squares(const TensorRef& tensor, const StridedLayout* layout, int64_t begin, int64_t end,
             double* lanes) {
  using C = compute_t<T>;
  const T* values = static_cast<const T*>(tensor.grad);
  if constexpr (std::is_same<T, C>::value) {
    if (layout == nullptr) return add_squares(lanes, values + begin, end - begin);
  }
  C block[kBlock];
  std::optional<Cursor> reader;
  if (layout != nullptr) reader.emplace(*layout, begin);
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = end - i < kBlock ? end - i : kBlock;
    if (reader) {
      for (int64_t k = 0; k < count; ++k, reader->advance()) block[k] = load(values[reader->grad]);
    } else {
      load_dense(block, values + i, count);
    }
    add_squares(lanes, block, count);
  }
}

}  // namespace

#define FASTLR_JOIN(name, level) name##_##level
#define FASTLR_AT_LEVEL(name, level) FASTLR_JOIN(name, level)

void FASTLR_AT_LEVEL(squares, FASTLR_SIMD_LEVEL)(const TensorRef& tensor,
                                                 const StridedLayout* layout, int64_t begin,
                                                 int64_t end, double* lanes) {
  switch (tensor.type) {
    case StorageType::kFloat32:
      return squares<float>(tensor, layout, begin, end, lanes);
    case StorageType::kFloat64:
      return squares<double>(tensor, layout, begin, end, lanes);
    case StorageType::kBFloat16:
      return squares<BFloat16>(tensor, layout, begin, end, lanes);
    case StorageType::kFloat16:
      return squares<Float16>(tensor, layout, begin, end, lanes);
  }
}

void FASTLR_AT_LEVEL(update, FASTLR_SIMD_LEVEL)(const TensorRef& tensor,
                                                const StridedLayout* layout,
                                                const GroupScalars& scalars, int64_t begin,
                                                int64_t end, double* lanes) {
  switch (tensor.type) {
    case StorageType::kFloat32:
      return update<float, float>(tensor, layout, scalars, begin, end, lanes);
    case StorageType::kFloat64:
      return update<double>(tensor, layout, scalars, begin, end, lanes);
    case StorageType::kBFloat16:
      return update<BFloat16>(tensor, layout, scalars, begin, end, lanes);
    case StorageType::kFloat16:
      return update<Float16>(tensor, layout, scalars, begin, end, lanes);
  }
}

}  // namespace fastlr

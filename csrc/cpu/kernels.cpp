// The CPU kernels. Compiled once for each SIMD level, which names their entry points
// (FASTLR_SIMD_LEVEL).
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <optional>
#include <type_traits>
#include <utility>

#include "../rules.h"
#include "../squares.h"
#include "../step.h"
#include "kernels.h"

namespace fastlr {
namespace {

// Elements staged at a time where the stored type is not the compute type or not in one common
// order: five blocks of doubles are 20 KiB, which stays in a first-level cache.
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

// Asks for n values.
template <typename T>
void fetch(const T* values, int n) {
  constexpr int kLine = 64 / sizeof(T);
  for (int k = 0; k < n; k += kLine) __builtin_prefetch(values + k);
}

// Adds the squares of n values to the lanes, the first to the first.
// kFetches: values come from memory. A core that reads one array alone waits for it most of the
// time: what fetches ahead by itself is too near, and ends with each page. The row after the next
// is near enough for what is under way to be the sixteen lines or so that a core can wait for; more
// at a time, or from farther ahead, make reading from main memory slower than none. Updates read
// several arrays, whose requests are under way together.
// Not inlined: steps that measure nothing shall not carry it.
template <bool kFetches, typename T>
[[gnu::noinline]] void add_squares(double* lanes, const T* values, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    if constexpr (kFetches) fetch(values + i + 2 * kLanes, kLanes);
    for (int k = 0; k < kLanes; ++k) lanes[k] = add_square(lanes[k], load(values[i + k]));
  }
  for (int64_t k = 0; i + k < n; ++k) lanes[k] = add_square(lanes[k], load(values[i + k]));
}

// Blocks follow each other in the lanes, so each begins at the first.
static_assert(kBlock % kLanes == 0, "a block ends with the last lane");

// The same of values that are clipped.
template <bool kFetches = false, typename T>
void add_squares(double* lanes, const T* values, int64_t n, compute_t<T> bound) {
  if (!(bound < static_cast<compute_t<T>>(INFINITY))) {
    return add_squares<kFetches>(lanes, values, n);
  }
  compute_t<T> block[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = std::min(n - i, kBlock);
    for (int64_t k = 0; k < count; ++k) block[k] = clipped(load(values[i + k]), bound);
    add_squares<false>(lanes, block, count);
  }
}

// n elements in their compute type. kLive and the rest of the form: as in their scalars: GCC
// vectorises no loop with many conditions, also where they are the same for all elements.
// Iterations are independent even where p and g are the same memory. The slots are arguments one by
// one, as the compiler does not see through arrays of pointers.
template <typename R, uint32_t kLive, bool kPlain, bool kCoupled, bool kStaged, typename T,
          size_t... kSlot, typename... Slot>
void update_live(const Scalars<R, T>& scalars, T* p, const T* g, int64_t n,
                 std::index_sequence<kSlot...>, Slot*... slot) {
  const Scalars<R, T> s = scalars;
  constexpr Form kForm{kLive, kPlain, kCoupled, kStaged, kStaged};
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T values[] = {is_live(kLive, kSlot) ? slot[i] : T(0)...};
    T value = p[i];
    update_element(s, kForm, value, g[i], values);
    p[i] = value;
    ((is_live(kLive, kSlot) ? void(slot[i] = values[kSlot]) : void()), ...);
  }
}

template <typename R, typename T, size_t... kSlot, size_t... kSet>
void update_elements(const Scalars<R, T>& s, T* p, const T* g,
                     const std::array<T*, R::kSlotCount>& slots, int64_t n,
                     std::index_sequence<kSlot...> all, std::index_sequence<kSet...>) {
  const auto update = [&](auto live) {
    constexpr uint32_t kLive = decltype(live)::value;
    if (s.around.live != kLive) return;
    const auto update_as = [&](auto plain, auto coupled, auto staged) {
      update_live<R, kLive, plain, coupled, staged>(s, p, g, n, all, slots[kSlot]...);
    };
    constexpr std::true_type kYes;
    constexpr std::false_type kNo;
    if (s.around.staged && s.around.coupled) {
      update_as(kNo, kYes, kYes);
    } else if (s.around.staged) {
      update_as(kNo, kNo, kYes);
    } else if (s.around.plain) {
      update_as(kYes, kNo, kNo);
    } else if (s.around.coupled) {
      update_as(kNo, kYes, kNo);
    } else {
      update_as(kNo, kNo, kNo);
    }
  };
  (update(std::integral_constant<uint32_t, R::kLiveSets[kSet]>()), ...);
}

template <typename R, typename T>
void update_elements(const Scalars<R, T>& s, T* p, const T* g,
                     const std::array<T*, R::kSlotCount>& slots, int64_t n) {
  constexpr size_t kSets = sizeof R::kLiveSets / sizeof R::kLiveSets[0];
  update_elements(s, p, g, slots, n, std::make_index_sequence<R::kSlotCount>(),
                  std::make_index_sequence<kSets>());
}

// Where a tensor is stored in its compute type.
template <typename R, typename T>
[[gnu::noinline]] void update_in_place(const Scalars<R, T>& s, T* p, const T* g,
                                       std::array<T*, R::kSlotCount> slots, int64_t n,
                                       double* lanes) {
  if (lanes == nullptr) return update_elements(s, p, g, slots, n);
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = n - i < kBlock ? n - i : kBlock;
    add_squares(lanes, g + i, count, s.around.bound);
    update_elements(s, p + i, g + i, slots, count);
    for (T*& slot : slots) {
      if (slot != nullptr) slot += count;
    }
  }
}

// Blocks of a tensor in its compute type.
template <typename R, typename C>
struct Staged {
  void update(const Scalars<R, C>& s, int64_t count, double* lanes) {
    if (lanes != nullptr) add_squares(lanes, g, count, s.around.bound);
    std::array<C*, R::kSlotCount> at;
    for (int k = 0; k < R::kSlotCount; ++k) at[k] = slots[k];
    update_elements(s, p, g, at, count);
  }

  C p[kBlock], g[kBlock], slots[R::kSlotCount][kBlock];
};

// Walks through a strided layout in row-major order of its indices: parameter, gradient and the
// first slots.
template <int kSlots>
class Cursor {
 public:
  Cursor(const StridedLayout& layout, int64_t index) : layout_(layout) {
    for (int d = layout.ndim - 1; d >= 0; --d) {
      index_[d] = index % layout.shape[d];
      index /= layout.shape[d];
      move(d, index_[d]);
    }
  }

  void advance() {
    for (int d = layout_.ndim - 1; d >= 0; --d) {
      move(d, 1);
      if (++index_[d] < layout_.shape[d]) return;
      move(d, -layout_.shape[d]);
      index_[d] = 0;
    }
  }

  int64_t param = 0;
  int64_t grad = 0;
  int64_t slot[kMaxSlots] = {};

 private:
  void move(int d, int64_t steps) {
    param += steps * layout_.param[d];
    grad += steps * layout_.grad[d];
    for (int k = 0; k < kSlots; ++k) slot[k] += steps * layout_.slot[k][d];
  }

  const StridedLayout& layout_;
  int64_t index_[kMaxDims];
};

// n masters of half parameters; see NOTE: [master weights].
void load_masters(float* to, const BFloat16* p, const int16_t* rests, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = joined(p[i], rests[i]);
}
void store_masters(BFloat16* p, int16_t* rests, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) split(from[i], p[i], rests[i]);
}

// Of at most a block. The compiler packs no conversion of a float16 by itself.
void load_masters(float* to, const Float16* p, const float* masters, int64_t n) {
  Float16 rounded[kBlock];
  store_dense(rounded, masters, n);
  load_dense(to, p, n);
  for (int64_t i = 0; i < n; ++i) to[i] = rounded[i].bits == p[i].bits ? masters[i] : to[i];
}
void store_masters(Float16* p, float* masters, const float* from, int64_t n) {
  store_dense(p, from, n);
  store_dense(masters, from, n);
}

// n numbers in their places from the element `begin` of a parameter on.
void store_by_chance(BFloat16* p, RandomKey key, int64_t begin, const float* from, int64_t n) {
  const uint32_t low_begin = static_cast<uint32_t>(begin);
  const uint32_t high_begin = static_cast<uint32_t>(static_cast<uint64_t>(begin) >> 32);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t low = low_begin + static_cast<uint32_t>(i);
    const uint32_t high = high_begin + (low < low_begin ? 1u : 0u);
    p[i] = rounded_by_chance(from[i], random_bits(key, low, high));
  }
}

// A parameter's elements, however they are kept: blocks of dense ones, and single ones. Wide types
// are kept as they are.
template <typename P>
struct Parameter {
  using C = compute_t<P>;

  Parameter(const TensorRef& tensor, const GroupStages*) : at(static_cast<P*>(tensor.param)) {}

  void load(C* to, int64_t begin, int64_t n) const { load_dense(to, at + begin, n); }
  void store(const C* from, int64_t begin, int64_t n) const { store_dense(at + begin, from, n); }
  template <int kSlots>
  C load(const Cursor<kSlots>& from) const {
    return fastlr::load(at[from.param]);
  }
  template <int kSlots>
  void store(C x, const Cursor<kSlots>& to) const {
    fastlr::store(at[to.param], x);
  }

  P* at;
};

template <typename Half>
struct HalfParameter {
  HalfParameter(const TensorRef& tensor, const GroupStages* stages)
      : at(static_cast<Half*>(tensor.param)),
        masters(static_cast<master_t<Half>*>(tensor.slot[kMasterSlot])),
        kept(tensor.kept),
        first(tensor.first) {
    if (kept == Keeping::kStochastic) key = random_key(stages->random, tensor.place);
  }

  void load(float* to, int64_t begin, int64_t n) const {
    if (kept != Keeping::kMaster) return load_dense(to, at + begin, n);
    load_masters(to, at + begin, masters + begin, n);
  }

  void store(const float* from, int64_t begin, int64_t n) const {
    if (kept == Keeping::kMaster) return store_masters(at + begin, masters + begin, from, n);
    if constexpr (std::is_same<Half, BFloat16>::value) {
      if (kept == Keeping::kStochastic)
        return store_by_chance(at + begin, key, first + begin, from, n);
    }
    store_dense(at + begin, from, n);
  }

  float load(const Cursor<kMaxSlots>& from) const {
    if (kept != Keeping::kMaster) return fastlr::load(at[from.param]);
    return joined(at[from.param], masters[from.slot[kMasterSlot]]);
  }

  void store(float x, const Cursor<kMaxSlots>& to) const {
    if (kept == Keeping::kMaster) return split(x, at[to.param], masters[to.slot[kMasterSlot]]);
    if constexpr (std::is_same<Half, BFloat16>::value) {
      if (kept == Keeping::kStochastic) {
        at[to.param] = rounded_by_chance(x, random_bits(key, first + to.param));
        return;
      }
    }
    fastlr::store(at[to.param], x);
  }

  Half* at;
  master_t<Half>* masters;
  Keeping kept;
  int64_t first;
  RandomKey key{};
};
template <>
struct Parameter<BFloat16> : HalfParameter<BFloat16> {
  using HalfParameter::HalfParameter;
};
template <>
struct Parameter<Float16> : HalfParameter<Float16> {
  using HalfParameter::HalfParameter;
};

template <typename R, typename P, typename M>
void update_dense(const Scalars<R, compute_t<P>>& s, const Parameter<P>& p, const P* g,
                  const std::array<M*, R::kSlotCount>& slots, int64_t begin, int64_t end,
                  double* lanes) {
  const uint32_t live = s.around.live;
  Staged<R, compute_t<P>> staged;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = std::min(end - i, kBlock);
    p.load(staged.p, i, count);
    load_dense(staged.g, g + i, count);
    for (int k = 0; k < R::kSlotCount; ++k) {
      if (is_live(live, k)) load_dense(staged.slots[k], slots[k] + i, count);
    }
    staged.update(s, count, lanes);
    p.store(staged.p, i, count);
    for (int k = 0; k < R::kSlotCount; ++k) {
      if (is_live(live, k)) store_dense(slots[k] + i, staged.slots[k], count);
    }
  }
}

template <typename R, typename P, typename M>
void update_strided(const Scalars<R, compute_t<P>>& s, const Parameter<P>& p, const P* g,
                    const std::array<M*, R::kSlotCount>& slots, const StridedLayout& layout,
                    int64_t begin, int64_t end, double* lanes) {
  using C = compute_t<P>;
  const uint32_t live = s.around.live;
  Staged<R, C> staged;
  constexpr int kSlots = sizeof(P) == 2 ? int{kMaxSlots} : int{R::kSlotCount};
  Cursor<kSlots> reader(layout, begin);
  Cursor<kSlots> writer(layout, begin);
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = end - i < kBlock ? end - i : kBlock;
    for (int64_t k = 0; k < count; ++k, reader.advance()) {
      staged.p[k] = p.load(reader);
      staged.g[k] = load(g[reader.grad]);
      for (int m = 0; m < R::kSlotCount; ++m) {
        if (is_live(live, m)) {
          staged.slots[m][k] = static_cast<C>(load(slots[m][reader.slot[m]]));
        }
      }
    }
    staged.update(s, count, lanes);
    for (int64_t k = 0; k < count; ++k, writer.advance()) {
      p.store(staged.p[k], writer);
      for (int m = 0; m < R::kSlotCount; ++m) {
        if (is_live(live, m)) store(slots[m][writer.slot[m]], staged.slots[m][k]);
      }
    }
  }
}

template <typename R, typename P, typename M>
void update(const TensorRef& tensor, const StridedLayout* layout, const AnyScalars& scalars,
            const GroupStages* stages, int64_t begin, int64_t end, double* lanes) {
  using C = compute_t<P>;
  const Scalars<R, C>& s = as<R>(scalars).in(C{});
  const Parameter<P> p(tensor, stages);
  const P* g = static_cast<const P*>(tensor.grad);
  std::array<M*, R::kSlotCount> slots;
  for (int k = 0; k < R::kSlotCount; ++k) slots[k] = static_cast<M*>(tensor.slot[k]);
  if (layout != nullptr) return update_strided<R>(s, p, g, slots, *layout, begin, end, lanes);
  if constexpr (std::is_same<P, C>::value && std::is_same<M, C>::value) {
    for (M*& slot : slots) {
      if (slot != nullptr) slot += begin;
    }
    update_in_place<R>(s, p.at + begin, g + begin, slots, end - begin, lanes);
  } else {
    update_dense<R>(s, p, g, slots, begin, end, lanes);
  }
}

template <typename R, typename P>
void update(const TensorRef& tensor, const StridedLayout* layout, const AnyScalars& scalars,
            const GroupStages* stages, int64_t begin, int64_t end, double* lanes) {
  if (tensor.state_type == tensor.type) {
    update<R, P, P>(tensor, layout, scalars, stages, begin, end, lanes);
  } else {
    update<R, P, float>(tensor, layout, scalars, stages, begin, end, lanes);
  }
}

// n averages towards the parameter's elements.
template <typename T, typename From>
void move_averages(const Average<T>& average, T* averages, From* p, int64_t n) {
  const Average<T> a = average;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) averages[i] = a.moved(averages[i], p[i]);
}

// Of at most a block.
template <typename P, typename E>
void move_averages(const TensorRef& tensor, const StridedLayout* layout, const GroupStages& stages,
                   int64_t begin, int64_t end) {
  using C = compute_t<P>;
  const Average<C>& average = stages.averaging.in(C{});
  const Parameter<P> p(tensor, &stages);
  E* averages = static_cast<E*>(tensor.slot[kEmaSlot]);
  const int64_t n = end - begin;
  if constexpr (std::is_same<P, C>::value && std::is_same<E, C>::value) {
    if (layout == nullptr) return move_averages(average, averages + begin, p.at + begin, n);
  }
  C p_block[kBlock], block[kBlock];
  if (layout == nullptr) {
    p.load(p_block, begin, n);
    load_dense(block, averages + begin, n);
    move_averages(average, block, p_block, n);
    store_dense(averages + begin, block, n);
    return;
  }
  Cursor<kMaxSlots> reader(*layout, begin);
  Cursor<kMaxSlots> writer(*layout, begin);
  for (int64_t i = 0; i < n; ++i, reader.advance()) {
    p_block[i] = p.load(reader);
    block[i] = load(averages[reader.slot[kEmaSlot]]);
  }
  move_averages(average, block, p_block, n);
  for (int64_t i = 0; i < n; ++i, writer.advance()) {
    store(averages[writer.slot[kEmaSlot]], block[i]);
  }
}

template <typename Half>
void move_averages_of_half(const TensorRef& tensor, const StridedLayout* layout,
                           const GroupStages& stages, int64_t begin, int64_t end) {
  if (tensor.ema_type == tensor.type) {
    move_averages<Half, Half>(tensor, layout, stages, begin, end);
  } else {
    move_averages<Half, float>(tensor, layout, stages, begin, end);
  }
}

[[gnu::noinline]] void move_averages(const TensorRef& tensor, const StridedLayout* layout,
                                     const GroupStages& stages, int64_t begin, int64_t end) {
  switch (tensor.type) {
    case StorageType::kFloat32:
      return move_averages<float, float>(tensor, layout, stages, begin, end);
    case StorageType::kFloat64:
      return move_averages<double, double>(tensor, layout, stages, begin, end);
    case StorageType::kBFloat16:
      return move_averages_of_half<BFloat16>(tensor, layout, stages, begin, end);
    case StorageType::kFloat16:
      return move_averages_of_half<Float16>(tensor, layout, stages, begin, end);
  }
}

template <typename R>
void update(const TensorRef& tensor, const StridedLayout* layout, const AnyScalars& scalars,
            const GroupStages* stages, int64_t begin, int64_t end, double* lanes) {
  switch (tensor.type) {
    case StorageType::kFloat32:
      return update<R, float, float>(tensor, layout, scalars, stages, begin, end, lanes);
    case StorageType::kFloat64:
      return update<R, double>(tensor, layout, scalars, stages, begin, end, lanes);
    case StorageType::kBFloat16:
      return update<R, BFloat16>(tensor, layout, scalars, stages, begin, end, lanes);
    case StorageType::kFloat16:
      return update<R, Float16>(tensor, layout, scalars, stages, begin, end, lanes);
  }
}

// A rule's update and the averages behind it, block by block: what they read is still in the
// first-level cache.
template <typename R>
void update_with_stages(const TensorRef& tensor, const StridedLayout* layout,
                        const AnyScalars& scalars, const GroupStages* stages, int64_t begin,
                        int64_t end, double* lanes) {
  if (stages == nullptr || !tensor.averages) {
    return update<R>(tensor, layout, scalars, stages, begin, end, lanes);
  }
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t block_end = std::min(i + kBlock, end);
    update<R>(tensor, layout, scalars, stages, i, block_end, lanes);
    move_averages(tensor, layout, *stages, i, block_end);
  }
}

template <typename T>
void squares(const TensorRef& tensor, const StridedLayout* layout, int64_t begin, int64_t end,
             double* lanes) {
  using C = compute_t<T>;
  const T* values = static_cast<const T*>(tensor.grad);
  const C bound = static_cast<C>(tensor.max_value);
  // Halves whose conversion is not for single values are staged, too.
  constexpr bool kConverts = std::is_same<T, Float16>::value;
  if (layout == nullptr && !kConverts) {
    return add_squares<true>(lanes, values + begin, end - begin, bound);
  }
  C block[kBlock];
  std::optional<Cursor<0>> reader;
  if (layout != nullptr) reader.emplace(*layout, begin);
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = std::min(end - i, kBlock);
    if (reader) {
      for (int64_t k = 0; k < count; ++k, reader->advance()) block[k] = load(values[reader->grad]);
    } else {
      fetch(values + i + kBlock, static_cast<int>(count));
      load_dense(block, values + i, count);
    }
    add_squares(lanes, block, count, bound);
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

extern const ChunkKernel FASTLR_AT_LEVEL(kernels, FASTLR_SIMD_LEVEL)[];
const ChunkKernel FASTLR_AT_LEVEL(kernels, FASTLR_SIMD_LEVEL)[] = {
#define FASTLR_KERNEL(rule) &update_with_stages<rule>,
    FASTLR_FOR_EACH_RULE(FASTLR_KERNEL)
#undef FASTLR_KERNEL
};

}  // namespace fastlr

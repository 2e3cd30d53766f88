// Tensors for a step of the native code, and what it must leave in them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "half_formats.h"
#include "references.h"
#include "tensors.h"

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      std::exit(1);                                               \
    }                                                             \
  } while (false)

// Null where the program is linked without AddressSanitizer.
extern "C" [[gnu::weak]] void* __asan_region_is_poisoned(void* begin, size_t size);

namespace fastlr {

// Elements behind a Memory that must not change. AddressSanitizer sees every access there: with it
// the memory ends exactly where the allocation ends.
inline const int64_t kTrail = __asan_region_is_poisoned != nullptr ? 0 : 8;

// `size` elements; in front of them lie `lead` that must not change. Without these it would begin
// at a multiple of 16 bytes.
template <typename T>
class Memory {
 public:
  Memory(int64_t size, int64_t lead, Holds holds, std::mt19937& random)
      : lead_(lead), count_(lead + size + kTrail), all_(new T[count_]), before_(new T[count_]) {
    CHECK(reinterpret_cast<uintptr_t>(all_.get()) % 16 == 0, "%p", static_cast<void*>(all_.get()));
    std::uniform_int_distribution<int> mantissa(512, 1023),
        exponent(range(holds).first, range(holds).second);
    for (int64_t i = 0; i < count_; ++i) {
      const bool negative = holds != Holds::kSquares && random() % 2 == 0;
      const int value = negative ? -mantissa(random) : mantissa(random);
      encode(all_[i], std::ldexp(static_cast<float>(value), exponent(random) - 10));
      before_[i] = all_[i];
    }
  }
  T* data() { return all_.get() + lead_; }
  const T* before() const { return before_.get() + lead_; }
  void put(int64_t i, T value) { data()[i] = before_[lead_ + i] = value; }
  // What the reference says that data()[i] is now.
  void expect(int64_t i, T value) {
    CHECK(!std::isnan(decode(value)), "element %ld: a NaN's bits are nobody's promise", long(i));
    before_[lead_ + i] = value;
  }
  void check(const std::string& name) const {
    if (std::memcmp(all_.get(), before_.get(), count_ * sizeof(T)) == 0) return;
    for (int64_t i = 0; i < count_; ++i) {
      CHECK(std::memcmp(&all_[i], &before_[i], sizeof(T)) == 0, "element %ld of %s: %a, not %a",
            static_cast<long>(i - lead_), name.c_str(), double(decode(all_[i])),
            double(decode(before_[i])));
    }
  }

 private:
  // Exponents. A mean is so small that no variance becomes negative, in halves neither.
  static std::pair<int, int> range(Holds holds) {
    if (holds == Holds::kSquares) return {-8, 4};
    return holds == Holds::kMean ? std::pair(-44, -16) : std::pair(-24, 4);
  }

  int64_t lead_, count_;
  std::unique_ptr<T[]> all_, before_;
};

// The leads of a tensor's memories: where they start within a vector.
struct Leads {
  int64_t param, grad;
  int64_t slot[kMaxSlots];

  static Leads same(int64_t lead) { return {lead, lead, {lead, lead, lead, lead, lead}}; }
};

// A shape; strides of parameter, gradient and the first slot (none: all dense in row-major order).
struct Geometry {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<std::vector<int64_t>> strides;
};

inline int64_t elements(const Geometry& geometry) {
  int64_t n = 1;
  for (const int64_t size : geometry.shape) n *= size;
  return n;
}

inline std::vector<int64_t> packed(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * shape[d];
  return strides;
}

// Those of the slots behind the first are others than its own: by columns, and with gaps.
inline std::vector<std::vector<int64_t>> all_strides(const Geometry& geometry) {
  std::vector<std::vector<int64_t>> all = geometry.strides;
  if (all.empty()) return all;
  const std::vector<int64_t>& shape = geometry.shape;
  all.push_back(packed({shape.rbegin(), shape.rend()}));
  std::reverse(all.back().begin(), all.back().end());
  all.push_back(packed(shape));
  for (int64_t& stride : all.back()) stride *= 2;
  all.push_back(packed(shape));
  for (int64_t& stride : all.back()) stride *= 3;
  all.push_back(packed(shape));
  for (int64_t& stride : all.back()) stride *= 2;
  return all;
}

inline Geometry flat(int64_t n) { return {"flat " + std::to_string(n), {n}, {}}; }

inline std::vector<Geometry> geometries() {
  std::vector<Geometry> all;
  for (const int64_t n :
       {0, 1, 7, 8, 9, 16, 17, 33, 511, 512, 513, 1027, 16383, 16384, 16385, 20011})
    all.push_back(flat(n));
  all.push_back({"gradient transposed", {19, 27}, {{27, 1}, {1, 19}, {27, 1}}});
  all.push_back({"slot with gaps", {512}, {{1}, {1}, {3}}});
  all.push_back({"parameter with gaps", {7, 5, 11}, {{200, 33, 3}, {55, 11, 1}, {1, 7, 35}}});
  all.push_back({"gradient expanded", {33, 31}, {{40, 1}, {0, 0}, {31, 1}}});
  all.push_back({"complex", {13, 21, 2}, {{100, 4, 1}, {2, 26, 1}, {42, 2, 1}}});
  all.push_back({"across shares", {3, 127, 53}, {{7000, 54, 1}, {1, 159, 3}, {6731, 53, 1}}});
  std::vector<int64_t> deep(kMaxDims, 1);
  deep.front() = 5, deep[20] = 4, deep.back() = 29;
  std::vector<int64_t> reversed = packed({deep.rbegin(), deep.rend()});
  std::reverse(reversed.begin(), reversed.end());
  all.push_back({"64 dimensions", deep, {packed(deep), reversed, packed(deep)}});
  return all;
}

// Adds values times factors in the order that NOTE: [sums in lanes] gives.
inline double sum_in_lanes(const std::vector<double>& values, const std::vector<double>& factors) {
  std::vector<double> lanes(256, 0.0);
  for (size_t i = 0; i < values.size(); ++i) {
    lanes[i % 256] = std::fma(values[i], factors[i], lanes[i % 256]);
  }
  while (lanes.size() > 1) {
    const size_t half = lanes.size() / 2;
    for (size_t k = 0; k < half; ++k) lanes[k] = lanes[k] + lanes[half + k];
    lanes.resize(half);
  }
  return lanes[0];
}

inline double sum_in_lanes(const std::vector<double>& values) {
  return sum_in_lanes(values, std::vector<double>(values.size(), 1.0));
}

// A few of them, for what does not depend on where elements lie.
inline std::vector<Geometry> few_geometries() {
  std::vector<Geometry> few;
  for (Geometry& geometry : geometries()) {
    const int64_t n = elements(geometry);
    const bool dense = geometry.strides.empty();
    if (dense ? n == 0 || n == 7 || n == 33 || n == 513 || n == 1027 : n < 600)
      few.push_back(std::move(geometry));
  }
  return few;
}

// One tensor in the step, and its reference.
struct Case {
  virtual ~Case() = default;
  // Appends the sums of the squares of the gradient's chunks, clipped to a value where it is finite
  // or all are.
  virtual void append_squares(const Values& options, float inverse_scale, bool finite_only,
                              std::vector<double>& sums) const = 0;
  // Puts a number in the place of the gradient's last element, and returns what was there.
  virtual double put_in_gradient(double value) = 0;
  // kept: a bit for each slot that there is memory for.
  virtual TensorRef ref(uint32_t kept, const Values& options,
                        std::vector<StridedLayout>& layouts) = 0;
  // factor: of the gradient. updates: of the group, before this one.
  virtual void expect_update(const Values& options, double factor, float inverse_scale,
                             int64_t updates) = 0;
  virtual void check() const = 0;
  int group = 0;
  int64_t age = 0;  // updates that its state has seen
  int32_t place = 0;
};

template <typename P, typename M>
class TypedCase : public Case {
 public:
  TypedCase(const Reference& reference, const Geometry& geometry, StorageType type,
            StorageType state_type, bool in_place, const Leads& leads, std::mt19937& random)
      : reference_(reference),
        geometry_(geometry),
        numel_(elements(geometry)),
        strides_(all_strides(geometry)),
        type_(type),
        state_type_(state_type),
        in_place_(in_place),
        narrow_average_(sizeof(P) == 2 && random() % 3 == 0),
        param_(extent(0), leads.param, Holds::kAny, random),
        grad_(extent(1), leads.grad, Holds::kAny, random),
        average_(extent(2 + kEmaSlot), leads.slot[kEmaSlot], Holds::kAny, random),
        own_average_(extent(2 + kEmaSlot), leads.slot[kEmaSlot], Holds::kAny, random),
        rest_(extent(2 + kMasterSlot), leads.slot[kMasterSlot], Holds::kAny, random),
        master_(extent(2 + kMasterSlot), leads.slot[kMasterSlot], Holds::kAny, random) {
    place = static_cast<int32_t>(random() % 1000);
    // Three masters out of four are those of their parameter, which somebody wrote of the others.
    for (int64_t i = 0; i < numel_ && sizeof(P) == 2; ++i) {
      const float p = static_cast<float>(decode(param_.before()[at(0, i)]));
      const float near =
          p * (1.0f + 1e-4f * (static_cast<float>(random() % 1000) / 1000.0f - 0.5f));
      if (random() % 4 != 0) master_.put(at(2 + kMasterSlot, i), near);
    }
    for (size_t k = 0; k < reference.slots.size(); ++k)
      slots_.emplace_back(extent(2 + k), leads.slot[k], reference.slots[k].holds, random);
  }

  TensorRef ref(uint32_t kept, const Values& options,
                std::vector<StridedLayout>& layouts) override {
    TensorRef ref{};
    ref.param = param_.data();
    ref.grad = in_place_ ? static_cast<const void*>(param_.data()) : grad_.data();
    for (size_t k = 0; k < slots_.size(); ++k)
      ref.slot[k] = is_live(kept, static_cast<int>(k)) ? slots_[k].data() : nullptr;
    ref.averages = is_live(kept, kEmaSlot);
    if (ref.averages) {
      ref.slot[kEmaSlot] =
          narrow_average_ ? static_cast<void*>(own_average_.data()) : average_.data();
    }
    const bool is_wide = sizeof(P) == 2 && !narrow_average_;
    ref.ema_type = is_wide ? StorageType::kFloat32 : type_;
    if (has_master(kept)) {
      ref.kept = Keeping::kMaster;
      ref.slot[kMasterSlot] = kIsBFloat16 ? static_cast<void*>(rest_.data()) : master_.data();
    } else if (rounds_by_chance(options)) {
      ref.kept = Keeping::kStochastic;
    }
    ref.place = place;
    ref.max_value = is_set(options, "max_grad_value") ? options.at("max_grad_value") : INFINITY;
    ref.staged = ref.averages || ref.kept != Keeping::kNearest || std::isfinite(ref.max_value) ||
                 is_set(options, "cautious");
    ref.age = age;
    ref.numel = numel_;
    ref.group = group;
    ref.type = type_;
    ref.state_type = state_type_;
    ref.layout = -1;
    if (!strides_.empty()) {
      StridedLayout layout{};
      layout.ndim = static_cast<int32_t>(geometry_.shape.size());
      std::copy(geometry_.shape.begin(), geometry_.shape.end(), layout.shape);
      std::copy(strides_[0].begin(), strides_[0].end(), layout.param);
      std::copy(strides_[1].begin(), strides_[1].end(), layout.grad);
      for (int k = 0; k < kMaxSlots; ++k)
        std::copy(strides_[2 + k].begin(), strides_[2 + k].end(), layout.slot[k]);
      ref.layout = static_cast<int32_t>(layouts.size());
      layouts.push_back(layout);
    }
    return ref;
  }

  void expect_update(const Values& options, double factor, float inverse_scale,
                     int64_t updates) override {
    using C = compute_t<P>;
    const Update<C> update = whole_update<C>(reference_, options, age, factor, inverse_scale);
    const uint32_t live = live_slots(reference_, options);
    for (int64_t i = 0; i < numel_; ++i) {
      const C before = decode(param_.before()[at(0, i)]);
      const C g = in_place_ ? before : decode(grad_.before()[at(1, i)]);
      C p = has_master(live) ? static_cast<C>(master(i)) : before;
      C state[kMaxSlots] = {};
      for (size_t k = 0; k < slots_.size(); ++k)
        state[k] = decode(slots_[k].before()[at(2 + k, i)]);
      update(p, g, state);
      const P new_p = kept_as(p, i, live, options, updates);
      param_.expect(at(0, i), new_p);
      for (size_t k = 0; k < slots_.size(); ++k) {
        if (!is_live(live, static_cast<int>(k))) continue;
        M value;
        encode(value, state[k]);
        slots_[k].expect(at(2 + k, i), value);
      }
      if (!is_live(live, kEmaSlot)) continue;
      const C stored = has_master(live) ? p : static_cast<C>(decode(new_p));
      if (narrow_average_) {
        expect_average(own_average_, at(2 + kEmaSlot, i), options, updates, stored);
      } else {
        expect_average(average_, at(2 + kEmaSlot, i), options, updates, stored);
      }
    }
    if ((live & kRuleSlots) != 0) ++age;
  }

  void append_squares(const Values& options, float inverse_scale, bool finite_only,
                      std::vector<double>& sums) const override {
    using C = compute_t<P>;
    const C bound = bound_of<C>(options, inverse_scale);
    std::vector<double> chunk;
    for (int64_t i = 0; i < numel_; ++i) {
      const C g = in_place_ ? decode(param_.before()[at(0, i)]) : decode(grad_.before()[at(1, i)]);
      chunk.push_back(finite_only && std::isinf(g) ? g : clip_value(g, bound));
      if (chunk.size() == 8192 || i + 1 == numel_) {
        sums.push_back(sum_in_lanes(chunk, chunk));
        chunk.clear();
      }
    }
  }

  double put_in_gradient(double value) override {
    CHECK(numel_ > 0 && !in_place_, "there is none in %s", geometry_.name.c_str());
    const int64_t last = at(1, numel_ - 1);
    const double before = decode(grad_.before()[last]);
    P encoded;
    encode(encoded, static_cast<compute_t<P>>(value));
    grad_.put(last, encoded);
    return before;
  }

  void check() const override {
    const std::string where = std::string(" of ") + reference_.rule + ", " + geometry_.name +
                              ", type " + std::to_string(int(type_)) + ", state's type " +
                              std::to_string(int(state_type_)) + ", options " +
                              std::to_string(group) + ", age " + std::to_string(age);
    param_.check("parameter" + where);
    grad_.check("gradient" + where);
    for (size_t k = 0; k < slots_.size(); ++k) slots_[k].check(reference_.slots[k].name + where);
    average_.check("average" + where);
    own_average_.check("average of the parameter's type" + where);
    rest_.check("rest of the master" + where);
    master_.check("master" + where);
  }

 private:
  static constexpr bool kIsBFloat16 = std::is_same<P, BFloat16>::value;

  static bool has_master(uint32_t live) { return sizeof(P) == 2 && is_live(live, kMasterSlot); }
  static bool rounds_by_chance(const Values& options) {
    return kIsBFloat16 && is_set(options, "stochastic_rounding");
  }

  // The float32 number that a half parameter stands for.
  float master(int64_t i) const {
    const P p = param_.before()[at(0, i)];
    if constexpr (sizeof(P) == 2) {
      if (kIsBFloat16) {
        const int64_t upper = p.bits, lower = rest_.before()[at(2 + kMasterSlot, i)];
        return bits_float(static_cast<uint32_t>(upper * 65536 + lower));
      }
      const float whole = master_.before()[at(2 + kMasterSlot, i)];
      P rounded;
      encode(rounded, whole);
      if (rounded.bits == p.bits) return whole;
    }
    return static_cast<float>(decode(p));
  }

  // The parameter after an update, of which its master's part is expected here.
  P kept_as(compute_t<P> value, int64_t i, uint32_t live, const Values& options, int64_t updates) {
    P kept;
    encode(kept, value);
    if constexpr (kIsBFloat16) {
      const uint32_t bits = float_bits(value);
      if (has_master(live)) {
        const bool up = (bits & 0xffffu) >= 0x8000u;  // ties too: away from zero
        kept.bits = static_cast<uint16_t>(bits / 65536 + (up ? 1 : 0));
        const int64_t rest = int64_t{bits} - int64_t{kept.bits} * 65536;
        rest_.expect(at(2 + kMasterSlot, i), static_cast<int16_t>(rest));
      } else if (rounds_by_chance(options)) {
        const uint32_t chance = random_16(options.at("rounding_seed"), place, updates, at(0, i));
        kept.bits = static_cast<uint16_t>(bits / 65536 + (bits % 65536 + chance >= 65536 ? 1 : 0));
      }
    } else if (has_master(live)) {
      master_.expect(at(2 + kMasterSlot, i), static_cast<float>(value));
    }
    return kept;
  }

  template <typename E>
  static void expect_average(Memory<E>& averages, int64_t place, const Values& options,
                             int64_t updates, compute_t<P> param) {
    E value;
    encode(value,
           averaged<compute_t<P>>(options, updates, decode(averages.before()[place]), param));
    averages.expect(place, value);
  }

  // Where the i-th element, in row-major order, of parameter (0), gradient (1) or a slot lies.
  int64_t at(size_t which, int64_t i) const {
    if (strides_.empty()) return i;
    int64_t offset = 0;
    for (size_t d = geometry_.shape.size(); d-- > 0; i /= geometry_.shape[d])
      offset += i % geometry_.shape[d] * strides_[which][d];
    return offset;
  }
  int64_t extent(size_t which) const { return numel_ == 0 ? 0 : at(which, numel_ - 1) + 1; }

  const Reference& reference_;
  Geometry geometry_;
  int64_t numel_;
  std::vector<std::vector<int64_t>> strides_;
  StorageType type_, state_type_;
  bool in_place_;        // the gradient is the parameter
  bool narrow_average_;  // the average is stored as the parameter is
  Memory<P> param_, grad_;
  Memory<compute_t<P>> average_;
  Memory<P> own_average_;
  Memory<int16_t> rest_;  // of the master of a bfloat16 parameter ...
  Memory<float> master_;  // ... and that of a float16 one
  std::vector<Memory<M>> slots_;
};

using Cases = std::vector<std::unique_ptr<Case>>;

// Calls f(type, type of state, P{}, M{}) for each pair of storage types that there are kernels for.
template <typename F>
void for_each_pair(F f) {
  using S = StorageType;
  f(S::kFloat32, S::kFloat32, float{}, float{});
  f(S::kFloat64, S::kFloat64, double{}, double{});
  f(S::kFloat64, S::kFloat32, double{}, float{});
  f(S::kBFloat16, S::kBFloat16, BFloat16{}, BFloat16{});
  f(S::kBFloat16, S::kFloat32, BFloat16{}, float{});
  f(S::kFloat16, S::kFloat16, Float16{}, Float16{});
  f(S::kFloat16, S::kFloat32, Float16{}, float{});
}

}  // namespace fastlr

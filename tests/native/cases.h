// Tensors for a step of the native code, and a plain scalar reference of what it must leave.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "half_formats.h"
#include "step.h"

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
  Memory(int64_t size, int64_t lead, std::mt19937& random)
      : lead_(lead), count_(lead + size + kTrail), all_(new T[count_]), before_(new T[count_]) {
    CHECK(reinterpret_cast<uintptr_t>(all_.get()) % 16 == 0, "%p", static_cast<void*>(all_.get()));
    std::uniform_int_distribution<int> exponent(-24, 4), mantissa(512, 1023);
    for (int64_t i = 0; i < count_; ++i) {
      const int value = random() % 2 ? mantissa(random) : -mantissa(random);
      encode(all_[i], std::ldexp(static_cast<float>(value), exponent(random) - 10));
      before_[i] = all_[i];
    }
  }
  T* data() { return all_.get() + lead_; }
  const T* before() const { return before_.get() + lead_; }
  // What the reference says that data()[i] is now.
  void expect(int64_t i, T value) { before_[lead_ + i] = value; }
  void check(const std::string& name) const {
    for (int64_t i = 0; i < count_; ++i) {
      CHECK(std::memcmp(&all_[i], &before_[i], sizeof(T)) == 0, "element %ld of %s: %a, not %a",
            static_cast<long>(i - lead_), name.c_str(), double(decode(all_[i])),
            double(decode(before_[i])));
    }
  }

 private:
  int64_t lead_, count_;
  std::unique_ptr<T[]> all_, before_;
};

// The leads of a tensor's three memories: where they start within a vector.
struct Leads {
  int64_t param, grad, momentum;
};

// A shape; strides of parameter, gradient and momentum (none: all dense in row-major order).
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

inline std::vector<Geometry> geometries() {
  std::vector<Geometry> all;
  for (const int64_t n :
       {0, 1, 7, 8, 9, 16, 17, 33, 511, 512, 513, 1027, 16383, 16384, 16385, 20011})
    all.push_back({"flat " + std::to_string(n), {n}, {}});
  all.push_back({"gradient transposed", {19, 27}, {{27, 1}, {1, 19}, {27, 1}}});
  all.push_back({"momentum transposed", {512}, {{1}, {1}, {3}}});
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

// A group's options by name, as the references know them.
struct SgdOptions {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  bool nesterov;
  bool maximize;
};

inline Options in_order(const SgdOptions& o) {
  return {{o.lr, o.momentum, o.dampening, o.weight_decay, o.nesterov ? 1.0 : 0.0,
           o.maximize ? 1.0 : 0.0}};
}

template <typename C>
void reference(const SgdOptions& o, float inverse_scale, bool first, C& param, C grad,
               C& momentum) {
  if (inverse_scale != 1.0f) grad *= static_cast<C>(inverse_scale);
  if (o.maximize) grad = -grad;
  if (o.weight_decay != 0) grad = std::fma(static_cast<C>(o.weight_decay), param, grad);
  C direction = grad;
  if (o.momentum != 0) {
    const C decayed = momentum * static_cast<C>(o.momentum);
    momentum = first ? grad : std::fma(grad, static_cast<C>(1 - o.dampening), decayed);
    direction = o.nesterov ? std::fma(momentum, static_cast<C>(o.momentum), grad) : momentum;
  }
  param = std::fma(direction, static_cast<C>(-o.lr), param);
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

// One tensor in the step, and its reference.
struct Case {
  virtual ~Case() = default;
  // Appends the sums of the squares of the gradient's chunks.
  virtual void append_squares(std::vector<double>& sums) const = 0;
  virtual TensorRef ref(std::vector<StridedLayout>& layouts) = 0;
  virtual void expect_update(const SgdOptions& options, float inverse_scale) = 0;
  virtual void check() const = 0;
  bool first = true;  // momentum holds nothing yet
};

template <typename P, typename M>
class TypedCase : public Case {
 public:
  TypedCase(const Geometry& geometry, StorageType type, StorageType momentum_type, int group,
            bool in_place, const Leads& leads, std::mt19937& random)
      : geometry_(geometry),
        type_(type),
        momentum_type_(momentum_type),
        group_(group),
        in_place_(in_place),
        param_(extent(0), leads.param, random),
        grad_(extent(1), leads.grad, random),
        momentum_(extent(2), leads.momentum, random) {}

  TensorRef ref(std::vector<StridedLayout>& layouts) override {
    TensorRef ref{};
    ref.param = param_.data();
    ref.grad = in_place_ ? static_cast<const void*>(param_.data()) : grad_.data();
    ref.momentum = momentum_.data();
    ref.numel = numel();
    ref.group = group_;
    ref.type = type_;
    ref.momentum_type = momentum_type_;
    ref.first = first;
    ref.layout = -1;
    if (!geometry_.strides.empty()) {
      StridedLayout layout{};
      layout.ndim = static_cast<int32_t>(geometry_.shape.size());
      int64_t* const strides[] = {layout.param, layout.grad, layout.momentum};
      std::copy(geometry_.shape.begin(), geometry_.shape.end(), layout.shape);
      for (int k = 0; k < 3; ++k)
        std::copy(geometry_.strides[k].begin(), geometry_.strides[k].end(), strides[k]);
      ref.layout = static_cast<int32_t>(layouts.size());
      layouts.push_back(layout);
    }
    return ref;
  }

  void expect_update(const SgdOptions& options, float inverse_scale) override {
    for (int64_t i = 0; i < numel(); ++i) {
      compute_t<P> p = decode(param_.before()[at(0, i)]);
      compute_t<P> m = decode(momentum_.before()[at(2, i)]);
      const compute_t<P> g = in_place_ ? p : decode(grad_.before()[at(1, i)]);
      reference(options, inverse_scale, first, p, g, m);
      P new_p;
      M new_m = momentum_.before()[at(2, i)];
      encode(new_p, p);
      if (options.momentum != 0) encode(new_m, m);
      param_.expect(at(0, i), new_p);
      momentum_.expect(at(2, i), new_m);
    }
    if (options.momentum != 0) first = false;
  }

  void append_squares(std::vector<double>& sums) const override {
    std::vector<double> chunk;
    for (int64_t i = 0; i < numel(); ++i) {
      chunk.push_back(in_place_ ? decode(param_.before()[at(0, i)])
                                : decode(grad_.before()[at(1, i)]));
      if (chunk.size() == 8192 || i + 1 == numel()) {
        sums.push_back(sum_in_lanes(chunk, chunk));
        chunk.clear();
      }
    }
  }

  void check() const override {
    const std::string where = " of " + geometry_.name + ", type " + std::to_string(int(type_)) +
                              ", momentum type " + std::to_string(int(momentum_type_)) +
                              ", options " + std::to_string(group_);
    param_.check("parameter" + where);
    grad_.check("gradient" + where);
    momentum_.check("momentum" + where);
  }

 private:
  int64_t numel() const { return elements(geometry_); }
  // Where the i-th element, in row-major order, of parameter (0), gradient or momentum lies.
  int64_t at(int which, int64_t i) const {
    if (geometry_.strides.empty()) return i;
    int64_t offset = 0;
    for (size_t d = geometry_.shape.size(); d-- > 0; i /= geometry_.shape[d])
      offset += i % geometry_.shape[d] * geometry_.strides[which][d];
    return offset;
  }
  int64_t extent(int which) const { return numel() == 0 ? 0 : at(which, numel() - 1) + 1; }

  Geometry geometry_;
  StorageType type_, momentum_type_;
  int group_;
  bool in_place_;  // the gradient is the parameter
  Memory<P> param_, grad_;
  Memory<M> momentum_;
};

using Cases = std::vector<std::unique_ptr<Case>>;

template <typename P, typename M>
void add_cases(Cases& cases, StorageType type, StorageType momentum_type, int groups,
               std::mt19937& random) {
  for (const Geometry& geometry : geometries()) {
    for (int group = 0; group < groups; ++group) {
      if (elements(geometry) > 5000 && group % 2 == 1) continue;  // to save time
      const int64_t lead = static_cast<int64_t>(random() % 8);
      const bool in_place = geometry.strides.empty() && group == groups - 1;
      cases.push_back(std::make_unique<TypedCase<P, M>>(geometry, type, momentum_type, group,
                                                        in_place, Leads{lead, lead, lead}, random));
    }
  }
}

}  // namespace fastlr

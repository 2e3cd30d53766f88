// Storage types, the type they compute in, and the conversions between the two.
//
// Halves are 16-bit integers here: nvcc rejects _Float16 and GCC 12 leaves loops over it scalar.
// Rounding is to nearest, ties to even; the results equal those of the F16C instructions, NaN
// payloads included, so that they do not depend on the SIMD level. GPUs convert in one instruction,
// with the same results but for NaN payloads, which they do not keep in any arithmetic.
#pragma once

#include <stdint.h>
#include <string.h>

#include "host_device.h"

namespace fastlr {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// The type in which a storage type is computed: halves in float, the others in themselves.
template <typename T>
struct ComputeType {
  using type = T;
};
template <>
struct ComputeType<Float16> {
  using type = float;
};
template <>
struct ComputeType<BFloat16> {
  using type = float;
};
template <typename T>
using compute_t = typename ComputeType<T>::type;

FASTLR_HD uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

FASTLR_HD float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

FASTLR_HD float to_float(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

FASTLR_HD float to_float(Float16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // infinity, or a NaN, which becomes quiet
    bits = 0x7f800000u | ((magnitude & 0x3ffu) << 13) | (magnitude > 0x7c00u ? 0x400000u : 0u);
  } else if (magnitude < 0x400u) {  // zero or subnormal: a multiple of 2^-24
    bits = float_bits(static_cast<float>(magnitude) * 0x1p-24f);
  } else {  // rebias the exponent from 15 to 127
    bits = (magnitude << 13) + (112u << 23);
  }
  return bits_float(sign | bits);
#endif
}

FASTLR_HD BFloat16 to_bfloat16(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 value;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
  return value;
#else
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return BFloat16{static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
#endif
}

FASTLR_HD Float16 to_float16(float x) {
#if defined(__CUDA_ARCH__)
  Float16 value;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
  return value;
#else
  const uint32_t bits = float_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {  // NaN: keep the upper payload, make it quiet
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    half = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  } else {  // rebias from 127 to 15, round half to even at bit 13
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return Float16{static_cast<uint16_t>(sign | half)};
#endif
}

// A stored value in its compute type, and a computed one stored with a single rounding.
FASTLR_HD float load(float x) { return x; }
FASTLR_HD double load(double x) { return x; }
FASTLR_HD float load(Float16 x) { return to_float(x); }
FASTLR_HD float load(BFloat16 x) { return to_float(x); }

FASTLR_HD void store(float& to, float x) { to = x; }
FASTLR_HD void store(float& to, double x) { to = static_cast<float>(x); }
FASTLR_HD void store(double& to, double x) { to = x; }
FASTLR_HD void store(Float16& to, float x) { to = to_float16(x); }
FASTLR_HD void store(BFloat16& to, float x) { to = to_bfloat16(x); }

FASTLR_HD float fused_multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FASTLR_HD double fused_multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }

// NOTE: [selects]
// GCC vectorises a loop with a condition that is the same for all elements where it can make two
// loops of it, or a select; and it makes no select of a call, as a fused multiply-add is one to it,
// nor always of a flag. So rules select operands instead of results: an operation that is not
// wanted becomes one that changes no bit, a factor of 1, and nothing as the addend, which unlike
// zero leaves a negative zero as it is. Or they select by a mask, which is arithmetic.
template <typename T>
constexpr T kNothing = T(-0.0);

template <typename T>
struct Mask;
template <>
struct Mask<float> {
  uint32_t bits;
};
template <>
struct Mask<double> {
  uint64_t bits;
};

template <typename T>
FASTLR_HD Mask<T> mask_of(bool condition) {
  return {condition ? static_cast<decltype(Mask<T>::bits)>(-1) : 0};
}

// a where the mask is of true, else b.
template <typename T>
FASTLR_HD_INLINED T select(Mask<T> mask, T a, T b) {
  decltype(mask.bits) of_a, of_b;
  memcpy(&of_a, &a, sizeof of_a);
  memcpy(&of_b, &b, sizeof of_b);
  const decltype(mask.bits) of_result = of_b ^ ((of_a ^ of_b) & mask.bits);
  T result;
  memcpy(&result, &of_result, sizeof result);
  return result;
}

// Rounded correctly.
FASTLR_HD float square_root(float x) { return __builtin_sqrtf(x); }
FASTLR_HD double square_root(double x) { return __builtin_sqrt(x); }

// As torch.clamp between -bound and bound: NaN stays.
template <typename T>
FASTLR_HD_INLINED T clipped(T x, T bound) {
  const T from_above = x > bound ? bound : x;
  return from_above < -bound ? -bound : from_above;
}

// The larger of two numbers, NaN where one of them is, as torch.maximum.
template <typename T>
FASTLR_HD_INLINED T larger(T a, T b) {
  return a > b || a != a ? a : b;
}

}  // namespace fastlr

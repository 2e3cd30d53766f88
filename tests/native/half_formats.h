// The 16-bit floats by their definition: the oracle for the conversions in numeric.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "numeric.h"

namespace fastlr {

// All values of a format by their bits, sign apart, and rounding by search among them.
class HalfFormat {
 public:
  HalfFormat(int exponent_bits, int mantissa_bits)
      : infinity_(((1 << exponent_bits) - 1) << mantissa_bits) {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    for (int bits = 0; bits <= infinity_; ++bits) {
      const int exponent = bits >> mantissa_bits;
      const int mantissa = bits & ((1 << mantissa_bits) - 1);
      const int whole = exponent == 0 ? 0 : 1 << mantissa_bits;
      values_.push_back(std::ldexp(whole + mantissa, std::max(exponent, 1) - bias - mantissa_bits));
    }
  }

  double decode(uint16_t bits) const {
    const int magnitude = bits & 0x7fff;
    const double value = magnitude > infinity_    ? NAN
                         : magnitude == infinity_ ? INFINITY
                                                  : values_[magnitude];
    return bits >> 15 ? -value : value;
  }

  uint16_t encode(double x) const {  // not of a NaN
    const double magnitude = std::fabs(x);
    // The first value that is not less; infinity stands for the power of two that would come next.
    const auto above = std::lower_bound(values_.begin(), values_.end(), magnitude);
    int bits = above == values_.end() ? infinity_ : static_cast<int>(above - values_.begin());
    if (bits > 0 && magnitude < values_[bits]) {
      const double to_upper = values_[bits] - magnitude, to_lower = magnitude - values_[bits - 1];
      if (to_lower < to_upper || (to_lower == to_upper && bits % 2 == 1)) --bits;
    }
    return static_cast<uint16_t>(bits | (std::signbit(x) ? 0x8000 : 0));
  }

  // Half-way between a finite value without sign and the next.
  float tie_above(int bits) const {
    return static_cast<float>((values_[bits] + values_[bits + 1]) / 2);
  }

  bool is_nan(uint16_t bits) const { return (bits & 0x7fff) > infinity_; }

 private:
  int infinity_;
  std::vector<double> values_;
};

inline const HalfFormat kFloat16Format(5, 10);
inline const HalfFormat kBFloat16Format(8, 7);

inline float decode(float x) { return x; }
inline double decode(double x) { return x; }
inline float decode(Float16 x) { return static_cast<float>(kFloat16Format.decode(x.bits)); }
inline float decode(BFloat16 x) { return static_cast<float>(kBFloat16Format.decode(x.bits)); }
// What a Memory of these is filled with, and how it is shown.
inline float decode(int16_t x) { return x; }
inline void encode(int16_t& to, float x) {
  to = static_cast<int16_t>(std::remainder(x * 4099.0f, 65535.0f));
}
inline void encode(float& to, double x) { to = static_cast<float>(x); }
inline void encode(double& to, double x) { to = x; }
inline void encode(Float16& to, float x) { to.bits = kFloat16Format.encode(x); }
inline void encode(BFloat16& to, float x) { to.bits = kBFloat16Format.encode(x); }

}  // namespace fastlr

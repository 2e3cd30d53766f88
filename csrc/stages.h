// What an update does besides its rule, for every rule alike: averages of parameters, and half
// parameters of which more is kept than rounding to nearest leaves. See NOTE: [stages] in rule.h.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "average.h"
#include "numeric.h"
#include "rule.h"

namespace fastlr {

// How the averages of a group's parameters move at an update, in both compute types.
struct Averaging {
  Average<float> in_float;
  Average<double> in_double;

  FASTLR_HD_MEMBER const Average<float>& in(float) const { return in_float; }
  FASTLR_HD_MEMBER const Average<double>& in(double) const { return in_double; }
};

// warms_up: the decay grows with the updates before this one, as TensorFlow's
// ExponentialMovingAverage takes it. A decay of one, which stands for none, stays.
FASTLR_HD Averaging averaging(double decay, bool warms_up, int64_t updates) {
  const double t = static_cast<double>(updates);
  const double most = (1.0 + t) / (10.0 + t);
  if (warms_up && decay < 1.0 && most < decay) decay = most;
  return {average<float>(decay), average<double>(decay)};
}

// NOTE: [master weights]
// A bfloat16 is the upper half of a float32. Beside a parameter that is its master's upper half,
// rounded, its state keeps the lower 16 bits, so that the two are the master exactly. Of masters
// halfway between two bfloat16, which 16 bits cannot tell apart where those round to even, the
// larger magnitude is the parameter. Whoever writes the parameter moves the master along: to within
// half a unit in the last place of the new one.
//
// A float16 has another exponent; beside it the master is kept whole. Where the parameter is not
// what the master rounds to, somebody wrote it, and it is the master.
template <typename P>
struct Master {
  using type = void;
};
template <>
struct Master<BFloat16> {
  using type = int16_t;
};
template <>
struct Master<Float16> {
  using type = float;
};
template <typename P>
using master_t = typename Master<P>::type;

FASTLR_HD float joined(BFloat16 p, int16_t rest) {
  const uint32_t magnitude = p.bits & 0x7fffu;
  // What no master leaves: a rest that is older than a zero or an infinity beside it.
  const bool is_stale = (magnitude == 0u && rest < 0) || (magnitude >= 0x7f80u && rest > 0);
  const int32_t lower = is_stale ? 0 : rest;
  return bits_float((static_cast<uint32_t>(p.bits) << 16) + static_cast<uint32_t>(lower));
}
FASTLR_HD void split(float master, BFloat16& p, int16_t& rest) {
  const bool is_nan = master != master;
  const uint32_t bits = is_nan ? 0x7fc00000u : float_bits(master);
  p.bits = static_cast<uint16_t>((bits + 0x8000u) >> 16);
  rest = static_cast<int16_t>(static_cast<uint16_t>(bits));
}

FASTLR_HD float joined(Float16 p, float master) {
  return to_float16(master).bits == p.bits ? master : to_float(p);
}
FASTLR_HD void split(float x, Float16& p, float& master) {
  p = to_float16(x);
  master = x;
}

// NOTE: [random bits]
// Which way a number is rounded follows from its group's seed, its parameter's place in the
// optimizer, the updates before this one, and where in its parameter's memory it lies: so it is the
// same on every device, however the elements are cut, and after a resume. Of a part of a parameter
// it is where the whole one would lie, in rows; so replicas agree, and parts of rows are as if they
// were never cut. Nothing of it is secret
// or drawn; a hash does. Of the two here the one of 64 bits ends splitmix64 (Steele, Lea and Flood
// 2014), the one of 32 bits is Wellons' lowbias32.
FASTLR_HD uint64_t hashed(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}
FASTLR_HD uint32_t hashed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// Of one parameter's elements at one update.
struct RandomKey {
  uint32_t low;
  uint32_t high;
};
FASTLR_HD RandomKey random_key(uint64_t of_group, int32_t place) {
  const uint64_t key = hashed(of_group + static_cast<uint64_t>(place));
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// 16 bits for the element low + high * 2**32.
FASTLR_HD uint32_t random_bits(RandomKey key, uint32_t low, uint32_t high) {
  return hashed(hashed(low + key.low) + key.high + high * 0x9e3779b9u) >> 16;
}
FASTLR_HD uint32_t random_bits(RandomKey key, int64_t element) {
  const uint64_t bits = static_cast<uint64_t>(element);
  return random_bits(key, static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32));
}

// Away from zero with the probability that its distance from the bfloat16 towards zero is of the
// distance between the two, else to that one. random: 16 bits.
FASTLR_HD BFloat16 rounded_by_chance(float x, uint32_t random) {
  const bool is_nan = x != x;
  const uint32_t bits = is_nan ? 0x7fc00000u : float_bits(x) + random;
  return BFloat16{static_cast<uint16_t>(bits >> 16)};
}

// How a half parameter is kept between updates.
enum class Keeping : int8_t { kNearest, kMaster, kStochastic };

// What a group's stages need for one update.
struct GroupStages {
  Averaging averaging;
  uint64_t random;   // for random_key()
  double max_value;  // what gradients are clipped to element by element, or infinity
};

FASTLR_HD double max_value_of(const double* options_of_stages) {
  const double value = options_of_stages[kMaxGradValue];
  return value == 0.0 ? static_cast<double>(INFINITY) : value;
}

FASTLR_HD GroupStages group_stages(const double* options_of_stages, int64_t updates) {
  const double* const option = options_of_stages;
  const double given = option[kRoundingSeed] + 0.0;  // so that there is one zero
  uint64_t seed;
  memcpy(&seed, &given, sizeof seed);
  return {averaging(option[kEmaDecay], option[kEmaWarmup] != 0.0, updates),
          hashed(hashed(seed) + static_cast<uint64_t>(updates)), max_value_of(option)};
}

}  // namespace fastlr

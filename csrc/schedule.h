// Learning-rate and momentum schedules as data: a schedule is a range of segments, sorted by
// `begin`, plus the values of its tables. Everything is evaluated in IEEE double, without
// contraction.
//
// The cyclic policies follow torch.optim.lr_scheduler.CyclicLR bit for bit (Smith, arXiv
// 1506.01186), one-cycle follows OneCycleLR, restarts follow CosineAnnealingWarmRestarts; half a
// cosine is evaluated more precisely than PyTorch does it. A device's values are the host's to the
// bit but for those that take pow(): exp_range, polynomials and geometric windows.
#pragma once

#include <math.h>
#include <stdint.h>

#include <type_traits>

#include "host_device.h"

namespace fastlr {

enum class Curve : int32_t {
  kConstant,     // start
  kLine,         // from start to end over the local times offset .. offset + span
  kCosine,       // the same along half a cosine
  kRestarts,     // half a cosine from start to end; restarted after period, period * count, ...
  kPolynomial,   // end + (start - end) * ((offset + up * t) / span) ** gamma, up = 1 or -1
  kTimeBased,    // start / (1 + gamma * t)
  kExponential,  // start * gamma ** (count + floor(t / period))
  kCycle,        // from start to end and back; `up` of `span` rises; see Window and Decay
  kTable,        // table[table_begin + t], t < count; the last, up to which tests go
};

// The shape of a cycle's rise, w(s) for s in [0, 1]; the fall mirrors it.
enum class Window : int32_t {
  kLinear,      // s
  kGeometric,   // ((end / start) ** s - 1) / (end / start - 1): straight on a logarithmic axis
  kParabolic,   // s * (2 - s), Welch's window
  kSinusoidal,  // (1 - cos(pi * s)) / 2, Hann's window
};

// How a cycle's height shrinks.
enum class Decay : int32_t {
  kNone,       // triangular
  kHalving,    // triangular2: 2 ** -(cycle - 1)
  kHeight,     // exp_range as PyTorch has it: height * gamma ** t
  kBothBounds  // exp_range as in Smith's paper: value * gamma ** t
};

constexpr int64_t kEndless = INT64_MAX;

struct Segment {
  int64_t begin;   // clock from which on the segment holds, until the next one begins
  int64_t origin;  // clock at which its local time is zero
  int64_t tick;    // clock units per unit of local time, >= 1
  int64_t limit;   // local time stands still here
  Curve curve;
  Window window;
  Decay decay;
  double factor;  // multiplies the value
  double start;
  double end;
  double offset;
  double span;
  double up;
  double gamma;
  int64_t period;
  int64_t count;
  int64_t table_begin;
};
static_assert(std::is_trivially_copyable<Segment>::value,
              "segments are copied to devices as bytes");

// (1 - cos(pi * part)) / 2, the rise of half a cosine, to about a unit in the last place also
// where it is close to zero: no cosine is subtracted from 1, nor the library's used, so that host
// and devices agree to the bit. The series of the cosine, in part ** 2, up to part = 1/2, and from
// there on mirrored.
FASTLR_HD double cosine_rise(double part) {
  double x = fabs(part);
  x -= 2.0 * floor(0.5 * x);
  if (x > 1.0) x = 2.0 - x;
  const bool mirrored = x > 0.5;
  if (mirrored) x = 1.0 - x;
  const double square = x * x;
  const double square_rest = fma(x, x, -square);
  // (-1) ** (k + 1) * pi ** (2 * k) / (2 * (2 * k)!) for k = 12 .. 2
  double sum = -0x1.838d8f4321800p-41;
  sum = fma(sum, square, 0x1.52ae4120fde27p-35);
  sum = fma(sum, square, -0x1.ef6e308d6d1c4p-30);
  sum = fma(sum, square, 0x1.2a0c591af8314p-24);
  sum = fma(sum, square, -0x1.20c62c2f2d7f5p-19);
  sum = fma(sum, square, 0x1.b6e24f44b128fp-15);
  sum = fma(sum, square, -0x1.f9d38a3763cc3p-11);
  sum = fma(sum, square, 0x1.a6d1f2a204a8cp-7);
  sum = fma(sum, square, -0x1.e1f506891babbp-4);
  sum = fma(sum, square, 0x1.55d3c7e3cbffap-1);
  sum = fma(sum, square, -0x1.03c1f081b5ac4p+1);
  // k = 1, whose coefficient is pi ** 2 / 4 in two parts.
  constexpr double kFirst = 0x1.3bd3cc9be45dep+1, kFirstRest = 0x1.692b71366cc04p-53;
  const double small = fma(square_rest, kFirst, square * fma(sum, square, kFirstRest));
  const double rise = fma(square, kFirst, small);
  return mirrored ? 1.0 - rise : rise;
}

// base ** exponent for base > 0 and exponent >= 0, by squaring. Numbers are kept as the sum of two,
// 106 bits, so that a result above 1e-290 is base ** exponent rounded once, or nearly: pow() of a
// device and of the host differ in the last bits.
FASTLR_HD double integer_power(double base, int64_t exponent) {
  struct Sum {
    double high, low;
  };
  const auto product = [](Sum a, Sum b) {
    const double high = a.high * b.high;
    // Infinite, or so small that the rest is none that a double can hold.
    if (!(high <= 1.7976931348623157e308) || high < 1e-290) return Sum{high, 0.0};
    const double low = fma(a.high, b.low, fma(a.low, b.high, fma(a.high, b.high, -high)));
    const double sum = high + low;
    return Sum{sum, low - (sum - high)};
  };
  Sum result{1.0, 0.0}, power{base, 0.0};
  for (;;) {
    if (exponent % 2 != 0) result = product(result, power);
    exponent /= 2;
    if (exponent == 0) return result.high;
    power = product(power, power);
  }
}

FASTLR_HD double cycle_value(const Segment& s, double t) {
  const double rise = s.up / s.span;
  const double cycle = floor(1.0 + t / s.span);
  const double x = 1.0 + t / s.span - cycle;
  // A rise or fall of no length is a jump: then only the other branch is ever taken.
  const double w = x <= rise && rise > 0.0 ? x / rise : (x - 1.0) / (rise - 1.0);

  double height;
  switch (s.window) {
    case Window::kGeometric:
      height = s.start * pow(s.end / s.start, w) - s.start;
      break;
    case Window::kParabolic:
      height = (s.end - s.start) * (w * (2.0 - w));
      break;
    case Window::kSinusoidal:
      height = (s.end - s.start) * cosine_rise(w);
      break;
    default:
      height = (s.end - s.start) * w;
  }

  switch (s.decay) {
    case Decay::kHalving:
      // 2 ** -1100 is zero in double: larger cycles need no larger exponent, which would overflow
      // int.
      return s.start +
             height * ldexp(1.0, cycle - 1.0 < 1100.0 ? -static_cast<int>(cycle - 1.0) : -1100);
    case Decay::kHeight:
      return s.start + height * pow(s.gamma, t);
    case Decay::kBothBounds:
      return (s.start + height) * pow(s.gamma, t);
    default:
      return s.start + height * 1.0;
  }
}

FASTLR_HD double restarts_value(const Segment& s, int64_t t) {
  int64_t period = s.period;
  double length = static_cast<double>(period);
  if (s.count == 1) {
    t %= period;
  } else {
    while (t >= period) {
      t -= period;
      if (period > kEndless / s.count) {  // the next period outlasts every clock
        length = static_cast<double>(period) * static_cast<double>(s.count);
        break;
      }
      period *= s.count;
      length = static_cast<double>(period);
    }
  }
  return s.end + (s.start - s.end) * cosine_rise((length - static_cast<double>(t)) / length);
}

FASTLR_HD double segment_value(const Segment& s, const double* table, int64_t clock) {
  // Unsigned, as what is read from a later clock on has a negative origin. Where that passes the
  // last clock that 64 bits can hold, it stands still.
  const uint64_t since = static_cast<uint64_t>(clock) - static_cast<uint64_t>(s.origin);
  const uint64_t units = since / static_cast<uint64_t>(s.tick);
  int64_t local = units < kEndless ? static_cast<int64_t>(units) : kEndless - 1;
  if (local > s.limit) local = s.limit;
  const double t = static_cast<double>(local);
  double value = s.start;
  switch (s.curve) {
    case Curve::kConstant:
      break;
    case Curve::kLine: {
      const double part = s.span > 0.0 ? (t - s.offset) / s.span : 1.0;
      value = (s.end - s.start) * part + s.start;
      break;
    }
    case Curve::kCosine: {
      const double rest = s.span > 0.0 ? (s.span - (t - s.offset)) / s.span : 0.0;
      value = s.end + (s.start - s.end) * cosine_rise(rest);
      break;
    }
    case Curve::kRestarts:
      value = restarts_value(s, local);
      break;
    case Curve::kPolynomial:
      // Not 1 - t / span, whose error a power below 1 would magnify near the end.
      value = s.end + (s.start - s.end) * pow((s.offset + s.up * t) / s.span, s.gamma);
      break;
    case Curve::kTimeBased:
      value = s.start / (1.0 + s.gamma * t);
      break;
    case Curve::kExponential:
      // Zero stays zero, also where gamma > 1 has grown to infinity.
      if (s.start > 0.0) {
        value = s.start * integer_power(s.gamma, s.count + local / s.period);
      }
      break;
    case Curve::kCycle:
      value = cycle_value(s, t);
      break;
    case Curve::kTable:
      value = table[s.table_begin + local];
      break;
  }
  return value * s.factor;
}

// The schedule's value at a clock >= 0. `count` >= 1 segments, the first of which begins at or
// before 0.
FASTLR_HD double value_at(const Segment* segments, int64_t count, const double* table,
                          int64_t clock) {
  int64_t low = 0;
  int64_t high = count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (segments[middle].begin <= clock) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return segment_value(segments[low], table, clock);
}

}  // namespace fastlr

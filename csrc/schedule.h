// Learning-rate and momentum schedules as data: a schedule is a range of segments, sorted by
// `begin`, plus the values of its tables. Everything is evaluated in IEEE double, without
// contraction.
//
// The cyclic policies follow torch.optim.lr_scheduler.CyclicLR bit for bit (Smith, arXiv
// 1506.01186), one-cycle follows OneCycleLR, restarts follow CosineAnnealingWarmRestarts.
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
  kPolynomial,   // end + (start - end) * ((span - t) / span) ** gamma
  kTimeBased,    // start / (1 + gamma * t)
  kExponential,  // start * gamma ** (count + floor(t / period))
  kCycle,        // from start to end and back; `up` of `span` rises; see Window and Decay
  kTable,        // table[table_begin + t], t < count
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

constexpr double kPi = 3.14159265358979323846;

// cos(pi * t / length). On the host as PyTorch's schedulers write it; a GPU's cos(), unlike its
// cospi(), needs stack for arguments of any size. The two differ in the last bits.
FASTLR_HD double half_turn_cosine(double t, double length) {
#if defined(__CUDA_ARCH__)
  return cospi(t / length);
#else
  return cos(kPi * t / length);
#endif
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
      height = (s.end - s.start) * ((1.0 - half_turn_cosine(w, 1.0)) / 2.0);
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
  const double cosine = half_turn_cosine(static_cast<double>(t), length);
  return s.end + (s.start - s.end) * (1.0 + cosine) / 2.0;
}

FASTLR_HD double segment_value(const Segment& s, const double* table, int64_t clock) {
  int64_t local = (clock - s.origin) / s.tick;
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
      const double part = s.span > 0.0 ? (t - s.offset) / s.span : 1.0;
      value = s.end + (s.start - s.end) / 2.0 * (half_turn_cosine(part, 1.0) + 1.0);
      break;
    }
    case Curve::kRestarts:
      value = restarts_value(s, local);
      break;
    case Curve::kPolynomial:
      // Not 1 - t / span, whose error a power below 1 would magnify near the end.
      value = s.end + (s.start - s.end) * pow((s.span - t) / s.span, s.gamma);
      break;
    case Curve::kTimeBased:
      value = s.start / (1.0 + s.gamma * t);
      break;
    case Curve::kExponential:
      // Zero stays zero, also where gamma > 1 has grown to infinity.
      if (s.start > 0.0) {
        value = s.start * pow(s.gamma, static_cast<double>(s.count + local / s.period));
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

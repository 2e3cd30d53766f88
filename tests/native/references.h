// What every rule does to one element, straight from its formula: the oracle for csrc/rules/, of
// which nothing is used here, and for what step.h does around a rule. A new rule is one entry of
// references().
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "rule.h"

namespace fastlr {

// A group's options by name. "decoupled_weight_decay" may stand here for a rule that always is.
using Values = std::map<std::string, double>;

// Changes the parameter and its slots of state, of which those that are not live are any numbers.
template <typename C>
using Update = std::function<void(C& param, C grad, C* slot)>;

// What a slot holds, from which follows what it may be filled with.
enum class Holds {
  kAny,
  kSquares,  // what a root is taken of
  kMean      // its square is subtracted from that
};

struct SlotReference {
  const char* name;
  const char* option;  // without which, at zero, it is not live; nullptr: it always is
  Holds holds;
};

struct Reference {
  const char* rule;
  std::vector<SlotReference> slots;
  // The update of a parameter of this age: so many updates came before.
  Update<float> (*in_float)(const Values&, int64_t age);
  Update<double> (*in_double)(const Values&, int64_t age);
  std::vector<Values> options;  // to be tried

  Update<float> update(float, const Values& values, int64_t age) const {
    return in_float(values, age);
  }
  Update<double> update(double, const Values& values, int64_t age) const {
    return in_double(values, age);
  }
};

inline bool is_set(const Values& values, const char* option) {
  const auto found = values.find(option);
  return found != values.end() && found->second != 0;
}

inline bool is_live(const SlotReference& slot, const Values& values) {
  return slot.option == nullptr || is_set(values, slot.option);
}

// Whether an average is kept; a decay of 1, at which it would not move, says that none is.
inline bool keeps_average(const Values& values) { return values.at("ema_decay") < 1; }

// Of a half parameter.
inline uint32_t live_slots(const Reference& reference, const Values& values) {
  uint32_t live = keeps_average(values) ? 1u << kEmaSlot : 0u;
  if (is_set(values, "master_weights")) live |= 1u << kMasterSlot;
  for (size_t k = 0; k < reference.slots.size(); ++k)
    live |= is_live(reference.slots[k], values) ? 1u << k : 0u;
  return live;
}

// The rule's options in its own order.
inline Options in_order(const Rule& rule, const Values& values) {
  Options options{};
  for (int i = 0; i < rule.options; ++i) options.value[i] = values.at(rule.option[i].name);
  return options;
}

// The bits by which a number is rounded up or down: of splitmix64 and lowbias32.
inline uint32_t random_16(double seed, int32_t place, int64_t updates, int64_t element) {
  const auto wide = [](uint64_t x) {
    x ^= x >> 30, x *= 0xbf58476d1ce4e5b9;
    x ^= x >> 27, x *= 0x94d049bb133111eb;
    return x ^ (x >> 31);
  };
  const auto narrow = [](uint32_t x) {
    x ^= x >> 16, x *= 0x7feb352d;
    x ^= x >> 15, x *= 0x846ca68b;
    return x ^ (x >> 16);
  };
  uint64_t seed_bits;
  std::memcpy(&seed_bits, &seed, sizeof seed);
  const uint64_t key =
      wide(wide(wide(seed_bits) + static_cast<uint64_t>(updates)) + static_cast<uint64_t>(place));
  const uint32_t inner = narrow(static_cast<uint32_t>(element) + static_cast<uint32_t>(key));
  const uint32_t upper = static_cast<uint32_t>(element >> 32) * 0x9e3779b9;
  return narrow(inner + static_cast<uint32_t>(key >> 32) + upper) >> 16;
}

template <typename C>
C root(C x) {
  return std::sqrt(x);  // IEEE: rounded correctly
}

// torch.lerp, whose weight is the part of the way.
template <typename C>
C lerp(C start, C end, C weight) {
  return weight < C(0.5) ? std::fma(weight, end - start, start)
                         : std::fma(weight - C(1), end - start, end);
}

// A parameter's average after an update, before which there were so many.
template <typename C>
C averaged(const Values& o, int64_t updates, C average, C param) {
  double decay = o.at("ema_decay");
  const double t = static_cast<double>(updates);
  if (is_set(o, "ema_warmup")) decay = std::fmin(decay, (1 + t) / (10 + t));
  return lerp(average, param, static_cast<C>(1 - decay));
}

template <typename C>
Update<C> sgd(const Values& o, int64_t age) {
  const C neg_lr = -o.at("lr"), momentum = o.at("momentum"), of_gradient = 1 - o.at("dampening");
  const bool has_momentum = is_set(o, "momentum"), nesterov = is_set(o, "nesterov");
  return [=](C& p, C g, C* slot) {
    C direction = g;
    if (has_momentum) {
      C& buffer = slot[0];
      const C decayed = buffer * momentum;
      buffer = age == 0 ? g : std::fma(g, of_gradient, decayed);
      direction = nesterov ? std::fma(buffer, momentum, g) : buffer;
    }
    p = std::fma(direction, neg_lr, p);
  };
}

template <typename C>
Update<C> adam(const Values& o, int64_t age) {
  const double t = static_cast<double>(age + 1);
  const double correction1 = 1 - std::pow(o.at("beta1"), t);
  const double correction2 = 1 - std::pow(o.at("beta2"), t);
  const C to_gradient = 1 - o.at("beta1"), beta2 = o.at("beta2"), of_square = 1 - o.at("beta2");
  const C neg_step_size = -(o.at("lr") / correction1), of_root = std::sqrt(correction2);
  const C eps = o.at("eps");
  const bool amsgrad = is_set(o, "amsgrad");
  return [=](C& p, C g, C* slot) {
    slot[0] = lerp(slot[0], g, to_gradient);
    slot[1] = std::fma(of_square * g, g, slot[1] * beta2);
    if (amsgrad) slot[2] = std::fmax(slot[2], slot[1]);
    const C denominator = root(amsgrad ? slot[2] : slot[1]) / of_root + eps;
    p += neg_step_size * slot[0] / denominator;
  };
}

template <typename C>
Update<C> rmsprop(const Values& o, int64_t) {
  const C alpha = o.at("alpha"), rest = 1 - o.at("alpha"), neg_lr = -o.at("lr");
  const C momentum = o.at("momentum"), eps = o.at("eps");
  const bool has_momentum = is_set(o, "momentum"), centered = is_set(o, "centered");
  return [=](C& p, C g, C* slot) {
    slot[0] = std::fma(rest * g, g, slot[0] * alpha);
    if (centered) slot[2] = lerp(slot[2], g, rest);
    const C variance = centered ? std::fma(-slot[2], slot[2], slot[0]) : slot[0];
    const C denominator = root(variance) + eps;
    if (has_momentum) {
      slot[1] = slot[1] * momentum + g / denominator;
      p = std::fma(slot[1], neg_lr, p);
    } else {
      p += neg_lr * g / denominator;
    }
  };
}

template <typename C>
Update<C> adagrad(const Values& o, int64_t age) {
  const C neg_lr = -(o.at("lr") / (1 + static_cast<double>(age) * o.at("lr_decay")));
  const C eps = o.at("eps");
  return [=](C& p, C g, C* slot) {
    slot[0] = std::fma(g, g, slot[0]);
    p += neg_lr * g / (root(slot[0]) + eps);
  };
}

template <typename C>
Update<C> adadelta(const Values& o, int64_t) {
  const C rho = o.at("rho"), rest = 1 - o.at("rho"), eps = o.at("eps"), neg_lr = -o.at("lr");
  return [=](C& p, C g, C* slot) {
    slot[0] = std::fma(rest * g, g, slot[0] * rho);
    const C delta = root(slot[1] + eps) / root(slot[0] + eps) * g;
    slot[1] = std::fma(rest * delta, delta, slot[1] * rho);
    p = std::fma(delta, neg_lr, p);
  };
}

template <typename C>
Update<C> lion(const Values& o, int64_t) {
  const C beta1 = o.at("beta1"), rest1 = 1 - o.at("beta1"), beta2 = o.at("beta2");
  const C rest2 = 1 - o.at("beta2"), lr = o.at("lr");
  return [=](C& p, C g, C* slot) {
    const C direction = std::fma(rest1, g, slot[0] * beta1);
    if (direction != 0) p = direction > 0 ? p - lr : p + lr;
    slot[0] = std::fma(rest2, g, slot[0] * beta2);
  };
}

// What scaled gradients are clipped to element by element, 0: nothing.
template <typename C>
C bound_of(const Values& o, float inverse_scale) {
  return static_cast<C>(o.at("max_grad_value")) / static_cast<C>(inverse_scale);
}

// An infinity stays one where that is asked for.
template <typename C>
C clip_value(C g, C bound) {
  return bound == 0 || std::isnan(g) ? g : std::fmax(-bound, std::fmin(g, bound));
}

// The rule's update with what is done to gradient and parameter before it.
template <typename C>
Update<C> whole_update(const Reference& reference, const Values& o, int64_t age, double factor,
                       float inverse_scale) {
  const Update<C> update = reference.update(C{}, o, age);
  const bool maximize = is_set(o, "maximize"), decays = is_set(o, "weight_decay");
  const bool decoupled = is_set(o, "decoupled_weight_decay");
  const C weight_decay = o.at("weight_decay");
  const C shrinks = 1 - o.at("lr") * o.at("weight_decay");
  const bool cautious = is_set(o, "cautious");
  const C bound = bound_of<C>(o, inverse_scale);
  return [=](C& p, C g, C* slot) {
    g = clip_value(g, bound);
    if (factor != 1.0) g *= static_cast<C>(factor);
    if (maximize) g = -g;
    C moves_by = 0, untouched[kMaxRuleSlots];
    std::copy(slot, slot + kMaxRuleSlots, untouched);
    update(moves_by, g, untouched);
    const bool grows = moves_by != 0 && p != 0 && std::signbit(moves_by) == std::signbit(p);
    if (decays && decoupled && !(cautious && grows)) p *= shrinks;
    if (decays && !decoupled) g = std::fma(weight_decay, p, g);
    update(p, g, slot);
  };
}

// `eps` is large enough for its place to show. No option makes a NaN of the numbers that the slots
// are filled with: see Holds. Of a rule's options two out of three keep averages, and the last two
// have all other stages.
inline std::vector<Reference> references() {
  const auto named = [](const std::vector<const char*>& names,
                        const std::vector<std::vector<double>>& rows) {
    std::vector<Values> all;
    for (const std::vector<double>& row : rows) {
      all.emplace_back();
      for (size_t i = 0; i < names.size(); ++i) all.back()[names[i]] = row.at(i);
      const size_t kind = (all.size() - 1) % 3;
      all.back()["ema_decay"] = std::vector<double>{1.0, 0.3, 0.9}[kind];
      all.back()["ema_warmup"] = kind == 2 ? 1 : 0;
      for (const char* stage :
           {"max_grad_value", "cautious", "master_weights", "stochastic_rounding", "rounding_seed"})
        all.back()[stage] = 0;
    }
    Values master = all.front(), by_chance = all.back();
    master["master_weights"] = 1;
    master["max_grad_value"] = 0.5;
    master["ema_decay"] = 0.9;
    by_chance["stochastic_rounding"] = 1;
    by_chance["rounding_seed"] = 3;
    by_chance["max_grad_value"] = 0.7;
    by_chance["weight_decay"] = 0.2;
    by_chance["cautious"] = is_set(by_chance, "decoupled_weight_decay");
    by_chance["ema_decay"] = 1.0;
    all.push_back(master);
    all.push_back(by_chance);
    return all;
  };
  return {
      {"sgd",
       {{"momentum_buffer", "momentum", Holds::kAny}},
       sgd<float>,
       sgd<double>,
       named({"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize",
              "decoupled_weight_decay"},
             {{0.1, 0.0, 0.0, 0.01, 0, 0, 0},
              {0.03, 0.9, 0.0, 0.0, 0, 0, 0},
              {0.01, 0.9, 0.0, 5e-4, 1, 0, 0},
              {0.03, 0.9, 0.1, 5e-4, 0, 1, 0},
              {0.01, 0.5, 0.5, 0.0, 0, 0, 0},
              {0.01, 0.5, 0.0, 0.1, 1, 1, 0},
              {0.1, 0.0, 0.0, 0.0, 0, 0, 1}})},
      {"adam",
       {{"exp_avg", nullptr, Holds::kAny},
        {"exp_avg_sq", nullptr, Holds::kSquares},
        {"max_exp_avg_sq", "amsgrad", Holds::kSquares}},
       adam<float>,
       adam<double>,
       named({"lr", "beta1", "beta2", "weight_decay", "eps", "amsgrad", "maximize",
              "decoupled_weight_decay"},
             {{0.01, 0.9, 0.99, 0.0, 1e-3, 0, 0, 0},
              {0.02, 0.9, 0.999, 0.1, 1e-3, 0, 0, 1},
              {0.01, 0.3, 0.9, 0.01, 1e-2, 1, 1, 0},
              {0.01, 0.0, 0.9, 0.0, 1e-3, 1, 0, 0},
              {0.03, 0.5, 0.95, 0.2, 1e-2, 1, 1, 1}})},
      {"rmsprop",
       {{"square_avg", nullptr, Holds::kSquares},
        {"momentum_buffer", "momentum", Holds::kAny},
        {"grad_avg", "centered", Holds::kMean}},
       rmsprop<float>,
       rmsprop<double>,
       named({"lr", "alpha", "momentum", "weight_decay", "eps", "centered", "maximize"},
             {{0.01, 0.99, 0.0, 0.0, 1e-3, 0, 0},
              {0.01, 0.9, 0.9, 0.0, 1e-3, 0, 0},
              {0.02, 0.95, 0.0, 0.01, 1e-2, 1, 0},
              {0.01, 0.9, 0.5, 0.1, 1e-3, 1, 1}})},
      {"adagrad",
       {{"sum", nullptr, Holds::kSquares}},
       adagrad<float>,
       adagrad<double>,
       named({"lr", "weight_decay", "lr_decay", "initial_accumulator_value", "eps", "maximize"},
             {{0.01, 0.0, 0.0, 0.0, 1e-3, 0},
              {0.03, 0.01, 0.1, 0.0, 1e-2, 1},
              {0.01, 0.0, 0.01, 0.5, 1e-3, 1}})},
      {"adadelta",
       {{"square_avg", nullptr, Holds::kSquares}, {"acc_delta", nullptr, Holds::kSquares}},
       adadelta<float>,
       adadelta<double>,
       named({"lr", "rho", "weight_decay", "eps", "maximize"},
             {{1.0, 0.9, 0.0, 1e-3, 0}, {0.5, 0.95, 0.01, 1e-2, 1}, {0.1, 0.8, 0.0, 1e-6, 1}})},
      {"lion",
       {{"exp_avg", nullptr, Holds::kAny}},
       lion<float>,
       lion<double>,
       named({"lr", "beta1", "beta2", "weight_decay", "maximize", "decoupled_weight_decay"},
             {{0.01, 0.9, 0.99, 0.0, 0, 1}, {0.03, 0.5, 0.9, 0.1, 1, 1}})},
  };
}

}  // namespace fastlr

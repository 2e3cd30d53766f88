// Runs the native CPU code, built with sanitizers, and compares it with plain scalar references.
//   driver --levels          prints the SIMD levels that this machine can run
//   driver LEVEL openmp      everything; steps run in OpenMP's threads, as in the extension
//   driver LEVEL std         steps only, each share in a std::thread, which ThreadSanitizer
//                            understands (it reports false races between OpenMP's)
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <thread>
#include <vector>

#include "cases.h"
#include "cpu/step_cpu.h"
#include "half_formats.h"
#include "rules.h"
#include "squares.h"

using namespace fastlr;

namespace {

#define FASTLR_ONE(rule) +1
constexpr size_t kRules = 0 FASTLR_FOR_EACH_RULE(FASTLR_ONE);
#undef FASTLR_ONE

template <typename Half, typename Convert>
void check_conversion(const HalfFormat& format, Convert convert) {
  const auto check = [&](float x) {
    const uint16_t expected = format.encode(x), found = convert(x).bits;
    CHECK(found == expected, "%a became %x, not %x", x, found, expected);
  };
  for (int bits = 0; bits <= 0xffff; ++bits) {
    const float value = to_float(Half{static_cast<uint16_t>(bits)});
    if (format.is_nan(static_cast<uint16_t>(bits))) {
      CHECK(std::isnan(value) && format.is_nan(convert(value).bits), "%x", bits);
      continue;
    }
    const double exact = format.decode(static_cast<uint16_t>(bits));
    CHECK(value == exact && std::signbit(value) == std::signbit(exact), "%x is %a", bits, value);
    check(value);
    if (std::isinf(value)) continue;
    const float tie = std::copysign(format.tie_above(bits & 0x7fff), value);
    check(tie);
    check(std::nextafterf(tie, 0.0f));
    check(std::nextafterf(tie, std::copysign(INFINITY, tie)));
  }
  std::mt19937 random(1);
  for (int i = 0; i < 200000; ++i) {
    const float x = bits_float(random());
    if (!std::isnan(x)) check(x);
  }
}

// As step_cpu and measured_step_cpu, with each share in a thread of its own. sums: of each chunk's
// squares, or empty.
void step_std(const HostStep& step, int threads, std::vector<double>& sums) {
  int64_t total = 0, chunks = 0;
  std::vector<int64_t> first_chunks;
  for (const TensorRef& tensor : step.tensors) {
    total += tensor.numel;
    first_chunks.push_back(chunks);
    chunks += chunks_of(tensor.numel);
  }
  ChunkKernel kernel = nullptr;
  for (const SimdLevel& level : usable_simd_levels())
    if (std::strcmp(level.name, simd_level()) == 0) kernel = level.kernels[step.rule.index];
  std::vector<std::thread> running;
  for (int part = 0; part < threads; ++part) {
    running.emplace_back([&, part] {
      for_each_chunk(step.tensors, total, part, threads, kChunkElements, [&](const Chunk& share) {
        const TensorRef& tensor = step.tensors[share.tensor];
        const StridedLayout* layout = tensor.layout < 0 ? nullptr : &step.layouts[tensor.layout];
        const AnyScalars& scalars = step.scalars[step.scalars_of[share.tensor]];
        for (int64_t begin = share.begin; begin < share.end; begin += kChunkElements) {
          const int64_t end = std::min(begin + kChunkElements, share.end);
          double lanes[kLanes] = {};
          kernel(tensor, layout, scalars, step.stages_of(tensor), begin, end,
                 sums.empty() ? nullptr : lanes);
          if (sums.empty()) continue;
          sums[first_chunks[share.tensor] + begin / kChunkElements] =
              sum_of_lanes(lanes, end - begin);
        }
      });
    });
  }
  for (std::thread& thread : running) thread.join();
}

// Tensors of each storage type, geometry and set of options.
Cases make_cases(const Reference& reference, const std::vector<Geometry>& geometries,
                 std::mt19937& random) {
  Cases cases;
  const int groups = static_cast<int>(reference.options.size());
  for_each_pair([&](StorageType type, StorageType state_type, auto p, auto m) {
    using Typed = TypedCase<decltype(p), decltype(m)>;
    for (const Geometry& geometry : geometries) {
      for (int group = 0; group < groups; ++group) {
        if (elements(geometry) > 5000 && group % 2 == 1) continue;  // to save time
        const bool in_place = geometry.strides.empty() && group == groups - 1;
        const Leads leads = Leads::same(static_cast<int64_t>(random() % 8));
        cases.push_back(std::make_unique<Typed>(reference, geometry, type, state_type, in_place,
                                                leads, random));
        cases.back()->group = group;
        cases.back()->age = std::vector<int64_t>{0, 0, 1, 40}[random() % 4];
      }
    }
  });
  return cases;
}

// Steps with so many threads each, of which every other one measures the gradients.
void check_steps(const Reference& reference, const std::vector<Geometry>& geometries,
                 const std::vector<int>& steps, bool openmp) {
  const Rule* const rule = find_rule(reference.rule);
  CHECK(rule != nullptr, "%s", reference.rule);
  std::mt19937 random(2);
  const Cases cases = make_cases(reference, geometries, random);
  bool measures = false;
  for (const int threads : steps) {
    measures = !measures;
    const float inverse_scale = threads == 1 ? 0.125f : 1.0f;
    std::vector<TensorRef> tensors;
    std::vector<StridedLayout> layouts;
    std::vector<AnyScalars> scalars;
    std::vector<int32_t> scalars_of;
    std::map<std::pair<int, int64_t>, int32_t> formed;  // by group and age
    for (const auto& c : cases) {
      const Values& options = reference.options[static_cast<size_t>(c->group)];
      tensors.push_back(c->ref(live_slots(reference, options), options, layouts));
      bring_to_scale(tensors.back(), inverse_scale);
      const auto [at, is_new] =
          formed.try_emplace({c->group, c->age}, static_cast<int32_t>(scalars.size()));
      if (is_new) {
        scalars.emplace_back();
        rule->scalars(in_order(*rule, options), c->age, {inverse_scale, inverse_scale},
                      scalars.back());
      }
      scalars_of.push_back(at->second);
    }
    const int64_t updates = threads;  // before this one: any number
    std::vector<GroupStages> stages;
    for (const Values& options : reference.options) {
      const Options ordered = in_order(*rule, options);
      stages.push_back(group_stages(ordered.value + rule->rule_options, updates));
    }
    const HostStep step{*rule, tensors, layouts, scalars, scalars_of, stages};
    std::vector<double> sums;
    for (const auto& c : cases) {
      const Values& options = reference.options[static_cast<size_t>(c->group)];
      c->append_squares(options, inverse_scale, false, sums);
    }
    const double expected = sum_in_lanes(sums);
    double found = expected;
    if (!openmp) {
      std::vector<double> sums_found(measures ? sums.size() : 0);
      step_std(step, threads, sums_found);
      if (measures) found = sum_in_lanes(sums_found);
    } else if (measures) {
      CHECK(squared_norm_cpu(tensors, layouts, threads) == expected, "%d threads", threads);
      ChunkSums memory(tensors);
      found = measured_step_cpu(step, threads, false, memory);
    } else {
      step_cpu(step, threads, false);
    }
    CHECK(found == expected, "%d threads: %a, not %a", threads, found, expected);
    for (const auto& c : cases) {
      c->expect_update(reference.options[static_cast<size_t>(c->group)], inverse_scale,
                       inverse_scale, updates);
      c->check();
    }
  }
}

// Where elements lie matters to all rules alike: one of them takes all geometries, each number of
// threads with and without measuring.
void check_rules(bool openmp) {
  const std::vector<Reference> all = references();
  CHECK(all.size() == kRules, "%zu references for %zu rules", all.size(), kRules);
  for (size_t i = 0; i < all.size(); ++i) {
    if (i == 0) {
      check_steps(all[i], geometries(), {2, 1, 7, 2, 1, 7}, openmp);
    } else {
      check_steps(all[i], few_geometries(), {7, 1}, openmp);
    }
  }
}

void check_chunks() {
  std::mt19937 random(3);
  const std::vector<int64_t> sizes{0, 1, 7, 63, 64, 65, 511, 512, 513, 5000};
  for (int round = 0; round < 300; ++round) {
    std::vector<TensorRef> tensors(random() % 20);
    int64_t total = 0;
    for (TensorRef& tensor : tensors) total += tensor.numel = sizes[random() % sizes.size()];
    const int64_t grain = round % 2 == 0 ? 64 : 500;
    for (const int parts : {1, 2, 3, 7, 64, 1000}) {
      int64_t tensor = 0, element = 0;  // where the next chunk must begin: shares come in order
      for (int part = 0; part < parts; ++part) {
        for_each_chunk(tensors, total, part, parts, grain, [&](const Chunk& chunk) {
          while (tensor < chunk.tensor) {
            CHECK(element == tensors[tensor].numel, "tensor %ld left at %ld", long(tensor),
                  long(element));
            ++tensor, element = 0;
          }
          CHECK(chunk.tensor == tensor && chunk.begin == element && chunk.end > element &&
                    chunk.end <= tensors[tensor].numel,
                "%d parts, part %d: chunk %ld..%ld", parts, part, long(chunk.begin),
                long(chunk.end));
          CHECK(chunk.begin % grain == 0, "%ld", long(chunk.begin));
          element = chunk.end;
        });
      }
      int64_t missing = -element;
      for (size_t i = tensor; i < tensors.size(); ++i) missing += tensors[i].numel;
      CHECK(missing == 0, "%ld elements in no chunk", long(missing));
    }
  }
}

void check_schedules() {
  std::vector<int64_t> clocks{0, 1};
  for (int k = 1; k <= 62; ++k)
    for (const int64_t near : {-1, 0, 1}) clocks.push_back((int64_t{1} << k) + near);
  const double table[] = {0.5, 0.25, 0.125};
  for (int curve = 0; curve <= static_cast<int>(Curve::kTable); ++curve) {
    for (int shape = 0; shape < 16; ++shape) {
      for (const double span : {1.0, 3.0, 4000.0, 0x1p53}) {
        Segment s{};
        s.curve = static_cast<Curve>(curve);
        s.window = static_cast<Window>(shape % 4);
        s.decay = static_cast<Decay>(shape / 4);
        s.tick = shape % 3 == 0 ? 391 : 1;
        s.factor = s.start = 1.0;
        s.end = 0.5;
        s.span = span;
        s.up = shape % 2 == 0 ? span / 2 : span;
        s.gamma = 0.999;
        s.period = std::max<int64_t>(static_cast<int64_t>(span), 1);
        s.count = 1 + shape;
        s.limit = kEndless;
        if (s.curve == Curve::kPolynomial || s.curve == Curve::kLine || s.curve == Curve::kCosine)
          s.limit = s.period;
        if (s.curve == Curve::kTable) s.limit = 2;
        if (s.curve == Curve::kPolynomial) {
          s.offset = span;
          s.up = -1.0;
        }
        Segment later = s;
        later.begin = later.origin = int64_t{1} << 40;
        const Segment both[] = {s, later};
        for (const int64_t clock : clocks) {
          const double value = value_at(both, 2, table, clock);
          CHECK(value >= 0.0 && value <= 1.0, "curve %d, shape %d, span %g, clock %ld: %g", curve,
                shape, span, long(clock), value);
          const Segment& used = clock < later.begin ? s : later;
          const int64_t local = std::min((clock - used.origin) / s.tick, s.limit);
          double expected = value;
          if (s.curve == Curve::kConstant) expected = 1.0;
          if (s.curve == Curve::kTable) expected = table[local];
          if (s.curve == Curve::kLine) expected = 1.0 - 0.5 * (static_cast<double>(local) / span);
          CHECK(std::fabs(value - expected) < 1e-15, "%g, not %g", value, expected);
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--levels") == 0) {
    for (const SimdLevel& level : usable_simd_levels()) std::printf("%s\n", level.name);
    return 0;
  }
  CHECK(argc == 3, "driver LEVEL openmp|std");
  set_simd_level(argv[1]);
  const bool openmp = std::strcmp(argv[2], "openmp") == 0;
  if (openmp) {
    CHECK(openmp_runtime() != nullptr, "steps would run in one thread");
    check_conversion<Float16>(kFloat16Format, to_float16);
    check_conversion<BFloat16>(kBFloat16Format, to_bfloat16);
    check_chunks();
    check_schedules();
  }
  check_rules(openmp);
  std::printf("ok\n");
  return 0;
}

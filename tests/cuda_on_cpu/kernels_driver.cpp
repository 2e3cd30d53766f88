// Drives the CUDA launcher and its kernels over host memory and compares every byte that they may
// write with plain scalar references. Prints "ok", or the first difference.
//   kernels_driver [SCENARIO ...] [RULE ...]     all of each kind of which none is named
// Built for ThreadSanitizer it runs fewer cases: what threads share does not depend on the values.
#include <sys/mman.h>

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "driver_optimizer.h"

using namespace fastlr;

namespace {

#if defined(__SANITIZE_THREAD__)
constexpr bool kFew = true;
#else
constexpr bool kFew = false;
#endif

// Tensors that one launch takes: with 4 KB of arguments, and with 32.
constexpr int32_t kSmallLaunch = 480;
constexpr int32_t kLargeLaunch = 3900;

// Each device is one seed's: it keeps the number of blocks that was resident when it was preloaded.
constexpr int kDevices = kFew ? 2 : 5;

const std::vector<Reference> kReferences = references();

// How elements and threads are dealt out matters to all rules alike: the first takes all cases.
bool is_first(const Reference& reference) { return &reference == &kReferences.front(); }

// Those of the groups that tensors may be of which are such ones.
template <typename Is>
std::vector<int> groups_of_tensors(const Reference& reference, Is is) {
  const std::vector<Group> groups = make_groups(*find_rule(reference.rule), reference);
  std::vector<int> found;
  for (unsigned i = 0; i < kGroupsOfTensors; ++i) {
    if (is(groups[i])) found.push_back(static_cast<int>(i));
  }
  return found;
}
// Which all groups do that have more stages than averages.
bool clips_values(const Group& group) { return is_set(group.options, "max_grad_value"); }
bool rounds_by_chance(const Group& group) { return is_set(group.options, "stochastic_rounding"); }

// Makes tensors of random groups.
struct Maker {
  const Reference& reference;
  Cases& cases;
  std::mt19937& random;

  template <typename P, typename M>
  void add(const Geometry& geometry, StorageType type, StorageType state_type, const Leads& leads) {
    const bool in_place = geometry.strides.empty() && random() % 8 == 0;
    cases.push_back(std::make_unique<TypedCase<P, M>>(reference, geometry, type, state_type,
                                                      in_place, leads, random));
    cases.back()->group = static_cast<int>(random() % kGroupsOfTensors);
    // Most have missed no update of their group; others have, or were loaded.
    if (random() % 4 == 0) cases.back()->age = 1 + static_cast<int64_t>(random() % 40);
  }
};

// Where parameter, gradient and state start within 16 bytes. Of 8 x 8 x 8 combinations those in
// which a gradient is aligned with its parameter, or would be were the head counted otherwise.
template <typename P, typename M>
std::vector<Leads> misalignments() {
  constexpr int64_t kP = 16 / sizeof(P), kM = 16 / sizeof(M);
  std::vector<Leads> all;
  for (int64_t p = 0; p < kP; ++p) {
    for (int64_t g = 0; g < kP; ++g) {
      for (int64_t m = 0; m < kM; ++m) {
        const bool telling = (g == p || g == (kP - p) % kP || g == p + 1) &&
                             (m == p % kM || m == (p + 1) % kM || kM < kP);
        if (kP * kP * kM <= 64 || telling) all.push_back({p, g, {m, m, m, m, m}});
      }
    }
  }
  return all;
}

// Of each storage type all sizes, layouts and misalignments, or a few of them.
Cases make_cases(const Reference& reference, bool few, std::mt19937& random) {
  Cases cases;
  Maker maker{reference, cases, random};
  const auto lead = [&] { return static_cast<int64_t>(random() % 8); };
  for_each_pair([&](StorageType type, StorageType state_type, auto p, auto m) {
    using P = decltype(p);
    using M = decltype(m);
    const auto add = [&](const Geometry& geometry, const Leads& leads) {
      maker.add<P, M>(geometry, type, state_type, leads);
    };
    for (const int64_t n : {0, 1, 7, 8, 9, 16, 17, 33}) {
      const int64_t same = lead();
      add(flat(n), Leads::same(0));
      add(flat(n), Leads::same(same));
    }
    for (const int64_t near :
         {kChunkElements - 1, kChunkElements, kChunkElements + 1, 2 * kChunkElements + 3}) {
      if (few && (sizeof(P) == 2 || near == kChunkElements)) continue;
      if (!is_first(reference) && near != kChunkElements + 1) continue;
      const int64_t same = lead();
      add(flat(near), Leads::same(same));
      if (!few) add(flat(near), {lead(), lead(), {lead(), lead(), lead(), lead(), lead()}});
    }
    if (type == StorageType::kBFloat16) {  // what each of two chunks is rounded by
      add(flat(kChunkElements + 300), Leads::same(0));
      cases.back()->group = groups_of_tensors(reference, rounds_by_chance).front();
    }
    for (const Leads& leads : misalignments<P, M>())
      if (!few || random() % 16 == 0) add(flat(1 + static_cast<int64_t>(random() % 70)), leads);
    for (size_t k = 1; k < reference.slots.size(); ++k) {  // of one slot alone
      Leads leads = Leads::same(0);
      leads.slot[k] = 1;
      add(flat(33), leads);
    }
    for (int i = 0; i < 8; ++i) {  // of one of the stages' alone, of random groups
      Leads leads = Leads::same(0);
      leads.slot[i % 2 == 0 ? kEmaSlot : kMasterSlot] = 1;
      add(flat(33), leads);
    }
    for (const Geometry& geometry : geometries()) {
      if (geometry.strides.empty() ||
          (elements(geometry) > 1000 && (few || type != StorageType::kFloat32)))
        continue;
      add(geometry, {lead(), lead(), {lead(), lead(), lead(), lead(), lead()}});
    }
  });
  std::shuffle(cases.begin(), cases.end(), random);
  return cases;
}

// A few tensors of each storage type, dense and strided.
Cases some_cases(const Reference& reference, std::mt19937& random) {
  Cases cases;
  Maker maker{reference, cases, random};
  const Geometry strided{"gaps", {5, 7}, {{30, 3}, {1, 5}, {7, 1}}};
  for_each_pair([&](StorageType type, StorageType state_type, auto p, auto m) {
    for (const Geometry& geometry : {flat(40), strided, flat(3)})
      maker.add<decltype(p), decltype(m)>(geometry, type, state_type, Leads::same(1));
  });
  maker.add<float, float>(flat(kChunkElements + 5), StorageType::kFloat32, StorageType::kFloat32,
                          Leads::same(0));
  return cases;
}

// Those of the groups that have averages, or no stage at all.
std::vector<int> groups_with(const Reference& reference, bool averages) {
  return groups_of_tensors(reference, [&](const Group& group) {
    const bool has_average = is_live(group.slots(reference), kEmaSlot);
    return averages ? has_average : !has_average && !clips_values(group);
  });
}

// `count` tensors of one storage type, with averages or without any stage. Most are empty, as these
// cost no time; those beside the boundaries of launches are not.
template <typename P, typename M>
void add_many(const Reference& reference, Cases& cases, size_t count, StorageType type,
              StorageType state_type, bool averages, std::mt19937& random) {
  Maker maker{reference, cases, random};
  const size_t capacity = static_cast<size_t>(cuda::launch_capacity(averages));
  const std::vector<int> groups = groups_with(reference, averages);
  for (size_t i = 0; i < count; ++i) {
    const size_t at = i % capacity;
    const bool beside = at <= 1 || at + 2 >= capacity || i + 2 >= count;
    const int64_t n = beside ? 5 : random() % 50 == 0 ? 40 : 0;
    maker.add<P, M>(flat(n), type, state_type, Leads::same(0));
    cases.back()->group = groups[random() % groups.size()];
  }
}

void preload_all(const std::vector<const Reference*>& rules) {
  emulator::set_device_count(kDevices);
  for (int device = 0; device < kDevices; ++device) {
    emulator::set_seed(static_cast<uint64_t>(device));
    for (const Reference* reference : rules) {
      for (const bool averages : {false, true})
        cuda::preload(device, *find_rule(reference->rule), averages);
    }
  }
}

// Everything is captured before any kernel has run: what is loaded then could not be captured.
void check_capture(const Reference& reference) {
  std::mt19937 random(1);
  Cases cases = some_cases(reference, random);
  const auto captured = [](const std::function<void()>& function) {
    emulator::begin_capture(kStream);
    CHECK(cuda::is_capturing(0, kStream), "while it is");
    function();
    const int64_t graph = emulator::end_capture(kStream);
    CHECK(!cuda::is_capturing(0, kStream), "after it was");
    return graph;
  };
  // Enough for kernels with large arguments.
  for_each_pair([&](StorageType type, StorageType state_type, auto p, auto m) {
    if (!is_first(reference) && type != StorageType::kFloat32) return;
    add_many<decltype(p), decltype(m)>(reference, cases, kSmallLaunch + 10, type, state_type, false,
                                       random);
  });
  Optimizer large(0, reference, std::move(cases)),
      small(0, reference, some_cases(reference, random));
  for (Optimizer* optimizer : {&large, &small}) {
    optimizer->with_scaler(true);
    optimizer->measure_norm(true);
    const int64_t clock = captured([&] { optimizer->evaluate(); });
    const int64_t samples = captured([&] { optimizer->launch_clock(0, 64); });
    const int64_t step = captured([&] { optimizer->launch(); });
    CHECK(emulator::statistics().loads_in_capture == 0, "%" PRId64 " kernels",
          emulator::statistics().loads_in_capture);
    emulator::replay(clock);
    for (int i = 0; i < (kFew ? 3 : 5); ++i) {
      optimizer->set_amp(i == 1 ? 1.0f : 0.0f, i == 2 ? 4.0f : 1.0f);
      emulator::replay(step);
      optimizer->expect_step();
      optimizer->check();
      emulator::replay(samples);
      optimizer->expect_clock(0, 64);
    }
    const int64_t clipping = captured([&] {
      optimizer->clip_norm(1.5);
      optimizer->launch();
    });
    CHECK(emulator::statistics().loads_in_capture == 0, "%" PRId64 " kernels",
          emulator::statistics().loads_in_capture);
    emulator::replay(clipping);
    optimizer->expect_step();
    optimizer->check();
    emulator::destroy(clipping);
    optimizer->clip_norm(INFINITY);
    optimizer->measure_norm(false);
    optimizer->step();  // from the host again
    for (const int64_t graph : {clock, samples, step}) emulator::destroy(graph);
  }
}

// All kinds of tensors and groups, through steps that are skipped and steps that are not.
void check_steps(const Reference& reference) {
  const bool first = is_first(reference);
  if (kFew && !first) return;  // captures have shown what the threads share
  unsigned most_blocks = 0;
  for (int device = 0; device < (first ? kDevices : 1); ++device) {
    std::mt19937 random(static_cast<unsigned>(device));
    const bool few = kFew || device != 0 || !first;
    Optimizer optimizer(device, reference, make_cases(reference, few, random));
    // Of the devices some get blocks as many as are resident, and the others do not.
    emulator::set_seed(static_cast<uint64_t>(device % 2 ? device : 100 + device));
    optimizer.evaluate();
    optimizer.measure_norm(true);
    optimizer.with_scaler(true);
    optimizer.set_amp(1.0f, 8.0f);  // the first step is skipped
    optimizer.step();
    optimizer.set_amp(0.0f, 8.0f);
    optimizer.step();
    optimizer.clip_norm(2.5);
    optimizer.step();
    optimizer.with_scaler(false);
    optimizer.clip_norm(1e9);  // which is above it
    if (!kFew) optimizer.step();
    optimizer.clip_norm(INFINITY);
    optimizer.measure_norm(false);
    optimizer.step();
    optimizer.measure_norm(true);
    optimizer.launch_clock(0, 128);
    optimizer.expect_clock(0, 128);
    optimizer.with_scaler(true);
    optimizer.set_amp(0.0f, INFINITY);  // no usable inverse
    optimizer.step();
    optimizer.set_amp(NAN, 1.0f);
    optimizer.step();
    optimizer.launch_clock(0, 1);  // does not forget that the step was skipped
    optimizer.expect_clock(0, 1);
    optimizer.check();
    optimizer.set_amp(0.0f, 1.0f);
    if (!kFew) optimizer.step();
    optimizer.launch_clock(1, 0);  // a step without tensors
    optimizer.expect_clock(1, 0);
    optimizer.check();
    optimizer.set_amp(1.0f, 1.0f);
    optimizer.launch_clock(1, 200);  // the same, skipped
    optimizer.expect_clock(1, 200);
    optimizer.check();
    optimizer.set_amp(0.0f, 3.0f);
    optimizer.step();
    if (!kFew) optimizer.step();  // past the end of tables
    most_blocks = std::max(most_blocks, optimizer.most_blocks);
  }
  CHECK(most_blocks > 1, "no grid had several blocks");
}

void check_launches_in_order(const Reference& reference) {
  std::mt19937 random(3);
  Optimizer optimizer(1, reference, some_cases(reference, random), true);
  CHECK(optimizer.launches() == 22, "%zu", optimizer.launches());
  optimizer.evaluate();
  optimizer.measure_norm(true);
  for (const double limit : {double(INFINITY), 0.75, 1e9}) {
    optimizer.clip_norm(limit);
    optimizer.step();
  }
  for (const double value : {double(INFINITY), double(NAN)}) {
    const double before = optimizer.put_in_gradient(1, value);
    optimizer.step();
    optimizer.put_in_gradient(1, before);
    optimizer.step();
  }
}

// A step that looks for inf and NaN itself, for GradScaler, also among what is clipped by value.
void check_seeking(const Reference& reference) {
  std::mt19937 random(5);
  Cases cases = some_cases(reference, random);
  constexpr size_t kClipped = 4, kFree = 1;  // strided ones, which have gradients of their own
  cases[kClipped]->group = groups_of_tensors(reference, clips_values).front();
  cases[kFree]->group = 0;
  Optimizer optimizer(0, reference, std::move(cases));
  optimizer.evaluate();
  optimizer.with_scaler(true);
  optimizer.seek_inf(true);
  for (const double limit : {double(INFINITY), 0.75}) {
    optimizer.clip_norm(limit);
    for (const double value : {double(INFINITY), double(NAN)}) {
      for (const float scale : {8.0f, 0.0f}) {  // which has no usable inverse
        for (const size_t at : {kClipped, kFree}) {
          const double before = optimizer.put_in_gradient(at, value);
          optimizer.set_amp(0.0f, scale);
          optimizer.step();
          optimizer.put_in_gradient(at, before);
          optimizer.set_amp(0.0f, 8.0f);
          optimizer.step();
        }
      }
    }
    optimizer.set_amp(1.0f, 0.0f);
    optimizer.step();
    optimizer.set_amp(0.0f, 0.0f);
    optimizer.step();
  }
}

// Where one launch does not take all tensors.
void check_launch_boundaries(const Reference& reference) {
  struct Boundary {
    int driver, limit;
    size_t tensors, launches;
    bool averages = false;
  };
  const std::vector<Boundary> boundaries{
      {12000, 0, 480, 1}, {12000, 0, 481, 2},  {12000, 0, 961, 3},  {12010, 0, 480, 1},
      {12010, 0, 481, 1}, {12010, 0, 3900, 1}, {12010, 0, 3901, 2}, {12010, 5, 4, 1},
      {12010, 5, 5, 1},   {12010, 5, 6, 2},    {12010, 5, 23, 5},   {12010, 0, 481, 2, true},
  };
  std::mt19937 random(4);
  for (const Boundary& boundary : boundaries) {
    if (kFew && boundary.tensors != 481 && boundary.limit != 5) continue;
    emulator::set_driver_version(boundary.driver);
    cuda::limit_launch_capacity(boundary.limit);
    const bool large = boundary.driver >= 12010 && boundary.limit == 0 && !boundary.averages;
    const int32_t most = boundary.limit != 0 ? boundary.limit : large ? kLargeLaunch : kSmallLaunch;
    const int32_t capacity = cuda::launch_capacity(boundary.averages);
    CHECK(capacity == most, "%d", capacity);
    CHECK(cuda::launch_capacity(true) <= kSmallLaunch, "%d", cuda::launch_capacity(true));
    Cases cases;
    add_many<float, float>(reference, cases, boundary.tensors, StorageType::kFloat32,
                           StorageType::kFloat32, boundary.averages, random);
    Optimizer optimizer(static_cast<int>(boundary.tensors) % kDevices, reference, std::move(cases));
    CHECK(optimizer.launches() == boundary.launches, "%zu tensors take %zu launches",
          boundary.tensors, optimizer.launches());
    optimizer.evaluate();
    optimizer.measure_norm(true);
    optimizer.step();
    optimizer.clip_norm(0.5);
    optimizer.step();
  }
  emulator::set_driver_version(12010);
  cuda::limit_launch_capacity(0);

  // A device whose kernels were loaded under an old driver.
  emulator::set_device_count(kDevices + 1);
  emulator::set_driver_version(12000);
  Optimizer optimizer(kDevices, reference, some_cases(reference, random));
  optimizer.evaluate();
  optimizer.step();
  emulator::set_driver_version(12010);
}

// Address space of which only the last bytes are memory: the end of a tensor of 2**31 elements.
class Sparse {
 public:
  Sparse(int64_t elements, int64_t used) : bytes_(static_cast<size_t>(elements) * sizeof(float)) {
    memory_ = mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(memory_ != MAP_FAILED, "no address space for %zu bytes", bytes_);
    const uintptr_t first = reinterpret_cast<uintptr_t>(data() + elements - used) / 4096 * 4096;
    const size_t size = reinterpret_cast<uintptr_t>(data()) + bytes_ - first;
    CHECK(mprotect(reinterpret_cast<void*>(first), size, PROT_READ | PROT_WRITE) == 0, "mprotect");
  }
  ~Sparse() { munmap(memory_, bytes_); }
  float* data() { return static_cast<float*>(memory_); }

 private:
  size_t bytes_;
  void* memory_;
};

// The last chunks of a tensor of more than 2**31 elements: a launch whose tensor began before it.
void check_large_tensor(const Reference& reference) {
  const Rule& rule = *find_rule(reference.rule);
  constexpr int64_t kBefore = int64_t{1} << 31, kRest = 2 * kChunkElements + 7;
  Sparse p(kBefore + kRest, kRest), g(kBefore + kRest, kRest);
  for (const bool strided : {false, true}) {
    for (int64_t i = kBefore; i < kBefore + kRest; ++i) {
      p.data()[i] = static_cast<float>(i - kBefore);
      g.data()[i] = static_cast<float>(i % 5 + 1);
    }
    DeviceTensor tensor{};
    tensor.param = p.data();
    tensor.numel = kBefore + kRest;
    tensor.first_chunk = -kBefore / kChunkElements;
    tensor.first_square = tensor.first_chunk;
    tensor.layout = strided ? 0 : -1;
    StridedLayout layout{};
    layout.ndim = 2;
    layout.shape[0] = 1;
    layout.shape[1] = tensor.numel;
    layout.param[1] = layout.grad[1] = 1;
    DeviceGroup group{};
    group.options.value[0] = 0.5;  // the rate; without momentum
    GroupClock clock{};
    DeviceState state{};
    state.groups = 1;
    cuda::Launch launch{};
    launch.type = launch.state_type = StorageType::kFloat32;
    launch.strided = strided;
    double squares[3];
    launch.head.clocks = {&state, &group, &clock, nullptr};
    launch.head.tensors = &tensor;
    launch.head.layouts = &layout;
    launch.head.squares = squares;
    launch.head.step_chunks = 3;
    launch.head.chunks = 3;
    launch.head.count = 1;
    launch.head.ends_step = true;
    launch.grads = {g.data()};
    cuda::launch_clock(0, kStream, rule, launch.head.clocks, 0, 0, false);
    cuda::launch_step(0, kStream, rule, launch);
    CHECK(clock.updates == 1, "%" PRId64, clock.updates);
    double squared_norm = 0;  // of small integers, and so exact
    for (int64_t i = kBefore; i < kBefore + kRest; ++i) squared_norm += g.data()[i] * g.data()[i];
    CHECK(state.squared_norm == squared_norm, "%a, not %a", state.squared_norm, squared_norm);
    for (int64_t i = kBefore; i < kBefore + kRest; ++i) {
      const float expected = static_cast<float>(i - kBefore) - static_cast<float>(i % 5 + 1) / 2;
      CHECK(p.data()[i] == expected, "element %" PRId64 ": %a, not %a", i, double(p.data()[i]),
            double(expected));
    }
  }
}

struct Scenario {
  const char* name;
  void (*run)(const Reference& reference);
  bool of_all_rules;  // or of the first, where the rule makes no difference
};
// Captures come first; what takes long comes last.
const Scenario kScenarios[] = {
    {"capture", check_capture, true},     {"in-order", check_launches_in_order, false},
    {"large", check_large_tensor, false}, {"boundaries", check_launch_boundaries, false},
    {"steps", check_steps, true},         {"seeking", check_seeking, false}};

}  // namespace

int main(int argc, char** argv) {
  const auto is_named = [&](const char* name) {
    return std::find(argv + 1, argv + argc, std::string(name)) != argv + argc;
  };
  std::vector<const Reference*> rules;
  std::vector<Scenario> scenarios;
  for (const Reference& reference : kReferences)
    if (is_named(reference.rule)) rules.push_back(&reference);
  for (const Scenario& scenario : kScenarios)
    if (is_named(scenario.name)) scenarios.push_back(scenario);
  CHECK(rules.size() + scenarios.size() == static_cast<size_t>(argc - 1), "an unknown name");
  if (rules.empty())
    for (const Reference& reference : kReferences) rules.push_back(&reference);
  if (scenarios.empty()) scenarios.assign(std::begin(kScenarios), std::end(kScenarios));
  try {
    preload_all(rules);
    for (const Scenario& scenario : scenarios) {
      for (const Reference* reference : rules) {
        if (is_first(*reference) || scenario.of_all_rules) scenario.run(*reference);
      }
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("ok\n");
  return 0;
}

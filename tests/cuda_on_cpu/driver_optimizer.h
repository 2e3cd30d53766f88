// An optimizer on one emulated device, with what it must have done.
#pragma once

#include <cuda_runtime.h>

#include <cinttypes>
#include <memory>

#include "cuda/launches.h"
#include "cuda/step_cuda.h"
#include "driver_groups.h"
#include "emulator.h"
#include "native/cases.h"

namespace fastlr {

constexpr uintptr_t kStream = 0x1000;
// The most that the emulation ever has: of a persistent grid no block waits for another's end.
constexpr unsigned kMostResident = 6;

// Makes another device the current one, as PyTorch may have left it.
inline void leave_device(int device) {
  CHECK(cudaSetDevice(device == 0 ? 1 : 0) == cudaSuccess, "device %d", device);
}

// Memory of exactly this many values, filled with ones, as the device's tables are.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size) : bytes_(new char[size * sizeof(T)]), size_(size) {
    std::memset(bytes_.get(), 0xff, size * sizeof(T));
  }
  T* data() { return reinterpret_cast<T*>(bytes_.get()); }
  void upload(int device, const std::vector<T>& values) {
    CHECK(values.size() == size_, "%zu values for %zu", values.size(), size_);
    leave_device(device);
    cuda::upload(device, kStream, bytes_.get(), values.data(), size_ * sizeof(T));
    CHECK(emulator::statistics().last_copy_device == device, "not on device %d", device);
  }
  std::vector<T> download(int device) {
    std::vector<T> values(size_);
    leave_device(device);
    cuda::download(device, kStream, values.data(), bytes_.get(), size_ * sizeof(T));
    CHECK(emulator::statistics().last_copy_device == device, "not on device %d", device);
    return values;
  }

 private:
  std::unique_ptr<char[]> bytes_;
  size_t size_;
};

// An optimizer on one device, and what it must have done.
class Optimizer {
 public:
  Optimizer(int device, const Reference& reference, Cases cases, bool in_order = false)
      : device_(device),
        reference_(reference),
        rule_(*find_rule(reference.rule)),
        cases_(std::move(cases)),
        groups_(make_groups(rule_, reference_)) {
    cuda::preload(device_, rule_);
    cuda::preload(device_, rule_, true);
    cuda::preload_norm(device_);
    std::vector<TensorRef> tensors;
    std::vector<StridedLayout> layouts;
    std::vector<float> ages;
    ages_ = std::make_unique<DeviceArray<float>>(cases_.size());
    for (const auto& c : cases_) {
      const uint32_t slots = groups_[c->group].slots(reference_);
      tensors.push_back(c->ref(slots, groups_[c->group].options, layouts));
      if ((slots & kRuleSlots) != 0) tensors.back().step = ages_->data() + ages.size();
      ages.push_back(static_cast<float>(c->age));
    }
    ages_->upload(device_, ages);

    Launches cut = cut_into_launches(tensors, layouts, in_order);
    int64_t chunks = 0;
    for (const cuda::Launch& launch : cut.launches) chunks += launch.head.chunks;
    for (const TensorRef& tensor : tensors) {
      if (tensor.numel != 0) chunks -= (tensor.numel - 1) / kChunkElements + 1;
    }
    CHECK(chunks == 0, "%" PRId64 " chunks too many", chunks);
    find_leaders(cut);
    tensors_ = std::make_unique<DeviceArray<DeviceTensor>>(cut.tensors.size());
    tensors_->upload(device_, cut.tensors);
    layouts_ = std::make_unique<DeviceArray<StridedLayout>>(cut.layouts.size());
    layouts_->upload(device_, cut.layouts);
    squares_ = std::make_unique<DeviceArray<double>>(static_cast<size_t>(cut.chunks));
    launches_ = std::move(cut.launches);
    for (size_t i = 0; i < launches_.size(); ++i) {
      launches_[i].head.tensors = tensors_->data() + cut.firsts[i];
      launches_[i].head.layouts = layouts_->data();
      launches_[i].head.step_chunks = cut.chunks;
    }
    upload_groups();
  }

  size_t launches() const { return launches_.size(); }

  // Evaluates what the next update uses, as after a change of the clocks.
  void evaluate() { launch_clock(0, 0); }
  void launch_clock(int64_t updates, int64_t samples) {
    leave_device(device_);
    Clocks given = clocks();
    if (updates == 0) given.found_inf = nullptr;  // samples are consumed all the same
    cuda::launch_clock(device_, kStream, rule_, given, updates, samples, norm_measured_);
    CHECK(last_launch().grid[0] == 1, "clocks have one block");
  }

  void with_scaler(bool used) { scaler_used_ = used; }
  void set_amp(float found_inf, float scale) {
    found_inf_ = given_found_inf_ = found_inf;
    scale_ = scale;
  }

  void measure_norm(bool measured) { norm_measured_ = measured; }
  void clip_norm(double max_norm) { max_norm_ = max_norm; }  // infinity: not
  // set_amp() comes before each step then.
  void seek_inf(bool sought) { seeks_inf_ = sought; }

  double put_in_gradient(size_t index, double value) {
    return cases_[index]->put_in_gradient(value);
  }

  // Launches a step, or captures it.
  void launch() {
    for (cuda::Launch& launch : launches_) {
      launch.head.squares = norm_measured_ || norm_first() ? squares_->data() : nullptr;
      launch.head.max_norm = max_norm_;
      launch.head.seeks_inf = seeks_inf_;
      launch.head.clips = launch.head.norm_known = norm_first();
      launch.head.clocks = clocks();
      launch.head.grad_scale = scaler_used_ ? &scale_ : nullptr;
      if (!norm_first()) continue;
      leave_device(device_);
      cuda::launch_norm(device_, kStream, launch);
      check_grid(launch);
    }
    for (cuda::Launch& launch : launches_) {
      if (norm_first()) launch.head.squares = nullptr;
      leave_device(device_);
      cuda::launch_step(device_, kStream, rule_, launch);
      most_blocks = std::max(most_blocks, check_grid(launch));
    }
  }

  // What the step that was launched must have done.
  void expect_step() {
    const float inverse_scale = scaler_used_ ? static_cast<float>(1.0 / scale_) : 1.0f;
    const bool usable = std::isnormal(inverse_scale) && inverse_scale > 0;
    const bool found = scaler_used_ && given_found_inf_ != 0;
    const float known_scale = usable ? inverse_scale : 1.0f;
    norm_kept_ = norm_measured_ || norm_first();
    double squares = NAN;
    if (norm_kept_ && !found) {
      std::vector<double> sums;
      for (const auto& c : cases_)
        c->append_squares(groups_[c->group].now(), known_scale, seeks_inf_, sums);
      squares = sum_in_lanes(sums);
    }
    told_inf_ = seeks_inf_ && !found && !std::isfinite(squares);
    invalid_scale_ = invalid_scale_ || (!usable && !found && !told_inf_);
    squared_norm_ = usable ? squares * inverse_scale * inverse_scale : NAN;
    skipped_ = !usable || found || told_inf_;
    if (skipped_) return;
    double factor = inverse_scale;
    if (norm_first() && !std::isfinite(squared_norm_)) {
      skipped_ = nonfinite_ = true;
      return;
    }
    if (norm_first()) factor *= std::min(max_norm_ / (std::sqrt(squared_norm_) + 1e-6), 1.0);
    for (const auto& c : cases_) {
      const int64_t age = c->age;
      const Group& group = groups_[c->group];
      c->expect_update(group.now(), factor, known_scale, group.updates);
      if (c.get() == leaders_[c->group] && c->age != age) groups_[c->group].age = c->age;
    }
    for (Group& group : groups_) group.move(1, 0);
  }

  // What launch_clock() must have done.
  void expect_clock(int64_t updates, int64_t samples) {
    const bool skip = updates != 0 && scaler_used_ && found_inf_ != 0;
    if (updates != 0) {
      skipped_ = skip;
      squared_norm_ = skip ? NAN : 0.0;
      norm_kept_ = norm_measured_;
    }
    for (Group& group : groups_) group.move(skip ? 0 : updates, samples);
  }

  void check() {
    for (const auto& c : cases_) c->check();
    const std::vector<float> ages = ages_->download(device_);
    for (size_t i = 0; i < ages.size(); ++i)
      CHECK(ages[i] == static_cast<float>(cases_[i]->age), "age %zu is %g, not %" PRId64, i,
            double(ages[i]), cases_[i]->age);
    const DeviceState state = state_.download(device_)[0];
    CHECK(state.ticket == 0, "%u", state.ticket);
    CHECK(state.last_skipped == (skipped_ ? 1.0f : 0.0f), "%g", double(state.last_skipped));
    CHECK(state.invalid_scale == invalid_scale_, "%d", state.invalid_scale);
    CHECK(state.nonfinite == nonfinite_, "%d", state.nonfinite);
    const float told = told_inf_ ? 1.0f : given_found_inf_;
    CHECK(found_inf_ == told || std::isnan(told), "found_inf %g, not %g", double(found_inf_),
          double(told));
    CHECK(state.norm_measured == norm_kept_, "%d", state.norm_measured);
    CHECK(std::isnan(squared_norm_) ? std::isnan(state.squared_norm)
                                    : state.squared_norm == squared_norm_,
          "norm %a, not %a", state.squared_norm, squared_norm_);
    const std::vector<GroupClock> clocks = clocks_.download(device_);
    for (size_t i = 0; i < groups_.size(); ++i) {
      const Group& group = groups_[i];
      CHECK(clocks[i].updates == group.updates, "group %zu: %" PRId64 ", not %" PRId64, i,
            clocks[i].updates, group.updates);
      CHECK(clocks[i].samples == group.samples, "group %zu: %" PRId64 ", not %" PRId64, i,
            clocks[i].samples, group.samples);
      const auto& past_end = clocks[i].past_end;
      const auto is_set = [](bool past) { return past; };
      CHECK(std::any_of(std::begin(past_end), std::end(past_end), is_set) == group.past_end,
            "group %zu", i);
      check_next(clocks[i], group, i);
    }
  }

  // One step from the host's side.
  void step() {
    launch();
    expect_step();
    check();
  }

  unsigned most_blocks = 0;  // of a launch

 private:
  // Whether a step begins with a pass that measures the norm.
  bool norm_first() const { return seeks_inf_ || std::isfinite(max_norm_); }

  // One tensor of each group that has state.
  void find_leaders(const Launches& cut) {
    leaders_.assign(groups_.size(), nullptr);
    for (const DeviceTensor& tensor : cut.tensors) {
      if (tensor.leads_group == 0) continue;
      CHECK(tensor.age != nullptr && leaders_[tensor.group] == nullptr, "group %d", tensor.group);
      leaders_[tensor.group] = cases_[tensor.age - ages_->data()].get();
    }
    for (const auto& c : cases_) {
      const bool has_leader = leaders_[c->group] != nullptr;
      const uint32_t slots = groups_[c->group].slots(reference_) & kRuleSlots;
      CHECK(has_leader == (slots != 0), "group %d", c->group);
    }
  }

  // What the group's next update uses.
  void check_next(const GroupClock& clock, const Group& group, size_t index) const {
    const int64_t age = rule_.counts_steps ? group.age : std::min<int64_t>(group.age, 1);
    CHECK(clock.age == age, "group %zu: age %" PRId64 ", not %" PRId64, index, clock.age, age);
    const Options options = in_order(rule_, group.now());
    for (int k = 0; k < rule_.options; ++k) {
      CHECK(clock.options[k] == options[k], "group %zu: %s %a, not %a", index, rule_.option[k].name,
            clock.options[k], options[k]);
    }
  }

  // The blocks of the last launch.
  unsigned check_grid(const cuda::Launch& launch) const {
    const unsigned blocks = last_launch().grid[0];
    CHECK(blocks >= 1 && blocks <= std::max<int64_t>(launch.head.chunks, 1) &&
              blocks <= kMostResident,
          "%u blocks for %" PRId64 " chunks", blocks, launch.head.chunks);
    return blocks;
  }

  // The last that the emulation was asked for, which must have been on this device and stream.
  emulator::Launch last_launch() const {
    const emulator::Launch last = emulator::statistics().recent_launches.back();
    CHECK(last.device == device_ && last.stream == kStream, "device %d, stream %" PRIxPTR,
          last.device, last.stream);
    return last;
  }

  Clocks clocks() {
    return {state_.data(), entries_.data(), clocks_.data(), scaler_used_ ? &found_inf_ : nullptr};
  }

  void upload_groups() {
    std::vector<Segment> segments;
    std::vector<double> table;
    for (const Group& group : groups_) {
      for (const auto& [option, s] : group.driven) {
        segments.insert(segments.end(), s.segments.begin(), s.segments.end());
        table.insert(table.end(), s.table.begin(), s.table.end());
      }
    }
    segments_ = std::make_unique<DeviceArray<Segment>>(segments.size());
    segments_->upload(device_, segments);
    table_ = std::make_unique<DeviceArray<double>>(table.size());
    table_->upload(device_, table);

    const Segment* segment = segments_->data();
    const double* value = table_->data();
    const auto place = [&](const Scheduled& s) {
      const DeviceSchedule placed{segment, value, static_cast<int64_t>(s.segments.size()),
                                  s.start, s.end, s.in_samples};
      segment += s.segments.size();
      value += s.table.size();
      return placed;
    };
    std::vector<DeviceGroup> entries;
    std::vector<GroupClock> clocks;
    for (const Group& group : groups_) {
      DeviceGroup entry{in_order(rule_, group.options), {}};
      for (const auto& [option, schedule] : group.driven) {
        for (int k = 0; k < rule_.options; ++k) {
          if (option == rule_.option[k].name) entry.schedule[k] = place(schedule);
        }
      }
      entries.push_back(entry);
      GroupClock clock;
      std::memset(&clock, 0xff, sizeof clock);  // `next` comes from evaluate()
      clock.updates = group.updates;
      clock.samples = group.samples;
      clock.next_age = group.age;
      std::fill(std::begin(clock.past_end), std::end(clock.past_end), false);
      clocks.push_back(clock);
    }
    entries_.upload(device_, entries);
    clocks_.upload(device_, clocks);
    DeviceState state{};
    state.groups = static_cast<int32_t>(groups_.size());
    state_.upload(device_, {state});
  }

  int device_;
  const Reference& reference_;
  const Rule& rule_;
  Cases cases_;
  std::vector<Group> groups_;
  std::vector<const Case*> leaders_;  // of each group the one whose age is the group's
  std::vector<cuda::Launch> launches_;
  bool scaler_used_ = false;
  float found_inf_ = 0.0f, scale_ = 1.0f;
  float given_found_inf_ = 0.0f;  // found_inf_ before the device wrote it
  bool skipped_ = false, invalid_scale_ = false, nonfinite_ = false, told_inf_ = false;
  double max_norm_ = INFINITY;
  bool seeks_inf_ = false;
  bool norm_measured_ = false;  // of the steps to come ...
  bool norm_kept_ = false;      // ... and of the last one
  double squared_norm_ = 0.0;
  DeviceArray<DeviceState> state_{1};
  DeviceArray<DeviceGroup> entries_{groups_.size()};
  DeviceArray<GroupClock> clocks_{groups_.size()};
  std::unique_ptr<DeviceArray<float>> ages_;
  std::unique_ptr<DeviceArray<DeviceTensor>> tensors_;
  std::unique_ptr<DeviceArray<StridedLayout>> layouts_;
  std::unique_ptr<DeviceArray<double>> squares_;
  std::unique_ptr<DeviceArray<Segment>> segments_;
  std::unique_ptr<DeviceArray<double>> table_;
};

}  // namespace fastlr

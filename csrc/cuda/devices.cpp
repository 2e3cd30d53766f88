#include "devices.h"

#include <algorithm>
#include <iterator>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>

#include "../layout.h"
#include "../tensor_view.h"

namespace fastlr {
namespace {

// A number that GradScaler hands over, on the device of a step; nullptr for None.
class Scalar {
 public:
  Scalar(PyObject* runtime, PyObject* value, const char* name, int device) {
    if (value == Py_None) return;
    tensor_ = checked(PyObject_CallMethod(runtime, "on_device", "Oi", value, device));
    TensorReader reader;
    TensorView view;
    if (!reader.read(tensor_.get(), view)) throw PythonError();
    const int64_t numel = memory_order(view).numel;
    if (numel != 1) {
      throw std::invalid_argument(std::string(name) + " must be one number, got a tensor of " +
                                  std::to_string(numel));
    }
    data_ = static_cast<float*>(view.data);
  }

  float* data() const { return data_; }
  Owned tensor() const { return Owned::borrow(tensor_.get()); }

 private:
  Owned tensor_;
  float* data_ = nullptr;
};

std::vector<TensorRef> tensors_on(int device, const Gathering& gathering) {
  std::vector<TensorRef> tensors;
  for (size_t i = 0; i < gathering.sources().size(); ++i) {
    if (gathering.sources()[i].place == device) tensors.push_back(gathering.tensors()[i]);
  }
  return tensors;
}

}  // namespace

bool Devices::any() const {
  return std::any_of(plans_.begin(), plans_.end(),
                     [](const auto& entry) { return entry.second.ready(); });
}

bool Devices::knows(int device) const {
  const auto found = plans_.find(device);
  return found != plans_.end() && found->second.ready();
}

bool Devices::captured() const {
  return std::any_of(plans_.begin(), plans_.end(),
                     [](const auto& entry) { return entry.second.captured(); });
}

DevicePlan& Devices::plan(int device) { return plans_.try_emplace(device, rule_).first->second; }

// Calls visit(scope, device, plan) for each device. Only one scope is open at a time, as it makes
// its device the current one of two CUDA runtimes, PyTorch's and this extension's.
template <typename Visit>
void Devices::on_each_device(Visit visit) {
  for (auto& [device, device_plan] : plans_) {
    if (!device_plan.ready()) continue;
    const DeviceScope scope(runtime_, device);
    visit(scope, device, device_plan);
  }
}

bool Devices::step(const Gathering& gathering, PyObject* found_inf, PyObject* grad_scale,
                   bool with_host, bool in_order, bool measures_norm,
                   std::optional<NormPass> norm_pass, std::optional<double> factor,
                   int64_t samples) {
  ++moves_;
  for (auto it = plans_.begin(); it != plans_.end();) {
    it = it->second.ready() ? std::next(it) : plans_.erase(it);
  }
  const std::vector<Gathering::Source>& sources = gathering.sources();
  for (const Gathering::Source& source : sources) {
    if (source.place != kHost) plan(source.place);
  }
  size_t capturing = 0;
  std::optional<DeviceScope> scope;
  for (auto& [device, device_plan] : plans_) {
    if (!scope || plans_.size() > 1) scope.emplace(runtime_, device);
    capturing += scope->capturing();
    device_plan.set_groups(*scope, gathering.groups());
    device_plan.prepare(*scope, tensors_on(device, gathering), gathering.layouts(), in_order,
                        measures_norm, norm_pass);
  }
  if (capturing != 0 && (with_host || capturing != plans_.size())) {
    throw std::runtime_error(
        "this step updates tensors on several devices, of which only some are being captured in a "
        "CUDA graph; give what is not captured an optimizer of its own.");
  }
  for (auto& [device, device_plan] : plans_) {
    if (!scope || plans_.size() > 1) scope.emplace(runtime_, device);
    const Scalar inf(runtime_, found_inf, "found_inf", device);
    const Scalar scale(runtime_, grad_scale, "grad_scale", device);
    GraphObjects graph;
    if (scope->capturing()) {
      graph.add(inf.tensor());
      graph.add(scale.tensor());
      for (const Gathering::Source& source : sources) {
        if (source.place != device) continue;
        // Its memory alone: what hooks of the parameter refer to may refer to the graph.
        graph.add(checked(PyObject_CallMethod(source.parameter, "detach", nullptr)));
        for (PyObject* slot : source.slot) graph.add(Owned::borrow(slot));
        graph.add(Owned::borrow(source.step));
      }
    }
    device_plan.launch(*scope, inf.data(), scale.data(), factor, samples, std::move(graph));
  }
  const bool may_skip = found_inf != Py_None || grad_scale != Py_None || norm_pass;
  if (may_skip && !with_host) host_is_exact_ = false;
  return capturing != 0;
}

double Devices::measure(const Gathering& gathering, int share, std::optional<float> inverse_scale) {
  std::set<int> devices;
  for (const Gathering::Source& source : gathering.sources()) {
    if (source.place != kHost) devices.insert(source.place);
  }
  double sum = 0.0;
  for (const int device : devices) {
    DeviceNorm& norm = norms_.try_emplace(device, runtime_, device).first->second;
    std::vector<TensorRef> tensors;
    for (TensorRef& tensor : tensors_on(device, gathering)) {
      if (tensor.share != share) continue;
      tensors.push_back(tensor);
      TensorRef& measured = tensors.back();
      measured.share = 0;
      bring_to_scale(measured, inverse_scale);
    }
    sum += norm.measure(tensors, gathering.layouts());
  }
  return sum;
}

bool Devices::advance_samples(int64_t samples) {
  ++moves_;
  size_t capturing = 0;
  on_each_device([&](const DeviceScope& scope, int, DevicePlan& device_plan) {
    capturing += scope.capturing();
    device_plan.advance_samples(scope, samples);
  });
  return capturing == 0;
}

void Devices::agree(PyObject* param_groups) {
  ++moves_;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(param_groups); ++i) {
    const Clock clock = read_clock(PyList_GET_ITEM(param_groups, i));
    for (auto& entry : plans_) entry.second.agree(static_cast<size_t>(i), clock);
  }
}

void Devices::refuse_capture(const char* what) {
  on_each_device([&](const DeviceScope& scope, int, DevicePlan&) {
    if (!scope.capturing()) return;
    throw std::runtime_error(std::string(what) +
                             " writes to the device, which a CUDA graph cannot capture; do it "
                             "outside the capture.");
  });
}

void Devices::check(const std::vector<GroupReading>& groups) {
  on_each_device([&](const DeviceScope& scope, int, DevicePlan& device_plan) {
    scope.refuse_capture("a schedule, hyperparameter or clock has changed");
    device_plan.check_groups(groups);
  });
}

void Devices::push(const std::vector<GroupReading>& groups) {
  ++moves_;
  check(groups);
  on_each_device([&](const DeviceScope& scope, int, DevicePlan& device_plan) {
    device_plan.set_groups(scope, groups, true);
  });
  host_is_exact_ = true;
}

// Waits for every device. what: is asked of them, for messages.
std::vector<DevicePlan::Reading> Devices::read(const char* what, bool reset, bool others_run) {
  std::vector<DevicePlan::Reading> readings;
  on_each_device([&](const DeviceScope& scope, int device, DevicePlan& device_plan) {
    if (scope.capturing()) {
      throw std::runtime_error(
          std::string("reading ") + what + " of " +
          device_name({device < 0 ? dlpack::kCpu : dlpack::kCuda, device}) +
          " waits for the device, which a CUDA graph cannot capture; do it outside the capture.");
    }
    readings.push_back(device_plan.read(scope, reset, others_run));
  });
  return readings;
}

std::optional<double> Devices::squared_norm() {
  double sum = 0.0;
  for (const DevicePlan::Reading& reading : read("the gradients' norm", false, true)) {
    if (reading.state.norm_measured == 0) return std::nullopt;
    sum += reading.state.squared_norm;
  }
  return sum;
}

Owned Devices::last_skipped() const {
  for (const auto& entry : plans_) {  // they all skip the same steps
    if (entry.second.ready()) return entry.second.last_skipped(runtime_);
  }
  return Owned::borrow(Py_None);
}

bool Devices::sync(PyObject* param_groups, const Groups& groups, bool raises) {
  // What other threads have moved while this one waited would be moved back. After a few tries they
  // wait as well.
  constexpr int kTries = 3;
  std::vector<DevicePlan::Reading> readings;
  uint64_t before;
  int tries = 0;
  do {
    before = moves_;
    readings = read("the clock", true, ++tries < kTries);
  } while (moves_ != before);
  const std::vector<GroupClock>& clocks = readings.front().clocks;
  bool invalid_scale = false;
  bool nonfinite = false;
  for (const DevicePlan::Reading& reading : readings) {
    invalid_scale = invalid_scale || reading.state.invalid_scale != 0;
    nonfinite = nonfinite || reading.state.nonfinite != 0;
    for (size_t i = 0; i < clocks.size(); ++i) {
      if (reading.clocks[i].updates == clocks[i].updates &&
          reading.clocks[i].samples == clocks[i].samples) {
        continue;
      }
      throw std::runtime_error(
          "the devices of this optimizer have made different numbers of updates (" +
          std::to_string(clocks[i].updates) + " and " + std::to_string(reading.clocks[i].updates) +
          "), as after replaying a CUDA graph of one of them; replay the graphs of all of them.");
    }
  }
  for (size_t i = 0; i < clocks.size(); ++i) {
    groups.move_to(PyList_GET_ITEM(param_groups, static_cast<Py_ssize_t>(i)),
                   {clocks[i].updates, clocks[i].samples});
  }
  agree(param_groups);
  host_is_exact_ = true;
  constexpr int kFramesToCaller = 4;  // the warning itself, sync, the property or method
  for (size_t i = 0; i < clocks.size(); ++i) {
    const auto& past_end = clocks[i].past_end;
    if (std::none_of(std::begin(past_end), std::end(past_end), [](bool past) { return past; })) {
      continue;
    }
    groups.warn_past_end(PyList_GET_ITEM(param_groups, static_cast<Py_ssize_t>(i)),
                         kFramesToCaller);
  }
  if (invalid_scale) {
    throw std::invalid_argument(
        "grad_scale must be finite and > 0, and its inverse a float32; updates since the last "
        "sync() in which it was not were skipped.");
  }
  if (nonfinite && raises) {
    throw std::runtime_error(
        "the gradients' norm was inf or NaN; updates since the last sync() in which it was were "
        "skipped.");
  }
  return readings.front().state.last_skipped != 0.0f;
}

}  // namespace fastlr

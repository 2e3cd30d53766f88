#include "devices.h"

#include <algorithm>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_set>

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
    data_ = static_cast<const float*>(view.data);
  }

  const float* data() const { return data_; }
  Owned tensor() const { return Owned::borrow(tensor_.get()); }

 private:
  Owned tensor_;
  const float* data_ = nullptr;
};

// What a weak reference refers to, or nullptr; to be compared only.
PyObject* referent(const Owned& weak) {
#if PY_VERSION_HEX >= 0x030d0000
  PyObject* object = nullptr;
  if (PyWeakref_GetRef(weak.get(), &object) < 0) throw PythonError();
  return Owned(object).get();
#else
  PyObject* object = PyWeakref_GetObject(weak.get());
  return object == Py_None ? nullptr : object;
#endif
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

DevicePlan& Devices::plan(int device) { return plans_.try_emplace(device).first->second; }

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

template <typename Visit>
void Devices::for_each_flag(const Flags& flags, Visit visit) {
  const int32_t* const first = reinterpret_cast<const int32_t*>(flags.memory.data());
  for (const auto& [parameter, flag] : flag_of_) {
    if (flag.device != flags.device || flag.address < first ||
        flag.address >= first + flags.count) {
      continue;
    }
    visit(parameter, flag, static_cast<size_t>(flag.address - first));
  }
}

const Devices::Flags& Devices::flags_of(const Flag& flag) const {
  return *std::find_if(flags_.begin(), flags_.end(), [&](const Flags& flags) {
    const int32_t* const first = reinterpret_cast<const int32_t*>(flags.memory.data());
    return flag.address >= first && flag.address < first + flags.count;
  });
}

// Gives each item with momentum a flag that says whether its buffer holds anything yet.
void Devices::flag_momenta(const DeviceScope& scope, int device,
                           const std::vector<DeviceItem>& items) {
  std::vector<const DeviceItem*> without;
  for (const DeviceItem& item : items) {
    if (item.device != device || item.momentum == nullptr) continue;
    const auto found = flag_of_.find(item.parameter);
    const bool known = found != flag_of_.end() && found->second.device == device;
    if (known && referent(found->second.buffer) == item.momentum) continue;
    scope.refuse_capture("a parameter's momentum buffer is new: the first step allocates it");
    if (!known) {
      without.push_back(&item);
      continue;
    }
    const int32_t value = item.tensor.first ? 0 : 1;
    const Flags& flags = flags_of(found->second);
    const int32_t* const first = reinterpret_cast<const int32_t*>(flags.memory.data());
    flags.memory.write(scope, (found->second.address - first) * sizeof value, &value, sizeof value);
    found->second.buffer = checked(PyWeakref_NewRef(item.momentum, nullptr));
  }
  if (without.empty()) return;
  std::vector<int32_t> values;
  for (const DeviceItem* item : without) values.push_back(item->tensor.first ? 0 : 1);
  Table memory(scope, values.size() * sizeof(int32_t));
  memory.write(scope, 0, values.data(), values.size() * sizeof(int32_t));
  int32_t* address = reinterpret_cast<int32_t*>(memory.data());
  flags_.push_back({device, std::move(memory), values.size()});
  for (const DeviceItem* item : without) {
    flag_of_[item->parameter] = {device, address++,
                                 checked(PyWeakref_NewRef(item->momentum, nullptr))};
  }
}

bool Devices::step(const std::vector<DeviceItem>& items, const std::vector<StridedLayout>& layouts,
                   const std::vector<GroupReading>& groups, PyObject* found_inf,
                   PyObject* grad_scale, bool with_host, bool in_order, bool measures_norm,
                   int64_t samples) {
  ++moves_;
  for (auto it = plans_.begin(); it != plans_.end();) {
    it = it->second.ready() ? std::next(it) : plans_.erase(it);
  }
  for (const DeviceItem& item : items) plan(item.device);
  size_t capturing = 0;
  std::optional<DeviceScope> scope;
  for (auto& [device, device_plan] : plans_) {
    if (!scope || plans_.size() > 1) scope.emplace(runtime_, device);
    capturing += scope->capturing();
    device_plan.set_groups(*scope, rule_, groups);
    flag_momenta(*scope, device, items);
    for (Flags& flags : flags_) {
      if (flags.device == device) flags.memory.used_by(*scope);
    }
    std::vector<DeviceWork> work;
    for (const DeviceItem& item : items) {
      if (item.device != device) continue;
      work.push_back(
          {item.tensor, item.momentum == nullptr ? nullptr : flag_of_.at(item.parameter).address});
    }
    device_plan.prepare(*scope, work, layouts, in_order, measures_norm);
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
      for (const Flags& flags : flags_) graph.add(flags.memory);
      for (const DeviceItem& item : items) {
        if (item.device != device) continue;
        // Its memory alone: what hooks of the parameter refer to may refer to the graph.
        graph.add(checked(PyObject_CallMethod(item.parameter, "detach", nullptr)));
        if (item.momentum != nullptr) graph.add(Owned::borrow(item.momentum));
      }
    }
    device_plan.launch(*scope, inf.data(), scale.data(), samples, std::move(graph));
  }
  if ((found_inf != Py_None || grad_scale != Py_None) && !with_host) host_is_exact_ = false;
  return capturing != 0;
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
    device_plan.check_groups(rule_, groups);
  });
}

void Devices::push(const std::vector<GroupReading>& groups) {
  ++moves_;
  check(groups);
  on_each_device([&](const DeviceScope& scope, int, DevicePlan& device_plan) {
    device_plan.set_groups(scope, rule_, groups, true);
  });
  host_is_exact_ = true;
}

void Devices::load(const std::vector<GroupReading>& groups, PyObject* uninitialized) {
  ++moves_;
  std::unordered_set<PyObject*> empty;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(uninitialized); ++i) {
    empty.insert(PyList_GET_ITEM(uninitialized, i));
  }
  check(groups);
  on_each_device([&](const DeviceScope& scope, int device, DevicePlan& device_plan) {
    std::vector<std::vector<int32_t>> values(flags_.size());
    for (size_t k = 0; k < flags_.size(); ++k) {
      if (flags_[k].device != device) continue;
      values[k].assign(flags_[k].count, 1);
      for_each_flag(flags_[k], [&](PyObject* parameter, const Flag&, size_t i) {
        values[k][i] = empty.count(parameter) == 0;
      });
    }
    device_plan.set_groups(scope, rule_, groups, true);
    for (size_t k = 0; k < flags_.size(); ++k) {
      flags_[k].memory.write_at_once(scope, 0, values[k].data(),
                                     values[k].size() * sizeof(int32_t));
    }
  });
  host_is_exact_ = true;
}

// Waits for every device. what: is asked of them, for messages.
std::vector<DevicePlan::Reading> Devices::read(const char* what, bool reset_invalid_scale,
                                               bool others_run) {
  std::vector<DevicePlan::Reading> readings;
  on_each_device([&](const DeviceScope& scope, int device, DevicePlan& device_plan) {
    if (scope.capturing()) {
      throw std::runtime_error(
          std::string("reading ") + what + " of " +
          device_name({device < 0 ? dlpack::kCpu : dlpack::kCuda, device}) +
          " waits for the device, which a CUDA graph cannot capture; do it outside the capture.");
    }
    readings.push_back(device_plan.read(scope, reset_invalid_scale, others_run));
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

bool Devices::sync(PyObject* param_groups, const Groups& groups) {
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
  for (const DevicePlan::Reading& reading : readings) {
    invalid_scale = invalid_scale || reading.state.invalid_scale != 0;
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
    if (!clocks[i].past_end) continue;
    groups.warn_past_end(PyList_GET_ITEM(param_groups, static_cast<Py_ssize_t>(i)),
                         kFramesToCaller);
  }
  if (invalid_scale) {
    throw std::invalid_argument(
        "grad_scale must be finite and > 0, and its inverse a float32; updates since the last "
        "sync() in which it was not were skipped.");
  }
  return readings.front().state.last_skipped != 0;
}

PyObject* Devices::uninitialized() {
  Owned list = checked(PyList_New(0));
  on_each_device([&](const DeviceScope& scope, int device, DevicePlan&) {
    // By index: another thread may step meanwhile, and add flags.
    for (size_t at = 0; at < flags_.size(); ++at) {
      if (flags_[at].device != device) continue;
      std::vector<int32_t> values(flags_[at].count);
      download(scope, values.data(), flags_[at].memory.data(), values.size() * sizeof(int32_t),
               true);
      for_each_flag(flags_[at], [&](PyObject* parameter, const Flag& flag, size_t i) {
        if (values[i] != 0 || referent(flag.buffer) == nullptr) return;
        if (PyList_Append(list.get(), parameter) != 0) throw PythonError();
      });
    }
  });
  return list.release();
}

}  // namespace fastlr

#include "plan.h"

#include <algorithm>
#include <limits>
#include <map>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cpu/float_environment.h"
#include "squares.h"

namespace fastlr {
namespace {

bool is_on_host(const Gathering::Source& source) { return source.place == kHost; }

Options options_of(const std::vector<double>& values) {
  Options options{};
  std::copy(values.begin(), values.end(), options.value);
  return options;
}

}  // namespace

Plan::Plan(const Rule& rule, PyObject* runtime, NativeOf native_of,
           const Groups::OtherNames& other_names)
    : runtime_(Owned::borrow(runtime)),
      groups_(rule, native_of, other_names),
      gathering_(runtime, groups_)
#if defined(FASTLR_HAS_CUDA)
      ,
      devices_(runtime, rule)
#endif
{
}

void Plan::step(PyObject* param_groups, PyObject* state, const Settings& settings) {
  if (stepping_) {
    throw std::runtime_error(
        "step() is already running on this optimizer, in another thread or further up the stack");
  }
  struct Stepping {
    explicit Stepping(Plan& p) : plan(p) { plan.stepping_ = true; }
    ~Stepping() {
      plan.gathering_.clear();
      plan.stepping_ = false;
    }
    Plan& plan;
  } const stepping(*this);
  run(param_groups, state, settings);
}

// Whether the host itself updates tensors, or has the clock to itself.
bool Plan::uses_host() const {
  const std::vector<Gathering::Source>& sources = gathering_.sources();
  bool alone = sources.empty();
#if defined(FASTLR_HAS_CUDA)
  alone = alone && !devices_.any();
#endif
  return alone || std::any_of(sources.begin(), sources.end(), is_on_host);
}

bool Plan::all_on_host() const {
  const std::vector<Gathering::Source>& sources = gathering_.sources();
  return std::all_of(sources.begin(), sources.end(), is_on_host);
}

Plan::HostPart Plan::prepare_on_host(float inverse_scale, bool measures_norm) const {
  HostPart part;
  const std::vector<TensorRef>& all = gathering_.tensors();
  const bool alone = all_on_host();
  for (size_t i = 0; i < all.size() && !alone; ++i) {
    if (is_on_host(gathering_.sources()[i])) part.among_others.push_back(all[i]);
  }
  const std::vector<TensorRef>& tensors = alone ? all : part.among_others;
  const DefaultFloatEnvironment environment;
  // Most tensors are of the group and the age of the one before them.
  using GroupAge = std::pair<int32_t, int64_t>;
  std::map<GroupAge, int32_t> formed;
  GroupAge last{-1, 0};
  int32_t index = 0;
  part.scalars_of.reserve(tensors.size());
  for (const TensorRef& tensor : tensors) {
    if (const GroupAge wanted{tensor.group, tensor.age}; wanted != last) {
      last = wanted;
      const auto next = static_cast<int32_t>(part.scalars.size());
      const auto [found, is_new] = formed.try_emplace(wanted, next);
      index = found->second;
      if (is_new) {
        rule().scalars(gathering_.groups()[static_cast<size_t>(tensor.group)].options, tensor.age,
                       inverse_scale, part.scalars.emplace_back());
      }
    }
    part.scalars_of.push_back(index);
  }
  if (measures_norm) part.sums.emplace(tensors);
  return part;
}

// Returns the squared norm of the gradients, or 0.
double Plan::step_on_host(HostPart& part, float inverse_scale, int threads, bool in_order) const {
  const std::vector<TensorRef>& tensors = all_on_host() ? gathering_.tensors() : part.among_others;
  const HostStep step{rule(), tensors, gathering_.layouts(), part.scalars, part.scalars_of};
  const WithoutGil other_threads_run;
  double squares = 0.0;
  if (part.sums) {
    squares = measured_step_cpu(step, threads, in_order, *part.sums);
  } else {
    step_cpu(step, threads, in_order);
  }
  for (const TensorRef& tensor : tensors) {
    if (tensor.step != nullptr) *tensor.step = static_cast<float>(tensor.age + 1);
  }
  return unscaled_squares(squares, inverse_scale);
}

void Plan::run(PyObject* param_groups, PyObject* state, const Settings& settings) {
  gathering_.read(param_groups, state);
#if defined(FASTLR_HAS_CUDA)
  if (host_must_catch_up()) {
    devices_.sync(param_groups, groups_);
    gathering_.read(param_groups, state);
  }
#endif

  const bool with_host = uses_host();
  const bool has_amp = settings.found_inf != Py_None || settings.grad_scale != Py_None;
  float inverse_scale = 1.0f;
  if (with_host && has_amp) {
    const Owned answer = checked(PyObject_CallMethod(runtime_.get(), "read_amp", "OO",
                                                     settings.found_inf, settings.grad_scale));
    if (answer.get() == Py_None) return skip(param_groups, settings);
    inverse_scale = static_cast<float>(PyFloat_AsDouble(answer.get()));
    if (PyErr_Occurred()) throw PythonError();
  }

  gathering_.add_state();
  const bool in_order = gathering_.in_order();
  HostPart host;
  if (with_host) host = prepare_on_host(inverse_scale, settings.measures_norm);
  const GroupMoves moves = groups_.moves_on(param_groups, 1, settings.samples);
  gathering_.reserve_state(state);
  // Their version counters, so that a backward pass through an overwritten parameter raises.
  const Owned updated = gathering_.take_parameters();
  checked(PyObject_CallMethod(runtime_.get(), "will_write", "O", updated.get()));

  bool captured = false;
#if defined(FASTLR_HAS_CUDA)
  if (!all_on_host() || devices_.any()) {
    captured = devices_.step(gathering_, settings.found_inf, settings.grad_scale, with_host,
                             in_order, settings.measures_norm, settings.samples);
    devices_stepped_ = true;
  }
#endif
  gathering_.store_state();
  if (!captured) move(moves, param_groups);
  skipped_ = false;
  squared_norm_.reset();
  if (settings.measures_norm) squared_norm_ = 0.0;
  if (!with_host) return;
  const double squares = step_on_host(host, inverse_scale, settings.threads, in_order);
  if (settings.measures_norm) squared_norm_ = squares;
}

// The host knows that an update is to be skipped.
void Plan::skip(PyObject* param_groups, const Settings& settings) {
  if (settings.samples != 0) advance_samples(param_groups, settings.samples);
#if defined(FASTLR_HAS_CUDA)
  devices_stepped_ = false;
#endif
  skipped_ = true;
  squared_norm_.reset();
  if (settings.measures_norm) squared_norm_ = std::numeric_limits<double>::quiet_NaN();
}

PyObject* Plan::squared_norm() {
  std::optional<double> sum = squared_norm_;
#if defined(FASTLR_HAS_CUDA)
  if (devices_stepped_ && devices_.any()) {
    sum = devices_.squared_norm();
    if (sum) *sum += squared_norm_.value_or(0.0);
  }
#endif
  return sum ? checked(PyFloat_FromDouble(*sum)).release() : Py_NewRef(Py_None);
}

// Moves the host's clocks along with what the devices were told.
void Plan::move(const GroupMoves& moves, [[maybe_unused]] PyObject* param_groups) {
  moves.write();
#if defined(FASTLR_HAS_CUDA)
  devices_.agree(param_groups);
#endif
}

void Plan::advance_samples(PyObject* param_groups, int64_t samples) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(param_groups); ++i) {
    groups_.check_owned(PyList_GET_ITEM(param_groups, i), i, 0);
  }
  const GroupMoves moves = groups_.moves_on(param_groups, 0, samples);
#if defined(FASTLR_HAS_CUDA)
  if (!devices_.advance_samples(samples)) return;
#endif
  move(moves, param_groups);
}

void Plan::check(const std::vector<double>& values, const std::string& where) const {
  groups_.check(options_of(values), where);
}

std::vector<std::string> Plan::live_slots(const std::vector<double>& values) const {
  const uint32_t live = rule().live_slots(options_of(values), 0);
  std::vector<std::string> names;
  for (int k = 0; k < rule().slots; ++k) {
    if ((live >> k & 1u) != 0) names.push_back(rule().slot[k]);
  }
  return names;
}

double Plan::initial_state(const std::vector<double>& values) const {
  return rule().initial_state(options_of(values));
}

void Plan::check_owned(PyObject* param_groups, Py_ssize_t index,
                       const std::vector<std::string>& but_for) const {
  uint32_t options = 0;
  for (int i = 0; i < rule().scheduled; ++i) {
    const bool left_out =
        std::find(but_for.begin(), but_for.end(), rule().option[i].name) != but_for.end();
    options |= (left_out ? 1u : 0u) << i;
  }
  groups_.check_owned(PyList_GET_ITEM(param_groups, index), index, options);
}

void Plan::refuse_capture([[maybe_unused]] const char* what) {
#if defined(FASTLR_HAS_CUDA)
  devices_.refuse_capture(what);
#endif
}

void Plan::push(PyObject* param_groups) {
  const std::vector<GroupReading> groups = groups_.read(param_groups);
#if defined(FASTLR_HAS_CUDA)
  devices_.push(groups);
#endif
}

void Plan::sync([[maybe_unused]] PyObject* param_groups) {
#if defined(FASTLR_HAS_CUDA)
  if (devices_.any()) skipped_ = devices_.sync(param_groups, groups_);
#endif
}

bool Plan::captured() const {
#if defined(FASTLR_HAS_CUDA)
  return devices_.captured();
#else
  return false;
#endif
}

#if defined(FASTLR_HAS_CUDA)
// Where the host updates tensors, or a device is new, the host's clocks are what counts.
bool Plan::host_must_catch_up() const {
  if (!devices_.any() || devices_.host_is_exact()) return false;
  const std::vector<Gathering::Source>& sources = gathering_.sources();
  return uses_host() ||
         std::any_of(sources.begin(), sources.end(), [&](const Gathering::Source& source) {
           return !is_on_host(source) && !devices_.knows(source.place);
         });
}
#endif

}  // namespace fastlr

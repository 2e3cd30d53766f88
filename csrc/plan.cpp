#include "plan.h"

#include <algorithm>
#include <cmath>
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

namespace {

[[noreturn]] void refuse_while_stepping() {
  throw std::runtime_error(
      "step() is already running on this optimizer, in another thread or further up the stack");
}

}  // namespace

void Plan::hold() {
  if (stepping_) refuse_while_stepping();
  if (held_) {
    throw std::runtime_error(
        "averaged_weights() is open already; its parameters are averages, as model.state_dict() "
        "has them");
  }
  held_ = true;
}

void Plan::step(PyObject* param_groups, PyObject* state, const Settings& settings) {
  if (stepping_) refuse_while_stepping();
  if (held_) {
    throw std::runtime_error(
        "step() inside averaged_weights() would update averages, which are taken out again at its "
        "end; call it after the with block");
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

// Whether a device has all tensors of the step, and no host is needed to clip their norm.
bool Plan::on_one_device() const {
#if defined(FASTLR_HAS_CUDA)
  const std::vector<Gathering::Source>& sources = gathering_.sources();
  if (sources.empty()) return devices_.any();
  return !is_on_host(sources.front()) &&
         std::all_of(sources.begin(), sources.end(), [&](const Gathering::Source& source) {
           return source.place == sources.front().place;
         });
#else
  return false;
#endif
}

bool Plan::clips_values() const {
  const std::vector<GroupReading>& groups = gathering_.groups();
  return std::any_of(groups.begin(), groups.end(), [&](const GroupReading& group) {
    return std::isfinite(max_value_of(group.options.value + rule().rule_options));
  });
}

std::vector<TensorRef> Plan::tensors_on_host() const {
  std::vector<TensorRef> tensors;
  for (size_t i = 0; i < gathering_.tensors().size(); ++i) {
    if (is_on_host(gathering_.sources()[i])) tensors.push_back(gathering_.tensors()[i]);
  }
  return tensors;
}

Plan::HostPart Plan::prepare_on_host(const Unscaling& unscaling, bool measures_norm) const {
  HostPart part;
  const bool alone = all_on_host();
  if (!alone) part.among_others = tensors_on_host();
  const std::vector<TensorRef>& tensors = alone ? gathering_.tensors() : part.among_others;
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
                       unscaling, part.scalars.emplace_back());
      }
    }
    part.scalars_of.push_back(index);
  }
  for (const GroupReading& group : gathering_.groups()) {
    part.stages.push_back(
        group_stages(group.options.value + rule().rule_options, group.clock.updates));
  }
  if (measures_norm) part.sums.emplace(tensors);
  return part;
}

// Returns the sum of the squares of the gradients, or 0.
double Plan::step_on_host(HostPart& part, int threads, bool in_order) const {
  const std::vector<TensorRef>& tensors = all_on_host() ? gathering_.tensors() : part.among_others;
  const HostStep step{rule(),       tensors,         gathering_.layouts(),
                      part.scalars, part.scalars_of, part.stages};
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
  return squares;
}

// The inverse of GradScaler's scale, or nothing where found_inf says that the update is to be
// skipped; waits for devices.
std::optional<float> Plan::read_amp(PyObject* found_inf, PyObject* grad_scale) const {
  if (found_inf == Py_None && grad_scale == Py_None) return 1.0f;
  const Owned answer =
      checked(PyObject_CallMethod(runtime_.get(), "read_amp", "OO", found_inf, grad_scale));
  if (answer.get() == Py_None) return std::nullopt;
  const auto inverse_scale = static_cast<float>(PyFloat_AsDouble(answer.get()));
  if (PyErr_Occurred()) throw PythonError();
  return inverse_scale;
}

// The sum of the squares of a share's gradients, wherever they are; waits for devices.
// inverse_scale: of the scale that they, and what they are clipped to, come with; nothing: as they
// are.
double Plan::measure_share(int share, std::optional<float> inverse_scale, int threads) {
  double squares = 0.0;
#if defined(FASTLR_HAS_CUDA)
  squares += devices_.measure(gathering_, share, inverse_scale);
#endif
  std::vector<TensorRef> tensors;
  for (size_t i = 0; i < gathering_.tensors().size(); ++i) {
    const TensorRef& tensor = gathering_.tensors()[i];
    if (!is_on_host(gathering_.sources()[i]) || tensor.share != share) continue;
    tensors.push_back(tensor);
    bring_to_scale(tensors.back(), inverse_scale);
  }
  const WithoutGil other_threads_run;
  return squares + squared_norm_cpu(tensors, gathering_.layouts(), threads);
}

// The same of all gradients, those of other processes too, which measure once as well. keeps_inf:
// what gradients are clipped to takes no inf or NaN away.
double Plan::measure_norm(std::optional<float> inverse_scale, bool keeps_inf, int threads) {
  const auto measure = [&](int share) {
    if (!keeps_inf) return measure_share(share, inverse_scale, threads);
    const double unclipped = measure_share(share, std::nullopt, threads);
    const bool clips = inverse_scale && std::isfinite(unclipped);
    return clips ? measure_share(share, inverse_scale, threads) : unclipped;
  };
  double squares = measure(0);
  const int shares = gathering_.share_count();
  if (shares == 0) return squares;
  const Owned sums = checked(PyList_New(shares));
  for (int i = 0; i < shares; ++i) {
    PyList_SET_ITEM(sums.get(), i, checked(PyFloat_FromDouble(measure(i + 1))).release());
  }
  const Owned totals = checked(
      PyObject_CallMethod(runtime_.get(), "add_up_shares", "OO", gathering_.shares(), sums.get()));
  for (int i = 0; i < shares; ++i) squares += PyFloat_AsDouble(PyList_GetItem(totals.get(), i));
  if (PyErr_Occurred()) throw PythonError();
  return squares;
}

// What the values that gradients are clipped to are brought to their scale by, while it is not
// known yet whether the scale will be judged; nothing: nothing is clipped, or it is no scale.
std::optional<float> Plan::scale_to_clip_by(PyObject* grad_scale) const {
  if (!clips_values()) return std::nullopt;
  try {
    return read_amp(Py_None, grad_scale);
  } catch (const PythonError&) {
    if (!PyErr_ExceptionMatches(PyExc_ValueError)) throw;
    PyErr_Clear();
    return std::nullopt;
  }
}

void Plan::run(PyObject* param_groups, PyObject* state, const Settings& settings) {
  gathering_.read(param_groups, state);
#if defined(FASTLR_HAS_CUDA)
  if (host_must_catch_up()) {
    devices_.sync(param_groups, groups_, settings.raises);
    gathering_.read(param_groups, state);
  }
#endif

  const bool with_host = uses_host();
  // What takes other processes is not measured in the pass of the update; and where they all take
  // part, so does one that has no gradient.
  const bool of_shares = gathering_.share_count() != 0;
  const bool norm_first = settings.norm_first() || (settings.measures_norm && of_shares);
  const bool on_device = on_one_device() && !(of_shares && gathering_.tensors().empty());
  const bool norm_here = norm_first && !on_device;
  const bool seeks_here = settings.seeks_inf && norm_here;
  raises_ = settings.raises;
  std::optional<float> inverse_scale = 1.0f;
  if ((with_host || norm_here) && !seeks_here) {
    inverse_scale = read_amp(settings.found_inf, settings.grad_scale);
    if (!inverse_scale) {
      return skip(param_groups, settings, std::numeric_limits<double>::quiet_NaN());
    }
  }

  gathering_.add_state();
  const bool in_order = gathering_.in_order();
  std::optional<double> squares;  // of all gradients, where the host knows them before the update
  double factor = *inverse_scale;
  if (norm_here) {
    const double scaled =
        measure_norm(seeks_here ? scale_to_clip_by(settings.grad_scale) : inverse_scale, seeks_here,
                     settings.threads);
    // A scale is judged where nothing was found, as with torch's GradScaler.
    if (seeks_here && std::isfinite(scaled)) {
      inverse_scale = read_amp(Py_None, settings.grad_scale);
    }
    squares = unscaled_squares(scaled, *inverse_scale);
  }
  if (norm_here && settings.norm_first()) {
    factor = clipping_factor(*squares, settings.max_norm, *inverse_scale);
    if (std::isnan(factor)) {
      if (seeks_here) {
        checked(PyObject_CallMethod(runtime_.get(), "fill", "[O]d", settings.found_inf, 1.0));
      }
      if (seeks_here || !settings.raises) return skip(param_groups, settings, squares);
      throw std::runtime_error("the gradients' norm is " + std::to_string(std::sqrt(*squares)) +
                               ", so that it cannot be clipped; nothing was updated.");
    }
  }
  const bool measures_norm = settings.measures_norm && !norm_first;  // in the pass of the update
  HostPart host;
  if (with_host) host = prepare_on_host({factor, *inverse_scale}, measures_norm);
  const GroupMoves moves = groups_.moves_on(param_groups, 1, settings.samples);
  gathering_.reserve_state(state);
  // Their version counters, so that a backward pass through an overwritten parameter raises.
  const Owned updated = gathering_.take_parameters();
  checked(PyObject_CallMethod(runtime_.get(), "will_write", "O", updated.get()));

  bool captured = false;
#if defined(FASTLR_HAS_CUDA)
  norm_on_devices_ = devices_stepped_ = false;
  if (!all_on_host() || devices_.any()) {
    std::optional<NormPass> norm_pass;
    if (norm_first && !norm_here) {
      norm_pass = {settings.max_norm, settings.seeks_inf, gathering_.shares(),
                   gathering_.share_count()};
    }
    captured = devices_.step(
        gathering_, seeks_here ? Py_None : settings.found_inf, settings.grad_scale, with_host,
        in_order, measures_norm, norm_pass,
        norm_here && settings.norm_first() ? std::optional<double>(factor) : std::nullopt,
        settings.samples);
    devices_stepped_ = true;
    norm_on_devices_ = !norm_here;
  }
#endif
  gathering_.store_state();
  if (!captured) move(moves, param_groups);
  skipped_ = false;
  squared_norm_.reset();
  if (settings.tells_norm()) squared_norm_ = squares.value_or(0.0);
  if (!with_host) return;
  const double read = step_on_host(host, settings.threads, in_order);
  if (measures_norm) squared_norm_ = unscaled_squares(read, *inverse_scale);
}

// The host knows that an update is to be skipped. squares: of its gradients.
void Plan::skip(PyObject* param_groups, const Settings& settings, std::optional<double> squares) {
  if (settings.samples != 0) advance_samples(param_groups, settings.samples);
#if defined(FASTLR_HAS_CUDA)
  norm_on_devices_ = devices_stepped_ = false;
#endif
  skipped_ = true;
  squared_norm_.reset();
  if (settings.tells_norm()) squared_norm_ = squares;
}

Owned Plan::skipped_on_device() const {
#if defined(FASTLR_HAS_CUDA)
  return devices_.last_skipped();
#else
  return Owned::borrow(Py_None);
#endif
}

PyObject* Plan::squared_norm() {
  std::optional<double> sum = squared_norm_;
#if defined(FASTLR_HAS_CUDA)
  if (norm_on_devices_ && devices_.any()) {
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

GivenOptions Plan::given(const Values& values) const {
  GivenOptions given{};
  for (size_t i = 0; i < values.size(); ++i) {
    given.options.value[i] = values[i].value_or(rule().option[i].if_none);
    given.none |= (values[i] ? 0u : 1u) << i;
  }
  return given;
}

void Plan::check(const Values& values, const std::string& where) const {
  groups_.check(given(values), where);
}

std::vector<std::string> Plan::live_slots(const Values& values) const {
  const uint32_t live = rule().live_slots(given(values).options, 0);
  std::vector<std::string> names;
  for (int k = 0; k < kMaxSlots; ++k) {
    if (is_live(live, k)) names.push_back(rule().slot[k]);
  }
  return names;
}

double Plan::initial_state(const Values& values) const {
  return rule().initial_state(given(values).options);
}

void Plan::check_owned(PyObject* param_groups, Py_ssize_t index,
                       const std::vector<std::string>& but_for) const {
  uint32_t options = 0;
  for (int i = 0; i < rule().options; ++i) {
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
  if (!devices_.any()) return;
  const bool skipped = devices_.sync(param_groups, groups_, raises_);
  if (devices_stepped_ || devices_.captured()) skipped_ = skipped;
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

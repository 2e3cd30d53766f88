#include "groups.h"

#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "cpu/float_environment.h"
#include "messages.h"

namespace fastlr {
namespace {

struct ClockKeys {
  PyObject* updates = PyUnicode_InternFromString("updates");
  PyObject* samples = PyUnicode_InternFromString("samples");
  PyObject* native = PyUnicode_InternFromString("_native");
};

const ClockKeys& keys() {
  static const ClockKeys all;
  return all;
}

// The shortest decimal that reads back as the same double, as Python's repr.
std::string number(double value) {
  char* text = PyOS_double_to_string(value, 'r', 0, Py_DTSF_ADD_DOT_0, nullptr);
  if (text == nullptr) throw PythonError();
  const std::string result = text;
  PyMem_Free(text);
  return result;
}

// Which group, where that is known.
constexpr Py_ssize_t kSomeGroup = -1;

std::string in_group(Py_ssize_t index) {
  if (index == kSomeGroup) return " of a parameter group";
  return " of parameter group " + std::to_string(index);
}

PyObject* item(PyObject* group, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(group, key);
  if (value == nullptr) {
    if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key);
    throw PythonError();
  }
  return value;
}

[[noreturn]] void refuse_item(PyObject* key, Py_ssize_t index, const char* expected,
                              PyObject* value) {
  // What a tensor says, which its device may have told it, says more than its repr.
  const bool says_why = PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_RuntimeError);
  PyObject *type, *error, *traceback;
  PyErr_Fetch(&type, &error, &traceback);
  const Owned owned_type(type), owned_error(error), owned_traceback(traceback);
  const std::string why = says_why ? ": " + text_of(PyObject_Str(error)) : "";
  throw std::invalid_argument(std::string(PyUnicode_AsUTF8(key)) + in_group(index) + " must be " +
                              expected + ", got " + text_of(PyObject_Repr(value)) + " (" +
                              Py_TYPE(value)->tp_name + ")" + why);
}

// Whether it is a truth value, also another library's, or a tensor of one: no number, although each
// of these converts to one.
bool is_truth(PyObject* value) {
  if (PyFloat_Check(value)) return false;
  if (PyLong_Check(value)) return PyBool_Check(value);
  const Owned dtype(PyObject_GetAttrString(value, "dtype"));
  if (!dtype) {
    PyErr_Clear();
    return false;
  }
  const std::string name = str_of(dtype.get());
  return name == "bool" || name == "torch.bool";
}

// A number, also another library's, or a tensor of one.
double real(PyObject* value, Py_ssize_t index, PyObject* key, const char* expected = "a number") {
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  if (is_truth(value)) refuse_item(key, index, expected, value);
  const double result = PyFloat_AsDouble(value);
  if (result == -1.0 && PyErr_Occurred()) refuse_item(key, index, expected, value);
  return result;
}

// True or False, also NumPy's: what a constructor and a file may bring.
bool flag(PyObject* value, Py_ssize_t index, PyObject* key) {
  if (value == Py_True || value == Py_False) return value == Py_True;
  const std::string type = Py_TYPE(value)->tp_name;
  if (type != "numpy.bool" && type != "numpy.bool_") {
    refuse_item(key, index, "True or False", value);
  }
  const int result = PyObject_IsTrue(value);
  if (result < 0) throw PythonError();
  return result != 0;
}

int64_t integer_item(PyObject* group, PyObject* key, Py_ssize_t index = kSomeGroup) {
  PyObject* value = item(group, key);
  const long long result = PyBool_Check(value) ? -1 : PyLong_AsLongLong(value);
  if (PyBool_Check(value) || (result == -1 && PyErr_Occurred())) {
    refuse_item(key, index, "an integer of 64 bits", value);
  }
  return result;
}

// From a warning in the middle of a step up to the caller of step(): the warning itself, _step,
// _step_once, step.
constexpr int kFramesToCaller = 5;

void warn_if_past_end(const Driven& driven, int frames) {
  if (driven.owner == nullptr || driven.clock <= driven.schedule->end) return;
  checked(PyObject_CallMethod(driven.owner, "_warn_past_end", "Li",
                              static_cast<long long>(driven.clock), frames));
}

PyObject* interned(const std::string& text) {
  PyObject* const key = PyUnicode_InternFromString(text.c_str());
  if (key == nullptr) throw PythonError();
  return key;  // for as long as the process lives, as all interned strings
}

}  // namespace

double schedule_value(const NativeSchedule& schedule, int64_t clock) {
  const DefaultFloatEnvironment environment;
  return value_at(schedule.segments.data(), static_cast<int64_t>(schedule.segments.size()),
                  schedule.table.data(), clock);
}

Clock read_clock(PyObject* group) {
  return {integer_item(group, keys().updates), integer_item(group, keys().samples)};
}

Groups::Groups(const Rule& rule, NativeOf native_of, const OtherNames& other_names)
    : rule_(rule), native_of_(native_of) {
  for (const auto& [name, key] : other_names) other_names_.emplace_back(interned(name), key);
  for (int i = 0; i < rule.options; ++i) {
    const std::string name = rule.option[i].name;
    const bool scheduled = rule.option[i].scheduled;
    const char* const tuple = rule.option[i].tuple;
    keys_.push_back({interned(name), interned(tuple == nullptr ? name : tuple),
                     scheduled ? interned(name + "_schedule") : nullptr,
                     scheduled ? interned(name + "_start") : nullptr});
  }
}

void Groups::check(const GivenOptions& given, const std::string& where) const {
  const Options& options = given.options;
  for (int i = 0; i < rule_.options; ++i) {
    const Option& option = rule_.option[i];
    const double value = options[i];
    if (option.flag || option.range.holds(value) || (given.none >> i & 1u) != 0) continue;
    throw std::invalid_argument(option.name + where + " must be " + option.range.text() + ", got " +
                                number(value) + (value >= option.range.high ? option.reason : ""));
  }
  const Conflict conflict = rule_.conflict(options);
  if (conflict.option < 0) return;
  const Option& option = rule_.option[conflict.option];
  const double value = options[conflict.option];
  throw std::invalid_argument(option.name + where + " must be " + conflict.expected + ", got " +
                              (option.flag ? value != 0.0 ? "True" : "False" : number(value)));
}

std::string Groups::large_options(const GroupReading& group, Py_ssize_t index) const {
  std::string text;
  for (int i = 0; i < rule_.options; ++i) {
    if ((group.large_options >> i & 1u) == 0) continue;
    text += (text.empty() ? "" : ", ") + (rule_.option[i].name + ("=" + number(group.options[i])));
  }
  return text + in_group(index);
}

// What is written there would be read by nothing.
void Groups::refuse_other_names(PyObject* group, Py_ssize_t index) const {
  for (const auto& [name, key] : other_names_) {
    const int found = PyDict_Contains(group, name);
    if (found < 0) throw PythonError();
    if (found == 0) continue;
    const std::string text = PyUnicode_AsUTF8(name);
    throw std::invalid_argument(text + in_group(index) + " is a constructor's name for " + key +
                                "; write group[\"" + key + "\"], and take \"" + text +
                                "\" out of the group");
  }
}

// What stands in a group for an option, borrowed.
PyObject* Groups::value_of(PyObject* group, Py_ssize_t index, int option) const {
  PyObject* const value = item(group, keys_[option].value);
  const Option& what = rule_.option[option];
  if (what.tuple == nullptr) return value;
  int size = 0;
  for (int i = 0; i < rule_.options; ++i) size += keys_[i].value == keys_[option].value;
  const bool sequence = PyTuple_Check(value) || PyList_Check(value);
  if (sequence && PySequence_Fast_GET_SIZE(value) == size) {
    return PySequence_Fast_GET_ITEM(value, what.place);
  }
  const std::string expected = "a tuple of " + std::to_string(size) + " numbers";
  refuse_item(keys_[option].value, index, expected.c_str(), value);
}

Driven Groups::driven_by(PyObject* group, const Keys& option, const Clock& clock) const {
  Driven driven;
  PyObject* owner = item(group, option.schedule);
  if (owner == Py_None) return driven;
  const Owned native(PyObject_GetAttr(owner, keys().native));
  driven.owner = owner;
  driven.native = native.get();  // lives as long as its owner, which the group holds
  driven.schedule = native ? native_of_(native.get()) : nullptr;
  if (driven.schedule == nullptr) {
    PyErr_Clear();
    throw std::invalid_argument(std::string(PyUnicode_AsUTF8(option.schedule)) +
                                " of a parameter group must be a fastlr schedule or None, got a " +
                                Py_TYPE(owner)->tp_name + "; use optimizer.set_schedule()");
  }
  const int64_t now = driven.schedule->in_samples ? clock.samples : clock.updates;
  driven.start = integer_item(group, option.start);
  if (driven.start > now) {
    throw std::invalid_argument("a schedule of a parameter group starts at " +
                                std::to_string(driven.start) + ", after the clock, which is at " +
                                std::to_string(now) + "; put it in place with set_schedule()");
  }
  driven.clock = now - driven.start;
  return driven;
}

// The number that stands in a group for an option, or that its None stands for.
double Groups::read_number(PyObject* group, Py_ssize_t index, int option, uint32_t& none) const {
  PyObject* const found = value_of(group, index, option);
  const Option& what = rule_.option[option];
  PyObject* const key = keys_[option].name;
  if (!what.may_be_none()) return real(found, index, key);
  if (found != Py_None) return real(found, index, key, "a number or None");
  none |= 1u << option;
  return what.if_none;
}

// What the next update uses for a hyperparameter; checked against its schedule where it has one.
double Groups::read_scheduled(PyObject* group, Py_ssize_t index, int option, const Driven& driven,
                              uint32_t& none) const {
  const double found = read_number(group, index, option, none);
  if (driven.owner == nullptr) return found;
  const double expected = schedule_value(*driven.schedule, driven.clock);
  if (!(found == expected)) {
    const std::string name = rule_.option[option].name;
    throw std::runtime_error(
        name + in_group(index) + " was set to " + number(found) +
        " by something else, but a schedule owns it and says " + number(expected) +
        ". Remove the other writer (a torch scheduler: give the framework "
        "fastlr.integrations.ReadOnlyScheduler(optimizer) instead, and transformers' Trainer what "
        "fastlr.integrations.transformers.optimizers() makes; a learning-rate finder: "
        "fastlr.range_test() finds bounds under a schedule), let it write for a while inside "
        "optimizer.handed_over(), or take the value back with optimizer.set_schedule(" +
        name + "=" + number(found) + ").");
  }
  return expected;
}

void Groups::check_owned(PyObject* group, Py_ssize_t index, uint32_t but_for) const {
  const Clock clock = read_clock(group);
  for (int option = 0; option < rule_.options; ++option) {
    if (!rule_.option[option].scheduled || (but_for >> option & 1u) != 0) continue;
    const Driven driven = driven_by(group, keys_[option], clock);
    uint32_t none = 0;
    if (driven.owner != nullptr) read_scheduled(group, index, option, driven, none);
  }
}

GroupReading Groups::read(PyObject* group, Py_ssize_t index) const {
  const std::string where = in_group(index);
  GroupReading reading{};
  GivenOptions given{};
  const Clock& clock = reading.clock = read_clock(group);
  for (int i = 0; i < rule_.options; ++i) {
    double& value = given.options.value[i];
    if (rule_.option[i].scheduled) {
      reading.driven[i] = driven_by(group, keys_[i], clock);
      reading.driven_options |= (reading.driven[i].owner != nullptr ? 1u : 0u) << i;
      value = read_scheduled(group, index, i, reading.driven[i], given.none);
      warn_if_past_end(reading.driven[i], kFramesToCaller);
    } else if (rule_.option[i].flag) {
      value = flag(value_of(group, index, i), index, keys_[i].name);
    } else {
      value = read_number(group, index, i, given.none);
    }
    const bool is_none = (given.none >> i & 1u) != 0;
    if (!is_none && !(std::fabs(value) <= kLargeOption)) reading.large_options |= 1u << i;
  }
  if (clock.updates < 0 || clock.samples < 0 || clock.updates == INT64_MAX) {
    throw std::invalid_argument("the clock" + where +
                                " is out of range: " + std::to_string(clock.updates) +
                                " updates, " + std::to_string(clock.samples) + " samples");
  }
  refuse_other_names(group, index);
  check(given, where);
  reading.options = given.options;
  return reading;
}

std::vector<GroupReading> Groups::read(PyObject* groups) const {
  std::vector<GroupReading> readings;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups); ++i) {
    readings.push_back(read(PyList_GET_ITEM(groups, i), i));
  }
  return readings;
}

void Groups::warn_past_end(PyObject* group, int frames) const {
  const Clock clock = read_clock(group);
  for (int i = 0; i < rule_.options; ++i) {
    if (!rule_.option[i].scheduled) continue;
    warn_if_past_end(driven_by(group, keys_[i], clock), frames);
  }
}

void Groups::add_move(GroupMoves& moves, PyObject* group, const Clock& clock) const {
  const Clock now = read_clock(group);
  if (clock.updates != now.updates) {
    moves.add(group, keys().updates, checked(PyLong_FromLongLong(clock.updates)));
  }
  if (clock.samples != now.samples) {
    moves.add(group, keys().samples, checked(PyLong_FromLongLong(clock.samples)));
  }
  for (int i = 0; i < rule_.options; ++i) {
    if (!rule_.option[i].scheduled) continue;
    const Driven driven = driven_by(group, keys_[i], clock);
    if (driven.owner == nullptr) continue;
    value_of(group, kSomeGroup, i);  // is there
    Owned value = checked(PyFloat_FromDouble(schedule_value(*driven.schedule, driven.clock)));
    if (rule_.option[i].tuple == nullptr) {
      moves.add(group, keys_[i].value, std::move(value));
      continue;
    }
    // Two schedules may drive one tuple: the second replaces what the first has made.
    PyObject* const before = moves.last(group, keys_[i].value);
    PyObject* const tuple = before == nullptr ? item(group, keys_[i].value) : before;
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(tuple);
    Owned changed = checked(PyTuple_New(size));
    for (Py_ssize_t k = 0; k < size; ++k) {
      PyObject* const entry =
          k == rule_.option[i].place ? value.get() : PySequence_Fast_GET_ITEM(tuple, k);
      PyTuple_SET_ITEM(changed.get(), k, Py_NewRef(entry));
    }
    moves.add(group, keys_[i].value, std::move(changed));
  }
}

void Groups::move_to(PyObject* group, const Clock& clock) const {
  const Clock now = read_clock(group);
  if (now.updates == clock.updates && now.samples == clock.samples) return;
  GroupMoves moves;
  add_move(moves, group, clock);
  moves.write();
}

GroupMoves Groups::moves_on(PyObject* groups, int64_t updates, int64_t samples) const {
  GroupMoves moves;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups); ++i) {
    PyObject* group = PyList_GET_ITEM(groups, i);
    const Clock now = {integer_item(group, keys().updates, i),
                       integer_item(group, keys().samples, i)};
    Clock next;
    if (__builtin_add_overflow(now.updates, updates, &next.updates) ||
        __builtin_add_overflow(now.samples, samples, &next.samples)) {
      throw std::invalid_argument("the clock of parameter group " + std::to_string(i) +
                                  " would pass 2**63");
    }
    add_move(moves, group, next);
  }
  return moves;
}

PyObject* GroupMoves::last(PyObject* group, PyObject* key) const {
  for (auto entry = entries_.rbegin(); entry != entries_.rend(); ++entry) {
    if (entry->group.get() != group) break;
    if (entry->key == key) return entry->value.get();
  }
  return nullptr;
}

void GroupMoves::write() const {
  for (const Entry& entry : entries_) {
    if (PyDict_SetItem(entry.group.get(), entry.key, entry.value.get()) != 0) throw PythonError();
  }
}

void update_groups(PyObject* groups, PyObject* changes) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups); ++i) {
    if (PyDict_Update(PyList_GET_ITEM(groups, i), PyList_GET_ITEM(changes, i)) != 0) {
      throw PythonError();
    }
  }
}

}  // namespace fastlr

#include "groups.h"

#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "cpu/float_environment.h"
#include "owned.h"

namespace fastlr {
namespace {

// Keys of a group's dict, made once: looking up an interned string is a pointer comparison.
struct Keys {
  PyObject* lr = PyUnicode_InternFromString("lr");
  PyObject* momentum = PyUnicode_InternFromString("momentum");
  PyObject* dampening = PyUnicode_InternFromString("dampening");
  PyObject* weight_decay = PyUnicode_InternFromString("weight_decay");
  PyObject* nesterov = PyUnicode_InternFromString("nesterov");
  PyObject* maximize = PyUnicode_InternFromString("maximize");
  PyObject* lr_schedule = PyUnicode_InternFromString("lr_schedule");
  PyObject* momentum_schedule = PyUnicode_InternFromString("momentum_schedule");
  PyObject* lr_start = PyUnicode_InternFromString("lr_start");
  PyObject* momentum_start = PyUnicode_InternFromString("momentum_start");
  PyObject* updates = PyUnicode_InternFromString("updates");
  PyObject* samples = PyUnicode_InternFromString("samples");
  PyObject* native = PyUnicode_InternFromString("_native");
};

const Keys& keys() {
  static const Keys all;
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
  PyErr_Clear();
  const Owned shown(PyObject_Repr(value));
  const char* text = shown ? PyUnicode_AsUTF8(shown.get()) : nullptr;
  PyErr_Clear();
  throw std::invalid_argument(std::string(PyUnicode_AsUTF8(key)) + in_group(index) + " must be " +
                              expected + ", got " + (text == nullptr ? "" : text) + " (" +
                              Py_TYPE(value)->tp_name + ")");
}

// A number, also another library's, or a tensor of one.
double real_item(PyObject* group, Py_ssize_t index, PyObject* key) {
  PyObject* value = item(group, key);
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  const double result = PyBool_Check(value) ? -1.0 : PyFloat_AsDouble(value);
  if (PyBool_Check(value) || (result == -1.0 && PyErr_Occurred())) {
    refuse_item(key, index, "a number", value);
  }
  return result;
}

// True or False, also NumPy's: what a constructor and a file may bring.
bool flag_item(PyObject* group, Py_ssize_t index, PyObject* key) {
  PyObject* value = item(group, key);
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
  const long long result = PyLong_AsLongLong(value);
  if (result == -1 && PyErr_Occurred()) refuse_item(key, index, "an integer of 64 bits", value);
  return result;
}

Driven driven_by(PyObject* group, PyObject* schedule_key, PyObject* start_key, NativeOf native_of) {
  Driven driven;
  PyObject* owner = item(group, schedule_key);
  if (owner == Py_None) return driven;
  const Owned native(PyObject_GetAttr(owner, keys().native));
  driven.owner = owner;
  driven.native = native.get();  // lives as long as its owner, which the group holds
  driven.schedule = native ? native_of(native.get()) : nullptr;
  if (driven.schedule == nullptr) {
    PyErr_Clear();
    throw std::invalid_argument(std::string(PyUnicode_AsUTF8(schedule_key)) +
                                " of a parameter group must be a fastlr schedule or None, got a " +
                                Py_TYPE(owner)->tp_name + "; use optimizer.set_schedule()");
  }
  const int64_t now =
      integer_item(group, driven.schedule->in_samples ? keys().samples : keys().updates);
  driven.start = integer_item(group, start_key);
  if (driven.start > now) {
    throw std::invalid_argument("a schedule of a parameter group starts at " +
                                std::to_string(driven.start) + ", after the clock, which is at " +
                                std::to_string(now) + "; put it in place with set_schedule()");
  }
  driven.clock = now - driven.start;
  return driven;
}

// From a warning in the middle of a step up to the caller of step(): the warning itself, _step,
// step.
constexpr int kFramesToCaller = 5;

void warn_past_end(const Driven& driven, int frames) {
  if (driven.owner == nullptr || driven.clock <= driven.schedule->end) return;
  checked(PyObject_CallMethod(driven.owner, "_warn_past_end", "Li",
                              static_cast<long long>(driven.clock), frames));
}

// What the next update uses for a hyperparameter; checked against its schedule where it has one.
double read_scheduled(PyObject* group, Py_ssize_t index, const char* name, PyObject* key,
                      const Driven& driven) {
  const double found = real_item(group, index, key);
  if (driven.owner == nullptr) return found;
  const double expected = schedule_value(*driven.schedule, driven.clock);
  if (!(found == expected)) {
    throw std::runtime_error(
        std::string(name) + in_group(index) + " was set to " + number(found) +
        " by something else, but a schedule owns it and says " + number(expected) +
        ". Remove the other writer (a torch scheduler: give the framework "
        "fastlr.integrations.ReadOnlyScheduler(optimizer) instead), or take the value back with "
        "optimizer.set_schedule(" +
        name + "=" + number(found) + ").");
  }
  warn_past_end(driven, kFramesToCaller);
  return expected;
}

void publish(PyObject* group, PyObject* key, PyObject* schedule_key, PyObject* start_key,
             NativeOf native_of) {
  const Driven driven = driven_by(group, schedule_key, start_key, native_of);
  if (driven.owner == nullptr) return;
  const Owned value = checked(PyFloat_FromDouble(schedule_value(*driven.schedule, driven.clock)));
  if (PyDict_SetItem(group, key, value.get()) != 0) throw PythonError();
}

void publish(PyObject* group, NativeOf native_of) {
  const Keys& k = keys();
  publish(group, k.lr, k.lr_schedule, k.lr_start, native_of);
  publish(group, k.momentum, k.momentum_schedule, k.momentum_start, native_of);
}

void require(bool condition, const char* name, Py_ssize_t index, const char* range, double value) {
  if (condition) return;
  throw std::invalid_argument(std::string(name) + in_group(index) + " must be " + range + ", got " +
                              number(value));
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

void warn_past_end(PyObject* group, NativeOf native_of, int frames) {
  const Keys& k = keys();
  warn_past_end(driven_by(group, k.lr_schedule, k.lr_start, native_of), frames);
  warn_past_end(driven_by(group, k.momentum_schedule, k.momentum_start, native_of), frames);
}

GroupReading read_group(PyObject* group, Py_ssize_t index, NativeOf native_of) {
  const Keys& k = keys();
  GroupReading reading;
  SgdOptions& options = reading.options;
  reading.lr = driven_by(group, k.lr_schedule, k.lr_start, native_of);
  reading.momentum = driven_by(group, k.momentum_schedule, k.momentum_start, native_of);
  options.lr = read_scheduled(group, index, "lr", k.lr, reading.lr);
  options.momentum = read_scheduled(group, index, "momentum", k.momentum, reading.momentum);
  options.dampening = real_item(group, index, k.dampening);
  options.weight_decay = real_item(group, index, k.weight_decay);
  options.nesterov = flag_item(group, index, k.nesterov);
  options.maximize = flag_item(group, index, k.maximize);
  const Clock& clock = reading.clock = read_clock(group);
  if (clock.updates < 0 || clock.samples < 0 || clock.updates == INT64_MAX) {
    throw std::invalid_argument("the clock" + in_group(index) +
                                " is out of range: " + std::to_string(clock.updates) +
                                " updates, " + std::to_string(clock.samples) + " samples");
  }
  const auto finite = [](double x) { return std::isfinite(x); };
  require(finite(options.lr) && options.lr >= 0.0, "lr", index, "finite and >= 0", options.lr);
  require(options.momentum >= 0.0 && options.momentum < 1.0, "momentum", index, "in [0, 1)",
          options.momentum);
  require(finite(options.dampening), "dampening", index, "finite", options.dampening);
  require(finite(options.weight_decay) && options.weight_decay >= 0.0, "weight_decay", index,
          "finite and >= 0", options.weight_decay);
  require(!options.nesterov || options.dampening == 0.0, "dampening", index, "0 with nesterov=True",
          options.dampening);
  return reading;
}

std::vector<GroupReading> read_groups(PyObject* groups, NativeOf native_of) {
  std::vector<GroupReading> readings;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups); ++i) {
    readings.push_back(read_group(PyList_GET_ITEM(groups, i), i, native_of));
  }
  return readings;
}

void move_to(PyObject* group, const Clock& clock, NativeOf native_of) {
  const Keys& k = keys();
  const Clock now = read_clock(group);
  if (now.updates == clock.updates && now.samples == clock.samples) return;
  const Owned updates = checked(PyLong_FromLongLong(clock.updates));
  const Owned samples = checked(PyLong_FromLongLong(clock.samples));
  if (PyDict_SetItem(group, k.updates, updates.get()) != 0 ||
      PyDict_SetItem(group, k.samples, samples.get()) != 0) {
    throw PythonError();
  }
  publish(group, native_of);
}

void advance_groups(PyObject* groups, int64_t updates, int64_t samples, NativeOf native_of) {
  const Keys& k = keys();
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups); ++i) {
    PyObject* group = PyList_GET_ITEM(groups, i);
    const auto move = [group, i](PyObject* key, int64_t by) {
      if (by == 0) return;
      int64_t moved;
      if (__builtin_add_overflow(integer_item(group, key, i), by, &moved)) {
        throw std::invalid_argument("the clock of parameter group " + std::to_string(i) +
                                    " would pass 2**63");
      }
      const Owned value = checked(PyLong_FromLongLong(moved));
      if (PyDict_SetItem(group, key, value.get()) != 0) throw PythonError();
    };
    move(k.updates, updates);
    move(k.samples, samples);
    publish(group, native_of);
  }
}

}  // namespace fastlr

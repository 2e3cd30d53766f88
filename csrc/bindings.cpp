// The Python module fastlr._core: conversions and argument names, no arithmetic.
#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bind_plan.h"
#include "build_info.h"
#include "cpu/step_cpu.h"
#include "groups.h"
#include "schedule.h"
#include "tensor_view.h"

#if defined(FASTLR_HAS_CUDA)
#include "cuda/step_cuda.h"
#endif

namespace py = pybind11;

namespace fastlr {
namespace {

// Reads a Python object with the fields of Segment.
Segment to_segment(const py::handle& object) {
  Segment s{};
  s.begin = object.attr("begin").cast<int64_t>();
  s.origin = object.attr("origin").cast<int64_t>();
  s.tick = object.attr("tick").cast<int64_t>();
  s.limit = object.attr("limit").cast<int64_t>();
  s.curve = object.attr("curve").cast<Curve>();
  s.window = object.attr("window").cast<Window>();
  s.decay = object.attr("decay").cast<Decay>();
  s.factor = object.attr("factor").cast<double>();
  s.start = object.attr("start").cast<double>();
  s.end = object.attr("end").cast<double>();
  s.offset = object.attr("offset").cast<double>();
  s.span = object.attr("span").cast<double>();
  s.up = object.attr("up").cast<double>();
  s.gamma = object.attr("gamma").cast<double>();
  s.period = object.attr("period").cast<int64_t>();
  s.count = object.attr("count").cast<int64_t>();
  s.table_begin = object.attr("table_begin").cast<int64_t>();
  return s;
}

NativeSchedule make_schedule(const py::sequence& segments, std::vector<double> table, int64_t end,
                             bool in_samples) {
  NativeSchedule schedule{{}, std::move(table), end, in_samples};
  for (const py::handle segment : segments) schedule.segments.push_back(to_segment(segment));
  if (schedule.segments.empty()) throw std::invalid_argument("a schedule needs a segment");
  return schedule;
}

py::array_t<double> schedule_values(const NativeSchedule& schedule, int64_t start, int64_t stop) {
  py::array_t<double> values(stop - start);
  double* out = values.mutable_data();
  for (int64_t clock = start; clock < stop; ++clock) {
    out[clock - start] = schedule_value(schedule, clock);
  }
  return values;
}

py::dict build_info() {
  py::dict info;
#if defined(__VERSION__)
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["cuda"] = kHasCuda;
  info["cuda_status"] = kCudaStatus;
#if defined(FASTLR_HAS_CUDA)
  info["cuda_driver"] = cuda::version_text(cuda::driver_version());
#endif
  py::list levels;
  for (const SimdLevel& level : usable_simd_levels()) levels.append(level.name);
  info["simd_levels"] = levels;
  info["simd_level"] = simd_level();
  info["openmp_runtime"] = openmp_runtime();
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "fastlr's native code; see _core.pyi";

  py::native_enum<Curve>(m, "Curve", "enum.Enum")
      .value("CONSTANT", Curve::kConstant)
      .value("LINE", Curve::kLine)
      .value("COSINE", Curve::kCosine)
      .value("RESTARTS", Curve::kRestarts)
      .value("POLYNOMIAL", Curve::kPolynomial)
      .value("TIME_BASED", Curve::kTimeBased)
      .value("EXPONENTIAL", Curve::kExponential)
      .value("CYCLE", Curve::kCycle)
      .value("TABLE", Curve::kTable)
      .finalize();
  py::native_enum<Window>(m, "Window", "enum.Enum")
      .value("LINEAR", Window::kLinear)
      .value("GEOMETRIC", Window::kGeometric)
      .value("PARABOLIC", Window::kParabolic)
      .value("SINUSOIDAL", Window::kSinusoidal)
      .finalize();
  py::native_enum<Decay>(m, "Decay", "enum.Enum")
      .value("NONE", Decay::kNone)
      .value("HALVING", Decay::kHalving)
      .value("HEIGHT", Decay::kHeight)
      .value("BOTH_BOUNDS", Decay::kBothBounds)
      .finalize();
  m.attr("ENDLESS") = kEndless;

  py::class_<NativeSchedule>(m, "Schedule")
      .def(py::init(&make_schedule), py::arg("segments"), py::arg("table"), py::arg("end"),
           py::arg("in_samples"))
      .def("value", &schedule_value, py::arg("clock"))
      .def("values", &schedule_values, py::arg("start"), py::arg("stop"));

  bind_plan(m);

  m.def(
      "update_groups",
      [](const py::list& param_groups, const py::list& changes) {
        with_python_errors([&] { update_groups(param_groups.ptr(), changes.ptr()); });
      },
      py::arg("param_groups"), py::arg("changes"));
  m.def("build_info", &build_info);
  m.attr("CUDA_REMEDY") = kCudaRemedy;
  m.def("set_simd_level", &set_simd_level, py::arg("name"));
  m.def(
      "exchange_available",
      [](const py::type& type) { return TensorReader::exchange_available(type.ptr()); },
      py::arg("tensor_type"));
  m.def("exchange_enabled", &TensorReader::exchange_enabled);
  m.def("set_exchange_enabled", &TensorReader::set_exchange_enabled, py::arg("enabled"));
}

}  // namespace fastlr

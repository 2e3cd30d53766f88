// Binds the native step and the norm. Apart from bindings.cpp because the tests load a second build
// of it, in which CUDA is emulated, beside the module: hence module_local.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "groups.h"
#include "owned.h"
#include "placement.h"
#include "plan.h"
#include "squared_norm.h"

namespace fastlr {

namespace py = pybind11;

// Runs a function that may leave a Python error set.
template <typename Function>
auto with_python_errors(Function function) {
  try {
    return function();
  } catch (const PythonError&) {
    throw py::error_already_set();
  }
}

inline const NativeSchedule* native_of(PyObject* native) {
  if (!py::isinstance<NativeSchedule>(native)) return nullptr;
  return py::handle(native).cast<const NativeSchedule*>();
}

inline std::vector<std::string> slot_names(const Plan& plan, uint32_t slots) {
  std::vector<std::string> names;
  for (int k = 0; k < kMaxSlots; ++k) {
    if (is_live(slots, k) && plan.rule().slot[k] != nullptr) names.push_back(plan.rule().slot[k]);
  }
  return names;
}

inline void bind_plan(py::module_& m) {
  py::class_<Option>(m, "Option", py::module_local())
      .def_readonly("name", &Option::name)
      .def_readonly("flag", &Option::flag)
      .def_readonly("scheduled", &Option::scheduled)
      .def_property_readonly("may_be_none", &Option::may_be_none)
      .def_readonly("reason", &Option::reason)
      .def_readonly("tuple", &Option::tuple)
      .def_readonly("place", &Option::place)
      .def_property_readonly("range", [](const Option& option) { return option.range.text(); })
      .def(
          "bounds", [](const Option& option, double value) { return option.range.bounds(value); },
          py::arg("value"));
  py::class_<Plan>(m, "Plan", py::module_local())
      .def(py::init([](const std::string& rule, const py::object& runtime,
                       const Groups::OtherNames& other_names) {
             const Rule* const found = find_rule(rule);
             if (found == nullptr) throw std::invalid_argument("there is no rule " + rule);
             return with_python_errors(
                 [&] { return new Plan(*found, runtime.ptr(), native_of, other_names); });
           }),
           py::arg("rule"), py::arg("runtime"), py::arg("other_names") = Groups::OtherNames())
      .def("options",
           [](const Plan& plan) {
             py::list options;
             for (int i = 0; i < plan.rule().options; ++i) {
               options.append(py::cast(&plan.rule().option[i], py::return_value_policy::reference));
             }
             return options;
           })
      .def("slots", [](const Plan& plan) { return slot_names(plan, kRuleSlots); })
      .def("stage_slots", [](const Plan& plan) { return slot_names(plan, ~kRuleSlots); })
      .def("slots_of_other_rules",
           [](const Plan& plan) { return slots_of_other_rules(plan.rule()); })
      .def("always_live",
           [](const Plan& plan) { return slot_names(plan, plan.rule().always_live); })
      .def("counts_steps", [](const Plan& plan) { return plan.rule().counts_steps; })
      .def("starts_with_state", [](const Plan& plan) { return plan.rule().starts_with_state; })
      .def("live_slots", &Plan::live_slots, py::arg("values"))
      .def("initial_state", &Plan::initial_state, py::arg("values"))
      .def("check", &Plan::check, py::arg("values"), py::arg("where"))
      .def(
          "check_owned",
          [](const Plan& plan, py::list param_groups, Py_ssize_t index,
             const std::vector<std::string>& but_for) {
            if (index < 0 || index >= PyList_GET_SIZE(param_groups.ptr())) {
              throw py::index_error("there is no such parameter group");
            }
            with_python_errors([&] { plan.check_owned(param_groups.ptr(), index, but_for); });
          },
          py::arg("param_groups"), py::arg("index"), py::arg("but_for"))
      .def(
          "publish",
          [](const Plan& plan, py::list param_groups) {
            with_python_errors([&] { plan.publish(param_groups.ptr()); });
          },
          py::arg("param_groups"))
      .def(
          "step",
          [](Plan& plan, py::object param_groups, py::object state, py::object found_inf,
             py::object grad_scale, bool seeks_inf, int threads, bool measures_norm,
             double max_norm, bool raises, int64_t samples) {
            with_python_errors([&] {
              plan.step(param_groups.ptr(), state.ptr(),
                        {found_inf.ptr(), grad_scale.ptr(), seeks_inf, threads, measures_norm,
                         max_norm, raises, samples});
            });
          },
          py::arg("param_groups"), py::arg("state"), py::arg("found_inf"), py::arg("grad_scale"),
          py::arg("seeks_inf"), py::arg("threads"), py::arg("measures_norm"), py::arg("max_norm"),
          py::arg("raises"), py::arg("samples"))
      .def("hold", &Plan::hold)
      .def("release", &Plan::release)
      .def_property("skipped", &Plan::skipped, &Plan::set_skipped)
      .def("skipped_on_device",
           [](const Plan& plan) {
             return with_python_errors([&] {
               return py::reinterpret_steal<py::object>(plan.skipped_on_device().release());
             });
           })
      .def("squared_norm",
           [](Plan& plan) {
             return with_python_errors(
                 [&] { return py::reinterpret_steal<py::object>(plan.squared_norm()); });
           })
      .def(
          "advance_samples",
          [](Plan& plan, py::list param_groups, int64_t samples) {
            with_python_errors([&] { plan.advance_samples(param_groups.ptr(), samples); });
          },
          py::arg("param_groups"), py::arg("samples"))
      .def(
          "refuse_capture",
          [](Plan& plan, const char* what) {
            with_python_errors([&] { plan.refuse_capture(what); });
          },
          py::arg("what"))
      .def(
          "push",
          [](Plan& plan, py::list param_groups) {
            with_python_errors([&] { plan.push(param_groups.ptr()); });
          },
          py::arg("param_groups"))
      .def(
          "sync",
          [](Plan& plan, py::list param_groups) {
            with_python_errors([&] { plan.sync(param_groups.ptr()); });
          },
          py::arg("param_groups"))
      .def("captured", &Plan::captured);
  py::class_<SquaredNorm>(m, "SquaredNorm", py::module_local())
      .def(py::init([](const py::object& runtime) { return new SquaredNorm(runtime.ptr()); }),
           py::arg("runtime"))
      .def(
          "measure",
          [](SquaredNorm& norm, const py::list& tensors, int threads) {
            py::list others;
            const double sum = with_python_errors(
                [&] { return norm.measure(tensors.ptr(), threads, others.ptr()); });
            return py::make_tuple(sum, others);
          },
          py::arg("tensors"), py::arg("threads"));
  m.def("route_host_to_cuda", &route_host_to_cuda, py::arg("devices"));
}

}  // namespace fastlr

// Binds the native step and the norm. Apart from bindings.cpp because the tests load a second build
// of it, in which CUDA is emulated, beside the module: hence module_local.
#pragma once

#include <pybind11/pybind11.h>

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

inline void bind_plan(py::module_& m) {
  py::class_<SgdPlan>(m, "SgdPlan", py::module_local())
      .def(
          py::init([](const py::object& runtime) { return new SgdPlan(runtime.ptr(), native_of); }),
          py::arg("runtime"))
      .def(
          "step",
          [](SgdPlan& plan, py::object param_groups, py::object state, py::object found_inf,
             py::object grad_scale, int threads, bool measures_norm, int64_t samples) {
            with_python_errors([&] {
              plan.step(param_groups.ptr(), state.ptr(),
                        {found_inf.ptr(), grad_scale.ptr(), threads, measures_norm, samples});
            });
          },
          py::arg("param_groups"), py::arg("state"), py::arg("found_inf"), py::arg("grad_scale"),
          py::arg("threads"), py::arg("measures_norm"), py::arg("samples"))
      .def_property("skipped", &SgdPlan::skipped, &SgdPlan::set_skipped)
      .def("squared_norm",
           [](SgdPlan& plan) {
             return with_python_errors(
                 [&] { return py::reinterpret_steal<py::object>(plan.squared_norm()); });
           })
      .def(
          "advance_samples",
          [](SgdPlan& plan, py::list param_groups, int64_t samples) {
            with_python_errors([&] { plan.advance_samples(param_groups.ptr(), samples); });
          },
          py::arg("param_groups"), py::arg("samples"))
      .def(
          "refuse_capture",
          [](SgdPlan& plan, const char* what) {
            with_python_errors([&] { plan.refuse_capture(what); });
          },
          py::arg("what"))
      .def(
          "push",
          [](SgdPlan& plan, py::list param_groups) {
            with_python_errors([&] { plan.push(param_groups.ptr()); });
          },
          py::arg("param_groups"))
      .def(
          "loaded",
          [](SgdPlan& plan, py::list uninitialized) {
            with_python_errors([&] { plan.loaded(uninitialized.ptr()); });
          },
          py::arg("uninitialized"))
      .def(
          "sync",
          [](SgdPlan& plan, py::list param_groups) {
            with_python_errors([&] { plan.sync(param_groups.ptr()); });
          },
          py::arg("param_groups"))
      .def("uninitialized",
           [](SgdPlan& plan) {
             return with_python_errors(
                 [&] { return py::reinterpret_steal<py::object>(plan.uninitialized()); });
           })
      .def("captured", &SgdPlan::captured);
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

// The native step a second time, with the CUDA code that emulator.cpp runs on the host, and the
// emulator's controls: what tests load beside fastlr._core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_plan.h"
#include "cuda/step_cuda.h"
#include "emulator.h"

PYBIND11_MODULE(_cuda_on_cpu, m) {
  namespace py = pybind11;
  fastlr::bind_plan(m);
  m.def("limit_launch_capacity", &fastlr::cuda::limit_launch_capacity, py::arg("limit"));
  m.def("launch_capacity", &fastlr::cuda::launch_capacity, py::arg("strided"));
  m.attr("CHUNK_ELEMENTS") = fastlr::kChunkElements;

  m.def("set_seed", &emulator::set_seed, py::arg("seed"));
  m.def("set_driver_version", &emulator::set_driver_version, py::arg("version"));
  m.def("set_device_count", &emulator::set_device_count, py::arg("count"));
  m.def("hold_streams", &emulator::hold_streams);
  m.def("let_streams_go", &emulator::let_streams_go);
  m.def("last_failure", &emulator::last_failure);
  m.def("reset_failure", &emulator::reset_failure);
  m.def("begin_capture", &emulator::begin_capture, py::arg("stream") = 0);
  m.def("end_capture", &emulator::end_capture, py::arg("stream") = 0);
  m.def("replay", &emulator::replay, py::arg("graph"));
  m.def("destroy", &emulator::destroy, py::arg("graph"));
  m.def("reset_statistics", &emulator::reset_statistics);
  m.def("statistics", [] {
    const emulator::Statistics s = emulator::statistics();
    py::dict result;
    result["launches"] = s.launches;
    result["replayed_launches"] = s.replayed_launches;
    result["copies"] = s.copies;
    result["uploaded_bytes"] = s.uploaded_bytes;
    result["downloaded_bytes"] = s.downloaded_bytes;
    result["stream_synchronizations"] = s.stream_synchronizations;
    result["loads_in_capture"] = s.loads_in_capture;
    py::list launches;
    for (const emulator::Launch& launch : s.recent_launches) {
      py::dict one;
      one["device"] = launch.device;
      one["stream"] = launch.stream;
      one["blocks"] = launch.grid[0];
      one["parameter_bytes"] = launch.parameter_bytes;
      launches.append(one);
    }
    result["recent_launches"] = launches;
    return result;
  });
}

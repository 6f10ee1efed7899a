// The Python module flashode._C.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "../kernels/launch.h"
#include "batched.h"
#include "driver.h"
#include "program.h"
#include "shown.h"
#include "sweep.h"

namespace py = pybind11;
using flashode::Call;
using flashode::Entry;
using flashode::Interpolant;
using flashode::ProgramSolve;
using flashode::Table;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "g++ " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

py::dict build_config() {
  using namespace py::literals;
  py::dict config("torch"_a = FLASHODE_TORCH_VERSION, "compiler"_a = kCompiler, "cuda"_a = false,
                  "cuda_architectures"_a = "", "cuda_runtime"_a = 0, "cuda_driver"_a = 0,
                  "cuda_devices"_a = 0, "cuda_error"_a = "");
#ifdef FLASHODE_WITH_CUDA
  int count = 0;
  const int error = flashode::cuda::device_count(&count);
  config["cuda"] = true;
  config["cuda_architectures"] = FLASHODE_CUDA_ARCHITECTURES;
  config["cuda_runtime"] = flashode::cuda::runtime_version();
  config["cuda_driver"] = flashode::cuda::driver_version();
  config["cuda_devices"] = error == 0 ? count : 0;
  config["cuda_error"] = error == 0 ? "" : flashode::cuda::error_text(error);
#endif
  return config;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of flashode";
  flashode::counts_of_unshared();
  m.attr("torch_version") = FLASHODE_TORCH_VERSION;
#ifdef FLASHODE_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
  m.def("build_config", &build_config);
  py::class_<Table>(m, "Table")
      .def(py::init<const std::vector<double>&, const std::vector<std::vector<double>>&,
                    const std::vector<double>&, const std::vector<double>&, bool>(),
           py::arg("c"), py::arg("a"), py::arg("b"), py::arg("b_err"), py::arg("fsal"));
  py::class_<Interpolant>(m, "Interpolant")
      .def(py::init<const std::vector<std::vector<double>>&, const std::vector<double>&,
                    const std::vector<std::vector<double>>&>(),
           py::arg("weights"), py::arg("extra_c"), py::arg("extra_a"));
  m.def("solve", &flashode::solve, py::arg("problem"), py::arg("table"), py::arg("interpolant"),
        py::arg("recording"));
  m.def("steps", &flashode::steps, py::arg("problem"), py::arg("table"), py::arg("interpolant"),
        py::arg("recording"));
  m.def("solve_batch", &flashode::solve_batch, py::arg("problem"), py::arg("table"),
        py::arg("interpolant"));
  m.def("replay", &flashode::replay, py::keep_alive<0, 2>(), py::keep_alive<0, 3>(),
        py::arg("problem"), py::arg("table"), py::arg("interpolant"), py::arg("shifts"));
  py::class_<Entry, std::shared_ptr<Entry>>(m, "Entry")
      .def(py::init<uintptr_t>(), py::arg("address"))
      .def("__call__", [](Entry& entry, uintptr_t call) { entry(*reinterpret_cast<Call*>(call)); })
      .def_property_readonly("calls", &Entry::calls)
      .def_property_readonly("seconds", &Entry::seconds);
  py::class_<ProgramSolve, std::shared_ptr<ProgramSolve>>(m, "ProgramSolve")
      .def(py::init([](uintptr_t call, const at::Tensor& y0, std::shared_ptr<Entry> solve,
                       std::shared_ptr<Entry> reverse, uintptr_t release, std::vector<int64_t> own,
                       std::vector<int64_t> differentiable, bool own_clocks, bool steps_on_times,
                       py::object memory) {
             return std::make_shared<ProgramSolve>(
                 call, y0, ProgramSolve::Parts{solve, reverse, release, own, differentiable, own_clocks,
                                               steps_on_times, memory});
           }),
           py::arg("call"), py::arg("y0"), py::arg("solve"), py::arg("reverse"), py::arg("release"),
           py::arg("own"), py::arg("differentiable"), py::arg("own_clocks"), py::arg("steps_on_times"),
           py::arg("memory"))
      .def("solve", &ProgramSolve::solve, py::arg("y0"), py::arg("inputs"), py::arg("t"), py::arg("grid"))
      .def("again", &ProgramSolve::again, py::arg("y0"), py::arg("inputs"))
      .def_property_readonly("nfe", &ProgramSolve::nfe);
  m.def("sweep", &flashode::sweep, py::arg("augmented"), py::arg("table"), py::arg("interpolant"));
}

// What the loops read of a flashode.problem.Problem, and the stream that they work on.

#include "problem.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <pybind11/stl.h>

#include <array>

#include "shown.h"

namespace flashode {
namespace {

template <class Stream>
void* handle_of(const Stream& stream, c10::Device device) {
  if constexpr (requires { stream.native_handle(); }) {
    return stream.native_handle();
  } else {  // torch before Stream::native_handle
    const py::gil_scoped_acquire gil;
    const py::object handle = py::module_::import("torch._C").attr("_cuda_getCurrentRawStream")(
        int(device.index()));
    return reinterpret_cast<void*>(handle.cast<uintptr_t>());
  }
}

}  // namespace

void* current_stream(c10::Device device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return handle_of(guard.getStream(device), device);
}

Controller controller_of(const py::object& problem) {
  const py::object control = problem.attr("control");
  const auto number = [&](const char* name) { return control.attr(name).cast<double>(); };
  const auto betas = control.attr("betas").cast<std::array<double, 3>>();
  return {control.attr("order").cast<int>(),
          number("safety"),
          number("ifactor"),
          number("dfactor"),
          number("min_step"),
          number("max_step"),
          {betas[0], betas[1], betas[2]}};
}

Tolerances tolerances_of(const py::object& problem) {
  Tolerances tol;
  const auto read = [&](const char* name, double& number, at::Tensor& each) {
    const py::object value = problem.attr(name);
    if (THPVariable_Check(value.ptr())) {
      each = unpack(value).contiguous();
    } else {
      number = value.cast<double>();
    }
  };
  read("rtol", tol.rtol, tol.each_rtol);
  read("atol", tol.atol, tol.each_atol);
  return tol;
}

Terms terms_of(const std::vector<at::Tensor>& k, const std::vector<int>& stages) {
  Terms terms;
  for (const int j : stages) terms.k[terms.count++] = k[j].const_data_ptr();
  return terms;
}

}  // namespace flashode

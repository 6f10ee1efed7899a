// The exchange with the Python field: what it is called with, and what becomes of its answer.
#pragma once

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../kernels/clock.h"
#include "native.h"
#include "shown.h"

namespace flashode {

// What a field is called with and what it returns, whatever the times are.
class Exchange {
 public:
  explicit Exchange(const py::object& problem)
      : like(unpack(problem.attr("y0")).contiguous()),
        shapes(shapes_of(problem)),
        problem_(problem),
        func_(problem.attr("func")),
        args_(problem.attr("args")) {}

  // What func returns, as it is.
  py::object value_at(py::handle time, py::handle state) {
    ++nfe;
    arguments_ = {nullptr, time.ptr(), state.ptr()};
    for (const py::handle argument : args_) arguments_.push_back(argument.ptr());
    PyObject* value =
        PyObject_Vectorcall(func_.ptr(), arguments_.data() + 1,
                            (arguments_.size() - 1) | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
    if (value == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
  }

  // The same as one tensor in the layout of the state, with its graph and not copied.
  at::Tensor flat_value(const py::object& value) {
    if (is_plain(value)) return THPVariable_Unpack(value.ptr());
    const std::vector<at::Tensor> members = plain_members(value);
    return members.empty() ? unpack(problem_.attr("slope")(value)) : at::cat(members);
  }

  // Makes `target` safe to write.
  void make_writable(Shown& target) { target.make_writable(like.sizes(), like.options(), shapes); }

  // A contiguous tensor in the layout of the state that nothing else writes. Anything unusual goes
  // through Problem.slope, which casts it or raises.
  at::Tensor slope(const py::object& value) {
    if (!is_plain(value)) {
      const std::vector<at::Tensor> members = plain_members(value);
      return members.empty() ? copied(unpack(problem_.attr("slope")(value))) : at::cat(members);
    }
    const at::Tensor& k = THPVariable_Unpack(value.ptr());
    if (!k.is_contiguous()) return k.contiguous();
    return is_ours_alone(value.ptr()) ? k : copied(k);
  }

  const at::Tensor like;     // the initial state: shape, dtype and device of every other
  const Shapes shapes;       // of the members of a tuple state
  int64_t nfe = 0;

 private:
  // Whether a value needs neither checks nor casts.
  bool is_plain(const py::object& value) const {
    return shapes.empty() && is_plain(value, like.sizes());
  }

  bool is_plain(py::handle value, at::IntArrayRef sizes) const {
    if (!THPVariable_CheckExact(value.ptr())) return false;
    const at::Tensor& k = THPVariable_Unpack(value.ptr());
    return k.scalar_type() == like.scalar_type() && k.device() == like.device() &&
           k.layout() == at::kStrided && k.sizes() == sizes && !k.is_conj() && !k.is_neg();
  }

  // The members of a tuple that need neither checks nor casts, flat; none if any does.
  std::vector<at::Tensor> plain_members(py::handle value) const {
    std::vector<at::Tensor> members;
    if (shapes.empty() || !(PyTuple_CheckExact(value.ptr()) || PyList_CheckExact(value.ptr())) ||
        py::len(value) != shapes.size()) {
      return members;
    }
    for (const py::handle member : value) {
      if (!is_plain(member, shapes[members.size()])) return {};
      members.push_back(THPVariable_Unpack(member.ptr()).reshape({-1}));
    }
    return members;
  }

  static Shapes shapes_of(const py::object& problem) {
    const py::object shapes = problem.attr("shapes");
    return shapes.is_none() ? Shapes() : shapes.cast<Shapes>();
  }

  at::Tensor copied(const at::Tensor& value) {
    if (value.requires_grad()) return value.clone();
    auto free = std::find_if(copies_.begin(), copies_.end(),
                             [](const at::Tensor& copy) { return copy.use_count() == 1; });
    if (free == copies_.end()) {
      copies_.push_back(at::empty(like.sizes(), like.options()));
      free = copies_.end() - 1;
    }
    return free->copy_(value);
  }

  const py::object problem_, func_;
  const py::tuple args_;     // what func takes after (t, y)
  std::vector<PyObject*> arguments_;
  std::vector<at::Tensor> copies_;  // our own tensors for slopes that had to be copied
};

// A field of one time for the whole state.
class Field : public Exchange {
 public:
  explicit Field(const py::object& problem)
      : Exchange(problem),
        direction(problem.attr("direction").cast<double>()),
        time_bounds_(problem.attr("time_bounds").cast<std::pair<double, double>>()) {}

  // func(t, y) at a forward time; `nudge` -1 and +1 take the last time before and the first after
  // it. `shift` is a zero that carries the gradient of the time, if any.
  at::Tensor call(double t, const Shown& y, const at::Tensor& shift, int nudge) {
    const TimeTarget time = stage_time(t, nudge);
    if (time.t.defined()) time.t.fill_(time.value);
    return call_at_stage_time(y, shift);
  }

  // The same at the time last given by stage_time.
  at::Tensor call_at_stage_time(const Shown& y, const at::Tensor& shift) {
    py::object shifted;
    if (shift.defined()) {
      shifted = wrap(time_.flat.add(shift.mul(direction).to(time_.flat.options())));
    }
    return slope(value_at(shifted ? shifted : time_.argument, y.argument));
  }

  // The time that func sees: rounded once, kept inside the interval. Written here on a CPU; on a
  // GPU the kernel that makes the state writes it, so that it costs no launch of its own.
  TimeTarget stage_time(double t, int nudge) {
    const Dtype dtype = dtype_of(like);
    const double value = time_value(t, nudge);
    time_.make_writable({}, like.options());
    if (!time_.flat.is_cpu()) return {time_.flat, value};
    write_time(time_.flat.mutable_data_ptr(), value, dtype);
    return {};
  }

  double time_value(double t, int nudge) const {
    return direction * std::clamp(round_time(t, nudge, dtype_of(like)), time_bounds_.first,
                                  time_bounds_.second);
  }

  const double direction;    // of the caller's clock

 private:
  const std::pair<double, double> time_bounds_;
  Shown time_;
};

}  // namespace flashode

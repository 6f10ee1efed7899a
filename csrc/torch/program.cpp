// Programs of compiled fields, called. A solve may take microseconds: it is called from Python once, and its
// backward pass by autograd without Python.

#include "program.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/custom_class.h>

#include <array>
#include <chrono>
#include <cmath>
#include <mutex>

#include "shown.h"

namespace flashode {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// ---- entries ---------------------------------------------------------------------------------

namespace {

// Asked by the thread that called a program: lets handlers of signals, such as Ctrl-C's, run.
int is_interrupted() {
  const py::gil_scoped_acquire gil;
  return PyErr_Occurred() != nullptr || PyErr_CheckSignals() != 0;
}

[[noreturn]] void raise(const char* error, const char* message) {
  const py::gil_scoped_acquire gil;
  const py::object kind = error == std::string_view("MemoryError")
                              ? py::reinterpret_borrow<py::object>(PyExc_MemoryError)
                              : py::module_::import("flashode").attr(error);
  PyErr_SetString(kind.ptr(), message);
  throw py::error_already_set();
}

}  // namespace

void Entry::operator()(Call& call) {
  const auto began = std::chrono::steady_clock::now();
  std::optional<py::gil_scoped_release> without_gil;
  if (PyGILState_Check()) {
    without_gil.emplace();
    call.interrupted = is_interrupted;
  }
  const int returned = run_(&call);
  without_gil.reset();
  ++calls_;
  nanoseconds_ += std::chrono::nanoseconds(std::chrono::steady_clock::now() - began).count();
  if (returned == kInterrupted) throw py::error_already_set();
  if (returned == kOutOfMemory) {
    raise("MemoryError",
          "not enough memory for the steps of this solve, which its backward pass needs: solve under "
          "torch.no_grad(), or fewer samples at a time");
  }
}

// ---- solves ----------------------------------------------------------------------------------

// One call of a program, with all that it points to.
struct Solved : torch::CustomClassHolder {
  explicit Solved(std::shared_ptr<const ProgramSolve> solve) : of(std::move(solve)), call(of->call_) {}
  ~Solved() override { release(); }

  bool has_succeeded() const {
    return each_whole.defined() ? !each_whole.select(0, 0).any().item<bool>() : whole[0] == 0;
  }

  // Gives back the recorded steps.
  void release() {
    if (call.recording) reinterpret_cast<void (*)(void*)>(of->parts_.release)(call.recording);
    call.recording = nullptr;
  }

  const std::shared_ptr<const ProgramSolve> of;
  Call call;
  at::Tensor ys, y_end;
  std::vector<at::Tensor> memory;       // of the inputs and then of the start, as the program reads them
  std::vector<void*> inputs, own;       // where they are
  std::array<int64_t, 4> whole;         // status, accepted, rejected, filled: of one clock,
  std::array<double, 3> real;           // and t, dt, error_ratio
  at::Tensor each_whole, each_real;     // or a column of them for every sample
  std::mutex busy;
};

namespace {

std::vector<void*> addresses_of(const std::vector<at::Tensor>& tensors) {
  std::vector<void*> found;
  for (const at::Tensor& x : tensors) found.push_back(x.defined() ? x.data_ptr() : nullptr);
  return found;
}

std::vector<void*> chosen(const std::vector<void*>& from, const std::vector<int64_t>& which) {
  std::vector<void*> found;
  for (const int64_t i : which) found.push_back(from[size_t(i)]);
  return found;
}

template <class Real>
bool are_finite(const at::Tensor& x) {
  const Real* const begin = x.const_data_ptr<Real>();
  return std::all_of(begin, begin + x.numel(), [](Real number) { return std::isfinite(number); });
}

}  // namespace

ProgramSolve::ProgramSolve(uintptr_t call, const at::Tensor& y0, Parts parts)
    : call_(*reinterpret_cast<const Call*>(call)),
      parts_(std::move(parts)),
      shape_(y0.sizes().vec()),
      dtype_(y0.scalar_type()),
      requires_grad_(y0.requires_grad()),
      grad_mode_(at::GradMode::is_enabled()),
      modes_(c10::impl::tls_local_dispatch_key_set()) {}

ProgramSolve::~ProgramSolve() {  // where the graph was that held it, which may be without the GIL
  if (!Py_IsInitialized()) {
    parts_.memory.release();
    return;
  }
  const py::gil_scoped_acquire gil;
  parts_.memory = py::object();
}

// Contiguous memory with the values of a tensor: its own, if it is so.
at::Tensor ProgramSolve::plain(const at::Tensor& x) const {
  at::Tensor values = x.variable_data();  // holds the memory even where x.data = ... gives x another
  if (!values.is_cpu() || values.scalar_type() != dtype_) values = values.to(at::kCPU, dtype_);
  return values.resolve_neg().contiguous();
}

c10::intrusive_ptr<Solved> ProgramSolve::run(const at::Tensor& y0, const std::vector<at::Tensor>& inputs) const {
  auto solved = c10::make_intrusive<Solved>(shared_from_this());
  Solved& s = *solved;
  Call& call = s.call;
  for (const at::Tensor& x : inputs) s.memory.push_back(plain(x));
  s.memory.push_back(plain(y0));
  s.inputs = addresses_of(s.memory), s.own = chosen(s.inputs, parts_.own);
  call.inputs = s.inputs.data(), call.own = s.own.data();
  const at::Tensor& start = s.memory.back();
  std::vector<int64_t> rows = {call.outputs};
  rows.insert(rows.end(), shape_.begin(), shape_.end());
  s.ys = at::empty(rows, start.options()), s.y_end = at::empty_like(start);
  call.y0 = start.const_data_ptr();
  call.ys = s.ys.mutable_data_ptr(), call.y_end = s.y_end.mutable_data_ptr();

  int64_t n = 1, *whole = s.whole.data();
  double* real = s.real.data();
  if (parts_.own_clocks) {
    n = call.samples;
    s.each_whole = at::empty({4, n}, at::kLong), s.each_real = at::empty({3, n}, at::kDouble);
    whole = s.each_whole.mutable_data_ptr<int64_t>(), real = s.each_real.mutable_data_ptr<double>();
  }
  call.status = whole, call.accepted = whole + n, call.rejected = whole + 2 * n, call.filled = whole + 3 * n;
  call.t = real, call.dt = real + n, call.error_ratio = real + 2 * n;
  call.threads = at::get_num_threads();
  call.records = parts_.reverse != nullptr;
  (*parts_.solve)(call);
  nfe_ = call.nfe;
  return solved;
}

void ProgramSolve::pull_back(Solved& s, const at::Tensor& grad_ys, at::Tensor& adj_y0,
                             std::vector<at::Tensor>& adj_inputs, at::Tensor& adj_t, at::Tensor& adj_grid) const {
  const std::lock_guard<std::mutex> alone(s.busy);
  TORCH_CHECK(s.call.recording, torch::autograd::ERR_BACKWARD_TWICE);
  const at::Tensor cotangents = plain(grad_ys);
  adj_y0 = at::zeros_like(s.memory.back());
  adj_inputs.resize(s.memory.size() - 1);
  for (const int64_t i : parts_.differentiable) adj_inputs[size_t(i)] = at::zeros_like(s.memory[size_t(i)]);
  const std::vector<void*> grad_inputs = addresses_of(adj_inputs), grad_own = chosen(grad_inputs, parts_.own);
  Call call = s.call;
  call.grad_ys = cotangents.const_data_ptr(), call.adj_y0 = adj_y0.mutable_data_ptr();
  call.grad_inputs = grad_inputs.data(), call.grad_own = grad_own.data();
  // Where steps are from one time to the next, an output is the end of a step and moves with it.
  if (parts_.steps_on_times) adj_t.reset();
  call.grad_t = adj_t.defined() ? adj_t.mutable_data_ptr<double>() : nullptr;
  call.grad_grid = adj_grid.defined() ? adj_grid.mutable_data_ptr<double>() : nullptr;
  (*parts_.reverse)(call);
  if (!torch::autograd::get_current_graph_task_keep_graph()) s.release();
}

// ---- gradients -------------------------------------------------------------------------------

namespace {

// Gradients that cannot be differentiated again, and say so: without a graph, second ones would be taken for zero.
struct FirstOnly : Function<FirstOnly> {
  static variable_list forward(AutogradContext*, at::TensorList /*that they depend on*/, at::TensorList grads) {
    variable_list passed;
    for (const at::Tensor& grad : grads) passed.push_back(grad.alias());
    return passed;
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "a compiled field gives first derivatives only; for second ones (create_graph=True, gradient "
                "penalties) solve with func itself, uncompiled");
  }
};

// Of the backward pass that is under way. What it leads to is what its gradients depend on, and so is `cotangents`:
// from there autograd has to come upon FirstOnly, or it would say that they do not depend on it.
variable_list first_only(variable_list grads, const at::Tensor& cotangents) {
  variable_list origins = {cotangents}, defined;
  for (const auto& edge : torch::autograd::get_current_node()->next_edges()) {
    if (!edge.is_valid()) continue;
    origins.push_back(at::empty({0}));
    torch::autograd::impl::set_gradient_edge(origins.back(), edge);
  }
  for (const at::Tensor& grad : grads) {
    if (grad.defined()) defined.push_back(grad);
  }
  const variable_list passed = FirstOnly::apply(at::TensorList(origins), at::TensorList(defined));
  auto next = passed.begin();
  for (at::Tensor& grad : grads) {
    if (grad.defined()) grad = *next++;
  }
  return grads;
}

struct ProgramBackward : Function<ProgramBackward> {
  using Solution = c10::intrusive_ptr<Solved>;

  static at::Tensor forward(AutogradContext* context, const Solution& solved, const std::vector<at::Tensor>* inputs,
                            const at::Tensor& /*y0*/, const std::optional<at::Tensor>& t,
                            const std::optional<at::Tensor>& grid, at::TensorList /*differentiable*/) {
    context->save_for_backward(*inputs);  // autograd says so where one is written to in between
    context->saved_data["solved"] = c10::IValue::make_capsule(solved);
    context->saved_data["t"] = t;
    context->saved_data["grid"] = grid;
    return std::move(solved->ys);  // kept, it would hold the graph that it is held by
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const c10::DispatchKeySet keys = grads[0].key_set();
    if (keys.has(c10::DispatchKey::Batched) || keys.has(c10::DispatchKey::FuncTorchBatched)) {
      raise("ArgumentError",
            "the backward pass of a compiled field takes one gradient at a time: leave out is_grads_batched=True or "
            "vectorize=True, or solve with func itself");
    }
    const bool again = at::GradMode::is_enabled();
    const at::AutoGradMode no_graph(false);
    const variable_list inputs = context->get_saved_variables();
    const auto solved = c10::static_intrusive_pointer_cast<Solved>(context->saved_data["solved"].toCapsule());
    const at::Tensor t = of_times(context, "t"), grid = of_times(context, "grid");
    const auto zeros = [](const at::Tensor& x) {
      return x.defined() ? at::zeros(x.sizes(), x.options().device(at::kCPU).dtype(at::kDouble)) : x;
    };
    at::Tensor adj_y0, adj_t = zeros(t), adj_grid = zeros(grid);
    std::vector<at::Tensor> adj_inputs;
    solved->of->pull_back(*solved, grads[0], adj_y0, adj_inputs, adj_t, adj_grid);
    variable_list found = {{}, {}, adj_y0, adj_t.defined() ? adj_t.to(t.options()) : adj_t,
                           adj_grid.defined() ? adj_grid.to(grid.options()) : adj_grid};
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (adj_inputs[i].defined()) found.push_back(adj_inputs[i].to(inputs[i].options()));
    }
    if (!again) return found;
    const at::AutoGradMode graph(true);
    return first_only(std::move(found), grads[0]);
  }

  static at::Tensor of_times(AutogradContext* context, const char* name) {
    return context->saved_data[name].toOptional<at::Tensor>().value_or(at::Tensor());
  }
};

// The outputs, with a graph where anything has gradients.
at::Tensor recorded(const ProgramBackward::Solution& solved, const std::vector<int64_t>& differentiable,
                    const at::Tensor& y0, const std::vector<at::Tensor>& inputs, const std::optional<at::Tensor>& t,
                    const std::optional<at::Tensor>& grid) {
  variable_list with_gradients;
  for (const int64_t i : differentiable) with_gradients.push_back(inputs[size_t(i)]);
  return ProgramBackward::apply(solved, &inputs, y0, t, grid, at::TensorList(with_gradients));
}

}  // namespace

// ---- from Python -----------------------------------------------------------------------------

py::dict ProgramSolve::solve(const at::Tensor& y0, const std::vector<at::Tensor>& inputs,
                             const std::optional<at::Tensor>& t, const std::optional<at::Tensor>& grid) const {
  using namespace py::literals;
  // Times of samples move their starts, to which the caller may have written by then.
  const auto solved = run(t && parts_.own_clocks ? y0.detach().clone() : y0, inputs);
  const Solved& s = *solved;
  const at::Tensor ys = parts_.reverse ? recorded(solved, parts_.differentiable, y0, inputs, t, grid) : s.ys;
  py::dict fields("ys"_a = wrap(ys), "nfe"_a = s.call.nfe);
  if (parts_.own_clocks) {
    const char* const whole[] = {"status", "accepted", "rejected", "filled"};
    const char* const real[] = {"t", "dt", "error_ratio"};
    for (int64_t i = 0; i < 4; ++i) fields[whole[i]] = wrap(s.each_whole.select(0, i));
    for (int64_t i = 0; i < 3; ++i) fields[real[i]] = wrap(s.each_real.select(0, i));
    return fields;
  }
  const auto [status, accepted, rejected, filled] = s.whole;
  fields["status"] = status, fields["accepted"] = accepted, fields["rejected"] = rejected;
  fields["t"] = s.real[0], fields["dt"] = s.real[1], fields["error_ratio"] = s.real[2];
  fields["y1"] = wrap(s.y_end);
  fields["accepted_times"] = py::bytes(reinterpret_cast<const char*>(s.call.accepted_times),
                                       accepted ? size_t(accepted) * sizeof(double) : 0);
  return fields;
}

bool ProgramSolve::is_alike(const at::Tensor& y0) const {
  const c10::impl::LocalDispatchKeySet modes = c10::impl::tls_local_dispatch_key_set();
  return y0.is_cpu() && y0.layout() == at::kStrided && y0.scalar_type() == dtype_ && y0.sizes() == shape_ &&
         y0.requires_grad() == requires_grad_ && at::GradMode::is_enabled() == grad_mode_ &&
         modes.included_ == modes_.included_ && modes.excluded_ == modes_.excluded_;
}

py::object ProgramSolve::again(py::handle y0, const std::vector<at::Tensor>& inputs) const {
  if (!THPVariable_CheckExact(y0.ptr())) return py::none();
  const at::Tensor& start = THPVariable_Unpack(y0.ptr());
  if (!is_alike(start)) return py::none();
  const at::Tensor values = plain(start);
  if (!(dtype_ == at::kFloat ? are_finite<float>(values) : are_finite<double>(values))) return py::none();
  const auto solved = run(values, inputs);
  if (!solved->has_succeeded()) return py::none();
  return wrap(parts_.reverse ? recorded(solved, parts_.differentiable, start, inputs, {}, {}) : solved->ys);
}

}  // namespace flashode

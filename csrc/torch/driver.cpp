// The native engine: a solve as a C++ loop over an opaque Python field.
//
// The twin of python/flashode/engines/reference.py: the same functions in the same order. What is
// added here is speed: no copy, no allocation and no Python object that a call of the field does
// not need. Two promises shape the code. Tensors handed to the field belong to the user: one is
// written again only when its reference counts prove that nobody kept it. And what the field
// returns may be a buffer that it reuses: it is copied, unless its counts prove it is ours alone.

#include "driver.h"

#include <ATen/DeviceGuard.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros_like.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "field.h"
#include "native.h"
#include "problem.h"
#include "shown.h"

namespace flashode {

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kReleaseGil = 1 << 16;  // elements from which other threads get to run

enum Landing { kFree, kStop, kJump, kEnd };  // what the end of a step lands on

// A slope to hand to Python. The field's own memory for slopes is used again only while no Python
// object has been made for it.
at::Tensor for_python(const at::Tensor& k) { return k.requires_grad() ? k : k.clone(); }

// An accepted step. shift0 and shift1 are zeros that carry the gradients of t0 and t1, if any.
struct Step {
  double t0, t1, dt;
  at::Tensor y0, y1, shift0, shift1;
};

// The state of one solve.
class Run {
 public:
  Run(py::handle problem, const Table& table, const Interpolant& dense);
  void record(py::object recording);
  void begin();
  void start();
  Step advance();
  at::Tensor states_at(const Step& step, const std::vector<double>& times);
  py::dict outcome(Status status);
  py::dict solve();
  void prepare_replays(py::object shifts);
  py::tuple replay(double t0, double t1, double dt, int landing, const py::object& y0,
                   const py::object& f0, const py::object& shift0, const py::object& shift1);

 private:
  at::Tensor call_at_state(const at::Tensor& shift, int nudge);
  bool records(const at::Tensor& y0, const std::vector<int>& stages) const;
  bool combine(Shown& target, const at::Tensor& y0, const Row& row, double signed_dt,
               const TimeTarget& time = {});
  Decision error_norm(const at::Tensor& y0, const at::Tensor& y1, const Terms& k,
                      const double* coef, double dt);
  double first_step();
  bool rk_step(double t1, double dt, const at::Tensor& shift1);
  std::pair<double, Landing> landing(double t1);
  Step adaptive_step();
  Step fixed_step(double t1, const at::Tensor& shift1);
  Step commit(double t1, double dt, const at::Tensor& shift1, Landing kind);
  at::Tensor handed_on(Landing kind);
  void report(const py::object& callback, double dt);
  void extend(const Step& step);
  at::Tensor recorded_rows(const Step& step, const at::Tensor& y0, const at::Tensor& basis) const;
  at::Tensor polynomial(const Step& step);
  void interpolate(const Step& step, int64_t begin, int64_t end);
  void write_rows(const Step& step, const double* times, const at::Tensor& out);
  bool outputs_are_unseen(const Step& step) const;
  void emit(const Step& step);

  // The problem, read once.
  const py::object p_;
  const Table& table_;
  const Interpolant& dense_;
  Field field_;
  const at::Tensor& y_begin_;
  const bool adaptive_, with_time_gradient_, overshoot_, perturb_, has_norm_,
      steps_on_times_;
  const double direction_;
  const int64_t max_num_steps_;
  const std::vector<double> times_;
  const double end_;  // no step passes it
  const std::vector<std::pair<double, bool>> stops_;
  const py::object on_step_, on_accept_, on_reject_;
  Controller control_;
  Tolerances tol_;
  std::vector<double> grid_;
  at::Tensor shifts_, grid_shifts_;  // zeros with the gradients of the output times and the grid

  // Memory.
  Norm norm_;
  Shown stage_, current_, candidate_;
  at::Tensor ys_;
  std::vector<std::pair<int64_t, at::Tensor>> recorded_;  // outputs with gradients, by first row
  py::object recording_ = py::none();                     // of the accepted steps, if asked for
  bool as_polynomials_ = false;                           // whether it takes what dense output makes

  // Where the solve stands.
  std::vector<at::Tensor> k_;  // slopes of the last trial step
  at::Tensor f0_, shift0_, stretch_;
  double t0_, dt_ = kNaN, error_ratio_ = kNaN;
  bool grad_mode_ = at::GradMode::is_enabled();
  bool field_writes_ = false;  // into the state it is shown
  bool replaying_ = false;
  size_t next_stop_ = 0;
  int64_t filled_ = 1, accepted_ = 0, rejected_ = 0, trials_ = 0;
  std::vector<double> accepted_times_;
};

Run::Run(py::handle problem, const Table& table, const Interpolant& dense)
    : p_(py::reinterpret_borrow<py::object>(problem)),
      table_(table),
      dense_(dense),
      field_(p_),
      y_begin_(field_.like),
      adaptive_(p_.attr("adaptive").cast<bool>()),
      with_time_gradient_(p_.attr("differentiates_time").cast<bool>()),
      overshoot_(p_.attr("overshoot").cast<bool>()),
      perturb_(p_.attr("perturb").cast<bool>()),
      has_norm_(!p_.attr("norm").is_none()),
      steps_on_times_(p_.attr("steps_on_times").cast<bool>()),
      direction_(field_.direction),
      max_num_steps_(p_.attr("max_num_steps").cast<int64_t>()),
      times_(p_.attr("times").cast<std::vector<double>>()),
      end_(p_.attr("end").cast<double>()),
      stops_(p_.attr("stops").cast<std::vector<std::pair<double, bool>>>()),
      on_step_(p_.attr("callbacks")[py::int_(0)]),
      on_accept_(p_.attr("callbacks")[py::int_(1)]),
      on_reject_(p_.attr("callbacks")[py::int_(2)]),
      norm_(p_.attr("norm_offsets").cast<std::vector<int64_t>>()),
      t0_(times_[0]) {
  control_ = controller_of(p_);
  tol_ = tolerances_of(p_);
  if (!adaptive_) {
    const at::Tensor grid = unpack(p_.attr("grid")), values = grid.detach().contiguous();
    grid_.assign(values.const_data_ptr<double>(), values.const_data_ptr<double>() + values.numel());
    if (with_time_gradient_) grid_shifts_ = grid.sub(values);
  }
  if (with_time_gradient_) {
    // x - x.detach() is zero and has the gradient of x.
    const at::Tensor t = unpack(p_.attr("t")).to(at::kCPU, at::kDouble);
    shifts_ = t.sub(t.detach()).mul(direction_);
    shift0_ = (adaptive_ ? shifts_ : grid_shifts_).select(0, 0);
  }
}

// Memory for the outputs, and the first of them.
void Run::begin() {
  std::vector<int64_t> shape = y_begin_.sizes().vec();
  shape.insert(shape.begin(), int64_t(times_.size()));
  ys_ = at::empty(shape, y_begin_.options());
  ys_.select(0, 0).copy_(y_begin_.detach());
  if (records(y_begin_, {})) {
    recorded_.emplace_back(0, y_begin_.unsqueeze(0));
    current_.adopt(y_begin_.clone(), field_.shapes);
  } else {
    field_.make_writable(current_);
    current_.flat.copy_(y_begin_.detach());
  }
}

py::dict Run::outcome(Status status) {
  if (filled_ < ys_.size(0)) ys_.narrow(0, filled_, ys_.size(0) - filled_).fill_(kNaN);
  at::Tensor ys = ys_;
  if (!recorded_.empty()) {
    std::vector<at::Tensor> pieces;
    int64_t row = 0;
    const auto fill_to = [&](int64_t end) {
      if (end > row) pieces.push_back(ys_.narrow(0, row, end - row));
    };
    for (const auto& [begin, rows] : recorded_) {
      fill_to(begin);
      pieces.push_back(rows);
      row = begin + rows.size(0);
    }
    fill_to(ys_.size(0));
    ys = at::cat(pieces);
  }
  py::list k;
  for (const at::Tensor& k_j : k_) k.append(wrap(k_j));
  using namespace py::literals;
  return py::dict("status"_a = int(status), "ys"_a = wrap(ys), "nfe"_a = field_.nfe,
                  "accepted"_a = accepted_, "rejected"_a = rejected_,
                  "accepted_times"_a = accepted_times_, "t"_a = t0_, "dt"_a = dt_,
                  "error_ratio"_a = error_ratio_, "k"_a = k,
                  "y1"_a = wrap((candidate_.flat.defined() ? candidate_ : current_).flat));
}

// func at the current state. A field that writes into its argument must not change the state.
at::Tensor Run::call_at_state(const at::Tensor& shift, int nudge) {
  if (field_writes_) {
    if (grad_mode_ && current_.flat.requires_grad()) {
      stage_.adopt(current_.flat.clone(), field_.shapes);
    } else {
      field_.make_writable(stage_);
      stage_.flat.copy_(current_.flat.detach());
    }
    return field_.call(t0_, stage_, shift, nudge);
  }
  const int64_t version = current_.version();
  const at::Tensor k = field_.call(t0_, current_, shift, nudge);
  if (!current_.written_since(version)) return k;
  field_writes_ = true;
  if (field_.nfe > 1) {
    PyErr_SetString(py::module_::import("flashode").attr("ArgumentError").ptr(),
                    "func changed its argument y in place, which it had left alone before; return a "
                    "new Tensor, or write to y.clone()");
    throw py::error_already_set();
  }
  const bool recorded = !recorded_.empty();
  if (recorded) {
    current_.adopt(y_begin_.clone(), field_.shapes);
  } else {
    field_.make_writable(current_);
    current_.flat.copy_(y_begin_);
  }
  return k;
}

// Whether y0 + sum_j coef_j k_j over these stages has a gradient to carry.
bool Run::records(const at::Tensor& y0, const std::vector<int>& stages) const {
  return grad_mode_ && (y0.requires_grad() || stretch_.defined() ||
                        std::any_of(stages.begin(), stages.end(),
                                    [&](int j) { return k_[j].requires_grad(); }));
}

// target = y0 + signed_dt * sum_j row_j k_j. Returns whether it is finite, where that is free.
bool Run::combine(Shown& target, const at::Tensor& y0, const Row& row, double signed_dt,
                  const TimeTarget& time) {
  double coef[kMaxTerms];
  for (size_t j = 0; j < row.weight.size(); ++j) coef[j] = row.weight[j] * signed_dt;
  if (records(y0, row.stage)) {
    at::Tensor coefficients = at::tensor(at::ArrayRef<double>(coef, row.weight.size()));
    if (stretch_.defined()) {
      coefficients = coefficients.add(
          at::tensor(at::ArrayRef<double>(row.weight)).mul(stretch_).mul(direction_));
    }
    std::vector<at::Tensor> k;
    for (const int j : row.stage) k.push_back(k_[j]);
    target.adopt(combine_op(y0, k, coefficients), field_.shapes);
    if (time.t.defined()) time.t.fill_(time.value);
    return true;
  }
  field_.make_writable(target);
  std::optional<py::gil_scoped_release> release;
  if (y0.numel() >= kReleaseGil) release.emplace();
  return run_combine(y0, terms_of(k_, row.stage), coef, 1, target.flat, time);
}

Decision Run::error_norm(const at::Tensor& y0, const at::Tensor& y1, const Terms& k,
                         const double* coef, double dt) {
  if (has_norm_) {
    const at::Tensor scaled = run_scaled_error(y0, y1, k, coef, tol_);
    return decide(p_.attr("norm_value")(wrap(scaled)).cast<double>(), dt, control_);
  }
  std::optional<py::gil_scoped_release> release;
  // The one wait for a GPU: others may be needed to end it, as where they share a stream.
  if (y0.numel() >= kReleaseGil || !y0.is_cpu()) release.emplace();
  return norm_.decide(y0, y1, k, coef, tol_, dt, control_);
}

// Hairer I, II.4: an Euler step of moderate length shows how fast the field changes.
double Run::first_step() {
  const py::object given = p_.attr("first_step");
  if (!given.is_none()) return given.cast<double>();
  const at::Tensor y0 = current_.flat.detach();
  Terms of_y, of_f, of_both;
  of_y = {1, {y0.const_data_ptr()}};
  of_f = {1, {f0_.const_data_ptr()}};
  const double one = 1;
  const double d0 = error_norm(y0, y0, of_y, &one, 1).error_ratio;
  const double d1 = error_norm(y0, y0, of_f, &one, 1).error_ratio;
  if (!is_finite(d1)) {
    k_ = {f0_};
    error_ratio_ = d1;
    throw StepFailure{kNonfiniteField};
  }
  double h0 = first_guess(d0, d1);
  h0 = std::min(h0, end_ - t0_);
  const double signed_h0 = direction_ * h0;
  field_.make_writable(stage_);
  const TimeTarget time = field_.stage_time(t0_ + h0, 0);
  run_combine(y0, of_f, &signed_h0, 1, stage_.flat, time);
  const at::Tensor f1 = field_.call_at_stage_time(stage_, {});
  of_both = {2, {f1.const_data_ptr(), f0_.const_data_ptr()}};
  const double difference[] = {1, -1};
  const double d2 = error_norm(y0, y0, of_both, difference, 1).error_ratio / h0;
  return initial_step(h0, d1, d2, control_.order);
}

// All stages from (t0, y0) to t1, and the candidate y1. Returns whether y1 is finite, on a CPU.
bool Run::rk_step(double t1, double dt, const at::Tensor& shift1) {
  const double signed_dt = direction_ * dt;
  const int stages = int(table_.c.size());
  if (shift1.defined()) stretch_ = shift1.sub(shift0_);
  k_.assign(1, f0_);
  bool finite = true;
  for (int i = 1; i < stages; ++i) {
    const double c_i = table_.c[i];
    const bool at_end = c_i == 1, is_result = table_.fsal && i == stages - 1;
    const double t_i = at_end ? t1 : t0_ + c_i * dt;
    at::Tensor shift_i;
    if (shift1.defined()) shift_i = shift0_.add(stretch_.mul(c_i));
    // parity: a stage at the end of the step sees the time just before it, so that a field that
    // jumps there is taken from the left.
    const TimeTarget time = field_.stage_time(t_i, at_end && (adaptive_ || perturb_) ? -1 : 0);
    Shown& y_i = is_result ? candidate_ : stage_;
    finite = combine(y_i, current_.flat, table_.a[i], signed_dt, time);
    const int64_t version = y_i.version();
    const at::Tensor k_i = field_.call_at_stage_time(y_i, shift_i);
    if (is_result && y_i.written_since(version)) {
      field_writes_ = true;
      combine(y_i, current_.flat, table_.a[i], signed_dt);
    }
    k_.push_back(k_i);
  }
  return table_.fsal ? finite : combine(candidate_, current_.flat, table_.b, signed_dt);
}

// The end of the next step, moved back to the first stop that it would reach or pass.
std::pair<double, Landing> Run::landing(double t1) {
  double stop = INFINITY;
  Landing kind = kFree;
  while (next_stop_ < stops_.size() && stops_[next_stop_].first <= t0_) ++next_stop_;
  if (next_stop_ < stops_.size()) {
    stop = stops_[next_stop_].first;
    kind = stops_[next_stop_].second ? kJump : kStop;
  }
  if (end_ <= stop) {
    stop = end_;
    kind = kEnd;
  }
  return t1 >= stop ? std::pair{stop, kind} : std::pair{t1, kFree};
}

// Tries steps until one is accepted.
Step Run::adaptive_step() {
  while (true) {
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (trials_ >= max_num_steps_) throw StepFailure{kMaxSteps};
    ++trials_;
    dt_ = clamp_step(dt_, control_);
    const auto [t1, kind] = landing(t0_ + dt_);
    if (!(t1 > t0_) || dt_ < std::numeric_limits<double>::min()) throw StepFailure{kStepUnderflow};
    // A free step keeps its own length: t1 - t0 is rounded. No rounding lengthens a step, or one
    // of min_step would be refused, and one near the resolution of t never shrink.
    const double dt = dt_ = kind == kFree ? dt_ : std::min(dt_, t1 - t0_);
    report(on_step_, dt);
    at::Tensor shift1 = shift0_;
    if (shift1.defined() && kind != kFree) {
      shift1 = kind == kEnd ? shifts_.select(0, -1) : shift1.detach();
    }
    rk_step(t1, dt, shift1);
    double coef[kMaxTerms];
    const Row& row = table_.b_err;
    for (size_t j = 0; j < row.weight.size(); ++j) coef[j] = direction_ * dt * row.weight[j];
    const Decision decision =
        error_norm(current_.flat, candidate_.flat, terms_of(k_, row.stage), coef, dt);
    error_ratio_ = decision.error_ratio;
    dt_ = decision.next_dt;
    if (decision.accepted) {
      remember(error_ratio_, control_);
      report(on_accept_, dt);
      const Step step = commit(t1, dt, shift1, kind);
      f0_ = handed_on(kind);
      return step;
    }
    ++rejected_;
    report(on_reject_, dt);
    if (!is_finite(error_ratio_) &&
        (dt <= control_.min_step || !at::isfinite(f0_).all().item<bool>())) {
      throw StepFailure{kNonfiniteField};
    }
  }
}

// One step of a prescribed length.
Step Run::fixed_step(double t1, const at::Tensor& shift1) {
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  dt_ = t1 - t0_;
  report(on_step_, dt_);
  f0_ = call_at_state(shift0_, perturb_ ? 1 : 0);
  bool finite = rk_step(t1, dt_, shift1);
  const at::Tensor& y1 = candidate_.flat;
  if (y1.requires_grad() && y1.is_cpu()) finite = at::isfinite(y1).all().item<bool>();
  if (!finite) throw StepFailure{kNonfiniteField};
  return commit(t1, dt_, shift1, kFree);
}

// Makes the candidate the state.
Step Run::commit(double t1, double dt, const at::Tensor& shift1, Landing kind) {
  const Step step{t0_, t1, dt, current_.flat, candidate_.flat, shift0_, shift1};
  if (as_polynomials_) {
    recording_.attr("add")(t0_, t1, wrap(polynomial(step)), wrap(step.shift0), wrap(step.shift1));
  } else if (!recording_.is_none() && recording_.attr("add")(t0_, t1, dt, int(kind)).cast<bool>()) {
    recording_.attr("hold")(wrap(step.y0), wrap(adaptive_ ? for_python(k_[0]) : at::Tensor()));
  }
  std::swap(current_, candidate_);
  t0_ = t1;
  shift0_ = shift1;
  ++accepted_;
  accepted_times_.push_back(t1);
  return step;
}

// The slope that the next step begins with.
at::Tensor Run::handed_on(Landing kind) {
  // parity: the last stage is the next step's f0, for every method.
  return kind == kJump ? call_at_state(shift0_, 1) : k_[table_.c.size() - 1];
}

void Run::report(const py::object& callback, double dt) {
  if (!callback.is_none()) p_.attr("report")(callback, t0_, wrap(current_.flat), dt);
}

// Evaluates the stages that dense output adds, unless they are there.
void Run::extend(const Step& step) {
  if (k_.size() > table_.c.size()) return;
  for (size_t i = 0; i < dense_.extra_c.size(); ++i) {
    const double c_i = dense_.extra_c[i];
    const double t_i = c_i == 1 ? step.t1 : step.t0 + c_i * step.dt;
    at::Tensor shift_i;
    if (stretch_.defined()) shift_i = step.shift0.add(stretch_.mul(c_i));
    const TimeTarget time = field_.stage_time(t_i, 0);
    combine(stage_, step.y0, dense_.extra_a[i], direction_ * step.dt, time);
    k_.push_back(field_.call_at_stage_time(stage_, shift_i));
  }
}

// y0 + dt * basis weights^T k with the graph of all of them: one row for each of the basis, which
// holds factors of the weights' coefficients of x, x^2, ...
at::Tensor Run::recorded_rows(const Step& step, const at::Tensor& y0,
                              const at::Tensor& basis) const {
  at::Tensor signed_dt = at::tensor(direction_ * step.dt, at::kDouble);
  if (stretch_.defined()) signed_dt = signed_dt.add(stretch_.mul(direction_));
  const int64_t stages = int64_t(dense_.stage.size());
  std::vector<double> flat;
  std::vector<at::Tensor> k;
  for (int64_t j = 0; j < stages; ++j) {
    flat.insert(flat.end(), dense_.weights[j].begin(), dense_.weights[j].end());
    k.push_back(k_[dense_.stage[j]]);
  }
  const at::Tensor weights = at::tensor(at::ArrayRef<double>(flat)).view({stages, basis.size(1)});
  return combine_op(y0, k, at::matmul(basis, weights.t()).mul(signed_dt));
}

// y over the step: its value at the start, and the coefficients of x, x^2, ...
at::Tensor Run::polynomial(const Step& step) {
  extend(step);
  const auto degree = int64_t(dense_.weights[0].size());
  if (records(step.y0, dense_.stage)) {
    const at::Tensor rows =
        recorded_rows(step, at::zeros_like(step.y0), at::eye(degree, at::kDouble));
    if (outputs_are_unseen(step) && !at::isfinite(rows).all().item<bool>()) throw StepFailure{kNonfiniteField};
    return at::cat({step.y0.unsqueeze(0), rows});
  }
  std::vector<double> coef;
  for (int64_t power = 0; power < degree; ++power) {
    for (const auto& weights : dense_.weights) coef.push_back(weights[power] * direction_ * step.dt);
  }
  std::vector<int64_t> shape = step.y0.sizes().vec();
  shape.insert(shape.begin(), 1 + degree);
  const at::Tensor rows = at::empty(shape, step.y0.options());
  rows.select(0, 0).copy_(step.y0);
  const bool finite = run_combine({}, terms_of(k_, dense_.stage), coef.data(), degree,
                                  rows.narrow(0, 1, degree));
  if (outputs_are_unseen(step) && !finite) throw StepFailure{kNonfiniteField};
  return rows;
}

// Rows begin to end of the outputs, all inside the step: one pass over its slopes.
void Run::interpolate(const Step& step, int64_t begin, int64_t end) {
  extend(step);
  const int64_t rows = end - begin;
  if (records(step.y0, dense_.stage)) {
    at::Tensor x = at::tensor(at::ArrayRef<double>(times_.data() + begin, size_t(rows)));
    x = x.sub(step.t0).div(step.t1 - step.t0);
    if (stretch_.defined()) {
      // The same quotient, with the gradients of the three times in it.
      x = x.add(shifts_.narrow(0, begin, rows).sub(step.shift0).sub(x.mul(stretch_)).div(step.dt));
    }
    const int64_t degree = int64_t(dense_.weights[0].size());
    const at::Tensor powers = x.unsqueeze(1).pow(at::arange(1, degree + 1, at::kDouble));
    const at::Tensor values = recorded_rows(step, step.y0, powers);
    if (outputs_are_unseen(step) && !at::isfinite(values).all().item<bool>()) throw StepFailure{kNonfiniteField};
    recorded_.emplace_back(begin, values);
    return;
  }
  write_rows(step, times_.data() + begin, ys_.narrow(0, begin, rows));
}

// The solution at times inside the step, one row each, with no graph: one pass over its slopes.
void Run::write_rows(const Step& step, const double* times, const at::Tensor& out) {
  std::vector<double> coef;
  for (int64_t row = 0; row < out.size(0); ++row) {
    for (const double w : dense_.at((times[row] - step.t0) / (step.t1 - step.t0))) {
      coef.push_back(w * direction_ * step.dt);
    }
  }
  bool finite;
  {
    std::optional<py::gil_scoped_release> release;
    if (step.y0.numel() >= kReleaseGil) release.emplace();
    finite = run_combine(step.y0, terms_of(k_, dense_.stage), coef.data(), out.size(0), out);
  }
  if (outputs_are_unseen(step) && !finite) throw StepFailure{kNonfiniteField};
}

// Whether values between the ends of the step have to be looked at: the extra stages were not seen
// by the error test. On a GPU to look would be to wait.
bool Run::outputs_are_unseen(const Step& step) const {
  return !dense_.extra_c.empty() && step.y0.is_cpu() && !replaying_;
}

// Every output that lies in the step: its end as computed, others from the interpolant.
void Run::emit(const Step& step) {
  const int64_t begin = filled_;
  const int64_t end = std::upper_bound(times_.begin() + begin, times_.end(), step.t1) - times_.begin();
  if (end == begin) return;
  trials_ = 0;
  bool at_end = times_[end - 1] == step.t1;
  if (at_end && step.shift0.defined() && !steps_on_times_ &&
      (overshoot_ || end < int64_t(times_.size()))) {
    at_end = false;  // the value is y1; its gradient in this output time needs the slope there
  }
  const int64_t inner = at_end ? end - 1 : end;
  if (inner > begin) interpolate(step, begin, inner);
  if (at_end) {
    if (grad_mode_ && step.y1.requires_grad()) {
      recorded_.emplace_back(inner, step.y1.unsqueeze(0));
    } else {
      ys_.select(0, inner).copy_(step.y1);
    }
  }
  filled_ = end;
}

void Run::record(py::object recording) {
  recording_ = std::move(recording);
  as_polynomials_ = !recording_.is_none() && recording_.attr("as_polynomials").cast<bool>();
}

// What a solve needs before its first step.
void Run::start() {
  if (!adaptive_) return;
  f0_ = call_at_state(shift0_, 0);
  dt_ = first_step();
}

// The next accepted step.
Step Run::advance() {
  if (adaptive_) return adaptive_step();
  const int64_t i = accepted_ + 1;
  if (i < int64_t(grid_.size())) {
    return fixed_step(grid_[i], with_time_gradient_ ? grid_shifts_.select(0, i) : at::Tensor());
  }
  if (i > max_num_steps_) throw StepFailure{kMaxSteps};
  return fixed_step(t0_ + control_.max_step, shift0_);
}

// The solution at times inside the step last taken, one row each; nothing is recorded.
at::Tensor Run::states_at(const Step& step, const std::vector<double>& times) {
  extend(step);
  std::vector<int64_t> shape = step.y0.sizes().vec();
  shape.insert(shape.begin(), int64_t(times.size()));
  const at::Tensor rows = at::empty(shape, step.y0.options());
  write_rows(step, times.data(), rows);
  return rows;
}

py::dict Run::solve() {
  const c10::OptionalDeviceGuard device(y_begin_.device());
  begin();
  try {
    if (times_.size() > 1) start();
    while (filled_ < int64_t(times_.size())) emit(advance());
    return outcome(kSuccess);
  } catch (const StepFailure& failure) {
    return outcome(failure.status);
  }
}

void Run::prepare_replays(py::object shifts) {
  replaying_ = field_writes_ = true;  // whether the field writes is not known: it gets copies
  if (!shifts.is_none()) shifts_ = unpack(shifts);
}

// An accepted step again, with its graph where gradients are recorded, and then its outputs too:
// its end, the slope it hands on (None for fixed steps), and the outputs in pieces with the row of
// their first. f0 is None where the step evaluates it itself; the shifts are None where time has no
// gradient.
py::tuple Run::replay(double t0, double t1, double dt, int landing, const py::object& y0,
                      const py::object& f0, const py::object& shift0, const py::object& shift1) {
  const c10::OptionalDeviceGuard device(y_begin_.device());
  const auto given = [](const py::object& x) { return x.is_none() ? at::Tensor() : unpack(x); };
  const Landing kind = Landing(landing);
  grad_mode_ = at::GradMode::is_enabled();
  t0_ = t0;
  shift0_ = given(shift0);
  stretch_ = at::Tensor();
  current_.adopt(unpack(y0), field_.shapes);
  f0_ = f0.is_none() ? call_at_state(shift0_, perturb_ ? 1 : 0) : unpack(f0);
  rk_step(t1, dt, given(shift1));
  const Step step = commit(t1, dt, given(shift1), kind);
  const at::Tensor f1 = adaptive_ ? for_python(handed_on(kind)) : at::Tensor();
  recorded_.clear();
  filled_ = std::upper_bound(times_.begin(), times_.end(), t0) - times_.begin();
  if (grad_mode_) emit(step);
  py::list outputs;
  for (const auto& [row, values] : recorded_) outputs.append(py::make_tuple(row, wrap(values)));
  // The graph is the caller's now.
  k_.clear();
  recorded_.clear();
  f0_ = at::Tensor();
  if (grad_mode_) stage_ = candidate_ = current_ = Shown();
  return py::make_tuple(wrap(step.y1), wrap(f1), outputs);
}

}  // namespace

py::dict solve(py::handle problem, const Table& table, const Interpolant& dense,
               py::object recording) {
  Run run(problem, table, dense);
  run.record(std::move(recording));
  return run.solve();
}

py::dict steps(py::handle problem, const Table& table, const Interpolant& dense,
               py::object recording) {
  const auto run = std::make_shared<Run>(problem, table, dense);
  run->record(std::move(recording));
  run->begin();
  const auto last = std::make_shared<Step>();
  const c10::Device device = unpack(problem.attr("y0")).device();
  // A failure is handed over as its status.
  const auto start = [run, device]() -> py::object {
    const c10::OptionalDeviceGuard guard(device);
    try {
      run->start();
      return py::none();
    } catch (const StepFailure& failure) {
      return py::int_(int(failure.status));
    }
  };
  const auto advance = [run, last, device]() -> py::object {
    const c10::OptionalDeviceGuard guard(device);
    try {
      *last = run->advance();
      return py::make_tuple(last->t0, last->t1, wrap(last->y1));
    } catch (const StepFailure& failure) {
      return py::int_(int(failure.status));
    }
  };
  const auto states_at = [run, last, device](const std::vector<double>& times) -> py::object {
    const c10::OptionalDeviceGuard guard(device);
    try {
      return wrap(run->states_at(*last, times));
    } catch (const StepFailure& failure) {
      return py::int_(int(failure.status));
    }
  };
  const auto outcome = [run](int status) { return run->outcome(Status(status)); };
  using namespace py::literals;
  return py::dict("start"_a = py::cpp_function(start), "advance"_a = py::cpp_function(advance),
                  "states_at"_a = py::cpp_function(states_at),
                  "outcome"_a = py::cpp_function(outcome));
}

py::object replay(py::handle problem, const Table& table, const Interpolant& dense,
                  py::object shifts) {
  const auto run = std::make_shared<Run>(problem, table, dense);
  run->prepare_replays(std::move(shifts));
  return py::cpp_function([run](double t0, double t1, double dt, int landing, const py::object& y0,
                                const py::object& f0, const py::object& shift0,
                                const py::object& shift1) {
    return run->replay(t0, t1, dt, landing, y0, f0, shift0, shift1);
  });
}

}  // namespace flashode

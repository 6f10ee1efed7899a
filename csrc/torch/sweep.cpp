// The backward solve in one sweep through all outputs, as a C++ loop over an opaque Python field.
//
// The twin of python/flashode/engines/reference_sweep.py: the same functions in the same order. The
// augmented state is never one tensor: y and its adjoint have slopes of their own, and the integrals
// (the gradients of the parameters, and vjp_t) take two accumulators each, value and error, into
// which every stage's products go at once. The products of the last stage begin the next step; those
// of the first are spent by the time a step is refused, and are made again rather than kept.

#include "sweep.h"

#include <ATen/DeviceGuard.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "native.h"
#include "path.h"
#include "problem.h"
#include "vjp.h"

namespace flashode {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Shares of a step that it keeps when it ends at an output; see the twin.
constexpr double kShareWithJumps = 0.5, kShareWithout = 0.8;

// Gradients that are passed over may be this many times larger than their sum; see the twin.
constexpr double kCancels = 10;
constexpr int64_t kBlock = 1 << 20;  // elements of gradients that `cancel` adds up at a time

// The end of a step: its time, whether the field jumps there, and the outputs up to it.
struct End {
  double t;
  bool field_jumps;
  int64_t outputs;
};

// Tensors that are integrated: at the start of a step, at its end, and their errors.
struct Integrals {
  std::vector<at::Tensor> start, end, error;
};

using Tensors = std::vector<at::Tensor>;

class Sweep {
 public:
  Sweep(py::handle augmented, const Table& table, const Interpolant& dense);
  py::dict solve();

 private:
  py::dict outcome(Status status);
  Slopes evaluate(double t, const at::Tensor& y, const at::Tensor& adj, bool with_params = true,
                  int nudge = 0);
  void add(const Tensors& products, double w_value, double w_error, bool first);
  Decision error_norm(const at::Tensor& y1, const Terms& k, const double* of_y,
                      const at::Tensor& adj1, const Terms& adj_k, const double* of_adj, double dt);
  double first_step();
  void begin(int64_t moved);
  at::Tensor adj_with(int64_t moved) const;
  void rk_step(double t1, double dt);
  End landing(double t1);
  bool cancel(int64_t moved) const;
  void adaptive_step();
  int64_t jumps_in(int64_t begin, int64_t end) const;
  void fixed_step(double t1);
  void pull_back(double t1, double dt);
  at::Tensor states_at(const std::vector<double>& positions, double t1, double dt);
  at::Tensor on_path(double t, const TimeTarget& time = {});
  void arrive(const End& end);
  at::Tensor distance(const at::Tensor& y1, const at::Tensor& stored) const;

  at::Tensor fresh();
  at::Tensor combined(const at::Tensor& y0, const Tensors& k, const Row& row, double scale,
                      const TimeTarget& time = {});
  std::vector<double> weights_at(double x) const;
  void report(const py::object& callback, double dt);

  // The problem, read once.
  const py::object g_, p_;
  const Table& table_;
  const Interpolant& dense_;
  Field field_;
  const c10::OptionalDeviceGuard device_;
  const at::Tensor ys_, grad_ys_;
  const std::vector<bool> jumps_;
  const bool adaptive_, perturb_, has_norm_;
  const double direction_;
  const int64_t max_num_steps_;
  const std::vector<double> times_;
  const std::vector<std::pair<double, bool>> stops_;
  const py::object on_step_, on_accept_, on_reject_;
  const std::pair<double, double> tolerances_;
  const Path path_;
  Vjp vjp_;
  Controller control_;
  Tolerances tol_;
  std::vector<double> b_, b_err_, c_;  // c_ and a_ with the stages that dense output adds
  std::vector<Row> a_;

  // Memory.
  const std::vector<int64_t> offsets_;  // of the members that the norm covers
  Norm norm_;
  Tensors pool_;
  Shown extra_;

  // Where the sweep stands.
  double t0_, dt_ = kNaN, error_ratio_ = kNaN;
  at::Tensor y_, adj_, y1_, adj1_;
  Integrals counted_, uncounted_;  // by step-size control; vjp_t first, then the parameters
  Slopes slopes_, last_;           // at the start of the step, and of its last stage
  Tensors k_, adj_k_;
  int64_t next_ = 1;   // output to come
  int64_t moved_ = 0;  // outputs to come whose gradients the slopes include
  int nudge_ = 0;
  size_t next_stop_ = 0;
  int64_t accepted_ = 0, rejected_ = 0, trials_ = 0;
  Tensors drifts_;
  std::vector<double> drift_times_;
};

std::vector<double> scaled(const std::vector<double>& weights, double scale) {
  std::vector<double> result(weights);
  for (double& w : result) w *= scale;
  return result;
}

std::vector<double> full(const Row& row, size_t stages) {
  std::vector<double> weights(stages);
  for (size_t j = 0; j < row.stage.size(); ++j) weights[row.stage[j]] = row.weight[j];
  return weights;
}

Sweep::Sweep(py::handle augmented, const Table& table, const Interpolant& dense)
    : g_(py::reinterpret_borrow<py::object>(augmented)),
      p_(g_.attr("problem")),
      table_(table),
      dense_(dense),
      field_(p_),
      device_(field_.like.device()),
      ys_(unpack(g_.attr("ys")).contiguous()),
      grad_ys_(unpack(g_.attr("grad_ys"))),
      jumps_(g_.attr("jumps").cast<std::vector<bool>>()),
      adaptive_(p_.attr("adaptive").cast<bool>()),
      perturb_(p_.attr("perturb").cast<bool>()),
      has_norm_(!p_.attr("norm").is_none()),
      direction_(field_.direction),
      max_num_steps_(p_.attr("max_num_steps").cast<int64_t>()),
      times_(p_.attr("times").cast<std::vector<double>>()),
      stops_(p_.attr("stops").cast<std::vector<std::pair<double, bool>>>()),
      on_step_(p_.attr("callbacks")[py::int_(0)]),
      on_accept_(p_.attr("callbacks")[py::int_(1)]),
      on_reject_(p_.attr("callbacks")[py::int_(2)]),
      tolerances_(g_.attr("tolerances").cast<std::pair<double, double>>()),
      path_(g_.attr("path")),
      vjp_(field_, [&] {
        Tensors params;
        for (const py::handle param : g_.attr("params")) params.push_back(unpack(param));
        return params;
      }(), g_.attr("needs_t").cast<bool>(), g_.attr("examine")),
      b_(full(table.b, table.c.size())),
      b_err_(full(table.b_err, table.c.size())),
      c_(table.c),
      a_(table.a),
      offsets_(p_.attr("norm_offsets").cast<std::vector<int64_t>>()),
      norm_(offsets_),
      t0_(times_[0]) {
  control_ = controller_of(p_);
  tol_ = tolerances_of(p_);
  c_.insert(c_.end(), dense.extra_c.begin(), dense.extra_c.end());
  a_.insert(a_.end(), dense.extra_a.begin(), dense.extra_a.end());
  y_ = ys_.select(0, -1);
  adj_ = grad_ys_.select(0, -1);
  const bool seminorm = g_.attr("seminorm").cast<bool>();
  const auto integrate = [&](Integrals& integrals, at::IntArrayRef sizes, at::TensorOptions like) {
    integrals.start.push_back(at::zeros(sizes, like));
    // Fixed steps are never refused: the value grows in place, and no error is wanted.
    integrals.end.push_back(adaptive_ ? at::empty(sizes, like) : integrals.start.back());
    if (adaptive_ && &integrals == &counted_) integrals.error.push_back(at::empty(sizes, like));
  };
  integrate(counted_, {}, ys_.options());
  for (const at::Tensor& param : vjp_.params()) {
    integrate(seminorm ? uncounted_ : counted_, param.sizes(), param.options().requires_grad(false));
  }
}

py::dict Sweep::outcome(Status status) {
  double drift = 0, drift_t = kNaN;
  if (!drifts_.empty()) {
    const at::Tensor all = at::stack(drifts_).cpu();  // one wait for all of them
    for (size_t i = 0; i < drifts_.size(); ++i) {
      const double at_i = all.const_data_ptr<double>()[i];
      if (!(at_i <= drift)) drift = at_i, drift_t = drift_times_[i];
    }
  }
  const auto list = [](const Tensors& tensors) {
    py::list wrapped;
    for (const at::Tensor& tensor : tensors) wrapped.append(wrap(tensor));
    return wrapped;
  };
  Tensors params(counted_.start.begin() + 1, counted_.start.end());
  params.insert(params.end(), uncounted_.start.begin(), uncounted_.start.end());
  using namespace py::literals;
  return py::dict("status"_a = int(status), "vjp_t"_a = wrap(counted_.start[0]),
                  "adj_y"_a = wrap(adj_), "adj_params"_a = list(params), "nfe"_a = field_.nfe,
                  "accepted"_a = accepted_, "rejected"_a = rejected_, "t"_a = t0_, "dt"_a = dt_,
                  "error_ratio"_a = error_ratio_, "k"_a = list(k_), "adj_k"_a = list(adj_k_),
                  "y1"_a = wrap(y1_.defined() ? y1_ : y_), "drift"_a = drift,
                  "drift_t"_a = drift_t);
}

Slopes Sweep::evaluate(double t, const at::Tensor& y, const at::Tensor& adj, bool with_params,
                       int nudge) {
  const TimeTarget time = vjp_.set_time(t, nudge);
  if (time.t.defined()) time.t.fill_(time.value);
  return vjp_.evaluate(y, adj, with_params);
}

// integrals += w_value * products, and their errors += w_error * products.
void Sweep::add(const Tensors& products, double w_value, double w_error, bool first) {
  const auto counted = int64_t(counted_.start.size());
  const Tensors of_counted(products.begin(), products.begin() + counted);
  const bool adds_no_error = w_error == 0 && !first;
  run_accumulate(of_counted, counted_.start, counted_.end, adds_no_error ? Tensors() : counted_.error,
                 w_value, w_error, first);
  if (uncounted_.start.empty()) return;
  const Tensors of_uncounted(products.begin() + counted, products.end());
  run_accumulate(of_uncounted, uncounted_.start, uncounted_.end, {}, w_value, 0, first);
}

// Of the augmented state, relative to the tolerances.
Decision Sweep::error_norm(const at::Tensor& y1, const Terms& k, const double* of_y,
                           const at::Tensor& adj1, const Terms& adj_k, const double* of_adj,
                           double dt) {
  const Terms no_terms{};
  const Terms& y_terms = path_.given ? no_terms : k;  // y has no error where it is given
  if (!has_norm_) {
    const Change states[] = {{y_, y1, y_terms, of_y, tol_}, {adj_, adj1, adj_k, of_adj, tol_}};
    const Quadrature quadrature{counted_.start, counted_.end, counted_.error, tolerances_.first,
                                tolerances_.second};
    std::optional<py::gil_scoped_release> release;
    if (!y_.is_cpu()) release.emplace();
    return norm_.decide(states, &quadrature, 0, dt, control_);
  }
  const Tolerances least{tolerances_.first, tolerances_.second, {}, {}};
  const double one = 1;
  py::list integrals;
  for (size_t i = 0; i < counted_.start.size(); ++i) {
    const Terms error = terms_of(counted_.error, {int(i)});
    integrals.append(
        wrap(run_scaled_error(counted_.start[i], counted_.end[i], error, &one, least)));
  }
  const py::object vjp_t = integrals[0];
  integrals.attr("pop")(0);
  const py::object value =
      g_.attr("norm_value")(vjp_t, wrap(run_scaled_error(y_, y1, y_terms, of_y, tol_)),
                            wrap(run_scaled_error(adj_, adj1, adj_k, of_adj, tol_)), integrals);
  return decide(value.cast<double>(), dt, control_);
}

// Hairer I, II.4, of the augmented state.
double Sweep::first_step() {
  const py::object given = g_.attr("first_step");
  if (!given.is_none()) return given.cast<double>();
  begin(0);
  const double one = 1;
  const auto norm = [&](const Tensors& of_y, const Tensors& of_adj, const double* weights) {
    const std::vector<int> all = of_y.size() == 1 ? std::vector{0} : std::vector{0, 1};
    return error_norm(y_, terms_of(of_y, all), weights, adj_, terms_of(of_adj, all), weights, 1)
        .error_ratio;
  };
  const auto products_as_error = [&](const Tensors& products, double weight, bool first) {
    add(products, 0, weight, first);
  };
  products_as_error(slopes_.of_integrals, 0, true);
  const double d0 = norm({y_}, {adj_}, &one);
  products_as_error(slopes_.of_integrals, 1, true);
  const double d1 = norm({slopes_.f}, {slopes_.of_y}, &one);
  if (!is_finite(d1)) {
    k_ = {slopes_.f}, adj_k_ = {slopes_.of_y};
    error_ratio_ = d1;
    throw StepFailure{kNonfiniteField};
  }
  const double h0 = std::min(first_guess(d0, d1), times_.back() - t0_);
  const Row euler({1.0});
  const TimeTarget time = vjp_.set_time(t0_ + h0, 0);
  const at::Tensor y = path_.given ? on_path(t0_ + h0, time)
                                 : combined(y_, {slopes_.f}, euler, direction_ * h0, time);
  const Slopes probe = vjp_.evaluate(y, combined(adj_, {slopes_.of_y}, euler, -direction_ * h0), true);
  products_as_error(probe.of_integrals, 1, true);
  products_as_error(slopes_.of_integrals, -1, false);
  const double difference[] = {1, -1};
  const double d2 = norm({probe.f, slopes_.f}, {probe.of_y, slopes_.of_y}, difference);
  return initial_step(h0, d1, d2 / h0, control_.order);
}

// Slopes at the start of a step into which the gradients of the next outputs have moved.
void Sweep::begin(int64_t moved) {
  if (slopes_.f.defined() && moved_ == moved) return;
  slopes_ = {};
  slopes_ = evaluate(t0_, y_, adj_with(moved), true, nudge_);
  moved_ = moved;
}

// The adjoint with the gradients of that many outputs to come.
at::Tensor Sweep::adj_with(int64_t moved) const {
  if (moved == 0) return adj_;
  const int64_t last = int64_t(times_.size()) - next_;
  return adj_.add(grad_ys_.narrow(0, last - moved, moved).sum(0));
}

// All stages of a step: y1_ and adj1_, the integrals at its end with their errors, and last_.
void Sweep::rk_step(double t1, double dt) {
  const double signed_dt = direction_ * dt;
  const int stages = int(table_.c.size());
  const at::Tensor adj0 = adj_with(moved_);
  k_.assign(1, slopes_.f);
  adj_k_.assign(1, slopes_.of_y);
  add(slopes_.of_integrals, -signed_dt * b_[0], -signed_dt * b_err_[0], true);
  slopes_ = {};
  for (int i = 1; i < stages; ++i) {
    const bool at_end = c_[i] == 1, last = i == stages - 1;
    const TimeTarget time = vjp_.set_time(at_end ? t1 : t0_ + c_[i] * dt,
                                          at_end && (adaptive_ || perturb_) ? -1 : 0);
    y1_ = path_.given ? on_path(at_end ? t1 : t0_ + c_[i] * dt, time)
                    : combined(y_, k_, a_[i], signed_dt, time);
    adj1_ = combined(adj0, adj_k_, a_[i], -signed_dt);
    // A stage without weight is no part of any integral; the last one may begin the next step.
    const bool weighs = b_[i] != 0 || b_err_[i] != 0;
    last_ = {};
    last_ = vjp_.evaluate(y1_, adj1_, weighs || last);
    k_.push_back(last_.f);
    adj_k_.push_back(last_.of_y);
    if (weighs) add(last_.of_integrals, -signed_dt * b_[i], -signed_dt * b_err_[i], false);
  }
  if (!table_.fsal) {
    y1_ = path_.given ? on_path(t1) : combined(y_, k_, table_.b, signed_dt);
    adj1_ = combined(adj0, adj_k_, table_.b, -signed_dt);
  }
}

// The end of the next step, whether the field jumps there, and the outputs up to it.
End Sweep::landing(double t1) {
  End end{std::min(t1, times_.back()), false, 0};
  if (path_.given) {
    // y has no error test here: what the forward solve had to resolve, the sweep has to.
    end.t = std::min(end.t, t0_ + path_.step_length(-t0_));
  }
  while (next_stop_ < stops_.size() && stops_[next_stop_].first <= t0_) ++next_stop_;
  if (next_stop_ < stops_.size() && stops_[next_stop_].first <= end.t) {
    end.t = stops_[next_stop_].first;
    end.field_jumps = stops_[next_stop_].second;
  }
  const auto first = times_.begin() + next_;
  end.outputs = std::upper_bound(first, times_.end(), end.t) - times_.begin();
  if (end.outputs > next_) {
    const bool jumps =
        std::any_of(jumps_.begin() + next_, jumps_.begin() + end.outputs, [](bool b) { return b; });
    const double share = jumps ? kShareWithJumps : kShareWithout, t_last = times_[end.outputs - 1];
    if (t_last < end.t && t_last - t0_ >= share * (end.t - t0_)) {
      end.t = t_last;
      end.field_jumps = false;
    }
  }
  const int64_t moved = jumps_in(next_, end.outputs - (times_[end.outputs - 1] == end.t));
  if (moved > 0 && cancel(moved)) {
    const auto i = std::find(jumps_.begin() + next_, jumps_.end(), true) - jumps_.begin();
    end = {times_[i], false, int64_t(i) + 1};
  }
  return end;
}

// Whether the adjoint with the gradients of that many outputs to come is so much smaller than what
// it lacks between them that an error test of it says nothing about their correction.
bool Sweep::cancel(int64_t moved) const {
  const int64_t last = int64_t(times_.size()) - next_, size = std::max<int64_t>(1, y_.numel());
  const auto squares = [&](const at::Tensor& rows) {  // by row and member
    Tensors members;
    for (size_t m = 1; m < offsets_.size(); ++m) {
      const at::Tensor member = rows.narrow(1, offsets_[m - 1], offsets_[m] - offsets_[m - 1]);
      members.push_back(member.square().sum(1));
    }
    return at::stack(members, 1);
  };
  const auto flat = [](const at::Tensor& x, int64_t rows) {
    return x.reshape({rows, -1}).to(at::kDouble);
  };
  const at::Tensor most = squares(flat(adj_with(moved), 1)).mul(kCancels * kCancels);
  at::Tensor later = at::zeros_like(flat(y_, 1)), found = at::zeros({}, most.options().dtype(at::kBool));
  for (int64_t row = last - moved, some; row < last; row += some) {
    some = std::min(last - row, std::max<int64_t>(1, kBlock / size));
    const at::Tensor missing = flat(grad_ys_.narrow(0, row, some), some).cumsum(0).add(later);
    found = found.logical_or(squares(missing).gt(most).any());
    later = missing.narrow(0, some - 1, 1);
  }
  return found.item<bool>();
}

// Tries steps until one is accepted, and makes it.
void Sweep::adaptive_step() {
  double dt;
  End end;
  while (true) {
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (trials_ >= max_num_steps_) throw StepFailure{kMaxSteps};
    ++trials_;
    dt_ = clamp_step(dt_, control_);
    const double free = t0_ + dt_;
    end = landing(free);
    if (!(end.t > t0_) || dt_ < std::numeric_limits<double>::min()) throw StepFailure{kStepUnderflow};
    dt = dt_ = end.t == free ? dt_ : std::min(dt_, end.t - t0_);
    begin(jumps_in(next_, end.outputs - (times_[end.outputs - 1] == end.t)));
    report(on_step_, dt);
    rk_step(end.t, dt);
    const Row& row = table_.b_err;
    const std::vector<double> of_y = scaled(row.weight, direction_ * dt);
    const std::vector<double> of_adj = scaled(row.weight, -direction_ * dt);
    const Decision decision = error_norm(y1_, terms_of(k_, row.stage), of_y.data(), adj1_,
                                         terms_of(adj_k_, row.stage), of_adj.data(), dt);
    error_ratio_ = decision.error_ratio;
    dt_ = decision.next_dt;
    if (decision.accepted) break;
    last_ = {};  // its products are as large as all parameters
    ++rejected_;
    report(on_reject_, dt);
    if (!is_finite(error_ratio_) &&
        (dt <= control_.min_step || !at::isfinite(k_[0]).all().item<bool>() ||
         !at::isfinite(adj_k_[0]).all().item<bool>())) {
      throw StepFailure{kNonfiniteField};
    }
  }
  remember(error_ratio_, control_);
  report(on_accept_, dt);
  if (moved_ > 0) pull_back(end.t, dt);
  const bool on_output = times_[end.outputs - 1] == end.t;
  arrive(end);
  if (!(moved_ > 0 || on_output || end.field_jumps)) slopes_ = std::move(last_);
  last_ = {};
  moved_ = 0;
  nudge_ = end.field_jumps ? 1 : 0;
}

// Outputs to pass over, counted to the last one that has a gradient.
int64_t Sweep::jumps_in(int64_t begin, int64_t end) const {
  while (end > begin && !jumps_[end - 1]) --end;
  return end - begin;
}

// One step of a prescribed length.
void Sweep::fixed_step(double t1) {
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  const double dt = dt_ = t1 - t0_;
  report(on_step_, dt);
  slopes_ = evaluate(t0_, y_, adj_, true, perturb_ ? 1 : 0);
  rk_step(t1, dt);
  last_ = {};
  // A fixed-step solve on a GPU never waits for the device, not even for this check.
  if (y1_.is_cpu() &&
      !(at::isfinite(y1_).all().item<bool>() && at::isfinite(adj1_).all().item<bool>())) {
    throw StepFailure{kNonfiniteField};
  }
  const auto outputs = std::upper_bound(times_.begin() + next_, times_.end(), t1) - times_.begin();
  arrive({t1, false, int64_t(outputs)});
}

// Takes out what the moved gradients gained between the start of the step and their outputs.
void Sweep::pull_back(double t1, double dt) {
  const double signed_dt = -direction_ * dt;  // the transposed step runs forwards, from t1 to t0_
  const int64_t last = int64_t(times_.size()) - next_, stages = int64_t(c_.size());
  std::vector<double> weights(size_t(stages * moved_));
  for (int64_t row = 0; row < moved_; ++row) {
    const double t_i = times_[next_ + moved_ - 1 - row];
    const std::vector<double> w = weights_at((t1 - t_i) / (t1 - t0_));
    for (int64_t j = 0; j < stages; ++j) {
      weights[j * moved_ + row] = signed_dt * (w[j] - (j < int64_t(b_.size()) ? b_[j] : 0));
    }
  }
  const at::Tensor rows = grad_ys_.narrow(0, last - moved_, moved_)
                              .reshape({moved_, -1})
                              .to(wide_type(grad_ys_.scalar_type()));
  const at::Tensor matrix = at::tensor(at::ArrayRef<double>(weights)).view({stages, moved_});
  std::vector<int64_t> shape = y_.sizes().vec();
  shape.insert(shape.begin(), stages);
  const at::Tensor sources = at::mm(matrix.to(rows.options()), rows).to(y_.scalar_type()).view(shape);
  std::vector<double> positions;
  for (const double c_j : c_) positions.push_back(1 - c_j);
  const at::Tensor states = states_at(positions, t1, dt);
  Tensors products(stages);
  for (int64_t j = stages - 1; j >= 0; --j) {
    Row later;
    for (int64_t i = j + 1; i < stages; ++i) {
      const auto entry = std::find(a_[i].stage.begin(), a_[i].stage.end(), int(j));
      if (entry == a_[i].stage.end()) continue;
      later.stage.push_back(int(i));
      later.weight.push_back(a_[i].weight[entry - a_[i].stage.begin()]);
    }
    // Where the field jumps, its side is that of the step.
    const double t_j = c_[j] == 1 ? t0_ : c_[j] == 0 ? t1 : t1 - c_[j] * dt;
    const TimeTarget time = vjp_.set_time(t_j, c_[j] == 1 ? nudge_ : c_[j] == 0 ? -1 : 0);
    const at::Tensor cotangent = combined(sources.select(0, j), products, later, signed_dt, time);
    const Slopes slopes = vjp_.evaluate(states.select(0, j), cotangent, true);
    products[j] = slopes.of_y;
    add(slopes.of_integrals, 1, 0, false);
  }
  adj1_ = combined(adj1_, products, Row(std::vector<double>(stages, 1.0)), 1);
}

// y at positions in [0, 1] of the step, one row each.
at::Tensor Sweep::states_at(const std::vector<double>& positions, double t1, double dt) {
  if (path_.given) {
    Tensors states;
    for (const double x : positions) states.push_back(on_path(t0_ + x * dt));
    return at::stack(states);
  }
  const double signed_dt = direction_ * dt;
  const size_t stages = table_.c.size();
  Tensors k = k_;
  for (size_t i = stages; i < c_.size(); ++i) {
    field_.make_writable(extra_);
    const std::vector<double> coef = scaled(a_[i].weight, signed_dt);
    run_combine(y_, terms_of(k, a_[i].stage), coef.data(), 1, extra_.flat);
    const bool at_end = c_[i] == 1;
    k.push_back(field_.call(at_end ? t1 : t0_ + c_[i] * dt, extra_, {}, at_end ? -1 : 0));
  }
  std::vector<int> all;
  for (size_t j = 0; j < c_.size(); ++j) all.push_back(int(j));
  std::vector<double> coef;
  for (const double x : positions) {
    for (const double w : weights_at(x)) coef.push_back(w * signed_dt);
  }
  std::vector<int64_t> shape = y_.sizes().vec();
  shape.insert(shape.begin(), int64_t(positions.size()));
  const at::Tensor states = at::empty(shape, y_.options());
  run_combine(y_, terms_of(k, all), coef.data(), int64_t(positions.size()), states);
  return states;
}

// y at a time of the sweep, from the path: the two clocks run against each other.
at::Tensor Sweep::on_path(double t, const TimeTarget& time) {
  const Path::Value value = path_.at(-t);
  return combined(value.y0, value.k, value.powers, 1, time);
}

// Makes the end of the step the state. At an output the gradient enters, and the state as it was
// stored takes the place of the rebuilt one.
void Sweep::arrive(const End& end) {
  if (end.outputs > next_) trials_ = 0;
  if (times_[end.outputs - 1] == end.t) {
    const int64_t row = int64_t(times_.size()) - end.outputs;
    const at::Tensor stored = ys_.select(0, row);
    if (adaptive_ && !path_.given) {
      drifts_.push_back(distance(y1_, stored));
      drift_times_.push_back(end.t);
    }
    y1_ = stored;
    if (jumps_[end.outputs - 1]) adj1_ = adj1_.add(grad_ys_.select(0, row));
  }
  t0_ = end.t;
  y_ = y1_;
  adj_ = adj1_;
  for (Integrals* integrals : {&counted_, &uncounted_}) std::swap(integrals->start, integrals->end);
  next_ = end.outputs;
  ++accepted_;
}

// Between the rebuilt state and the stored one, in tolerances of a member as a whole: an element
// that is zero has drifted no further than the others.
at::Tensor Sweep::distance(const at::Tensor& y1, const at::Tensor& stored) const {
  Tensors ratios = {at::zeros({}, stored.options().dtype(at::kDouble))};
  for (size_t m = 1; m < offsets_.size(); ++m) {
    const int64_t size = offsets_[m] - offsets_[m - 1];
    if (size == 0) continue;
    const auto member = [&](const at::Tensor& x) {
      return x.reshape({-1}).narrow(0, offsets_[m - 1], size).to(at::kDouble);
    };
    const at::Tensor b = member(stored);
    const at::Tensor scale = b.norm().mul(tolerances_.first);
    ratios.push_back(member(y1).sub(b).norm().div(
        scale.add(std::sqrt(double(size)) * tolerances_.second + std::numeric_limits<double>::min())));
  }
  return at::stack(ratios).max();
}

py::dict Sweep::solve() {
  try {
    if (adaptive_ && times_.size() > 1) {
      dt_ = first_step();
      while (next_ < int64_t(times_.size())) adaptive_step();
    } else if (times_.size() > 1) {
      const auto grid = unpack(p_.attr("grid")).contiguous();
      for (int64_t i = 1; i < grid.numel(); ++i) fixed_step(grid.const_data_ptr<double>()[i]);
    }
    return outcome(kSuccess);
  } catch (const StepFailure& failure) {
    return outcome(failure.status);
  }
}

// ---- without a twin ------------------------------------------------------------------------

// Memory for a state: used before, and seen by nobody any more.
at::Tensor Sweep::fresh() {
  for (const at::Tensor& tensor : pool_) {
    if (tensor.use_count() == 1 && tensor.storage().use_count() == 1) return tensor;
  }
  if (pool_.size() == 32) pool_.clear();  // the field keeps what it is shown
  pool_.push_back(at::empty_like(y_, at::MemoryFormat::Contiguous));
  return pool_.back();
}

at::Tensor Sweep::combined(const at::Tensor& y0, const Tensors& k, const Row& row, double scale,
                           const TimeTarget& time) {
  const at::Tensor out = fresh();
  const std::vector<double> coef = scaled(row.weight, scale);
  run_combine(y0, terms_of(k, row.stage), coef.data(), 1, out, time);
  return out;
}

// Weights of dense output for every stage.
std::vector<double> Sweep::weights_at(double x) const {
  std::vector<double> all(c_.size());
  const std::vector<double> values = dense_.at(x);
  for (size_t j = 0; j < values.size(); ++j) all[dense_.stage[j]] = values[j];
  return all;
}

void Sweep::report(const py::object& callback, double dt) {
  if (callback.is_none()) return;
  py::list params;
  for (size_t i = 1; i < counted_.start.size(); ++i) params.append(wrap(counted_.start[i]));
  for (const at::Tensor& param : uncounted_.start) params.append(wrap(param));
  g_.attr("report")(callback, t0_, wrap(counted_.start[0]), wrap(y_), wrap(adj_), params, dt);
}

}  // namespace

py::dict sweep(py::handle augmented, const Table& table, const Interpolant& dense) {
  return Sweep(augmented, table, dense).solve();
}

}  // namespace flashode

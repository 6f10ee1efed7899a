// The native engine for batches whose samples are solved on their own.
//
// The twin of python/flashode/engines/reference_batched.py: the same functions in the same order. A
// call of the field with the whole batch is all that a stage needs of Python; where samples stand is
// kept in two tables on the device of the state, and one number comes back from it a step.

#include "batched.h"

#include <ATen/DeviceGuard.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/full.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <pybind11/stl.h>

#include <optional>

#include "../kernels/batch.h"
#include "field.h"
#include "native.h"
#include "problem.h"
#include "shown.h"

namespace flashode {

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kReleaseGil = 1 << 16;  // elements from which other threads get to run
constexpr int64_t kShortRow = 16;  // numbers of a row; below, no sum of cpu_blocks.h goes in lanes

Sum sum_of(const Row& row) {
  Sum sum;
  for (size_t j = 0; j < row.weight.size(); ++j) {
    sum.stage[sum.count] = row.stage[j];
    sum.weight[sum.count++] = row.weight[j];
  }
  return sum;
}

Polynomial polynomial_of(const Interpolant& dense) {
  Polynomial polynomial;
  polynomial.degree = int(dense.weights[0].size());
  TORCH_CHECK(polynomial.degree <= kMaxDegree, "flashode: dense output of degree ", polynomial.degree);
  for (size_t j = 0; j < dense.stage.size(); ++j) {
    polynomial.stage[j] = dense.stage[j];
    for (int p = 0; p < polynomial.degree; ++p) polynomial.weight[p][j] = dense.weights[j][size_t(p)];
  }
  polynomial.count = int(dense.stage.size());
  polynomial.has_extra = !dense.extra_c.empty();
  return polynomial;
}

// The state of one solve.
class Run {
 public:
  Run(py::handle problem, const Table& table, const Interpolant& dense);
  py::object solve();

 private:
  py::dict outcome();
  void stage(Shown& target, const Row& row, double c, int nudge);
  at::Tensor call(const Shown& y);
  void first_step();
  void begin_trials();
  void rk_step();
  bool judge();
  void extend();
  void commit();
  void set_aside(const at::Tensor& rows);
  at::Tensor kept(const at::Tensor& x, const at::Tensor& rows) const;
  void compact();

  const Batch& batch();
  Terms slopes() const;
  at::Tensor of_samples(Real r) const { return reals_.select(0, r); }
  at::Tensor of_samples(Whole w) const { return wholes_.select(0, w); }
  template <class OnCpu, class OnCuda>
  Tally run(const OnCpu& on_cpu, const OnCuda& on_cuda);

  // The problem, read once.
  const py::object p_;
  const Table& table_;
  const Interpolant& dense_;
  const Polynomial polynomial_;
  const bool compact_, grad_mode_ = at::GradMode::is_enabled();
  const int64_t samples_;
  const std::vector<int64_t> columns_;
  at::Tensor times_;
  Tolerances tol_;
  Batch batch_;

  // Memory.
  std::optional<Exchange> field_;
  Shown stage_, candidate_, time_;
  at::Tensor ys_, steps_, device_columns_, scratch_;

  // Where the solve stands.
  at::Tensor reals_, wholes_;  // rows of Real and Whole, a column a sample
  at::Tensor y0_, f0_;
  std::vector<at::Tensor> k_;  // slopes of the last trial
  int64_t running_ = 0, inside_ = 0, nfe_ = 0;
  std::vector<std::pair<at::Tensor, at::Tensor>> finished_;
};

Run::Run(py::handle problem, const Table& table, const Interpolant& dense)
    : p_(py::reinterpret_borrow<py::object>(problem)),
      table_(table),
      dense_(dense),
      polynomial_(polynomial_of(dense)),
      compact_(p_.attr("compact").cast<bool>()),
      samples_(p_.attr("samples").cast<int64_t>()),
      columns_(p_.attr("columns").cast<std::vector<int64_t>>()),
      tol_(tolerances_of(p_)) {
  field_.emplace(p_);
  const at::Tensor &like = field_->like, times = unpack(p_.attr("times"));
  const bool shared = times.stride(0) == 0 && samples_ > 0;
  times_ = (shared ? times.narrow(0, 0, 1) : times).contiguous();
  reals_ = at::full({kReals, samples_}, kNaN, at::kDouble);
  wholes_ = at::zeros({kWholes, samples_}, at::kLong);
  const py::tuple bounds = p_.attr("time_bounds");
  of_samples(kT0).copy_(times.select(1, 0));
  of_samples(kStep).fill_(0);
  of_samples(kPast0).fill_(1);
  of_samples(kPast1).fill_(1);
  of_samples(kDirection).copy_(unpack(p_.attr("direction")));
  of_samples(kLow).copy_(unpack(bounds[0]));
  of_samples(kHigh).copy_(unpack(bounds[1]));
  of_samples(kSample).copy_(at::arange(samples_, at::kLong));
  of_samples(kFilled).copy_(times.eq(times.narrow(1, 0, 1)).sum(1));
  of_samples(kCause).fill_(kStepUnderflow);
  at::Tensor status = at::where(of_samples(kFilled).eq(times.size(1)), int64_t(kSuccess),
                                int64_t(kRunning));
  status = at::where(unpack(p_.attr("usable")), status, int64_t(kNonfiniteState));
  of_samples(kStatus).copy_(status);
  running_ = status.eq(kRunning).sum().item<int64_t>();

  // Outputs at the first times; those of samples whose first time does not repeat are written over.
  std::vector<int64_t> shape = like.sizes().vec();
  shape.insert(shape.begin(), times.size(1));
  ys_ = at::empty(shape, like.options());
  const int64_t repeats = samples_ ? of_samples(kFilled).max().item<int64_t>() : times.size(1);
  ys_.narrow(0, 0, repeats).copy_(like.detach().unsqueeze(0).expand_as(ys_.narrow(0, 0, repeats)));

  batch_.dtype = dtype_of(like);
  batch_.control = controller_of(p_);
  const double* betas = batch_.control.betas;
  batch_.remembers = betas[0] != 1 || betas[1] != 0 || betas[2] != 0;
  batch_.max_num_steps = p_.attr("max_num_steps").cast<int64_t>();
  batch_.width = columns_.back();
  for (size_t m = 1; m < columns_.size(); ++m) {
    batch_.widest = std::max(batch_.widest, columns_[m] - columns_[m - 1]);
  }
  if (like.is_cpu() && batch_.widest < kShortRow) steps_ = at::zeros({like.numel()}, at::kDouble);
  if (!like.is_cpu()) {
    times_ = times_.to(like.device());
    reals_ = reals_.to(like.device());
    wholes_ = wholes_.to(like.device());
    device_columns_ = at::tensor(at::ArrayRef<int64_t>(columns_), at::kLong).to(like.device());
    scratch_ = at::zeros({3}, like.options().dtype(at::kInt));
  }
}

// The batch as the kernels take it, with the addresses of the moment.
const Batch& Run::batch() {
  const int64_t count = wholes_.size(1);
  batch_.samples = {count, reals_.mutable_data_ptr<double>(), wholes_.mutable_data_ptr<int64_t>(),
                    times_.const_data_ptr<double>(), times_.size(0) == 1 ? 0 : times_.size(1),
                    times_.size(1)};
  batch_.members = {int64_t(columns_.size()) - 1,
                    device_columns_.defined() ? device_columns_.const_data_ptr<int64_t>()
                                              : columns_.data()};
  batch_.tolerance = {tol_.rtol, tol_.atol,
                      tol_.each_rtol.defined() ? tol_.each_rtol.const_data_ptr() : nullptr,
                      tol_.each_atol.defined() ? tol_.each_atol.const_data_ptr() : nullptr};
  batch_.steps = steps_.defined() ? steps_.mutable_data_ptr<double>() : nullptr;
  return batch_;
}

Terms Run::slopes() const {
  Terms terms;
  for (const at::Tensor& k : k_) terms.k[terms.count++] = k.const_data_ptr();
  return terms;
}

// One operation on the device of the state; its tally is the one wait of a step.
template <class OnCpu, class OnCuda>
Tally Run::run(const OnCpu& on_cpu, [[maybe_unused]] const OnCuda& on_cuda) {
  const at::Tensor& like = field_->like;
  std::optional<py::gil_scoped_release> release;
  if (like.numel() >= kReleaseGil || !like.is_cpu()) release.emplace();
  if (like.is_cpu()) return on_cpu(at::get_num_threads());
#ifdef FLASHODE_WITH_CUDA
  if (like.is_cuda()) {
    check_cuda(cuda::use_device(like.get_device()));
    void* const stream = current_stream(like.device());
    Tally* cell = nullptr;
    check_cuda(cuda::host_tally(&cell));
    const bool waits = on_cuda(reinterpret_cast<unsigned*>(scratch_.mutable_data_ptr()), cell, stream);
    if (waits) check_cuda(cuda::wait(stream));
    return *cell;
  }
#endif
  no_device(like);
}

py::dict Run::outcome() {
  set_aside(at::arange(wholes_.size(1), wholes_.options()));
  std::vector<at::Tensor> reals, wholes;
  for (const auto& [r, w] : finished_) {
    reals.push_back(r);
    wholes.push_back(w);
  }
  wholes_ = at::cat(wholes, 1);
  const at::Tensor order = at::argsort(of_samples(kSample));
  wholes_ = wholes_.index_select(1, order);
  reals_ = at::cat(reals, 1).index_select(1, order);
  using namespace py::literals;
  return py::dict("status"_a = wrap(of_samples(kStatus)), "ys"_a = wrap(ys_), "nfe"_a = nfe_,
                  "accepted"_a = wrap(of_samples(kAccepted)),
                  "rejected"_a = wrap(of_samples(kRejected)),
                  "filled"_a = wrap(of_samples(kFilled)), "t"_a = wrap(of_samples(kT0)),
                  "dt"_a = wrap(of_samples(kDt)), "error_ratio"_a = wrap(of_samples(kErrorRatio)));
}

// target = y0 + step * sum_j row_j k_j where samples move, and the times that go with it.
void Run::stage(Shown& target, const Row& row, double c, int nudge) {
  field_->make_writable(target);
  std::vector<int64_t> shape(field_->shapes.empty() ? size_t(field_->like.dim())
                                                    : field_->shapes[0].size(), 1);
  shape[0] = wholes_.size(1);
  time_.make_writable(shape, field_->like.options());
  const Batch& b = batch();
  const Terms k = slopes();
  const Sum sum = sum_of(row);
  const StageTimes times{c, nudge, time_.flat.mutable_data_ptr()};
  const void* const y0 = y0_.const_data_ptr();
  void* const out = target.flat.mutable_data_ptr();
  run(
      [&](int threads) {
        cpu::stage(b, y0, k, sum, times, out, threads);
        return Tally();
      },
      [&](unsigned*, Tally*, void* stream) {
#ifdef FLASHODE_WITH_CUDA
        check_cuda(cuda::stage(b, y0, k, sum, times, out, stream));
#endif
        return false;
      });
}

// func at the times and the state of the last stage.
at::Tensor Run::call(const Shown& y) {
  ++nfe_;
  const at::Tensor k = field_->slope(field_->value_at(time_.argument, y.argument));
  if (grad_mode_ && k.requires_grad() && nfe_ > 1) {
    PyErr_SetString(py::module_::import("flashode").attr("ArgumentError").ptr(),
                    "what func returned began to carry gradients after its first call; "
                    "solve with engine='reference', or under torch.no_grad()");
    throw py::error_already_set();
  }
  return k;
}

// Hairer I, II.4: an Euler step of moderate length shows how fast the field changes.
void Run::first_step() {
  const py::object given = p_.attr("first_step");
  if (!given.is_none()) {
    of_samples(kDt).fill_(given.cast<double>());
    return;
  }
  const void *y0 = y0_.const_data_ptr(), *f0 = f0_.const_data_ptr();
  running_ = run([&](int threads) { return cpu::probe(batch(), y0, f0, threads); },
                 [&](unsigned* scratch, Tally* tally, void* stream) {
#ifdef FLASHODE_WITH_CUDA
                   check_cuda(cuda::probe(batch(), y0, f0, scratch, tally, stream));
#endif
                   return true;
                 }).running;
  if (running_ == 0) return;
  k_ = {f0_};
  stage(stage_, Row({1}), 1, 0);
  const at::Tensor slope = call(stage_);
  const void* f1 = slope.const_data_ptr();
  run(
      [&](int threads) {
        cpu::first_trials(batch(), y0, f0, f1, threads);
        return Tally();
      },
      [&](unsigned*, Tally*, void* stream) {
#ifdef FLASHODE_WITH_CUDA
        check_cuda(cuda::first_trials(batch(), y0, f0, f1, stream));
#endif
        return false;
      });
}

void Run::begin_trials() {
  running_ = run([&](int threads) { return cpu::begin_trials(batch(), threads); },
                 [&](unsigned* scratch, Tally* tally, void* stream) {
#ifdef FLASHODE_WITH_CUDA
                   check_cuda(cuda::begin_trials(batch(), scratch, tally, stream));
#endif
                   return true;
                 }).running;
}

// All stages from (t0, y0) to t1, and the candidates y1.
void Run::rk_step() {
  const int stages = int(table_.c.size());
  k_.assign(1, f0_);
  for (int i = 1; i < stages; ++i) {
    const bool at_end = table_.c[i] == 1, is_result = table_.fsal && i == stages - 1;
    Shown& y_i = is_result ? candidate_ : stage_;
    // parity: a stage at the end of the step sees the time just before it.
    stage(y_i, table_.a[i], table_.c[i], at_end ? -1 : 0);
    const int64_t version = y_i.version();
    const at::Tensor k_i = call(y_i);
    if (is_result && y_i.written_since(version)) stage(candidate_, table_.a[i], 1, 0);
    k_.push_back(k_i);
  }
  if (!table_.fsal) stage(candidate_, table_.b, 1, 0);
}

// Decides on every trial. Returns whether dense output needs its own stages in this step.
bool Run::judge() {
  const void *y0 = y0_.const_data_ptr(), *y1 = candidate_.flat.const_data_ptr();
  const Batch& b = batch();
  const Terms k = slopes();
  const Sum error = sum_of(table_.b_err);
  const bool extra = polynomial_.has_extra;
  return run([&](int threads) { return cpu::judge(b, y0, y1, k, error, extra, threads); },
             [&](unsigned* scratch, Tally* tally, void* stream) {
#ifdef FLASHODE_WITH_CUDA
               check_cuda(cuda::judge(b, y0, y1, k, error, extra, scratch, tally, stream));
#endif
               return extra;
             }).inside > 0 && extra;
}

// Evaluates the stages that dense output adds.
void Run::extend() {
  for (size_t i = 0; i < dense_.extra_c.size(); ++i) {
    stage(stage_, dense_.extra_a[i], dense_.extra_c[i], 0);
    k_.push_back(call(stage_));
  }
}

// Writes the outputs in accepted steps, makes their candidates the states, and begins new trials.
void Run::commit() {
  const at::Tensor& last = k_[table_.c.size() - 1];  // parity: the next step's f0, for every method
  while (k_.size() < table_.c.size() + dense_.extra_c.size()) k_.push_back(f0_);  // of no weight
  void *y0 = y0_.mutable_data_ptr(), *f0 = f0_.mutable_data_ptr();
  const void *y1 = candidate_.flat.const_data_ptr(), *f1 = last.const_data_ptr();
  const Batch& b = batch();
  const Terms k = slopes();
  const Outputs outputs{ys_.mutable_data_ptr(), samples_};
  running_ = run([&](int threads) {
                   return cpu::commit(b, y0, f0, y1, k, f1, polynomial_, outputs, threads);
                 },
                 [&](unsigned* scratch, Tally* tally, void* stream) {
#ifdef FLASHODE_WITH_CUDA
                   check_cuda(cuda::commit(b, y0, f0, y1, k, f1, polynomial_, outputs, scratch,
                                           tally, stream));
#endif
                   return true;
                 }).running;
}

// Keeps what is to be known of samples that leave the batch.
void Run::set_aside(const at::Tensor& rows) {
  finished_.emplace_back(reals_.index_select(1, rows).cpu(), wholes_.index_select(1, rows).cpu());
}

// Something laid out like a state, for some of its samples.
at::Tensor Run::kept(const at::Tensor& x, const at::Tensor& rows) const {
  const at::Tensor flat = x.reshape({-1});
  const int64_t count = wholes_.size(1);
  std::vector<at::Tensor> members;
  for (size_t m = 1; m < columns_.size(); ++m) {
    const int64_t width = columns_[m] - columns_[m - 1];
    const at::Tensor member = flat.narrow(0, count * columns_[m - 1], count * width);
    members.push_back(member.view({count, width}).index_select(0, rows).view({-1}));
  }
  return at::cat(members);
}

// Drops finished samples once they are half of those that func is called with.
void Run::compact() {
  if (!compact_ || 2 * running_ > wholes_.size(1)) return;
  const at::Tensor running = of_samples(kStatus).eq(kRunning);
  const at::Tensor rows = at::nonzero(running).view({-1});
  set_aside(at::nonzero(running.logical_not()).view({-1}));
  for (at::Tensor* x : {&tol_.each_rtol, &tol_.each_atol, &steps_, &y0_, &f0_}) {
    if (x->defined()) *x = kept(*x, rows);
  }
  reals_ = reals_.index_select(1, rows);
  wholes_ = wholes_.index_select(1, rows);
  field_.emplace(p_.attr("of_samples")(running_));
  stage_ = candidate_ = time_ = Shown();
}

// The fields of an outcome; or the first slope, where it shows that gradients are recorded.
py::object Run::solve() {
  const c10::OptionalDeviceGuard device(field_->like.device());
  if (running_ == 0) return outcome();
  y0_ = unpack(p_.attr("start")).clone(at::MemoryFormat::Contiguous);
  stage(stage_, Row(), 0, 0);
  const at::Tensor first = call(stage_);
  if (grad_mode_ && first.requires_grad()) return wrap(first);
  f0_ = first.clone();
  first_step();
  begin_trials();
  while (running_ > 0) {
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    compact();
    rk_step();
    if (judge()) extend();
    commit();
  }
  return outcome();
}

}  // namespace

py::object solve_batch(py::handle problem, const Table& table, const Interpolant& dense) {
  return Run(problem, table, dense).solve();
}

}  // namespace flashode

// The continuous adjoint of a solve with one clock: the state, its adjoint and the integrals that are the
// gradients of parameters go back together, in steps of their own, once through all outputs. Where an
// output has a gradient a step lands on it: the gradient enters, and the state as it was stored takes
// the place of the rebuilt one. The decisions are those of csrc/torch/sweep.cpp, which passes outputs over.
//
// Integrals do not feed back. A stage adds what the field's `pull_back` makes of the adjoint to sums of
// its own, from which the integrals of a step and their error are weighed at its end.
#pragma once

#include <cfloat>

#include "sweep_tile.h"

namespace flashode {

template <class Field, class Method>
class Sweep {
 public:
  using Real = typename Field::Real;
  using V = StateOf<Field>;
  using Part = SweepTile<Field, Method>;
  static constexpr int stages = Method::stages;
  static constexpr int64_t width = Field::width;

  explicit Sweep(Call& call)
      : call_(call),
        tiles_(tiles_of<Field>(call)),
        chunks_(tiles_ > kMostChunks ? kMostChunks : tiles_),
        threads_(threads_for(call, chunks_, (tiles_ / (chunks_ + 1) + 1) * 2 * Tile<Field, Method>::operations)),
        prepared_(Field::prepared),
        space_(tiles_ * Part::size),
        shared_(chunks_ * Part::shared_size),
        lane_sums_(chunks_ * stages * Field::lane_sums),
        sums_(chunks_ * stages * Field::sums),
        folded_(Field::lane_sums + Field::sums),
        squares_(chunks_ * 2 * call.member_count),
        integrals_(3 * numbers()),
        gradients_(call.input_count),
        clock_{call.times[0], call.times[0], 0, *call.direction, *call.low, *call.high} {
    control_.order = Method::order;
    control_.safety = call.safety, control_.ifactor = call.ifactor, control_.dfactor = call.dfactor;
    control_.min_step = call.min_step, control_.max_step = call.max_step;
    for (int i = 0; i < 3; ++i) control_.betas[i] = call.betas[i];
  }

  bool exists() const {
    return prepared_.data() && space_.data() && shared_.data() && lane_sums_.data() && sums_.data() &&
           folded_.data() && squares_.data() && integrals_.data() &&
           gradients_.data();
  }

  Status run() {
    Field::prepare(reinterpret_cast<const Real* const*>(call_.inputs), prepared_.data());
    for_each([&](Part tile, int64_t) { tile.load(call_); });
    for (int64_t i = 0; i < 3 * numbers(); ++i) integrals_.data()[i] = 0;
    call_.drift = 0, call_.drift_t = NAN;
    if constexpr (Method::adaptive) {
      dt_ = call_.outputs > 1 ? first_step() : 0;
      while (status_ == kRunning && next_ < call_.outputs) try_step();
    } else {
      for (int64_t i = 1; i < call_.grid_points && status_ == kRunning; ++i) fixed_step(call_.grid[i]);
    }
    if (status_ == kRunning) status_ = kSuccess;
    report();
    return status_;
  }

 private:
  int64_t numbers() const {
    int64_t total = 0;
    for (int64_t i = 0; i < call_.input_count; ++i) total += call_.input_sizes[i];
    return total;
  }
  V* lane_sums(int64_t chunk) const { return lane_sums_.data() + chunk * stages * Field::lane_sums; }
  Real* sums(int64_t chunk) const { return sums_.data() + chunk * stages * Field::sums; }

  // body(tile, its chunk) for every tile.
  template <class Body>
  void for_each(const Body& body) const {
#pragma omp parallel for num_threads(threads_) schedule(static) if (threads_ > 1)
    for (int64_t c = 0; c < chunks_; ++c) {
      for (int64_t i = tiles_ * c / chunks_; i < tiles_ * (c + 1) / chunks_; ++i) {
        body(Part(i, space_.data() + i * Part::size, shared_.data() + c * Part::shared_size), c);
      }
    }
  }

  // Nothing from stages [begin, end) yet.
  void clear_products(int begin, int end) const {
    for (int64_t c = 0; c < chunks_; ++c) {
      clear(lane_sums(c) + begin * Field::lane_sums, (end - begin) * Field::lane_sums);
      clear(sums(c) + begin * Field::sums, (end - begin) * Field::sums);
    }
  }

  // The slopes at the start of a step.
  void begin() {
    if (has_slopes_) return;
    clear_products(0, 1);
    const Real t = clock_.time(0, nudge_);
    for_each([&](Part tile, int64_t c) {
      tile.evaluate(0, t, tile.y, tile.adj, prepared_.data(), lane_sums(c), sums(c));
    });
    has_slopes_ = true;
  }

  // Largest root mean square over the members of the state and of its adjoint, after work on each tile.
  template <class Work, class OfY, class OfAdj>
  double norm_after(const Work& work, const OfY& of_y, const OfAdj& of_adj) const {
    const int64_t count = 2 * call_.member_count;
    double *const squares = squares_.data(), norm = 0;
    for (int64_t i = 0; i < chunks_ * count; ++i) squares[i] = 0;
    for_each([&](Part tile, int64_t c) {
      work(tile, c);
      tile.add_squares(call_, of_y, of_adj, squares + c * count);
    });
    for (int64_t i = 0; i < count; ++i) {
      double sum = 0;
      for (int64_t c = 0; c < chunks_; ++c) sum += squares[c * count + i];
      const int64_t size = (call_.members[i / 2 + 1] - call_.members[i / 2]) * call_.samples;
      if (size > 0) norm = larger(norm, std::sqrt(sum / double(size)));
    }
    return norm;
  }

  template <class OfY, class OfAdj>
  double norm(const OfY& of_y, const OfAdj& of_adj) const {
    return norm_after([](const Part&, int64_t) {}, of_y, of_adj);
  }

  // Hairer, Norsett, Wanner I, II.4, of the state and its adjoint.
  double first_step() {
    if (call_.first_step == call_.first_step) return call_.first_step;
    begin();
    for_each([&](Part tile, int64_t) {
      for (int64_t f = 0; f < width; ++f) tile.y1[f] = tile.y[f], tile.adj1[f] = tile.adj[f];
    });
    const double d0 = norm([](const Part& tile, int64_t f) { return tile.y[f]; },
                           [](const Part& tile, int64_t f) { return tile.adj[f]; });
    const double d1 = norm([](const Part& tile, int64_t f) { return tile.k[f]; },
                           [](const Part& tile, int64_t f) { return tile.m[f]; });
    if (!is_finite(d1)) {
      status_ = kNonfiniteField;
      return 0;
    }
    const double span = call_.times[call_.outputs - 1] - clock_.t0, guess = first_guess(d0, d1);
    clock_.dt = guess < span ? guess : span, clock_.t1 = clock_.t0 + clock_.dt;
    for_each([&](Part tile, int64_t c) {
      tile.template advance<EulerRow>(clock_.step(), tile.stage, tile.adj_stage);
      tile.evaluate(1, clock_.time(1, 0), tile.stage, tile.adj_stage, prepared_.data(), lane_sums(c), sums(c));
    });
    const double d2 = norm([](const Part& tile, int64_t f) { return tile.k[width + f] - tile.k[f]; },
                           [](const Part& tile, int64_t f) { return tile.m[width + f] - tile.m[f]; });
    return initial_step(clock_.dt, d1, d2 / clock_.dt, Method::order);
  }

  // The next time that a step lands on: of an output with a gradient, the last of them, or a stop.
  double landing(bool* jumps) {
    if (target_ < next_) {
      target_ = next_;
      while (target_ + 1 < call_.outputs && !has_gradient(call_.outputs - 1 - target_)) ++target_;
    }
    double target = call_.times[target_];
    while (stop_ < call_.stop_count && call_.stops[stop_] <= clock_.t0) ++stop_;
    *jumps = stop_ < call_.stop_count && call_.stops[stop_] <= target;
    if (*jumps) target = call_.stops[stop_], *jumps = call_.stop_jumps[stop_];
    return target;
  }
  bool has_gradient(int64_t row) const {
    const Real* const of_row = static_cast<const Real*>(call_.grad_ys) + row * call_.row;
    for (int64_t i = 0; i < call_.row; ++i) {
      if (of_row[i] != 0) return true;
    }
    return false;
  }

  // All stages of a step; returns the norm of its error.
  double take_stages() {
    const int nudge_at_end = Method::adaptive || call_.perturb ? -1 : 0;
    begin();
    clear_products(1, stages);
    const auto take = [&](Part& tile, int64_t c) {
      tile.take_step(clock_, nudge_at_end, prepared_.data(), lane_sums(c), sums(c));
    };
    if constexpr (Method::adaptive) {
      using Error = ErrorRow<Method>;
      const V h = clock_.step();
      return norm_after(
          take, [=](const Part& tile, int64_t f) { return h * sum_of_terms<Error, width>(tile.k + f); },
          [=](const Part& tile, int64_t f) { return h * sum_of_terms<Error, width>(tile.m + f); });
    } else {
      for_each([&](Part tile, int64_t c) { take(tile, c); });
      return 0;
    }
  }

  // One step of a prescribed length.
  void fixed_step(double t1) {
    clock_.t1 = t1, clock_.dt = dt_ = t1 - clock_.t0;
    has_slopes_ = false, nudge_ = call_.perturb ? 1 : 0;
    ratio_ = take_stages();
    weigh<ResultRow<Method>>(increments());
    if (!are_finite([](const Part& tile) { return tile.y1; }, [](const Part& tile) { return tile.adj1; })) {
      return fail(kNonfiniteField);
    }
    commit(false);
  }

  // Tries a step, and makes it if it stands.
  void try_step() {
    if (trials_++ >= call_.max_num_steps) return fail(kMaxSteps);
    dt_ = clamp_step(dt_, control_);
    bool jumps = false;
    const double target = landing(&jumps), free_end = clock_.t0 + dt_;
    const bool lands = free_end >= target;
    clock_.t1 = lands ? target : free_end;
    if (!(clock_.t1 > clock_.t0) || dt_ < DBL_MIN) return fail(kStepUnderflow);
    if (lands && clock_.t1 - clock_.t0 < dt_) dt_ = clock_.t1 - clock_.t0;
    clock_.dt = dt_;
    ratio_ = take_stages();
    weigh<ResultRow<Method>>(increments());
    if (!call_.seminorm) {
      weigh<ErrorRow<Method>>(errors());
      ratio_ = larger(ratio_, norm_of_integrals());
    }
    const Decision decision = decide(ratio_, dt_, control_);
    const bool at_floor = dt_ <= control_.min_step;
    dt_ = decision.next_dt;
    if (!decision.accepted) {
      ++rejected_;
      if (!is_finite(ratio_) && (at_floor || !are_finite([](const Part& tile) { return tile.k; },
                                                         [](const Part& tile) { return tile.m; }))) {
        fail(kNonfiniteField);
      }
      return;
    }
    remember(ratio_, control_);
    commit(lands && jumps);
  }

  // Whether all numbers that lie at of_y(tile) and at of_adj(tile) are.
  template <class OfY, class OfAdj>
  bool are_finite(const OfY& of_y, const OfAdj& of_adj) const {
    for (int64_t i = 0; i < tiles_; ++i) {
      const Part tile(i, space_.data() + i * Part::size, shared_.data());
      for (int64_t f = 0; f < width; ++f) {
        if (!all(is_finite(of_y(tile)[f]) & is_finite(of_adj(tile)[f]))) return false;
      }
    }
    return true;
  }

  // ---- the integrals: of the inputs first, laid out one after the other ----------------------------

  Real* increments() const { return integrals_.data() + numbers(); }
  Real* errors() const { return integrals_.data() + 2 * numbers(); }

  // What the stages, with the weights of a row, add to the gradients of the inputs.
  template <class Row>
  void weigh(Real* to) const {
    Real *const lanes = folded_.data(), *const numbers_of = lanes + Field::lane_sums;
    const Real h = -Real(clock_.direction * clock_.dt);
    for (int64_t i = 0; i < Field::lane_sums; ++i) {
      V total = zero<V>();
      for (int64_t c = 0; c < chunks_; ++c) {
        total = total + sum_of_terms<Row, Field::lane_sums>(lane_sums(c) + i);
      }
      lanes[i] = h * sum_of_lanes(total);
    }
    for (int64_t i = 0; i < Field::sums; ++i) {
      Real total = 0;
      for (int64_t c = 0; c < chunks_; ++c) total += sum_of_terms<Row, Field::sums>(sums(c) + i);
      numbers_of[i] = h * total;
    }
    for (int64_t i = 0; i < numbers(); ++i) to[i] = 0;
    Real** const gradients = gradients_.data();
    for (int64_t i = 0; i < call_.input_count; to += call_.input_sizes[i++]) {
      gradients[i] = call_.grad_inputs[i] ? to : nullptr;
    }
    Field::finish(prepared_.data(), lanes, numbers_of, gradients);
  }

  double scaled_square(double error, double x0, double x1) const {
    const double scaled = scaled_error(error, x0, x1, call_.rtol, call_.atol);
    return scaled * scaled;
  }

  // Largest root mean square of their scaled errors, each input and each constant for itself.
  double norm_of_integrals() const {
    double norm = 0;
    const Real *x = integrals_.data(), *dx = increments(), *error = errors();
    for (int64_t i = 0; i < call_.input_count; ++i) {
      const int64_t size = call_.input_sizes[i];
      double sum = 0;
      for (int64_t j = 0; j < size; ++j) sum += scaled_square(error[j], x[j], double(x[j]) + dx[j]);
      if (size > 0) norm = larger(norm, std::sqrt(sum / double(size)));
      x += size, dx += size, error += size;
    }
    const V h = clock_.step();
    for (int64_t r = 0; r < Field::own; ++r) norm = larger(norm, norm_of_own(r, h));
    return Field::timed && call_.grad_t ? larger(norm, norm_of_time(h)) : norm;
  }
  double norm_of_own(int64_t r, const V& h) const {
    double sum = 0;
    for (int64_t i = 0; i < tiles_; ++i) {
      const Part tile(i, space_.data() + i * Part::size, shared_.data());
      const V change = -h * sum_of_terms<ResultRow<Method>, Field::own>(tile.of_own + r);
      const V error = h * sum_of_terms<ErrorRow<Method>, Field::own>(tile.of_own + r);
      for (int l = 0; l < live_lanes<Field>(call_, tile.first); ++l) {
        const double x = lane(tile.adj_own[r], l);
        sum += scaled_square(lane(error, l), x, x + lane(change, l));
      }
    }
    return std::sqrt(sum / double(call_.samples));
  }
  double norm_of_time(const V& h) const {
    const double error = sum_over_tiles<ErrorRow<Method>>(h);
    return std::sqrt(scaled_square(error, of_time_, of_time_ - sum_over_tiles<ResultRow<Method>>(h)));
  }
  template <class Row>
  double sum_over_tiles(const V& h) const {
    double sum = 0;
    for (int64_t i = 0; i < tiles_; ++i) {
      const Part tile(i, space_.data() + i * Part::size, shared_.data());
      sum += double(sum_of_lanes(h * sum_of_terms<Row, 1>(tile.of_t)));
    }
    return sum;
  }

  // ---- the end of a step ---------------------------------------------------------------------------

  // Makes the end of the step the state. At an output the gradient enters, and the state is the stored one.
  void commit(bool jumps) {
    if (Field::timed) of_time_ -= sum_over_tiles<ResultRow<Method>>(clock_.step());
    Real* const x = integrals_.data();
    for (int64_t i = 0; i < numbers(); ++i) x[i] += increments()[i];
    const int64_t before = next_;
    while (next_ < call_.outputs && call_.times[next_] <= clock_.t1) ++next_;
    const int64_t row = call_.outputs - next_;
    const bool on_output = next_ > before && call_.times[next_ - 1] == clock_.t1;
    if (next_ > before) trials_ = 0;
    const Real* const stored = static_cast<const Real*>(call_.ys) + row * call_.row;
    const V h = clock_.step();
    if (on_output && Method::adaptive) note_drift(stored);
    for_each([&](Part tile, int64_t) {
      for (int64_t r = 0; r < Field::own; ++r) {
        tile.adj_own[r] = tile.adj_own[r] - h * sum_of_terms<ResultRow<Method>, Field::own>(tile.of_own + r);
      }
      for (int64_t f = 0; f < width; ++f) tile.y[f] = tile.y1[f], tile.adj[f] = tile.adj1[f];
      if (on_output) {
        load_state<Field>(call_, tile.first, stored, tile.y);
        add_cotangents<Field>(call_, tile.first, row, tile.adj);
      }
      hand_on(tile.k, width), hand_on(tile.m, width), hand_on(tile.of_own, Field::own), hand_on(tile.of_t, 1);
    });
    for (int64_t c = 0; c < chunks_; ++c) {
      hand_on(lane_sums(c), Field::lane_sums);
      hand_on(sums(c), Field::sums);
    }
    clock_.t0 = clock_.t1;
    has_slopes_ = !on_output && !jumps;
    nudge_ = jumps ? 1 : 0;
    ++accepted_;
  }
  // How far the rebuilt state has parted from the stored one, in tolerances of a member as a whole.
  void note_drift(const Real* stored) {
    for (int64_t member = 0; member < call_.member_count; ++member) {
      double apart = 0, size = 0;
      for (int64_t i = 0; i < tiles_; ++i) {
        const Part tile(i, space_.data() + i * Part::size, shared_.data());
        for (int64_t f = call_.members[member]; f < call_.members[member + 1]; ++f) {
          const V y = gather<V>(call_, tile.first, stored, call_.offset[f], call_.stride[f]);
          for (int l = 0; l < live_lanes<Field>(call_, tile.first); ++l) {
            const double b = lane(y, l), difference = double(lane(tile.y1[f], l)) - b;
            apart += difference * difference, size += b * b;
          }
        }
      }
      const double numbers = double((call_.members[member + 1] - call_.members[member]) * call_.samples);
      const double tolerance = std::sqrt(numbers) * call_.atol + call_.rtol * std::sqrt(size) + DBL_MIN;
      const double drift = std::sqrt(apart) / tolerance;
      if (drift <= call_.drift) continue;
      call_.drift = drift, call_.drift_t = clock_.t1;
    }
  }
  // parity: the last stage is the first of the next step, for every method.
  template <class T>
  static void hand_on(T* of_stages, int64_t count) {
    for (int64_t i = 0; i < count; ++i) of_stages[i] = of_stages[(stages - 1) * count + i];
  }

  void fail(Status status) { status_ = status; }

  void report() const {
    for_each([&](Part tile, int64_t) {
      store_state<Field>(call_, tile.first, tile.adj, call_.adj_y0);
      store_own<Field>(call_, tile.first, tile.adj_own);
    });
    const Real* x = integrals_.data();
    for (int64_t i = 0; i < call_.input_count; x += call_.input_sizes[i++]) {
      Real* const to = static_cast<Real*>(call_.grad_inputs[i]);
      for (int64_t j = 0; j < call_.input_sizes[i] && to; ++j) to[j] += x[j];
    }
    if (call_.grad_t) *call_.grad_t += of_time_;
    *call_.status = status_, *call_.accepted = accepted_, *call_.rejected = rejected_;
    *call_.t = clock_.t0, *call_.dt = dt_, *call_.error_ratio = ratio_;
  }

  Call& call_;
  const int64_t tiles_, chunks_;
  const int threads_;
  const Buffer<Real> prepared_;
  const Buffer<V> space_, shared_, lane_sums_;
  const Buffer<Real> sums_, folded_;
  const Buffer<double> squares_;
  const Buffer<Real> integrals_;  // of the inputs; what a step adds to them; the error of that
  const Buffer<Real*> gradients_;
  Controller control_;

  // Where the sweep stands.
  OneClock<Field> clock_;
  double dt_ = NAN, ratio_ = NAN, of_time_ = 0;
  bool has_slopes_ = false;
  int nudge_ = 0;
  int64_t next_ = 1, target_ = 0;  // outputs to come: the first, and that which a step lands on
  int64_t stop_ = 0, accepted_ = 0, rejected_ = 0, trials_ = 0;
  Status status_ = kRunning;
};

template <class Field, class Method>
Returned sweep(Call& call) {
  Sweep<Field, Method> run(call);
  if (!run.exists()) return kOutOfMemory;
  run.run();
  return kDone;
}

}  // namespace flashode

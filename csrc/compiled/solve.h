// A whole solve where all samples share one clock: adaptive steps with one size for all, or the
// steps of a grid. The same decisions as csrc/torch/driver.cpp, in the same order.
#pragma once

#include "dense.h"
#include "tile.h"

namespace flashode {

// The state of one solve. All of it is inlined into one function, so that it lives in registers.
// `Tiles` goes through all tiles (tiles.h, device.h), `Record` keeps the steps.
template <class Field, class Method, class Tiles, class Record>
class Solve {
 public:
  using Real = typename Field::Real;
  using V = StateOf<Field>;
  using Part = Tile<Field, Method>;
  using Clock = OneClock<Field>;

  FLASHODE_HD Solve(const Call& call, const Tiles& tiles, Record* record)
      : call_(call),
        tiles_(tiles),
        record_(record),
        control_{Method::order,
                 call.safety,
                 call.ifactor,
                 call.dfactor,
                 call.min_step,
                 call.max_step,
                 {call.betas[0], call.betas[1], call.betas[2]}},
        remembers_(call.betas[0] != 1 || call.betas[1] != 0 || call.betas[2] != 0),
        clock_{call.times[0], call.times[0], 0, *call.direction, *call.low, *call.high} {}

  // What the call returns; how the solve ended is written into the call.
  FLASHODE_HD Returned run() {
    tiles_.for_each([=, call = &call_](const Part& tile, int64_t) {
      store_state<Field>(*call, tile.first, tile.y0, call->ys);
    });
    if (call_.outputs > 1) {
      if constexpr (Method::adaptive) start();
      while (status_ == kRunning && returned_ == kDone && filled_ < call_.outputs) {
        if (tiles_.interrupted()) {
          returned_ = kInterrupted;
        } else if constexpr (Method::adaptive) {
          try_step();
        } else {
          fixed_step();
        }
      }
    }
    if (status_ == kRunning && returned_ == kDone) status_ = kSuccess;
    report();
    return returned_;
  }

  FLASHODE_HD Status status() const { return status_; }
  FLASHODE_HD int64_t accepted() const { return accepted_; }
  FLASHODE_HD int64_t nfe() const { return nfe_; }

 private:
  // The slope that steps begin with.
  FLASHODE_HD void evaluate_f0(int nudge) {
    ++nfe_;
    tiles_.for_each([clock = clock_, nudge](const Part& tile, int64_t) {
      tile.slope(clock.time(0, nudge), tile.y0, tile.k);
    });
  }

  // Hairer, Norsett, Wanner I, II.4: an Euler step of moderate length shows how fast the field
  // changes.
  FLASHODE_HD void start() {
    evaluate_f0(0);
    dt_ = call_.first_step;
    if (dt_ == dt_) return;
    const double d0 = tiles_.norm([](const Part& tile) {
      return tile.relative([y0 = tile.y0](int64_t f) { return y0[f]; });
    });
    const double d1 = tiles_.norm(
        [](const Part& tile) { return tile.relative([f0 = tile.k](int64_t f) { return f0[f]; }); });
    if (!is_finite(d1)) {
      error_ratio_ = d1;
      status_ = kNonfiniteField;
      return;
    }
    double h0 = first_guess(d0, d1);
    const double span = call_.end - clock_.t0;
    h0 = span < h0 ? span : h0;
    clock_.dt = h0, clock_.t1 = clock_.t0 + h0;
    ++nfe_;
    const double difference = tiles_.norm([clock = clock_](const Part& tile) {
      tile.template evaluate<EulerRow>(clock, 1, 0, 1, nullptr);
      return tile.relative([f0 = tile.k](int64_t f) { return f0[Part::width + f] - f0[f]; });
    });
    dt_ = initial_step(h0, d1, difference / h0, Method::order);
  }

  // Moves the end of the next step back to the first stop that it would reach or pass.
  FLASHODE_HD Landing land() {
    double stop = INFINITY;
    Landing kind = kFree;
    while (next_stop_ < call_.stop_count && call_.stops[next_stop_] <= clock_.t0) ++next_stop_;
    if (next_stop_ < call_.stop_count) {
      stop = call_.stops[next_stop_];
      kind = call_.stop_jumps[next_stop_] ? kJump : kStop;
    }
    if (call_.end <= stop) {
      stop = call_.end;
      kind = kEnd;
    }
    if (clock_.t1 < stop) return kFree;
    clock_.t1 = stop;
    return kind;
  }

  FLASHODE_HD void try_step() {
    if (trials_ >= call_.max_num_steps) {
      status_ = kMaxSteps;
      return;
    }
    ++trials_;
    dt_ = clamp_step(dt_, control_);
    clock_.t1 = clock_.t0 + dt_;
    const Landing kind = land();
    if (!(clock_.t1 > clock_.t0) || dt_ < DBL_MIN) {
      status_ = kStepUnderflow;
      return;
    }
    // A free step keeps its own length: t1 - t0 is rounded, and no rounding lengthens a step.
    const double length = clock_.t1 - clock_.t0;
    if (kind != kFree && length < dt_) dt_ = length;
    clock_.dt = dt_;
    nfe_ += Method::stages - 1;
    const double norm = tiles_.norm([clock = clock_](const Part& tile) {
      tile.take_step(clock, -1);
      return [&tile, clock](const auto& tolerance, int64_t f) {
        return tile.scaled_error_of_step(tolerance, f, clock);
      };
    });
    const Decision decision = decide(norm, dt_, control_);
    error_ratio_ = norm;
    dt_ = decision.next_dt;
    if (decision.accepted) {
      if (remembers_) remember(norm, control_);
      commit(kind);
      return;
    }
    ++rejected_;
    if (!is_finite(norm) && (clock_.dt <= call_.min_step || !f0_is_finite()))
      status_ = kNonfiniteField;
  }

  FLASHODE_HD bool f0_is_finite() const {
    return tiles_.all_of([](const Part& tile, int64_t) { return Part::is_finite_state(tile.k); });
  }

  FLASHODE_HD void fixed_step() {
    if (accepted_ + 1 >= call_.grid_points) {
      status_ = kMaxSteps;
      return;
    }
    clock_.t1 = call_.grid[accepted_ + 1];
    dt_ = clock_.dt = clock_.t1 - clock_.t0;
    nfe_ += Method::stages;
    const int nudge = call_.perturb ? 1 : 0;
    const bool finite = tiles_.all_of([clock = clock_, nudge](const Part& tile, int64_t) {
      tile.slope(clock.time(0, nudge), tile.y0, tile.k);
      tile.take_step(clock, -nudge);
      return Part::is_finite_state(tile.y1);
    });
    if (!finite) {
      status_ = kNonfiniteField;
      return;
    }
    error_ratio_ = 0;
    commit(kFree);
  }

  // Makes the candidate the state, once the outputs in the step are written: its end as computed,
  // others in between.
  FLASHODE_HD void commit(Landing kind) {
    const int64_t n = accepted_++;
    bool has_room = record_->add_time(clock_.t1);
    if constexpr (Record::keeps_states) {
      if (call_.records)
        has_room = has_room && record_->add({clock_.t0, clock_.t1, clock_.dt, kind});
    }
    if (!has_room) {
      returned_ = kOutOfMemory;
      return;
    }
    const int64_t begin = filled_;
    int64_t end = begin;
    while (end < call_.outputs && call_.times[end] <= clock_.t1) ++end;
    if (end > begin) trials_ = 0;
    const bool at_end = end > begin && call_.times[end - 1] == clock_.t1;
    const int64_t inner = at_end ? end - 1 : end;
    if (inner > begin) nfe_ += Method::extra;
    const auto move = [=, clock = clock_, call = &call_, record = record_](const Part& tile,
                                                                           int64_t i) {
      if constexpr (Record::keeps_states) {
        if (call->records) tile.copy_start(record->y0(n, i), record->f0(n, i));
      }
      const bool finite = inner == begin || interpolate(*call, tile, clock, begin, inner);
      if (at_end) store_state<Field>(*call, tile.first, tile.y1, output(*call, inner));
      tile.move_on();
      return finite;
    };
    bool finite = true;
    if constexpr (Method::extra > 0) {
      finite = tiles_.all_of(move);
    } else {
      tiles_.for_each(move);
    }
    clock_.t0 = clock_.t1;
    if (!finite) {
      status_ = kNonfiniteField;
      return;
    }
    filled_ = end;
    if (kind == kJump) evaluate_f0(1);
  }

  static FLASHODE_HD Real* output(const Call& call, int64_t row) {
    return static_cast<Real*>(call.ys) + row * call.row;
  }

  // Outputs begin to end, all inside the step. False if they are not finite: stages that are added
  // for them were not seen by the error test.
  static FLASHODE_HD bool interpolate(const Call& call, const Part& tile, const Clock& clock,
                                      int64_t begin, int64_t end) {
    tile.extend(clock);
    const DenseOutput<Field, Method> dense(tile, clock);
    V local[Part::is_small ? Part::width : 1];
    V* const y = Part::is_small ? local : tile.stage;
    bool finite = true;
    for (int64_t row = begin; row < end; ++row) {
      const double x = (call.times[row] - clock.t0) / (clock.t1 - clock.t0);
      dense.at(splat<V>(Real(x)), y);
      store_state<Field>(call, tile.first, y, output(call, row));
      if (Method::extra > 0) finite = finite && Part::is_finite_state(y);
    }
    return finite;
  }

  FLASHODE_HD void report() {
    const int64_t filled = status_ == kSuccess ? call_.outputs : filled_;
    tiles_.for_each([=, call = &call_](const Part& tile, int64_t) {
      store_state<Field>(*call, tile.first, tile.y0, call->y_end);
      for (int64_t row = filled; row < call->outputs; ++row) {
        fill_state<Field>(*call, tile.first, Real(NAN), output(*call, row));
      }
    });
    if (!tiles_.reports()) return;
    *call_.status = status_;
    *call_.accepted = accepted_;
    *call_.rejected = rejected_;
    *call_.filled = filled_;
    *call_.t = clock_.t0;
    *call_.dt = dt_;
    *call_.error_ratio = error_ratio_;
  }

  const Call& call_;
  const Tiles& tiles_;
  Record* const record_;
  Controller control_;
  const bool remembers_;

  // Where the solve stands.
  Clock clock_;  // of the trial step
  double dt_ = NAN, error_ratio_ = NAN;
  Status status_ = kRunning;
  Returned returned_ = kDone;
  int64_t next_stop_ = 0, filled_ = 1, accepted_ = 0, rejected_ = 0, trials_ = 0, nfe_ = 0;
};

}  // namespace flashode

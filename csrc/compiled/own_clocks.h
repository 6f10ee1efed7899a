// A whole solve of samples with clocks of their own. The samples of a tile try a step at the same
// time, each its own, until the last of them has ended; a lane that rests repeats its state. The
// same decisions as csrc/torch/batched.cpp, by sample.
#pragma once

#include "dense.h"
#include "tile.h"

namespace flashode {

// What the samples of a tile see of their trial steps. Times are on forward clocks.
template <class Field>
struct OwnClocks {
  using V = StateOf<Field>;
  using Times = TimeOf<Field>;
  Times t0, t1, dt, direction, low, high;
  V signed_dt;

  FLASHODE_HD const V& step() const { return signed_dt; }
  // A trial step; of length 0 where samples rest.
  FLASHODE_HD void set(const Times& length, const Times& end) {
    dt = length, t1 = end;
    signed_dt = convert<V>(direction * length);
  }
  FLASHODE_HD V time(double c, int nudge) const {
    if (!Field::timed) return zero<V>();
    const Times t = c == 0 ? t0 : c == 1 ? t1 : t0 + c * dt;
    const Times rounded = round_time<typename Field::Real>(t, nudge);
    const Times above = select(rounded < low, low, rounded);
    return convert<V>(direction * select(above > high, high, above));
  }
};

// Solves one tile after the other. One for each thread. `Rounds` counts the trials, `Record` keeps
// the steps that stand.
template <class Field, class Method, class Rounds, class Record>
class TileSolver {
 public:
  using Real = typename Field::Real;
  using V = StateOf<Field>;
  using Part = Tile<Field, Method>;
  using Times = TimeOf<Field>;
  using Lanewise = Mask<Times>;
  static constexpr int L = Field::lanes;

  // The space is of a tile's own, and of what tiles share.
  FLASHODE_BOTH TileSolver(const Call& call, const Real* prepared, V* space, bool has_each,
                           Rounds& rounds)
      : call_(call),
        rounds_(rounds),
        tile_(call, prepared, space, space + Part::own_size(has_each), has_each),
        remembers_(call.betas[0] != 1 || call.betas[1] != 0 || call.betas[2] != 0) {
    control_.order = Method::order;
    control_.safety = call.safety, control_.ifactor = call.ifactor, control_.dfactor = call.dfactor;
    control_.min_step = call.min_step, control_.max_step = call.max_step;
    for (int i = 0; i < 3; ++i) control_.betas[i] = call.betas[i];
  }

  // Solves the samples from `first` on; `stopped` says whether to go on.
  template <class Stopped>
  FLASHODE_BOTH Returned run(int64_t first, Record* record, const Stopped& stopped) {
    record_ = record;
    load(first);
    if (any(running_)) start();
    dt_ = minimum(maximum(dt_, splat<Times>(call_.min_step)), splat<Times>(call_.max_step));
    begin_trials();
    int64_t round = 0;
    for (; any(running_); ++round) {
      if (stopped()) return kInterrupted;
      tile_.take_step(clock_, -1);
      extends_ = false;
      judge();
      emit();
      commit();
      if (!has_memory_ || !rounds_.add(round, extends_)) return kOutOfMemory;
      begin_trials();
    }
    report();
    return kDone;
  }

  bool started = false, probed = false;  // whether there was a first and a second call of the field

 private:
  FLASHODE_BOTH int64_t sample(int l) const {
    return tile_.first + l < call_.samples ? tile_.first + l : call_.samples - 1;
  }
  FLASHODE_BOTH const double* times_of(int l) const {
    return call_.times + sample(l) * call_.times_stride;
  }
  FLASHODE_BOTH Real* output(int64_t row) const {
    return static_cast<Real*>(call_.ys) + row * call_.row;
  }

  // Samples of `mask` end.
  FLASHODE_HD void end_with(const Lanewise& mask, Status status) {
    if (!any(mask)) return;
    for (int l = 0; l < L; ++l) {
      if (lane(mask, l)) status_[l] = status;
    }
    running_ = running_ & !mask;
  }

  FLASHODE_BOTH void write_lane(int l, const V* y, void* state) const {
    for (int64_t f = 0; f < Field::width; ++f) {
      static_cast<Real*>(state)[call_.offset[f] + sample(l) * call_.stride[f]] = lane(y[f], l);
    }
  }

  FLASHODE_BOTH void load(int64_t first) {
    tile_.load(first);
    store_state<Field>(call_, first, tile_.y0, call_.y_end);
    Times runs = zero<Times>();
    int mate = -1;
    for (int l = 0; l < L; ++l) {
      const double* const times = times_of(l);
      set_lane(clock_.t0, l, times[0]);
      set_lane(end_, l, times[call_.outputs - 1]);
      set_lane(clock_.direction, l, call_.direction[sample(l)]);
      set_lane(clock_.low, l, call_.low[sample(l)]);
      set_lane(clock_.high, l, call_.high[sample(l)]);
      int64_t filled = 0;
      for (; filled < call_.outputs && times[filled] == times[0]; ++filled) {
        if (first + l < call_.samples) write_lane(l, tile_.y0, output(filled));
      }
      set_lane(filled_, l, double(filled));
      const bool usable = lane_is_finite(l, tile_.y0);
      if (usable && mate < 0) mate = l;
      status_[l] = !usable ? kNonfiniteState : filled == call_.outputs ? kSuccess : kRunning;
      cause_[l] = kStepUnderflow;
      set_lane(runs, l, status_[l] == kRunning && first + l < call_.samples);
    }
    find_next();
    running_ = ran_ = runs > 0;
    // What starts from NaN would pass it to whatever the samples share: a mate stands in for it.
    for (int l = 0; mate >= 0 && l < L; ++l) {
      if (status_[l] != kNonfiniteState) continue;
      for (int64_t f = 0; f < Field::width; ++f) set_lane(tile_.y0[f], l, lane(tile_.y0[f], mate));
    }
    clock_.set(zero<Times>(), clock_.t0);
    dt_ = ratio_ = splat<Times>(NAN);
    accepted_ = rejected_ = trials_ = zero<Times>();
    control_.past[0] = control_.past[1] = splat<V>(1);
  }

  FLASHODE_BOTH static bool lane_is_finite(int l, const V* y) {
    Real nothing = 0;
    for (int64_t f = 0; f < Field::width; ++f) nothing += lane(y[f], l) - lane(y[f], l);
    return nothing == 0;
  }

  // Of every sample, the largest root mean square over its members.
  template <class Norm, class Error>
  FLASHODE_HD Norm norms(const Error& error) const {
    Norm norm = zero<Norm>();
    tile_.for_each_member(error, [&](int64_t m, const Times& sum) {
      const int64_t width = call_.members[m + 1] - call_.members[m];
      if (width > 0) norm = larger(norm, square_root(convert<Norm>(sum * (1.0 / double(width)))));
    });
    return norm;
  }

  // Why the error of a sample is not finite.
  FLASHODE_BOTH Status cause_of(int l, int slopes) const {
    for (int j = 0; j < slopes; ++j) {
      if (!lane_is_finite(l, tile_.k + j * Field::width)) return kNonfiniteField;
    }
    return lane_is_finite(l, tile_.y1) ? kNonfiniteError : kNonfiniteState;
  }

  // Hairer, Norsett, Wanner I, II.4: an Euler step of moderate length shows how fast the field
  // changes.
  FLASHODE_BOTH void start() {
    started = true;
    tile_.slope(clock_.time(0, 0), tile_.y0, tile_.k);
    if (call_.first_step == call_.first_step) {
      dt_ = splat<Times>(call_.first_step);
      return;
    }
    const V *const y0 = tile_.y0, *const k = tile_.k;
    const Times d0 = norms<Times>(tile_.relative([=](int64_t f) { return y0[f]; }));
    const Times d1 = norms<Times>(tile_.relative([=](int64_t f) { return k[f]; }));
    ratio_ = select(running_, d1, ratio_);
    for (int l = 0; l < L; ++l) {
      if (!lane(running_, l) || is_finite(lane(d1, l))) continue;
      status_[l] = lane_is_finite(l, k) ? kNonfiniteError : kNonfiniteField;
    }
    running_ = running_ & is_finite(d1);
    if (!any(running_)) return;
    probed = true;
    const Times guess = first_guess(d0, d1), span = end_ - clock_.t0;
    const Times h0 = select(span < guess, span, guess);
    clock_.set(select(running_, h0, 0.0), clock_.t0 + h0);
    tile_.template evaluate<EulerRow>(clock_, 1, 0, 1, nullptr);
    const Times d2 =
        norms<Times>(tile_.relative([=](int64_t f) { return k[Field::width + f] - k[f]; })) / h0;
    dt_ = select(running_, initial_step(h0, d1, d2, Method::order), dt_);
  }

  // The next trials, moved back to the last times; samples that can take none have ended.
  FLASHODE_HD void begin_trials() {
    end_with(running_ & (trials_ >= double(call_.max_num_steps)), kMaxSteps);
    trials_ = select(running_, trials_ + 1.0, trials_);
    const Times free_end = clock_.t0 + dt_;
    const Lanewise lands = free_end >= end_;
    const Times t1 = select(lands, end_, free_end), length = t1 - clock_.t0;
    const Lanewise stuck = running_ & ((dt_ < DBL_MIN) | !(t1 > clock_.t0));
    if (any(stuck)) {
      for (int l = 0; l < L; ++l) {
        if (lane(stuck, l)) status_[l] = cause_[l];
      }
      running_ = running_ & !stuck;
    }
    // A free step keeps its own length: t1 - t0 is rounded, and no rounding lengthens a step.
    dt_ = select(running_ & lands & (length < dt_), length, dt_);
    clock_.set(select(running_, dt_, 0.0), select(running_, t1, clock_.t0));
  }

  // Which trials stand, and how long the next ones are.
  FLASHODE_HD void judge() {
    const V ratio = norms<V>([&](const auto& tolerance, int64_t f) {
      return tile_.scaled_error_of_step(tolerance, f, clock_);
    });
    const DecisionOf<V> decision = decide(ratio, convert<V>(clock_.dt), control_);
    const Lanewise accepted = mask_of<Times>(decision.accepted);
    stands_ = running_ & accepted;
    const Lanewise refused = running_ & !accepted;
    ratio_ = select(running_, convert<Times>(ratio), ratio_);
    dt_ = select(running_, convert<Times>(decision.next_dt), dt_);
    rejected_ = select(refused, rejected_ + 1.0, rejected_);
    if (remembers_) {
      const V past0 = control_.past[0], past1 = control_.past[1];
      remember(ratio, control_);
      control_.past[0] = select(decision.accepted, control_.past[0], past0);
      control_.past[1] = select(decision.accepted, control_.past[1], past1);
    }
    const Lanewise lost = refused & !mask_of<Times>(is_finite(ratio));
    if (any(lost) || has_cause_) blame(lost);
  }

  // Trials whose errors are not finite. A sample goes on with shorter ones, unless that cannot
  // help.
  FLASHODE_BOTH void blame(const Lanewise& lost) {
    has_cause_ = any(lost);
    for (int l = 0; l < L; ++l) {
      cause_[l] = lane(lost, l) ? cause_of(l, Method::stages) : kStepUnderflow;
    }
    Times hopeless = zero<Times>();
    for (int l = 0; l < L; ++l) {
      if (!lane(lost, l) ||
          (lane_is_finite(l, tile_.k) && Real(lane(clock_.dt, l)) > Real(call_.min_step))) {
        continue;
      }
      set_lane(hopeless, l, 1);
      status_[l] = cause_[l];
    }
    running_ = running_ & !(hopeless > 0);
  }

  // Every output that lies in a step that stands: ends as computed, others in between.
  FLASHODE_HD void emit() {
    Lanewise due = stands_ & (next_ <= clock_.t1);
    if (!any(due)) return;
    trials_ = select(due, 0.0, trials_);
    Lanewise inside = due & (next_ < clock_.t1);
    extends_ = Method::extra > 0 && any(inside);
    if (extends_) tile_.extend(clock_);
    const DenseOutput<Field, Method> dense(tile_, clock_);
    V local[Part::is_small ? Part::width : 1];
    V* const y = Part::is_small ? local : tile_.stage;
    const V per_length = Real(1) / convert<V>(clock_.t1 - clock_.t0);
    while (any(due)) {
      dense.at(convert<V>(next_ - clock_.t0) * per_length, y);
      for (int64_t f = 0; f < Field::width; ++f)
        y[f] = select(mask_of<V>(inside), y[f], tile_.y1[f]);
      if (extends_) refuse_nonfinite(due, y);
      write_outputs(lanes_set(due), y);
      filled_ = select(due, filled_ + 1.0, filled_);
      find_next();
      due = due & (next_ <= clock_.t1);
      inside = due & (next_ < clock_.t1);
    }
  }

  // Every lane has a row of its own.
  FLASHODE_BOTH void write_outputs(uint64_t lanes, const V* y) {
    double filled[L];
    int64_t row[L];
    store(filled, filled_);
    for (int l = 0; l < L; ++l) row[l] = int64_t(filled[l]) * call_.row;
    Real* const ys = static_cast<Real*>(call_.ys);
    for (; lanes; lanes &= lanes - 1) {
      const int l = first_lane(lanes);
      for (int64_t f = 0; f < Field::width; ++f)
        ys[row[l] + call_.offset[f] + (tile_.first + l) * call_.stride[f]] = lane(y[f], l);
    }
  }

  // All lanes at once: a vector of which single lanes were written is slow to read.
  FLASHODE_BOTH void find_next() {
    double filled[L], next[L];
    store(filled, filled_);
    for (int l = 0; l < L; ++l) {
      const int64_t row = int64_t(filled[l]), last = call_.outputs - 1;
      const double time = call_.times[sample(l) * call_.times_stride + (row < last ? row : last)];
      next[l] = row <= last ? time : INFINITY;
    }
    next_ = load_unaligned<Times>(next);
  }

  // Stages that dense output adds were not seen by the error test.
  FLASHODE_BOTH void refuse_nonfinite(Lanewise& due, const V* y) {
    Times bad = zero<Times>();
    for (int l = 0; l < L; ++l) set_lane(bad, l, lane(due, l) && !lane_is_finite(l, y));
    end_with(bad > 0, kNonfiniteField);
    due = due & !(bad > 0);
  }

  // Makes the candidates that stand the states.
  FLASHODE_HD void commit() {
    if (!any(stands_)) return;
    if (record_) {
      for (int l = 0; l < L; ++l) {
        if (!lane(stands_, l)) continue;
        has_memory_ = has_memory_ && record_->add(l, lane(clock_.t0, l), lane(clock_.t1, l),
                                                  lane(clock_.dt, l), tile_.y0, tile_.k);
      }
    }
    const auto moves = mask_of<V>(stands_);
    V *const y0 = tile_.y0, *const k = tile_.k;
    const V *const y1 = tile_.y1, *const last = k + (Method::stages - 1) * Field::width;
    for (int64_t f = 0; f < Field::width; ++f) {
      y0[f] = select(moves, y1[f], y0[f]);
      k[f] = select(moves, last[f], k[f]);
    }
    accepted_ = select(stands_, accepted_ + 1.0, accepted_);
    clock_.t0 = select(stands_, clock_.t1, clock_.t0);
    end_with(running_ & (clock_.t0 == end_), kSuccess);
  }

  FLASHODE_BOTH void report() const {
    for (int l = 0; l < L && tile_.first + l < call_.samples; ++l) {
      const int64_t b = sample(l);
      call_.status[b] = status_[l];
      call_.accepted[b] = int64_t(lane(accepted_, l));
      call_.rejected[b] = int64_t(lane(rejected_, l));
      call_.filled[b] = int64_t(lane(filled_, l));
      call_.t[b] = lane(clock_.t0, l);
      call_.dt[b] = lane(dt_, l);
      call_.error_ratio[b] = lane(ratio_, l);
      if (lane(ran_, l)) write_lane(l, tile_.y0, call_.y_end);
      for (int64_t row = call_.filled[b]; row < call_.outputs; ++row) {
        for (int64_t f = 0; f < Field::width; ++f)
          output(row)[call_.offset[f] + b * call_.stride[f]] = Real(NAN);
      }
    }
  }

  const Call& call_;
  Rounds& rounds_;
  Part tile_;
  const bool remembers_;
  ControllerOf<V> control_;  // as exact as the state: powers of doubles cost more than a step
  Record* record_ = nullptr;
  bool has_memory_ = true, has_cause_ = false, extends_ = false;

  // Where the samples stand.
  OwnClocks<Field> clock_;  // of the trial steps
  Times dt_, ratio_;        // of the next trials; of the last ones
  Times end_, next_;        // the last output time, and the next one
  Times filled_;            // how many outputs there are
  Times accepted_, rejected_, trials_;
  Lanewise running_, ran_, stands_;
  Status status_[L], cause_[L];
};

}  // namespace flashode

// A whole solve where all samples share one clock: adaptive steps with one size for all, or the
// steps of a grid. The same decisions as csrc/torch/driver.cpp, in the same order.
#pragma once

#include <cfloat>

#include "dense.h"
#include "parallel.h"
#include "record.h"
#include "tile.h"

namespace flashode {

// All tiles of a solve and what they need.
template <class Field, class Method>
class Tiles {
 public:
  using Real = typename Field::Real;
  using V = StateOf<Field>;
  using Part = Tile<Field, Method>;
  using Clock = OneClock<Field>;

  explicit Tiles(const Call& call)
      : call_(call),
        count_(tiles_of<Field>(call)),
        threads_(threads_for(call, count_, Part::operations)),
        prepared_(Field::prepared),
        space_(count_ * Part::own_size(call) + threads_ * Part::shared_size),
        tiles_(count_),
        sums_(count_ * (call.member_count > 1 ? call.member_count : 1)) {}

  bool exist() const { return prepared_.data() && space_.data() && tiles_.data() && sums_.data(); }

  void load() {
    Field::prepare(reinterpret_cast<const Real* const*>(call_.inputs), prepared_.data());
    V* space = space_.data();
    V* const shared = space + count_ * Part::own_size(call_);
    for (int64_t i = 0; i < count_; ++i, space += Part::own_size(call_)) {
      new (tiles_.data() + i) Part(call_, prepared_.data(), space, shared);
      tiles_.data()[i].load(i * Field::lanes);
    }
  }

  int64_t count() const { return count_; }
  const Part& operator[](int64_t i) const { return tiles_.data()[i]; }

  // body(tile, its number) for every tile.
  template <class Body>
  FLASHODE_HD void for_each(const Body& body) const {
    if (threads_ == 1) {
      for (int64_t i = 0; i < count_; ++i) body(tiles_.data()[i], i);
    } else {
      on_threads(body);
    }
  }

  // Whether body(tile, its number) is true for all of them; it is called for every one.
  template <class Body>
  FLASHODE_HD bool all_of(const Body& body) const {
    double* const answers = sums_.data();
    for_each([=](const Part& tile, int64_t i) { answers[i] = body(tile, i); });
    bool all = true;
    for (int64_t i = 0; i < count_; ++i) all = all && answers[i] != 0;
    return all;
  }

  // Largest over the members of the root mean square of what error_of(tile) says of each number.
  // Added up in the order of the tiles: how many threads there are changes no bit.
  template <class ErrorOf>
  FLASHODE_HD double norm(const ErrorOf& error_of) const {
    const Call* const call = &call_;
    double* const sums = sums_.data();
    for_each([=](const Part& tile, int64_t i) {
      const int live = live_lanes<Field>(*call, tile.first);
      tile.for_each_member(error_of(tile), [&](int64_t m, TimeOf<Field> sum) {
        for (int l = live; l < Field::lanes; ++l) set_lane(sum, l, 0);
        sums[i * call->member_count + m] = sum_of_lanes(sum);
      });
    });
    double norm = 0;
    for (int64_t m = 0; m < call->member_count; ++m) {
      const int64_t numbers = (call->members[m + 1] - call->members[m]) * call->samples;
      if (numbers == 0) continue;
      double sum = 0;
      for (int64_t i = 0; i < count_; ++i) sum += sums[i * call->member_count + m];
      norm = larger(norm, std::sqrt(sum / double(numbers)));
    }
    return norm;
  }

 private:
  // Kept out of the way of the loop that most solves run.
  template <class Body>
  __attribute__((noinline)) void on_threads(Body body) const {
    const Part* const tiles = tiles_.data();
    V* const shared = space_.data() + count_ * Part::own_size(call_);
#pragma omp parallel for num_threads(threads_) schedule(static)
    for (int64_t i = 0; i < count_; ++i) {
      Part tile = tiles[i];
      tile.share(shared + this_thread() * Part::shared_size);
      body(tile, i);
    }
  }

  const Call& call_;
  const int64_t count_;
  const int threads_;
  const Buffer<Real> prepared_;
  const Buffer<V> space_;
  const Buffer<Part> tiles_;
  const Buffer<double> sums_;
};

// The state of one solve. All of it is inlined into one function, so that it lives in registers.
template <class Field, class Method>
class Solve {
 public:
  using Real = typename Field::Real;
  using V = StateOf<Field>;
  using Part = Tile<Field, Method>;
  using Clock = OneClock<Field>;

  FLASHODE_HD Solve(Call& call, const Tiles<Field, Method>& tiles, Record<Field>* record)
      : call_(call),
        tiles_(tiles),
        record_(record),
        interrupts_(call, tiles.count() * Part::operations),
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
      if (Method::adaptive) start();
      while (status_ == kRunning && returned_ == kDone && filled_ < call_.outputs) {
        if (interrupts_.now()) {
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
    const bool records = call_.records;
    if (!record_->add_time(clock_.t1) ||
        (records && !record_->add({clock_.t0, clock_.t1, clock_.dt, kind}))) {
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
    const bool finite = tiles_.all_of(
        [=, clock = clock_, call = &call_, record = record_](const Part& tile, int64_t i) {
          if (records) tile.copy_start(record->y0(n, i), record->f0(n, i));
          const bool finite = inner == begin || interpolate(*call, tile, clock, begin, inner);
          if (at_end) store_state<Field>(*call, tile.first, tile.y1, output(*call, inner));
          tile.move_on();
          return finite;
        });
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
    tiles_.for_each([call = &call_](const Part& tile, int64_t) {
      store_state<Field>(*call, tile.first, tile.y0, call->y_end);
    });
    if (status_ != kSuccess) {
      Real* const missing = output(call_, filled_);
      for (int64_t i = 0; i < (call_.outputs - filled_) * call_.row; ++i) missing[i] = Real(NAN);
    }
    *call_.status = status_;
    *call_.accepted = accepted_;
    *call_.rejected = rejected_;
    *call_.filled = filled_;
    *call_.t = clock_.t0;
    *call_.dt = dt_;
    *call_.error_ratio = error_ratio_;
    call_.nfe = nfe_;
  }

  Call& call_;
  const Tiles<Field, Method>& tiles_;
  Record<Field>* const record_;
  Interrupts interrupts_;
  Controller control_;
  const bool remembers_;

  // Where the solve stands.
  Clock clock_;  // of the trial step
  double dt_ = NAN, error_ratio_ = NAN;
  Status status_ = kRunning;
  Returned returned_ = kDone;
  int64_t next_stop_ = 0, filled_ = 1, accepted_ = 0, rejected_ = 0, trials_ = 0, nfe_ = 0;
};

template <class Field, class Method>
Returned solve(Call& call) {
  Tiles<Field, Method> tiles(call);
  auto* const record = new (std::nothrow) Record<Field>(tiles.count());
  call.recording = record;
  if (!record || !tiles.exist()) return kOutOfMemory;
  tiles.load();
  const Returned returned = Solve<Field, Method>(call, tiles, record).run();
  call.accepted_times = record->times();
  return returned;
}

}  // namespace flashode

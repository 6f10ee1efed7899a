// The exact gradient of a solve with one clock: its recorded steps, last first, and every cotangent
// pulled through them. Tiles have nothing to do with each other on the way back, so that each goes all
// the way alone.
#pragma once

#include "backward.h"
#include "record.h"
#include "step_back.h"

namespace flashode {

// The way of one tile after another back through the steps that all of them took.
template <class Field, class Method>
class Reverse {
 public:
  using Real = typename Field::Real;
  using V = StateOf<Field>;
  using Back = StepBack<Field, Method>;
  static constexpr int64_t space = Back::size + Field::width;

  Reverse(const Call& call, const Record<Field>& record, const Chunk<Field>& chunk)
      : call_(call),
        record_(record),
        chunk_(chunk),
        back_(chunk.prepared, chunk.lane_sums, chunk.sums, call.grad_t || call.grad_grid, chunk.space),
        adj_output_(chunk.space + Back::size) {}

  void run(int64_t tile) {
    tile_ = tile, first_ = tile * Field::lanes;
    load_own<Field>(call_, first_, back_.own);
    back_.begin();
    moved_ = zero<V>();
    row_ = record_.size() ? call_.outputs - 1 : 0;
    while (row_ > 0 && call_.times[row_] > record_[record_.size() - 1].t1) --row_;
    for (int64_t n = record_.size() - 1; n >= 0; --n) reverse_step(n);
    if (Method::adaptive) add_time(chunk_.grad_t, 0, moved_);
    add_cotangents<Field>(call_, first_, 0, back_.adj());
    store_state<Field>(call_, first_, back_.adj(), call_.adj_y0);
    store_own<Field>(call_, first_, back_.adj_own);
  }

 private:
  // Whether step n evaluates its first slope itself.
  bool opens(int64_t n) const {
    return !Method::adaptive || n == 0 || record_[n - 1].landing == kJump;
  }
  Nudges nudges(int64_t n) const {
    if (Method::adaptive) return {n == 0 ? 0 : 1, -1};
    return {call_.perturb ? 1 : 0, call_.perturb ? -1 : 0};
  }

  void reverse_step(int64_t n) {
    const auto& step = record_[n];
    const OneClock<Field> clock{step.t0, step.t1, step.dt, *call_.direction, *call_.low, *call_.high};
    if (row_ > 0 && is_result(step.t1)) add_cotangents<Field>(call_, first_, row_--, back_.adj());
    const bool dense = row_ > 0 && call_.times[row_] > step.t0;
    const bool hands_on = n + 1 < record_.size() && !opens(n + 1);
    const V* const f0 = opens(n) ? nullptr : record_.f0(n, tile_);
    back_.retake(clock, nudges(n), record_.y0(n, tile_), f0, hands_on, dense);
    for (; row_ > 0 && call_.times[row_] > step.t0; --row_) {
      const double x = (call_.times[row_] - step.t0) / (step.t1 - step.t0);
      clear(adj_output_, Field::width);
      add_cotangents<Field>(call_, first_, row_, adj_output_);
      add_time(chunk_.grad_t, row_, back_.add_output(splat<V>(Real(x)), adj_output_));
    }
    back_.pull(clock, nudges(n), opens(n), hands_on, dense);
    if (back_.wants_time) move_ends(n);
  }

  // Whether the next output is the result of the step that ends at t1. One between others, if its time
  // has a gradient, is not: that takes the slope there.
  bool is_result(double t1) const {
    const bool moves = call_.grad_t && (call_.end == INFINITY || row_ + 1 < call_.outputs);
    return call_.times[row_] == t1 && !moves;
  }

  // The points of a grid move the steps between them; the ends of other steps move with the first time,
  // unless they land on the last, or on a stop, which stays.
  void move_ends(int64_t n) {
    if (!Method::adaptive) {
      const Real direction = Real(*call_.direction);  // the grid is on the forward clock
      add_time(chunk_.grad_grid, call_.grid_points == 1 ? 0 : n, direction * back_.start);
      add_time(chunk_.grad_grid, call_.grid_points == 1 ? 0 : n + 1, direction * back_.end);
    } else if (record_[n].landing == kFree) {
      moved_ = moved_ + back_.start + back_.end;
    } else {
      if (record_[n].landing == kEnd) add_time(chunk_.grad_t, call_.outputs - 1, back_.end);
      moved_ = back_.start;
    }
  }
  void add_time(double* totals, int64_t i, const V& moved) const {
    if (totals) totals[i] += double(sum_of_lanes(moved));
  }

  const Call& call_;
  const Record<Field>& record_;
  const Chunk<Field>& chunk_;
  Back back_;
  V* const adj_output_;

  int64_t tile_ = 0, first_ = 0;  // the tile, and its first sample
  int64_t row_ = 0;               // the last output whose cotangent is still to come
  V moved_;                       // cotangent of what the start of the step moves with
};

template <class Field, class Method>
Returned reverse(Call& call) {
  using Way = Reverse<Field, Method>;
  const auto& record = static_cast<const Record<Field>&>(*static_cast<Recording*>(call.recording));
  const Chunks<Field> chunks(call, Way::space, record.size() * Tile<Field, Method>::operations);
  if (!chunks.exist()) return kOutOfMemory;
  chunks.run(call, [&](const Chunk<Field>& chunk) {
    Way way(call, record, chunk);
    for (int64_t tile = chunk.begin; tile < chunk.end; ++tile) way.run(tile);
  });
  return kDone;
}

}  // namespace flashode

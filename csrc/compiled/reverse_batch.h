// The exact gradient of a solve in which samples have clocks of their own: every lane goes back through
// the steps that it took, and rests until the first of them.
#pragma once

#include "backward.h"
#include "own_clocks.h"
#include "step_back.h"

namespace flashode {

// The way of one tile after another back through its own steps.
template <class Field, class Method>
class ReverseBatch {
 public:
  using Real = typename Field::Real;
  using V = StateOf<Field>;
  using Times = TimeOf<Field>;
  using Lanewise = Mask<Times>;
  using Back = StepBack<Field, Method>;
  static constexpr int L = Field::lanes;
  static constexpr int64_t space = Back::size + 3 * int64_t(Field::width) + 2 * Field::own;

  ReverseBatch(const Call& call, BatchRecord<Field>& record, const Chunk<Field>& chunk)
      : call_(call),
        record_(record),
        chunk_(chunk),
        back_(chunk.prepared, chunk.lane_sums, chunk.sums, call.grad_t != nullptr, chunk.space) {
    V* space = chunk.space + Back::size;
    const auto take = [&](int64_t n) { return space += n, space - n; };
    adj_output_ = take(Field::width), settled_ = take(2 * Field::width + Field::own);
    own_ = take(Field::own);
  }

  void run(int64_t tile) {
    TileRecord<Field>& steps = record_.tile(tile);
    first_ = tile * L, live_ = live_lanes<Field>(call_, first_);
    load_own<Field>(call_, first_, own_);
    direction_ = gather<Times>(call_, first_, call_.direction, 0, 1);
    low_ = gather<Times>(call_, first_, call_.low, 0, 1);
    high_ = gather<Times>(call_, first_, call_.high, 0, 1);
    counts_ = zero<Times>(), next_ = splat<Times>(-INFINITY), moved_ = zero<V>();
    for (int l = 0; l < live_; ++l) begin_lane(steps, l);
    back_.begin();
    for (int64_t n = steps.size() - 1; n >= 0; --n) reverse_step(steps, n);
    for (int l = 0; l < live_; ++l) add_time(l, 0, lane(moved_, l));
    add_starts();
    store_state<Field>(call_, first_, back_.adj(), call_.adj_y0);
    store_own<Field>(call_, first_, back_.adj_own);
  }

 private:
  const double* times(int l) const { return call_.times + (first_ + l) * call_.times_stride; }
  void set_row(int l, int64_t row) {
    row_[l] = row;
    set_lane(next_, l, times(l)[row]);
  }

  void begin_lane(const TileRecord<Field>& steps, int l) {
    const int64_t count = steps.count[l];
    const double reached = count ? steps.times(count - 1).t1[l] : *times(l);
    int64_t row = call_.outputs - 1;
    while (times(l)[row] > reached) --row;
    set_row(l, row);
    set_lane(counts_, l, double(count));
  }

  void reverse_step(TileRecord<Field>& steps, int64_t n) {
    const Lanewise moving = counts_ > double(n);
    const Nudges nudges{0, -1};
    const bool opens = n == 0, hands_on = n + 1 < steps.size();
    place(steps, n, moving);
    Lanewise due = moving & (next_ > clocks_.t0);
    if (any(due & (next_ == clocks_.t1))) take_results(due);
    due = due & (next_ > clocks_.t0);
    const bool dense = any(due);
    back_.retake(clocks_, nudges, y0_, opens ? nullptr : f0_, hands_on, dense);
    for (; any(due); due = due & (next_ > clocks_.t0)) add_outputs(due);
    back_.pull(clocks_, nudges, opens, hands_on, dense);
    if (back_.wants_time) move_ends(n);
  }

  // Row n of the record.
  void place(const TileRecord<Field>& steps, int64_t n, const Lanewise& moving) {
    const auto& of = steps.times(n);
    clocks_.t0 = load_unaligned<Times>(of.t0), clocks_.t1 = load_unaligned<Times>(of.t1);
    clocks_.dt = load_unaligned<Times>(of.dt);
    clocks_.direction = direction_, clocks_.low = low_, clocks_.high = high_;
    y0_ = steps.y0(n), f0_ = steps.f0(n), back_.own = own_;
    if (!all(moving)) replace_resting(moving);
    clocks_.signed_dt = convert<V>(clocks_.direction * clocks_.dt);
  }

  // A lane that rests has no cotangent yet. What is pulled through its step stays zero if the step is
  // finite, and so it takes that of a lane that moves.
  void replace_resting(const Lanewise& moving) {
    int mate = 0;
    while (!lane(moving, mate)) ++mate;
    const auto replace = [&](Times& x) { x = select(moving, x, splat<Times>(lane(x, mate))); };
    replace(clocks_.t0), replace(clocks_.t1), replace(clocks_.dt);
    replace(clocks_.direction), replace(clocks_.low), replace(clocks_.high);
    V* settled = settled_;
    const auto settle = [&](const V* from, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        settled[i] = select(mask_of<V>(moving), from[i], splat<V>(lane(from[i], mate)));
      }
      return settled += count, settled - count;
    };
    y0_ = settle(y0_, Field::width), f0_ = settle(f0_, Field::width), back_.own = settle(own_, Field::own);
  }

  void add_cotangent(int l, V* adj) const {
    const Real* const row = static_cast<const Real*>(call_.grad_ys) + row_[l] * call_.row;
    for (int64_t f = 0; f < Field::width; ++f) {
      const Real cotangent = row[call_.offset[f] + (first_ + l) * call_.stride[f]];
      set_lane(adj[f], l, lane(adj[f], l) + cotangent);
    }
  }

  // The outputs that are the results of steps: see `Reverse::is_result`.
  void take_results(const Lanewise& due) {
    for (int l = 0; l < live_; ++l) {
      while (lane(due, l) && lane(next_, l) == lane(clocks_.t1, l)) {
        if (call_.grad_t && row_[l] + 1 < call_.outputs) break;
        add_cotangent(l, back_.adj());
        set_row(l, row_[l] - 1);
      }
    }
  }

  // The next outputs inside the steps, one of every lane that has any.
  void add_outputs(const Lanewise& due) {
    const Times length = clocks_.t1 - clocks_.t0;
    const V x = convert<V>(select(due, (next_ - clocks_.t0) / length, zero<Times>()));
    clear(adj_output_, Field::width);
    for (int l = 0; l < live_; ++l) {
      if (lane(due, l)) add_cotangent(l, adj_output_);
    }
    const V moved = back_.add_output(x, adj_output_);
    for (int l = 0; l < live_; ++l) {
      if (!lane(due, l)) continue;
      add_time(l, row_[l], lane(moved, l));
      set_row(l, row_[l] - 1);
    }
  }

  // Steps move with the first time, and with the last where they end there.
  void move_ends(int64_t n) {
    const int64_t last = call_.outputs - 1;
    const Lanewise ending = counts_ == double(n + 1);
    for (int l = 0; l < live_ && any(ending); ++l) {
      if (!lane(ending, l) || lane(clocks_.t1, l) != times(l)[last]) continue;
      add_time(l, last, lane(back_.end, l));
      set_lane(back_.end, l, 0);
    }
    moved_ = moved_ + (back_.start + back_.end);
  }
  void add_time(int l, int64_t row, Real moved) const {
    if (call_.grad_t) grad_t_of(call_, chunk_, first_ + l)[row] += double(moved);
  }

  // The outputs at the first time, which may repeat: those are y0 + (t - t[0]) f0 as times move.
  void add_starts() {
    bool repeats = false;
    for (int l = 0; l < live_; ++l) repeats = repeats || row_[l] > 0;
    if (repeats && back_.wants_time) take_first_slopes();
    for (int l = 0; l < live_; ++l) {
      for (; row_[l] >= 0; --row_[l]) {
        add_cotangent(l, back_.adj());
        if (row_[l] > 0 && back_.wants_time) move_start(l);
      }
    }
  }
  void take_first_slopes() {
    back_.own = own_;
    load_state<Field>(call_, first_, call_.y0, settled_);
    clocks_.direction = direction_, clocks_.low = low_, clocks_.high = high_;
    for (int l = 0; l < live_; ++l) set_lane(clocks_.t0, l, *times(l));
    back_.evaluate(0, clocks_.time(0, 0), settled_);
  }
  void move_start(int l) {
    clear(adj_output_, Field::width);
    add_cotangent(l, adj_output_);
    Real moved = 0;
    for (int64_t f = 0; f < Field::width; ++f) moved += lane(adj_output_[f], l) * lane(back_.k[f], l);
    add_time(l, row_[l], moved);
    add_time(l, 0, -moved);
  }

  const Call& call_;
  BatchRecord<Field>& record_;
  const Chunk<Field>& chunk_;
  Back back_;
  V *adj_output_, *settled_, *own_;

  int64_t first_ = 0;
  int live_ = 0;
  Times direction_, low_, high_, counts_;
  OwnClocks<Field> clocks_;  // of the step, whose state and slope are
  const V *y0_ = nullptr, *f0_ = nullptr;
  int64_t row_[L];  // the last outputs whose cotangents are still to come
  Times next_;      // their times
  V moved_;         // cotangents of what the starts of the steps move with
};

template <class Field, class Method>
Returned reverse_batch(Call& call) {
  using Way = ReverseBatch<Field, Method>;
  auto& record = static_cast<BatchRecord<Field>&>(*static_cast<Recording*>(call.recording));
  int64_t steps = 0;
  for (int64_t tile = 0; tile < record.tiles(); ++tile) steps += record.tile(tile).size();
  const int64_t each = record.tiles() ? steps / record.tiles() : 0;
  const Chunks<Field> chunks(call, Way::space, each * Tile<Field, Method>::operations);
  if (!chunks.exist()) return kOutOfMemory;
  chunks.run(call, [&](const Chunk<Field>& chunk) {
    Way way(call, record, chunk);
    for (int64_t tile = chunk.begin; tile < chunk.end; ++tile) way.run(tile);
  });
  return kDone;
}

}  // namespace flashode

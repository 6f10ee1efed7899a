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
  using Back = StepBack<Field, Method>;
  static constexpr int L = Field::lanes;
  static constexpr int64_t space = Back::size + 3 * int64_t(Field::width) + Field::own;

  ReverseBatch(const Call& call, BatchRecord<Field>& record, const Chunk<Field>& chunk)
      : call_(call),
        record_(record),
        chunk_(chunk),
        back_(chunk.prepared, chunk.lane_sums, chunk.sums, call.grad_t != nullptr, chunk.space) {
    V* space = chunk.space + Back::size;
    const auto take = [&](int64_t n) { return space += n, space - n; };
    adj_output_ = take(Field::width), y0_ = take(Field::width), f0_ = take(Field::width);
    own_ = take(Field::own);
  }

  void run(int64_t tile) {
    const TileRecord<Field>& steps = record_.tile(tile);
    first_ = tile * L, live_ = live_lanes<Field>(call_, first_);
    load_own<Field>(call_, first_, own_);
    back_.begin();
    for (int l = 0; l < L; ++l) begin_lane(steps, l);
    for (int64_t n = steps.size() - 1; n >= 0; --n) reverse_step(steps, n);
    add_starts();
    store_state<Field>(call_, first_, back_.adj(), call_.adj_y0);
    store_own<Field>(call_, first_, back_.adj_own);
  }

 private:
  const double* times(int l) const { return call_.times + (first_ + l) * call_.times_stride; }

  void begin_lane(const TileRecord<Field>& steps, int l) {
    const bool lives = l < live_;
    count_[l] = lives ? steps.count[l] : 0;
    if (!lives) return;
    const double reached = count_[l] ? steps.times(count_[l] - 1).t1[l] : *times(l);
    for (row_[l] = call_.outputs - 1; times(l)[row_[l]] > reached;) --row_[l];
  }

  void reverse_step(const TileRecord<Field>& steps, int64_t n) {
    place(steps, n);
    const auto has_row = [&](int l) {
      return n < count_[l] && row_[l] >= 0 && times(l)[row_[l]] > lane(clocks_.t0, l);
    };
    bool dense = false;
    for (int l = 0; l < live_; ++l) {
      while (has_row(l) && is_result(l)) add_cotangent(l, row_[l]--, back_.adj());
      dense = dense || has_row(l);
    }
    const Nudges nudges{0, -1};
    const bool opens = n == 0;
    back_.retake(clocks_, nudges, y0_, opens ? nullptr : f0_, dense);
    for (bool more = dense; more;) more = add_outputs(has_row);
    back_.pull(clocks_, nudges, opens, n + 1 < steps.size(), dense);
    if (!back_.wants_time) return;
    for (int l = 0; l < live_; ++l) {
      if (n < count_[l]) move_ends(l);
    }
  }

  // Row n of the record. A lane that rests has no cotangent yet, and takes the place of one that does
  // not: what is pulled through it stays zero as long as it is finite.
  void place(const TileRecord<Field>& steps, int64_t n) {
    int mate = 0;
    while (n >= count_[mate]) ++mate;
    const auto& of = steps.times(n);
    V part;
    for (int l = 0; l < L; ++l) {
      const int from = n < count_[l] ? l : mate;
      place_lane(l, first_ + from, of.t0[from], of.t1[from], of.dt[from]);
      set_lane(part, l, Real(from == l));
    }
    clocks_.signed_dt = convert<V>(clocks_.direction * clocks_.dt);
    const auto moving = part > Real(0);
    const auto settle = [&](const V* from, int64_t count, V* to) {
      for (int64_t i = 0; i < count; ++i) to[i] = select(moving, from[i], splat<V>(lane(from[i], mate)));
    };
    settle(steps.y0(n), Field::width, y0_);
    settle(steps.f0(n), Field::width, f0_);
    settle(own_, Field::own, back_.own);
  }

  void place_lane(int l, int64_t sample, double t0, double t1, double dt) {
    set_lane(clocks_.t0, l, t0), set_lane(clocks_.t1, l, t1), set_lane(clocks_.dt, l, dt);
    set_lane(clocks_.direction, l, call_.direction[sample]);
    set_lane(clocks_.low, l, call_.low[sample]), set_lane(clocks_.high, l, call_.high[sample]);
  }

  // Whether the next output of a lane is the result of its step: `Reverse::is_result`.
  bool is_result(int l) const {
    const bool moves = call_.grad_t && row_[l] + 1 < call_.outputs;
    return times(l)[row_[l]] == lane(clocks_.t1, l) && !moves;
  }

  void add_cotangent(int l, int64_t row, V* adj) const {
    const Real* const of_row = static_cast<const Real*>(call_.grad_ys) + row * call_.row;
    for (int64_t f = 0; f < Field::width; ++f) {
      const Real cotangent = of_row[call_.offset[f] + (first_ + l) * call_.stride[f]];
      set_lane(adj[f], l, lane(adj[f], l) + cotangent);
    }
  }

  // The next output of every lane that has one in this step; whether there are more.
  template <class HasRow>
  bool add_outputs(const HasRow& has_row) {
    V x = zero<V>();
    clear(adj_output_, Field::width);
    for (int l = 0; l < live_; ++l) {
      if (!has_row(l)) continue;
      const double t0 = lane(clocks_.t0, l), t1 = lane(clocks_.t1, l);
      set_lane(x, l, Real((times(l)[row_[l]] - t0) / (t1 - t0)));
      add_cotangent(l, row_[l], adj_output_);
    }
    const V moved = back_.add_output(x, adj_output_);
    bool more = false;
    for (int l = 0; l < live_; ++l) {
      if (!has_row(l)) continue;
      add_time(l, row_[l]--, lane(moved, l));
      more = more || has_row(l);
    }
    return more;
  }

  // Steps move with the first time, and with the last if they end there.
  void move_ends(int l) const {
    const int64_t last = call_.outputs - 1;
    add_time(l, 0, lane(back_.start, l));
    add_time(l, lane(clocks_.t1, l) == times(l)[last] ? last : 0, lane(back_.end, l));
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
        add_cotangent(l, row_[l], back_.adj());
        if (row_[l] > 0 && back_.wants_time) move_start(l);
      }
    }
  }
  void take_first_slopes() {
    load_state<Field>(call_, first_, call_.y0, y0_);
    for (int64_t r = 0; r < Field::own; ++r) back_.own[r] = own_[r];
    for (int l = 0; l < L; ++l) {
      const int from = l < live_ ? l : 0;
      place_lane(l, first_ + from, *times(from), *times(from), 0);
    }
    back_.evaluate(0, clocks_.time(0, 0), y0_);
  }
  void move_start(int l) {
    clear(adj_output_, Field::width);
    add_cotangent(l, row_[l], adj_output_);
    Real moved = 0;
    for (int64_t f = 0; f < Field::width; ++f) moved += lane(adj_output_[f], l) * lane(back_.k[f], l);
    add_time(l, row_[l], moved);
    add_time(l, 0, -moved);
  }

  const Call& call_;
  BatchRecord<Field>& record_;
  const Chunk<Field>& chunk_;
  Back back_;
  V *adj_output_, *y0_, *f0_, *own_;

  OwnClocks<Field> clocks_;
  int64_t first_ = 0, count_[L], row_[L];  // row: the last output whose cotangent is still to come
  int live_ = 0;
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

// A tile on its way back in a sweep: its state and adjoint, their slopes, and what its stages have to add
// to integrals.
#pragma once

#include "backward.h"

namespace flashode {

// What a tile has, and what it shares with those that come after it in its chunk.
template <class Field, class Method>
struct SweepTile {
  using Real = typename Field::Real;
  using V = StateOf<Field>;
  static constexpr int64_t width = Field::width;
  static constexpr int stages = Method::stages;
  static constexpr int64_t size = (6 + 2 * stages) * width + (2 + stages) * Field::own + stages;
  static constexpr int64_t shared_size = 2 * width + Field::kept + Field::scratch;

  int64_t first;
  V *y, *adj, *y1, *adj1, *rtol, *atol;
  V *k, *m;               // slopes of the state and of its adjoint, which runs the other way
  V *own, *adj_own;       // constants of the samples, and their integrals
  V *of_own, *of_t;       // what each stage has to add to those, and to the integral of the time
  V *stage, *adj_stage, *kept, *scratch;

  SweepTile(int64_t tile, V* space, V* shared) : first(tile * Field::lanes) {
    const auto take = [&](V*& from, int64_t n) { return from += n, from - n; };
    y = take(space, width), adj = take(space, width), y1 = take(space, width), adj1 = take(space, width);
    rtol = take(space, width), atol = take(space, width);
    k = take(space, stages * width), m = take(space, stages * width);
    own = take(space, Field::own), adj_own = take(space, Field::own);
    of_own = take(space, stages * Field::own), of_t = take(space, stages);
    stage = take(shared, width), adj_stage = take(shared, width);
    kept = take(shared, Field::kept), scratch = take(shared, Field::scratch);
  }

  void load(const Call& call) {
    const int64_t last = call.outputs - 1;
    load_state<Field>(call, first, static_cast<const Real*>(call.ys) + last * call.row, y);
    load_own<Field>(call, first, own);
    for (int64_t f = 0; f < width; ++f) {
      rtol[f] = splat<V>(Real(call.rtol)), atol[f] = splat<V>(Real(call.atol));
    }
    if (call.each_rtol) load_state<Field>(call, first, call.each_rtol, rtol);
    if (call.each_atol) load_state<Field>(call, first, call.each_atol, atol);
    clear(adj, width);
    clear(adj_own, Field::own);
    add_cotangents<Field>(call, first, last, adj);
  }

  // Stage i where the state and its adjoint are these.
  template <class Time>
  FLASHODE_HD void evaluate(int i, const Time& t, const V* y_i, const V* adj_i, const Real* prepared,
                            V* lane_sums, Real* sums) {
    of_t[i] = zero<V>();
    clear(of_own + i * Field::own, Field::own);
    Field::slope_keeping(prepared, own, t, y_i, k + i * width, kept, scratch);
    Field::pull_back(prepared, own, t, y_i, kept, adj_i, m + i * width, of_t + i, of_own + i * Field::own,
                     lane_sums + i * Field::lane_sums, sums + i * Field::sums, scratch);
  }

  template <class Row>
  FLASHODE_HD void advance(const V& step, V* y_i, V* adj_i) const {
    for (int64_t f = 0; f < width; ++f) {
      y_i[f] = add_term(y[f], step, sum_of_terms<Row, width>(k + f));
      adj_i[f] = add_term(adj[f], -step, sum_of_terms<Row, width>(m + f));
    }
  }

  // All stages but the first, which is there, and the results.
  template <class Clock>
  FLASHODE_HD void take_step(const Clock& clock, int nudge_at_end, const Real* prepared, V* lane_sums, Real* sums) {
    take_stages(clock, nudge_at_end, prepared, lane_sums, sums, UpTo<stages - 1>());
    if constexpr (!Method::fsal) advance<ResultRow<Method>>(clock.step(), y1, adj1);
  }
  template <class Clock, int... before>
  FLASHODE_HD void take_stages(const Clock& clock, int nudge_at_end, const Real* prepared, V* lane_sums, Real* sums,
                               Indices<before...>) {
    (take_stage<before + 1>(clock, nudge_at_end, prepared, lane_sums, sums), ...);
  }
  template <int i, class Clock>
  FLASHODE_HD void take_stage(const Clock& clock, int nudge_at_end, const Real* prepared, V* lane_sums, Real* sums) {
    constexpr bool is_result = Method::fsal && i == stages - 1;
    V *const y_i = is_result ? y1 : stage, *const adj_i = is_result ? adj1 : adj_stage;
    advance<StageRow<Method, i>>(clock.step(), y_i, adj_i);
    const double c = Method::c[i];
    evaluate(i, clock.time(c, c == 1 ? nudge_at_end : 0), y_i, adj_i, prepared, lane_sums, sums);
  }

  // Squares of the scaled errors of the state and its adjoint, added to those of each member.
  template <class OfY, class OfAdj>
  FLASHODE_HD void add_squares(const Call& call, const OfY& of_y, const OfAdj& of_adj, double* sums) const {
    const int live = live_lanes<Field>(call, first);
    for (int64_t member = 0; member < call.member_count; ++member) {
      for (int64_t f = call.members[member]; f < call.members[member + 1]; ++f) {
        const V a = scaled_error(of_y(*this, f), y[f], y1[f], rtol[f], atol[f]);
        const V b = scaled_error(of_adj(*this, f), adj[f], adj1[f], rtol[f], atol[f]);
        for (int l = 0; l < live; ++l) {
          sums[2 * member] += double(lane(a, l)) * double(lane(a, l));
          sums[2 * member + 1] += double(lane(b, l)) * double(lane(b, l));
        }
      }
    }
  }
};

}  // namespace flashode

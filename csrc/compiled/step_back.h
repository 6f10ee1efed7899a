// One step of a Runge-Kutta method backwards: its stages are computed again, with what the field
// keeps of each, and cotangents are pulled through them from the last to the first.
//
// Nothing is scattered: the cotangent of a slope is gathered from the states that it went into, as a
// state is gathered from slopes on the way forward. With h the signed length of the step,
//
//     y_i = y0 + h sum_j a_ij k_j,            k_i = f(t_i, y_i),
//     adj_k_j = h sum_i a_ij adj_y_i,         adj_y_i = adj_k_i^T df/dy.
//
// The result of the step and its outputs are such states too, with weights of their own.
#pragma once

#include "tile.h"

namespace flashode {

template <class V>
FLASHODE_HD void clear(V* x, int64_t count) {
  for (int64_t n = 0; n < count; ++n) x[n] = zero<V>();
}

// Slope j in the states of a step: of its stages, those of dense output if `dense`, and its result.
template <class Method, int j, bool dense>
struct Column {
  static constexpr int stages = Method::stages, slopes = stages + Method::extra;
  static constexpr int terms = slopes + 1;
  static constexpr double weight(int i) {
    if (i == slopes) return Method::fsal || j >= stages ? 0 : Method::b[j < stages ? j : 0];
    if (j >= i || (i >= stages && !dense)) return 0;
    if constexpr (Method::extra > 0) {
      if (i >= stages) return Method::extra_a[i - stages][j];
    }
    return Method::a[i < stages ? i : 0][j < stages ? j : 0];
  }
  static constexpr bool is_empty() {
    for (int i = 0; i < terms; ++i) {
      if (weight(i) != 0) return false;
    }
    return !(dense && has_dense_weight<Method, j>());
  }
};

// The derivative of w_j at x.
template <class Method, int j, class X>
FLASHODE_HD X dense_slope(const X& x) {
  X slope = zero<X>();
  for (int p = Method::degree - 1; p >= 0; --p) {
    slope = add_term(splat<X>(real_of<X>((p + 1) * Method::weights[j][p])), x, slope);
  }
  return slope;
}

// The nudges of a step's times: where it evaluates its first slope itself, and of stages at its end.
struct Nudges {
  int begin, end;
};

// What the cotangents of a step go through, and where they gather. Pointers are to V's; `size` says
// how many V's of work space there are in all.
template <class Field, class Method>
struct StepBack {
  using Real = typename Field::Real;
  using V = StateOf<Field>;
  static constexpr int64_t width = Field::width, kept_width = Field::kept;
  static constexpr int stages = Method::stages, slopes = stages + Method::extra, last = stages - 1;
  static constexpr int64_t size =
      slopes * (4 * width + kept_width) + 4 * width + 2 * Field::own + Field::scratch;

  // Cotangents of so few numbers need not go through memory.
  static constexpr bool is_small = width * int64_t(sizeof(V)) <= 1024;

  const Real* prepared;
  V* lane_sums;  // gradients of what samples share are added to these and to `sums`
  Real* sums;
  bool wants_time;

  V *y, *k, *kept;  // of every stage; the first state is y0
  V *adj_y;         // of every stage, then that of the result: between steps the one of the state
  V *adj_f;         // of the slope that one step hands to the next
  V *adj_slope, *adj_outputs, *adj_inside, *own, *adj_own, *scratch;
  const V* y0;
  V start, end;     // cotangents of the times of the step's ends

  FLASHODE_HD StepBack(const Real* prepared, V* lane_sums, Real* sums, bool wants_time, V* space)
      : prepared(prepared), lane_sums(lane_sums), sums(sums), wants_time(wants_time) {
    const auto take = [&](int64_t n) { return space += n, space - n; };
    y = take(slopes * width), k = take(slopes * width), kept = take(slopes * kept_width);
    adj_y = take((slopes + 1) * width), adj_outputs = take(slopes * width);
    adj_f = take(width), adj_slope = take(width), adj_inside = take(width);
    own = take(Field::own), adj_own = take(Field::own), scratch = take(Field::scratch);
  }

  FLASHODE_HD V* adj() const { return adj_y + slopes * width; }

  // Forgets what other samples left.
  FLASHODE_HD void begin() {
    clear(adj(), width);
    clear(adj_f, width);
    clear(adj_own, Field::own);
  }

  // ---- forwards ----------------------------------------------------------------------------------

  // Takes the step again from y0. Without f0 its first slope is evaluated; with `dense` the stages
  // that outputs inside the step need are taken too. The last stage may be nobody's but the next step's.
  template <class Clock>
  FLASHODE_ASIDE void retake(const Clock& clock, Nudges nudges, const V* from, const V* f0, bool hands_on,
                          bool dense) {
    y0 = from;
    start = end = zero<V>();
    if (f0 == nullptr) {
      evaluate(0, clock.time(0, nudges.begin), y0);
    } else {
      for (int64_t f = 0; f < width; ++f) k[f] = f0[f];
    }
    const bool needs_last = hands_on || dense || !Column<Method, last, false>::is_empty();
    take_stages(clock, nudges.end, needs_last, UpTo<stages - 1>());
    if (!dense) return;
    take_extra(clock, UpTo<Method::extra>());
    clear(adj_outputs, slopes * width);
    clear(adj_inside, width);
  }

  template <class Clock, int... before>
  FLASHODE_HD void take_stages(const Clock& clock, int nudge_at_end, bool needs_last, Indices<before...>) {
    (take_stage<before + 1>(clock, nudge_at_end, needs_last), ...);
  }
  template <int i, class Clock>
  FLASHODE_HD void take_stage(const Clock& clock, int nudge_at_end, bool needs_last) {
    if (i == last && !needs_last) return;
    take_state<StageRow<Method, i>>(i, clock.step());
    evaluate(i, clock.time(Method::c[i], Method::c[i] == 1 ? nudge_at_end : 0), y + i * width);
  }
  template <class Clock, int... i>
  FLASHODE_HD void take_extra(const Clock& clock, Indices<i...>) {
    (take_extra_stage<i>(clock), ...);
  }
  template <int i, class Clock>
  FLASHODE_HD void take_extra_stage(const Clock& clock) {
    constexpr double c = Method::extra_c[i];
    take_state<ExtraRow<Method, i>>(stages + i, clock.step());
    evaluate(stages + i, clock.time(c, 0), y + (stages + i) * width);
  }
  template <class Row>
  FLASHODE_HD void take_state(int i, const V& step) {
    for (int64_t f = 0; f < width; ++f) {
      y[i * width + f] = add_term(y0[f], step, sum_of_terms<Row, width>(k + f));
    }
  }
  template <class Time>
  FLASHODE_HD void evaluate(int i, const Time& t, const V* y_i) {
    Field::slope_keeping(prepared, own, t, y_i, k + i * width, kept + i * kept_width, scratch);
  }

  // ---- backwards ---------------------------------------------------------------------------------

  // Adds the cotangent of an output at part x of a step that was taken with `dense`; returns that of
  // the output's time.
  FLASHODE_HD V add_output(const V& x, const V* adj_output) {
    for (int64_t f = 0; f < width; ++f) adj_inside[f] = adj_inside[f] + adj_output[f];
    V speed = zero<V>();
    add_weighted(x, adj_output, speed, UpTo<slopes>());
    start = start - (1 - x) * speed;
    end = end - x * speed;
    return speed;
  }
  template <int... j>
  FLASHODE_HD void add_weighted(const V& x, const V* adj_output, V& speed, Indices<j...>) {
    (add_weighted<j>(x, adj_output, speed), ...);
  }
  // Adds to `speed` what dy/dx, per length of the step, has of slope j.
  template <int j>
  FLASHODE_HD void add_weighted(const V& x, const V* adj_output, V& speed) {
    if constexpr (has_dense_weight<Method, j>()) {
      const V w = dense_weight<Method, j>(x);
      V product = zero<V>();
      for (int64_t f = 0; f < width; ++f) {
        adj_outputs[j * width + f] = add_term(adj_outputs[j * width + f], w, adj_output[f]);
        if (wants_time) product = add_term(product, adj_output[f], k[j * width + f]);
      }
      if (wants_time) speed = add_term(speed, dense_slope<Method, j>(x), product);
    }
  }

  // Pulls adj() and adj_f back from the end of the step to its start. There is an adj_f to begin with
  // if `hands_on`, and one in the end unless the step `opens` with an evaluation of its own.
  template <class Clock>
  FLASHODE_HD void pull(const Clock& clock, Nudges nudges, bool opens, bool hands_on, bool dense) {
    if (dense) {
      pull_all<true>(clock, nudges, opens, hands_on);
    } else {
      pull_all<false>(clock, nudges, opens, hands_on);
    }
  }
  template <bool dense, class Clock>
  FLASHODE_ASIDE void pull_all(const Clock& clock, Nudges nudges, bool opens, bool hands_on) {
    constexpr int pulled = dense ? slopes : stages;
    pull_stages<pulled - 1, dense>(clock, nudges.end, hands_on, UpTo<pulled - 1>());
    gather<0, dense>(clock.step(), adj_f);
    if (opens) {
      pull_back(0, clock.time(0, nudges.begin), y0, adj_f, adj_y, 0);
    } else {
      clear(adj_y, width);
    }
    constexpr bool keeps = !(Method::fsal && last > 0);  // the result is a state of its own
    for (int64_t f = 0; f < width; ++f) {
      V total = keeps ? adj()[f] : zero<V>();
      for (int i = 0; i < (dense ? slopes : stages); ++i) total = total + adj_y[i * width + f];
      adj()[f] = dense ? total + adj_inside[f] : total;
    }
  }

  template <int final, bool dense, class Clock, int... after>
  FLASHODE_HD void pull_stages(const Clock& clock, int nudge_at_end, bool hands_on, Indices<after...>) {
    (pull_stage<final - after, dense>(clock, nudge_at_end, hands_on), ...);
  }
  template <int i, bool dense, class Clock>
  FLASHODE_HD void pull_stage(const Clock& clock, int nudge_at_end, bool hands_on) {
    constexpr bool is_extra = i >= stages, is_result = Method::fsal && i == last;
    V* const adj_i = adj_y + i * width;
    const bool is_handed_on = i == last && hands_on;
    V local[is_small ? width : 1];
    V* const adj_k = is_small ? local : adj_slope;
    if (is_handed_on || !Column<Method, i, dense>::is_empty()) {
      gather<i, dense>(clock.step(), adj_k);
      if (is_handed_on) {
        for (int64_t f = 0; f < width; ++f) adj_k[f] = adj_k[f] + adj_f[f];
      }
      const double c = node<i>();
      pull_back(i, clock.time(c, c == 1 && !is_extra ? nudge_at_end : 0), y + i * width, adj_k, adj_i, c);
    } else {
      clear(adj_i, width);
    }
    if constexpr (is_result) {
      for (int64_t f = 0; f < width; ++f) adj_i[f] = adj_i[f] + adj()[f];
    }
  }
  template <int i>
  static constexpr double node() {
    if constexpr (i < stages) {
      return Method::c[i];
    } else {
      return Method::extra_c[i - stages];
    }
  }

  // adj_k, the cotangent of slope j, from the states it went into. The product with the slope is its part of
  // the cotangent of the length.
  template <int j, bool dense>
  FLASHODE_HD void gather(const V& step, V* adj_k) {
    V product = zero<V>();
    for (int64_t f = 0; f < width; ++f) {
      V total = sum_of_terms<Column<Method, j, dense>, width>(adj_y + f);
      if (dense) total = total + adj_outputs[j * width + f];
      adj_k[f] = step * total;
      if (wants_time) product = add_term(product, total, k[j * width + f]);
    }
    if (wants_time) start = start - product, end = end + product;
  }

  // adj_k through the evaluation at c of the step, which moves with both ends.
  template <class Time>
  FLASHODE_HD void pull_back(int i, const Time& t, const V* y_i, const V* adj_k, V* adj_y_i, double c) {
    V adj_t = zero<V>();
    Field::pull_back(prepared, own, t, y_i, kept + i * kept_width, adj_k, adj_y_i, &adj_t, adj_own,
                     lane_sums, sums, scratch);
    if (Field::timed && wants_time) {
      start = start + adj_t * Real(1 - c);
      end = end + adj_t * Real(c);
    }
  }
};

}  // namespace flashode

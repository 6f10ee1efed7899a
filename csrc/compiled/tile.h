// A tile: L samples worked on together. Where their numbers lie in the caller's arrays and in work
// space, and one trial step of a Runge-Kutta method. Sums over stages are unrolled
// when a program is compiled, without the terms whose weight is zero.
#pragma once

#include "../kernels/clock.h"
#include "../kernels/control.h"
#include "../kernels/status.h"
#include "call.h"
#include "math.h"

namespace flashode {

template <class Field>
using StateOf = Lanes<typename Field::Real, Field::lanes>;  // one number of a tile's states
template <class Field>
using TimeOf = Lanes<double, Field::lanes>;  // one time of each of its samples

template <class Field>
int64_t tiles_of(const Call& call) {
  return (call.samples + Field::lanes - 1) / Field::lanes;
}

// Lanes that hold samples, of the tile that begins with sample `first`.
template <class Field>
FLASHODE_HD int live_lanes(const Call& call, int64_t first) {
  if constexpr (Field::lanes == 1) return 1;
  const int64_t left = call.samples - first;
  return left < Field::lanes ? int(left) : Field::lanes;
}

// ---- from the caller's arrays and back ---------------------------------------------------------

// One number of the samples from `first` on; lanes beyond the last sample repeat it.
template <class V>
FLASHODE_HD V gather(const Call& call, int64_t first, const void* from, int64_t offset,
                     int64_t stride) {
  V v;
  for (int l = 0; l < lanes_of<V>; ++l) {
    const int64_t b = first + l < call.samples ? first + l : call.samples - 1;
    set_lane(v, l, static_cast<const real_of<V>*>(from)[offset + b * stride]);
  }
  return v;
}

template <class Field>
FLASHODE_HD void load_state(const Call& call, int64_t first, const void* state, StateOf<Field>* y) {
  for (int64_t f = 0; f < Field::width; ++f) {
    y[f] = gather<StateOf<Field>>(call, first, state, call.offset[f], call.stride[f]);
  }
}

template <class Field>
FLASHODE_HD void load_own(const Call& call, int64_t first, StateOf<Field>* own) {
  for (int64_t r = 0; r < Field::own; ++r) {
    own[r] =
        gather<StateOf<Field>>(call, first, call.own[r], call.own_offset[r], call.own_stride[r]);
  }
}

// Writes a tile's states into a state of the caller's, which is laid out like y0.
template <class Field>
FLASHODE_HD void store_state(const Call& call, int64_t first, const StateOf<Field>* y,
                             void* state) {
  using Real = typename Field::Real;
  const int live = live_lanes<Field>(call, first);
  for (int64_t f = 0; f < Field::width; ++f) {
    Real lanes[Field::lanes];
    store(lanes, y[f]);
    Real* to = static_cast<Real*>(state) + call.offset[f] + first * call.stride[f];
    for (int l = 0; l < live; ++l) to[l * call.stride[f]] = lanes[l];
  }
}

// The same number everywhere.
template <class Field>
FLASHODE_HD void fill_state(const Call& call, int64_t first, typename Field::Real value,
                            void* state) {
  for (int64_t f = 0; f < Field::width; ++f) {
    auto* const to =
        static_cast<typename Field::Real*>(state) + call.offset[f] + first * call.stride[f];
    for (int l = 0; l < live_lanes<Field>(call, first); ++l) to[l * call.stride[f]] = value;
  }
}

// ---- rows of the method's table ----------------------------------------------------------------

template <class Method, int i>
struct StageRow {
  static constexpr int terms = i;
  FLASHODE_HD static constexpr double weight(int j) { return Method::a[i][j]; }
};
template <class Method>
struct ResultRow {
  static constexpr int terms = Method::stages;
  FLASHODE_HD static constexpr double weight(int j) { return Method::b[j]; }
};
template <class Method>
struct ErrorRow {
  static constexpr int terms = Method::stages;
  FLASHODE_HD static constexpr double weight(int j) { return Method::b_err[j]; }
};
struct EulerRow {
  static constexpr int terms = 1;
  FLASHODE_HD static constexpr double weight(int) { return 1; }
};
template <class Method, int i>
struct ExtraRow {  // of a stage that dense output adds
  static constexpr int terms = Method::stages + i;
  FLASHODE_HD static constexpr double weight(int j) { return Method::extra_a[i][j]; }
};
template <class Method, int power>
struct DenseRow {  // coefficients of x^(power + 1)
  static constexpr int terms = Method::stages + Method::extra;
  FLASHODE_HD static constexpr double weight(int j) { return Method::weights[j][power]; }
};

// Lists of constants: what is done for each stage is written once for number i, and not with all that comes after
// it, of which a compiler would make as many functions as there are stages, each longer than the next.
template <int... i>
struct Indices {};
template <int n, int... i>
struct Count {
  using Type = typename Count<n - 1, n - 1, i...>::Type;
};
template <int... i>
struct Count<0, i...> {
  using Type = Indices<i...>;
};
template <int n>
using UpTo = typename Count<n>::Type;  // 0, ..., n - 1

template <class Row>
FLASHODE_HD constexpr bool is_first_term(int j) {
  for (int i = 0; i < j; ++i) {
    if (Row::weight(i) != 0) return false;
  }
  return true;
}
// total + weight_j k_j of one number; the first term is the sum so far.
template <class Row, int64_t width, int j, class V>
FLASHODE_HD V plus_term(const V& total, const V* k) {
  constexpr double weight = Row::weight(j);
  if constexpr (weight == 0) {
    return total;
  } else {
    const V w = splat<V>(real_of<V>(weight)), k_j = k[j * width];
    return is_first_term<Row>(j) ? w * k_j : add_term(total, w, k_j);
  }
}
template <class Row, int64_t width, class V, int... j>
FLASHODE_HD V sum_of_terms(const V* k, Indices<j...>) {
  V total = zero<V>();
  ((total = plus_term<Row, width, j>(total, k)), ...);
  return total;
}
// sum_j weight_j k_j of one number, in the order of the stages; slopes lie `width` apart.
template <class Row, int64_t width, class V>
FLASHODE_HD V sum_of_terms(const V* k) {
  return sum_of_terms<Row, width>(k, UpTo<Row::terms>());
}

enum Landing { kFree, kStop, kJump, kEnd };  // what the end of a step lands on

// ---- the clock of a trial step -----------------------------------------------------------------

// What all samples see where they share their clock. Times are on the forward clock.
template <class Field>
struct OneClock {
  using Real = typename Field::Real;
  double t0, t1, dt, direction, low, high;

  FLASHODE_HD StateOf<Field> step() const { return splat<StateOf<Field>>(Real(direction * dt)); }
  // The time at c of the step, moved by `nudge`.
  FLASHODE_HD Real time(double c, int nudge) const {
    if (!Field::timed) return 0;
    const double t = round_time<Real>(c == 0 ? t0 : c == 1 ? t1 : t0 + c * dt, nudge);
    return Real(direction * (t < low ? low : t > high ? high : t));
  }
};

// ---- a tile ------------------------------------------------------------------------------------

// Tolerances of number f: the same for all, or each its own. Loops are made for either.
template <class V>
struct OneTolerance {
  const V relative, absolute;
  FLASHODE_HD const V& rtol(int64_t) const { return relative; }
  FLASHODE_HD const V& atol(int64_t) const { return absolute; }
};
template <class V>
struct EachTolerance {
  const V *relative, *absolute;
  FLASHODE_HD const V& rtol(int64_t f) const { return relative[f]; }
  FLASHODE_HD const V& atol(int64_t f) const { return absolute[f]; }
};

// Sums of the squares of error(f) over the numbers of one member, one for each lane. A single
// system has several sums in a row, or each number would wait for the one before.
template <class Field, class Error>
FLASHODE_HD TimeOf<Field> sum_of_squares(const Error& error, int64_t begin, int64_t end) {
  using Sum = TimeOf<Field>;
  constexpr int chains = 16;
  Sum sum = zero<Sum>();
#ifdef __CUDACC__
  // Registers have no addresses: where numbers are in them, loops must have bounds that are known.
  if constexpr (Field::width <= 16) {
    for (int64_t f = 0; f < Field::width; ++f) {
      const Sum x = f < begin || f >= end ? zero<Sum>() : convert<Sum>(error(f));
      sum = add_term(sum, x, x);
    }
    return sum;
  }
#endif
  int64_t f = begin;
  if constexpr (Field::lanes == 1 && Field::width >= chains) {
    double sums[chains] = {};
    for (; f + chains <= end; f += chains) {
#pragma GCC ivdep
      for (int i = 0; i < chains; ++i) {
        const double x = double(error(f + i));
        sums[i] = add_term(sums[i], x, x);
      }
    }
    for (int i = 0; i < chains; ++i) sum += sums[i];
  }
  for (; f < end; ++f) {
    const Sum x = convert<Sum>(error(f));
    sum = add_term(sum, x, x);
  }
  return sum;
}

template <class Field, class Method>
struct Tile {
  using Real = typename Field::Real;
  using V = StateOf<Field>;
  static constexpr int64_t width = Field::width;
  static constexpr int slopes = Method::stages + Method::extra;
  // States of so few numbers pass from one stage to the next in registers.
  static constexpr bool is_small = width * int64_t(sizeof(V)) <= 2048;
  // Multiply-adds of a step, roughly, if the field costs about as much as the sums over its slopes.
  static constexpr int64_t operations = width * Field::lanes * slopes * (slopes + 1);

  const Call* call;
  const Real* prepared;
  int64_t first;   // sample
  V *y0, *y1, *k;  // slope j of number f is k[j * width + f]
  V *stage, *own, *scratch;
  V *rtol, *atol;  // of every number; both null where one serves for all

  // Numbers of work space that a tile needs for itself, and that it may share.
  FLASHODE_HD static constexpr int64_t own_size(bool has_each) {
    return (2 + slopes + (has_each ? 2 : 0)) * width + Field::own;
  }
  static bool has_each(const Call& call) { return call.each_rtol || call.each_atol; }
  static constexpr int64_t shared_size = (is_small ? 0 : width) + Field::scratch;

  FLASHODE_BOTH Tile(const Call& c, const Real* prepared, V* space, V* shared, bool has_each)
      : call(&c), prepared(prepared) {
    const auto take = [&](int64_t n) { return space += n, space - n; };
    y0 = take(width), y1 = take(width), k = take(slopes * width), own = take(Field::own);
    rtol = has_each ? take(width) : nullptr;
    atol = has_each ? take(width) : nullptr;
    share(shared);
  }
  FLASHODE_BOTH void share(V* shared) { stage = shared, scratch = shared + (is_small ? 0 : width); }

  FLASHODE_BOTH void load(int64_t sample) {
    first = sample;
    load_state<Field>(*call, first, call->y0, y0);
    load_own<Field>(*call, first, own);
    if (!rtol) return;
    for (int64_t f = 0; f < width; ++f) {
      rtol[f] = splat<V>(Real(call->rtol)), atol[f] = splat<V>(Real(call->atol));
    }
    if (call->each_rtol) load_state<Field>(*call, first, call->each_rtol, rtol);
    if (call->each_atol) load_state<Field>(*call, first, call->each_atol, atol);
  }

  template <class Time>
  FLASHODE_HD void slope(const Time& t, const V* y, V* f) const {
    Field::slope(prepared, own, t, y, f, scratch);
  }

  // Slope i at y0 + step * sum_j row_j k_j, which is left at `y` unless that is null.
  template <class Row, class Clock>
  FLASHODE_HD void evaluate(const Clock& clock, double c, int nudge, int i, V* y) const {
    V local[is_small ? width : 1];
    V* const state = y ? y : is_small ? local : stage;
    const V step = clock.step();
#pragma GCC ivdep
    for (int64_t f = 0; f < width; ++f) {
      state[f] = add_term(y0[f], step, sum_of_terms<Row, width>(k + f));
    }
    slope(clock.time(c, nudge), state, k + i * width);
  }

  // All stages of a trial step but the first, which is there, and y1.
  template <class Clock>
  FLASHODE_HD void take_step(const Clock& clock, int nudge_at_end) const {
    take_stages(clock, nudge_at_end, UpTo<Method::stages - 1>());
    if constexpr (!Method::fsal) {
      const V step = clock.step();
#pragma GCC ivdep
      for (int64_t f = 0; f < width; ++f) {
        y1[f] = add_term(y0[f], step, sum_of_terms<ResultRow<Method>, width>(k + f));
      }
    }
  }
  template <class Clock, int... before>
  FLASHODE_HD void take_stages(const Clock& clock, int nudge_at_end, Indices<before...>) const {
    (take_stage<before + 1>(clock, nudge_at_end), ...);
  }
  template <int i, class Clock>
  FLASHODE_HD void take_stage(const Clock& clock, int nudge_at_end) const {
    constexpr double c = Method::c[i];
    constexpr bool is_result = Method::fsal && i == Method::stages - 1;
    evaluate<StageRow<Method, i>>(clock, c, c == 1 ? nudge_at_end : 0, i, is_result ? y1 : nullptr);
  }

  // The stages that dense output adds.
  template <class Clock>
  FLASHODE_HD void extend(const Clock& clock) const {
    extend(clock, UpTo<Method::extra>());
  }
  template <class Clock, int... i>
  FLASHODE_HD void extend(const Clock& clock, Indices<i...>) const {
    (extend_by<i>(clock), ...);
  }
  template <int i, class Clock>
  FLASHODE_HD void extend_by(const Clock& clock) const {
    constexpr double c = Method::extra_c[i];  // on a device there is no table to be read
    evaluate<ExtraRow<Method, i>>(clock, c, 0, Method::stages + i, nullptr);
  }

  template <class Tolerance>
  FLASHODE_HD V scaled(const Tolerance& tolerance, int64_t f, const V& error, const V* end) const {
    return scaled_error(error, y0[f], end[f], tolerance.rtol(f), tolerance.atol(f));
  }
  template <class Tolerance, class Clock>
  FLASHODE_HD V scaled_error_of_step(const Tolerance& tolerance, int64_t f,
                                     const Clock& clock) const {
    return scaled(tolerance, f, clock.step() * sum_of_terms<ErrorRow<Method>, width>(k + f), y1);
  }

  // The error of numbers that are no step's, relative to y0 alone.
  template <class Value>
  FLASHODE_HD auto relative(const Value& value) const {
    return [this, value](const auto& tolerance, int64_t f) {
      return scaled(tolerance, f, value(f), y0);
    };
  }

  // visit(m, sum) with the sums over every member of the squares of error(tolerance, f), one for
  // each lane.
  template <class Error, class Visit>
  FLASHODE_HD void for_each_member(const Error& error, const Visit& visit) const {
    if (rtol) {
      visit_members(EachTolerance<V>{rtol, atol}, error, visit);
    } else {
      visit_members(OneTolerance<V>{splat<V>(Real(call->rtol)), splat<V>(Real(call->atol))}, error,
                    visit);
    }
  }

  static FLASHODE_HD bool is_finite_state(const V* y) {
    V nothing = zero<V>();  // x - x is 0 for finite x and NaN otherwise; NaN survives the sum
    for (int64_t f = 0; f < width; ++f) nothing = nothing + (y[f] - y[f]);
    return all(nothing == zero<V>());
  }

  FLASHODE_HD void copy_start(V* y, V* f0) const {
    for (int64_t f = 0; f < width; ++f) y[f] = y0[f], f0[f] = k[f];
  }

  // The end of an accepted step, and its last slope, begin the next one.
  FLASHODE_HD void move_on() const {
    const V* const last = k + (Method::stages - 1) * width;
    for (int64_t f = 0; f < width; ++f) y0[f] = y1[f], k[f] = last[f];
  }

 private:
  template <class Tolerance, class Error, class Visit>
  FLASHODE_HD void visit_members(const Tolerance& tolerance, const Error& error,
                                 const Visit& visit) const {
    const auto of_number = [&](int64_t f) { return error(tolerance, f); };
    if (call->member_count == 1) return visit(0, sum_of_squares<Field>(of_number, 0, width));
    for (int64_t m = 0; m < call->member_count; ++m) {
      visit(m, sum_of_squares<Field>(of_number, call->members[m], call->members[m + 1]));
    }
  }
};

}  // namespace flashode

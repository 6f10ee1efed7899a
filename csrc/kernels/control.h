// Step-size control as pure functions, for host and device; python/flashode/control.py is the twin.
#pragma once

#include <cmath>

#include "rk.h"

namespace flashode {

// R is double, or the doubles of many samples side by side: the functions below choose by `select`.
//
// The history of a solve travels with the constants, as kernels take both by value: `past` are the
// error ratios of the last two accepted steps.
template <class R>
struct ControllerOf {
  int order = 1;
  double safety = 0.9, ifactor = 10, dfactor = 0.2, min_step = 0, max_step = INFINITY;
  double betas[3] = {1, 0, 0};
  R past[2] = {R() + 1.0, R() + 1.0};
};
using Controller = ControllerOf<double>;

// What control makes of an attempted step.
template <class R>
struct DecisionOf {
  R error_ratio;
  R next_dt;
  Mask<R> accepted;
};
using Decision = DecisionOf<double>;

template <class R>
FLASHODE_HD Mask<R> is_finite(const R& x) {
  return x - x == 0;
}

// A power of an error ratio; lanes have one of their own.
FLASHODE_HD double power(double x, double exponent) { return pow(x, exponent); }

// The larger of two norms; a NaN is kept.
template <class R>
FLASHODE_HD R larger(const R& so_far, const R& norm) {
  return select((so_far == so_far) & !(norm <= so_far), norm, so_far);
}

// Hairer, Norsett, Wanner I, II.4, steps a and b.
template <class R>
FLASHODE_HD R first_guess(const R& d0, const R& d1) {
  return select((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1);
}

// Hairer, Norsett, Wanner I, II.4, steps e and f; parity: the exponent is 1/order.
template <class R>
FLASHODE_HD R initial_step(const R& h0, const R& d1, const R& d2, int order) {
  const R flat = select(h0 * 1e-3 > 1e-6, h0 * 1e-3, 1e-6);
  const R curved = power(0.01 / select(d1 > d2, d1, d2), 1.0 / order);
  const R h1 = select((d1 <= 1e-15) & (d2 <= 1e-15), flat, curved);
  return select(is_finite(d2), select(100 * h0 < h1, 100 * h0, h1), h0);
}

template <class R>
FLASHODE_HD R clamp_step(const R& dt, const ControllerOf<R>& control) {
  const R longer = select(dt < control.min_step, control.min_step, dt);
  return select(longer > control.max_step, control.max_step, longer);
}

template <class R>
FLASHODE_HD Mask<R> accept(const R& error_ratio, const R& dt, const ControllerOf<R>& control) {
  return is_finite(error_ratio) & ((error_ratio <= 1) | (dt <= control.min_step));
}

template <class R>
FLASHODE_HD R next_step(const R& error_ratio, const R& dt, const ControllerOf<R>& control) {
  const double* b = control.betas;
  R filtered = error_ratio, least = R() + control.dfactor;
  if (b[0] == 1 && b[1] == 0 && b[2] == 0) {
    least = select(error_ratio < 1, 1.0, least);
  } else {
    const R smooth =
        power(error_ratio, b[0]) * power(control.past[0], b[1]) * power(control.past[1], b[2]);
    filtered = select(error_ratio > 1, error_ratio, smooth);
  }
  R factor = control.safety / power(filtered, 1.0 / control.order);
  factor = select(factor < least, least, factor);
  factor = select(factor > control.ifactor, control.ifactor, factor);
  factor = select(is_finite(error_ratio), factor, control.dfactor);
  factor = select(error_ratio == 0, control.ifactor, factor);
  return clamp_step(dt * factor, control);
}

// The history after an accepted step. Ratios that ask for more than ifactor count as one that asks
// for it: a step that was shortened to land on a time has next to no error, and says nothing.
template <class R>
FLASHODE_HD void remember(const R& error_ratio, ControllerOf<R>& control) {
  const double least = pow(control.safety / control.ifactor, control.order);
  control.past[1] = control.past[0];
  control.past[0] = select(error_ratio > least, error_ratio, least);
}

template <class R>
FLASHODE_HD DecisionOf<R> decide(const R& error_ratio, const R& dt,
                                 const ControllerOf<R>& control) {
  return {error_ratio, next_step(error_ratio, dt, control), accept(error_ratio, dt, control)};
}

}  // namespace flashode

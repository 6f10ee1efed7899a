// Step-size control as pure functions, for host and device; python/flashode/control.py is the twin.
#pragma once

#include <cmath>

#include "rk.h"

namespace flashode {

// The history of a solve travels with the constants, as kernels take both by value: `past` are the
// error ratios of the last two accepted steps.
struct Controller {
  int order = 1;
  double safety = 0.9, ifactor = 10, dfactor = 0.2, min_step = 0, max_step = INFINITY;
  double betas[3] = {1, 0, 0};
  double past[2] = {1, 1};
};

// What control makes of an attempted step.
struct Decision {
  double error_ratio;
  double next_dt;
  int accepted;
};

FLASHODE_HD bool is_finite(double x) { return x - x == 0; }

// The larger of two norms; a NaN is kept.
FLASHODE_HD double larger(double so_far, double norm) {
  return so_far == so_far && !(norm <= so_far) ? norm : so_far;
}

// Hairer, Norsett, Wanner I, II.4, steps a and b.
FLASHODE_HD double first_guess(double d0, double d1) {
  return d0 < 1e-5 || d1 < 1e-5 ? 1e-6 : 0.01 * d0 / d1;
}

// Hairer, Norsett, Wanner I, II.4, steps e and f; parity: the exponent is 1/order.
FLASHODE_HD double initial_step(double h0, double d1, double d2, int order) {
  if (!is_finite(d2)) return h0;
  double h1;
  if (d1 <= 1e-15 && d2 <= 1e-15) {
    h1 = h0 * 1e-3 > 1e-6 ? h0 * 1e-3 : 1e-6;
  } else {
    h1 = pow(0.01 / (d1 > d2 ? d1 : d2), 1.0 / order);
  }
  return 100 * h0 < h1 ? 100 * h0 : h1;
}

FLASHODE_HD double clamp_step(double dt, const Controller& control) {
  dt = dt < control.min_step ? control.min_step : dt;
  return dt > control.max_step ? control.max_step : dt;
}

FLASHODE_HD bool accept(double error_ratio, double dt, const Controller& control) {
  return is_finite(error_ratio) && (error_ratio <= 1 || dt <= control.min_step);
}

FLASHODE_HD double next_step(double error_ratio, double dt, const Controller& control) {
  double factor;
  if (error_ratio == 0) {
    factor = control.ifactor;
  } else if (!is_finite(error_ratio)) {
    factor = control.dfactor;
  } else {
    const double *b = control.betas, *past = control.past;
    const bool elementary = (b[0] == 1 && b[1] == 0 && b[2] == 0) || error_ratio > 1;
    const double least = elementary && error_ratio < 1 ? 1.0 : control.dfactor;
    const double filtered =
        elementary ? error_ratio : pow(error_ratio, b[0]) * pow(past[0], b[1]) * pow(past[1], b[2]);
    factor = control.safety / pow(filtered, 1.0 / control.order);
    factor = factor < least ? least : factor;
    factor = factor > control.ifactor ? control.ifactor : factor;
  }
  return clamp_step(dt * factor, control);
}

// The history after an accepted step. Ratios that ask for more than ifactor count as one that asks for
// it: a step that was shortened to land on a time has next to no error, and says nothing.
FLASHODE_HD void remember(double error_ratio, Controller& control) {
  const double least = pow(control.safety / control.ifactor, control.order);
  control.past[1] = control.past[0];
  control.past[0] = error_ratio > least ? error_ratio : least;
}

FLASHODE_HD Decision decide(double error_ratio, double dt, const Controller& control) {
  return {error_ratio, next_step(error_ratio, dt, control), accept(error_ratio, dt, control)};
}

}  // namespace flashode

// Step-size control as pure functions, for host and device; python/flashode/control.py is the twin.
#pragma once

#include <cmath>

#include "rk.h"

namespace flashode {

struct Controller {
  int order = 1;
  double safety = 0.9, ifactor = 10, dfactor = 0.2, min_step = 0, max_step = INFINITY;
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
    const double least = error_ratio < 1 ? 1.0 : control.dfactor;
    factor = control.safety / pow(error_ratio, 1.0 / control.order);
    factor = factor < least ? least : factor;
    factor = factor > control.ifactor ? control.ifactor : factor;
  }
  return clamp_step(dt * factor, control);
}

FLASHODE_HD Decision decide(double error_ratio, double dt, const Controller& control) {
  return {error_ratio, next_step(error_ratio, dt, control), accept(error_ratio, dt, control)};
}

}  // namespace flashode

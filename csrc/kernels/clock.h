// Times as a field sees them: the solver's double in the dtype of the state, rounded as torch does
// it (to 16 bits by way of float).
#pragma once

#include <cmath>

#include "rk.h"

namespace flashode {

// The neighbour of a 16-bit float, one step up or down the line of its values. Not for infinities:
// beyond them lie the NaNs.
inline uint16_t next_bits(uint16_t bits, int nudge) {
  if ((bits & 0x7fff) == 0) return nudge > 0 ? 0x0001 : 0x8001;
  const bool negative = bits & 0x8000;
  return uint16_t(bits + ((nudge > 0) != negative ? 1 : -1));
}

// t in the given dtype; `nudge` -1 and +1 take the value just before or after it.
inline double round_time(double t, int nudge, Dtype dtype) {
  const double toward = nudge < 0 ? -INFINITY : INFINITY;
  switch (dtype) {
    case Dtype::f64:
      return nudge == 0 ? t : std::nextafter(t, toward);
    case Dtype::f32:
      return nudge == 0 ? float(t) : std::nextafterf(float(t), float(toward));
    case Dtype::f16: {
      const Half x = narrow<Half>(float(t));
      return widen(nudge == 0 || widen(x) == toward ? x : Half{next_bits(x.bits, nudge)});
    }
    default: {
      const BFloat16 x = narrow<BFloat16>(float(t));
      return widen(nudge == 0 || widen(x) == toward ? x : BFloat16{next_bits(x.bits, nudge)});
    }
  }
}

FLASHODE_HD void write_time(void* target, double t, Dtype dtype) {
  switch (dtype) {
    case Dtype::f64: *static_cast<double*>(target) = t; return;
    case Dtype::f32: *static_cast<float*>(target) = float(t); return;
    case Dtype::f16: *static_cast<Half*>(target) = narrow<Half>(float(t)); return;
    default: *static_cast<BFloat16*>(target) = narrow<BFloat16>(float(t)); return;
  }
}

}  // namespace flashode

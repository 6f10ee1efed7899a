// Times as a field sees them: the solver's double in the dtype of the state, rounded as torch does
// it (to 16 bits by way of float).
#pragma once

#include "rk.h"

namespace flashode {

// The neighbour of a float, one step up or down the line of its values. Not for infinities: beyond
// them lie the NaNs.
template <class Bits>
FLASHODE_HD Bits next_bits(Bits bits, int nudge) {
  constexpr Bits sign = Bits(Bits(1) << (8 * sizeof(Bits) - 1));
  const Bits away = Bits(nudge > 0 ? 1 : sign | 1);  // of a zero
  const bool negative = bits & sign;
  return Bits(bits & Bits(~sign)) == 0 ? away : Bits(bits + ((nudge > 0) != negative ? 1 : -1));
}
FLASHODE_HD float next_value(float x, int nudge) { return float_of(next_bits(bits_of(x), nudge)); }
FLASHODE_HD double next_value(double x, int nudge) { return double_of(next_bits(bits_of(x), nudge)); }
FLASHODE_HD Half next_value(Half x, int nudge) { return {next_bits(x.bits, nudge)}; }
FLASHODE_HD BFloat16 next_value(BFloat16 x, int nudge) { return {next_bits(x.bits, nudge)}; }

// x as a time; `nudge` -1 and +1 take the value just before or after it.
template <class T>
FLASHODE_HD double nudged(T x, int nudge) {
  const bool at_limit = double(widen(x)) == (nudge < 0 ? -INFINITY : INFINITY);
  const T next = next_value(x, nudge);
  return double(widen(nudge == 0 || at_limit ? x : next));
}

// t in the dtype of T.
template <class T>
FLASHODE_HD double round_time(double t, int nudge) {
  return nudged(narrow<T>(wide_t<T>(t)), nudge);
}

inline double round_time(double t, int nudge, Dtype dtype) {
  switch (dtype) {
    case Dtype::f64: return round_time<double>(t, nudge);
    case Dtype::f32: return round_time<float>(t, nudge);
    case Dtype::f16: return round_time<Half>(t, nudge);
    default: return round_time<BFloat16>(t, nudge);
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

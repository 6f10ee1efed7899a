// Elementary functions of one number or of L.
#pragma once

#include "lanes.h"

namespace flashode {

#define FLASHODE_SCALAR(name)                                    \
  FLASHODE_HD float name(float x) { return std::name(x); }       \
  FLASHODE_HD double name(double x) { return std::name(x); }
#define FLASHODE_SCALAR_2(name)                                                 \
  FLASHODE_HD float name(float x, float y) { return std::name(x, y); }          \
  FLASHODE_HD double name(double x, double y) { return std::name(x, y); }
FLASHODE_SCALAR(exp)
FLASHODE_SCALAR(expm1)
FLASHODE_SCALAR(log)
FLASHODE_SCALAR(log1p)
FLASHODE_SCALAR(sin)
FLASHODE_SCALAR(cos)
FLASHODE_SCALAR(tan)
FLASHODE_SCALAR(sinh)
FLASHODE_SCALAR(cosh)
FLASHODE_SCALAR(tanh)
FLASHODE_SCALAR(asin)
FLASHODE_SCALAR(acos)
FLASHODE_SCALAR(atan)
FLASHODE_SCALAR(asinh)
FLASHODE_SCALAR(acosh)
FLASHODE_SCALAR(atanh)
FLASHODE_SCALAR(erf)
FLASHODE_SCALAR(erfc)
FLASHODE_SCALAR_2(pow)
FLASHODE_SCALAR_2(atan2)
#undef FLASHODE_SCALAR
#undef FLASHODE_SCALAR_2

#ifndef __CUDACC__

#define FLASHODE_LANEWISE(name)                                             \
  template <class T, int L>                                                 \
  FLASHODE_HD Vector<T, L> name(const Vector<T, L>& x) {                    \
    Vector<T, L> out;                                                       \
    for (int l = 0; l < L; ++l) set_lane(out, l, name(lane(x, l)));         \
    return out;                                                             \
  }
#define FLASHODE_LANEWISE_2(name)                                           \
  template <class T, int L>                                                 \
  FLASHODE_HD Vector<T, L> name(const Vector<T, L>& x, const Vector<T, L>& y) { \
    Vector<T, L> out;                                                       \
    for (int l = 0; l < L; ++l) set_lane(out, l, name(lane(x, l), lane(y, l))); \
    return out;                                                             \
  }                                                                         \
  template <class T, int L>                                                 \
  FLASHODE_HD Vector<T, L> name(const Vector<T, L>& x, Same<T> y) {         \
    return name(x, splat<Vector<T, L>>(y));                                 \
  }                                                                         \
  template <class T, int L>                                                 \
  FLASHODE_HD Vector<T, L> name(Same<T> x, const Vector<T, L>& y) {         \
    return name(splat<Vector<T, L>>(x), y);                                 \
  }
FLASHODE_LANEWISE(exp)
FLASHODE_LANEWISE(expm1)
FLASHODE_LANEWISE(log)
FLASHODE_LANEWISE(log1p)
FLASHODE_LANEWISE(sin)
FLASHODE_LANEWISE(cos)
FLASHODE_LANEWISE(tan)
FLASHODE_LANEWISE(sinh)
FLASHODE_LANEWISE(cosh)
FLASHODE_LANEWISE(tanh)
FLASHODE_LANEWISE(asin)
FLASHODE_LANEWISE(acos)
FLASHODE_LANEWISE(atan)
FLASHODE_LANEWISE(asinh)
FLASHODE_LANEWISE(acosh)
FLASHODE_LANEWISE(atanh)
FLASHODE_LANEWISE(erf)
FLASHODE_LANEWISE(erfc)
FLASHODE_LANEWISE_2(pow)
FLASHODE_LANEWISE_2(atan2)
#undef FLASHODE_LANEWISE
#undef FLASHODE_LANEWISE_2

#endif  // __CUDACC__

template <class V>
FLASHODE_HD V sigmoid(const V& x) {
  return 1 / (1 + exp(-x));
}

}  // namespace flashode

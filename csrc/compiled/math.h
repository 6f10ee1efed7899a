// Elementary functions of one number or of L: the C library's of one, straight code without
// branches of L. NaNs, infinities, signed zeros and subnormal numbers give what they give in torch.
//
// Errors of the vectors' in units of the last place: below 2.5; of exp, log, log1p, erf and pow
// below 1.5. tan, sinh, cosh, fmod, hypot and the inverse functions other than atan ask the C library
// for one lane after the other.
#pragma once

#include "lanes.h"
#ifndef __CUDACC__
#include "series.h"
#endif

namespace flashode {

#define FLASHODE_SCALAR(name)                              \
  FLASHODE_HD float name(float x) { return ::name##f(x); } \
  FLASHODE_HD double name(double x) { return ::name(x); }
#define FLASHODE_SCALAR_2(name)                                        \
  FLASHODE_HD float name(float x, float y) { return ::name##f(x, y); } \
  FLASHODE_HD double name(double x, double y) { return ::name(x, y); }
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
FLASHODE_SCALAR_2(fmod)
FLASHODE_SCALAR_2(hypot)
#undef FLASHODE_SCALAR
#undef FLASHODE_SCALAR_2

#ifndef __CUDACC__

// ---- pieces ------------------------------------------------------------------------------------

template <class T, int L>
FLASHODE_HD Vector<integer_of<T>, L> bits_of(const Vector<T, L>& x) {
  Vector<integer_of<T>, L> bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
template <class V>
FLASHODE_HD V from_bits(const Mask<V>& bits) {
  V x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T, int L>
FLASHODE_HD Vector<T, L> operator<<(const Vector<T, L>& x, int count) {
  Vector<T, L> out;
  for (int i = 0; i < out.parts; ++i) out.part[i] = x.part[i] << count;
  return out;
}
template <class T, int L>
FLASHODE_HD Vector<T, L> operator>>(const Vector<T, L>& x, int count) {
  Vector<T, L> out;
  for (int i = 0; i < out.parts; ++i) out.part[i] = x.part[i] >> count;
  return out;
}

// a * b + c rounded once, where the compiler must not see that a * b is known already. Everywhere
// else -ffp-contract=fast fuses what is written as a product and a sum, and the reductions count on
// it.
template <class T, int L>
FLASHODE_HD Vector<T, L> fused(const Vector<T, L>& a, const Vector<T, L>& b,
                               const Vector<T, L>& c) {
  T x[L], y[L], z[L];
  store(x, a);
  store(y, b);
  store(z, c);
  for (int l = 0; l < L; ++l) z[l] = std::fma(x[l], y[l], z[l]);
  return load_unaligned<Vector<T, L>>(z);
}

// sum_k c[k] x^k, even and odd powers apart, which halves the chain of multiply-adds.
template <class V, int count>
FLASHODE_HD V polynomial(const V& x, const real_of<V> (&c)[count]) {
  const V square = x * x;
  V last = splat<V>(c[count - 1]), before = splat<V>(c[count - 2]);
  for (int k = count - 3; k >= 0; --k) {
    const V next = last * square + c[k];
    last = before;
    before = next;
  }
  return last * x + before;
}

template <class V>
FLASHODE_HD V with_sign_of(const V& x, const V& size) {  // of a size that is not negative
  return from_bits<V>(bits_of(size) | (bits_of(x) & Series<real_of<V>>::sign));
}

// 2^n for n within the exponents of normal numbers.
template <class V>
FLASHODE_HD V power_of_2(const Mask<V>& n) {
  using S = Series<real_of<V>>;
  return from_bits<V>((n + S::bias) << S::mantissa);
}

// x = n ln 2 + r with |r| <= ln 2 / 2. In n the integer is in the low bits: those above it do not
// survive a shift to the exponent's place.
template <class V>
struct Reduced {
  V r;
  Mask<V> n;
};
template <class V>
FLASHODE_HD Reduced<V> by_ln2(const V& x) {
  using S = Series<real_of<V>>;
  const V shifted = x * S::log2_e + S::rounder, n = shifted - S::rounder;
  return {(x - n * S::ln2[0]) - n * S::ln2[1], bits_of(shifted)};
}

// ---- of the vectors of the machine --------------------------------------------------------------

// exp(x + rest); |rest| is small, and x within the limits below.
template <class V>
FLASHODE_HD V exp_within(const Reduced<V>& x) {
  using S = Series<real_of<V>>;
  const V p = 1 + (x.r + x.r * x.r * polynomial(x.r, S::exp));
  const auto n = x.n - bits_of(splat<V>(S::rounder));
  const auto half = n >> 1;
  return p * power_of_2<V>(half) * power_of_2<V>(n - half);  // twice: the result may be subnormal
}
template <class V>
FLASHODE_HD V within(const V& x, real_of<V> least, real_of<V> most) {
  const V raised = select(x < least, least, x);
  return select(raised > most, most, raised);
}

template <class V>
FLASHODE_HD V exp_of(const V& x) {
  using S = Series<real_of<V>>;
  return exp_within(by_ln2(within(x, S::least_exp, S::most_exp)));
}

template <class V>
FLASHODE_HD V expm1_of(const V& x) {
  using S = Series<real_of<V>>;
  const Reduced<V> t = by_ln2(within(x, S::flat_expm1, S::most_exp));
  const V q = t.r + t.r * t.r * polynomial(t.r, S::exp);
  const V half = power_of_2<V>(t.n - 1);  // of 2^n, which may be too large
  return select(x == 0, x, (half * q + (half - real_of<V>(0.5))) * 2);
}

// (1 - e) / (1 + e) with e = exp(-2|x|), by way of e - 1, which keeps the digits of a small x.
template <class V>
FLASHODE_HD V tanh_of(const V& x) {
  using S = Series<real_of<V>>;
  const V twice = magnitude(x) * -2,
          a = select(twice < -2 * S::flat_tanh, -2 * S::flat_tanh, twice);
  const V shifted = a * S::log2_e + S::rounder;
  const V r = a - (shifted - S::rounder) * S::ln2[0];
  const V q = r + r * r * polynomial(r, S::exp);
  const V power = power_of_2<V>(bits_of(shifted));
  const V less = 1 - power - power * q;  // 1 - e
  return with_sign_of(x, less / (2 - less));
}

// log(u + rest) + exponent ln 2, for a normal u > 0 and a rest that is no more than its rounding.
template <class V>
FLASHODE_HD V log_within(const V& u, const V& rest, const V& exponent) {
  using T = real_of<V>;
  using S = Series<T>;
  const auto bits = bits_of(u) - S::root_half;
  const auto high = bits & ~S::fraction;
  const V m = from_bits<V>((bits & S::fraction) + S::root_half), f = m - 1;
  const V n =
      from_bits<V>((high >> S::mantissa) + bits_of(splat<V>(S::rounder))) - S::rounder + exponent;
  // rest / u, with 2 - m for 1 / m: it is exact where it matters, near u = 1.
  const V scale = from_bits<V>(bits_of(splat<V>(2)) - high);
  const V correction = rest * scale * (1 - T(0.5) * m);
  const V half_square = T(0.5) * f * f;
  if constexpr (sizeof(T) == 4) {
    const V tail = f * f * f * polynomial(f, S::log) + (n * S::ln2[1] + correction);
    return n * S::ln2[0] + (f + (tail - half_square));
  } else {
    const V s = f / (f + 2), z = s * s;
    const V tail =
        s * (half_square + z * polynomial(z, S::log)) + (n * S::ln2_short[1] + correction);
    return n * S::ln2_short[0] - ((half_square - tail) - f);
  }
}

// A logarithm of u where it is known for normal u alone.
template <class V>
FLASHODE_HD V log_anywhere(const V& u, const V& known) {
  using S = Series<real_of<V>>;
  const V outside = select(u == 0, -S::infinity, splat<V>(__builtin_nan("")));
  const V inside = select(u == S::infinity, u, known);
  return select(u > 0, inside, outside);
}

template <class V>
FLASHODE_HD V log_of(const V& x) {
  using T = real_of<V>;
  using S = Series<T>;
  constexpr int lift = S::mantissa + 2;
  const auto subnormal = x < S::least_normal;
  const V u = select(subnormal, x * T(int64_t(1) << lift), x);
  const V exponent = select(subnormal, -T(lift), zero<V>());
  return log_anywhere(x, log_within(u, zero<V>(), exponent));
}

template <class V>
FLASHODE_HD V log1p_of(const V& x) {
  const V u = 1 + x;
  const V rest = select(x > 1, 1 - (u - x), x - (u - 1));
  return select(x == 0, x, log_anywhere(u, log_within(u, rest, zero<V>())));
}

// One polynomial for all of a half turn; the cosine is that of the angle's distance to the nearest
// zero.
template <bool cosine, class V>
FLASHODE_HD V sine_of(const V& x) {
  using T = real_of<V>;
  using S = Series<T>;
  const V turns = cosine ? x * S::inverse_pi - T(0.5) : x * S::inverse_pi;
  const V shifted = turns + S::rounder;
  const V n = cosine ? shifted - S::rounder + T(0.5) : shifted - S::rounder;
  const V r = ((x - n * S::pi[0]) - n * S::pi[1]) - n * S::pi[2];
  const V z = r * r, s = r + r * z * polynomial(z, S::sin);
  const auto odd = (bits_of(shifted) + integer_of<T>(cosine)) << (8 * sizeof(T) - 1);
  const V turned = from_bits<V>(bits_of(s) ^ odd);
  return cosine ? turned : select(x == 0, x, turned);
}

template <class V>
FLASHODE_HD V atan_of(const V& x) {
  using S = Series<real_of<V>>;
  const V size = magnitude(x);
  const auto steep = size > 1;
  const V t = select(steep, -1 / size, size), z = t * t;
  const V p = t + t * z * polynomial(z, S::atan);
  const V from_quarter = S::pi[0] / 2 + (p + S::pi[1] / 2);
  return with_sign_of(x, select(steep, from_quarter, p));
}

template <class V>
FLASHODE_HD V erf_of(const V& x) {
  using S = Series<real_of<V>>;
  const V size = magnitude(x), a = select(size > S::flat_erf, S::flat_erf, size);
  const V near = size + size * polynomial(size * size, S::erf);
  const V far = 1 - exp_within(by_ln2(polynomial(a, S::log_erfc)));
  return with_sign_of(x, select(size < 1, near, far));
}

// |x|^y of doubles, to a unit of the last place though the exponent be large: log|x| is the sum of
// two doubles, 2 atanh(s) with s = f / (2 + f), whose first two terms are exact to twice their
// digits.
template <class V>
FLASHODE_HD V power_of_size(const V& size, const V& y) {
  using T = real_of<V>;
  using S = Series<T>;
  constexpr int lift = S::mantissa + 2;
  const auto subnormal = size < S::least_normal;
  const auto bits = bits_of(select(subnormal, size * T(int64_t(1) << lift), size)) - S::root_half;
  const V f = from_bits<V>((bits & S::fraction) + S::root_half) - 1;
  const V rounded =
      from_bits<V>((bits >> S::mantissa) + bits_of(splat<V>(S::rounder))) - S::rounder;
  const V n = select(subnormal, rounded - T(lift), rounded);

  const V d = f + 2, inverse = 1 / d, s = f * inverse;
  const V s_rest = ((f - s * d) - s * (f - (d - 2))) * inverse;
  const V z = s * s, z_rest = fused(s, s, -z) + 2 * s * s_rest;
  const V cube = s * z, cube_rest = fused(s, z, -cube) + (s * z_rest + s_rest * z);
  const V third = cube * S::two_thirds[0];
  const V third_rest = fused(cube, splat<V>(S::two_thirds[0]), -third) +
                       (cube * S::two_thirds[1] + cube_rest * S::two_thirds[0]);

  const V whole = n * S::ln2_short[0], a = whole + 2 * s, a_rest = 2 * s - (a - whole);
  const V b = a + third, b_rest = third - (b - a);
  const V rest = (a_rest + b_rest) + (n * S::ln2_short[1] + 2 * s_rest +
                                      (third_rest + cube * z * polynomial(z, S::atanh)));
  const V log = b + rest, log_rest = rest - (log - b);
  const V known =
      select((size < S::infinity) & (size > 0), log, select(size == 0, -S::infinity, size));

  const V p = y * known;
  const V p_rest =
      select(magnitude(p) < 2 * S::most_exp, fused(y, known, -p) + y * log_rest, zero<V>());
  Reduced<V> t = by_ln2(within(p, S::least_exp, S::most_exp));
  t.r = t.r + p_rest;
  return exp_within(t);
}
template <class V>
FLASHODE_HD V pow_of(const V& x, const V& y) {
  using T = real_of<V>;
  using S = Series<T>;
  const V size = magnitude(x), whole = trunc(y), halves = y * T(0.5);
  const auto odd = (whole == y) & (trunc(halves) != halves);
  const V power = select((size == 1) & (y == y), T(1), power_of_size(size, y));
  const V turned = from_bits<V>(bits_of(power) | (bits_of(x) & S::sign));
  const V real = select(odd, turned, power);
  const auto nowhere = (x < 0) & (size < S::infinity) & (whole != y);
  const V known = select(nowhere, T(__builtin_nan("")), real);
  return select((y == 0) | (x == 1), T(1), known);
}

// ---- of all lanes ------------------------------------------------------------------------------

// Where a fused multiply-add is not an instruction, the C library is faster, and exact enough.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__FP_FAST_FMA)
constexpr bool fuses = true;
#else
constexpr bool fuses = false;
#endif

// One vector of the machine after the other: what happens to each stays in registers.
template <int i = 0, class T, int L, class F>
FLASHODE_HD void each_part(const Vector<T, L>& x, Vector<T, L>& out, F function) {
  out.part[i] = function(Vector<T, Vector<T, L>::width>{{x.part[i]}}).part[0];
  if constexpr (i + 1 < Vector<T, L>::parts) each_part<i + 1>(x, out, function);
}

#define FLASHODE_PARTWISE(name)                                                           \
  template <class T, int L>                                                               \
  FLASHODE_HD Vector<T, L> name(const Vector<T, L>& v) {                                  \
    if constexpr (!fuses) return each_lane<Vector<T, L>>(v, [](T x) { return name(x); }); \
    Vector<T, L> out;                                                                     \
    each_part(v, out, [](const auto& x) { return name##_of(x); });                        \
    return out;                                                                           \
  }
FLASHODE_PARTWISE(exp)
FLASHODE_PARTWISE(expm1)
FLASHODE_PARTWISE(log)
FLASHODE_PARTWISE(log1p)
FLASHODE_PARTWISE(tanh)
FLASHODE_PARTWISE(atan)
FLASHODE_PARTWISE(erf)
#undef FLASHODE_PARTWISE

// Angles so large that pi in three pieces is not enough of it: out of line, as they are rare.
template <bool cosine, class V>
__attribute__((noinline, cold)) V sine_of_far(const V& v) {
  return each_lane<V>(v, [](real_of<V> x) { return cosine ? cos(x) : sin(x); });
}
template <bool cosine, class T, int L>
FLASHODE_HD Vector<T, L> sine(const Vector<T, L>& v) {
  if (!fuses || __builtin_expect(any(magnitude(v) > Series<T>::farthest), 0))
    return sine_of_far<cosine>(v);
  Vector<T, L> out;
  each_part(v, out, [](const auto& x) { return sine_of<cosine>(x); });
  return out;
}
template <class T, int L>
FLASHODE_HD Vector<T, L> sin(const Vector<T, L>& v) {
  return sine<false>(v);
}
template <class T, int L>
FLASHODE_HD Vector<T, L> cos(const Vector<T, L>& v) {
  return sine<true>(v);
}

#define FLASHODE_LANEWISE(name)                                     \
  template <class T, int L>                                         \
  FLASHODE_HD Vector<T, L> name(const Vector<T, L>& v) {            \
    return each_lane<Vector<T, L>>(v, [](T x) { return name(x); }); \
  }
FLASHODE_LANEWISE(tan)
FLASHODE_LANEWISE(sinh)
FLASHODE_LANEWISE(cosh)
FLASHODE_LANEWISE(asin)
FLASHODE_LANEWISE(acos)
FLASHODE_LANEWISE(asinh)
FLASHODE_LANEWISE(acosh)
FLASHODE_LANEWISE(atanh)
FLASHODE_LANEWISE(erfc)
#undef FLASHODE_LANEWISE

template <class T, int L>
FLASHODE_HD Vector<T, L> pow(const Vector<T, L>& x, const Vector<T, L>& y) {
  using Part = Vector<T, Vector<T, L>::width>;
  Vector<T, L> out;
  if constexpr (fuses) {
    for (int i = 0; i < out.parts; ++i)
      out.part[i] = pow_of(Part{{x.part[i]}}, Part{{y.part[i]}}).part[0];
  } else {
    for (int l = 0; l < L; ++l) set_lane(out, l, pow(lane(x, l), lane(y, l)));
  }
  return out;
}
// What control.h raises error ratios to: exponents are small, so that the rounding of the logarithm
// is not much, and the result costs half of what `pow` does.
template <class T, int L>
FLASHODE_HD Vector<T, L> power(const Vector<T, L>& x, double exponent) {
  return exp(T(exponent) * log(x));
}

#define FLASHODE_LANEWISE_2(name)                                                      \
  template <class T, int L>                                                            \
  FLASHODE_HD Vector<T, L> name(const Vector<T, L>& a, const Vector<T, L>& b) {        \
    Vector<T, L> out;                                                                  \
    for (int l = 0; l < L; ++l) set_lane(out, l, name(lane(a, l), lane(b, l)));        \
    return out;                                                                        \
  }
FLASHODE_LANEWISE_2(atan2)
FLASHODE_LANEWISE_2(fmod)  // exact, as no quotient that is rounded leads to it
FLASHODE_LANEWISE_2(hypot)
#undef FLASHODE_LANEWISE_2
#define FLASHODE_MIXED(name)                                        \
  template <class T, int L>                                         \
  FLASHODE_HD Vector<T, L> name(const Vector<T, L>& a, Same<T> b) { \
    return name(a, splat<Vector<T, L>>(b));                         \
  }                                                                 \
  template <class T, int L>                                         \
  FLASHODE_HD Vector<T, L> name(Same<T> a, const Vector<T, L>& b) { \
    return name(splat<Vector<T, L>>(a), b);                         \
  }
FLASHODE_MIXED(pow)
FLASHODE_MIXED(atan2)
FLASHODE_MIXED(fmod)
FLASHODE_MIXED(hypot)
#undef FLASHODE_MIXED

#endif  // __CUDACC__

// ---- of one number or of L
// ------------------------------------------------------------------------

template <class V>
FLASHODE_HD V sigmoid(const V& x) {
  return 1 / (1 + exp(-x));
}
// torch's softplus, with its threshold.
template <class V>
FLASHODE_HD V softplus(const V& x) {
  return select(x > 20, x, log1p(exp(x)));
}

}  // namespace flashode

// Arithmetic of one element, for host and device: every formula of a Runge-Kutta step, once.
//
// Nothing here may be contracted into fused multiply-adds (the build turns that off): the engines
// promise the same bits as the reference engine, on every processor.
#pragma once

#include "standard.h"

// Functions for host and device: HD is inlined everywhere, BOTH where a host's compiler likes to, and ASIDE
// not on a host, whose compiler takes too long over functions of many thousand lines. On a device all these are:
// an object whose address is taken does not live in registers. APART is inlined nowhere.
#ifdef __CUDACC__
#define FLASHODE_HD __host__ __device__ __forceinline__
#define FLASHODE_BOTH __host__ __device__ __forceinline__
#define FLASHODE_ASIDE __host__ __device__ __forceinline__
#define FLASHODE_APART __host__ __device__ __noinline__
#else
#define FLASHODE_HD inline __attribute__((always_inline))
#define FLASHODE_BOTH inline
#define FLASHODE_ASIDE __attribute__((noinline))
#define FLASHODE_APART __attribute__((noinline))
#endif

namespace flashode {

enum class Dtype { f32, f64, f16, bf16 };

// 16-bit floats are storage only; arithmetic on them is in float, rounded once at the end.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct Wide {
  using type = T;
};
template <>
struct Wide<Half> {
  using type = float;
};
template <>
struct Wide<BFloat16> {
  using type = float;
};
template <class T>
using wide_t = typename Wide<T>::type;

FLASHODE_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
FLASHODE_HD float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

FLASHODE_HD uint64_t bits_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
FLASHODE_HD double double_of(uint64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

FLASHODE_HD float widen(float x) { return x; }
FLASHODE_HD double widen(double x) { return x; }
FLASHODE_HD float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
FLASHODE_HD float widen(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // inf, nan
  // Scaling by 2^112 rebiases the exponent, and is exact for subnormals too.
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

template <class T>
FLASHODE_HD T narrow(wide_t<T> x);
template <>
FLASHODE_HD float narrow<float>(float x) {
  return x;
}
template <>
FLASHODE_HD double narrow<double>(double x) {
  return x;
}
template <>
FLASHODE_HD BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return BFloat16{0x7fc0};
  return BFloat16{uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};  // nearest, ties to even
}
template <>
FLASHODE_HD Half narrow<Half>(float x) {
  const uint32_t bits = bits_of(x);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return Half{uint16_t(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return Half{uint16_t(sign | 0x7c00u)};  // at or above 65520
  if (rest < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the result, rounded to nearest even, in the low bits.
    return Half{uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000u))};
  }
  return Half{uint16_t(sign | ((rest + 0xfffu + (rest >> 13 & 1)) - 0x38000000u) >> 13)};
}

// One term of y0 + sum_j coef_j k_j. The sum runs in the order of the stages; y0 is added last.
template <class A>
FLASHODE_HD A add_term(A total, A coef, A k) {
  return total + coef * k;
}

// What a comparison gives: bool, or as many answers as A has numbers.
template <class A>
using Mask = decltype(A() < A());

template <class A, class B>
FLASHODE_HD auto select(bool mask, const A& a, const B& b) -> decltype(true ? A() : B()) {
  return mask ? a : b;
}

// -0 becomes 0.
template <class A>
FLASHODE_HD A magnitude(A x) {
  return x > 0 ? x : 0 - x;
}

// error / (atol + rtol * max(|y0|, |y1|)); y1 - y1 makes it NaN wherever y1 is not finite.
template <class A>
FLASHODE_HD A scaled_error(A error, A y0, A y1, A rtol, A atol) {
  const A a = magnitude(y0), b = magnitude(y1);
  return error / (atol + rtol * select(a > b, a, b)) + (y1 - y1);
}

}  // namespace flashode

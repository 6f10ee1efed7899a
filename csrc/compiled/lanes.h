// Lanes<T, L>: L numbers worked on together, one of each of L samples. Lanes<T, 1> is T itself, so
// that a program for one system, or for one thread of a GPU, is the same source.
//
// Numbers lie in vectors as wide as the machine's, and loops over them unroll: what the compiler
// sees is straight code on registers. To take the roots and roundings of all lanes in one
// instruction it wants -fno-math-errno and -fno-trapping-math, which change no result. Programs are
// written inside the namespace, where these names hide the C library's.
#pragma once

#include <cstdint>

#include "../kernels/clock.h"
#include "../kernels/rk.h"

namespace flashode {

template <class T>
struct Itself {
  using type = T;
};
template <class T>
using Same = typename Itself<T>::type;  // of a parameter that is converted, and deduces nothing

// ---- one number --------------------------------------------------------------------------------

template <class V>
struct LaneTraits {
  using Real = V;
  static constexpr int count = 1;
};
template <class V>
using real_of = typename LaneTraits<V>::Real;
template <class V>
constexpr int lanes_of = LaneTraits<V>::count;

FLASHODE_HD uint64_t lanes_set(bool mask) { return mask; }  // a bit a lane, the first lowest
FLASHODE_HD bool any(bool mask) { return mask; }
FLASHODE_HD bool all(bool mask) { return mask; }
template <class V>
FLASHODE_HD bool mask_of(bool mask) {
  return mask;
}
template <class To, class T>
FLASHODE_HD To convert(const T& x) {
  return To(x);
}
template <class T>
FLASHODE_HD T lane(const T& x, int) {
  return x;
}
template <class T>
FLASHODE_HD void set_lane(T& x, int, Same<T> value) {
  x = value;
}
template <class T>
FLASHODE_HD T sum_of_lanes(const T& x) {
  return x;
}
template <class T>
FLASHODE_HD void store(T* to, const T& x) {
  *to = x;
}

FLASHODE_HD float floor(float x) { return std::floor(x); }
FLASHODE_HD double floor(double x) { return std::floor(x); }
FLASHODE_HD float ceil(float x) { return std::ceil(x); }
FLASHODE_HD double ceil(double x) { return std::ceil(x); }
FLASHODE_HD float trunc(float x) { return std::trunc(x); }
FLASHODE_HD double trunc(double x) { return std::trunc(x); }
FLASHODE_HD float round_even(float x) { return std::rint(x); }
FLASHODE_HD double round_even(double x) { return std::rint(x); }
FLASHODE_HD float square_root(float x) { return std::sqrt(x); }
FLASHODE_HD double square_root(double x) { return std::sqrt(x); }

// ---- L numbers ---------------------------------------------------------------------------------

#ifndef __CUDACC__

#if defined(__AVX512F__)
constexpr int machine_bytes = 64;
#elif defined(__AVX__)
constexpr int machine_bytes = 32;
#else
constexpr int machine_bytes = 16;
#endif

template <class T, int L>
struct Vector {
  static constexpr int fitting = machine_bytes / int(sizeof(T));
  static constexpr int width = (L & -L) < fitting ? (L & -L) : fitting;  // a power of two
  static constexpr int parts = L / width;
  typedef T Part __attribute__((vector_size(width * sizeof(T))));
  Part part[parts];
};

template <class T, int L>
struct LanesOf {
  using type = Vector<T, L>;
};
template <class T>
struct LanesOf<T, 1> {
  using type = T;
};
template <class T, int L>
using Lanes = typename LanesOf<T, L>::type;

// The integer as wide as a T; a mask is such integers, all bits of a lane alike.
template <int bytes>
struct IntegerOf {
  using type = int32_t;
};
template <>
struct IntegerOf<8> {
  using type = int64_t;
};
template <class T>
using integer_of = typename IntegerOf<sizeof(T)>::type;

template <class T, int L>
struct LaneTraits<Vector<T, L>> {
  using Real = T;
  static constexpr int count = L;
};

template <class V>
FLASHODE_HD V splat(real_of<V> x) {
  if constexpr (lanes_of<V> == 1) {
    return x;
  } else {
    V v;
    for (int i = 0; i < V::parts; ++i) v.part[i] = x - typename V::Part{};
    return v;
  }
}
template <class V>
FLASHODE_HD V zero() {
  return splat<V>(0);
}
template <class V>
FLASHODE_HD V load_unaligned(const real_of<V>* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}
template <class T, int L>
FLASHODE_HD void store(Same<T>* to, const Vector<T, L>& v) {
  memcpy(to, &v, sizeof v);
}
template <class T, int L>
FLASHODE_HD T lane(const Vector<T, L>& v, int l) {
  return v.part[l / v.width][l % v.width];
}
template <class T, int L>
FLASHODE_HD void set_lane(Vector<T, L>& v, int l, Same<T> x) {
  v.part[l / v.width][l % v.width] = x;
}

#define FLASHODE_OPERATOR(op)                                                          \
  template <class T, int L>                                                            \
  FLASHODE_HD Vector<T, L> operator op(const Vector<T, L>& a, const Vector<T, L>& b) { \
    Vector<T, L> out;                                                                  \
    for (int i = 0; i < out.parts; ++i) out.part[i] = a.part[i] op b.part[i];          \
    return out;                                                                        \
  }                                                                                    \
  template <class T, int L>                                                            \
  FLASHODE_HD Vector<T, L> operator op(const Vector<T, L>& a, Same<T> b) {             \
    return a op splat<Vector<T, L>>(b);                                                \
  }                                                                                    \
  template <class T, int L>                                                            \
  FLASHODE_HD Vector<T, L> operator op(Same<T> a, const Vector<T, L>& b) {             \
    return splat<Vector<T, L>>(a) op b;                                                \
  }                                                                                    \
  template <class T, int L, class B>                                                   \
  FLASHODE_HD Vector<T, L>& operator op## = (Vector<T, L> & a, const B& b) {           \
    return a = a op b;                                                                 \
  }
FLASHODE_OPERATOR(+)
FLASHODE_OPERATOR(-)
FLASHODE_OPERATOR(*)
FLASHODE_OPERATOR(/)
FLASHODE_OPERATOR(&)
FLASHODE_OPERATOR(|)
FLASHODE_OPERATOR(^)
#undef FLASHODE_OPERATOR

#define FLASHODE_COMPARISON(op)                                                                    \
  template <class T, int L>                                                                        \
  FLASHODE_HD Vector<integer_of<T>, L> operator op(const Vector<T, L>& a, const Vector<T, L>& b) { \
    using Out = Vector<integer_of<T>, L>;                                                          \
    Out out;                                                                                       \
    for (int i = 0; i < out.parts; ++i) out.part[i] = typename Out::Part(a.part[i] op b.part[i]);  \
    return out;                                                                                    \
  }                                                                                                \
  template <class T, int L>                                                                        \
  FLASHODE_HD Vector<integer_of<T>, L> operator op(const Vector<T, L>& a, Same<T> b) {             \
    return a op splat<Vector<T, L>>(b);                                                            \
  }                                                                                                \
  template <class T, int L>                                                                        \
  FLASHODE_HD Vector<integer_of<T>, L> operator op(Same<T> a, const Vector<T, L>& b) {             \
    return splat<Vector<T, L>>(a) op b;                                                            \
  }
FLASHODE_COMPARISON(<)
FLASHODE_COMPARISON(<=)
FLASHODE_COMPARISON(>)
FLASHODE_COMPARISON(>=)
FLASHODE_COMPARISON(==)
FLASHODE_COMPARISON(!=)
#undef FLASHODE_COMPARISON

template <class T, int L>
FLASHODE_HD Vector<T, L> operator-(const Vector<T, L>& a) {
  Vector<T, L> out;
  for (int i = 0; i < out.parts; ++i) out.part[i] = -a.part[i];
  return out;
}
template <class T, int L>  // of a mask
FLASHODE_HD Vector<T, L> operator!(const Vector<T, L>& mask) {
  Vector<T, L> out;
  for (int i = 0; i < out.parts; ++i) out.part[i] = ~mask.part[i];
  return out;
}

template <class T, int L>
FLASHODE_HD Vector<T, L> select(const Vector<integer_of<Same<T>>, L>& mask, const Vector<T, L>& a,
                                const Vector<T, L>& b) {
  Vector<T, L> out;
  for (int i = 0; i < out.parts; ++i) out.part[i] = mask.part[i] ? a.part[i] : b.part[i];
  return out;
}
template <class T, int L>
FLASHODE_HD Vector<T, L> select(const Vector<integer_of<Same<T>>, L>& mask, Same<T> a,
                                const Vector<T, L>& b) {
  return select(mask, splat<Vector<T, L>>(a), b);
}
template <class T, int L>
FLASHODE_HD Vector<T, L> select(const Vector<integer_of<Same<T>>, L>& mask, const Vector<T, L>& a,
                                Same<T> b) {
  return select(mask, a, splat<Vector<T, L>>(b));
}

// The sign bits of a part of a mask, which the machine takes in one instruction.
template <class Part>
FLASHODE_HD uint64_t sign_bits(const Part& part) {
  constexpr int width = sizeof(part) / sizeof(part[0]);
#ifdef __AVX512DQ__
  typedef int Ints __attribute__((vector_size(64)));
  typedef long long Longs __attribute__((vector_size(64)));
  if constexpr (sizeof(part) == 64) {
    if constexpr (width == 16) return uint16_t(__builtin_ia32_cvtd2mask512(Ints(part)));
    if constexpr (width == 8) return uint8_t(__builtin_ia32_cvtq2mask512(Longs(part)));
  }
#endif
#ifdef __AVX__
  typedef float Floats __attribute__((vector_size(32)));
  typedef double Doubles __attribute__((vector_size(32)));
  if constexpr (sizeof(part) == 32) {
    if constexpr (width == 8) return uint64_t(__builtin_ia32_movmskps256(Floats(part)));
    if constexpr (width == 4) return uint64_t(__builtin_ia32_movmskpd256(Doubles(part)));
  }
#endif
  uint64_t bits = 0;
  for (int l = 0; l < width; ++l) bits |= uint64_t(part[l] & 1) << l;
  return bits;
}
template <class T, int L>
FLASHODE_HD uint64_t lanes_set(const Vector<T, L>& mask) {
  static_assert(L <= 64, "the bits of a mask are those of one word");
  uint64_t bits = 0;
  for (int i = 0; i < mask.parts; ++i) bits |= sign_bits(mask.part[i]) << (i * mask.width);
  return bits;
}
template <class T, int L>
FLASHODE_HD bool any(const Vector<T, L>& mask) {
  auto joined = mask.part[0];
  for (int i = 1; i < mask.parts; ++i) joined |= mask.part[i];
  return sign_bits(joined) != 0;
}
template <class T, int L>
FLASHODE_HD bool all(const Vector<T, L>& mask) {
  return !any(!mask);
}

// In halves, so that the order does not depend on the machine.
template <class T, int L>
FLASHODE_HD T sum_of_lanes(const Vector<T, L>& v) {
  T x[L];
  store(x, v);
  if constexpr (L % 2 == 0) {
    for (int l = 0; l < L / 2; ++l) x[l] += x[l + L / 2];
    return sum_of_lanes(load_unaligned<Lanes<T, L / 2>>(x));
  } else {
    for (int l = 1; l < L; ++l) x[0] += x[l];
    return x[0];
  }
}

// A function of one number, of every lane. Where the machine has it for vectors, or it is plain
// arithmetic without branches, the compiler makes vectors of it.
template <class To, class T, int L, class F>
FLASHODE_HD To each_lane(const Vector<T, L>& v, F function) {
  T from[L];
  real_of<To> to[L];
  store(from, v);
  for (int l = 0; l < L; ++l) to[l] = function(from[l]);
  return load_unaligned<To>(to);
}

template <class To, class T, int L>
FLASHODE_HD To convert(const Vector<T, L>& v) {
  To out = each_lane<To>(v, [](T x) { return real_of<To>(x); });
  // GCC 12 takes vectors of a few doubles to float and back for no change at all.
  if constexpr (sizeof(real_of<To>) < sizeof(T) && L <= 8) __asm__("" : "+m"(out));
  return out;
}
template <class V, class T, int L>  // a mask of other reals as one of V's: -1 stays -1
FLASHODE_HD Mask<V> mask_of(const Vector<T, L>& mask) {
  return convert<Mask<V>>(mask);
}

#define FLASHODE_LANEWISE(name)                                     \
  template <class T, int L>                                         \
  FLASHODE_HD Vector<T, L> name(const Vector<T, L>& v) {            \
    return each_lane<Vector<T, L>>(v, [](T x) { return name(x); }); \
  }
FLASHODE_LANEWISE(floor)
FLASHODE_LANEWISE(ceil)
FLASHODE_LANEWISE(trunc)
FLASHODE_LANEWISE(round_even)
FLASHODE_LANEWISE(square_root)
#undef FLASHODE_LANEWISE

template <class T, int L>
FLASHODE_HD Vector<T, L> magnitude(const Vector<T, L>& v) {
  return each_lane<Vector<T, L>>(v, [](T x) { return T(std::fabs(x)); });
}

// Times as the field sees them, in the type of the state T (clock.h).
template <class T, int L>
FLASHODE_HD Vector<double, L> round_time(const Vector<double, L>& v, int nudge) {
  return each_lane<Vector<double, L>>(convert<Lanes<T, L>>(v),
                                      [=](T x) { return nudged(x, nudge); });
}

#else

template <class T, int L>
struct LanesOf;
template <class T>
struct LanesOf<T, 1> {
  using type = T;
};
template <class T, int L>
using Lanes = typename LanesOf<T, L>::type;

template <class V>
FLASHODE_HD V splat(V x) {
  return x;
}
template <class V>
FLASHODE_HD V zero() {
  return V(0);
}
template <class V>
FLASHODE_HD V load_unaligned(const V* from) {
  return *from;
}

#endif  // __CUDACC__

// ---- one number or L ---------------------------------------------------------------------------

template <class V>
FLASHODE_HD Mask<V> is_nan(const V& x) {
  return x != x;
}
// As torch has them: a NaN in either is kept.
template <class V>
FLASHODE_HD V maximum(const V& a, const V& b) {
  return select((a > b) | (a != a), a, b);
}
template <class V>
FLASHODE_HD V minimum(const V& a, const V& b) {
  return select((a < b) | (a != a), a, b);
}
template <class V>
FLASHODE_HD V sign(const V& x) {
  return select(x > 0, splat<V>(1), select(x < 0, splat<V>(-1), zero<V>()));
}

}  // namespace flashode

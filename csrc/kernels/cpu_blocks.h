// Loops over blocks that stay in the first-level cache: what the CPU sources share.
#pragma once

#include <algorithm>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "launch.h"

// One build serves every x86-64: the loader picks the widest vectors. Results do not differ,
// since nothing is contracted and no sum is reassociated beyond the fixed lanes below.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FLASHODE_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FLASHODE_CLONES
#endif
#define FLASHODE_INLINE inline __attribute__((always_inline))

namespace flashode::cpu {
namespace {

constexpr int64_t kBlock = 1024;        // elements that one call works on, and one partial sum covers
constexpr int64_t kTile = 128;          // elements between two passes: longer ones starve the prefetcher
constexpr int64_t kParallel = 1 << 15;  // terms * elements below which threads cost more
constexpr int64_t kStream = 1 << 24;    // bytes of a result from which it bypasses the caches
constexpr int kLanes = 16;              // partial sums of a norm, fixed

// Coefficients of a sum over slopes: the same for all elements, or a weight times a step that every
// element has of its own. `group` takes up to four of them into registers.
template <class A>
struct Group {
  A c[4];
  FLASHODE_INLINE A operator()(int j, int64_t) const { return c[j]; }
};
struct Uniform {
  const double* coef;
  template <class A, int G>
  FLASHODE_INLINE Group<A> group(int first, int64_t) const {
    const double* c = coef + first;
    return {{A(c[0]), A(G > 1 ? c[1] : 0), A(G > 2 ? c[2] : 0), A(G > 3 ? c[3] : 0)}};
  }
};

template <class A>
struct SteppedGroup {
  double w[4];
  const double* step;
  FLASHODE_INLINE A operator()(int j, int64_t i) const { return A(w[j] * step[i]); }
};
struct Stepped {
  const double* weight;
  const double* step;
  template <class A, int G>
  FLASHODE_INLINE SteppedGroup<A> group(int first, int64_t begin) const {
    const double* w = weight + first;
    return {{w[0], G > 1 ? w[1] : 0, G > 2 ? w[2] : 0, G > 3 ? w[3] : 0}, step + begin};
  }
};

// total[i] = sum of G terms, added to what is there unless this is the first group.
template <class T, int G, bool First, class Source>
FLASHODE_INLINE void add_group(wide_t<T>* __restrict total, const void* const* k,
                               const Source& source, int first, int64_t begin, int64_t n) {
  using A = wide_t<T>;
  k += first;
  const T* __restrict k0 = static_cast<const T*>(k[0]) + begin;
  const T* __restrict k1 = static_cast<const T*>(k[G > 1 ? 1 : 0]) + begin;
  const T* __restrict k2 = static_cast<const T*>(k[G > 2 ? 2 : 0]) + begin;
  const T* __restrict k3 = static_cast<const T*>(k[G > 3 ? 3 : 0]) + begin;
  const auto coef = source.template group<A, G>(first, begin);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    A sum = First ? coef(0, i) * widen(k0[i]) : add_term(total[i], coef(0, i), A(widen(k0[i])));
    if (G > 1) sum = add_term(sum, coef(1, i), A(widen(k1[i])));
    if (G > 2) sum = add_term(sum, coef(2, i), A(widen(k2[i])));
    if (G > 3) sum = add_term(sum, coef(3, i), A(widen(k3[i])));
    total[i] = sum;
  }
}

template <class T, bool First, class Source>
FLASHODE_INLINE void add_up_to_four(wide_t<T>* total, const void* const* k, const Source& source,
                                    int first, int count, int64_t begin, int64_t n) {
  switch (count - first) {
    case 1: return add_group<T, 1, First>(total, k, source, first, begin, n);
    case 2: return add_group<T, 2, First>(total, k, source, first, begin, n);
    case 3: return add_group<T, 3, First>(total, k, source, first, begin, n);
    default: return add_group<T, 4, First>(total, k, source, first, begin, n);
  }
}

// total = sum_j coef_j k_j over one block, in the order of the terms.
template <class T, class Source>
FLASHODE_INLINE void weighted_sum(wide_t<T>* total, const Terms& terms, const Source& source,
                                  int64_t begin, int64_t n) {
  if (terms.count == 0) {
    std::fill_n(total, n, wide_t<T>(0));
    return;
  }
  add_up_to_four<T, true>(total, terms.k, source, 0, terms.count, begin, n);
  for (int j = 4; j < terms.count; j += 4) {
    add_up_to_four<T, false>(total, terms.k, source, j, terms.count, begin, n);
  }
}

// Copies past the caches: a result far larger than them is not read before it is evicted, and a
// plain store would first read the line it overwrites.
FLASHODE_INLINE void stream_out(void* out, const void* block, int64_t bytes) {
#ifdef __SSE2__
  if (reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    auto* to = static_cast<__m128i*>(out);
    const auto* from = static_cast<const __m128i*>(block);
    for (; bytes >= 16; bytes -= 16) _mm_stream_si128(to++, _mm_load_si128(from++));
    out = to, block = from;
  }
#endif
  memcpy(out, block, bytes);
}

template <class T, class Source>
FLASHODE_INLINE bool combine_block(const T* y0, const Terms& terms, const Source& coef, T* out,
                                   int64_t begin, int64_t n, bool stream) {
  using A = wide_t<T>;
  alignas(64) A total[kTile];
  alignas(64) T tile[kTile];
  static const T nothing[kTile] = {};
  A zero = 0;
  for (const int64_t end = begin + n; begin < end; begin += kTile) {
    const int64_t m = std::min(kTile, end - begin);
    weighted_sum<T>(total, terms, coef, begin, m);
    const T* y = y0 ? y0 + begin : nothing;
    T* result = stream ? tile : out + begin;
    // x - x is 0 for finite x and NaN otherwise; NaN survives the sum.
#pragma omp simd reduction(+ : zero)
    for (int64_t i = 0; i < m; ++i) {
      const T rounded = narrow<T>(widen(y[i]) + total[i]);
      result[i] = rounded;
      zero += widen(rounded) - widen(rounded);
    }
    if (stream) stream_out(out + begin, tile, m * int64_t(sizeof(T)));
  }
  return zero == 0;
}

template <class T, class Source>
FLASHODE_INLINE void scaled_error_block(const T* y0, const T* y1, const Terms& terms,
                                        const Source& coef, const Tolerance& tol, wide_t<T>* out,
                                        int64_t begin, int64_t n) {
  using A = wide_t<T>;
  weighted_sum<T>(out, terms, coef, begin, n);
  const T* __restrict a = y0 + begin;
  const T* __restrict b = y1 + begin;
  const A rtol = A(tol.rtol), atol = A(tol.atol);
  if (!tol.each_rtol && !tol.each_atol) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      out[i] = flashode::scaled_error<A>(out[i], widen(a[i]), widen(b[i]), rtol, atol);
    }
    return;
  }
  const A* each_rtol = static_cast<const A*>(tol.each_rtol);
  const A* each_atol = static_cast<const A*>(tol.each_atol);
  for (int64_t i = 0; i < n; ++i) {
    out[i] = flashode::scaled_error<A>(out[i], widen(a[i]), widen(b[i]),
                             each_rtol ? each_rtol[begin + i] : rtol,
                             each_atol ? each_atol[begin + i] : atol);
  }
}

// <a, b> in double, in fixed lanes.
template <class T>
FLASHODE_INLINE double dot(const T* a, const T* b, int64_t n) {
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) lane[l] += double(widen(a[i + l])) * double(widen(b[i + l]));
  }
  double sum = 0;
  for (; i < n; ++i) sum += double(widen(a[i])) * double(widen(b[i]));
  for (int l = 0; l < kLanes; ++l) sum += lane[l];
  return sum;
}

template <class T, class Source>
FLASHODE_INLINE double sum_of_squares(const T* y0, const T* y1, const Terms& terms,
                                      const Source& coef, const Tolerance& tol, int64_t begin,
                                      int64_t n) {
  alignas(64) wide_t<T> scaled[kBlock];
  for (int64_t i = 0; i < n; i += kTile) {
    scaled_error_block<T>(y0, y1, terms, coef, tol, scaled + i, begin + i, std::min(kTile, n - i));
  }
  return dot(scaled, scaled, n);
}

#define FLASHODE_CALL(function, dtype, ...)                   \
  [&] {                                                       \
    switch (dtype) {                                          \
      case Dtype::f32: return function##_f32(__VA_ARGS__);    \
      case Dtype::f64: return function##_f64(__VA_ARGS__);    \
      case Dtype::f16: return function##_f16(__VA_ARGS__);    \
      default: return function##_bf16(__VA_ARGS__);           \
    }                                                         \
  }()

}  // namespace
}  // namespace flashode::cpu

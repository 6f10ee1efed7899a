// The fused operations on a CPU: loops over blocks that stay in the first-level cache.

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

// total[i] = sum of G terms, added to what is there unless this is the first group.
template <class T, int G, bool First>
FLASHODE_INLINE void add_group(wide_t<T>* __restrict total, const void* const* k,
                               const double* coef, int64_t begin, int64_t n) {
  using A = wide_t<T>;
  const T* __restrict k0 = static_cast<const T*>(k[0]) + begin;
  const T* __restrict k1 = static_cast<const T*>(k[G > 1 ? 1 : 0]) + begin;
  const T* __restrict k2 = static_cast<const T*>(k[G > 2 ? 2 : 0]) + begin;
  const T* __restrict k3 = static_cast<const T*>(k[G > 3 ? 3 : 0]) + begin;
  const A c0 = A(coef[0]), c1 = A(G > 1 ? coef[1] : 0), c2 = A(G > 2 ? coef[2] : 0),
          c3 = A(G > 3 ? coef[3] : 0);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    A sum = First ? c0 * widen(k0[i]) : add_term(total[i], c0, A(widen(k0[i])));
    if (G > 1) sum = add_term(sum, c1, A(widen(k1[i])));
    if (G > 2) sum = add_term(sum, c2, A(widen(k2[i])));
    if (G > 3) sum = add_term(sum, c3, A(widen(k3[i])));
    total[i] = sum;
  }
}

template <class T, bool First>
FLASHODE_INLINE void add_up_to_four(wide_t<T>* total, const void* const* k, const double* coef,
                                    int count, int64_t begin, int64_t n) {
  switch (count) {
    case 1: return add_group<T, 1, First>(total, k, coef, begin, n);
    case 2: return add_group<T, 2, First>(total, k, coef, begin, n);
    case 3: return add_group<T, 3, First>(total, k, coef, begin, n);
    default: return add_group<T, 4, First>(total, k, coef, begin, n);
  }
}

// total = sum_j coef_j k_j over one block, in the order of the terms.
template <class T>
FLASHODE_INLINE void weighted_sum(wide_t<T>* total, const Terms& terms, const double* coef,
                                  int64_t begin, int64_t n) {
  if (terms.count == 0) {
    std::fill_n(total, n, wide_t<T>(0));
    return;
  }
  add_up_to_four<T, true>(total, terms.k, coef, terms.count, begin, n);
  for (int j = 4; j < terms.count; j += 4) {
    add_up_to_four<T, false>(total, terms.k + j, coef + j, terms.count - j, begin, n);
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

template <class T>
FLASHODE_INLINE bool combine_block(const T* y0, const Terms& terms, const double* coef, T* out,
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

template <class T>
FLASHODE_INLINE void scaled_error_block(const T* y0, const T* y1, const Terms& terms,
                                        const double* coef, const Tolerance& tol, wide_t<T>* out,
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

template <class T>
FLASHODE_INLINE double sum_of_squares(const T* y0, const T* y1, const Terms& terms,
                                      const double* coef, const Tolerance& tol, int64_t begin,
                                      int64_t n) {
  alignas(64) wide_t<T> scaled[kBlock];
  for (int64_t i = 0; i < n; i += kTile) {
    scaled_error_block<T>(y0, y1, terms, coef, tol, scaled + i, begin + i, std::min(kTile, n - i));
  }
  return dot(scaled, scaled, n);
}

// total = base + w * slope over one block; total may be base.
template <class T>
FLASHODE_INLINE void add_scaled(T* total, const T* base, wide_t<T> w, const T* slope, int64_t n) {
  using A = wide_t<T>;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    total[i] = narrow<T>(add_term(A(widen(base[i])), w, A(widen(slope[i]))));
  }
}

template <class T>
FLASHODE_INLINE void accumulate_block(const Segment& segment, double w_value, double w_error,
                                      bool first, int64_t begin, int64_t n) {
  using A = wide_t<T>;
  static const T zeros[kBlock] = {};
  const T* slope = segment.slope ? static_cast<const T*>(segment.slope) + begin : zeros;
  add_scaled<T>(static_cast<T*>(segment.value) + begin, static_cast<const T*>(segment.base) + begin,
                A(w_value), slope, n);
  if (segment.error == nullptr) return;
  T* error = static_cast<T*>(segment.error) + begin;  // the slope is in the cache now
  add_scaled<T>(error, first ? zeros : error, A(w_error), slope, n);
}

// One clone of each entry per instruction set; the bodies above are inlined into them.
#define FLASHODE_FOR_DTYPE(T, name)                                                              \
  FLASHODE_CLONES bool combine_##name(int64_t begin, int64_t n, const void* y0,                  \
                                      const Terms& terms, const double* coef, void* out,         \
                                      bool stream) {                                             \
    return combine_block<T>(static_cast<const T*>(y0), terms, coef, static_cast<T*>(out), begin, \
                            n, stream);                                                          \
  }                                                                                              \
  FLASHODE_CLONES void scaled_error_##name(int64_t begin, int64_t n, const void* y0,             \
                                           const void* y1, const Terms& terms,                   \
                                           const double* coef, const Tolerance& tol,             \
                                           void* out) {                                          \
    scaled_error_block<T>(static_cast<const T*>(y0), static_cast<const T*>(y1), terms, coef,     \
                          tol, static_cast<wide_t<T>*>(out) + begin, begin, n);                  \
  }                                                                                              \
  FLASHODE_CLONES double sum_of_squares_##name(int64_t begin, int64_t n, const void* y0,         \
                                               const void* y1, const Terms& terms,               \
                                               const double* coef, const Tolerance& tol) {       \
    return sum_of_squares<T>(static_cast<const T*>(y0), static_cast<const T*>(y1), terms, coef,  \
                             tol, begin, n);                                                     \
  }                                                                                              \
  FLASHODE_CLONES double dot_##name(int64_t begin, int64_t n, const void* a, const void* b) {      \
    return dot(static_cast<const T*>(a) + begin, static_cast<const T*>(b) + begin, n);           \
  }                                                                                              \
  FLASHODE_CLONES void accumulate_##name(int64_t begin, int64_t n, const Segment& segment,       \
                                         double w_value, double w_error, bool first) {           \
    accumulate_block<T>(segment, w_value, w_error, first, begin, n);                             \
  }

FLASHODE_FOR_DTYPE(float, f32)
FLASHODE_FOR_DTYPE(double, f64)
FLASHODE_FOR_DTYPE(Half, f16)
FLASHODE_FOR_DTYPE(BFloat16, bf16)

#define FLASHODE_CALL(function, dtype, ...)                   \
  [&] {                                                       \
    switch (dtype) {                                          \
      case Dtype::f32: return function##_f32(__VA_ARGS__);    \
      case Dtype::f64: return function##_f64(__VA_ARGS__);    \
      case Dtype::f16: return function##_f16(__VA_ARGS__);    \
      default: return function##_bf16(__VA_ARGS__);           \
    }                                                         \
  }()

int64_t size_of(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

template <class Body>
void for_each_block(int64_t n, int64_t work, int threads, const Body& body) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  const auto run = [&](int64_t block) {
    body(block * kBlock, std::min(kBlock, n - block * kBlock));
  };
  if (threads == 1 || work <= kParallel) {  // even an idle parallel region costs 0.3 us
    for (int64_t block = 0; block < blocks; ++block) run(block);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) run(block);
}

}  // namespace

bool combine(Dtype dtype, int64_t n, const void* y0, const Terms& terms, const double* coef,
             int64_t rows, void* out, int threads) {
  bool finite = true;
  const bool stream = n * size_of(dtype) >= kStream;
  for_each_block(n, n * (terms.count + 1) * rows, threads, [&](int64_t begin, int64_t length) {
    bool ok = true;
    for (int64_t row = 0; row < rows; ++row) {
      void* target = static_cast<char*>(out) + row * n * size_of(dtype);
      const double* weights = coef + row * terms.count;
      ok &= FLASHODE_CALL(combine, dtype, begin, length, y0, terms, weights, target, stream);
    }
    if (!ok) {
#pragma omp atomic write
      finite = false;
    }
  });
  return finite;
}

void scaled_error(Dtype dtype, int64_t n, const void* y0, const void* y1, const Terms& terms,
                  const double* coef, const Tolerance& tol, void* out, int threads) {
  for_each_block(n, n * (terms.count + 2), threads, [&](int64_t begin, int64_t length) {
    FLASHODE_CALL(scaled_error, dtype, begin, length, y0, y1, terms, coef, tol, out);
  });
}

double error_norm(Dtype dtype, const void* y0, const void* y1, const Terms& terms,
                  const double* coef, const Tolerance& tol, const Members& members, int threads) {
  double largest = 0;
  for (int64_t m = 0; m < members.count; ++m) {
    const int64_t first = members.offsets[m], n = members.offsets[m + 1] - first;
    if (n == 0) continue;
    double sum = 0;
    if (n <= kBlock) {
      sum = FLASHODE_CALL(sum_of_squares, dtype, first, n, y0, y1, terms, coef, tol);
    } else {
      std::vector<double> partial((n + kBlock - 1) / kBlock);
      for_each_block(n, n * (terms.count + 2), threads, [&](int64_t begin, int64_t length) {
        partial[begin / kBlock] = FLASHODE_CALL(sum_of_squares, dtype, first + begin, length, y0,
                                                y1, terms, coef, tol);
      });
      for (const double p : partial) sum += p;
    }
    largest = larger(largest, std::sqrt(sum / double(n)));
  }
  return largest;
}

void inner(Dtype dtype, int64_t n, const void* g, int64_t rows, const Terms& terms, double* out,
           int threads) {
  const int64_t pairs = rows * terms.count;
  std::vector<double> partial((n + kBlock - 1) / kBlock * pairs);
  for_each_block(n, n * pairs, threads, [&](int64_t begin, int64_t length) {
    double* of_block = partial.data() + begin / kBlock * pairs;
    for (int64_t row = 0; row < rows; ++row) {
      const void* g_row = static_cast<const char*>(g) + row * n * size_of(dtype);
      for (int j = 0; j < terms.count; ++j) {
        *of_block++ = FLASHODE_CALL(dot, dtype, begin, length, g_row, terms.k[j]);
      }
    }
  });
  std::fill_n(out, pairs, 0.0);
  for (size_t i = 0; i < partial.size(); ++i) out[i % pairs] += partial[i];
}

void accumulate(Dtype dtype, const Segment* segments, int64_t count, double w_value, double w_error,
                bool first, int threads) {
  for (const Segment* segment = segments; segment != segments + count; ++segment) {
    for_each_block(segment->n, 3 * segment->n, threads, [&](int64_t begin, int64_t length) {
      FLASHODE_CALL(accumulate, dtype, begin, length, *segment, w_value, w_error, first);
    });
  }
}

double error_norm(Dtype dtype, const Segment* segments, int64_t count, double rtol, double atol,
                  int threads) {
  const double one = 1;
  double largest = 0;
  for (const Segment* segment = segments; segment != segments + count; ++segment) {
    const int64_t offsets[] = {0, segment->n};
    largest = larger(largest, error_norm(dtype, segment->base, segment->value, {1, {segment->error}},
                                         &one, {rtol, atol}, {1, offsets}, threads));
  }
  return largest;
}

}  // namespace flashode::cpu

// The fused operations on a CPU.

#include "cpu_blocks.h"

namespace flashode::cpu {
namespace {

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
    return combine_block<T>(static_cast<const T*>(y0), terms, Uniform{coef},                     \
                            static_cast<T*>(out), begin, n, stream);                                                          \
  }                                                                                              \
  FLASHODE_CLONES void scaled_error_##name(int64_t begin, int64_t n, const void* y0,             \
                                           const void* y1, const Terms& terms,                   \
                                           const double* coef, const Tolerance& tol,             \
                                           void* out) {                                          \
    scaled_error_block<T>(static_cast<const T*>(y0), static_cast<const T*>(y1), terms,           \
                          Uniform{coef}, tol, static_cast<wide_t<T>*>(out) + begin, begin, n);                  \
  }                                                                                              \
  FLASHODE_CLONES double sum_of_squares_##name(int64_t begin, int64_t n, const void* y0,         \
                                               const void* y1, const Terms& terms,               \
                                               const double* coef, const Tolerance& tol) {       \
    return sum_of_squares<T>(static_cast<const T*>(y0), static_cast<const T*>(y1), terms,        \
                             Uniform{coef}, tol, begin, n);                                                     \
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

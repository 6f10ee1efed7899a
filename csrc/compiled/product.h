// Products of a matrix that all samples share with the vectors of L samples at once.
//
// Sums stay in registers: a block of rows at a time, as many as the machine has room for, each
// number of the matrix broadcast to all lanes. The order of every sum is fixed by its shape alone.
#pragma once

#include "lanes.h"

namespace flashode {

#ifndef __CUDACC__

// Sums stay in registers only if no loop over them is left when the compiler looks at their arrays.
#define FLASHODE_UNROLL _Pragma("GCC unroll 32")

// How M rows are done: `rows` at a time, the last few apart. `chains` sums side by side for each
// number hide the latency of their additions.
template <int M, class V>
struct Blocking {
  static constexpr int registers = machine_bytes == 64 ? 32 : 16;
  static constexpr int room = registers * 3 / 4 / V::parts, most = room > 1 ? room : 1;
  static constexpr int blocks = (M + most - 1) / most;
  static constexpr int rows = (M + blocks - 1) / blocks, last = M - (blocks - 1) * rows;
  static constexpr int busy = rows * V::parts, chains = busy < 8 ? (8 + busy - 1) / busy : 1;
};

// sum[r] = sum_k w[r * row_stride + k * column_stride] * x[k], of a few rows.
template <int K, int chains, int rows, class V>
FLASHODE_HD void product_block(const real_of<V>* w, int64_t row_stride, int64_t column_stride,
                               const V* x, V (&sum)[rows]) {
  V part[chains][rows];
  FLASHODE_UNROLL
  for (int c = 0; c < chains; ++c) {
    FLASHODE_UNROLL
    for (int r = 0; r < rows; ++r) part[c][r] = zero<V>();
  }
  for (int k = 0; k + chains <= K; k += chains) {
    FLASHODE_UNROLL
    for (int c = 0; c < chains; ++c) {
      FLASHODE_UNROLL
      for (int r = 0; r < rows; ++r) {
        part[c][r] = part[c][r] + w[r * row_stride + (k + c) * column_stride] * x[k + c];
      }
    }
  }
  for (int k = K - K % chains; k < K; ++k) {
    FLASHODE_UNROLL
    for (int r = 0; r < rows; ++r) {
      part[0][r] = part[0][r] + w[r * row_stride + k * column_stride] * x[k];
    }
  }
  FLASHODE_UNROLL
  for (int r = 0; r < rows; ++r) {
    sum[r] = part[0][r];
    FLASHODE_UNROLL
    for (int c = 1; c < chains; ++c) sum[r] = sum[r] + part[c][r];
  }
}

// All M rows; each sum goes to take(m, sum).
template <int M, int K, class V, class Take>
FLASHODE_HD void product_rows(const real_of<V>* w, int64_t row_stride, int64_t column_stride,
                              const V* x, Take take) {
  using B = Blocking<M, V>;
  for (int m = 0; m + B::last < M; m += B::rows) {
    V sum[B::rows];
    product_block<K, B::chains>(w + m * row_stride, row_stride, column_stride, x, sum);
    FLASHODE_UNROLL
    for (int r = 0; r < B::rows; ++r) take(m + r, sum[r]);
  }
  V sum[B::last];
  product_block<K, B::chains>(w + (M - B::last) * row_stride, row_stride, column_stride, x, sum);
  FLASHODE_UNROLL
  for (int r = 0; r < B::last; ++r) take(M - B::last + r, sum[r]);
}

// The lanes that `index` names, of a and b side by side.
template <class Part, class Index>
FLASHODE_HD Part pick(const Part& a, const Part& b, const Index& index) {
#ifdef __clang__
  constexpr int W = sizeof(Part) / sizeof(a[0]);
  Part out;
  for (int l = 0; l < W; ++l) out[l] = index[l] < W ? a[index[l]] : b[index[l] - W];
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Swaps the two bits of weight `step` of all places in a square: those of rows, and those of lanes.
template <int step, class Part, int W>
FLASHODE_HD void transpose_steps(Part (&square)[W]) {
  typedef integer_of<decltype(+square[0][0])> Index __attribute__((vector_size(sizeof(Part))));
  if constexpr (step < W) {
    Index low{}, high{};
    FLASHODE_UNROLL
    for (int l = 0; l < W; ++l) {
      low[l] = l & step ? W + l - step : l;
      high[l] = l & step ? W + l : l + step;
    }
    FLASHODE_UNROLL
    for (int c = 0; c < W; ++c) {
      if (c & step) continue;
      const Part a = square[c], b = square[c + step];
      square[c] = pick(a, b, low);
      square[c + step] = pick(a, b, high);
    }
    transpose_steps<2 * step>(square);
  }
}

// Adds the halves of runs of `length` lanes, of two vectors at a time; half as many are left.
template <int length, int count, class Part>
FLASHODE_HD void fold(Part* x) {
  typedef integer_of<decltype(+x[0][0])> Index __attribute__((vector_size(sizeof(Part))));
  if constexpr (length > 1) {
    constexpr int half = length / 2;
    Index low{}, high{};
    FLASHODE_UNROLL
    for (int l = 0; l < int(sizeof(Part) / sizeof(x[0][0])); ++l) {
      low[l] = l / half * length + l % half;
      high[l] = low[l] + half;
    }
    FLASHODE_UNROLL
    for (int c = 0; c < count / 2; ++c) {
      const Part a = x[2 * c], b = x[2 * c + 1];
      x[c] = pick(a, b, low) + pick(a, b, high);
    }
    fold<half, count / 2>(x);
  }
}

// rows[l] holds lane l of x[0], x[1], ... x[count - 1], and zeros.
template <class V, class Row>
FLASHODE_HD void transpose(const V* x, int count, Row* rows) {
  constexpr int W = V::width;
  for (int j = 0; j < lanes_of<Row> / W; ++j) {
    for (int i = 0; i < V::parts; ++i) {
      typename V::Part square[W];
      FLASHODE_UNROLL
      for (int c = 0; c < W; ++c) {
        square[c] = j * W + c < count ? x[j * W + c].part[i] : typename V::Part{};
      }
      transpose_steps<1>(square);
      FLASHODE_UNROLL
      for (int c = 0; c < W; ++c) {
        memcpy(reinterpret_cast<real_of<V>*>(rows + i * W + c) + j * W, square + c,
               sizeof square[c]);
      }
    }
  }
}

// As `outer`, with vectors that run along k.
template <class V>
constexpr int outer_width(int K) {
  int wide = V::width;
  while (wide < K && wide < 2 * V::fitting) wide *= 2;
  return wide;
}
template <int M, int K, class T, int L>
FLASHODE_HD void outer_along(const Vector<T, L>* g, const Vector<T, L>* x, T* sums,
                             int64_t row_stride, int64_t column_stride) {
  constexpr int wide = outer_width<Vector<T, L>>(K);
  using Row = Vector<T, wide>;
  for (int k = 0; k < K; k += wide) {
    const int count = K - k < wide ? K - k : wide;
    Row rows[L];
    transpose(x + k, count, rows);
    T* const target = sums + k * column_stride;
    product_rows<M, L>(reinterpret_cast<const T*>(g), L, 1, rows, [=](int m, const Row& sum) {
      T* const row = target + m * row_stride;
      if (count == wide && column_stride == 1) {
        store(row, load_unaligned<Row>(row) + sum);
      } else {
        for (int c = 0; c < count; ++c) row[c * column_stride] += lane(sum, c);
      }
    });
  }
}

// Of one system, with vectors that run along the sides of the matrix: down its columns, ...
template <int M, int K, int rows, class T>
FLASHODE_HD void product_down(const T* w, int64_t column_stride, const T* x, T* out) {
  constexpr int whole = M / rows * rows;
  for (int m = 0; m < whole; m += rows) {
    auto sum = zero<Lanes<T, rows>>();
    for (int k = 0; k < K; ++k) {
      sum = sum + load_unaligned<Lanes<T, rows>>(w + m + k * column_stride) * x[k];
    }
    store(out + m, sum);
  }
  if constexpr (whole < M) {
    product_down<M - whole, K, rows / 2>(w + whole, column_stride, x, out + whole);
  }
}
// ... or along a row, which need not be a contiguous one.
template <int K, class T>
FLASHODE_HD T product_along(const T* w, int64_t column_stride, const T* x) {
  constexpr int width = machine_bytes / sizeof(T);
  using V = Vector<T, width>;
  const int whole = column_stride == 1 ? K / width * width : 0;
  V sums = zero<V>();
  for (int k = 0; k < whole; k += width) {
    sums = sums + load_unaligned<V>(w + k) * load_unaligned<V>(x + k);
  }
  T sum = sum_of_lanes(sums);
  for (int k = whole; k < K; ++k) sum = sum + w[k * column_stride] * x[k];
  return sum;
}
template <int M, int K, class T>
FLASHODE_HD void product_of_one(const T* w, int64_t row_stride, int64_t column_stride, const T* x,
                                T* out) {
  if (row_stride == 1) {
    product_down<M, K, 8 * machine_bytes / sizeof(T)>(w, column_stride, x, out);
  } else {
    for (int m = 0; m < M; ++m) out[m] = product_along<K>(w + m * row_stride, column_stride, x);
  }
}

#endif  // __CUDACC__

// out[n] = the sum of the lanes of x[n], of N; as many at a time as a vector has lanes.
template <int N, class V>
FLASHODE_HD void sums_of_lanes(const V* x, real_of<V>* out) {
  int n = 0;
#ifndef __CUDACC__
  if constexpr (lanes_of<V> > 1) {
    constexpr int W = V::width;
    for (; n + W <= N; n += W) {
      typename V::Part sum[W];
      FLASHODE_UNROLL
      for (int c = 0; c < W; ++c) {
        sum[c] = x[n + c].part[0];
        for (int i = 1; i < V::parts; ++i) sum[c] += x[n + c].part[i];
      }
      fold<W, W>(sum);
      memcpy(out + n, sum, sizeof sum[0]);
    }
  }
#endif
  for (; n < N; ++n) out[n] = sum_of_lanes(x[n]);
}

// out[m] = sum_k w[m * row_stride + k * column_stride] * x[k], of M and K.
template <int M, int K, class V>
FLASHODE_HD void product(const real_of<V>* w, int64_t row_stride, int64_t column_stride, const V* x,
                         V* out) {
#ifndef __CUDACC__
  if constexpr (lanes_of<V> == 1) {
    product_of_one<M, K>(w, row_stride, column_stride, x, out);
  } else {
    product_rows<M, K>(w, row_stride, column_stride, x, [=](int m, const V& sum) { out[m] = sum; });
  }
#else
  for (int m = 0; m < M; ++m) {
    V sum = zero<V>();
    for (int k = 0; k < K; ++k) sum = sum + w[m * row_stride + k * column_stride] * x[k];
    out[m] = sum;
  }
#endif
}

// As `outer`, one number after the other.
template <int M, int K, class V>
FLASHODE_HD void outer_each(const V* g, const V* x, real_of<V>* sums, int64_t row_stride,
                            int64_t column_stride) {
  for (int m = 0; m < M; ++m) {
    for (int k = 0; k < K; ++k) {
      real_of<V>& sum = sums[m * row_stride + k * column_stride];
      sum = sum + sum_of_lanes(g[m] * x[k]);
    }
  }
}

// sums[m * row_stride + k * column_stride] += sum over the lanes of g[m] * x[k]. Fast where one of
// the strides is 1.
template <int M, int K, class V>
FLASHODE_HD void outer(const V* g, const V* x, real_of<V>* sums, int64_t row_stride,
                       int64_t column_stride) {
#ifndef __CUDACC__
  if constexpr (lanes_of<V> > 1) {
    const bool rows = M >= V::width && row_stride == 1,
               columns = K >= V::width && column_stride == 1;
    if (columns || (!rows && K >= M)) {
      outer_along<M, K>(g, x, sums, row_stride, column_stride);
    } else {
      outer_along<K, M>(x, g, sums, column_stride, row_stride);
    }
    return;
  }
#endif
  if (row_stride == 1) {
    outer_each<K, M>(x, g, sums, column_stride, row_stride);
  } else {
    outer_each<M, K>(g, x, sums, row_stride, column_stride);
  }
}

// The same for a matrix so small that the sums of each lane may be kept apart until the end of a
// solve: sums[m * K + k] += g[m] * x[k]. It is the faster one while they fit the innermost cache.
template <int M, int K, class V>
FLASHODE_HD void outer_lanes(const V* g, const V* x, V* sums) {
  for (int m = 0; m < M; ++m) {
    for (int k = 0; k < K; ++k) sums[m * K + k] = sums[m * K + k] + g[m] * x[k];
  }
}

}  // namespace flashode

// Products of a matrix that all samples share with the vectors of L samples at once.
#pragma once

#include "lanes.h"

namespace flashode {

// out[m] = sum_k w[m * row_stride + k * column_stride] * x[k], of M and K.
template <int M, int K, class V>
FLASHODE_HD void product(const real_of<V>* w, int64_t row_stride, int64_t column_stride, const V* x,
                         V* out) {
  for (int m = 0; m < M; ++m) {
    V sum = zero<V>();
    for (int k = 0; k < K; ++k) sum = sum + w[m * row_stride + k * column_stride] * x[k];
    out[m] = sum;
  }
}

// sums[m * row_stride + k * column_stride] += sum over the lanes of g[m] * x[k].
template <int M, int K, class V>
FLASHODE_HD void outer(const V* g, const V* x, real_of<V>* sums, int64_t row_stride,
                       int64_t column_stride) {
  for (int m = 0; m < M; ++m) {
    for (int k = 0; k < K; ++k) {
      sums[m * row_stride + k * column_stride] += sum_of_lanes(g[m] * x[k]);
    }
  }
}

}  // namespace flashode

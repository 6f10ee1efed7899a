// Dense output: the solution between the ends of a step, for all samples of a tile.
#pragma once

#include "tile.h"

namespace flashode {

// w_j(x) by Horner's rule.
template <class Method, int j, int power = Method::degree - 1, class X>
FLASHODE_HD X dense_weight(const X& x, const X& w = zero<X>()) {
  constexpr double weight = Method::weights[j][power];
  const X next = (w + real_of<X>(weight)) * x;
  if constexpr (power == 0) {
    return next;
  } else {
    return dense_weight<Method, j, power - 1>(x, next);
  }
}

template <class Method, int j>
FLASHODE_HD constexpr bool has_dense_weight() {
  for (int power = 0; power < Method::degree; ++power) {
    if (Method::weights[j][power] != 0) return true;
  }
  return false;
}

// The solution within a step. Few numbers are made polynomials once a step; for many the weights of
// the slopes are worked out for each output.
template <class Field, class Method>
class DenseOutput {
 public:
  using V = StateOf<Field>;
  static constexpr int64_t width = Field::width;

  template <class Clock>
  FLASHODE_HD DenseOutput(const Tile<Field, Method>& tile, const Clock& clock)
      : tile_(tile), step_(clock.step()) {
    if constexpr (is_short) make_coefficients(UpTo<Method::degree>());
  }

  // y at part x of the step.
  FLASHODE_HD void at(const V& x, V* y) const {
    if constexpr (is_short) {
      for (int64_t f = 0; f < width; ++f) {
        V sum = zero<V>();
        for (int p = Method::degree - 1; p >= 0; --p) sum = (sum + coefficient_[p * width + f]) * x;
        y[f] = tile_.y0[f] + sum;
      }
    } else {
      using Slopes = UpTo<Tile<Field, Method>::slopes>;
      V w[Tile<Field, Method>::slopes];
      make_weights(x, w, Slopes());
      for (int64_t f = 0; f < width; ++f) {
        y[f] = add_term(tile_.y0[f], step_, weighted(w, tile_.k + f, Slopes()));
      }
    }
  }

 private:
  static constexpr bool is_short = width <= 4;

  template <int... power>
  FLASHODE_HD void make_coefficients(Indices<power...>) {
    for (int64_t f = 0; f < width; ++f) {
      ((coefficient_[power * width + f] = step_ * sum_of_terms<DenseRow<Method, power>, width>(tile_.k + f)), ...);
    }
  }
  template <int... j>
  FLASHODE_HD static void make_weights(const V& x, V* w, Indices<j...>) {
    (make_weight<j>(x, w), ...);
  }
  template <int j>
  FLASHODE_HD static void make_weight(const V& x, V* w) {
    if constexpr (has_dense_weight<Method, j>()) w[j] = dense_weight<Method, j>(x);
  }
  template <int... j>
  FLASHODE_HD static V weighted(const V* w, const V* k, Indices<j...>) {
    V total = zero<V>();
    ((total = plus_weighted<j>(total, w, k)), ...);
    return total;
  }
  template <int j>
  FLASHODE_HD static V plus_weighted(const V& total, const V* w, const V* k) {
    if constexpr (has_dense_weight<Method, j>()) {
      return add_term(total, w[j], k[j * width]);
    } else {
      return total;
    }
  }

  const Tile<Field, Method>& tile_;
  const V step_;
  V coefficient_[is_short ? Method::degree * width : 1];
};

}  // namespace flashode

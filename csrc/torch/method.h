// The parts of a method in the form that the loops want them.
#pragma once

#include <vector>

namespace flashode {

// One row of a tableau without its zeros: stage numbers and their weights.
struct Row {
  Row() = default;
  explicit Row(const std::vector<double>& entries);
  std::vector<int> stage;
  std::vector<double> weight;
};

// A tableau in doubles; see python/flashode/tableau.py.
struct Table {
  Table(const std::vector<double>& c, const std::vector<std::vector<double>>& a,
        const std::vector<double>& b, const std::vector<double>& b_err, bool fsal);
  std::vector<double> c;
  std::vector<Row> a;
  Row b, b_err;
  bool fsal;
};

// A continuous extension in doubles; see Dense in python/flashode/interp.py.
struct Interpolant {
  Interpolant(const std::vector<std::vector<double>>& weights, const std::vector<double>& extra_c,
              const std::vector<std::vector<double>>& extra_a);
  std::vector<int> stage;                    // stages with any weight
  std::vector<std::vector<double>> weights;  // of those stages: coefficients of x, x^2, ...
  std::vector<double> extra_c;
  std::vector<Row> extra_a;

  // The weights of those stages at x in [0, 1].
  std::vector<double> at(double x) const;
};

}  // namespace flashode

// A forward solve as one polynomial a step; see Path in python/flashode/augmented.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "method.h"
#include "shown.h"

namespace flashode {

class Path {
 public:
  explicit Path(const py::object& path) : given(!path.is_none()) {
    if (!given) return;
    begins_ = path.attr("begins").cast<std::vector<double>>();
    ends_ = path.attr("ends").cast<std::vector<double>>();
    for (const py::handle rows : path.attr("polynomials")) polynomials_.push_back(unpack(rows));
  }

  // Length of the step that ends at or after a time of the forward solve.
  double step_length(double t) const {
    const size_t i = step_at(t);
    return ends_[i] - begins_[i];
  }

  // y at a time of the forward solve, as y0 + sum_j weight_j k_j.
  struct Value {
    at::Tensor y0;
    std::vector<at::Tensor> k;
    Row powers;
  };
  Value at(double t) const {
    const size_t i = step_at(t);
    const double x = (t - begins_[i]) / (ends_[i] - begins_[i]);
    Value value{polynomials_[i].select(0, 0), {}, {}};
    for (int64_t power = 1; power < polynomials_[i].size(0); ++power) {
      value.powers.stage.push_back(int(power) - 1);
      value.powers.weight.push_back(std::pow(x, power));
      value.k.push_back(polynomials_[i].select(0, power));
    }
    return value;
  }

  const bool given;

 private:
  size_t step_at(double t) const {
    const auto found = std::lower_bound(ends_.begin(), ends_.end(), t);
    return std::min(size_t(found - ends_.begin()), ends_.size() - 1);
  }

  std::vector<double> begins_, ends_;
  std::vector<at::Tensor> polynomials_;
};

}  // namespace flashode

// The native engine's entry point, and the parts of a method in the form its loop wants them.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "native.h"

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
};

// Numbers of flashode.errors.Status.
enum Status { kSuccess, kMaxSteps, kStepUnderflow, kNonfiniteField, kNonfiniteState };

// No further step is possible.
struct StepFailure {
  Status status;
};

Controller controller_of(const pybind11::object& problem);
Tolerances tolerances_of(const pybind11::object& problem);

// Solves a flashode.problem.Problem. Returns the fields of flashode.solution.Outcome. Every accepted
// step is added to `recording`, unless that is None.
pybind11::dict solve(pybind11::handle problem, const Table& table, const Interpolant& dense,
                     pybind11::object recording);

// Takes accepted steps of a solve again: a function of (t0, t1, dt, landing, y0, f0, shift0, shift1),
// see Run::replay. `shifts` are zeros that carry the gradients of the output times, or None.
pybind11::object replay(pybind11::handle problem, const Table& table, const Interpolant& dense,
                        pybind11::object shifts);

}  // namespace flashode

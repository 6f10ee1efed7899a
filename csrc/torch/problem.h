// What the loops read of a flashode.problem.Problem, and how they end.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "../kernels/status.h"
#include "native.h"

namespace flashode {

// No further step is possible.
struct StepFailure {
  Status status;
};

Controller controller_of(const pybind11::object& problem);
Tolerances tolerances_of(const pybind11::object& problem);

// Slopes of some stages, as the kernels take them.
Terms terms_of(const std::vector<at::Tensor>& k, const std::vector<int>& stages);

}  // namespace flashode

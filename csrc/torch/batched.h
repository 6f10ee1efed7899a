// The native engine for batches whose samples are solved on their own.
#pragma once

#include <pybind11/pybind11.h>

#include "method.h"

namespace flashode {

// Solves a flashode.batched.BatchProblem. Returns the fields of flashode.batched.BatchOutcome; or the
// first slope, where it carries gradients, which this engine does not record.
pybind11::object solve_batch(pybind11::handle problem, const Table& table, const Interpolant& dense);

}  // namespace flashode

// The native engine's entry points.
#pragma once

#include <pybind11/pybind11.h>

#include "method.h"

namespace flashode {

// Solves a flashode.problem.Problem. Returns the fields of flashode.solution.Outcome. Every accepted
// step is added to `recording`, unless that is None.
pybind11::dict solve(pybind11::handle problem, const Table& table, const Interpolant& dense,
                     pybind11::object recording);

// Takes accepted steps of a solve again: a function of (t0, t1, dt, landing, y0, f0, shift0, shift1),
// see Run::replay. `shifts` are zeros that carry the gradients of the output times, or None.
pybind11::object replay(pybind11::handle problem, const Table& table, const Interpolant& dense,
                        pybind11::object shifts);

}  // namespace flashode

// The native engine's entry points.
#pragma once

#include <pybind11/pybind11.h>

#include "method.h"

namespace flashode {

// Solves a flashode.problem.Problem. Returns the fields of flashode.solution.Outcome. Every accepted
// step is added to `recording`, unless that is None.
pybind11::dict solve(pybind11::handle problem, const Table& table, const Interpolant& dense,
                     pybind11::object recording);

// The same led from Python, step by step: functions start(), advance(), which returns (t0, t1, y1) of
// the next accepted step, states_at(times) inside that step, and outcome(status). The
// first three return the number of a status where the solve cannot go on. The tables must outlive them.
pybind11::dict steps(pybind11::handle problem, const Table& table, const Interpolant& dense,
                     pybind11::object recording);

// Takes accepted steps of a solve again: a function of (t0, t1, dt, landing, y0, f0, shift0, shift1),
// see Run::replay. `shifts` are zeros that carry the gradients of the output times, or None.
pybind11::object replay(pybind11::handle problem, const Table& table, const Interpolant& dense,
                        pybind11::object shifts);

}  // namespace flashode

// The native engine's backward solve.
#pragma once

#include <pybind11/pybind11.h>

#include "method.h"

namespace flashode {

// Solves a flashode.augmented.Augmented problem. Returns the fields of flashode.augmented.Gradients.
pybind11::dict sweep(pybind11::handle augmented, const Table& table, const Interpolant& dense);

}  // namespace flashode

"""Adams methods: the weights of past slopes on any grid, and what interpolates between step ends."""

from __future__ import annotations

import functools

import numpy as np
import torch

MAX_ORDER = 12

# Fewer past slopes than these, the present one among them, and a step is one of rk4.
# parity: torchdiffeq starts so, and `max_order` below 4 never gets beyond it.
LEAST_SLOPES = 3

# Gauss-Legendre points and weights on [0, 1]: six integrate the polynomials through twelve nodes exactly.
_GAUSS = np.polynomial.legendre.leggauss(MAX_ORDER // 2)
_X, _OMEGA = torch.from_numpy((_GAUSS[0] + 1) / 2), torch.from_numpy(_GAUSS[1] / 2)


def weights(nodes: torch.Tensor) -> torch.Tensor:
    """``w_j = int_0^1 l_j(x) dx`` with the Lagrange polynomials ``l_j`` on up to twelve nodes.

    The mean of the slope's interpolant over a step from x = 0 to 1 is ``sum_j w_j f(node_j)``: Adams'
    formulas on any grid (Hairer, Nørsett, Wanner I, III.1 and III.5), explicit with nodes 0 and before,
    implicit with 1 as well. No ``l_j`` changes its sign between 0 and 1 then, so that nothing cancels and
    every weight is right to a few roundings; recurrences of divided differences would need a second form
    for the implicit formula, and equations in powers of the nodes lose ten digits at order 12.

    ``nodes``: float64 tensor of shape (k,); returns (k,), differentiable in ``nodes``.
    """
    same = torch.eye(len(nodes), dtype=nodes.dtype, device=nodes.device)
    factors = (_X[:, None, None] - nodes) / (nodes[:, None] - nodes + same)
    return _OMEGA @ torch.where(same.bool(), 1.0, factors).prod(-1)


@functools.lru_cache(maxsize=256)
def weights_of(nodes: tuple[float, ...]) -> tuple[float, ...]:
    """`weights` as floats; those of a uniform grid are computed once."""
    return tuple(weights(torch.tensor(nodes, dtype=torch.float64, device="cpu")).tolist())


@functools.lru_cache(maxsize=256)
def amplification(nodes: tuple[float, ...]) -> float:
    """How many times larger an error of all slopes can be in their mean."""
    return sum(map(abs, weights_of(nodes)))


# That of the highest order on a uniform grid, and a little more for the rounding of times. Where steps
# grow fast, as many slopes are used as amplify no more.
_MOST_AMPLIFICATION = 1.01 * amplification(tuple(-float(j) for j in range(MAX_ORDER - 1)))


def most_amplification(eps: float) -> float:
    """What slopes of a dtype with this rounding are fit for: a mean slope good to six digits, or else the
    least order. In single precision order 12 makes 1e-4 of every rounding, and loses to order 5."""
    least = 1.01 * amplification(tuple(-float(j) for j in range(LEAST_SLOPES)))
    return min(_MOST_AMPLIFICATION, max(least, 2e-6 / eps))

"""Linear equations from products with the matrix alone: GMRES, and its place in a graph."""

from __future__ import annotations

import math

import torch

# Directions kept before a restart, and restarts before giving up.
RESTART, CYCLES = 50, 20


def gmres(product, b: torch.Tensor, tol: float) -> tuple[torch.Tensor, float]:
    """``x`` with ``product(x) = b``, flat and real, and the relative residual that is left (Saad and Schultz,
    *GMRES*, SIAM J. Sci. Stat. Comput. 7, 1986); above ``tol`` where it could not be made smaller."""
    x, residual = torch.zeros_like(b), b
    size = length = b.norm().item()
    for _ in range(CYCLES):
        if not (math.isfinite(length) and length > tol * size):
            break
        x = x + _cycle(product, residual, length, tol * size)
        before, residual = length, b - product(x)
        length = residual.norm().item()
        if not length < 0.999 * before:
            break
    return x, length / size if size else 0.0


def _cycle(product, residual, length, enough):
    """The correction that makes the residual least over one Krylov space."""
    basis, columns, rotations, rhs = [residual / length], [], [], [length]
    for _ in range(min(RESTART, residual.numel())):
        v = product(basis[-1])
        space = torch.stack(basis)
        column = space @ v
        v = v - column @ space
        again = space @ v  # once more: rounding leaves the first projection incomplete
        v, column = v - again @ space, (column + again).tolist()
        norm = v.norm().item()
        for i, (c, s) in enumerate(rotations):
            column[i], column[i + 1] = c * column[i] + s * column[i + 1], c * column[i + 1] - s * column[i]
        diagonal = math.hypot(column[-1], norm)
        if not (math.isfinite(diagonal) and diagonal > 0):
            break
        c, s = column[-1] / diagonal, norm / diagonal
        column[-1] = diagonal
        columns.append(column)
        rotations.append((c, s))
        rhs[-1:] = [c * rhs[-1], -s * rhs[-1]]
        if abs(rhs[-1]) <= enough or norm == 0:
            break
        basis.append(v / norm)
    weights = [0.0] * len(columns)
    for i in reversed(range(len(columns))):
        known = sum(columns[j][i] * weights[j] for j in range(i + 1, len(columns)))
        weights[i] = (rhs[i] - known) / columns[i][i]
    if not columns:
        return torch.zeros_like(residual)
    return residual.new_tensor(weights) @ torch.stack(basis[: len(columns)])


class Inverse(torch.autograd.Function):
    """``x = M^-1 b`` to rounding, or ``M^-T b``, for a constant matrix; differentiable in ``b``, to any order."""

    @staticmethod
    def forward(ctx, b, matrix, transposed):
        ctx.matrix, ctx.transposed = matrix, transposed
        product = matrix.transposed_product if transposed else matrix.product
        tol = torch.finfo(b.dtype).eps ** 0.75
        x, residual = gmres(product, b, tol)
        if not residual <= 100 * tol:
            raise RuntimeError(
                f"the linear equations of an implicit method's gradient could not be solved: GMRES leaves a relative "
                f"residual of {residual:.1e} after {RESTART * CYCLES} products; take smaller steps"
            )
        return x

    @staticmethod
    def backward(ctx, g):
        return Inverse.apply(g, ctx.matrix, not ctx.transposed), None, None

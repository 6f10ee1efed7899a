"""What Newton's method has of a field near a state: its linearisation, and equations with that.

As a matrix, factorised, or as products with it alone.
"""

from __future__ import annotations

import torch

from .krylov import Inverse, gmres

# Rows of the Jacobian computed at a time.
_ROWS = 256
# Part of the residual that GMRES leaves in an iteration of Newton's method: with 0.001 there are up to a fifth fewer
# iterations, and up to twice the products.
_FORCING = 0.03


# ---- linearisations of the field at one state ------------------------------------------------


class Zero:
    """Of a field that does not depend on y."""

    def __init__(self, y):
        self.matrix = y.new_zeros(()).expand(len(y), len(y))

    def product(self, v):
        return torch.zeros_like(v)

    transposed_product = product


class Jacobian:
    """All of it, from as many vector-Jacobian products as it has rows."""

    def __init__(self, matrix):
        self.matrix = matrix

    @staticmethod
    def of(value, y):
        """None where y is not behind value."""
        if not len(y):
            return Jacobian(y.new_zeros(0, 0))
        rows = []
        for cotangents in torch.eye(len(y), dtype=y.dtype, device=y.device).split(_ROWS):
            try:
                row = _vjp(value, y, cotangents, is_grads_batched=True)
            except RuntimeError:  # an operation of the field's has no rule for batches
                found = [_vjp(value, y, cotangent) for cotangent in cotangents]
                row = None if found[0] is None else torch.stack(found)
            if row is None:
                return None
            rows.append(row)
        return Jacobian(torch.cat(rows))


class Products:
    """Products with it and its transpose. The transposed product is linear in the cotangent: the transpose
    of that map, by differentiating it in turn, is the product itself."""

    def __init__(self, value, y, cotangent, pulled_back):
        self.value, self.y, self.cotangent, self.pulled_back = value, y, cotangent, pulled_back

    @staticmethod
    def of(value, y):
        """None where y is not behind value."""
        with torch.inference_mode(False), torch.enable_grad():
            cotangent = torch.zeros_like(value).requires_grad_()
            pulled_back = _vjp(value, y, cotangent, create_graph=True)
        return None if pulled_back is None else Products(value, y, cotangent, pulled_back)

    def product(self, v):
        moved = _vjp(self.pulled_back, self.cotangent, v) if self.pulled_back.requires_grad else None
        return torch.zeros_like(v) if moved is None else moved

    def transposed_product(self, w):
        return _vjp(self.value, self.y, w)


def _vjp(value, y, cotangent, **how):
    (product,) = torch.autograd.grad(value, y, cotangent, retain_graph=True, allow_unused=True, **how)
    return product


def reaches_beyond(value, y) -> bool:
    """Whether the graph of ``value`` ends in another tensor than ``y`` that requires grad."""
    stack, seen = [value.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", y) is not y:
            return True
        stack += [after for after, _ in node.next_functions]
    return False


# ---- the matrix of Newton's method -----------------------------------------------------------


class DenseMatrix:
    """``I - dt A x J``, factorised."""

    def __init__(self, linear, steps):
        m, n = len(steps), linear[0].matrix.shape[-1]
        jacobians = torch.stack([tangent.matrix for tangent in linear]).expand(m, n, n)
        blocks = -steps[:, :, None, None] * jacobians[:, None]
        matrix = torch.eye(m * n, dtype=steps.dtype, device=steps.device)
        matrix = matrix + blocks.transpose(1, 2).reshape(m * n, m * n)
        self.factors = torch.linalg.lu_factor_ex(matrix)[:2]

    def solve(self, b):
        return torch.linalg.lu_solve(*self.factors, b.reshape(-1, 1)).reshape(b.shape)

    def transposed_inverse(self, g):
        """Differentiable in ``g``."""
        return torch.linalg.lu_solve(*self.factors, g.reshape(-1, 1), adjoint=True).reshape(g.shape)


class FreeMatrix:
    """``I - dt A x J`` as products."""

    def __init__(self, linear, steps):
        self.linear, self.steps = linear * len(steps) if len(linear) == 1 else linear, steps

    def product(self, flat):
        x = flat.reshape(len(self.steps), -1)
        moved = [tangent.product(v) for tangent, v in zip(self.linear, self.steps @ x)]
        return (x - torch.stack(moved)).reshape(-1)

    def transposed_product(self, flat):
        w = flat.reshape(len(self.steps), -1)
        pulled = torch.stack([tangent.transposed_product(v) for tangent, v in zip(self.linear, w)])
        return (w - self.steps.T @ pulled).reshape(-1)

    def solve(self, b):
        """To the part of the residual that Newton's method needs."""
        return gmres(self.product, b.reshape(-1), _FORCING)[0].reshape(b.shape)

    def transposed_inverse(self, g):
        """To rounding, differentiable in ``g``."""
        return Inverse.apply(g.reshape(-1), self, True).reshape(g.shape)

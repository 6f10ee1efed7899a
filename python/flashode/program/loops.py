"""Nested loops over addresses, and numbers and sums as C++."""

from __future__ import annotations

import numpy as np


def literal(x: float) -> str:
    if x != x:
        return "Real(NAN)"
    if x in (float("inf"), float("-inf")):
        return "Real(INFINITY)" if x > 0 else "Real(-INFINITY)"
    return f"Real({float(x)!r})"


def sum_of(names, factors) -> str:
    terms = []
    for name, factor in zip(names, factors):
        if factor:
            terms.append(str(factor) if name == "1" else name if factor == 1 else f"{factor} * {name}")
    return " + ".join(terms) or "0"


def row_major(sizes) -> list[int]:
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.insert(0, strides[0] * size)
    return strides


def nest(columns: np.ndarray):
    """Nested loops that run through columns of addresses (k, n): their sizes, and strides per loop and column."""
    n = columns.shape[1]
    if n == 1:
        return [1], [np.zeros(len(columns), np.int64)]
    steps = np.diff(columns, axis=1)
    breaks = np.flatnonzero((steps != steps[:, :1]).any(0))
    if not breaks.size:
        return [n], [steps[:, 0]]
    inner = int(breaks[0]) + 1
    if n % inner:
        return None
    blocks = columns.reshape(len(columns), n // inner, inner)
    within = blocks - blocks[:, :, :1]
    if (within != within[:, :1]).any():
        return None
    outer = nest(blocks[:, :, 0])
    if outer is None:
        return None
    return outer[0] + [inner], outer[1] + [steps[:, 0]]

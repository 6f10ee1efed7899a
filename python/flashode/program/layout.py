"""How the samples of a batch lie in a state, and which numbers are whose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..batched import BatchProblem
from ..problem import Problem

ROWS, COLUMNS, WHOLE = "rows", "columns", "whole"


@dataclass(frozen=True)
class Layout:
    """Samples along the first axis of every member (``rows``), along the last of a single one (``columns``), or a
    state that is one sample (``whole``).

    Attributes:
        samples: how many.
        shapes: of the members of the state.
    """

    kind: str
    samples: int
    shapes: tuple[tuple[int, ...], ...]

    @property
    def of_one(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of one sample's part of the members."""
        if self.kind == WHOLE:
            return self.shapes
        return tuple(s[1:] if self.kind == ROWS else s[:-1] for s in self.shapes)

    @property
    def members(self) -> list[int]:
        """Where each member begins among the numbers of a sample, and the end."""
        ends = [0]
        for shape in self.of_one:
            ends.append(ends[-1] + math.prod(shape))
        return ends

    def places(self) -> tuple[list[int], list[int]]:
        """Where each number of the first sample is in the flat state, and how far on the next sample's is."""
        offsets, strides, begin = [], [], 0
        for shape, one in zip(self.shapes, self.of_one):
            n = math.prod(one)
            if self.kind == COLUMNS:
                offsets += range(0, n * self.samples, self.samples)
                strides += [1] * n
            else:
                offsets += range(begin, begin + n)
                strides += [n if self.kind == ROWS else 0] * n
            begin += math.prod(shape)
        return offsets, strides

    def owners(self) -> torch.Tensor:
        """For each element of the flat state the number of its sample, from 1."""
        offsets, strides = (torch.tensor(x) for x in self.places())
        each = torch.arange(self.samples)
        owners = torch.empty(sum(math.prod(s) for s in self.shapes), dtype=torch.int64)
        owners[offsets[:, None] + strides[:, None] * each] = (each + 1).expand(len(offsets), -1)
        return owners


def layouts(problem: Problem) -> Iterator[Layout]:
    """Those that a problem's samples may have, most likely first."""
    shapes = [problem.y0.shape] if problem.shapes is None else problem.shapes
    shapes = tuple(tuple(s) for s in shapes)
    if isinstance(problem, BatchProblem):
        yield Layout(ROWS, problem.samples, shapes)
        return
    if all(shapes) and len({s[0] for s in shapes}) == 1 and shapes[0][0] > 1:
        yield Layout(ROWS, shapes[0][0], shapes)
    if len(shapes) == 1 and len(shapes[0]) > 1 and shapes[0][-1] > 1:
        yield Layout(COLUMNS, shapes[0][-1], shapes)
    yield Layout(WHOLE, 1, shapes)

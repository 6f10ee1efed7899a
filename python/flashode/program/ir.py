"""The intermediate form of a field: what one sample of a batch computes, as operations on flat arrays of numbers.

Every number has a slot. An `Array` is a run of slots that one operation makes, and an operation reads any
slots that were made before it: views, slices and concatenations are none, they only say which slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np


class Kind(IntEnum):
    """How often a number is made."""

    CONSTANT = 0  # never: it is in the source
    PREPARED = 1  # once a solve, from what all samples share
    UNIFORM = 2  # once an evaluation, from the time that all samples share
    LANES = 3  # once an evaluation and sample
    SUM = 4  # once an evaluation, over all samples: only gradients of what they share are


@dataclass(eq=False)
class Array:
    """Numbers that one operation makes: ``operation`` of ``operands``, arrays of slots.

    ``operation`` is the name of a pointwise operation or one of

    - ``input i``, ``own i``, ``t``, ``y``, ``adj``, ``constant``: given;
    - ``reduce f`` of (size, r) slots; ``contract`` of two times (size, r) slots, the sum of products;
    - ``product`` of weights (m, k) and of ``rows`` rows x (rows, k): ``x @ weights.T``, flat;
    - ``outer`` of g (r, m) and x (r, k): the sum over samples and r of the products, flat, a `Kind.SUM`;
    - ``lane sum``: the sum over samples, a `Kind.SUM`.
    """

    base: int
    size: int
    kind: Kind
    operation: str
    operands: list[np.ndarray] = field(default_factory=list)
    adjoint: bool = False  # made from the cotangent
    boolean: bool = False
    line: str = ""
    values: np.ndarray | None = None  # of constants

    @property
    def slots(self) -> np.ndarray:
        return np.arange(self.base, self.base + self.size)

    @property
    def is_given(self) -> bool:
        return not self.operands

    @property
    def sums_samples(self) -> bool:
        return self.operation in ("lane sum", "outer")


@dataclass
class Form:
    """A field, lowered.

    Attributes:
        arrays: in an order in which they can be made.
        outputs: slots by name: ``f``; and of the backward pass ``of_y``, ``of_t``, ``of input i`` and
            ``of own i``, absent where there is no dependence.
        own: inputs with a value for every sample, by number: the flat position of each of a sample's numbers
            and how far on the next sample's is.
        flops: of one sample in one evaluation.
    """

    arrays: list[Array]
    outputs: dict[str, np.ndarray]
    own: dict[int, tuple[np.ndarray, np.ndarray]]

    def __post_init__(self):
        self.bases = np.array([a.base for a in self.arrays])

    def array_numbers(self, slots: np.ndarray) -> np.ndarray:
        """The number of the array that each slot is in."""
        return np.searchsorted(self.bases, slots, side="right") - 1

    def arrays_of(self, slots: np.ndarray) -> list[Array]:
        return [self.arrays[i] for i in np.unique(self.array_numbers(slots))]

    def sources_of(self, a: Array) -> dict[int, Array]:
        """The arrays that an array is made of, by their ids."""
        return {id(s): s for o in a.operands for s in self.arrays_of(o.reshape(-1))}

    @property
    def flops(self) -> dict[str, int]:
        """Operations on numbers of one sample: of a slope, and of a pull-back after it."""
        count = {"slope": 0, "pull_back": 0}
        for a in self.arrays:
            if a.kind in (Kind.LANES, Kind.SUM):
                count["pull_back" if a.adjoint else "slope"] += _flops(a)
        return count


def _flops(a: Array) -> int:
    if not a.operands or a.operation == "lane sum":
        return 0
    if a.operation == "product":
        weights, x = a.operands
        return 2 * weights.size * len(x)
    if a.operation == "outer":
        g, x = a.operands
        return 2 * len(g) * a.size
    if a.operation == "contract":
        return 2 * a.operands[0].size
    return a.operands[0].size


def live(form: Form) -> Form:
    """The same without arrays that no output depends on."""
    needed = np.zeros(len(form.arrays), bool)
    for slots in form.outputs.values():
        needed[form.array_numbers(slots.reshape(-1))] = True
    for i in reversed(range(len(form.arrays))):
        if needed[i]:
            for slots in form.arrays[i].operands:
                needed[form.array_numbers(slots.reshape(-1))] = True
    kept = [a for a, use in zip(form.arrays, needed) if use or a.operation in ("t", "y", "adj")]
    return Form(kept, form.outputs, form.own)

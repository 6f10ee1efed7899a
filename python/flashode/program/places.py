"""Where the numbers of a generated function are: variables of their own, or arrays in work space."""

from __future__ import annotations

import numpy as np

from .ir import Array, Kind
from .loops import literal
from .operations import POINTWISE

FEW = 12  # numbers that become variables, not arrays
_FEW_TERMS = 48  # of a sum that is written out
_LONG, _APART = 32, 5  # an array in work space, and what lies between it and the next


class Space:
    """Work space in which arrays take the places of those that have ended."""

    def __init__(self):
        self.size, self.gaps = 0, []

    def take(self, size: int) -> int:
        """Where an array begins: in the first gap that is large enough."""
        size = self.padded(size)
        for n, (begin, end) in enumerate(self.gaps):
            if end - begin >= size:
                self.gaps[n] = begin + size, end
                return begin
        self.size += size
        return self.size - size

    def give_back(self, begin: int, size: int):
        gaps = sorted([*self.gaps, (begin, begin + self.padded(size))])
        self.gaps = []
        for begin, end in gaps:
            if self.gaps and self.gaps[-1][1] == begin:
                begin = self.gaps.pop()[0]
            self.gaps.append((begin, end))

    def padded(self, size: int) -> int:
        """Long arrays are not a power of two apart: their numbers would push each other out of the nearest cache."""
        return size + _APART if size >= _LONG else size


class Places:
    """Where one function of a field finds and leaves its numbers: variables, work space, what it was given."""

    def __init__(self, writer, name, arrays, kept, outputs, reads_kept=False):
        self.w, self.form, self.name, self.arrays = writer, writer.form, name, arrays
        self.kept, self.reads_kept = kept, reads_kept
        self.outputs = {k: v for k, v in outputs.items() if v is not None}
        self.wide = name in ("slope", "slope_keeping", "pull_back")
        self.lines: list[str] = []
        self.made = {id(a) for a in arrays}
        self.spaces = {"scratch": Space(), "u": Space(), "z": Space()}
        self.offsets = {}  # of arrays in them: the space, where they begin, and their size
        self.copies = []  # the same of what one statement reads
        made = [*arrays, *(a for slots in self.outputs.values() for a in self.form.arrays_of(slots))]
        self.sources = {id(a): self.form.sources_of(a) for a in made}
        self.tables: list[str] = []
        self.plan()

    # ---- places ----------------------------------------------------------------------------

    def plan(self):
        """Which arrays are memory, and where."""
        self.memory = set()
        for a in self.arrays:
            if a.size > FEW or not self.unrolls(a):
                self.memory.add(id(a))
        for a in self.arrays:
            if not self.unrolls(a):
                for o in a.operands:
                    if (o == o.flat[0]).all() and a.operation in POINTWISE:
                        continue
                    self.memory |= {id(s) for s in self.form.arrays_of(o.reshape(-1))}
        self.direct = {}  # arrays that are an output as a whole
        for name, slots in self.outputs.items():
            arrays = self.form.arrays_of(slots)
            if len(arrays) == 1 and id(arrays[0]) in self.memory & self.made and arrays[0].kind == Kind.LANES:
                a = arrays[0]
                if (
                    a.size == slots.size
                    and (slots == a.slots).all()
                    and id(a) not in self.kept
                    and name != "adj_t"
                ):
                    self.direct[id(a)] = name

    def unrolls(self, a: Array) -> bool:
        """Whether its numbers are written out one by one."""
        if a.operation in POINTWISE or a.operation == "lane sum":
            return a.size <= FEW
        if a.operation.startswith("reduce") or a.operation == "contract":
            return a.size <= FEW and a.operands[0].size <= _FEW_TERMS
        if a.operation == "product":
            weights, x = a.operands
            return a.size <= FEW and weights.size * len(x) <= _FEW_TERMS
        return False

    def place(self, a: Array) -> tuple[str, int]:
        """The space an array lies in, and where it begins there."""
        given = {"t": "t", "y": "y", "adj": "adj"}.get(a.operation)
        if given:
            return given, 0
        if a.operation.startswith("own "):
            return "own", self.w.own_offset[int(a.operation[4:])]
        if a.kind == Kind.PREPARED:
            return "prepared", self.w.prepared[id(a)]
        if self.name == "finish" and id(a) in self.w.lane_sum_offset:
            return "lane_sums", self.w.lane_sum_offset[id(a)]
        if self.name == "finish" and id(a) in self.w.sum_offset:
            return "sums", self.w.sum_offset[id(a)]
        if id(a) in self.kept and (self.reads_kept or id(a) in self.memory):
            return "kept", self.kept[id(a)]
        if id(a) in self.direct:
            return self.direct[id(a)], 0
        if id(a) not in self.memory:
            return "v", a.base  # variables
        if a.operation == "outer" and id(a) in self.w.sum_offset and id(a) not in self.w.at_once:
            return "sums", self.w.sum_offset[id(a)]
        if id(a) not in self.offsets:
            space = {Kind.LANES: "scratch", Kind.UNIFORM: "u"}.get(a.kind, "z")
            self.offsets[id(a)] = space, self.spaces[space].take(a.size), a.size
        return self.offsets[id(a)][:2]

    def address(self, slot: int) -> tuple[str, int]:
        a = self.form.arrays[int(self.form.array_numbers(np.array([slot]))[0])]
        space, offset = self.place(a)
        return space, offset + slot - a.base

    def addresses(self, slots: np.ndarray):
        """The one space that slots lie in and where, or None if there are several."""
        numbers = self.form.array_numbers(slots)
        out, spaces = np.empty(slots.shape, np.int64), set()
        for i in np.unique(numbers):
            a = self.form.arrays[i]
            if a.kind == Kind.CONSTANT:
                return None
            space, offset = self.place(a)
            spaces.add(space)
            mask = numbers == i
            out[mask] = slots[mask] - a.base + offset
        if len(spaces) > 1 or spaces & {"v", "t"}:
            return None
        return spaces.pop(), out

    def ref(self, slot: int) -> str:
        a = self.form.arrays[int(self.form.array_numbers(np.array([slot]))[0])]
        if a.kind == Kind.CONSTANT:
            return literal(a.values[slot - a.base])
        space, at = self.address(slot)
        if space == "t":
            return "t"
        if space == "v":
            return f"v{slot}"
        text = f"{space}[{at}]"
        return f"({text} != Real(0))" if a.boolean else text

    def is_lanes(self, slot: int) -> bool:
        return self.form.arrays[int(self.form.array_numbers(np.array([slot]))[0])].kind == Kind.LANES

"""From the `Form` of a field to C++: the struct ``Field`` that the templates of csrc/compiled take.

Few numbers become variables of their own, many are loops over arrays in work space. Pointwise operations
on arrays of one length share a loop where one reads what the other has just made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .ir import Array, Form, Kind
from .operations import FUNCTIONS, POINTWISE

_FEW = 12  # numbers that become variables, not arrays
_THIN, _MOST_LANE_SUMS = 16, 16384
_INLINE = 40  # statements of a function that is copied to all places where it is called
_CHEAP = frozenset(
    "neg add sub mul square cube abs relu maximum minimum where copy as_real gt ge lt le eq ne".split()
)
_LONG, _APART = 32, 5  # an array in work space, and what lies between it and the next
_FEW_TERMS = 48  # of a sum that is written out


@dataclass(frozen=True)
class Fields:
    """The C++ of a field, and what the caller has to know of it."""

    text: str
    own: list[tuple[int, int, int]]  # of each constant of a sample: input, position, distance of the next sample's
    sizes: dict[str, int]  # its members of that name


def field_source(form: Form, real: str, lanes: int, own_clocks: bool, gradients: bool) -> Fields:
    """The struct ``Field``; see csrc/compiled/program.h for what each of its members is."""
    return _Writer(form, real, lanes, own_clocks, gradients).write()


class _Writer:
    def __init__(self, form, real, lanes, own_clocks, gradients):
        self.form, self.real, self.lanes, self.own_clocks, self.gradients = (
            form,
            real,
            lanes,
            own_clocks,
            gradients,
        )
        self.own, self.own_offset = [], {}
        for i, (places, steps) in sorted(form.own.items()):
            self.own_offset[i] = len(self.own)
            self.own += [(i, int(p), int(s)) for p, s in zip(places, steps)]
        self.prepared = {}  # offsets of arrays made once a solve
        self.prepared_size = 0
        self.plan_sums()

    # ---- what is made where ----------------------------------------------------------------

    def plan_sums(self):
        """Sums over samples: which are accumulated as they are, and which are worked on in every evaluation."""
        form = self.form
        sums = [a for a in form.arrays if a.kind == Kind.SUM]
        self.at_once = set()  # worked on in every evaluation
        used = {id(a): [] for a in sums}
        for a in sums:
            for operand in a.operands:
                for source in form.arrays_of(operand.reshape(-1)):
                    if id(source) in used:
                        used[id(source)].append(a)
        of_t = form.outputs.get("of_t") if not self.own_clocks else None
        final = {id(a) for a in form.arrays_of(of_t)} if of_t is not None else set()
        for a in reversed(sums):
            needs_time = any(
                s.kind == Kind.UNIFORM for o in a.operands for s in form.arrays_of(o.reshape(-1))
            ) and not _is_source(a)
            if needs_time or any(id(user) in self.at_once for user in used[id(a)]):
                self.at_once.add(id(a))
            elif id(a) in final and a.operation != "lane sum":
                self.at_once.add(id(a))
        outputs = [s for name, s in form.outputs.items() if name.startswith("of input")]
        ends = {id(a) for s in outputs for a in form.arrays_of(s)}
        self.accumulated = [
            a for a in sums
            if (_is_source(a) or id(a) in self.at_once)
            and (id(a) in ends or any(id(u) not in self.at_once for u in used[id(a)]))
        ]  # fmt: skip
        self.lane_sum_offset, self.sum_offset = {}, {}
        lane_sums = sums_size = 0
        for a in self.accumulated:
            if id(a) not in self.at_once and (a.operation == "lane sum" or self.is_thin(a)):
                self.lane_sum_offset[id(a)] = lane_sums
                lane_sums += a.size
            else:
                self.sum_offset[id(a)] = sums_size
                sums_size += a.size
        self.lane_sums, self.sums = lane_sums, sums_size
        self.late = [a for a in sums if not _is_source(a) and id(a) not in self.at_once]

    def is_thin(self, a) -> bool:
        """Whether a gradient of weights is better summed lane by lane: vectors along its sides would be short."""
        if a.operation != "outer":
            return False
        m, k = (o.shape[1] for o in a.operands)
        bytes_of_sums = m * k * self.lanes * (4 if self.real == "float" else 8)
        return min(m, k) < _THIN and bytes_of_sums <= _MOST_LANE_SUMS

    def write(self) -> Fields:
        form = self.form
        slope = [a for a in form.arrays if a.kind in (Kind.UNIFORM, Kind.LANES) and not a.adjoint]
        primal = [a for a in slope if not _is_given(a)]
        back = [
            a for a in form.arrays
            if a.adjoint and not _is_given(a) and not (a.kind == Kind.SUM and id(a) not in self.at_once and not _is_source(a))
        ]  # fmt: skip
        for a in form.arrays:
            if a.kind == Kind.PREPARED:
                self.prepared[id(a)] = self.prepared_size
                self.prepared_size += a.size
        kept, kept_space, uniform = {}, _Space(), []
        if self.gradients:
            needed = self.read_by(back)
            again = self.made_again(primal, needed)
            for a in primal:
                if id(a) in needed and a.kind == Kind.LANES and id(a) not in again:
                    kept[id(a)] = kept_space.take(a.size)
            again = [a for a in primal if id(a) in again]
            needed |= self.read_by(again)
            uniform = self.closure([a for a in primal if id(a) in needed and a.kind == Kind.UNIFORM])
            back = _before_use(again, back, form)
        f_only = _Section(
            self, "slope", self.forward(primal) if self.gradients else primal, {}, {"f": form.outputs["f"]}
        )
        parts = [self.function("slope", f_only)]
        scratch = f_only.spaces["scratch"].size
        if self.gradients:
            keeping = _Section(self, "slope_keeping", primal, kept, {"f": form.outputs["f"]})
            parts.append(self.function("slope_keeping", keeping))
            outputs = {"adj_y": form.outputs.get("of_y"), "adj_t": form.outputs.get("of_t")}
            pulling = _Section(self, "pull_back", uniform + back, kept, outputs, reads_kept=True)
            parts.append(self.function("pull_back", pulling))
            scratch = max(scratch, *(section.spaces["scratch"].size for section in (keeping, pulling)))
        preparing = _Section(self, "prepare", [a for a in form.arrays if a.kind == Kind.PREPARED], {}, {})
        derive = preparing.text()  # last: sections may ask for packed copies
        width = next(a.size for a in form.arrays if a.operation == "y")
        timed = any(
            a.operation == "t" for a in self.form.arrays_of(self.read_slots(primal + back + self.late))
        )
        finish = _Section(self, "finish", self.late, {}, {}).text() if self.gradients else ""
        members = {
            "lanes": self.lanes, "width": width, "own": len(self.own), "prepared": self.prepared_size,
            "kept": kept_space.size, "scratch": scratch, "lane_sums": self.lane_sums, "sums": self.sums,
        }  # fmt: skip
        lines = [
            "struct Field {",
            f"  using Real = {self.real};",
            f"  static constexpr bool timed = {'true' if timed else 'false'};",
            *(f"  static constexpr int {name} = {value};" for name, value in members.items()),
            "",
            "  // Every `step`-th number of the inputs, from `first` on: by as many as like to.",
            "  FLASHODE_BOTH static void fetch([[maybe_unused]] const Real* const* inputs, [[maybe_unused]] Real* prepared,",
            "                                  [[maybe_unused]] int first, [[maybe_unused]] int step) {",
            *self.fetches(),
            "  }",
            "  FLASHODE_BOTH static void derive([[maybe_unused]] Real* prepared) {",
            "    using W [[maybe_unused]] = Real;",
            derive + "  }",
            "  FLASHODE_BOTH static void prepare(const Real* const* inputs, Real* prepared) {",
            "    fetch(inputs, prepared, 0, 1);",
            "    derive(prepared);",
            "  }",
            *parts,
        ]
        if self.gradients:
            lines += [
                "",
                "  static void finish([[maybe_unused]] const Real* prepared, [[maybe_unused]] const Real* lane_sums,",
                "                     [[maybe_unused]] const Real* sums, [[maybe_unused]] Real* const* gradients) {",
                "    using W [[maybe_unused]] = Real;",
                finish + "  }",
            ]
        return Fields("\n".join(lines) + "\n};\n", self.own, members)

    def fetches(self) -> list[str]:
        given = [a for a in self.form.arrays if a.kind == Kind.PREPARED and a.operation.startswith("input ")]
        return [
            f"    for (int i = first; i < {a.size}; i += step) prepared[{self.prepared[id(a)]} + i] = inputs[{a.operation[6:]}][i];"
            for a in given
        ]

    def function(self, name, section) -> str:
        """One of the functions over lanes. Those of few statements become part of every stage of a step; copies of
        long ones would only take the compiler's time."""
        body = section.text()
        head = "const Real* prepared, const V* own, Time t, const V* y, "
        head += {
            "slope": "V* f, V* scratch",
            "slope_keeping": "V* f, V* kept, V* scratch",
            "pull_back": "const V* kept, const V* adj, V* adj_y, V* adj_t, V* adj_own, V* lane_sums, Real* sums, V* scratch",
        }[name]
        head = ",\n      ".join(f"[[maybe_unused]] {part}" for part in head.split(", "))
        kind = "FLASHODE_HD" if body.count("\n") <= _INLINE else "FLASHODE_APART"
        return (
            f"\n  template <class V, class Time>\n  {kind} static void {name}(\n      {head}) {{\n"
            f"    using W [[maybe_unused]] = V;\n{body}  }}"
        )

    def read_slots(self, arrays) -> np.ndarray:
        slots = [o.reshape(-1) for a in arrays for o in a.operands]
        slots += [s for s in self.form.outputs.values()]
        return np.unique(np.concatenate(slots))

    def read_by(self, arrays) -> set[int]:
        slots = [o.reshape(-1) for a in arrays for o in a.operands]
        slots += [s for name, s in self.form.outputs.items() if name != "f"]
        slots.append(np.zeros(0, np.int64))  # where f depends on nothing
        return {id(a) for a in self.form.arrays_of(np.concatenate(slots))}

    def made_again(self, primal, needed) -> set[int]:
        """Arrays that the pull-back makes again of what is kept in any case: arithmetic is cheaper than memory."""
        at_hand = {id(a) for a in self.form.arrays if _is_given(a) or a.kind < Kind.LANES}
        again = set()
        for a in primal:
            if a.kind != Kind.LANES or id(a) not in needed:
                continue
            if a.operation in _CHEAP and _sources(a, self.form).keys() <= at_hand:
                again.add(id(a))
            at_hand.add(id(a))
        return again

    def closure(self, arrays) -> list[Array]:
        """Those and what they are made of, as far as it is made from the time."""
        wanted = {id(a) for a in arrays}
        for a in reversed(self.form.arrays):
            if id(a) in wanted:
                for o in a.operands:
                    wanted |= {id(s) for s in self.form.arrays_of(o.reshape(-1)) if s.kind == Kind.UNIFORM}
        return [a for a in self.form.arrays if id(a) in wanted and not _is_given(a)]

    def forward(self, primal) -> list[Array]:
        """What the slope alone needs."""
        wanted = {id(a) for a in self.form.arrays_of(self.form.outputs["f"])}
        for a in reversed(primal):
            if id(a) in wanted:
                for o in a.operands:
                    wanted |= {id(s) for s in self.form.arrays_of(o.reshape(-1))}
        return [a for a in primal if id(a) in wanted]


def _is_given(a: Array) -> bool:
    return not a.operands


def _is_source(a: Array) -> bool:
    return a.operation in ("lane sum", "outer")


def _sources(a: Array, form: Form) -> dict[int, Array]:
    """The arrays that an array is made of, by their ids."""
    return {id(s): s for o in a.operands for s in form.arrays_of(o.reshape(-1))}


def _before_use(early: list[Array], late: list[Array], form: Form) -> list[Array]:
    """Both, each of the early ones where it is first read, and no longer in memory than it has to be."""
    order = [(a, _sources(a, form)) for a in late]
    for a in reversed(early):
        reader = next((n for n, (_, sources) in enumerate(order) if id(a) in sources), len(order))
        order.insert(reader, (a, _sources(a, form)))
    return [a for a, _ in order]


class _Space:
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


class _Section:
    """The body of one function."""

    def __init__(self, writer, name, arrays, kept, outputs, reads_kept=False):
        self.w, self.form, self.name, self.arrays = writer, writer.form, name, arrays
        self.kept, self.reads_kept = kept, reads_kept
        self.outputs = {k: v for k, v in outputs.items() if v is not None}
        self.wide = name in ("slope", "slope_keeping", "pull_back")
        self.lines: list[str] = []
        self.made = {id(a) for a in arrays}
        self.spaces = {"scratch": _Space(), "u": _Space(), "z": _Space()}
        self.offsets = {}  # of arrays in them: the space, where they begin, and their size
        self.copies = []  # the same of what one statement reads
        made = [*arrays, *(a for slots in self.outputs.values() for a in self.form.arrays_of(slots))]
        self.sources = {id(a): _sources(a, self.form) for a in made}
        self.tables: list[str] = []
        self.count = 0
        self.plan()

    # ---- places ----------------------------------------------------------------------------

    def plan(self):
        """Which arrays are memory, and where."""
        self.memory = set()
        for a in self.arrays:
            if a.size > _FEW or not self.unrolls(a):
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
            return a.size <= _FEW
        if a.operation.startswith("reduce") or a.operation == "contract":
            return a.size <= _FEW and a.operands[0].size <= _FEW_TERMS
        if a.operation == "product":
            weights, x = a.operands
            return a.size <= _FEW and weights.size * len(x) <= _FEW_TERMS
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
            return _literal(a.values[slot - a.base])
        space, at = self.address(slot)
        if space == "t":
            return "t"
        if space == "v":
            return f"v{slot}"
        text = f"{space}[{at}]"
        return f"({text} != Real(0))" if a.boolean else text

    def is_lanes(self, slot: int) -> bool:
        return self.form.arrays[int(self.form.array_numbers(np.array([slot]))[0])].kind == Kind.LANES

    # ---- statements ------------------------------------------------------------------------

    def text(self) -> str:
        self.write_arrays([a for a in self.arrays if not _is_given(a)])
        self.write_outputs()
        declared = [f"Real {name}[{self.spaces[name].size}];" for name in "uz" if self.spaces[name].size]
        return "".join(f"    {line}\n" for line in [*self.tables, *declared, *self.lines])

    def write_arrays(self, arrays):
        """All of them, loops shared where they can be; the places of those that nobody reads any more are free."""
        groups = self.grouped(arrays)
        last = {}
        for n, group in enumerate(groups):
            last |= {i: n for a in group for i in [id(a), *self.sources[id(a)]]}
        for slots in [*self.outputs.values(), *self.final_slots()]:
            for a in self.form.arrays_of(slots):
                read = [id(a), *(self.sources[id(a)] if a.kind == Kind.SUM and id(a) in self.sources else ())]
                last |= dict.fromkeys(read, len(groups))
        for n, group in enumerate(groups):
            if group[0].operation not in POINTWISE or self.unrolls(group[0]):
                self.write_one(group[0])
            else:
                self.write_loop(group, [a for later in groups[n + 1 :] for a in later])
            ended = [i for i in self.offsets if last[i] == n]
            for space, begin, size in [*(self.offsets.pop(i) for i in ended), *self.copies]:
                self.spaces[space].give_back(begin, size)
            self.copies.clear()

    def grouped(self, arrays) -> list[list[Array]]:
        """Arrays in the order in which they are made; those that share a loop are together."""
        waiting, done = list(arrays), {id(a) for a in self.form.arrays} - {id(a) for a in arrays}
        groups = []
        while waiting:
            group = [waiting[0]]
            if group[0].operation in POINTWISE and not self.unrolls(group[0]):
                for a in waiting[1:]:
                    if a.operation in POINTWISE and a.size == group[0].size and self.joins(a, group, done):
                        group.append(a)
            chosen = {id(a) for a in group}
            waiting = [a for a in waiting if id(a) not in chosen]
            groups.append(group)
            done |= chosen
        return groups

    def joins(self, a, group, done):
        """Whether an operation is done in the loop of others: what it reads is there or made in the same turn, and
        is what they work on, so that it is not brought from memory for this one alone."""
        inside, reads = {id(g) for g in group}, self.sources[id(a)]
        wide = a.kind == Kind.LANES
        if not reads.keys() <= done | inside or wide != (group[0].kind == Kind.LANES) or self.unrolls(a):
            return False
        shared = inside.union(*(self.sources[id(g)] for g in group))
        if wide and not any(i in shared for i, source in reads.items() if source.kind == Kind.LANES):
            return False
        for o in a.operands:
            for s in self.form.arrays_of(o):
                if id(s) in inside and not (o == s.slots).all():
                    return False
        return True

    def write_one(self, a: Array):
        if a.operation == "lane sum":
            return self.write_lane_sum(a)
        if a.operation == "outer":
            return self.write_outer(a)
        if not self.unrolls(a):
            if a.operation == "product":
                return self.write_product(a)
            return self.write_reduction(a)
        for i in range(a.size):
            self.assign(a, i, self.expression_of(a, i))

    def assign(self, a: Array, i: int, expression: str):
        space, at = self.place(a)
        if space == "v":
            kind = "auto" if a.boolean else "V" if a.kind == Kind.LANES else "Real"
            self.lines.append(f"const {kind} v{a.base + i} = {expression};{self.comment(a, i)}")
            if id(a) in self.kept:
                self.lines.append(f"kept[{self.kept[id(a)] + i}] = {self.stored(a, f'v{a.base + i}')};")
        else:
            self.lines.append(f"{space}[{at + i}] = {self.stored(a, expression)};{self.comment(a, i)}")
        if id(a) in self.w.at_once and id(a) in self.w.sum_offset:
            self.lines.append(f"sums[{self.w.sum_offset[id(a)] + i}] += {self.ref(a.base + i)};")

    def comment(self, a, i):
        return f"  // {a.line.split(': ', 1)[-1]}" if i == 0 and a.line else ""

    def stored(self, a, expression):
        if not a.boolean:
            return expression
        wide = "V" if a.kind == Kind.LANES else "Real"
        return f"select({expression}, splat<{wide}>(Real(1)), zero<{wide}>())"

    def expression_of(self, a: Array, i: int) -> str:
        if a.operation in POINTWISE:
            return self.apply(a, [(self.ref(o[i]), self.is_lanes(o[i])) for o in a.operands])
        if a.operation.startswith("reduce"):
            return self.folded(a.operation[7:], [self.ref(s) for s in a.operands[0][i]], a.kind == Kind.LANES)
        if a.operation == "contract":
            left, right = a.operands
        else:
            weights, x = a.operands
            r, m = divmod(i, len(weights))
            left, right = weights[m][None], x[r][None]
            i = 0
        pairs = [(p, q) for p, q in zip(left[i], right[i]) if p and q]
        terms = [f"{self.ref(p)} * {self.ref(q)}" for p, q in pairs]
        return " + ".join(terms) or "zero<V>()"

    def apply(self, a: Array, operands: list[tuple[str, bool]]) -> str:
        """The expression of a pointwise operation; functions want all their operands alike."""
        wide = a.kind == Kind.LANES
        texts = []
        for position, (text, lanes) in enumerate(operands):
            is_mask = self.form.arrays_of(a.operands[position][:1])[0].boolean
            if wide and not lanes and a.operation in FUNCTIONS:
                text = f"(splat<V>(Real({text})) != Real(0))" if is_mask else f"splat<V>({text})"
            texts.append(f"({text})" if text.startswith("-") else text)
        return POINTWISE[a.operation].format(*texts).replace("<W>", "<V>" if wide else "<Real>")

    def folded(self, how, terms, wide):
        if how in ("sum", "prod"):
            return (" + " if how == "sum" else " * ").join(terms)
        out = terms[0]
        for term in terms[1:]:
            out = f"{how}({out}, {term})"
        return out

    # ---- loops -----------------------------------------------------------------------------

    def write_loop(self, group: list[Array], later: list[Array]):
        """Pointwise operations on arrays of one length."""
        n, inside = group[0].size, {id(a) for a in group}
        columns, places = [], {}
        for a in group:
            for o in a.operands:
                if self.form.arrays_of(o)[0] and {id(s) for s in self.form.arrays_of(o)} & inside:
                    continue
                if (o == o[0]).all() or o.tobytes() in places:
                    continue
                places[o.tobytes()] = len(columns)
                columns.append(self.located(o))
        sizes, strides = self.nest_of([at for _, at in columns], n)
        variables = [f"i{level}" for level in range(len(sizes))]
        index = _sum_of(variables, _row_major(sizes))
        for variable, size in zip(variables, sizes):
            self.lines.append(f"for (int {variable} = 0; {variable} < {size}; ++{variable}) {{")
        texts = [
            f"{space}[{self.at(at, variables, strides[j], index)}]" for j, (space, at) in enumerate(columns)
        ]
        read_later = self.read_after(group, later)
        for a in group:
            operands = []
            for o in a.operands:
                source = self.form.arrays[int(self.form.array_numbers(o[:1])[0])]
                lanes = source.kind == Kind.LANES
                if id(source) in inside:
                    text = f"v{source.base}"
                elif (o == o[0]).all():
                    text = self.ref(o[0])
                else:
                    text = texts[places[o.tobytes()]]
                    text = f"({text} != Real(0))" if source.boolean else text
                operands.append((text, lanes))
            kind = "auto" if a.boolean else "V" if a.kind == Kind.LANES else "Real"
            self.lines.append(f"  const {kind} v{a.base} = {self.apply(a, operands)};{self.comment(a, 0)}")
            if id(a) in read_later:
                space, at = self.place(a)
                self.lines.append(f"  {space}[{at} + {index}] = {self.stored(a, f'v{a.base}')};")
                if id(a) in self.w.at_once and id(a) in self.w.sum_offset:
                    self.lines.append(f"  sums[{self.w.sum_offset[id(a)]} + {index}] += v{a.base};")
        self.lines.append("}" * len(sizes))

    def read_after(self, group, later):
        """Which of a group others read."""
        wanted = set(self.kept) if not self.reads_kept else set()
        wanted |= self.w.at_once
        for slots in [
            *(o.reshape(-1) for a in later for o in a.operands),
            *self.outputs.values(),
            *self.final_slots(),
        ]:
            wanted |= {id(s) for s in self.form.arrays_of(slots)}
        if self.name == "prepare":
            wanted |= {id(a) for a in group}
        return wanted

    def final_slots(self):
        """Outputs that are added to accumulators or to the caller's gradients."""
        prefix = {"pull_back": "of own", "finish": "of input"}.get(self.name)
        return [s for name, s in self.form.outputs.items() if prefix and name.startswith(prefix)]

    def located(self, slots):
        """Where slots lie in one space; they are brought together if they lie in several."""
        found = self.addresses(slots)
        return found if found is not None else self.gather(slots)

    def gather(self, slots):
        """A copy of slots from different spaces."""
        wide = any(a.kind == Kind.LANES for a in self.form.arrays_of(slots))
        if not wide and self.name == "prepare":
            space, offset = "prepared", self.w.prepared_size
            self.w.prepared_size += slots.size
        else:
            space = "scratch" if wide else "u"
            offset = self.spaces[space].take(slots.size)
            self.copies.append((space, offset, slots.size))
        numbers = self.form.array_numbers(slots)
        begin = 0
        while begin < slots.size:
            end = begin + 1
            while end < slots.size and numbers[end] == numbers[begin]:
                end += 1
            self.copy_run(slots[begin:end], space, offset + begin, wide)
            begin = end
        return space, np.arange(offset, offset + slots.size)

    def copy_run(self, slots, space, at, wide, form="{}"):
        found = None if slots.size <= 4 else self.addresses(slots)
        if found is None:
            for i, slot in enumerate(slots):
                text = self.ref(slot)
                text = f"splat<V>({text})" if wide and not self.is_lanes(slot) else text
                self.lines.append(f"{space}[{at + i}] = {form.format(text)};")
            return
        source, places = found
        sizes, strides = self.nest_of([places], slots.size)
        variables = [f"i{level}" for level in range(len(sizes))]
        index = _sum_of(variables, _row_major(sizes))
        text = f"{source}[{self.at(places, variables, strides[0], index)}]"
        text = f"splat<V>({text})" if wide and not self.is_lanes(slots[0]) else text
        loops = " ".join(f"for (int {v} = 0; {v} < {n}; ++{v})" for v, n in zip(variables, sizes))
        self.lines.append(f"{loops} {space}[{at} + {index}] = {form.format(text)};")

    def nest_of(self, columns, n):
        """Sizes of nested loops over n, and for each column of addresses its strides; None for one that needs a table."""
        if not columns:
            return [n], []
        nest = _nest(np.stack(columns))
        if nest is not None and len(nest[0]) <= 4:
            return nest[0], [list(s) for s in np.array(nest[1]).T]
        return [n], [
            None if (single := _nest(c[None])) is None or len(single[0]) > 1 else [single[1][0][0]]
            for c in columns
        ]

    def at(self, addresses, variables, strides, index) -> str:
        """An address as an expression of the loop variables."""
        if strides is None:
            table = f"at{self.name}{len(self.tables)}"
            values = ", ".join(map(str, addresses))
            self.tables.append(f"static const int {table}[{addresses.size}] = {{{values}}};")
            return f"{table}[{index}]"
        text = _sum_of(variables, strides)
        base = int(addresses[0])
        return text if base == 0 else f"{base} + {text}" if text != "0" else str(base)

    def rows_at(self, x: np.ndarray) -> tuple[str, int, int]:
        """Space, first address and distance of rows (r, k) that are each contiguous; copied if they are not."""
        found = self.addresses(x.reshape(-1))
        if found is not None:
            space, at = found
            at = at.reshape(x.shape)
            steps = np.diff(at, axis=1)
            starts = np.diff(at[:, 0])
            if (steps == 1).all() and (len(starts) == 0 or (starts == starts[0]).all()):
                return space, int(at[0, 0]), int(starts[0]) if len(starts) else 0
        space, at = self.gather(x.reshape(-1))
        return space, int(at[0]), x.shape[1]

    def write_product(self, a: Array):
        weights, x = a.operands
        m, k = weights.shape
        wide = a.kind == Kind.LANES
        space, at, row, column = self.matrix_at(weights)
        source, first, distance = self.rows_at(x)
        target, to = self.place(a)
        for_rows = f"for (int r = 0; r < {len(x)}; ++r) " if len(x) > 1 else ""
        x_text = f"{source} + {first}" + (f" + r * {distance}" if for_rows else "")
        to_text = f"{target} + {to}" + (f" + r * {m}" if for_rows else "")
        del wide
        self.lines.append(
            f"{for_rows}product<{m}, {k}>({space} + {at}, {row}, {column}, {x_text}, {to_text});{self.comment(a, 0)}"
        )
        self.also_accumulated(a, target, to)

    def matrix_at(self, weights):
        """Space, first address and both strides of a matrix; a copy if it has none."""
        m, k = weights.shape
        found = self.addresses(weights.reshape(-1))
        if found is not None:
            space, at = found
            at = at.reshape(m, k)
            row = int(at[1, 0] - at[0, 0]) if m > 1 else k
            column = int(at[0, 1] - at[0, 0]) if k > 1 else 1
            if (at == at[0, 0] + row * np.arange(m)[:, None] + column * np.arange(k)).all():
                return space, int(at[0, 0]), row, column
        space, at = self.gather(weights.reshape(-1))
        return space, int(at[0]), k, 1

    def write_reduction(self, a: Array):
        """Sums, products or extremes along rows, by loops."""
        count, r = a.operands[0].shape
        texts, columns = [], [self.located(o.reshape(-1)) for o in a.operands]
        kind = "V" if a.kind == Kind.LANES else "Real"
        places = [at.reshape(count, r) for _, at in columns]
        target, to = self.place(a)
        for (space, _), at, o in zip(columns, places, a.operands):
            row = int(at[1, 0] - at[0, 0]) if count > 1 else 0
            step = int(at[0, 1] - at[0, 0]) if r > 1 else 0
            if not (at == at[0, 0] + row * np.arange(count)[:, None] + step * np.arange(r)).all():
                table = f"at{self.name}{len(self.tables)}"
                values = ", ".join(map(str, at.reshape(-1)))
                self.tables.append(f"static const int {table}[{at.size}] = {{{values}}};")
                texts.append(f"{space}[{table}[i * {r} + j]]")
            else:
                texts.append(f"{space}[{_sum_of(['1', 'i', 'j'], [int(at[0, 0]), row, step])}]")
        how = "sum" if a.operation == "contract" else a.operation[7:]
        term = " * ".join(texts)
        step = {"sum": "total = total + {}", "prod": "total = total * {}"}.get(
            how, how.join(["total = ", "(total, {})"])
        )
        self.lines += [
            f"for (int i = 0; i < {count}; ++i) {{{self.comment(a, 0)}",
            f"  {kind} total; {{ const int j = 0; total = {term}; }}"
            if "j" in term
            else f"  {kind} total = {term};",
            f"  for (int j = 1; j < {r}; ++j) {step.format(term)};",
            f"  {target}[{to} + i] = total;",
            "}",
        ]
        self.also_accumulated(a, target, to)

    def also_accumulated(self, a, target, to):
        """What is made in every evaluation, and summed over all of them."""
        if id(a) in self.w.at_once and id(a) in self.w.sum_offset:
            offset = self.w.sum_offset[id(a)]
            self.lines.append(f"for (int i = 0; i < {a.size}; ++i) sums[{offset} + i] += {target}[{to} + i];")

    # ---- sums over samples -----------------------------------------------------------------

    def write_lane_sum(self, a: Array):
        (slots,) = a.operands
        if id(a) in self.w.lane_sum_offset:
            offset = self.w.lane_sum_offset[id(a)]
            found = None if a.size <= _FEW else self.addresses(slots)
            nest = None if found is None else _nest(found[1][None])
            if nest is None or len(nest[0]) != 1:
                for i, slot in enumerate(slots):
                    self.lines.append(
                        f"lane_sums[{offset + i}] = lane_sums[{offset + i}] + {self.ref(slot)};"
                    )
            else:
                text = f"{found[0]}[{_sum_of(['1', 'i'], [int(found[1][0]), int(nest[1][0][0])])}]"
                self.lines.append(
                    f"for (int i = 0; i < {a.size}; ++i) lane_sums[{offset} + i] = lane_sums[{offset} + i] + {text};"
                )
        if id(a) not in self.w.at_once:
            return
        if a.size <= _FEW:
            for i, slot in enumerate(slots):
                self.assign(a, i, f"sum_of_lanes({self.ref(slot)})")
            return
        target, to = self.place(a)
        source, at = self.located(slots)
        if (np.diff(at) == 1).all():
            self.lines.append(
                f"sums_of_lanes<{a.size}>({source} + {at[0]}, {target} + {to});{self.comment(a, 0)}"
            )
        else:
            self.copy_run(slots, target, to, True, "sum_of_lanes({})")
        self.also_accumulated(a, target, to)

    def write_outer(self, a: Array):
        g, x = a.operands
        m, k = g.shape[1], x.shape[1]
        by_lane = id(a) in self.w.lane_sum_offset
        (space_g, first_g, step_g), (space_x, first_x, step_x) = self.rows_at(g), self.rows_at(x)
        target, to = ("lane_sums", self.w.lane_sum_offset[id(a)]) if by_lane else self.place(a)
        if target not in ("sums", "lane_sums"):
            self.lines.append(f"for (int i = 0; i < {a.size}; ++i) {target}[{to} + i] = Real(0);")
        rows = f"for (int r = 0; r < {len(g)}; ++r) " if len(g) > 1 else ""
        more_g, more_x = (f" + r * {s}" if rows else "" for s in (step_g, step_x))
        self.lines.append(
            f"{rows}{'outer_lanes' if by_lane else 'outer'}<{m}, {k}>({space_g} + {first_g}{more_g}, {space_x} + {first_x}{more_x}, "
            f"{target} + {to}{'' if by_lane else f', {k}, 1'});{self.comment(a, 0)}"
        )
        self.also_accumulated(a, target, to)

    # ---- results ---------------------------------------------------------------------------

    def write_outputs(self):
        for name, slots in self.outputs.items():
            if any(self.direct.get(id(a)) == name for a in self.form.arrays_of(slots)):
                continue
            if name == "adj_t" and not self.w.own_clocks:
                self.write_time_gradient(int(slots[0]))
                continue
            self.write_copies(slots, name, 0, "{to} = {value};")
        if self.name == "pull_back":
            missing = [name for name in ("adj_y", "adj_t") if name not in self.outputs]
            width = next(a.size for a in self.form.arrays if a.operation == "y")
            for name in missing:
                self.lines.append(
                    f"for (int i = 0; i < {width if name == 'adj_y' else 1}; ++i) {name}[i] = zero<V>();"
                )
            for name, slots in self.form.outputs.items():
                if name.startswith("of own "):
                    self.write_copies(
                        slots, "adj_own", self.w.own_offset[int(name[7:])], "{to} = {to} + {value};"
                    )
        if self.name == "finish":
            for name, slots in self.form.outputs.items():
                if name.startswith("of input ") and slots.any():
                    number = name[9:]
                    self.lines.append(f"if (gradients[{number}] != nullptr) {{")
                    self.write_copies(slots, f"gradients[{number}]", 0, "{to} += {value};")
                    self.lines.append("}")

    def write_time_gradient(self, slot):
        a = self.form.arrays_of(np.array([slot]))[0]
        if a.kind != Kind.SUM:
            self.lines.append("adj_t[0] = zero<V>();")
        elif id(a) in self.w.at_once:
            self.lines.append(f"adj_t[0] = zero<V>(); set_lane(adj_t[0], 0, {self.ref(slot)});")
        else:
            self.lines.append(f"adj_t[0] = {self.ref(int(a.operands[0][slot - a.base]))};")

    def write_copies(self, slots, target, offset, statement):
        wide = self.wide
        found = None if slots.size <= _FEW else self.addresses(slots)
        if found is not None and not any(a.boolean for a in self.form.arrays_of(slots)):
            space, at = found
            sizes, strides = self.nest_of([at], slots.size)
            variables = [f"i{level}" for level in range(len(sizes))]
            index = _sum_of(variables, _row_major(sizes))
            value = f"{space}[{self.at(at, variables, strides[0], index)}]"
            value = f"splat<V>({value})" if wide and not self.is_lanes(slots[0]) else value
            loops = " ".join(f"for (int {v} = 0; {v} < {n}; ++{v})" for v, n in zip(variables, sizes))
            self.lines.append(f"{loops} {statement.format(to=f'{target}[{offset} + {index}]', value=value)}")
            return
        for i, slot in enumerate(slots):
            value = self.ref(slot)
            value = f"splat<V>({value})" if wide and not self.is_lanes(slot) else value
            if not (slot == 0 and "+" in statement):
                self.lines.append(statement.format(to=f"{target}[{offset + i}]", value=value))


# ---- text --------------------------------------------------------------------------------------


def _literal(x: float) -> str:
    if x != x:
        return "Real(NAN)"
    if x in (float("inf"), float("-inf")):
        return "Real(INFINITY)" if x > 0 else "Real(-INFINITY)"
    return f"Real({float(x)!r})"


def _sum_of(names, factors) -> str:
    terms = []
    for name, factor in zip(names, factors):
        if factor:
            terms.append(str(factor) if name == "1" else name if factor == 1 else f"{factor} * {name}")
    return " + ".join(terms) or "0"


def _row_major(sizes) -> list[int]:
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.insert(0, strides[0] * size)
    return strides


def _nest(columns: np.ndarray):
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
    outer = _nest(blocks[:, :, 0])
    if outer is None:
        return None
    return outer[0] + [inner], outer[1] + [steps[:, 0]]

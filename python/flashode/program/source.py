"""From the `Form` of a field to C++: the struct ``Field`` that the templates of csrc/compiled take."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .ir import Array, Form, Kind
from .places import Space
from .section import Section

_THIN, _MOST_LANE_SUMS = 16, 16384
_LOOPS = re.compile(r"\b(for \(|product<|outer(_lanes)?<)")
_INLINE = 40  # statements of a function that is copied to all places where it is called
_CHEAP = frozenset(
    "neg add sub mul square cube abs relu maximum minimum where copy as_real gt ge lt le eq ne".split()
)


@dataclass(frozen=True)
class Fields:
    """The C++ of a field, and what the caller has to know of it."""

    text: str
    own: list[
        tuple[int, int, int]
    ]  # of each constant of a sample: input, position, distance of the next sample's
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
            needs_time = (
                any(s.kind == Kind.UNIFORM for o in a.operands for s in form.arrays_of(o.reshape(-1)))
                and not a.sums_samples
            )
            if needs_time or any(id(user) in self.at_once for user in used[id(a)]):
                self.at_once.add(id(a))
            elif id(a) in final and a.operation != "lane sum":
                self.at_once.add(id(a))
        outputs = [s for name, s in form.outputs.items() if name.startswith("of input")]
        ends = {id(a) for s in outputs for a in form.arrays_of(s)}
        self.accumulated = [
            a for a in sums
            if (a.sums_samples or id(a) in self.at_once)
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
        self.late = [a for a in sums if not a.sums_samples and id(a) not in self.at_once]

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
        primal = [a for a in slope if not a.is_given]
        back = [
            a for a in form.arrays
            if a.adjoint and not a.is_given and not (a.kind == Kind.SUM and id(a) not in self.at_once and not a.sums_samples)
        ]  # fmt: skip
        for a in form.arrays:
            if a.kind == Kind.PREPARED:
                self.prepared[id(a)] = self.prepared_size
                self.prepared_size += a.size
        kept, kept_space, uniform = {}, Space(), []
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
        f_only = Section(
            self, "slope", self.forward(primal) if self.gradients else primal, {}, {"f": form.outputs["f"]}
        )
        parts = [self.function("slope", f_only)]
        scratch = f_only.spaces["scratch"].size
        if self.gradients:
            keeping = Section(self, "slope_keeping", primal, kept, {"f": form.outputs["f"]})
            parts.append(self.function("slope_keeping", keeping))
            outputs = {"adj_y": form.outputs.get("of_y"), "adj_t": form.outputs.get("of_t")}
            pulling = Section(self, "pull_back", uniform + back, kept, outputs, reads_kept=True)
            parts.append(self.function("pull_back", pulling))
            scratch = max(scratch, *(section.spaces["scratch"].size for section in (keeping, pulling)))
        preparing = Section(self, "prepare", [a for a in form.arrays if a.kind == Kind.PREPARED], {}, {})
        derive = preparing.text()  # last: sections may ask for packed copies
        width = next(a.size for a in form.arrays if a.operation == "y")
        timed = any(
            a.operation == "t" for a in self.form.arrays_of(self.read_slots(primal + back + self.late))
        )
        finish = Section(self, "finish", self.late, {}, {}).text() if self.gradients else ""
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
        long ones, and of loops, would only take the compiler's time."""
        body = section.text()
        head = "const Real* prepared, const V* own, Time t, const V* y, "
        head += {
            "slope": "V* f, V* scratch",
            "slope_keeping": "V* f, V* kept, V* scratch",
            "pull_back": "const V* kept, const V* adj, V* adj_y, V* adj_t, V* adj_own, V* lane_sums, Real* sums, V* scratch",
        }[name]
        head = ",\n      ".join(f"[[maybe_unused]] {part}" for part in head.split(", "))
        small = body.count("\n") <= _INLINE and not _LOOPS.search(body)
        kind = "FLASHODE_HD" if small else "FLASHODE_APART"
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
        at_hand = {id(a) for a in self.form.arrays if a.is_given or a.kind < Kind.LANES}
        again = set()
        for a in primal:
            if a.kind != Kind.LANES or id(a) not in needed:
                continue
            if a.operation in _CHEAP and self.form.sources_of(a).keys() <= at_hand:
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
        return [a for a in self.form.arrays if id(a) in wanted and not a.is_given]

    def forward(self, primal) -> list[Array]:
        """What the slope alone needs."""
        wanted = {id(a) for a in self.form.arrays_of(self.form.outputs["f"])}
        for a in reversed(primal):
            if id(a) in wanted:
                for o in a.operands:
                    wanted |= {id(s) for s in self.form.arrays_of(o.reshape(-1))}
        return [a for a in primal if id(a) in wanted]


def _before_use(early: list[Array], late: list[Array], form: Form) -> list[Array]:
    """Both, each of the early ones where it is first read, and no longer in memory than it has to be."""
    order = [(a, form.sources_of(a)) for a in late]
    for a in reversed(early):
        reader = next((n for n, (_, sources) in enumerate(order) if id(a) in sources), len(order))
        order.insert(reader, (a, form.sources_of(a)))
    return [a for a, _ in order]

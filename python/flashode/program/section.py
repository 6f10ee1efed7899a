"""The statements of a generated function.

Few numbers become variables of their own, many are loops over arrays in work space. Pointwise operations on arrays of
one length share a loop where one reads what the other has just made.
"""

from __future__ import annotations

import numpy as np

from .ir import Array, Kind
from .loops import nest, row_major, sum_of
from .operations import FUNCTIONS, POINTWISE
from .places import FEW, Places


class Section(Places):
    """The body of one function."""

    # ---- statements ------------------------------------------------------------------------

    def text(self) -> str:
        self.write_arrays([a for a in self.arrays if not a.is_given])
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
        index = sum_of(variables, row_major(sizes))
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
        loops, index, text = self.loops_over(slots, *found, wide)
        self.lines.append(f"{loops} {space}[{at} + {index}] = {form.format(text)};")

    def loops_over(self, slots, space, places, wide) -> tuple[str, str, str]:
        """Loops through slots in one space: their heads, how far they are, and the number there."""
        sizes, strides = self.nest_of([places], slots.size)
        variables = [f"i{level}" for level in range(len(sizes))]
        index = sum_of(variables, row_major(sizes))
        text = f"{space}[{self.at(places, variables, strides[0], index)}]"
        text = f"splat<V>({text})" if wide and not self.is_lanes(slots[0]) else text
        heads = " ".join(f"for (int {v} = 0; {v} < {n}; ++{v})" for v, n in zip(variables, sizes))
        return heads, index, text

    def nest_of(self, columns, n):
        """Sizes of nested loops over n, and for each column of addresses its strides; None for one that needs a table."""
        if not columns:
            return [n], []
        loops = nest(np.stack(columns))
        if loops is not None and len(loops[0]) <= 4:
            return loops[0], [list(s) for s in np.array(loops[1]).T]
        return [n], [
            None if (single := nest(c[None])) is None or len(single[0]) > 1 else [single[1][0][0]]
            for c in columns
        ]

    def at(self, addresses, variables, strides, index) -> str:
        """An address as an expression of the loop variables."""
        if strides is None:
            table = f"at{self.name}{len(self.tables)}"
            values = ", ".join(map(str, addresses))
            self.tables.append(f"static const int {table}[{addresses.size}] = {{{values}}};")
            return f"{table}[{index}]"
        text = sum_of(variables, strides)
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
                texts.append(f"{space}[{sum_of(['1', 'i', 'j'], [int(at[0, 0]), row, step])}]")
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
            found = None if a.size <= FEW else self.addresses(slots)
            loops = None if found is None else nest(found[1][None])
            if loops is None or len(loops[0]) != 1:
                for i, slot in enumerate(slots):
                    self.lines.append(
                        f"lane_sums[{offset + i}] = lane_sums[{offset + i}] + {self.ref(slot)};"
                    )
            else:
                text = f"{found[0]}[{sum_of(['1', 'i'], [int(found[1][0]), int(loops[1][0][0])])}]"
                self.lines.append(
                    f"for (int i = 0; i < {a.size}; ++i) lane_sums[{offset} + i] = lane_sums[{offset} + i] + {text};"
                )
        if id(a) not in self.w.at_once:
            return
        if a.size <= FEW:
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
        found = None if slots.size <= FEW else self.addresses(slots)
        if found is not None and not any(a.boolean for a in self.form.arrays_of(slots)):
            loops, index, value = self.loops_over(slots, *found, wide)
            self.lines.append(f"{loops} {statement.format(to=f'{target}[{offset} + {index}]', value=value)}")
            return
        for i, slot in enumerate(slots):
            value = self.ref(slot)
            value = f"splat<V>({value})" if wide and not self.is_lanes(slot) else value
            if not (slot == 0 and "+" in statement):
                self.lines.append(statement.format(to=f"{target}[{offset + i}]", value=value))

"""From the graph of a field over a batch to the `Form` of one sample.

Every tensor of the graph is replaced by the slots of its elements, and with each the sample that it belongs
to. Operations that only move elements are then done by ATen on those integers. Operations on values become
arrays of the form: once for the elements that no sample has to itself, and once for those of the first
sample, after a look that every other sample has the same. A field that treats samples differently, or
mixes them, is found by that look, element by element.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import CompileError
from .ir import Array, Form, Kind, live
from .operations import COMPARISONS, POINTWISE, REFUSED, SHAPES

aten = torch.ops.aten
_FILLED = frozenset(
    "full_like zeros_like ones_like empty_like new_zeros new_ones new_full new_empty new_empty_strided".split()
)
_SMALL_OUTER = 96  # products that are summed over the lanes at the very end, not in every evaluation


class Mixing(CompileError):
    """A field that samples of the batch do not share, or in which one sees another."""


@dataclass
class Codes:
    """A tensor of slots with samples: each element is slot * stride + sample, where sample 0 is none."""

    codes: torch.Tensor
    boolean: bool = False


def lower(graph, constants, lines, t, y, adj, inputs, own_axes) -> Form:
    """Lowers a traced field.

    Args:
        graph: ``torch.fx.Graph`` of ``(t, y, *inputs) -> f``, or of ``(t, y, adj, *inputs) ->
            (f, of_y, of_t, *of_inputs)``.
        constants: tensors of the graph's ``get_attr`` nodes, by target.
        lines: for messages, the line of the user's code that each node comes from.
        t, y, adj: `given` arrays of sample numbers: for each element of the placeholder the sample that it
            belongs to, counted from 1, or 0; ``adj`` is None for a graph without.
        inputs: tensors of the other placeholders. Values are read of whole numbers alone, which are indices.
        own_axes: by number, the axis of an input along which samples lie.

    Raises:
        Mixing: samples of the batch are not alike, or not apart.
        CompileError: an operation that cannot be generated.
    """
    return _Lowering(graph, constants, lines, t, y, adj, inputs, own_axes).run()


class _Lowering:
    def __init__(self, graph, constants, lines, t, y, adj, inputs, own_axes):
        self.graph, self.constants, self.lines = graph, constants, lines
        self.given = {"t": t, "y": y} | ({} if adj is None else {"adj": adj})
        self.inputs, self.own_axes = inputs, own_axes
        self.samples = max(1, int(y.max())) if y.numel() else 1
        self.stride = self.samples + 1
        self.arrays: list[Array] = []
        self.size = 0
        self.kinds = np.zeros(1024, np.int8)  # of every slot
        self.adjoint = np.zeros(1024, bool)
        self.literals: dict[float, int] = {}
        self.known: dict = {}
        self.own: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.line = ""
        self.literal(0.0)  # slot 0: operations that fill with zeros fill with it

    # ---- arrays ----------------------------------------------------------------------------

    def array(self, size, kind, operation, operands=(), adjoint=False, boolean=False, values=None) -> Array:
        key = (operation, *(o.tobytes() for o in operands), *(o.shape for o in operands))
        if operands and key in self.known:
            return self.known[key]
        a = Array(self.size, size, kind, operation, list(operands), adjoint, boolean, self.line, values)
        self.arrays.append(a)
        self.size += size
        while self.size > len(self.kinds):
            self.kinds = np.concatenate([self.kinds, np.zeros_like(self.kinds)])
            self.adjoint = np.concatenate([self.adjoint, np.zeros_like(self.adjoint)])
        self.kinds[a.base : self.size] = kind
        self.adjoint[a.base : self.size] = adjoint
        if operands:
            self.known[key] = a
        return a

    def literal(self, value: float) -> int:
        key = float(value).hex()
        if key not in self.literals:
            a = self.array(1, Kind.CONSTANT, "constant", values=np.array([float(value)]))
            self.literals[key] = a.base
        return self.literals[key]

    def constant(self, x: torch.Tensor) -> Codes:
        """A tensor whose values are known."""
        if x.is_complex():
            raise self.refusal("complex numbers")
        values, places = np.unique(
            x.detach().cpu().double().numpy(force=True).reshape(-1), return_inverse=True
        )
        slots = np.array([self.literal(v) for v in values], np.int64)
        codes = (
            (slots * self.stride)[places].reshape(tuple(x.shape))
            if x.numel()
            else np.zeros(tuple(x.shape), np.int64)
        )
        return Codes(torch.tensor(codes), x.dtype == torch.bool)

    def operation(self, name, operands, adjoint_of=None, boolean=False, size=None) -> Array:
        """An array whose kind follows from the operands'."""
        slots = np.concatenate([o.reshape(-1) for o in operands])
        kind = Kind(int(self.kinds[slots].max(initial=0)))
        if kind == Kind.CONSTANT:
            kind = Kind.PREPARED
        return self.array(
            len(operands[0]) if size is None else size,
            kind,
            name,
            operands,
            bool(self.adjoint[slots].any()),
            boolean,
        )

    def split(self, codes) -> tuple[np.ndarray, np.ndarray]:
        codes = codes.numpy() if isinstance(codes, torch.Tensor) else codes
        return np.divmod(codes, self.stride)

    def refusal(self, what, remedy="") -> CompileError:
        remedy = remedy or "solve without flashode.compile, or write it with other operations"
        return CompileError(f"func cannot be compiled: {what}{self.at()}; {remedy}")

    def mixing(self, what) -> Mixing:
        return Mixing(f"func treats samples of the batch as one: {what}{self.at()}")

    def at(self) -> str:
        return f", at {self.line}" if self.line else ""

    # ---- the graph -------------------------------------------------------------------------

    def run(self) -> Form:
        values, placeholders = {}, iter([*self.given, *range(len(self.inputs))])
        used = _used(self.graph)
        for node in self.graph.nodes:
            if node not in used and node.op != "placeholder":
                continue
            self.line = self.lines.get(node, "")
            if node.op == "placeholder":
                values[node] = self.placeholder(next(placeholders))
            elif node.op == "get_attr":
                values[node] = self.constants[node.target]
            elif node.op == "call_function":
                if _name(node) in _FILLED:
                    values[node] = self.filled(node)
                else:
                    values[node] = self.call(node.target, *_resolved(node, values))
            elif node.op == "output":
                outputs = [values.get(x) if isinstance(x, torch.fx.Node) else x for x in _flat(node.args[0])]
        return live(Form(self.arrays, self.collect(outputs), self.own))

    def placeholder(self, which) -> Codes:
        if isinstance(which, str):
            samples = self.given[which].numpy().astype(np.int64)
            flat = samples.reshape(-1)
            varies = bool(flat.any())
            order, width = self.by_sample(flat, f"{which}") if varies else (None, flat.size)
            kind = Kind.LANES if varies else Kind.UNIFORM
            a = self.array(width, kind, which, adjoint=which == "adj")
            slots = np.empty(flat.size, np.int64)
            if varies:
                slots[order] = a.slots[None, :]
            else:
                slots[:] = a.slots
            return Codes(torch.from_numpy((slots * self.stride + flat).reshape(samples.shape)))
        x = self.inputs[which]
        shape, boolean = tuple(x.shape), x.dtype == torch.bool
        if not boolean and not x.is_floating_point():
            return x
        if which not in self.own_axes:
            a = self.array(x.numel(), Kind.PREPARED, f"input {which}", boolean=boolean)
            return Codes(torch.from_numpy((a.slots * self.stride).reshape(shape)), boolean)
        places = np.arange(math.prod(shape)).reshape(shape)
        rows = np.moveaxis(places, self.own_axes[which], 0)
        numbers = rows[0].reshape(-1)
        step = (rows[1] - rows[0]).reshape(-1) if len(rows) > 1 else np.zeros_like(numbers)
        a = self.array(numbers.size, Kind.LANES, f"own {which}", boolean=boolean)
        self.own[which] = (numbers, step)
        codes = a.slots.reshape(rows.shape[1:])[None] * self.stride + np.arange(1, len(rows) + 1).reshape(
            -1, *[1] * (len(shape) - 1)
        )
        return Codes(
            torch.from_numpy(np.ascontiguousarray(np.moveaxis(codes, 0, self.own_axes[which]))), boolean
        )

    def collect(self, outputs) -> dict[str, np.ndarray]:
        names = (
            ["f"]
            if "adj" not in self.given
            else ["f", "of_y", "of_t", *(f"of input {i}" for i in range(len(self.inputs)))]
        )
        collected = {}
        for name, value in zip(names, outputs):
            if value is None:
                continue
            value = self.as_codes(value)
            slots, samples = self.split(value.codes.reshape(-1))
            if name == "f" or name == "of_y" or (name == "of_t" and self.given["t"].any()):
                shape = self.given["t" if name == "of_t" else "y"].reshape(-1).numpy()
                collected[name] = self.of_every_sample(slots, samples, shape, name)
            elif name.startswith("of input") and int(name[9:]) in self.own_axes:
                i = int(name[9:])
                places = np.moveaxis(
                    np.arange(slots.size).reshape(tuple(self.inputs[i].shape)), self.own_axes[i], 0
                )
                each = np.empty(slots.size, np.int64)
                each[places.reshape(len(places), -1)] = np.arange(1, len(places) + 1)[:, None]
                collected[f"of own {i}"] = self.of_every_sample(slots, samples, each, name)
            else:
                if samples.any() and self.samples > 1:
                    raise self.mixing("a gradient that samples should share is one sample's")
                if (own := samples != 0).any():
                    slots[own] = self.lane_sums(slots[own][:, None]) // self.stride
                collected[name] = slots
        return collected

    def of_every_sample(self, slots, samples, expected, name):
        """The slots of one sample's part of an output, after a look that all have the same."""
        line, self.line = self.line, ""
        if (wrong := (samples != expected) & (samples != 0)).any():
            b, other = int(expected[wrong][0]) - 1, int(samples[wrong][0]) - 1
            raise self.mixing(f"what sample {b} gets depends on sample {other}")
        order, _ = self.by_sample(expected, name)
        rows = slots[order]
        if (rows != rows[:1]).any() or (self.kinds[rows[0]] == Kind.SUM).any():
            raise self.mixing(
                "samples get different results" if name == "f" else "samples get different gradients"
            )
        self.line = line
        return rows[0]

    def by_sample(self, samples, what):
        """Positions of the elements of each sample in order, shape (samples, n)."""
        counts = np.bincount(samples, minlength=self.stride)[1:]
        if counts.min() != counts.max():
            raise self.mixing(f"{what} is done to some samples only")
        order = np.argsort(samples, kind="stable")[len(samples) - counts.sum() :]
        return order.reshape(self.samples, -1), int(counts[0])

    def as_codes(self, value) -> Codes:
        if isinstance(value, Codes):
            return value
        if isinstance(value, torch.Tensor):
            return self.constant(value)
        if isinstance(value, (bool, int, float)):
            return self.constant(
                torch.tensor(value, dtype=torch.bool if isinstance(value, bool) else torch.float64)
            )
        raise self.refusal(f"an operand of {type(value).__name__}")

    def call(self, target, args, kwargs):
        if target is operator.getitem:
            return args[0][args[1]]
        name = target._schema.name.split("::")[-1] if hasattr(target, "_schema") else str(target)
        if not any(isinstance(x, Codes) for x in _flat((args, list(kwargs.values())))):
            if torch.Tag.nondeterministic_seeded in target.tags:
                raise self.refusal(
                    f"random numbers ({name})", "draw them before the solve and let func read them"
                )
            return target(*args, **kwargs)  # of known values
        if name in REFUSED:
            raise self.refusal(f"{name}: {REFUSED[name]}")
        rule = getattr(self, "do_" + name.lstrip("_"), None)
        if rule is not None:
            return rule(*args, **kwargs)
        if name in SHAPES:
            return self.move(target, args, kwargs)
        if name in POINTWISE:
            return self.pointwise(name, *args, **kwargs)
        raise self.refusal(f"no code can be generated for {target._schema.name}")

    def move(self, target, args, kwargs):
        boolean = next(x.boolean for x in _flat((args, list(kwargs.values()))) if isinstance(x, Codes))

        def bare(x):
            if isinstance(x, Codes):
                return x.codes
            if isinstance(x, (list, tuple)):
                return type(x)(bare(e) for e in x)
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                return self.constant(x).codes
            return x

        kwargs = {
            k: bare(v)
            for k, v in kwargs.items()
            if k not in ("dtype", "memory_format", "device", "layout", "pin_memory")
        }
        result = target(*[bare(a) for a in args], **kwargs)
        if isinstance(result, (list, tuple)):
            return [Codes(r, boolean) for r in result]
        return Codes(result, boolean)

    # ---- pointwise -------------------------------------------------------------------------

    def pointwise(self, name, *operands, alpha=1, boolean=None) -> Codes:
        values = [self.as_codes(x) for x in operands]
        if alpha != 1:
            values[1] = self.pointwise("mul", values[1], alpha)
        if name not in ("where", "logical_and", "logical_or", "logical_not", "as_real", "eq", "ne"):
            values = [self.pointwise("as_real", v, boolean=False) if v.boolean else v for v in values]
        elif name in ("logical_and", "logical_or", "logical_not"):
            values = [v if v.boolean else self.pointwise("as_bool", v) for v in values]
        elif name in ("eq", "ne") and values[0].boolean:
            values = [self.pointwise("as_real", v, boolean=False) if v.boolean else v for v in values]
        elif name == "where" and values[1].boolean != values[2].boolean:
            values[1:] = [self.pointwise("as_real", v, boolean=False) if v.boolean else v for v in values[1:]]
        if boolean is None:
            boolean = name in COMPARISONS or (name in ("where", "copy") and values[-1].boolean)
        codes = torch.broadcast_tensors(*(v.codes for v in values))
        shape = codes[0].shape
        out = self.elements(name, [c.reshape(-1).numpy() for c in codes], boolean)
        return Codes(torch.from_numpy(out).reshape(shape), boolean)

    def elements(self, name, codes: list[np.ndarray], boolean) -> np.ndarray:
        """A pointwise operation on flat codes."""
        out, todo = self.simplified(name, codes)
        if not todo.any():
            return out
        chosen = np.flatnonzero(todo)
        parts = [self.split(c[chosen]) for c in codes]
        samples = self.common_sample([s for _, s in parts])
        for mask in (samples == 0, samples != 0):
            if not mask.any():
                continue
            slots = [s[mask] for s, _ in parts]
            if samples[mask][0] == 0:
                rows, places = np.unique(np.stack(slots), axis=1, return_inverse=True)
                self.require_linear(name, rows)
                a = self.operation(name, list(rows), boolean=boolean)
                out[chosen[mask]] = (a.base + places.reshape(-1)) * self.stride
                continue
            order, width = self.by_sample(samples[mask], name)
            operands = [self.alike(s[order], name) for s in slots]
            a = self.operation(name, operands, boolean=boolean)
            if a.kind == Kind.SUM:
                raise self.mixing(f"{name} of a sum over samples with one sample's own numbers")
            values = np.empty(order.size, np.int64)
            values[order] = a.slots[None, :] * self.stride + np.arange(1, self.stride)[:, None]
            out[chosen[mask]] = values
        return out

    def simplified(self, name, codes):
        """Elements that need no operation: sums with the zeros that padding and slicing bring, and what
        follows from cotangents that are zero."""
        todo = np.ones(codes[0].size, bool)
        out = np.zeros(codes[0].size, np.int64)
        zero, one = 0, self.literals.get(float(1).hex(), -1) * self.stride
        if name in ("add", "sub"):
            out = np.where(codes[1] == zero, codes[0], out)
            todo &= codes[1] != zero
            if name == "add":
                use = todo & (codes[0] == zero)
                out = np.where(use, codes[1], out)
                todo &= ~use
        elif name in ("mul", "div"):
            use = codes[1] == one
            out = np.where(use, codes[0], out)
            todo &= ~use
            if name == "mul":
                use = todo & (codes[0] == one)
                out = np.where(use, codes[1], out)
                todo &= ~use
                for x, other in (codes, codes[::-1]):
                    dead = todo & (x == zero) & self.adjoint[other // self.stride]
                    todo &= ~dead  # out is zero there
        elif name == "neg":
            todo &= codes[0] != zero
        elif name == "copy":
            return codes[0].copy(), np.zeros_like(todo)
        elif name == "as_real":
            known = self.kinds[codes[0] // self.stride] == Kind.CONSTANT
            out, todo = np.where(known, codes[0], out), todo & ~known
        return out, todo

    def common_sample(self, samples):
        """The one sample that each element is of; 0 for none."""
        common = np.maximum.reduce(samples)
        for s in samples:
            if (wrong := (s != common) & (s != 0)).any():
                a, b = int(s[wrong][0]) - 1, int(common[wrong][0]) - 1
                raise self.mixing(f"an operation on samples {a} and {b}")
        return common

    def alike(self, rows, name):
        """The first of rows that must be equal."""
        if (rows != rows[:1]).any():
            raise self.mixing(f"{name} takes different numbers for different samples")
        return np.ascontiguousarray(rows[0])

    def require_linear(self, name, rows):
        """Sums over samples are made of a part of the batch at a time: only linear operations may follow."""
        sums = self.kinds[rows] == Kind.SUM
        if not sums.any():
            return
        linear = name in ("add", "sub", "neg", "copy") and (sums | (rows == 0)).all()
        linear |= name == "mul" and (sums.sum(0) <= 1).all()
        linear |= name == "div" and not sums[1].any()
        linear |= name == "where" and not sums[0].any() and (sums[1:] | (rows[1:] == 0)).all()
        if not linear:
            raise self.mixing(f"{name} of a sum over samples")

    def do_to_copy(self, x, dtype=None, **_):
        if dtype is None or dtype.is_floating_point:
            return self.pointwise("as_real", x, boolean=False) if x.boolean else x
        if dtype == torch.bool:
            return x if x.boolean else self.pointwise("as_bool", x)
        raise self.refusal(f"conversion to {dtype}")

    def do_convert_element_type(self, x, dtype):
        return self.do_to_copy(x, dtype=dtype)

    def do_clamp(self, x, min=None, max=None):
        x = x if min is None else self.pointwise("maximum", x, min)
        return x if max is None else self.pointwise("minimum", x, max)

    def do_pow(self, x, power):
        if isinstance(power, (int, float)) and not isinstance(power, bool):
            if power == 0:
                return self.constant(torch.ones(x.codes.shape))
            whole = {1: "copy", 2: "square", 3: "cube", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}.get(
                power
            )
            if whole is not None:
                return self.pointwise(whole, x)
            if power == 4:
                return self.pointwise("square", self.pointwise("square", x))
            if power == -2:
                return self.pointwise("reciprocal", self.pointwise("square", x))
        return self.pointwise("pow", x, power)

    def do_rsub(self, x, other, alpha=1):
        return self.pointwise("sub", other, x, alpha=alpha)

    def do_exp2(self, x):
        return self.pointwise("exp", self.pointwise("mul", x, math.log(2)))

    def do_log2(self, x):
        return self.pointwise("div", self.pointwise("log", x), math.log(2))

    def do_log10(self, x):
        return self.pointwise("div", self.pointwise("log", x), math.log(10))

    def do_div(self, x, y, rounding_mode=None):
        if rounding_mode == "floor":
            return self.floor_of_quotient(x, y)
        q = self.pointwise("div", x, y)
        return q if rounding_mode is None else self.pointwise(rounding_mode, q)

    def floor_of_quotient(self, x, y):
        """By the remainder, as torch does it: the quotient itself may be rounded up to a whole number."""
        whole = self.pointwise("div", self.pointwise("sub", x, self.do_remainder(x, y)), y)
        return self.pointwise(
            "where", self.pointwise("eq", y, 0.0), self.pointwise("div", x, y), self.do_round(whole)
        )

    def do_remainder(self, x, y):
        rest, zero = self.pointwise("fmod", x, y), 0.0
        below = self.pointwise("logical_and", self.pointwise("lt", rest, zero), self.pointwise("gt", y, zero))
        above = self.pointwise("logical_and", self.pointwise("gt", rest, zero), self.pointwise("lt", y, zero))
        other_sign = self.pointwise("logical_or", below, above)
        return self.pointwise("where", other_sign, self.pointwise("add", rest, y), rest)

    def do_round(self, x, decimals=0):
        if decimals:
            raise self.refusal("round to decimals")
        return self.pointwise("round", x)

    def do_isfinite(self, x):
        return self.pointwise("eq", self.pointwise("sub", x, x), 0.0)

    def do_isinf(self, x):
        return self.pointwise("eq", self.pointwise("abs", x), math.inf)

    def do_logical_xor(self, x, y):
        return self.pointwise("ne", *(self.pointwise("as_real", v, boolean=False) for v in (x, y)))

    def do_bitwise_and(self, x, y):
        return self.pointwise("logical_and", x, y)

    def do_bitwise_or(self, x, y):
        return self.pointwise("logical_or", x, y)

    def do_bitwise_not(self, x):
        return self.pointwise("logical_not", x)

    def do_where(self, condition, x, y):
        if isinstance(condition, torch.Tensor):  # known: each element is one of two
            x, y = self.as_codes(x), self.as_codes(y)
            return Codes(torch.where(condition, x.codes, y.codes), x.boolean and y.boolean)
        return self.pointwise("where", condition, x, y)

    def filled(self, node) -> Codes:
        """A tensor of one number, of whose model only the shape counts."""
        value, name = 0.0, _name(node)
        if name.startswith("ones") or name.endswith("ones"):
            value = 1.0
        elif "full" in name:
            value = node.args[-1]
        shape = node.meta["shape"]
        return self.constant(
            torch.full(shape, value, dtype=torch.bool if isinstance(value, bool) else torch.float64)
        )

    def do_fill(self, x, value):
        value = self.as_codes(value)
        return Codes(value.codes.expand(self.as_codes(x).codes.shape), value.boolean)

    def do_scalar_tensor(self, value, **_):
        return self.as_codes(value)

    def do_copy(self, x, source, non_blocking=False):
        source = self.as_codes(source)
        return Codes(source.codes.expand(self.as_codes(x).codes.shape), source.boolean)

    def do_constant_pad_nd(self, x, pad, value=0):
        inside = aten.constant_pad_nd(torch.ones(x.codes.shape, dtype=torch.bool), pad, False)
        filler = self.as_codes(float(value)).codes
        return Codes(torch.where(inside, aten.constant_pad_nd(x.codes, pad, 0), filler), x.boolean)

    def do_cumsum(self, x, dim, dtype=None):
        return self.cumulated("add", x, dim)

    def do_cumprod(self, x, dim, dtype=None):
        return self.cumulated("mul", x, dim)

    def cumulated(self, name, x, dim):
        rows = [Codes(c) for c in x.codes.unbind(dim)]
        for i in range(1, len(rows)):
            rows[i] = self.pointwise(name, rows[i - 1], rows[i])
        return Codes(torch.stack([r.codes for r in rows], dim)) if rows else x

    def do_view(self, x, shape):
        if not isinstance(shape, (list, tuple)):
            raise self.refusal(f"a view as {shape}")
        return Codes(x.codes.reshape(shape), x.boolean)  # strides are of no account here

    do_unsafe_view = do_reshape = do_view

    def do_index_put(self, x, indices, values, accumulate=False):
        if any(isinstance(i, Codes) for i in indices):
            raise self.refusal("an index that is computed")
        x, values = self.as_codes(x), self.as_codes(values)
        places = torch.arange(x.codes.numel()).view(x.codes.shape)[
            tuple(slice(None) if i is None else i for i in indices)
        ]
        out, places = x.codes.reshape(-1).clone(), places.reshape(-1)
        source = values.codes.expand(aten.index.Tensor(x.codes, indices).shape).reshape(-1)
        if not accumulate:
            out[places] = source
        while accumulate and len(places):  # one of the elements that go to each place at a time
            order = torch.argsort(places, stable=True)
            first = torch.ones(len(places), dtype=torch.bool)
            first[1:] = places[order][1:] != places[order][:-1]
            now, later = order[first], order[~first]
            total = self.elements("add", [out[places[now]].numpy(), source[now].numpy()], False)
            out[places[now]] = torch.from_numpy(total)
            places, source = places[later], source[later]
        return Codes(out.view(x.codes.shape), x.boolean)

    # ---- reductions ------------------------------------------------------------------------

    def do_sum(self, x, dim=None, keepdim=False, dtype=None):
        return self.reduce("sum", x, dim, keepdim)

    def do_mean(self, x, dim=None, keepdim=False, dtype=None):
        total = self.reduce("sum", x, dim, keepdim)
        return self.pointwise("mul", total, total.codes.numel() / x.codes.numel())

    def do_var(self, x, dim=None, correction=1, keepdim=False, **_):
        mean = self.do_mean(x, dim, True)
        total = self.reduce("sum", self.pointwise("square", self.pointwise("sub", x, mean)), dim, keepdim)
        count = x.codes.numel() // max(1, total.codes.numel())
        return self.pointwise("mul", total, 1 / max(count - (1 if correction is None else correction), 0))

    def do_amax(self, x, dim=(), keepdim=False):
        return self.reduce("maximum", x, dim, keepdim)

    def do_amin(self, x, dim=(), keepdim=False):
        return self.reduce("minimum", x, dim, keepdim)

    def do_prod(self, x, dim=None, keepdim=False, dtype=None):
        return self.reduce("prod", x, dim, keepdim)

    def do_any(self, x, dim=None, keepdim=False):
        x = self.pointwise("as_real", x, boolean=False) if x.boolean else self.pointwise("ne", x, 0.0)
        return self.pointwise("as_bool", self.reduce("maximum", x, dim, keepdim))

    def reduce(self, how, x, dim, keepdim) -> Codes:
        if x.boolean:
            x = self.pointwise("as_real", x, boolean=False)
        codes, ndim = x.codes, x.codes.ndim
        dims = [dim] if isinstance(dim, int) else list(dim if dim is not None else [])
        dims = sorted(d % ndim for d in dims) if dims else list(range(ndim))
        kept = [d for d in range(ndim) if d not in dims]
        shape = (
            [1 if d in dims else codes.shape[d] for d in range(ndim)]
            if keepdim
            else [codes.shape[d] for d in kept]
        )
        rows = codes.permute(kept + dims).reshape(math.prod(codes.shape[d] for d in kept), -1)
        return Codes(torch.from_numpy(self.reduced(how, rows.numpy())).reshape(shape))

    def reduced(self, how, rows) -> np.ndarray:
        """One code for each row."""
        if rows.shape[1] == 1 or rows.shape[0] == 0:
            return np.ascontiguousarray(rows[:, 0]) if rows.shape[0] else np.zeros(0, np.int64)
        slots, samples = self.split(rows)
        out, todo = np.zeros(len(rows), np.int64), np.ones(len(rows), bool)
        if how == "sum":  # zeros count for nothing, wherever padding put them
            counts = (slots != 0).sum(1)
            first = (slots != 0).argmax(1)
            out, todo = np.where(counts == 1, rows[np.arange(len(rows)), first], 0), counts > 1
        most = samples.max(1)
        least = np.where(samples == 0, self.stride, samples).min(1)
        least = np.where(most == 0, 0, least)
        over_samples = most != least
        for mask in (over_samples, ~over_samples & (most == 0), ~over_samples & (most != 0)):
            chosen = np.flatnonzero(mask & todo)
            if not chosen.size:
                continue
            if over_samples[chosen[0]]:
                out[chosen] = self.summed_over_samples(how, slots[chosen], samples[chosen])
            elif most[chosen[0]] == 0:
                distinct, places = np.unique(slots[chosen], axis=0, return_inverse=True)
                if (self.kinds[distinct] == Kind.SUM).any() and how != "sum":
                    raise self.mixing(f"{how} of sums over samples")
                a = self.operation(f"reduce {how}", [distinct])
                out[chosen] = (a.base + places.reshape(-1)) * self.stride
            else:
                order, width = self.by_sample(most[chosen], how)
                operand = self.alike(slots[chosen][order].reshape(self.samples, -1), how)
                a = self.operation(f"reduce {how}", [operand.reshape(width, -1)])
                if a.kind == Kind.SUM:
                    raise self.mixing(f"{how} of one sample's numbers with sums over samples")
                values = np.empty(len(chosen), np.int64)
                values[order] = a.slots[None, :] * self.stride + np.arange(1, self.stride)[:, None]
                out[chosen] = values
        return out

    def summed_over_samples(self, how, slots, samples):
        """Sums in which every sample has the same part: of gradients, and nothing else, they make sense."""
        adjoint = self.adjoint[slots].any()
        if how != "sum" or not adjoint:
            raise self.mixing(f"a {how if how != 'sum' else 'sum'} over samples")
        if (samples == 0).any() and (slots[samples == 0] != 0).any():
            raise self.mixing("a sum over samples with numbers of no sample")
        rows = []
        for row, of in zip(slots, samples):
            order, _ = self.by_sample(of, "a sum")
            rows.append(self.alike(row[order], "a sum"))
        return self.lane_sums(np.stack(rows))

    def lane_sums(self, slots) -> np.ndarray:
        """Codes of the sums over samples and over each row of (n, r) slots."""
        if slots.shape[1] > 1:
            slots = self.operation("reduce sum", [slots]).slots[:, None]
        a = self.array(len(slots), Kind.SUM, "lane sum", [np.ascontiguousarray(slots[:, 0])], True)
        return a.slots * self.stride

    # ---- products --------------------------------------------------------------------------

    def do_mm(self, a, b):
        a, b = self.as_codes(a), self.as_codes(b)
        return Codes(torch.from_numpy(self.product(a.codes.numpy(), b.codes.numpy())))

    def do_bmm(self, a, b):
        a, b = (self.as_codes(x).codes.numpy() for x in (a, b))
        if (per_sample := self.batched_products(a, b)) is not None:
            return Codes(torch.from_numpy(per_sample))
        return Codes(torch.from_numpy(np.stack([self.product(x, y) for x, y in zip(a, b)])))

    def do_dot(self, a, b):
        return self.do_sum(self.pointwise("mul", a, b))

    def do_addmm(self, c, a, b, beta=1, alpha=1):
        return self.pointwise("add", self.pointwise("mul", c, beta), self.do_mm(a, b), alpha=alpha)

    def product(self, a, b) -> np.ndarray:
        """Codes of ``a @ b``, (m, k) times (k, n)."""
        (m, k), n = a.shape, b.shape[1]
        if not m * n or not k:
            return np.zeros((m, n), np.int64)
        if k == 1:
            return self.pointwise(
                "mul", *(Codes(torch.from_numpy(np.ascontiguousarray(c))) for c in (a, b))
            ).codes.numpy()
        (slots_a, of_a), (slots_b, of_b) = self.split(a), self.split(b)
        rows, columns = of_a.any(), of_b.any()
        if not rows and columns:
            return self.product(b.T, a.T).T
        if not rows:
            # What broadcasting repeats is computed once, however many samples there are.
            x, row = np.unique(slots_a, axis=0, return_inverse=True)
            weights, column = np.unique(slots_b, axis=1, return_inverse=True)
            return self.of_rows(x, weights)[row.reshape(-1)][:, column.reshape(-1)] * self.stride
        if not columns:
            if self.lies_along(of_a.T) and not self.lies_along(of_a):
                return self.summed_product(slots_a, of_a, slots_b, of_b)
            row_sample = self.row_samples(of_a)
            order, width = self.by_sample(row_sample, "mm")
            if (row_sample == 0).any():  # rows of no sample, among others
                return self.terms(a, b)
            x = self.alike(slots_a[order].reshape(self.samples, -1), "mm").reshape(width, k)
            out = np.empty((m, n), np.int64)
            made = self.of_rows(x, slots_b)
            out[order] = made[None] * self.stride + np.arange(1, self.stride)[:, None, None]
            return out
        return self.summed_product(slots_a, of_a, slots_b, of_b)

    @staticmethod
    def lies_along(samples):
        """Whether each row is of one sample, or of none."""
        return not ((samples != 0) & (samples != samples.max(1)[:, None])).any()

    def row_samples(self, samples):
        most = samples.max(1)
        if not self.lies_along(samples):
            raise self.mixing("a matrix product along the samples")
        return most

    def of_rows(self, x, weights) -> np.ndarray:
        """Slots (r, n) of x (r, k) times weights (k, n)."""
        kinds = self.kinds[weights].max(), self.kinds[x].max()
        if Kind.SUM in kinds and Kind.LANES in kinds:
            raise self.mixing("a product of one sample's numbers and sums over samples")
        if kinds == (Kind.SUM, Kind.SUM):
            raise self.mixing("a product of two sums over samples")
        if (x == 0).all() or (weights == 0).all():
            return np.zeros((len(x), weights.shape[1]), np.int64)
        operands = [np.ascontiguousarray(weights.T), np.ascontiguousarray(x)]
        a = self.operation("product", operands, size=len(x) * weights.shape[1])
        return a.slots.reshape(len(x), -1)

    def summed_product(self, slots_a, of_a, slots_b, of_b):
        """``g^T @ x`` over all rows of all samples: the gradient of weights."""
        along = of_a.max(0)
        if not self.lies_along(of_a.T) or not self.lies_along(of_b):
            return self.terms(slots_a * self.stride + of_a, slots_b * self.stride + of_b)
        if (of_b.any() and (along != of_b.max(1)).any()) or not along.all():
            raise self.mixing("a matrix product along the samples")
        if not (self.adjoint[slots_a].any() or self.adjoint[slots_b].any()):
            raise self.mixing("a matrix product that sums over samples")
        order, width = self.by_sample(along, "mm")
        g = self.alike(slots_a.T[order].reshape(self.samples, -1), "mm").reshape(width, -1)
        x = self.alike(slots_b[order].reshape(self.samples, -1), "mm").reshape(width, -1)
        m, n = g.shape[1], x.shape[1]
        if not of_b.any() and self.samples > 1:
            # The sum over the samples first: what they share is a factor.
            sums = self.lane_sums(np.ascontiguousarray(g.reshape(-1, 1))).reshape(width, m)
            terms = self.pointwise(
                "mul", *(Codes(torch.from_numpy(c)) for c in (sums.T[:, None, :], x.T[None] * self.stride))
            )
            return self.reduced("sum", terms.codes.reshape(m * n, width).numpy()).reshape(m, n)
        if self.samples == 1 or m * n * width <= _SMALL_OUTER:
            pairs = np.broadcast_arrays(g.T[:, None, :], x.T[None, :, :])
            products = self.operation("mul", [np.ascontiguousarray(p.reshape(-1)) for p in pairs]).slots
            products = products.reshape(m * n, width)
            if self.samples > 1:
                return self.lane_sums(products).reshape(m, n)
            total = products[:, 0] if width == 1 else self.operation("reduce sum", [products]).slots
            return (total * self.stride + 1).reshape(m, n)
        a = self.array(m * n, Kind.SUM, "outer", [np.ascontiguousarray(g), np.ascontiguousarray(x)], True)
        return a.slots.reshape(m, n) * self.stride

    def terms(self, a, b):
        """A product entry by entry: where samples lie along both factors' outer dimensions, or within some rows."""
        products = self.pointwise(
            "mul", Codes(torch.from_numpy(a)[:, None, :]), Codes(torch.from_numpy(b).T[None])
        )
        return self.reduced("sum", products.codes.reshape(-1, a.shape[1]).numpy()).reshape(len(a), b.shape[1])

    def batched_products(self, a, b):
        """Codes of a batch of products where each is of one sample alone, else None."""
        (p, m, k), n = a.shape, b.shape[2]
        if not p * m * n * k:
            return np.zeros((p, m, n), np.int64)
        (slots_a, of_a), (slots_b, of_b) = self.split(a), self.split(b)
        both = np.concatenate([of_a.reshape(p, -1), of_b.reshape(p, -1)], 1)
        most = both.max(1)
        if (most == 0).any() or ((both != 0) & (both != most[:, None])).any():
            return None
        order, width = self.by_sample(most, "bmm")
        x = self.alike(slots_a[order].reshape(self.samples, -1), "bmm").reshape(width, m, k)
        w = self.alike(slots_b[order].reshape(self.samples, -1), "bmm").reshape(width, k, n)
        made = []
        for one, other in zip(x, w):
            if not of_b.any():
                made.append(self.of_rows(one, other))
            elif not of_a.any():
                made.append(self.of_rows(other.T, one.T).T)
            else:
                pairs = [np.repeat(one, n, 0), np.tile(other.T, (m, 1))]
                made.append(self.operation("contract", pairs, size=m * n).slots.reshape(m, n))
        out = np.empty((p, m, n), np.int64)
        out[order] = np.stack(made)[None] * self.stride + np.arange(1, self.stride)[:, None, None, None]
        return out


def _name(node) -> str:
    return node.target._schema.name.split("::")[-1] if hasattr(node.target, "_schema") else ""


def _used(graph) -> set:
    """Nodes whose values count: not those of which only the shape does."""
    used = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in used:
            used.add(node)
            if _name(node) not in _FILLED:
                used.update(node.all_input_nodes)
    return used


def _flat(x):
    if isinstance(x, (list, tuple)):
        return [leaf for e in x for leaf in _flat(e)]
    return [x]


def _resolved(node, values):
    """Arguments of a node with the values of others."""

    def resolve(x):
        if isinstance(x, torch.fx.Node):
            return values[x]
        if isinstance(x, (list, tuple)):
            return [resolve(e) for e in x]
        return x

    return [resolve(a) for a in node.args], {k: resolve(v) for k, v in node.kwargs.items()}

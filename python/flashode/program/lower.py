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

import numpy as np
import torch

from .ir import Form, Kind, live
from .operations import POINTWISE, REFUSED, SHAPES
from .rules import Rules
from .samples import Codes

_FILLED = frozenset(
    "full_like zeros_like ones_like empty_like new_zeros new_ones new_full new_empty new_empty_strided".split()
)


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


class _Lowering(Rules):
    def __init__(self, graph, constants, lines, t, y, adj, inputs, own_axes):
        super().__init__(max(1, int(y.max())) if y.numel() else 1)
        self.graph, self.constants, self.lines = graph, constants, lines
        self.given = {"t": t, "y": y} | ({} if adj is None else {"adj": adj})
        self.inputs, self.own_axes = inputs, own_axes
        self.own: dict[int, tuple[np.ndarray, np.ndarray]] = {}

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

"""The elements of a batch by sample: arrays are made of them once for all samples, after a look that they are alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import CompileError
from .ir import Array, Kind
from .operations import COMPARISONS


class Mixing(CompileError):
    """A field that samples of the batch do not share, or in which one sees another."""


@dataclass
class Codes:
    """A tensor of slots with samples: each element is slot * stride + sample, where sample 0 is none."""

    codes: torch.Tensor
    boolean: bool = False


class Samples:
    """Arrays of a form in the making, by pointwise operations and reductions on tensors of a batch.

    Args:
        samples: how many there are.
    """

    def __init__(self, samples: int):
        self.samples, self.stride = samples, samples + 1
        self.arrays: list[Array] = []
        self.size = 0
        self.kinds = np.zeros(1024, np.int8)  # of every slot
        self.adjoint = np.zeros(1024, bool)
        self.literals: dict[float, int] = {}
        self.known: dict = {}
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

    def operation(self, name, operands, boolean=False, size=None) -> Array:
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

    # ---- reductions ------------------------------------------------------------------------

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

"""Operations of ATen that take more than one of ours, or none."""

from __future__ import annotations

import math

import torch

from .products import Products
from .samples import Codes

aten = torch.ops.aten


class Rules(Products):
    """A method ``do_...`` for each of them, called as ATen's operation is."""

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

    do_unsafe_view = do_view

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

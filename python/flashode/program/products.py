"""Matrix products of a batch: of one sample's numbers with what all share, of one's own, or over all samples."""

from __future__ import annotations

import numpy as np
import torch

from .ir import Kind
from .samples import Codes, Samples

_SMALL_OUTER = 96  # products that are summed over the lanes at the very end, not in every evaluation


class Products(Samples):
    """`Samples` with matrix products."""

    def do_mm(self, a, b):
        a, b = self.as_codes(a), self.as_codes(b)
        return Codes(torch.from_numpy(self.product(a.codes.numpy(), b.codes.numpy())))

    def do_bmm(self, a, b):
        a, b = (self.as_codes(x).codes.numpy() for x in (a, b))
        if (per_sample := self.batched_products(a, b)) is not None:
            return Codes(torch.from_numpy(per_sample))
        return Codes(torch.from_numpy(np.stack([self.product(x, y) for x, y in zip(a, b)])))

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

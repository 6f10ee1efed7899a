"""The divergence of a field, which says how fast a flow thins a density out: exactly, or by an estimate."""

from __future__ import annotations

import torch


def exact_divergence(field, t, y, *, frobenius=False):
    """Slope and divergence of a field, by a vector-Jacobian product for every dimension of a sample.

    Args:
        field: callable as ``field(t, y)``; samples must not depend on each other.
        t: 0-d Tensor.
        y: Tensor of shape (B, *event).
        frobenius: whether to give the squared Frobenius norm of the Jacobian too.

    Returns:
        The slope, shaped like ``y``, and the trace of its Jacobian, of shape (B,); with ``frobenius`` the
        squared norm, of shape (B,), as well. All are differentiable where gradients are recorded, and only there.
        Fields that call this can be compiled.

    Example:
        >>> slope, divergence = exact_divergence(lambda t, y: y * y, torch.tensor(0.0), torch.tensor([[1.0, 2.0]]))
        >>> divergence.item()
        6.0
    """

    def measured(slope, products):
        flat = per_sample(slope)
        rows = [per_sample(products(flat[:, i].sum())) for i in range(flat.shape[1])]
        return sum(row[:, i] for i, row in enumerate(rows)), sum(row.square().sum(1) for row in rows)

    return _measure(field, t, y, (), measured, frobenius)


def hutchinson_divergence(field, t, y, noise, *, frobenius=False):
    """Slope and an estimate of the divergence of a field, by one vector-Jacobian product (Hutchinson 1989).

    The estimate is ``noise . J noise``, without bias for noise of mean zero and unit covariance. A solve has to keep
    one noise throughout, or its right-hand side is no function (Grathwohl et al. 2019, FFJORD, arXiv:1810.01367).

    Args:
        field, t, y: as for `exact_divergence`.
        noise: Tensor shaped like ``y``.
        frobenius: whether to give ``|noise J|^2`` too, an estimate of the squared Frobenius norm of the Jacobian.

    Returns:
        As `exact_divergence`.
    """

    def measured(slope, products, noise):
        product = per_sample(products((slope * noise).sum()))
        return (product * per_sample(noise)).sum(1), product.square().sum(1)

    return _measure(field, t, y, (noise,), measured, frobenius)


def per_sample(y):
    """A row of numbers for every sample of y, of shape (B, *event), also where the event is one number."""
    return y[..., None].flatten(1)


def _measure(field, t, y, noise, measured, frobenius):
    """Slope, and what ``measured`` makes of it by gradients of sums to ``y``, kept in graphs only where they are."""
    recorded = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        t, y, *noise = (x.clone() if x.is_inference() else x for x in (t, y, *noise))
        y = y if y.requires_grad else y.detach().requires_grad_()
        slope = field(t, y)

        def products(total):
            if not total.requires_grad:  # a field that is the same everywhere
                return torch.zeros_like(y)
            return torch.autograd.grad(
                total, y, create_graph=recorded, retain_graph=True, materialize_grads=True
            )[0]

        found = slope, *measured(slope, products, *noise)
    if not recorded:
        found = [x.detach() for x in found]
    return tuple(found) if frobenius else tuple(found[:2])

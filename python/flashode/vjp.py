"""Vector-Jacobian products of a field by autograd; ``Vjp::pull_back`` in ``csrc/torch/vjp.h`` is the twin."""

from __future__ import annotations

import torch


def vector_jacobian_products(outputs, inputs, cotangents, create_graph=False) -> tuple:
    """The cotangents of the inputs from those of the outputs, None where an input has no part.

    The graph is kept: a part of it may belong to the caller and be walked again.
    """
    try:
        return torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    except RuntimeError as error:
        if create_graph or "donated buffer" not in str(error):
            raise
    # The backward pass of a field that torch.compile made writes into what it saved, and refuses to
    # begin where that is to be kept. Should the caller walk a part of this graph again, torch will say so.
    return torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)

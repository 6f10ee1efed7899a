"""Gradients of listed tensors that are computed from one another."""

from __future__ import annotations

import torch


def apart(inputs, grads, create_graph=False):
    """The gradient of each input with all others held, from gradients that autograd gave for all at once.

    Where ``z = encoder(x)`` and the encoder's weights are both listed, theirs hold what reaches them
    through z. The caller's graph will carry the gradient of z on to them: it must not be there twice.
    ``inputs`` may hold None, and ``grads`` for inputs without a gradient.
    """
    grads = list(grads)
    made = [i for i, x in enumerate(inputs) if x is not None and x.grad_fn is not None]
    # The last made first: what it passes on to another must be gone from that one's own.
    for i in sorted(made, key=lambda i: inputs[i].grad_fn._sequence_nr(), reverse=True):
        others = [j for j, x in enumerate(inputs) if j != i and x is not None and x.requires_grad]
        if grads[i] is None or not others:
            continue
        passed_on = torch.autograd.grad(
            inputs[i], [inputs[j] for j in others], grads[i],
            retain_graph=True, create_graph=create_graph, allow_unused=True,
        )  # fmt: skip
        for j, share in zip(others, passed_on):
            if share is not None:
                grads[j] = grads[j] - share
    return grads

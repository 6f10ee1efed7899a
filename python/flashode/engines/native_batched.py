"""Samples solved on their own in C++: ``csrc/torch/batched.cpp``, the twin of ``engines/reference_batched.py``."""

from __future__ import annotations

import torch

from .. import extension
from ..batched import BatchOutcome, BatchProblem
from . import native

RECORDS = "gradients per sample are recorded by the reference engine"


def supports(problem: BatchProblem) -> str | None:
    """Why this engine cannot serve a problem, or None."""
    if reason := native.supports(problem):
        return reason
    if torch.is_grad_enabled() and (problem.y0.requires_grad or problem.t.requires_grad):
        return RECORDS
    return None


def solve(problem: BatchProblem) -> BatchOutcome | torch.Tensor:
    """Integrates every sample through its output times. Where the first slope carries gradients nothing is
    solved, and that slope is returned."""
    tableau, dense = native.table_of(problem.method.tableau), native.interpolant_of(problem.dense)
    fields = extension.C.solve_batch(problem, tableau, dense)
    return BatchOutcome(**fields) if isinstance(fields, dict) else fields

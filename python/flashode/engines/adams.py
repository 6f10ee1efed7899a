"""Steps of Adams methods in plain PyTorch: from the slopes that the solve has passed."""

from __future__ import annotations

from collections import deque

import torch

from ..errors import Status
from ..methods.adams import AMPLIFICATION, LEAST_SLOPES, weights
from ..problem import Problem
from ..transforms import require_readable
from .reference import RUNS, Run, StepFailure, combine, scaled_error, weighted_sum, wide


class AdamsRun(Run):
    """The state of one solve: that of a Runge-Kutta method, with which it starts, and past slopes.

    On a uniform grid the formulas are torchdiffeq's. It uses the same weights on every other grid, where
    they are of first order; here they are those of the grid.
    """

    def __init__(self, problem: Problem):
        super().__init__(problem)
        # (time, the zero that carries its gradient or None, slope), newest first.
        self.past = deque(maxlen=max(1, problem.max_order - 1))

    def rk_step(self, f0, t1, dt, shift1):
        """A step from ``(t0, y0)`` to ``t1``; returns ``f0`` and the mean slope, and the candidate ``y1``."""
        self.past.appendleft((self.t0, self.shift0, f0))
        predicting = self.predicting_weights(t1)
        if predicting is None:
            k, y1 = super().rk_step(f0, t1, dt, shift1)
            return [f0, weighted_sum(k, self.b)], y1
        signed_dt = self.p.direction * dt
        if shift1 is not None:
            signed_dt = signed_dt + self.p.direction * (shift1 - self.shift0)
            predicting = weights(self.nodes(t1, shift1))
        mean = weighted_sum(self.slopes, predicting)
        if self.p.method.corrects:
            mean = self.corrected(mean, t1, signed_dt, shift1)
        return [f0, mean], combine(self.y0, [mean], [signed_dt])

    @property
    def slopes(self):
        return [f for _, _, f in self.past]

    def nodes(self, t1, shift1=None):
        """The times of the past slopes on a clock that reads 0 at the start of the step and 1 at its end,
        with the gradients of the times where ``shift1`` is given."""
        nodes = torch.tensor([t - self.t0 for t, _, _ in self.past], dtype=torch.float64)
        if shift1 is None:
            return nodes / (t1 - self.t0)
        shifts = torch.stack([shift - self.shift0 for _, shift, _ in self.past])
        return (nodes + shifts) / (t1 - self.t0 + shift1 - self.shift0)

    def predicting_weights(self, t1):
        """Of the explicit formula, as floats; None where too few slopes serve. The oldest are forgotten
        until the others amplify their errors no more than a uniform grid does."""
        while len(self.past) >= LEAST_SLOPES:
            found = weights(self.nodes(t1)).tolist()
            if sum(map(abs, found)) <= AMPLIFICATION:
                return found
            self.past.pop()
        return None

    def corrected(self, mean, t1, signed_dt, shift1):
        """The mean slope of the implicit formula, by functional iteration from the predicted one."""
        p = self.p
        nodes = self.nodes(t1, shift1)
        first, *others = weights(torch.cat([nodes.new_ones(1), nodes]))
        of_past = weighted_sum(self.slopes, others)
        for _ in range(p.max_iters):
            # parity: the times of both evaluations, and the test, are torchdiffeq's: the last change is
            # within tolerance of the increment, element by element.
            y1 = combine(self.y0, [mean], [signed_dt])
            f1 = self.call(t1, y1, shift1, nudge=-1 if p.perturb else 0)
            before, mean = mean, first * wide(f1) + of_past
            self.error_ratio = self.change(before, mean)
            if self.error_ratio < 1:
                return mean
        self.k, self.y1 = [self.past[0][2], mean], y1
        raise StepFailure(Status.NONCONVERGENCE)

    def change(self, before, after) -> float:
        """The largest part of the tolerance by which two mean slopes move the end of the step apart."""
        before, after = self.dt * before.detach(), self.dt * after.detach()
        require_readable(after, "the corrector of implicit Adams methods")
        ratio = scaled_error(after - before, before, after, self.rtol, self.atol)
        return ratio.abs().max().item() if ratio.numel() else 0.0


RUNS["adams"] = AdamsRun

"""Steps of Adams methods in plain PyTorch: from the slopes that the solve has passed."""

from __future__ import annotations

import itertools
import sys
from collections import deque

import torch

from ..methods.adams import LEAST_SLOPES, amplification, most_amplification, weights, weights_of
from ..problem import Problem
from ..transforms import require_readable
from .element import combine, scaled_error, weighted_sum, wide
from .reference import RUNS, Run
from .stages import Equations, Stages, Unsolved, to_real


def whole_within(rounding, x):
    return float(round(x)) if abs(x - round(x)) <= rounding else x


def moving_weights(nodes):
    """`weights` of nodes that carry gradients, or are numbers."""
    return weights(torch.stack([torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in nodes]))


class AdamsRun(Run):
    """The state of one solve: that of a Runge-Kutta method, with which it starts, and past slopes.

    On a uniform grid the formulas are torchdiffeq's. It uses the same weights on every other grid, where
    they are of first order; here they are those of the grid.
    """

    def __init__(self, problem: Problem):
        super().__init__(problem)
        # (time, the zero that carries its gradient or None, slope), newest first.
        self.history = deque(maxlen=max(1, problem.max_order - 1))
        self.most_amplification = most_amplification(torch.finfo(problem.y0.dtype).eps)

    def rk_step(self, f0, t1, dt, shift1):
        """A step from ``(t0, y0)`` to ``t1``; returns ``f0`` and the mean slope, and the candidate ``y1``."""
        self.history.appendleft((self.t0, self.shift0, f0))
        nodes = self.nodes(t1)
        if nodes is None:
            k, y1 = super().rk_step(f0, t1, dt, shift1)
            return [f0, weighted_sum(k, self.b)], y1
        signed_dt = self.p.direction * dt
        find = weights_of
        if shift1 is not None:
            signed_dt = signed_dt + self.p.direction * (shift1 - self.shift0)
            nodes, find = self.moving(nodes, dt, shift1), moving_weights
        slopes = [f for _, _, f in self.history]
        mean = weighted_sum(slopes, find(nodes))
        if self.p.method.corrects:
            first, *others = find((1.0, *nodes))
            mean = self.corrected(mean, first, weighted_sum(slopes, others), t1, signed_dt, shift1)
        return [f0, mean], combine(self.y0, [mean], [signed_dt])

    def nodes(self, t1):
        """The times of the past slopes on a clock that reads 0 at the start of the step and 1 at its end;
        None where too few serve. The oldest are forgotten until the others amplify errors no more than
        those of a uniform grid do."""
        dt = t1 - self.t0
        # What is whole but for the rounding of the times is taken for whole: a uniform grid has one set
        # of weights.
        rounding = min(1e-6, 4 * sys.float_info.epsilon * max(abs(t1), abs(self.history[-1][0])) / dt)
        nodes = tuple(whole_within(rounding, (t - self.t0) / dt) for t, _, _ in self.history)
        while len(nodes) >= LEAST_SLOPES and amplification(nodes) > self.most_amplification:
            nodes = nodes[:-1]
            self.history.pop()
        return nodes if len(nodes) >= LEAST_SLOPES else None

    def moving(self, nodes, dt, shift1):
        """``nodes`` with the gradients of the times."""
        stretched = dt + shift1 - self.shift0
        return [(x * dt + shift - self.shift0) / stretched for x, (_, shift, _) in zip(nodes, self.history)]

    def corrected(self, predicted, weight, of_past, t1, signed_dt, shift1):
        """The solution of ``mean = weight * f(t1, y0 + dt * mean) + of_past``, the implicit formula, by
        functional iteration from the predicted mean slope.

        torchdiffeq warns where ``max_iters`` corrections do not suffice, and goes on with what it has. Here
        it is corrected further, as long as every correction is at most half of the one before, or until
        they are lost in the rounding of the state; where neither is so, Newton's method takes over.
        """
        p, mean, allowed = self.p, predicted, sys.float_info.max
        nudge = -1 if p.perturb else 0
        for correction in itertools.count(1):
            # parity: the times of both evaluations, and the test, are torchdiffeq's: the last change is
            # within tolerance of the increment, element by element.
            y1 = combine(self.y0, [mean], [signed_dt])
            f1 = self.call(t1, y1, shift1, nudge)
            before, mean = mean, weight * wide(f1) + of_past
            ratio = self.change(before, mean)
            if ratio < 1:
                return mean
            if correction >= p.corrections and not ratio <= allowed:
                if self.is_lost(self.dt * (mean - before), y1):
                    return mean
                break
            allowed = min(allowed, ratio / 2)
        if not torch.isfinite(f1).all():
            raise Unsolved(ratio, f1)
        self.stages = self.stages or Stages(self)
        base = combine(self.y0, [of_past], [signed_dt])
        equations = Equations(self, [t1], [nudge], [shift1], [base], [[1.0]], weight * signed_dt)
        guess = to_real(((predicted - of_past) / weight).detach().to(self.y0.dtype))
        (f1,) = self.stages.solve(equations, guess[None])
        return weight * wide(f1) + of_past

    def change(self, before, after) -> float:
        """The largest part of its tolerance by which a correction moves an element of the step's end."""
        before, after = self.dt * before.detach(), self.dt * after.detach()
        require_readable(after, "the corrector of implicit Adams methods")
        ratio = scaled_error(after - before, before, after, self.rtol, self.atol)
        return ratio.abs().max().item() if ratio.numel() else 0.0

    def is_lost(self, correction, y1) -> bool:
        """Whether a correction is no more than the rounding of the state makes of it."""
        rounding = torch.finfo(y1.dtype).eps * wide(y1).abs().max()
        return bool(correction.abs().max() <= 8 * rounding)


RUNS["adams"] = AdamsRun

"""Steps of the leapfrog method in plain PyTorch: positions and momenta move in turn."""

from __future__ import annotations

import torch

from ..problem import Problem
from .element import combine
from .reference import RUNS, Run


class LeapfrogRun(Run):
    """The state of one solve of ``dq/dt = f(t, p)``, ``dp/dt = g(t, q)``; its flat state is q, then p.

    Störmer's and Verlet's method (Hairer, Lubich, Wanner, *Geometric Numerical Integration*, I.1.4):

        p_mid = p0 + dt/2 g(t0, q0),   q1 = q0 + dt f(t_mid, p_mid),   p1 = p_mid + dt/2 g(t1, q1).

    ``func`` gives f and g at once, and is asked for each where it is needed; the other member is moved along by
    its slope at the start. Neither f nor g is to depend on it. Where they do, the method is of second order
    still, but neither reversible nor symplectic.
    """

    def __init__(self, problem: Problem):
        super().__init__(problem)
        # g at the end of a step is what the next begins with. Not where a step is taken again by itself, nor
        # where the slopes at both ends are wanted whole, or from inside the step.
        self.hands_on = not (problem.perturb or problem.dense.extra_c)
        self.f1: torch.Tensor | None = None

    def opening_slope(self):
        if self.f1 is None or self.replaying:
            return super().opening_slope()
        return self.f1

    def rk_step(self, f0, t1, dt, shift1):
        """A step from ``(t0, y0)`` to ``t1``; returns ``f0`` and the mean slope, and the candidate ``y1``."""
        p, t_mid, shift_mid = self.p, self.t0 + dt / 2, None
        signed_dt = p.direction * dt
        if shift1 is not None:
            signed_dt = signed_dt + p.direction * (shift1 - self.shift0)
            shift_mid = (self.shift0 + shift1) / 2
        (q0, p0), (_, g0) = self.y0.chunk(2), f0.chunk(2)
        y_mid = combine(self.y0, [f0], [signed_dt / 2])
        p_mid = y_mid.chunk(2)[1].clone()  # func may write into what it is shown
        f_mid, _ = self.call(t_mid, y_mid, shift_mid).chunk(2)
        q1 = combine(q0, [f_mid], [signed_dt])
        y_end = torch.cat([q1, combine(p0, [g0], [signed_dt])])
        f1 = self.call(t1, y_end, shift1, nudge=-1 if p.perturb else 0)
        _, g1 = f1.chunk(2)
        self.f1 = f1 if self.hands_on else None
        mean = torch.cat([f_mid, (g0 + g1) / 2])
        return [f0, mean], torch.cat([q1, combine(p_mid, [g1], [signed_dt / 2])])


RUNS["symplectic"] = LeapfrogRun

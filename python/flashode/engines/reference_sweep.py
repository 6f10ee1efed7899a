"""The backward solve in one sweep through all outputs, in plain PyTorch: the definition of correct.

``csrc/torch/sweep.cpp`` is the twin: the same functions in the same order.

A step does not stop at every output. Where it passes some over, the sum of their gradients enters
at the start of the step, too early, and `pull_back` takes out what they gained by that. With
``v -> u(t_i)`` the linearised solution from the end of the step (the earlier time) to output i,

    correction(v) = sum_i <g_i, u(t_i) - u(t_start)> = <sum_j J_j^T lambda_j, v>,

where a step of the method with its dense output gives ``u``, and its transpose the ``lambda_j``:
one vector-Jacobian product a stage, however many the outputs.
"""

from __future__ import annotations

import bisect
import math
import sys

import torch

from ..augmented import Augmented, Gradients
from ..control import accept, clamp_step, first_guess, initial_step, next_step, remember
from ..errors import Status, StepFailure
from ..interp import weights_at
from ..vjp import vector_jacobian_products
from .clock import stage_time
from .element import combine, mean_square_norm, scaled_error, weighted_sum, wide

# A step that would pass outputs over ends at the last of them where that leaves it this share of
# its length. With gradients to enter, passing over costs as many calls again as the step itself;
# without, landing serves to set the state right.
_SHARE_WITH_JUMPS, _SHARE_WITHOUT = 0.5, 0.8

# The error test of a step sees the sum of the gradients that it moves, `pull_back` depends on each.
# Where they cancel, up to this many times larger than their sum, the step ends at the first.
_CANCELS = 10.0


def sweep(augmented: Augmented) -> Gradients:
    """From the last output back to the first."""
    run = Sweep(augmented)
    try:
        return run.solve()
    except StepFailure as failure:
        return run.outcome(failure.status)


class Sweep:
    """The state of one backward solve."""

    def __init__(self, augmented: Augmented):
        self.g, self.p = augmented, augmented.problem
        p, g = self.p, self.g
        tableau, dense = p.method.tableau, p.dense
        self.c, self.a, self.b, self.b_err = tableau.numbers
        # The stages that dense output adds are further stages of the transposed step.
        self.all_c = [*self.c, *(float(c) for c in dense.extra_c)]
        self.all_a = [*self.a, *([float(x) for x in a_i] for a_i in dense.extra_a)]
        shape = p.y0.shape
        self.rtol, self.atol = (
            tol.reshape(shape) if isinstance(tol, torch.Tensor) else tol for tol in (p.rtol, p.atol)
        )
        # Where the sweep stands.
        self.t0, self.y, self.adj = p.times[0], g.ys[-1], g.grad_ys[-1].clone()
        self.integrals = [torch.zeros((), dtype=g.ys.dtype.to_real(), device=g.ys.device)]
        self.integrals += [torch.zeros_like(param) for param in g.params]
        self.next = 1  # output to come
        self.moved = 0  # outputs to come whose gradients the slopes include
        self.slopes = None  # of y, of its adjoint and of the integrals, at the start of the step
        self.nudge = 0
        self.dt = self.error_ratio = math.nan
        self.k, self.adj_k, self.y1 = [], [], None
        self.nfe = self.accepted = self.rejected = self.trials = self.next_stop = 0
        self.past = (1.0, 1.0)  # error ratios of the last two accepted steps
        self.drift, self.drift_t = 0.0, math.nan

    def outcome(self, status: Status) -> Gradients:
        vjp_t, *adj_params = self.integrals
        return Gradients(
            status, vjp_t, self.adj, adj_params, self.nfe, self.accepted, self.rejected, self.t0, self.dt,
            self.error_ratio, self.k, self.adj_k, self.y1, self.drift, self.drift_t,
        )  # fmt: skip

    def evaluate(self, t, y, adj, with_params=True, nudge=0):
        """``f(t, y)``, ``adj^T df/dy`` and ``adj^T df/dp`` of every integral, None where it is zero."""
        g, p = self.g, self.p
        self.nfe += 1
        with torch.enable_grad():
            y = y.detach().clone().requires_grad_()
            time = stage_time(p, t, None, nudge).requires_grad_(g.needs_t)
            f = p.slope(p.func(time, p.unflatten(y), *p.args))
        if self.nfe == 1:
            g.examine(f, y, time)
        inputs = [y] + ([time] if g.needs_t else []) + (list(g.params) if with_params else [])
        products = [None] * len(inputs)
        if f.requires_grad:
            products = list(vector_jacobian_products(f, inputs, adj))
        of_y = torch.zeros_like(y) if products[0] is None else products[0]
        of_t = products[1] if g.needs_t else None
        of_params = products[1 + g.needs_t :] if with_params else [None] * len(g.params)
        return f.detach().clone(), of_y, [of_t, *of_params]

    def add(self, integrals, products, weight):
        """``integrals + weight * products``"""
        return [x if z is None else x + weight * z for x, z in zip(integrals, products)]

    def error_norm(self, y_error, adj_error, errors, y1, adj1, integrals1):
        """Of the augmented state, relative to the tolerances."""
        g, p = self.g, self.p
        rtol, atol = g.tolerances
        if g.path is not None:
            y_error = torch.zeros_like(y_error)
        y = scaled_error(y_error, self.y, y1, self.rtol, self.atol)
        adj = scaled_error(adj_error, self.adj, adj1, self.rtol, self.atol)
        integrals = [
            scaled_error(e, x0, x1, rtol, atol) for e, x0, x1 in zip(errors, self.integrals, integrals1)
        ]
        if p.norm is not None:
            return g.norm_value(integrals[0], y, adj, integrals[1:])
        norms = [mean_square_norm(x, p.norm_offsets) for x in (y, adj)]
        norms += [mean_square_norm(x, [0, x.numel()]) for x in integrals[: 1 if g.seminorm else None]]
        return math.nan if any(math.isnan(norm) for norm in norms) else max(norms)

    def first_step(self):
        """Hairer I, II.4, of the augmented state."""
        g, p = self.g, self.p
        if g.first_step is not None:
            return g.first_step
        self.begin(0)
        f, of_y, products = self.slopes
        zeros = [torch.zeros_like(x) for x in self.integrals]
        here = (self.y, self.adj, self.integrals)
        d0 = self.error_norm(wide(self.y), wide(self.adj), zeros, *here)
        d1 = self.error_norm(wide(f), wide(of_y), self.add(zeros, products, 1), *here)
        if not math.isfinite(d1):
            self.k, self.adj_k, self.y1, self.error_ratio = [f], [of_y], self.y, d1
            raise StepFailure(Status.NONFINITE_FIELD)
        h0 = min(first_guess(d0, d1), p.times[-1] - self.t0)
        signed = p.direction * h0
        self.k = [f]
        probe = self.evaluate(
            self.t0 + h0, self.y_at(self.t0 + h0, [signed]), combine(self.adj, [of_y], [-signed])
        )
        d2 = self.error_norm(
            wide(probe[0]) - wide(f),
            wide(probe[1]) - wide(of_y),
            self.add(self.add(zeros, probe[2], 1), products, -1),
            *here,
        )
        return initial_step(h0, d1, d2 / h0, p.control.order)

    def begin(self, moved):
        """Slopes at the start of a step into which the gradients of the next outputs have moved."""
        if self.slopes is None or self.moved != moved:
            self.slopes = self.evaluate(self.t0, self.y, self.adj_with(moved), nudge=self.nudge)
            self.moved = moved

    def adj_with(self, moved):
        """The adjoint with the gradients of that many outputs to come."""
        last = len(self.p.times) - self.next
        return self.adj + self.g.grad_ys[last - moved : last].sum(0) if moved else self.adj

    def rk_step(self, t1, dt):
        """All stages of a step; returns y, its adjoint and the integrals at its end, the error of
        the integrals, and the last stage's slopes."""
        p = self.p
        signed = p.direction * dt
        adj0 = self.adj_with(self.moved)
        fsal = p.method.tableau.fsal
        b_err = self.b_err or [0.0] * len(self.b)
        f, of_y, products = self.slopes
        self.k, self.adj_k = [f], [of_y]
        integrals = self.add(self.integrals, products, -signed * self.b[0])
        errors = self.add([torch.zeros_like(x) for x in integrals], products, -signed * b_err[0])
        for i in range(1, len(self.c)):
            c_i, last = self.c[i], i == len(self.c) - 1
            at_end = c_i == 1
            t_i = t1 if at_end else self.t0 + c_i * dt
            y_i = self.y_at(t_i, [a_ij * signed for a_ij in self.a[i]])
            adj_i = combine(adj0, self.adj_k, [-a_ij * signed for a_ij in self.a[i]])
            f, of_y, products = self.evaluate(
                t_i, y_i, adj_i,
                # A stage without weight is no part of any integral; the last one may begin the next step.
                with_params=self.b[i] != 0 or b_err[i] != 0 or last,
                nudge=-1 if at_end and (p.adaptive or p.perturb) else 0,
            )  # fmt: skip
            self.k.append(f)
            self.adj_k.append(of_y)
            integrals = self.add(integrals, products, -signed * self.b[i])
            errors = self.add(errors, products, -signed * b_err[i])
        if fsal:
            self.y1, adj1 = y_i, adj_i
        else:
            self.y1 = self.y_at(t1, [b_j * signed for b_j in self.b])
            adj1 = combine(adj0, self.adj_k, [-b_j * signed for b_j in self.b])
        return self.y1, adj1, integrals, errors, (f, of_y, products)

    def y_at(self, t, coef):
        """``y + sum_j coef_j k_j``, or from the path where there is one: the clocks run against each other."""
        return combine(self.y, self.k, coef) if self.g.path is None else self.g.path(-t)

    def landing(self, t1):
        """The end of the next step, whether the field jumps there, and the outputs up to it."""
        p, g = self.p, self.g
        t1, jumps = min(t1, p.times[-1]), False
        if g.path is not None:
            # y has no error test here: what the forward solve had to resolve, the sweep has to.
            i = g.path.step_at(-self.t0)
            t1 = min(t1, self.t0 + g.path.ends[i] - g.path.begins[i])
        while self.next_stop < len(p.stops) and p.stops[self.next_stop][0] <= self.t0:
            self.next_stop += 1
        if self.next_stop < len(p.stops) and p.stops[self.next_stop][0] <= t1:
            t1, jumps = p.stops[self.next_stop]
        end = bisect.bisect_right(p.times, t1, lo=self.next)
        if end > self.next:
            share = _SHARE_WITH_JUMPS if any(g.jumps[self.next : end]) else _SHARE_WITHOUT
            t_last = p.times[end - 1]
            if t_last < t1 and t_last - self.t0 >= share * (t1 - self.t0):
                t1, jumps = t_last, False
        moved = self.jumps_in(self.next, end - (p.times[end - 1] == t1))
        if moved and self.cancel(moved):
            i = g.jumps.index(True, self.next)
            t1, jumps, end = p.times[i], False, i + 1
        return t1, jumps, end

    def cancel(self, moved):
        """Whether the adjoint with the gradients of that many outputs to come is so much smaller than what
        it lacks between them that an error test of it says nothing about their correction."""
        last, offsets = len(self.p.times) - self.next, self.p.norm_offsets

        def squares(rows):
            members = (rows[:, begin:end] for begin, end in zip(offsets, offsets[1:]))
            return torch.stack([member.abs().double().square().sum(1) for member in members], 1)

        missing = wide(self.g.grad_ys[last - moved : last].reshape(moved, -1)).cumsum(0)
        most = squares(self.adj_with(moved).reshape(1, -1)) * _CANCELS**2
        return bool((squares(missing) > most).any())

    def adaptive_step(self):
        """Tries steps until one is accepted, and makes it."""
        p, g = self.p, self.g
        on_step, on_accept, on_reject = p.callbacks
        while True:
            if self.trials >= p.max_num_steps:
                raise StepFailure(Status.MAX_STEPS)
            self.trials += 1
            self.dt = clamp_step(self.dt, p.control)
            free = self.t0 + self.dt
            t1, field_jumps, end = self.landing(free)
            if not t1 > self.t0 or self.dt < sys.float_info.min:
                raise StepFailure(Status.STEP_UNDERFLOW)
            self.dt = dt = self.dt if t1 == free else min(self.dt, t1 - self.t0)
            on_output = p.times[end - 1] == t1
            self.begin(self.jumps_in(self.next, end - on_output))
            g.report(on_step, self.t0, self.integrals[0], self.y, self.adj, self.integrals[1:], dt)
            y1, adj1, integrals1, errors, last = self.rk_step(t1, dt)
            signed = p.direction * dt
            self.error_ratio = self.error_norm(
                weighted_sum(self.k, [signed * e_j for e_j in self.b_err]),
                weighted_sum(self.adj_k, [-signed * e_j for e_j in self.b_err]),
                errors, y1, adj1, integrals1,
            )  # fmt: skip
            self.dt = next_step(self.error_ratio, dt, p.control, self.past)
            if accept(self.error_ratio, dt, p.control):
                break
            self.rejected += 1
            g.report(on_reject, self.t0, self.integrals[0], self.y, self.adj, self.integrals[1:], dt)
            first_slopes = self.slopes[:2]
            self.slopes = None  # the integrals' part is spent: keeping it would cost their size again
            if not math.isfinite(self.error_ratio):
                if dt <= p.control.min_step or not all(torch.isfinite(x).all() for x in first_slopes):
                    raise StepFailure(Status.NONFINITE_FIELD)
        self.past = remember(self.error_ratio, p.control, self.past)
        g.report(on_accept, self.t0, self.integrals[0], self.y, self.adj, self.integrals[1:], dt)
        if self.moved:
            adj1, integrals1 = self.pull_back(t1, dt, adj1, integrals1)
        self.arrive(t1, y1, adj1, integrals1, end)
        if self.moved or on_output or field_jumps:
            self.slopes = None
        else:
            self.slopes = last
        self.moved, self.nudge = 0, 1 if field_jumps else 0

    def jumps_in(self, begin, end):
        """Outputs to pass over, counted to the last one that has a gradient."""
        return max((i + 1 - begin for i in range(begin, end) if self.g.jumps[i]), default=0)

    def fixed_step(self, t1):
        """One step of a prescribed length."""
        p, g = self.p, self.g
        self.dt = dt = t1 - self.t0
        g.report(p.callbacks[0], self.t0, self.integrals[0], self.y, self.adj, self.integrals[1:], dt)
        self.slopes = self.evaluate(self.t0, self.y, self.adj, nudge=1 if p.perturb else 0)
        y1, adj1, integrals1, _, _ = self.rk_step(t1, dt)
        # A fixed-step solve on a GPU never waits for the device, not even for this check.
        if y1.device.type == "cpu" and not all(torch.isfinite(x).all() for x in (y1, adj1)):
            raise StepFailure(Status.NONFINITE_FIELD)
        self.arrive(t1, y1, adj1, integrals1, bisect.bisect_right(p.times, t1, lo=self.next))

    def pull_back(self, t1, dt, adj1, integrals1):
        """Takes out what the moved gradients gained between the start of the step and their outputs."""
        p, g = self.p, self.g
        signed = -p.direction * dt  # the transposed step runs forwards, from t1 to t0
        last = len(p.times) - self.next
        rows = wide(g.grad_ys[last - self.moved : last])
        positions = [(t1 - p.times[i]) / (t1 - self.t0) for i in range(self.next, self.next + self.moved)]
        weights = weights_at(p.dense, torch.tensor(positions[::-1], dtype=torch.float64, device="cpu"))
        weights[:, : len(self.b)] -= weights.new_tensor(self.b)
        flat = (signed * weights.T).to(rows) @ rows.reshape(self.moved, -1)
        sources = flat.to(g.ys.dtype).reshape(-1, *p.y0.shape)
        states = self.states_at([1 - c_j for c_j in self.all_c], t1, dt)
        products = [None] * len(sources)
        for j in reversed(range(len(sources))):
            later = range(j + 1, len(sources))
            cotangent = combine(sources[j], [products[i] for i in later],
                                [signed * self.all_a[i][j] for i in later])  # fmt: skip
            # Where the field jumps, its side is that of the step.
            t_j, nudge = {1.0: (self.t0, self.nudge), 0.0: (t1, -1)}.get(
                self.all_c[j], (t1 - self.all_c[j] * dt, 0)
            )
            _, products[j], of_integrals = self.evaluate(t_j, states[j], cotangent, nudge=nudge)
            integrals1 = self.add(integrals1, of_integrals, 1)
        return combine(adj1, products, [1.0] * len(products)), integrals1

    def states_at(self, positions, t1, dt):
        """y at positions in [0, 1] of the step."""
        p = self.p
        if self.g.path is not None:
            return [self.g.path(-(self.t0 + x * dt)) for x in positions]
        signed = p.direction * dt
        k = list(self.k)
        for i in range(len(self.c), len(self.all_c)):
            y_i = combine(self.y, k, [a_ij * signed for a_ij in self.all_a[i]])
            self.nfe += 1
            at_end = self.all_c[i] == 1
            time = stage_time(p, t1 if at_end else self.t0 + self.all_c[i] * dt, nudge=-1 if at_end else 0)
            k.append(p.slope(p.func(time, p.unflatten(y_i), *p.args)))
        weights = weights_at(p.dense, torch.tensor(positions, dtype=torch.float64, device="cpu")) * signed
        return [combine(self.y, k, row) for row in weights.tolist()]

    def arrive(self, t1, y1, adj1, integrals1, end):
        """Makes the end of the step the state. At an output the gradient enters, and the state as
        it was stored takes the place of the rebuilt one."""
        p, g = self.p, self.g
        if end > self.next:
            self.trials = 0
        if p.times[end - 1] == t1:
            row = len(p.times) - end
            stored = g.ys[row]
            if p.adaptive and g.path is None:
                drift = self.distance(y1, stored)
                if not drift <= self.drift:
                    self.drift, self.drift_t = drift, t1
            y1, adj1 = stored, adj1 + g.grad_ys[row]
        self.t0, self.y, self.adj, self.integrals = t1, y1, adj1, integrals1
        self.next = end
        self.accepted += 1

    def distance(self, y1, stored):
        """Between the rebuilt state and the stored one, in tolerances of a member as a whole: an element
        that is zero has drifted no further than the others."""
        rtol, atol = self.g.tolerances
        ratios = [0.0]
        for begin, end in zip(self.p.norm_offsets, self.p.norm_offsets[1:]):
            a, b = (
                x.reshape(-1)[begin:end].to(torch.promote_types(x.dtype, torch.float64)) for x in (y1, stored)
            )
            if end > begin:
                size = (end - begin) ** 0.5
                ratios.append(((a - b).norm() / (size * atol + rtol * b.norm() + sys.float_info.min)).item())
        return math.nan if any(math.isnan(ratio) for ratio in ratios) else max(ratios)

    def solve(self) -> Gradients:
        p = self.p
        if p.adaptive and len(p.times) > 1:
            self.dt = self.first_step()
            while self.next < len(p.times):
                self.adaptive_step()
        elif len(p.times) > 1:
            for t1 in p.grid.tolist()[1:]:
                self.fixed_step(t1)
        return self.outcome(Status.SUCCESS)

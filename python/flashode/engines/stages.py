"""The stages of implicit Runge-Kutta methods: Newton's method, and the gradients of what it finds.

HW stands for Hairer and Wanner, *Solving Ordinary Differential Equations II*, 2nd edition, 1996. The
unknowns are the slopes ``K`` of one stage, or of all where the stages are coupled:

    F_i(K) = K_i - f(t_i, base_i + dt sum_j a_ij K_j) = 0.

In slopes rather than states, a stage of a stiff field is as accurate as the state that it makes. Everything
in here is real and flat: a complex state counts as its real and imaginary parts, for a field need not be
analytic; 16-bit states are solved for in float32.
"""

from __future__ import annotations

import math
import weakref

import torch

from .. import transforms
from ..errors import ArgumentError
from .element import combine, weighted_sum, wide
from .linearised import DenseMatrix, FreeMatrix, Jacobian, Products, Zero, reaches_beyond

# Up to so many unknowns the Jacobian is a matrix, and factorised. Beyond, only products with it are made.
DENSE_LIMIT = 1024
# A part so short of a step of Newton's method is taken wherever it leads: places without a tangent have to be crossed.
_SHORTEST = 1 / 64
# The error that Newton's method may leave, in tolerances (HW IV.8 takes 0.01 to 0.1).
_KAPPA = 0.03
_UNDIFFERENTIABLE = (
    "method={!r} solves for its stages by derivatives of func, and what func returned has none in y: its graph "
    "was cut (no_grad, detach, NumPy, .item()); write func in differentiable operations of torch, or take an "
    "explicit method such as 'dopri5'"
)


class Unsolved(Exception):
    """The equations of a stage could not be solved: ``residual`` is the last change that Newton's method made
    to the state, relative to the state or to the tolerance; ``values`` is a slope that is not finite, if it
    met one."""

    def __init__(self, residual: float, values: torch.Tensor | None = None):
        self.residual, self.values = residual, values


def to_real(x: torch.Tensor) -> torch.Tensor:
    """A state as a flat real tensor of at least single precision."""
    return torch.view_as_real(x).reshape(-1) if x.is_complex() else wide(x).reshape(-1)


def from_real(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_real`, for a state like another."""
    return _shaped(x, like).to(like.dtype)


def _shaped(x, like):
    """A flat real change of a state in the shape of one, in at least single precision."""
    if not like.is_complex():
        return x.reshape(like.shape)
    # view_as_complex refuses rows of no elements, which begin at odd places.
    return torch.complex(*x.reshape(*like.shape, 2).unbind(-1))


class Stages:
    """Takes the steps of an implicit method for a `reference.Run`."""

    def __init__(self, run):
        # The run holds this object: a reference back would keep both until the garbage collector comes.
        self.run, self.tableau = weakref.proxy(run), run.p.method.tableau
        if reason := transforms.active():
            raise ArgumentError(
                f"method={run.p.method.name!r} differentiates func by torch.autograd inside the solve, and {reason}; "
                "take an explicit method such as 'dopri5', or torch.autograd outside"
            )
        self.is_probed = False  # whether slopes without a graph have been looked into
        self.linear = self.matrix = self.matrix_of = None

    @property
    def repeatable(self):
        """Whether a step must depend on nothing before it, to be taken again: then all is solved for to
        rounding, as fixed steps are in any case."""
        run = self.run
        return not run.p.adaptive or run.replaying or run.recording is not None

    def step(self, f0, t1, dt, shift1):
        """All stages from ``(t0, y0)`` to ``t1``; returns the slopes and the candidate ``y1``."""
        run, p, a = self.run, self.run.p, self.run.a
        signed_dt = p.direction * dt
        if shift1 is not None:
            signed_dt = signed_dt + p.direction * (shift1 - run.shift0)
        # No Jacobian is kept for the next step. A new one costs no call of the field, which is evaluated at the
        # first iterate anyhow, and saves a tenth of all calls (Robertson, van der Pol).
        self.linear = None

        def equations(stages, bases, coupling):
            times, nudges, shifts = zip(*(run.stage_place(i, t1, dt, shift1) for i in stages))
            return Equations(run, times, nudges, shifts, bases, coupling, signed_dt)

        s = self.tableau.stages
        if self.tableau.coupled:
            guess = torch.zeros_like(to_real(run.y0.detach())).expand(s, -1)
            k = self.solve(equations(range(s), [run.y0] * s, a), guess)
        else:
            k = [] if f0 is None else [f0]
            for i in range(len(k), s):
                base = combine(run.y0, k, [a_ij * signed_dt for a_ij in a[i][:i]])
                guess = to_real(self.extrapolated(k, i))[None]
                k += self.solve(equations([i], [base], [[a[i][i]]]), guess)
        return k, combine(run.y0, k, [b_j * signed_dt for b_j in run.b])

    def extrapolated(self, k, i):
        """The slope of a stage as the polynomial through those of up to three stages nearest to it has it."""
        if not k:
            return torch.zeros_like(self.run.y0)
        c, nodes = self.run.c, []
        for j in sorted(range(i), key=lambda j: (abs(c[j] - c[i]), -j)):
            if len(nodes) < 3 and all(c[j] != c[n] for n in nodes):
                nodes.append(j)
        weights = [math.prod((c[i] - c[n]) / (c[j] - c[n]) for n in nodes if n != j) for j in nodes]
        return weighted_sum([k[j].detach() for j in nodes], weights)

    def solve(self, equations, guess):
        """The slopes of these stages, with their graph where gradients are recorded."""
        K = self.newton(equations, guess)
        if equations.wants_graph:
            K = equations.corrected(K)
        return [from_real(k_i, equations.like) for k_i in K]

    def newton(self, equations, K):
        """The slopes as values. The matrix stays while it serves (HW IV.8); where it does not, it is made
        anew at every iterate.

        Of a step that leads further away a part is taken. It is judged by the matrix of where it begins: whether
        the step that this matrix would make next is the shorter (the natural monotonicity test of Deuflhard,
        *Newton Methods for Nonlinear Problems*, 2004, 3.3). The step of a new matrix cannot judge: such steps may
        get longer on the way to a solution.
        """
        base = step = None  # the iterate before, and the way from it, of which this part is taken
        last, part, theta, eta = math.inf, 1.0, 0.0, 1.0
        age, renews = (
            1,
            self.linear is None,
        )  # iterates since the matrix was made; one from another stage is old
        for _ in range(self.run.p.max_iters):
            values, linear = equations.slopes(K, renews)
            exact = self.repeatable or equations.wants_graph
            length, finite = math.nan, bool(torch.isfinite(values).all())
            if finite and not (base is None and renews):
                change = self.matrix_for(equations).solve(values - K)
                length, enough, rounding = self.lengths(equations, K, change, exact)
            if base is None and not finite:
                raise Unsolved(math.inf, _nonfinite(values, equations.like))
            if base is not None and not (length < last or (finite and part <= _SHORTEST)):
                if finite and length <= rounding:
                    return K
                if age:  # once more from base, with the matrix of that place
                    K, base, last, part, theta, eta, renews = base, None, math.inf, 1.0, 0.0, 1.0, True
                    continue
                shorter = part / 2
                if finite:
                    bend, *_ = self.lengths(equations, K, change - (1 - part) * step, exact)
                    shorter = max(min(shorter, part**2 * last / (2 * bend)), _SHORTEST)
                part, renews = shorter, True
                K = base + part * step
                continue
            age += 1
            theta = length / last if base is not None else 0.0
            if renews:
                self.linear, age = linear, 0
                change = self.matrix_for(equations).solve(values - K)
                length, enough, rounding = self.lengths(equations, K, change, exact)
                if not math.isfinite(length):  # there is no tangent to follow
                    raise Unsolved(math.inf)
                theta = max(theta, length / last)
            if base is not None:
                if exact:  # a matrix from beyond a kink of a stiff field makes little of any residual
                    theta = max(theta, torch.finfo(equations.like.dtype).eps ** 0.4)
                eta = theta / (1 - theta) if theta < 1 else 1.0
            if eta * length <= enough or (theta > 0.3 and length <= rounding and age < 2):
                return K + change
            renews = eta * length * theta**2 > enough  # more than two iterations to come
            base, step, last, part = K, change, length, 1.0
            K = K + change
        residual = self.relative(equations, K, change)
        if self.run.p.adaptive and residual <= _KAPPA:
            return K  # not to rounding, but as well as the tolerances ask for
        raise Unsolved(residual, _nonfinite(values, equations.like))

    def matrix_for(self, equations):
        """The matrix of Newton's method, factorised once for all stages that share it."""
        key = equations.steps.tolist()
        if self.matrix_of is None or self.matrix_of[0] is not self.linear or self.matrix_of[1] != key:
            self.matrix, self.matrix_of = equations.matrix(self.linear), (self.linear, key)
        return self.matrix

    def lengths(self, equations, K, change, exact):
        """How long a change of the slopes is, what is short enough to be the last, and what is so short that
        rounding may keep it from getting shorter."""
        if not exact:
            return self.relative(equations, K, change), _KAPPA, 0.0
        eps, size = torch.finfo(equations.like.dtype).eps, _size(equations, K)
        return _moved(equations, change), 4 * eps * size, max(16 * eps, eps**0.75) * size

    def relative(self, equations, K, change):
        """What a change of the slopes does to the states: in tolerances, for fixed steps in parts of the state."""
        if not self.run.p.adaptive:
            moved = _moved(equations, change)
            return moved / max(_size(equations, K), moved) if moved else 0.0
        return max(self.run.in_tolerances(_shaped(z, equations.like)) for z in equations.steps @ change)


def _nonfinite(values, like):
    """The first of several slopes that is not finite."""
    finite = torch.isfinite(values).all(1).tolist()
    return None if all(finite) else from_real(values[finite.index(False)], like)


def _moved(equations, change):
    """The most that a change of the slopes changes an element of the states."""
    return _largest(equations.steps @ change)


def _size(equations, K):
    """The largest element of the states, or of what they are the sum of: they may vanish, at the first iterate
    as at the solution, with the rounding of the state that the step starts from."""
    return max(_largest(equations.states(K)), _largest(equations.like.detach()))


def _largest(x):
    return x.abs().max().item() if x.numel() else 0.0


class Equations:
    """The equations of ``m`` stages; ``a`` couples them, ``bases`` are what is known of their states."""

    def __init__(self, run, times, nudges, shifts, bases, a, dt):
        self.run, self.times, self.nudges, self.shifts = run, times, nudges, shifts
        self.bases, self.a, self.dt = bases, a, dt
        self.like = run.y0
        self.real_bases = [to_real(base) for base in bases]
        self.known = [base.detach() for base in self.real_bases]
        number = self.known[0]
        self.steps = number.new_tensor(a) * (dt.detach().to(number) if isinstance(dt, torch.Tensor) else dt)
        moves = any(shift is not None for shift in shifts) or any(base.requires_grad for base in bases)
        self.wants_graph = torch.is_grad_enabled() and moves

    def states(self, K):
        """The states of the stages, without a graph."""
        return torch.stack(self.known) + self.steps @ K

    def slopes(self, K, linearised: bool):
        """The field at every stage; with its linearisations there, or None."""
        values, linear = [], []
        for i, y in enumerate(self.states(K)):
            if linearised:
                value, tangent = self.linearise(i, y)
                linear.append(tangent)
            else:
                value = self.run.call(self.times[i], from_real(y, self.like), None, self.nudges[i])
                self.wants_graph |= torch.is_grad_enabled() and value.requires_grad
            values.append(to_real(value.detach()))
        return torch.stack(values), linear

    def linearise(self, i, y):
        """The field at one stage, and its linearisation."""
        recorded = torch.is_grad_enabled()
        # In inference mode nothing could be differentiated, and its tensors are no part of any graph.
        with torch.inference_mode(False), torch.enable_grad():
            y = y.clone().requires_grad_()
            # A copy is shown: the field may write into it.
            try:
                value = self.run.call(self.times[i], from_real(y.clone(), self.like), None, self.nudges[i])
            except RuntimeError as error:
                self.explain_refusal(error)
                raise
            real = to_real(value)
            self.wants_graph |= recorded and reaches_beyond(real, y)
            return value, self.tangent(i, real, y)

    def explain_refusal(self, error):
        """Says why torch refused an operation of func, where it is because func is differentiated."""
        name = self.run.p.method.name
        if "numpy() on Tensor that requires grad" in str(error):
            raise ArgumentError(_UNDIFFERENTIABLE.format(name)) from error
        if "Inference tensors cannot be saved" in str(error):
            raise ArgumentError(
                f"method={name!r} solves for its stages by derivatives of func, and func uses a tensor that was made in "
                "inference mode, which has none: make it outside, or use torch.no_grad() in place of inference mode"
            ) from error

    def tangent(self, i, value, y):
        """The linearisation of ``value`` in ``y``, from the graph between them."""
        tangent_of = Jacobian if self.is_small else Products
        found = tangent_of.of(value, y) if value.requires_grad else None
        if found is None and not self.run.stages.is_probed:
            self.probe(i, value.detach(), y.detach())
        return found or Zero(y)

    def probe(self, i, value, y):
        """Refuses a field whose slopes change with y though their graph does not reach it."""
        eps = torch.finfo(self.like.dtype).eps
        moved = y + eps**0.5 * (1 + y.abs())
        there = self.run.call(self.times[i], from_real(moved, self.like), None, self.nudges[i])
        if not torch.equal(to_real(there.detach()), value):
            raise ArgumentError(_UNDIFFERENTIABLE.format(self.run.p.method.name))
        self.run.stages.is_probed = True

    @property
    def is_small(self):
        return len(self.known) * self.known[0].numel() <= DENSE_LIMIT

    def matrix(self, linear):
        """``dF/dK`` where the field's linearisations are these, one for each stage or one for all."""
        return (DenseMatrix if self.is_small else FreeMatrix)(linear, self.steps)

    def corrected(self, K):
        """``K`` with its graph, exact for first and second derivatives.

        A step of Newton's method from the solution, with the exact matrix held constant, has no length, and the
        first derivative of the solution, by the implicit function theorem; a second step has the second one too.
        They are as exact as ``K`` is. Without second derivatives the first step is never gone back through, and its
        graph stays as long as that of the solve does.
        """
        matrix = None
        for _ in range(2):
            K = _ForSecondDerivatives.apply(K)
            values, linear = [], []
            for i, base in enumerate(self.real_bases):
                y = base + weighted_sum(K, [a_ij * self.dt for a_ij in self.a[i]])
                if not y.requires_grad:
                    y.requires_grad_()
                shown = from_real(y.clone(), self.like)
                value = to_real(self.run.call(self.times[i], shown, self.shifts[i], self.nudges[i]))
                values.append(value)
                if matrix is None:
                    linear.append(self.tangent(i, value, y))
            matrix = matrix or self.matrix(linear)
            K = K + _LastStep.apply(torch.stack(values) - K, matrix)
        return K


class _LastStep(torch.autograd.Function):
    """A step of Newton's method from the solution: of no length, and with the derivatives of ``M^-1 b``."""

    @staticmethod
    def forward(ctx, b, matrix):
        ctx.matrix = matrix
        ctx.set_materialize_grads(False)
        return torch.zeros_like(b)

    @staticmethod
    def backward(ctx, g):
        return None if g is None else ctx.matrix.transposed_inverse(g), None


class _ForSecondDerivatives(torch.autograd.Function):
    """Where a step of Newton's method begins: its end does not depend on that, but the derivative of its end does.

    So nothing goes back through this before there is a derivative with a graph; and then everything does.
    """

    @staticmethod
    def forward(ctx, K):
        ctx.set_materialize_grads(False)
        ctx.is_open = False
        return K.view_as(K)

    @staticmethod
    def backward(ctx, g):
        ctx.is_open |= torch.is_grad_enabled()
        return g if ctx.is_open else None

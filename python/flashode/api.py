"""The public functions."""

from __future__ import annotations

from dataclasses import replace

import torch

from . import batched, event_gradients, transforms
from .adjoint import solve_with_adjoint
from .adjoint.spec import collect_params, make_spec
from .arguments import initial_time, joined_times, kind_of
from .augmented import Path
from .dense import DenseOutput, dense_output
from .engines import BATCH_ENGINES, ENGINES, choose, solve_batch, traced
from .errors import ArgumentError, ArgumentTypeError, Status
from .events import Inquiry, events_of
from .options import warn_of_idle_stops
from .problem import Problem
from .program import CompiledField, apart_from_autocast
from .progress import require_progress, shown
from .pytrees import Tree
from .solution import Solution, finish


def odeint(
    func, y0, t, *, rtol=1e-7, atol=1e-9, method=None, options=None, event_fn=None, args=(), engine="auto",
    progress=False,
):  # fmt: skip
    """Integrates ``dy/dt = func(t, y, *args)``, ``y(t[0]) = y0``, and returns ``y`` at every time in ``t``.

    Gradients flow through the solver's own operations (to ``y0``, ``t`` and everything that
    ``func`` reaches); `odeint_adjoint` trades them for a backward solve.

    Args:
        func: callable ``func(t, y, *args)``; ``t`` is a 0-d Tensor of y's real dtype on y's device,
            ``y`` a Tensor shaped like ``y0`` or a tuple of such. Returns the slope, shaped alike.
        y0: Tensor of any shape, real or complex floating point, or a tuple of Tensors.
        t: 1-d floating point Tensor, strictly increasing or decreasing.
        rtol, atol: relative and absolute tolerance per element: number, Tensor that broadcasts to
            the state, or one per member of a tuple state. Fixed-step methods ignore them.
        method: name of a method (README, table of methods); default ``"dopri5"``.
        options: dict for the method (README, table of options). ``{"batched": True}`` solves every index
            of the leading dimension on its own (docs/batches.md); ``t`` may then have shape (B, T).
        event_fn: callable ``event_fn(t, y)`` returning a Tensor, an `Event`, or a tuple of several of
            either; the solve ends where the first element of any changes sign, to within ``atol`` in
            ``t``. ``t`` then holds the initial time and one later time that only gives the direction.
        args: tuple of further arguments of ``func``: Tensors, or anything else.
        engine: ``"auto"``, ``"native"``, ``"reference"``, ``"scipy"``, which is for its own method, or
            ``"compiled"``, which a field made by `compile` has anyway.
        progress: whether to show a progress bar (needs tqdm).

    Returns:
        Tensor of shape (T, *y0.shape), or a tuple of such; row 0 is ``y0``. With ``event_fn``,
        ``(event_t, ys)`` where ``ys`` has two rows, at the start and at the event; ``event_t`` has no
        gradient, and ``ys`` that at a fixed time: `odeint_event` and `solve` give both in full.

    Raises:
        ArgumentError (a ValueError), ArgumentTypeError (a TypeError): an argument, or what
            ``func`` returned, cannot be used. Both are AssertionErrors too, as in torchdiffeq.
        SolveError (a RuntimeError and AssertionError): the solve cannot be finished; its
            ``reason`` is a `Status`.

    Example:
        >>> y = odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]))
        >>> round(y[-1].item(), 5)
        0.36788
    """
    if transforms.records(y0) and not progress and traced.serves(func, method, options, event_fn, engine):
        return traced.odeint(func, y0, t, method, options, args)
    return _odeint(func, y0, t, rtol, atol, method, options, event_fn, args, engine, progress)


@transforms.outside_graphs
def _odeint(func, y0, t, rtol, atol, method, options, event_fn, args, engine, progress):
    if (
        isinstance(func, CompiledField)
        and event_fn is None
        and not progress
        and engine in ("auto", "compiled")
    ):
        ys = func.again(y0, t, rtol, atol, method, options, args)
        if ys is not None:
            return ys
    problem, solution = _solve(
        func, y0, t, rtol, atol, method, options, event_fn,
        args=args, engine=engine, progress=progress, throw=True,
    )  # fmt: skip
    return _returned(event_fn, problem, solution)


@transforms.outside_graphs
def solve(
    func, y0, t, *, rtol=1e-7, atol=1e-9, method=None, options=None, event_fn=None, args=(), engine="auto",
    progress=False, throw=True, dense=False,
) -> Solution:  # fmt: skip
    """`odeint` with the full result: times, values, status and statistics.

    Arguments as for `odeint`, and:

    Args:
        y0: also any structure that `torch.utils._pytree` knows: dicts, lists, tuples, named tuples
            and registered classes of Tensors, nested. ``func`` is given that structure and returns
            it; ``event_fn``, callbacks and ``options["norm"]`` are given it; ``ys`` has it; ``rtol``
            and ``atol`` may have it. A `SolveError` counts its Tensors in their order.
        throw: False returns a failed solve in place of raising its `SolveError`: ``status`` names
            the reason and the rows that were not reached are NaN. With ``options={"batched": True}`` the
            result is a `BatchSolution` either way, with a status for every sample.
        dense: whether to keep every step, for ``Solution.sol``: the solution as a function of time,
            a `DenseOutput`. Methods whose interpolant takes more evaluations (`dopri8`: 3,
            ``interp="cubic"``: 1) then make them in every step.

    With ``event_fn`` the result says which event fired and when, or that ``until`` came first, and both
    ``event_t`` and ``ys`` have all gradients that `odeint_event` gives them.

    Example:
        >>> solution = solve(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]), dense=True)
        >>> solution.status.name, round(solution.sol(0.5).item(), 5)
        ('SUCCESS', 0.60653)
    """
    tree = Tree.of(y0)
    if tree is not None:
        func, y0, rtol, atol, options, event_fn = _of_tuples(tree, func, y0, rtol, atol, options, event_fn)
    problem, solution = _solve(
        func, y0, t, rtol, atol, method, options, event_fn,
        args=args, engine=engine, progress=progress, throw=throw, dense=dense,
    )  # fmt: skip
    if problem.events and solution.status == Status.EVENT:
        solution.event_t, solution.ys = event_gradients.attach(
            problem, problem.events, solution.event_index, solution.event_t, solution.ys
        )
        solution.ts = torch.stack([problem.t[0], solution.event_t])
    if tree is not None:
        solution.ys = tree.rebuild(solution.ys)
        if dense:
            solution.dense = replace(solution.dense, tree=tree)
    return solution


@transforms.outside_graphs
def odeint_dense(
    func, y0, t0, t1, *, rtol=1e-7, atol=1e-9, method=None, options=None, args=(), engine="auto",
    progress=False,
) -> DenseOutput:  # fmt: skip
    """Integrates from ``t0`` to ``t1`` and returns the solution as a function of time.

    Args:
        t0, t1: numbers, or Tensors of one element, in either order; equal ones give a function
            of that time alone. Gradients flow to them.
        func, y0, rtol, atol, method, options, args, engine, progress: as for `solve`.

    Returns:
        `DenseOutput`, called as ``sol(t)`` with numbers or Tensors of times.

    Raises:
        As `odeint`.

    Example:
        >>> sol = odeint_dense(lambda t, y: -y, torch.ones(1), 0.0, 1.0)
        >>> sol(torch.tensor([[0.0, 0.5]])).shape
        torch.Size([1, 2, 1])
    """
    return solve(
        func, y0, joined_times(t0, t1), rtol=rtol, atol=atol, method=method, options=options, args=args,
        engine=engine, progress=progress, dense=True,
    ).sol  # fmt: skip


def _of_tuples(tree, func, y0, rtol, atol, options, event_fn):
    """What is asked of a state of any structure, asked of the tuple of its Tensors."""
    events = tuple(replace(e, fn=tree.reader(e.fn, place=1)) for e in events_of(event_fn))
    return (
        tree.field(func), tree.members(y0, "y0"), tree.tolerance("rtol", rtol), tree.tolerance("atol", atol),
        tree.options(options), events or None,
    )  # fmt: skip


@apart_from_autocast
def _solve(
    func, y0, t, rtol, atol, method, options, event_fn, *, args, engine, progress, throw, dense=False
):  # fmt: skip
    require_progress(progress)
    if batched.asked_for(options):
        batched.require_one_clock(progress, dense)
        problem = _problem(batched.BatchProblem, func, y0, t, rtol, atol, method, options, event_fn, args)
        outcome, name = solve_batch(problem, engine)
        return problem, batched.finish(problem, outcome, name, throw)
    problem = _checked(func, y0, t, rtol, atol, method, options, event_fn, args)
    name = choose(problem, engine)
    path = Path() if dense else None
    with shown(problem, progress) as watched:
        outcome = ENGINES[name].solve(watched, path)
    solution = finish(problem, outcome, name, throw)
    if dense:
        solution.dense = dense_output(problem, path, outcome)
    return problem, solution


def _checked(func, y0, t, rtol, atol, method, options, event_fn, args) -> Problem:
    problem = _problem(Problem, func, y0, t, rtol, atol, method, options, event_fn, args)
    if problem.adaptive and event_fn is None:
        warn_of_idle_stops(options, problem.t)
    return problem


def _problem(kind, func, *call):
    if (
        isinstance(func, CompiledField)
        and isinstance(call[1], torch.Tensor)
        and isinstance(call[5] or {}, dict)
    ):
        return func.checked(kind, *call)
    return kind.from_call(func, *call)


def _returned(event_fn, problem: Problem, solution: Solution):
    """What `odeint` returns of a solution."""
    if isinstance(event_fn, Inquiry):
        event_fn.answer = problem, solution.event_index
    return (solution.event_t, solution.ys) if problem.events else solution.ys


@transforms.outside_graphs
@apart_from_autocast
def odeint_adjoint(
    func, y0, t, *, rtol=1e-7, atol=1e-9, method=None, options=None, event_fn=None,
    adjoint_rtol=None, adjoint_atol=None, adjoint_method=None, adjoint_options=None,
    adjoint_params=None, adjoint="backsolve", checkpoints=None, args=(), engine="auto", progress=False,
):  # fmt: skip
    """`odeint` whose backward pass is a solve of its own, in place of a graph of every step.

    Three of them, by ``adjoint`` (docs/gradients.md says when to take which):

    - ``"backsolve"``, torchdiffeq's meaning and the default: the continuous adjoint, with the state
      rebuilt backwards along with it. Memory does not grow with the number of steps. Gradients are
      right to the tolerances of the backward solve where the problem can be solved backwards, and a
      warning says where it cannot.
    - ``"interpolated"``: the same along the dense output of the forward solve, which is kept.
    - ``"checkpoint"``: keeps the accepted steps' states and replays the steps. Gradients are those
      of `odeint`, to rounding. Memory grows with the number of steps as the state does, not as the
      graph of ``func`` does, and ``checkpoints`` bounds it.

    ``func`` must not change between the solve and its backward pass, nor depend on chance. The
    parameters and buffers that Modules had in the solve, as of `torch.func.functional_call`, are put
    back for it.

    Args:
        func, y0, t, rtol, atol, method, options, event_fn, engine: as for `odeint`.
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options: the same for the backward
            solve; those of the forward solve by default. ``adjoint_options["norm"]`` may be
            ``"seminorm"``, which leaves the parameters' gradients out of step-size control, or a
            callable that is given the tuple ``(t, y, adj_y, *adj_params)``;
            ``adjoint_options["restart"]`` makes torchdiffeq's calls: a fresh start at every output.
            Of no effect with ``"checkpoint"``.
        adjoint_params: tensors that get gradients; by default the parameters of ``func``, which
            must then be an ``nn.Module``. Others that ``func`` reaches draw a warning.
        adjoint: the backward pass, as above.
        checkpoints: most states that ``"checkpoint"`` holds at a time, at least 1; steps between
            them are solved again. None for all.
        args: tuple of further arguments of ``func``; Tensors anywhere in it get gradients.
        progress: whether to show a progress bar, in the backward pass another one.

    Returns:
        As `odeint`.

    Raises:
        As `odeint`, in the backward pass too; ArgumentError when ``func`` is not a Module and
        ``adjoint_params`` is missing. RuntimeError where the gradients are differentiated again.

    Example:
        >>> w = torch.ones((), requires_grad=True)
        >>> y = odeint_adjoint(lambda t, y: -w * y, torch.ones(1), torch.tensor([0.0, 1.0]), adjoint_params=w)
        >>> y[-1].sum().backward()
        >>> round(w.grad.item(), 4)
        -0.3679
    """
    if reason := transforms.active():
        raise ArgumentError(
            f"odeint_adjoint serves backward passes only, and {reason}; use odeint, which serves all"
        )
    if batched.asked_for(options) or batched.asked_for(adjoint_options):
        raise ArgumentError(
            "odeint_adjoint has no options['batched']; use odeint, which has gradients per sample"
        )
    require_progress(progress)
    all_captured = isinstance(func, CompiledField) and adjoint_params is None
    params = () if all_captured else collect_params(func, adjoint_params, args)
    problem = _checked(func, y0, t, rtol, atol, method, options, event_fn, args)
    with torch.no_grad():  # as the engine will work
        name = choose(problem, engine)
    if all_captured:  # its program knows them
        with torch.set_grad_enabled(torch.is_grad_enabled() and adjoint == "checkpoint"):
            params = func.differentiated(problem) if name == "compiled" else collect_params(func, None, args)
    spec = make_spec(
        problem, options, rtol, atol, method,
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options, adjoint, checkpoints, engine,
        progress,
    )  # fmt: skip
    return _returned(event_fn, problem, solve_with_adjoint(problem, spec, params, name))


@transforms.outside_graphs
def odeint_event(func, y0, t0, *, event_fn, reverse_time=False, odeint_interface=odeint, **kwargs):
    """Solves until an event, and gives the event's time and the state there all their gradients.

    They follow what moves the solution, the parameters of the event function, and ``t0``, by the
    implicit function theorem. That takes an event function with a derivative, which a comparison is
    not, and a solution that crosses zero and does not only touch it. A backward pass calls ``func``
    once more, at the event; second derivatives are refused.

    Args:
        func, y0: as for `odeint`.
        t0: initial time, a number or a Tensor of one element.
        event_fn: as for `odeint`: a callable, an `Event`, or several of either.
        reverse_time: solve towards smaller ``t``.
        odeint_interface: `odeint`, `odeint_adjoint`, or a callable with their signature such as a
            ``functools.partial`` of them. Another library's serves, but for what it does not know:
            an `Event` with a direction or an end.
        kwargs: further arguments of ``odeint_interface``.

    Returns:
        ``(event_t, ys)``: a 0-d Tensor of the dtype of ``t0``, that of ``y0`` where it is a number;
        and the states at the start and at the event, a Tensor of shape (2, *y0.shape) or a tuple of
        such. Where an `Event`'s ``until`` came first, that time and the state there.

    Raises:
        As ``odeint_interface``; ArgumentError in the backward pass where the event's time has no
        gradient.

    Example:
        >>> h = torch.tensor(20.0, requires_grad=True)
        >>> fall = lambda t, y: torch.stack([y[1], -10 + 0 * y[1]])
        >>> t, _ = odeint_event(fall, torch.stack([h, 0 * h]), 0.0, event_fn=lambda t, y: y[0])
        >>> t.backward()
        >>> round(t.item(), 4), round(h.grad.item(), 4)  # sqrt(2 h / g), and its derivative
        (2.0, 0.05)
    """
    if not callable(odeint_interface):
        raise ArgumentTypeError(
            f"odeint_interface must be callable as odeint is, got {kind_of(odeint_interface)}"
        )
    t0 = initial_time(t0, y0)
    # The second time only says in which direction.
    away = 1 + t0.detach().abs()
    t = torch.stack([t0, t0.detach() - away if reverse_time else t0.detach() + away])
    inquiry = Inquiry(events_of(event_fn))
    if not inquiry.events:
        raise ArgumentTypeError("event_fn must be callable as event_fn(t, y), got None")
    result = odeint_interface(func, y0, t, event_fn=inquiry, **kwargs)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise ArgumentTypeError(
            f"odeint_interface must return (event_t, ys) as odeint does, got {kind_of(result)}"
        )
    if inquiry.answer is None:
        return event_gradients.attach_foreign(func, y0, t, inquiry.events, *result, kwargs.get("args", ()))
    problem, index = inquiry.answer
    return result if index < 0 else event_gradients.attach(problem, inquiry.events, index, *result)


def explain(func, y0, t, *, rtol=1e-7, atol=1e-9, method=None, options=None, event_fn=None, args=()) -> str:
    """Which engine ``engine="auto"`` takes for a call, and why the others decline; nothing is solved."""
    tree = Tree.of(y0)
    if tree is not None:
        func, y0, rtol, atol, options, event_fn = _of_tuples(tree, func, y0, rtol, atol, options, event_fn)
    return _explained(func, y0, t, rtol, atol, method, options, event_fn, args=args)


@apart_from_autocast
def _explained(func, y0, t, rtol, atol, method, options, event_fn, *, args):
    per_sample = batched.asked_for(options)
    kind, engines = (batched.BatchProblem, BATCH_ENGINES) if per_sample else (Problem, ENGINES)
    problem = kind.from_call(func, y0, t, rtol, atol, method, options, event_fn, args)
    chosen = choose(problem, "auto", engines)
    lines = [f"{problem.method.name} on the {chosen} engine"]
    for name, engine in engines.items():
        reason = engine.supports(problem)
        lines.append(f"  {name}: " + ("can serve" if reason is None else f"declines: {reason}"))
    return "\n".join(lines)

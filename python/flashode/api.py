"""The public functions."""

from __future__ import annotations

from . import batched, transforms
from .adjoint import solve_with_adjoint
from .adjoint.spec import collect_params, make_spec
from .engines import BATCH_ENGINES, ENGINES, choose, solve_batch
from .errors import ArgumentError
from .problem import Problem
from .solution import Solution, finish


def odeint(
    func, y0, t, *, rtol=1e-7, atol=1e-9, method=None, options=None, event_fn=None, args=(), engine="auto"
):
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
        options: dict for the method (README, table of options).
        event_fn: callable ``event_fn(t, y)`` returning a Tensor; the solve ends where one of its
            elements changes sign. ``t`` then holds the initial time and one later time that only
            gives the direction.
        args: tuple of further arguments of ``func``: Tensors, or anything else.
        engine: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        Tensor of shape (T, *y0.shape), or a tuple of such; row 0 is ``y0``. With ``event_fn``,
        ``(event_t, ys)`` where ``ys`` has two rows, at the start and at the event.

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
    solution, event_t = _solve(func, y0, t, rtol, atol, method, options, event_fn, args, engine, True)
    return solution.ys if event_fn is None else (event_t, solution.ys)


def solve(
    func, y0, t, *, rtol=1e-7, atol=1e-9, method=None, options=None, event_fn=None, args=(), engine="auto",
    throw=True,
) -> Solution:  # fmt: skip
    """`odeint` with the full result: times, values, status and statistics.

    ``throw=False`` returns a failed solve in place of raising its `SolveError`: ``status`` names
    the reason and the rows that were not reached are NaN. Arguments as for `odeint`.

    Example:
        >>> solve(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0])).status.name
        'SUCCESS'
    """
    return _solve(func, y0, t, rtol, atol, method, options, event_fn, args, engine, throw)[0]


def _solve(func, y0, t, rtol, atol, method, options, event_fn, args, engine, throw):
    if batched.asked_for(options):
        problem = batched.BatchProblem.from_call(func, y0, t, rtol, atol, method, options, event_fn, args)
        outcome, name = solve_batch(problem, engine)
        return batched.finish(problem, outcome, name, throw), None
    problem = Problem.from_call(func, y0, t, rtol, atol, method, options, event_fn, args)
    name = choose(problem, engine)
    outcome = ENGINES[name].solve(problem)
    event_t = None
    if event_fn is not None:
        event_t = problem.t.new_tensor(problem.direction * outcome.event_t)
    return finish(problem, outcome, name, throw), event_t


def odeint_adjoint(
    func, y0, t, *, rtol=1e-7, atol=1e-9, method=None, options=None, event_fn=None,
    adjoint_rtol=None, adjoint_atol=None, adjoint_method=None, adjoint_options=None,
    adjoint_params=None, adjoint="backsolve", checkpoints=None, args=(), engine="auto",
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

    ``func`` must not change between the solve and its backward pass, nor depend on chance.

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

    Returns:
        As `odeint`. With ``event_fn`` the event's time carries no gradient.

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
    if batched.asked_for(options):
        raise ArgumentError("odeint_adjoint has no options['batched']; use odeint, which has gradients per sample")
    params = collect_params(func, adjoint_params, args)
    problem = Problem.from_call(func, y0, t, rtol, atol, method, options, event_fn, args)
    name = choose(problem, engine)
    spec = make_spec(
        problem, options, rtol, atol, method,
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options, adjoint, checkpoints, engine,
    )  # fmt: skip
    solution, event_t = solve_with_adjoint(problem, spec, params, name)
    return solution.ys if event_fn is None else (event_t, solution.ys)


def explain(func, y0, t, *, rtol=1e-7, atol=1e-9, method=None, options=None, event_fn=None, args=()) -> str:
    """Which engine ``engine="auto"`` takes for a call, and why the others decline; nothing is solved."""
    per_sample = batched.asked_for(options)
    kind, engines = (batched.BatchProblem, BATCH_ENGINES) if per_sample else (Problem, ENGINES)
    problem = kind.from_call(func, y0, t, rtol, atol, method, options, event_fn, args)
    chosen = choose(problem, "auto", engines)
    lines = [f"{problem.method.name} on the {chosen} engine"]
    for name, engine in engines.items():
        reason = engine.supports(problem)
        lines.append(f"  {name}: " + ("can serve" if reason is None else f"declines: {reason}"))
    return "\n".join(lines)

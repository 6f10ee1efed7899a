"""What a backward pass is asked to do: its arguments, checked at the call, far from where they act."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_leaves

from .. import arguments
from .. import options as choices
from ..arguments import CALLBACKS
from ..errors import ArgumentError, ArgumentTypeError
from ..problem import Problem

MODES = ("backsolve", "interpolated", "checkpoint")


@dataclass(frozen=True)
class AdjointSpec:
    """The keyword arguments of the backward solve.

    Attributes:
        mode: one of `MODES`.
        checkpoints: states that ``checkpoint`` may hold; None for all.
        restart: begin afresh at every output, as torchdiffeq does.
        seminorm: leave the parameters' gradients out of step-size control.
    """

    mode: str
    checkpoints: int | None
    restart: bool
    rtol: object
    atol: object
    method: str
    options: dict
    seminorm: bool
    engine: str
    progress: bool


@dataclass(frozen=True)
class Record:
    """What a forward solve leaves for its backward pass.

    Attributes:
        problem: the solve, without gradients.
        t: times of the outputs, shape (T,); with an event, the start and the event's time.
        ys: the outputs, shape (T, *flat state).
        params: tensors that get gradients.
        engine: which one solves.
        dt: what step-size control would have tried next, NaN where there was no control.
        steps: the accepted steps, where the mode keeps them.
    """

    problem: Problem
    spec: AdjointSpec
    t: torch.Tensor
    ys: torch.Tensor
    params: tuple[torch.Tensor, ...]
    engine: str
    dt: float
    steps: object = None


def make_spec(
    problem: Problem, func_options, rtol, atol, method,
    adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options, mode, checkpoints, engine,
    progress,
) -> AdjointSpec:  # fmt: skip
    """Defaults of the backward solve, as torchdiffeq has them: those of the forward solve, but for
    the norm, which covers all parts of the augmented state."""
    if not isinstance(mode, str) or mode not in MODES:
        raise ArgumentError(f"adjoint must be one of {list(MODES)}, got {mode!r}")
    if checkpoints is not None:
        _check_checkpoints(checkpoints, mode)
    if (
        adjoint_method is not None
        and adjoint_method != method
        and func_options is not None
        and adjoint_options is None
    ):
        raise ArgumentError(
            "If `adjoint_method != method` then we cannot infer `adjoint_options` from `options`. So as "
            "`options` has been passed then `adjoint_options` must be passed as well."
        )
    if adjoint_options is None:
        adjoint_options = {k: v for k, v in (func_options or {}).items() if k != "norm"}
    options = dict(adjoint_options)
    if mode == "interpolated" and not problem.adaptive:
        raise ArgumentError(
            f"adjoint='interpolated' needs a forward method with step-size control, whose dense output is of its "
            f"order; method={problem.method.name!r} has none: use adjoint='checkpoint'"
        )
    if mode == "checkpoint" and problem.method.family == "adams":
        raise ArgumentError(
            f"adjoint='checkpoint' replays steps one by one, and a step of method={problem.method.name!r} depends on "
            "those before it: use odeint for the exact gradients, or adjoint='backsolve'"
        )
    if mode == "checkpoint" and problem.method.family == "scipy":
        raise ArgumentError(
            f"adjoint='checkpoint' replays the steps of the forward solve, and with method={problem.method.name!r} they are "
            "SciPy's: use adjoint='backsolve'"
        )
    backward_method = arguments.method_named(
        method if adjoint_method is None else adjoint_method, "adjoint_method"
    )
    if mode == "backsolve" and backward_method.family == "symplectic":
        raise ArgumentError(
            f"adjoint='backsolve' solves for the state and its adjoint together, which are no pair (q, p) for "
            f"method={backward_method.name!r}: use adjoint='checkpoint', which is exact, or give adjoint_method"
        )
    if mode == "interpolated" and backward_method.family != "explicit":
        raise ArgumentError(
            f"adjoint='interpolated' solves backwards by an explicit method, not by {backward_method.name!r}: give "
            "adjoint_method='dopri5' where the problem is not stiff backwards, or take adjoint='checkpoint'"
        )
    refused = [name for name in ("restart", "grid_constructor") if options.get(name)]
    if mode == "interpolated" and refused:
        raise ArgumentError(
            f"adjoint='interpolated' solves backwards in one sweep: adjoint_options[{refused[0]!r}] is for "
            "adjoint='backsolve'"
        )
    norm = options.pop("norm", None)
    restart = choices.flag(options, "restart", "adjoint_options")
    options.pop("restart", None)
    if isinstance(norm, str) and norm != "seminorm":
        raise ArgumentError(f"adjoint_options['norm'] must be callable or 'seminorm', got {norm!r}")
    seminorm = norm == "seminorm"
    if seminorm and backward_method.family == "scipy":
        raise ArgumentError(
            "adjoint_options['norm'] = 'seminorm' is for flashode's own methods: SciPy's norm is fixed"
        )
    check_backward(adjoint_rtol, adjoint_atol, method if adjoint_method is None else adjoint_method, options)
    if problem.norm is not None and (norm is None or seminorm):
        norm = _norm_around(problem, counts_params=not seminorm)
        seminorm = False
    if callable(norm):
        options["norm"] = norm
    return AdjointSpec(
        mode=mode,
        checkpoints=checkpoints,
        restart=restart,
        rtol=rtol if adjoint_rtol is None else adjoint_rtol,
        atol=atol if adjoint_atol is None else adjoint_atol,
        method=method if adjoint_method is None else adjoint_method,
        options=options,
        seminorm=seminorm,
        engine=engine,
        progress=progress,
    )


def check_backward(rtol, atol, method, options):
    """Refuses now what would otherwise fail in the backward pass, far from the call at fault."""
    chosen = arguments.method_named(method, "adjoint_method")
    for name, value in (("adjoint_rtol", rtol), ("adjoint_atol", atol)):
        for part in value if isinstance(value, (tuple, list)) else [value]:
            if part is not None:
                arguments.check_tolerance(name, part)
    if chosen.adaptive:
        known = {k: v for k, v in options.items() if k in chosen.options}
        choices.adaptive_fields(known, chosen, 0.0, 1.0)


def _norm_around(problem: Problem, counts_params: bool):
    """The augmented state's norm where the caller measures the state by a norm of their own."""
    members = 1 if problem.shapes is None else len(problem.shapes)

    def norm(augmented):
        t, rest = augmented[0], augmented[1:]
        parts = [abs(t).item()]
        for part in (rest[:members], rest[members : 2 * members]):
            parts.append(float(abs(problem.norm(part[0] if problem.shapes is None else tuple(part)))))
        if counts_params:
            parts += [p.abs().square().mean().sqrt().item() for p in rest[2 * members :] if p.numel()]
        return max(parts)

    return norm


def _check_checkpoints(checkpoints, mode):
    if mode != "checkpoint":
        raise ArgumentError(f"checkpoints is for adjoint='checkpoint', got adjoint={mode!r}")
    if isinstance(checkpoints, bool) or not isinstance(checkpoints, int) or checkpoints < 1:
        raise ArgumentError(
            f"checkpoints must be a whole number of at least 1, or None for all, got {checkpoints!r}"
        )


def take_callbacks(field, func):
    """Gives ``field`` the callbacks that ``func`` has for the backward solve."""
    for name in CALLBACKS:
        callback = getattr(func, name + "_adjoint", None)
        if callback is not None:
            setattr(field, name, callback)


def collect_params(func, adjoint_params, args=()) -> tuple[torch.Tensor, ...]:
    """The tensors that get a gradient, each once: ``adjoint_params`` and those anywhere in ``args``.

    Raises ArgumentError when ``func`` is not a Module and no parameters are given.
    """
    if adjoint_params is None:
        if not isinstance(func, torch.nn.Module):
            raise ArgumentError(
                "func must be an instance of nn.Module to specify the adjoint parameters; alternatively they "
                "can be specified explicitly via the `adjoint_params` argument. If there are no parameters "
                "then it is allowable to set `adjoint_params=()`."
            )
        adjoint_params = _module_params(func)
    elif isinstance(adjoint_params, torch.Tensor):
        adjoint_params = (adjoint_params,)
    elif not isinstance(adjoint_params, Iterable):
        raise ArgumentTypeError(f"adjoint_params must be Tensors, got {type(adjoint_params).__name__}")
    unique = {}
    for x in tree_leaves(args):
        if isinstance(x, torch.Tensor) and x.requires_grad:
            unique.setdefault(id(x), x)
    for i, p in enumerate(adjoint_params):
        if not isinstance(p, torch.Tensor):
            raise ArgumentTypeError(f"adjoint_params[{i}] must be a Tensor, got {type(p).__name__}")
        if p.requires_grad:
            unique.setdefault(id(p), p)
    return tuple(unique.values())


def _module_params(module):
    # The parameters of a DataParallel replica are plain attributes.
    if getattr(module, "_is_replica", False):

        def tensors(m):
            return [(k, v) for k, v in m.__dict__.items() if torch.is_tensor(v) and v.requires_grad]

        return [p for _, p in module._named_members(get_members_fn=tensors)]
    return list(module.parameters())

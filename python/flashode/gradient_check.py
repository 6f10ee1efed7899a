"""Compares the gradients of every mode, and what they cost, on the caller's own problem."""

from __future__ import annotations

import copy
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.utils._pytree import tree_leaves, tree_map

from .adjoint.spec import MODES, collect_params
from .api import odeint, odeint_adjoint
from .arguments import kind_of
from .errors import ArgumentError, ArgumentTypeError, GradientWarning, SolveError
from .problem import Problem

# Relative error above which a gradient is called wrong.
WRONG = 0.01
# The least norm that an error is relative to, as a share of the largest: a gradient that has died
# away is not right or wrong in its digits.
NEGLIGIBLE = 1e-6


@dataclass
class GradientRow:
    """One mode on one problem.

    Attributes:
        mode: ``"direct"``, or what `odeint_adjoint` takes for ``adjoint``.
        errors: norm of the gradient's error over the norm of the truth, by ``"y0"``, ``"params"``
            and ``"t"``, as far as these require gradients. A truth below a millionth of the largest
            of them is taken for that.
        nfe_forward, nfe_backward: calls of ``func`` in either pass.
        seconds: of both passes.
        bytes: the most that was held at a time for a backward pass, the given tensors left out.
        failure: the message of the `SolveError` that ended it; the other entries are then NaN or 0.
    """

    mode: str
    errors: dict[str, float]
    nfe_forward: int = 0
    nfe_backward: int = 0
    seconds: float = 0.0
    bytes: int = 0
    failure: str | None = None

    @property
    def error(self) -> float:
        """The largest of the errors; infinite where there is no gradient."""
        return float("inf") if self.failure else max(self.errors.values())


@dataclass
class GradientReport:
    """What `check_gradients` found: a row per mode, and in words what the truth is.

    ``str(report)`` is the table, and its last line the verdict.
    """

    rows: list[GradientRow]
    truth: str

    @property
    def verdict(self) -> str:
        """Which modes are right here, and which one to use."""
        best = min(self.rows, key=lambda row: row.error)
        right = [row for row in self.rows if row.error <= WRONG]
        wrong = [row for row in self.rows if row not in right]
        if not right:
            return f"no mode is right here; at best {_found(best)}: tighten rtol and atol, or step_size"
        if wrong:
            # Who solves by the adjoint has memory in mind: another adjoint comes before odeint.
            adjoints = [row.mode for row in right if row.mode != "direct"]
            use = f"adjoint={adjoints[0]!r}" if adjoints else "odeint"
            return f"{', '.join(map(_found, wrong))} here: use {use}"
        smallest, fastest = (min(right, key=lambda row: getattr(row, key)) for key in ("bytes", "seconds"))
        worst = max(row.error for row in right)
        agreed = f"{right[0].mode} is" if len(right) == 1 else "all modes are"
        return f"{agreed} right here, to {worst:.1g}; {smallest.mode} holds the least memory, {fastest.mode} is fastest"

    def __str__(self):
        groups = list(dict.fromkeys(group for row in self.rows for group in row.errors))
        head = ["mode", *(f"error {group}" for group in groups), "nfe forward", "nfe backward", "ms", "kB"]
        lines = [head]
        for row in self.rows:
            errors = [f"{row.errors.get(group, float('nan')):.1e}" for group in groups]
            cost = [row.nfe_forward, row.nfe_backward, f"{1e3 * row.seconds:.1f}", f"{row.bytes / 1e3:.1f}"]
            lines.append([row.mode, *(["-"] * (len(head) - 1) if row.failure else [*errors, *cost])])
        widths = [max(len(str(line[i])) for line in lines) for i in range(len(head))]
        table = ["  ".join(f"{str(x):>{w}}" for x, w in zip(line, widths)) for line in lines]
        failures = [f"{row.mode} fails: {row.failure}" for row in self.rows if row.failure]
        return "\n".join([f"errors against {self.truth}", *table, *failures, self.verdict])


def _found(row: GradientRow) -> str:
    return f"{row.mode} fails" if row.failure else f"{row.mode} is wrong by {row.error:.2g}"


def check_gradients(
    func, y0, t, *, params=None, loss=None, modes=("direct", "checkpoint", "backsolve"),
    rtol=1e-7, atol=1e-9, method=None, options=None, args=(), engine="auto",
    adjoint_rtol=None, adjoint_atol=None, adjoint_method=None, adjoint_options=None, checkpoints=None,
    tight=1e-3, file=None,
) -> GradientReport:  # fmt: skip
    """Compares the gradients of the modes with the true ones, and prints a table and a verdict.

    The truth is the gradient of `odeint` by ``dopri8`` at tolerances ``tight`` times those given,
    though not below the rounding of its dtype: float64 where a copy of ``func`` in float64 can be
    called (a Module, or a function that does not hold tensors of another dtype), else that of ``y0``.

    Args:
        func, y0, t, rtol, atol, method, options, args, engine: as for `odeint`.
        params: tensors that get gradients; by default the parameters of ``func`` where it is a
            Module. Those in ``args`` that require grad come in addition.
        loss: callable that makes a real scalar Tensor of what `odeint` returns; by default a linear
            function of all outputs, the same every time.
        modes: of ``"direct"``, ``"checkpoint"``, ``"backsolve"`` and ``"interpolated"``.
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options, checkpoints: as for
            `odeint_adjoint`; ``checkpoints`` is for that mode alone.
        tight: factor between 0 and 1.
        file: where the table is printed; standard output by default.

    Returns:
        The `GradientReport`. Gradients of the tensors given are left as they are.

    Raises:
        As `odeint_adjoint`; a mode that raises a `SolveError` is a row that says so.

    Example:
        >>> net = torch.nn.Linear(2, 2)
        >>> report = check_gradients(lambda t, y: net(y).tanh(), torch.ones(2), torch.tensor([0.0, 1.0]),
        ...                          params=net.parameters(), modes=("direct", "backsolve"))
    """
    _check_arguments(modes, loss, tight)
    if params is None and not isinstance(func, torch.nn.Module):
        params = ()
    problem = Problem.from_call(func, y0, t, rtol, atol, method, options, None, args)
    forward = {"rtol": rtol, "atol": atol, "method": method, "options": options}
    backward = {
        "adjoint_rtol": adjoint_rtol, "adjoint_atol": adjoint_atol, "adjoint_method": adjoint_method,
        "adjoint_options": adjoint_options, "checkpoints": checkpoints,
    }  # fmt: skip
    case = _Case(
        func, _leaf(y0), _leaf(t, t.requires_grad), args, collect_params(func, params, args), loss or _linear
    )
    truth, words = _truth(case, problem, forward, tight, engine)
    rows = [_row(case, mode, truth, forward | {"engine": engine}, backward) for mode in modes]
    report = GradientReport(rows, words)
    print(report, file=file)
    return report


def _check_arguments(modes, loss, tight):
    known = ("direct", *MODES)
    if isinstance(modes, str) or not isinstance(modes, (tuple, list)):
        raise ArgumentTypeError(f"modes must be a tuple of names, got {kind_of(modes)}")
    if not modes or not all(isinstance(mode, str) and mode in known for mode in modes):
        raise ArgumentError(f"modes must be one or more of {list(known)}, got {list(modes)}")
    if loss is not None and not callable(loss):
        raise ArgumentTypeError(f"loss must be callable as loss(ys), got {kind_of(loss)}")
    if isinstance(tight, bool) or not isinstance(tight, (int, float)) or not 0 < tight < 1:
        raise ArgumentError(f"tight must be a number between 0 and 1, got {tight!r}")


# ---- one problem in one precision ------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """What is differentiated, at which tensors."""

    func: Callable
    y0: torch.Tensor | tuple[torch.Tensor, ...]
    t: torch.Tensor
    args: tuple
    params: tuple[torch.Tensor, ...]
    loss: Callable

    @property
    def inputs(self) -> dict[str, list[torch.Tensor]]:
        times = [self.t] if self.t.requires_grad else []
        groups = {"y0": tree_leaves(self.y0), "params": list(self.params), "t": times}
        return {group: tensors for group, tensors in groups.items() if tensors}


def _leaf(tensors, requires_grad=True):
    return tree_map(lambda x: x.detach().requires_grad_(requires_grad), tensors)


def _linear(ys):
    """Weights that look random, and are the same everywhere."""
    terms = 0.0
    for y in tree_leaves(ys):
        weights = torch.cos(torch.arange(y.numel(), dtype=torch.float64, device=y.device)).to(y.dtype)
        terms = terms + (y.reshape(-1) * weights).real.sum()
    return terms


def _truth(case, problem, forward, tight, engine):
    """The true gradients by group, and how they were made, in words."""
    case = _in_double(case) or case
    dtype = torch.promote_types(tree_leaves(case.y0)[0].dtype.to_real(), torch.float32)
    floor = 100 * torch.finfo(dtype).eps
    rtol, atol = (_tightened(forward[key], tight, floor) for key in ("rtol", "atol"))
    options = forward["options"] if problem.adaptive else None
    forward = {"rtol": rtol, "atol": atol, "method": "dopri8", "options": options, "engine": engine}
    grads = _run(case, "direct", forward, {}).grads
    return (
        grads,
        f"direct gradients by dopri8 in {str(dtype)[6:]} at rtol {_short(rtol)}, atol {_short(atol)}",
    )


def _in_double(case: _Case) -> _Case | None:
    """The same in float64; None where ``func`` or ``loss`` cannot be called there."""
    twins = {}  # of tensors and whatever else is copied, by id

    def twin(x):
        if not isinstance(x, torch.Tensor) or not (x.is_floating_point() or x.is_complex()):
            return x
        wide = torch.promote_types(x.dtype, torch.float64)
        return twins.setdefault(id(x), x.detach().to(wide).requires_grad_(x.requires_grad))

    y0, t, args = tree_map(twin, (case.y0, case.t, case.args))
    try:
        func = copy.deepcopy(case.func, twins)
        if isinstance(func, torch.nn.Module):
            func.double()
        with torch.no_grad():
            slope = func(t[0], y0, *args)
            case.loss(tree_map(lambda y: y.expand(len(t), *y.shape), y0))
    except Exception:  # whatever the caller's code raises, it says that it is not for float64
        return None
    if any(a.dtype != b.dtype for a, b in zip(tree_leaves(slope), tree_leaves(y0))):
        return None
    return replace(
        case, func=func, y0=y0, t=t, args=args, params=tuple(twins.get(id(p), p) for p in case.params)
    )


def _tightened(tol, tight, floor):
    """Not below ``floor``, nor above ``tol``."""

    def one(x):
        if isinstance(x, torch.Tensor):
            return torch.maximum(x * tight, x.clamp(max=floor))
        return max(x * tight, min(x, floor))

    return tree_map(one, tol)


def _short(tol) -> str:
    return " to ".join(f"{x:.0e}" for x in sorted({min(_numbers(tol)), max(_numbers(tol))}))


def _numbers(tol):
    return [
        x
        for part in tree_leaves(tol)
        for x in (part.reshape(-1).tolist() if isinstance(part, torch.Tensor) else [part])
    ]


# ---- one mode --------------------------------------------------------------------------------


def _row(case, mode, truth, forward, backward) -> GradientRow:
    own = [case.func.parameters(), case.func.buffers()] if isinstance(case.func, torch.nn.Module) else []
    saved = _Saved(tree_leaves((case.y0, case.t, case.args, case.params, *map(list, own))))
    try:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            states = _run(case, mode, forward, backward).bytes
        # Again, because the hooks take time.
        run = _run(case, mode, forward, backward)
    except SolveError as error:
        return GradientRow(mode, dict.fromkeys(truth, float("nan")), failure=str(error))
    return GradientRow(
        mode, _errors(run.grads, truth), run.nfe_forward, run.nfe_backward, run.seconds, saved.peak + states
    )


def _errors(grads, truth) -> dict[str, float]:
    """Relative errors by group."""
    sizes = {group: _flat(tensors).norm().item() for group, tensors in truth.items()}
    least = NEGLIGIBLE * max(sizes.values())
    offs = {group: (_flat(grads[group]) - _flat(truth[group])).norm().item() for group in truth}
    return {group: off / max(sizes[group], least) if off else 0.0 for group, off in offs.items()}


def _flat(tensors):
    return torch.cat([torch.view_as_real(x.cdouble()).reshape(-1) for x in tensors])


@dataclass
class _Run:
    grads: dict[str, list[torch.Tensor]]
    nfe_forward: int
    nfe_backward: int
    seconds: float
    bytes: int  # of the states that `checkpoint` holds, of which autograd knows nothing


def _run(case: _Case, mode, forward, backward) -> _Run:
    func = _Counted(case.func)
    begin = time.perf_counter()
    with torch.enable_grad(), warnings.catch_warnings():
        # The table says by how much.
        warnings.filterwarnings("ignore", "odeint_adjoint: at t=", GradientWarning)
        if mode == "direct":
            ys = odeint(func, case.y0, case.t, args=case.args, **forward)
        else:
            own = backward if mode == "checkpoint" else backward | {"checkpoints": None}
            ys = odeint_adjoint(
                func,
                case.y0,
                case.t,
                args=case.args,
                adjoint_params=case.params,
                adjoint=mode,
                **forward,
                **own,
            )
        value = case.loss(ys)
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.is_complex():
            raise ArgumentTypeError(f"loss must return a real scalar Tensor, got {kind_of(value)}")
        if not value.requires_grad:
            raise ArgumentError(
                f"in mode {mode!r} the loss has no graph: it must be differentiable in what odeint returns; SciPy's "
                "solvers have no graph either, and with them modes=('backsolve',) is the one to check"
            )
        nfe, states = func.calls, _states_behind(value)
        inputs = case.inputs
        flat = iter(
            torch.autograd.grad(value, tree_leaves(inputs), allow_unused=True, materialize_grads=True)
        )
        grads = {group: [next(flat) for _ in tensors] for group, tensors in inputs.items()}
    return _Run(grads, nfe, func.calls - nfe, time.perf_counter() - begin, states)


def _states_behind(value) -> int:
    """Bytes that recordings of steps hold in the graph of ``value``."""
    nodes, seen, total = [value.grad_fn], set(), 0
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            total += getattr(getattr(node, "recording", None), "nbytes", 0)
            nodes += (behind for behind, _ in node.next_functions)
    return total


class _Counted:
    """A field that counts its calls, and has its callbacks and its name."""

    def __init__(self, func):
        self.__wrapped__, self.calls = func, 0

    def __call__(self, *args):
        self.calls += 1
        return self.__wrapped__(*args)

    def __getattr__(self, name):
        return getattr(self.__wrapped__, name)


class _Saved:
    """Bytes of the storages that autograd holds, now and at most; those ``given`` do not count."""

    def __init__(self, given):
        self.given = {_key(x) for x in given if isinstance(x, torch.Tensor)}
        self.holders, self.now, self.peak = Counter(), 0, 0

    def pack(self, x):
        # Detached: a result that holds the node which saved it would never be let go.
        return _Held(x.detach(), self)

    def unpack(self, held):
        return held.x

    def hold(self, x):
        key = _key(x)
        if key not in self.given and not self.holders[key]:
            self.now += x.untyped_storage().nbytes()
            self.peak = max(self.peak, self.now)
        self.holders[key] += 1

    def release(self, x):
        key = _key(x)
        self.holders[key] -= 1
        if key not in self.given and not self.holders[key]:
            self.now -= x.untyped_storage().nbytes()


def _key(x):
    return x.untyped_storage().data_ptr()


class _Held:
    """A tensor that autograd keeps, counted until it is let go."""

    def __init__(self, x, saved: _Saved):
        self.x, self.saved = x, saved
        saved.hold(x)

    def __del__(self):
        self.saved.release(self.x)

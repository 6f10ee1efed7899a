"""Solves by programs of compiled fields: a whole solve is one call, and so is its backward pass."""

from __future__ import annotations

import contextlib
import ctypes
import math
from array import array
from dataclasses import replace

import torch

from .. import extension, transforms
from ..augmented import Augmented, Gradients, Path
from ..batched import BatchOutcome, BatchProblem
from ..errors import ArgumentError, CompileError, Status, StepFailure
from ..problem import Problem
from ..program import NO_GRADIENTS, CompiledField, Program, cuda, example
from ..program.call import Call
from ..progress import Progress
from ..solution import Outcome
from . import reference
from .on_device import OnDevice

WAY_OUT = "engine='native' and 'reference' call the field as it is"
_POINTER = ctypes.c_void_p


def supports(problem: Problem) -> str | None:
    """Why this engine cannot serve a problem, or None."""
    p = problem
    if not isinstance(p.func, CompiledField):
        return "func is not compiled; pass flashode.compile(func)"
    if extension.C is None:
        return extension.missing
    if p.method.family != "explicit":
        return f"no programs are generated for {p.method.name}"
    if p.y0.dtype in (torch.float16, torch.bfloat16):
        return f"no programs are generated for {p.y0.dtype} states; solve from y0.float()"
    if p.y0.dtype not in (torch.float32, torch.float64):
        return f"no programs are generated for {p.y0.dtype} states"
    if p.y0.device.type not in ("cpu", "cuda"):
        return f"no programs are generated for {p.y0.device}"
    if p.y0.is_cuda and (reason := cuda.missing()):
        return reason
    if p.y0.is_cuda and torch.is_grad_enabled() and (p.y0.requires_grad or p.differentiates_time):
        return NO_GRADIENTS
    if not p.y0.numel():
        return "y0 is empty"
    if p.dtypes is not None and len(set(p.dtypes)) > 1:
        return "the members of y0 have different dtypes"
    if p.events:
        return "event functions are Python, and are not called from programs"
    if any(callback is not None for callback in p.callbacks):
        what = "a progress bar" if any(isinstance(c, Progress) for c in p.callbacks) else "callbacks"
        return f"{what} cannot be called from programs"
    if p.norm is not None:
        return "options['norm'] is Python, and is not called from programs"
    if type(p.y0) not in (torch.Tensor, torch.nn.Parameter) or torch._C._len_torch_dispatch_stack():
        return "y0 is a tensor subclass, or a dispatch mode is active"
    return transforms.active()


def solve(problem: Problem, recording=None, params=None) -> Outcome:
    """Integrates through all output times. Outputs carry the gradients of the discrete solve, to all tensors that
    ``func`` captured or to those among ``params``."""
    if isinstance(recording, Path):
        raise ArgumentError("the compiled engine keeps no dense output: solve with func itself, uncompiled")
    if any(isinstance(callback, Progress) for callback in problem.callbacks):
        raise ArgumentError(f"the compiled engine cannot serve this call: {supports(problem)}; {WAY_OUT}")
    program, inputs, captured = problem.func.program(problem)
    if not program.checked:
        check(problem, program, inputs)
    outcome = _solved(problem, program, inputs, captured, params)
    vars(problem.func)["evaluations"] = outcome.nfe
    if not isinstance(problem, BatchProblem) and not outcome.status.ok:
        find_culprit(problem, outcome)
    return outcome


def _solved(problem: Problem, program: Program, inputs, captured, params) -> Outcome | BatchOutcome:
    if program.gpu:
        return _DeviceRun(problem, program, inputs).solve()
    ready = problem.func.ready(problem, captured, lambda: _ready(problem, program))
    if params is not None:
        wanted = {id(p) for p in params}
        inputs = tuple(x if id(x) in wanted else x.detach() for x in inputs)
    times = (x if x is not None and x.requires_grad else None for x in (problem.t, problem.grid))
    fields = ready.solve(problem.y0, inputs, *times)
    if isinstance(problem, BatchProblem):
        return BatchOutcome(**fields)
    ends = array("d", fields.pop("accepted_times"))
    return Outcome(Status(fields.pop("status")), accepted_times=ends, **fields)


def solve_batch(problem: BatchProblem) -> BatchOutcome:
    """Integrates every sample through its output times."""
    return solve(problem)


# ---- calls ---------------------------------------------------------------------------------


class _Asked:
    """What a program is asked for by a problem, whatever the start and the numbers in tensors are. Keeps alive what
    the call points to."""

    def __init__(self, problem: Problem, program: Program):
        self.p, self.program = problem, program
        self.batched = isinstance(problem, BatchProblem)
        self.call, self.kept = Call(), []
        self.set_places()
        self.set_control()
        self.set_times()

    def array(self, x: torch.Tensor, dtype) -> torch.Tensor:
        """Contiguous memory with the values of a tensor: its own, if it is so."""
        x = x.detach()  # holds the memory even where ``x.data = ...`` gives x another
        if x.dtype != dtype or not x.is_contiguous() or not x.is_cpu:
            x = x.to("cpu", dtype).contiguous()
        self.kept.append(x)
        return x

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """The numbers of a tensor that the caller may write to before the next solve."""
        return self.array(x.detach().to("cpu", torch.float64, copy=True), torch.float64)

    def numbers(self, values, of=ctypes.c_double) -> int:
        memory = (of * max(1, len(values)))(*values)
        self.kept.append(memory)
        return ctypes.addressof(memory)

    def set_places(self):
        call, p = self.call, self.p
        state = self.program.placed(p)
        call.samples, call.row = state.samples, p.y0.numel()
        call.offset, call.stride, call.members = state.offset, state.stride, state.members
        call.own_offset, call.own_stride = state.own_offset, state.own_stride
        call.member_count = len(p.norm_offsets) - 1

    @property
    def outputs(self) -> int:
        return self.p.times.shape[1] if self.batched else len(self.p.times)

    def set_control(self):
        call, p = self.call, self.p
        for name in ("rtol", "atol"):
            value = getattr(p, name)
            if isinstance(value, torch.Tensor):
                setattr(call, f"each_{name}", self.array(value, self.program.dtype).data_ptr())
            else:
                setattr(call, name, value)
        control = p.control
        call.safety, call.ifactor, call.dfactor = control.safety, control.ifactor, control.dfactor
        call.min_step, call.max_step = control.min_step, control.max_step
        call.betas = tuple(control.betas)
        call.first_step = math.nan if p.first_step is None else p.first_step
        call.max_num_steps, call.perturb = p.max_num_steps, p.perturb

    def set_times(self):
        call, p = self.call, self.p
        call.outputs = self.outputs
        if self.batched:
            shared = p.times.stride(0) == 0
            self.times = self.copy(p.times[:1] if shared else p.times)
            call.times_stride = 0 if shared else self.outputs
            directions = self.array(p.direction, torch.float64)
            low, high = (self.array(x, torch.float64) for x in p.time_bounds)
            call.direction, call.low, call.high = directions.data_ptr(), low.data_ptr(), high.data_ptr()
            call.end = math.inf
        else:
            self.times = self.copy(p.t if p.direction > 0 else -p.t)
            call.direction = self.numbers((p.direction, *p.time_bounds))
            call.low, call.high = call.direction + 8, call.direction + 16
            call.end = p.end
            call.stop_count = len(p.stops)
            if p.stops:
                call.stops = self.numbers([t for t, _ in p.stops])
                call.stop_jumps = self.numbers([jumps for _, jumps in p.stops], ctypes.c_uint8)
        call.times = self.times.data_ptr()
        if p.grid is not None:
            grid = self.array(p.grid, torch.float64)
            call.grid, call.grid_points = grid.data_ptr(), len(grid)


class _Run(_Asked):
    """One call of a program: of single evaluations, of a sweep, and of all on a GPU."""

    def __init__(self, problem: Problem, program: Program, inputs):
        super().__init__(problem, program)
        self.inputs = [self.array(x, program.dtype) for x in inputs]
        self.y0 = self.array(problem.y0, program.dtype)
        self.ys = self.y0.new_empty((self.outputs, *problem.y0.shape))
        self.y_end = torch.empty_like(self.y0)
        call = self.call
        call.y0, call.ys, call.y_end = self.y0.data_ptr(), self.ys.data_ptr(), self.y_end.data_ptr()
        call.inputs = self.addresses(self.inputs)
        call.own = self.addresses([self.inputs[i] for i, _, _ in program.own])
        call.threads = torch.get_num_threads()
        self.set_results()

    def set_results(self):
        self.whole, self.real = (ctypes.c_int64 * 4)(), (ctypes.c_double * 3)()
        whole, real = ctypes.addressof(self.whole), ctypes.addressof(self.real)
        call = self.call
        call.status, call.accepted, call.rejected, call.filled = (whole + 8 * i for i in range(4))
        call.t, call.dt, call.error_ratio = (real + 8 * i for i in range(3))

    def execute(self, name: str):
        """Calls an entry of the program."""
        self.program.entries[name](ctypes.addressof(self.call))

    def pull_back(self, name, grad_ys, grad_t):
        """Gradients of the start and of the inputs, None for those that have none; of the times in place."""
        call, program = self.call, self.program
        adj_y0 = torch.zeros_like(self.y0)
        grads = [
            torch.zeros_like(x) if i in program.differentiable else None for i, x in enumerate(self.inputs)
        ]
        call.grad_ys, call.adj_y0 = self.array(grad_ys, program.dtype).data_ptr(), adj_y0.data_ptr()
        call.grad_inputs = self.addresses(grads)
        call.grad_own = self.addresses([grads[i] for i, _, _ in program.own])
        call.grad_t = None if grad_t is None else grad_t.data_ptr()
        self.execute(name)
        return adj_y0.reshape(self.p.y0.shape), grads

    def addresses(self, tensors) -> int:
        return self.numbers([None if x is None else x.data_ptr() for x in tensors], _POINTER)


class _DeviceRun(OnDevice, _Run):
    """The same on a GPU."""


def _ready(problem: Problem, program: Program):
    """The solve of a problem by a program, from any start: a ``ProgramSolve`` of the extension."""
    asked = _Asked(problem, program)
    return extension.C.ProgramSolve(
        call=ctypes.addressof(asked.call),
        y0=problem.y0,
        solve=program.entries["solve"],
        reverse=program.entries.get("reverse"),
        release=program.release,
        own=[i for i, _, _ in program.own],
        differentiable=program.differentiable or (),
        own_clocks=asked.batched,
        steps_on_times=problem.steps_on_times,
        memory=(asked.kept, program),
    )


def find_culprit(problem: Problem, outcome: Outcome):
    """The slopes of the last trial step: taken again, uncompiled, from the last good state.

    Its length is the one that is tried next, or where that is too short to be tried, the one before it.
    """
    run = reference.Run(problem)
    run.t0, run.y0 = outcome.t, outcome.y1
    with torch.no_grad(), contextlib.suppress(StepFailure):
        f0 = run.call(run.t0, run.y0)
        outcome.k = [f0]
        for dt in (outcome.dt, outcome.dt / problem.control.dfactor):
            if not (math.isfinite(dt) and dt > 0 and torch.isfinite(f0).all()):
                return
            outcome.k, outcome.y1 = run.rk_step(f0, outcome.t + dt, dt, None)
            if not all(torch.isfinite(x).all() for x in (*outcome.k, outcome.y1)):
                return


def sweep(augmented: Augmented) -> Gradients:
    """The backward solve, from the last output back to the first: `engines.reference_sweep.sweep`."""
    g, p = augmented, augmented.problem
    program, inputs, _ = p.func.program(p, "sweep")
    if not program.checked:
        check(p, program, inputs)
    run = _Run(p, program, inputs)
    call = run.call
    ys = run.array(g.ys, program.dtype)
    call.ys, call.seminorm = ys.data_ptr(), g.seminorm
    call.first_step = math.nan if g.first_step is None else g.first_step
    call.input_sizes = run.numbers([x.numel() for x in inputs], ctypes.c_int64)
    call.input_count = len(inputs)
    grad_t = torch.zeros(len(p.times), dtype=torch.float64) if g.needs_t else None
    adj_y, grads = run.pull_back("sweep", g.grad_ys, grad_t)
    found = {id(x): grad for x, grad in zip(inputs, grads) if grad is not None}
    adj_params = [
        found[id(param)].to(param.dtype) if id(param) in found else torch.zeros_like(param)
        for param in g.params
    ]
    (status, accepted, rejected, _), (t, dt, error_ratio) = run.whole, run.real
    vjp_t = torch.zeros((), dtype=program.dtype) if grad_t is None else grad_t[0].to(program.dtype)
    return Gradients(
        Status(status), vjp_t, adj_y, adj_params, call.nfe, accepted, rejected, t, dt, error_ratio,
        drift=call.drift, drift_t=call.drift_t,
    )  # fmt: skip


# ---- the check of a new program ------------------------------------------------------------


def check(problem: Problem, program: Program, inputs):
    """Compares one evaluation, and one vector-Jacobian product, with those of func itself.

    Raises CompileError where they differ: a program must not give what func would not.
    """
    t, y = example(problem)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device)
    y = y + 0.01 * (1 + y.abs()) * noise  # a start is often at zero, where much is alike
    run = (_DeviceRun if program.gpu else _Run)(replace(problem, y0=y), program, inputs)
    run.call.times = run.array(t, torch.float64).data_ptr()  # as func sees them
    run.call.times_stride = int(run.batched)
    run.execute("evaluate")
    backward = program.differentiable is not None
    with torch.inference_mode(False), torch.set_grad_enabled(backward):
        wanted = [inputs[i] for i in program.differentiable or ()]
        # Leaves of their own: what func captured may have a graph behind it, or hooks.
        y, t = (x.clone().requires_grad_(backward) for x in (y, t))
        f = problem.slope(problem.func.func(t, problem.unflatten(y), *problem.args))
        _require_alike("f(t, y)", run.ys[0], f)
        if backward:
            grads = [None] * (2 + len(wanted))
            if f.requires_grad:
                grads = torch.autograd.grad(f, [y, t, *wanted], noise, allow_unused=True)
            of_t = torch.zeros(t.shape, dtype=torch.float64)
            of_y, of_inputs = run.pull_back("pull_back", noise, of_t)
            names = ["y", "t", *(f"captured tensor {i}" for i in program.differentiable)]
            found = [of_y, of_t.sum(), *(g for g in of_inputs if g is not None)]
            for name, ours, theirs in zip(names, found, grads):
                theirs = torch.zeros_like(ours) if theirs is None else theirs
                _require_alike(f"the gradient to {name}", ours, theirs.sum() if name == "t" else theirs)
    program.checked = True


def _require_alike(what, ours, theirs):
    theirs = theirs.detach()
    finite = torch.isfinite(theirs)
    size = theirs[finite].abs().max().item() if finite.any() else 0.0
    coarse = theirs.dtype != torch.float64  # gradients to captured tensors may have 16 bits
    allowed = (1e-2 if coarse else 1e-5) * size + 1e-6
    off = (ours.reshape(theirs.shape).to(theirs.dtype) - theirs)[finite].abs()
    if off.numel() and not off.max() <= allowed:
        raise CompileError(
            f"the program that was generated for func is wrong: {what} is off by {off.max().item():.3g}, and its largest "
            f"entry is {size:.3g}; solve without flashode.compile, and please report it"
        )

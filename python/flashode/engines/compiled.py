"""Solves by programs of compiled fields: a whole solve is one call, and so is its backward pass."""

from __future__ import annotations

import contextlib
import ctypes
import math
import time
from array import array
from dataclasses import replace

import torch

from .. import transforms
from ..augmented import Augmented, Gradients, Path
from ..batched import BatchOutcome, BatchProblem
from ..errors import ArgumentError, CompileError, Status, StepFailure
from ..first_only import first_only
from ..problem import Problem
from ..program import NO_GRADIENTS, CompiledField, Program, cuda, example
from ..program.call import Call, Returned, interruption
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
    if p.method.family != "explicit":
        return f"no programs are generated for {p.method.name}"
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
    if torch.is_autocast_enabled(p.y0.device.type):
        return "torch.autocast is active, and programs work in the precision of y0"
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
    program, inputs = problem.func.program(problem)
    if not program.checked:
        check(problem, program, inputs)
    if program.differentiable is None:
        return _run(problem, program, inputs).solve(records=False)
    return _recorded(problem, program, inputs, params)


def solve_batch(problem: BatchProblem) -> BatchOutcome:
    """Integrates every sample through its output times."""
    return solve(problem)


# ---- calls ---------------------------------------------------------------------------------


class _Run:
    """One problem as a program is called with it. Keeps alive what the call points to."""

    def __init__(self, problem: Problem, program: Program, inputs):
        self.p, self.program = problem, program
        self.batched = isinstance(problem, BatchProblem)
        self.call, self.kept = Call(), []
        self.inputs = [self.array(x, program.dtype) for x in inputs]
        self.set_state()
        self.set_control()
        self.set_times()
        self.set_results()

    def array(self, x: torch.Tensor, dtype) -> torch.Tensor:
        """Contiguous memory with the values of a tensor: its own, if it is so."""
        x = x.detach()  # holds the memory even where ``x.data = ...`` gives x another
        if x.dtype != dtype or not x.is_contiguous() or not x.is_cpu:
            x = x.to("cpu", dtype).contiguous()
        self.kept.append(x)
        return x

    def numbers(self, values, of=ctypes.c_double) -> int:
        memory = (of * max(1, len(values)))(*values)
        self.kept.append(memory)
        return ctypes.addressof(memory)

    def set_state(self):
        call, p, program = self.call, self.p, self.program
        state = program.placed(p)
        self.y0 = self.array(p.y0, program.dtype)
        self.ys = self.y0.new_empty((self.outputs, *p.y0.shape))
        self.y_end = torch.empty_like(self.y0)
        call.samples, call.row = state.samples, p.y0.numel()
        call.offset, call.stride, call.members = state.offset, state.stride, state.members
        call.member_count = len(p.norm_offsets) - 1
        call.y0, call.ys, call.y_end = self.y0.data_ptr(), self.ys.data_ptr(), self.y_end.data_ptr()
        call.inputs = self.addresses(self.inputs)
        call.own = self.addresses([self.inputs[i] for i, _, _ in program.own])
        call.own_offset, call.own_stride = state.own_offset, state.own_stride

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
        call.threads = torch.get_num_threads()
        call.interrupted, self.raised = interruption()

    def set_times(self):
        call, p = self.call, self.p
        call.outputs = self.outputs
        if self.batched:
            shared = p.times.stride(0) == 0
            self.times = self.array(p.times[:1] if shared else p.times, torch.float64)
            call.times_stride = 0 if shared else self.outputs
            directions = self.array(p.direction, torch.float64)
            low, high = (self.array(x, torch.float64) for x in p.time_bounds)
            call.direction, call.low, call.high = directions.data_ptr(), low.data_ptr(), high.data_ptr()
            call.end = math.inf
        else:
            self.times = self.array(p.t if p.direction > 0 else -p.t, torch.float64)
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

    def set_results(self):
        call = self.call
        if self.batched:
            n = call.samples
            self.whole, self.real = (
                torch.empty((4, n), dtype=torch.int64),
                torch.empty((3, n), dtype=torch.float64),
            )
            whole, real = self.whole.data_ptr(), self.real.data_ptr()
        else:
            n = 1
            self.whole, self.real = (ctypes.c_int64 * 4)(), (ctypes.c_double * 3)()
            whole, real = ctypes.addressof(self.whole), ctypes.addressof(self.real)
        call.status, call.accepted, call.rejected, call.filled = (whole + 8 * n * i for i in range(4))
        call.t, call.dt, call.error_ratio = (real + 8 * n * i for i in range(3))

    def execute(self, name: str):
        """Calls an entry of the program."""
        began = time.perf_counter()
        returned = self.program.entries[name](ctypes.byref(self.call))
        self.program.spend(name, time.perf_counter() - began)
        if returned == Returned.INTERRUPTED:
            raise self.raised[0]
        if returned == Returned.OUT_OF_MEMORY:
            raise MemoryError(
                "not enough memory for the steps of this solve, which its backward pass needs: solve under "
                "torch.no_grad(), or fewer samples at a time"
            )

    def solve(self, records: bool):
        self.call.records = records
        try:
            self.execute("solve")
            return self.batch_outcome() if self.batched else self.outcome()
        finally:
            if not records:
                self.release()

    def pull_back(self, name, grad_ys, grad_t):
        """Gradients of the start and of the inputs, None for those that have none; of the times in place."""
        call, program, kept = self.call, self.program, len(self.kept)
        adj_y0 = torch.zeros_like(self.y0)
        grads = [
            torch.zeros_like(x) if i in program.differentiable else None for i, x in enumerate(self.inputs)
        ]
        call.grad_ys, call.adj_y0 = self.array(grad_ys, program.dtype).data_ptr(), adj_y0.data_ptr()
        call.grad_inputs = self.addresses(grads)
        call.grad_own = self.addresses([grads[i] for i, _, _ in program.own])
        call.grad_t = None if grad_t is None else grad_t.data_ptr()
        self.execute(name)
        del self.kept[kept:]  # of this pass alone: a graph may be gone back through again and again
        return adj_y0.reshape(self.p.y0.shape), grads

    def addresses(self, tensors) -> int:
        return self.numbers([None if x is None else x.data_ptr() for x in tensors], _POINTER)

    def release(self):
        """Gives back what the program has allocated."""
        if self.call.recording:
            self.program.library.functions.flashode_release(_POINTER(self.call.recording))
            self.call.recording = None

    def outcome(self) -> Outcome:
        (status, accepted, rejected, _), (t, dt, error_ratio) = self.whole, self.real
        times = array("d")
        if accepted:
            times.frombytes(ctypes.string_at(self.call.accepted_times, times.itemsize * accepted))
        outcome = Outcome(
            Status(status),
            self.ys,
            self.call.nfe,
            accepted,
            rejected,
            times,
            t,
            dt,
            error_ratio,
            y1=self.y_end,
        )
        if not outcome.status.ok:
            self.find_culprit(outcome)
        return outcome

    def batch_outcome(self) -> BatchOutcome:
        (status, accepted, rejected, filled), (t, dt, error_ratio) = self.whole, self.real
        return BatchOutcome(status, self.ys, self.call.nfe, accepted, rejected, filled, t, dt, error_ratio)

    def find_culprit(self, outcome: Outcome):
        """The slopes of the last trial step: taken again, uncompiled, from the last good state.

        Its length is the one that is tried next, or where that is too short to be tried, the one before it.
        """
        run = reference.Run(self.p)
        run.t0, run.y0 = outcome.t, self.y_end
        with torch.no_grad(), contextlib.suppress(StepFailure):
            f0 = run.call(run.t0, run.y0)
            outcome.k, outcome.y1 = [f0], run.y0
            for dt in (outcome.dt, outcome.dt / self.p.control.dfactor):
                if not (math.isfinite(dt) and dt > 0 and torch.isfinite(f0).all()):
                    return
                outcome.k, outcome.y1 = run.rk_step(f0, outcome.t + dt, dt, None)
                if not all(torch.isfinite(x).all() for x in (*outcome.k, outcome.y1)):
                    return


def sweep(augmented: Augmented) -> Gradients:
    """The backward solve, from the last output back to the first: `engines.reference_sweep.sweep`."""
    g, p = augmented, augmented.problem
    program, inputs = p.func.program(p, "sweep")
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


class _DeviceRun(OnDevice, _Run):
    """The same on a GPU."""


def _run(problem: Problem, program: Program, inputs) -> _Run:
    return (_DeviceRun if program.gpu else _Run)(problem, program, inputs)


# ---- the check of a new program ------------------------------------------------------------


def check(problem: Problem, program: Program, inputs):
    """Compares one evaluation, and one vector-Jacobian product, with those of func itself.

    Raises CompileError where they differ: a program must not give what func would not.
    """
    t, y = example(problem)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device)
    y = y + 0.01 * (1 + y.abs()) * noise  # a start is often at zero, where much is alike
    run = _run(replace(problem, y0=y), program, inputs)
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
    allowed = {torch.float32: 1e-2, torch.float64: 1e-5}[theirs.dtype] * size + 1e-6
    off = (ours.reshape(theirs.shape).to(theirs.dtype) - theirs)[finite].abs()
    if off.numel() and not off.max() <= allowed:
        raise CompileError(
            f"the program that was generated for func is wrong: {what} is off by {off.max().item():.3g}, and its largest "
            f"entry is {size:.3g}; solve without flashode.compile, and please report it"
        )


# ---- gradients -----------------------------------------------------------------------------


def _recorded(problem: Problem, program: Program, inputs, params):
    """A solve whose outputs carry gradients, by one backward program."""
    result = []
    differentiable = [inputs[i] for i in program.differentiable]
    if params is not None:
        wanted = {id(p) for p in params}
        differentiable = [x if id(x) in wanted else x.detach() for x in differentiable]
    ys = _Solve.apply(problem, program, inputs, result, problem.y0, problem.t, problem.grid, *differentiable)
    (outcome,) = result
    outcome.ys = ys
    return outcome


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem, program, inputs, result, y0, t, grid, *differentiable):
        run = _Run(problem, program, inputs)
        try:
            outcome = run.solve(records=True)
        except BaseException:
            run.release()
            raise
        result.append(outcome)
        ctx.run, ctx.times = _Held(run), t
        ctx.save_for_backward(*inputs)  # autograd says so where one is written to in between
        return outcome.ys.detach()  # what is returned itself gets a graph, in which the run would hold itself

    @staticmethod
    def backward(ctx, grad_ys):
        if transforms.is_batched(grad_ys) or transforms.is_batch_of_gradients(grad_ys):
            raise ArgumentError(
                "the backward pass of a compiled field takes one gradient at a time: leave out is_grads_batched=True or "
                "vectorize=True, or solve with func itself"
            )
        grads = _Solve.gradients(ctx, grad_ys.detach())
        if torch.is_grad_enabled():
            grads = first_only(
                grads,
                "a compiled field gives first derivatives only; for second ones (create_graph=True, gradient penalties) "
                "solve with func itself, uncompiled",
            )
        return None, None, None, None, *grads

    @staticmethod
    @torch.no_grad()
    def gradients(ctx, grad_ys):
        inputs = ctx.saved_tensors
        run = ctx.run.run
        call, p = run.call, run.p
        needs_t = any(ctx.needs_input_grad[5:7])
        # Where steps are from one time to the next, an output is the end of a step and moves with it.
        grad_t = torch.zeros_like(run.times) if needs_t and not p.steps_on_times else None
        grad_grid = torch.zeros(len(p.grid), dtype=torch.float64) if needs_t and p.grid is not None else None
        call.grad_grid = None if grad_grid is None else grad_grid.data_ptr()
        adj_y0, grads = run.pull_back("reverse", grad_ys, grad_t)
        grads = [g.to(x.dtype) for g, x in zip(grads, inputs) if g is not None]
        if grad_t is not None:
            grad_t = grad_t.reshape(ctx.times.shape).to(ctx.times)
        return adj_y0, grad_t, grad_grid, *grads


class _Held:
    """A run whose recorded steps are given back with the graph that holds them."""

    def __init__(self, run: _Run):
        self.run = run

    def __del__(self):
        self.run.release()

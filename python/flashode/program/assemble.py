"""From a field to its program: traced, lowered, generated, compiled, loaded, and checked against the field."""

from __future__ import annotations

import ctypes
import itertools
import time
from dataclasses import dataclass, field
from functools import cached_property

import torch

from .. import extension
from ..batched import BatchProblem
from ..errors import CompileError
from ..problem import Problem
from . import build, cuda
from .ir import Form
from .layout import ROWS, WHOLE, Layout, layouts
from .lower import lower
from .samples import Mixing
from .source import Fields, field_source
from .tables import method_source
from .trace import trace, trace_joint

_REALS = {torch.float32: "float", torch.float64: "double"}
_VECTOR_BYTES = 64
_MANY_FLOPS = 5_000  # of a sample: the rows of its matrix products keep the machine busy
NO_GRADIENTS = "programs on GPUs have no backward pass yet: solve under torch.no_grad(), or with func itself"
# The entries of a program, by its backward pass.
_NAMES = {
    None: ("solve", "evaluate"),
    "reverse": ("solve", "evaluate", "reverse", "pull_back"),
    "sweep": ("evaluate", "sweep", "pull_back"),
}
_TRIES = 16  # sets of inputs that may have a value for every sample


@dataclass(eq=False)
class Program:
    """A compiled solve.

    Attributes:
        method: name of the method.
        layout: of the state that it was made for.
        lanes: samples that it works on together.
        own: constants of a sample: input, position, and distance of the next sample's.
        backward: the backward pass that it has: ``"reverse"``, ``"sweep"`` or None.
        differentiable: numbers of the inputs that the backward pass has gradients for; None where there is no
            backward pass.
        shapes: of the tensors that func captured.
        sizes: members of the generated field.
        gpu: that it runs on, or None.
        seconds: spent on tracing, generating and compiling.
    """

    method: str
    layout: Layout
    own_clocks: bool
    lanes: int
    dtype: torch.dtype
    own: list[tuple[int, int, int]]
    backward: str | None
    differentiable: tuple[int, ...] | None
    shapes: tuple[tuple[int, ...], ...]
    form: Form
    library: build.Library | cuda.Kernels
    sizes: dict[str, int]
    gpu: cuda.Gpu | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    states: dict[int, State] = field(default_factory=dict)
    checked: bool = False  # against func
    kernels: dict[str, tuple[int, float]] = field(default_factory=dict)  # on a GPU: calls, and seconds spent

    @cached_property
    def entries(self) -> dict:
        """Functions of the library by name, as ``Entry`` objects of the extension."""
        suffix = "_batch" if self.own_clocks else ""
        names = () if self.gpu else _NAMES[self.backward]
        return {name: extension.C.Entry(self._address(f"flashode_{name}{suffix}")) for name in names}

    @property
    def release(self) -> int:
        """Address of the function that gives back recorded steps."""
        return self._address("flashode_release")

    def _address(self, name: str) -> int:
        return ctypes.cast(getattr(self.library.functions, name), ctypes.c_void_p).value

    def spend(self, entry: str, seconds: float):
        """Counts a call of a kernel; entries on a CPU count themselves."""
        count, spent = self.kernels.get(entry, (0, 0.0))
        self.kernels[entry] = count + 1, spent + seconds

    @property
    def spent(self) -> dict[str, tuple[int, float]]:
        """How many calls of its entries there were, and how long they took."""
        return self.kernels | {name: (e.calls, e.seconds) for name, e in self.entries.items() if e.calls}

    def placed(self, problem: Problem) -> State:
        """Addresses of what a call says of where numbers lie; the same for all solves of as many samples."""
        samples = self.samples_of(problem)
        if samples not in self.states:
            self.states[samples] = State(self, problem, samples)
        return self.states[samples]

    def samples_of(self, problem: Problem) -> int:
        if self.layout.kind == WHOLE:
            return 1
        shape = problem.y0.shape if problem.shapes is None else problem.shapes[0]
        return shape[0 if self.layout.kind == ROWS else -1]


class State:
    """Where the numbers of states of one size lie, as arrays in memory and their addresses."""

    def __init__(self, program: Program, problem: Problem, samples: int):
        shapes = (problem.y0.shape,) if problem.shapes is None else problem.shapes
        layout = Layout(program.layout.kind, samples, tuple(tuple(s) for s in shapes))
        self.samples = samples
        positions, steps = ([own[i] for own in program.own] for i in (1, 2))
        named = zip(
            ("offset", "stride", "members", "own_offset", "own_stride"),
            (*layout.places(), layout.members, positions, steps),
        )
        self.memory = {name: (ctypes.c_int64 * max(1, len(x)))(*x) for name, x in named}
        for name, memory in self.memory.items():
            setattr(self, name, ctypes.addressof(memory))


def lanes_for(layout: Layout, form: Form, dtype: torch.dtype) -> int:
    """How many samples to work on together: one vector, so that few lanes are left empty and work space stays near;
    two for a field of few operations, to have something to do while one waits for the other."""
    if layout.kind == WHOLE or layout.samples == 1:
        return 1
    vector = _VECTOR_BYTES // dtype.itemsize
    return vector if layout.samples <= vector or form.flops["slope"] >= _MANY_FLOPS else 2 * vector


def assemble(problem: Problem, func, backward) -> tuple[Program, tuple[torch.Tensor, ...]]:
    """The program for a problem, and the tensors that its field captured.

    Args:
        func: the user's own, uncompiled.
        backward: ``"reverse"``, ``"sweep"`` or None, as a function of the captured tensors: the backward pass
            that the program has; a sweep comes alone.

    Raises:
        CompileError: where func cannot be traced or generated.
    """
    began = time.perf_counter()
    batched = isinstance(problem, BatchProblem)

    def flat(t, y):
        return problem.slope(func(t, problem.unflatten(y), *problem.args))

    t, y = example(problem)
    traced = trace(flat, t, y)
    inputs = traced.inputs
    backward = backward(inputs)
    gradients = backward is not None
    if gradients and cuda.gpu_of(y.device):
        raise CompileError(NO_GRADIENTS)
    if gradients:
        traced = trace_joint(flat, t, y, inputs)
    seconds = {"trace": time.perf_counter() - began}
    began = time.perf_counter()
    layout, form = _lowered(problem, traced, t, y, gradients)
    gpu = cuda.gpu_of(y.device)
    lanes = 1 if gpu else lanes_for(layout, form, y.dtype)
    fields = field_source(form, _REALS[y.dtype], lanes, batched, gradients)
    text = _program_of(problem, fields, layout, backward, gpu)
    seconds["generate"] = time.perf_counter() - began
    began = time.perf_counter()
    library = gpu.load(text) if gpu else build.load(text)
    seconds["compile"] = time.perf_counter() - began
    differentiable = tuple(i for i, x in enumerate(inputs) if x.requires_grad) if gradients else None
    program = Program(
        problem.method.name, layout, batched, lanes, y.dtype, fields.own, backward, differentiable,
        tuple(tuple(x.shape) for x in inputs), form, library, fields.sizes, gpu, seconds,
    )  # fmt: skip
    return program, inputs


def has_each_tolerance(problem: Problem) -> bool:
    """Whether each number has a tolerance of its own."""
    return any(isinstance(tolerance, torch.Tensor) for tolerance in (problem.rtol, problem.atol))


def _program_of(
    problem: Problem, fields: Fields, layout: Layout, backward: str | None, gpu: cuda.Gpu | None
) -> str:
    """The text of a program."""
    batched, method = isinstance(problem, BatchProblem), method_source(problem.method, problem.dense)
    if gpu is None:
        text = _HEAD + fields.text + method + "}  // namespace\n\n"
        return text + _entries(batched, backward) + "\n}  // namespace flashode\n"
    has_each = has_each_tolerance(problem)
    turns = gpu.turns(layout.samples) if problem.method.adaptive and not batched else 0
    slopes = problem.method.tableau.stages + len(problem.dense.extra_c)
    cuda.require_room(fields.sizes, slopes, has_each, turns, problem.y0.dtype.itemsize)
    return cuda.cuda_source(fields.text, method, batched, has_each, turns)


def example(problem: Problem):
    """A time and a state as func sees them."""
    if isinstance(problem, BatchProblem):
        t = (problem.direction * problem.times[:, 0]).reshape(problem.time_shape).to(problem.y0)
    else:
        t = torch.tensor(
            problem.direction * problem.times[0], dtype=problem.y0.dtype, device=problem.y0.device
        )
    return t, problem.y0.detach().contiguous()


def _lowered(problem: Problem, traced, t, y, gradients) -> tuple[Layout, Form]:
    """The first layout in which samples are apart, and the form of one of them."""
    refused = None
    for layout in layouts(problem):
        owners = layout.owners().reshape(y.shape)
        times = torch.zeros((), dtype=torch.int64)
        if isinstance(problem, BatchProblem):
            times = torch.arange(1, layout.samples + 1).reshape(t.shape)
        for own_axes in _own_axes(layout, [tuple(x.shape) for x in traced.inputs]):
            try:
                form = lower(
                    traced.graph, traced.constants, traced.lines, times, owners, owners if gradients else None,
                    traced.inputs, own_axes,
                )  # fmt: skip
                return layout, form
            except Mixing as error:
                refused = refused or error
    if isinstance(problem, BatchProblem):
        raise CompileError(
            f"{refused}; options['batched'] solves samples on their own: solve without it, or change func"
        ) from refused
    raise refused


def _own_axes(layout: Layout, shapes):
    """Along which axes of which inputs samples may lie: along none, or where the size fits."""
    yield {}
    if layout.kind == WHOLE or layout.samples == 1:
        return
    axis = 0 if layout.kind == ROWS else -1
    fitting = [i for i, s in enumerate(shapes) if s and s[axis] == layout.samples]
    subsets = (c for n in range(len(fitting), 0, -1) for c in itertools.combinations(fitting, n))
    for chosen in itertools.islice(subsets, _TRIES):
        yield {i: axis % len(shapes[i]) for i in chosen}


_HEAD = '#include "program.h"\n\nnamespace flashode {\nnamespace {\n\n'


def _entries(own_clocks: bool, backward: str | None) -> str:
    """The functions that are called from Python."""
    suffix = "_batch" if own_clocks else ""
    lines = []
    for name in _NAMES[backward]:
        template = "Field" if name in ("evaluate", "pull_back") else "Field, Method"
        lines.append(
            f'extern "C" int flashode_{name}{suffix}(Call* call) {{ return {name}{suffix}<{template}>(*call); }}'
        )
    lines += [
        'extern "C" void flashode_release(void* recording) { release<Field>(recording); }',
        'extern "C" int64_t flashode_call_size() { return sizeof(Call); }',
    ]
    return "\n".join(lines) + "\n"

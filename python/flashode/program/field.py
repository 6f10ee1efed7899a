"""`compile`, and the field that it gives: one that solves by programs, and is func in all else."""

from __future__ import annotations

import functools
import sys
import threading
import types
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from .. import transforms
from ..arguments import kind_of
from ..errors import ArgumentTypeError
from .assemble import Program, assemble, has_each_tolerance
from .captured import Captured, Walk
from .explain import explain

# Programs that a field holds: for states of other shapes, modes and values that it was solved with.
PROGRAMS = 64
# Programs for states alike, with other values that func read, from which on a warning is given.
OFTEN = 8
_PLAIN = (int, float, bool, str, type(None))  # values of options that are what they are
# Of a Module, what belongs to calls of it: a field calls func, and func brings its own.
_OF_CALLS = ("_forward_", "_backward_")


def compile(func) -> CompiledField:
    """Makes a field of which `odeint` and the others solve whole problems as one compiled program.

    The first solve of a kind calls ``func`` four times, or six where gradients are wanted (five and eight where
    func writes to tensors of its own), with slightly varied states; from what it does to them C++ is generated
    and compiled, which takes seconds the first time and is kept on disk, and what that gives is compared with
    what func gives. Later solves do not call func at all: parameters and other tensors that it reads are looked up before every solve, so an optimizer may change
    them or put others in their place. Where Python values that it reads have changed, it is recorded again.

    Where the state is on a GPU, the program is a kernel, one thread a sample. It is compiled by cuda-core, which is
    to be installed (``pip install cuda-core[cu13]``, or ``[cu12]``), and has no gradients yet: solve under
    ``torch.no_grad()``.

    Args:
        func: callable as ``func(t, y)``; a function or a Module. What it computes may depend on shapes, on
            Python values and on tensors, but it must not choose what to do by the numbers in tensors, and must
            not draw random ones.

    Returns:
        A `CompiledField`. It can be called as ``func`` can. Compiling it again gives it back.

    Raises:
        ArgumentTypeError: ``func`` is not callable.
        CompileError: at the first solve, what cannot be compiled, with the line of func.

    Example::

        @flashode.compile
        def oscillator(t, y):
            return torch.stack([y[..., 1], -y[..., 0]], -1)

        ys = flashode.odeint(oscillator, torch.randn(1000, 2), torch.linspace(0, 10, 11))
    """
    if isinstance(func, CompiledField):
        return func
    if not callable(func) or isinstance(func, type):
        given = (
            f"the class {func.__name__}; give an instance of it" if isinstance(func, type) else kind_of(func)
        )
        raise ArgumentTypeError(f"func must be callable as func(t, y), got {given}")
    return CompiledField(func)


def apart_from_autocast(solve):
    """``solve(func, y0, ...)`` without torch.autocast where a program is to solve, which computes in float32 or
    float64: autocast is off, and states and ``args`` of 16 bits become float32. ``engine`` and ``args`` are keywords.
    """

    @functools.wraps(solve)
    def called(func, y0, *rest, **named):
        if not isinstance(func, CompiledField) or named.get("engine", "auto") not in ("auto", "compiled"):
            return solve(func, y0, *rest, **named)
        device = next((x.device.type for x in tree_leaves(y0) if isinstance(x, torch.Tensor)), "cpu")
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return solve(func, y0, *rest, **named)
        y0, named["args"] = tree_map(_in_float32, (y0, named.get("args", ())))
        with torch.autocast(device, enabled=False):
            return solve(func, y0, *rest, **named)

    return called


def _in_float32(x):
    return x.float() if isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x


class CompiledField(nn.Module):
    """A field that is solved by programs; made by `flashode.compile`.

    Where ``func`` is a Module, its parameters, buffers and submodules are those of the field, under the same
    names; other attributes are those of ``func`` in any case. Copies and pickles have ``func`` alone: their
    programs are made, or found on disk, anew.

    Attributes:
        func: what was compiled.
        evaluations: slopes that the program of the last solve evaluated, in place of calls of func; of a batch with
            steps of its own for every sample, the rounds in which any was. None before the first solve.
    """

    def __init__(self, func):
        super().__init__()
        own = vars(self)
        if isinstance(func, nn.Module):
            own.update({k: v for k, v in vars(func).items() if k in own and not k.startswith(_OF_CALLS)})
        elif isinstance(func, types.FunctionType):
            for name in ("__module__", "__name__", "__qualname__", "__doc__"):
                own[name] = getattr(func, name)
        own["__wrapped__"] = func
        own["_programs"]: dict[tuple, list[tuple[Program, Captured]]] = {}
        own["_before"]: _Before | None = None
        own["evaluations"] = None
        own["_lock"] = threading.RLock()
        own["func"] = func  # not as a submodule, which would put its name before those of parameters

    def forward(self, *args, **kwargs):
        return self.func(*args, **kwargs)

    # ---- programs --------------------------------------------------------------------------

    def program(self, problem, backward=None) -> tuple[Program, tuple[torch.Tensor, ...], Captured]:
        """The program for a problem, made unless there is one, the tensors of now that it reads, and where they are.

        Args:
            backward: ``"sweep"`` for a program of the continuous adjoint in place of one that solves. One that
                solves has the way back through its steps with it, where gradients are recorded.

        Raises CompileError.
        """
        key = backward, *self._key(problem)
        with self._lock:
            for program, captured in self._programs.get(key, ()):
                tensors = captured.current(problem.args)
                if tensors is not None:
                    return program, tensors, captured
            walk = Walk(self.func, problem.args)
            wanted = (lambda inputs: backward) if backward else _wants_gradients(problem)
            program, tensors = assemble(problem, self.func, wanted)
            captured = walk.captured(tensors)
            self._hold(key, program, captured, problem.args)
            return program, tensors, captured

    def differentiated(self, problem) -> tuple[torch.Tensor, ...]:
        """The tensors that func reads, and that have gradients to be had."""
        return tuple(x for x in self.program(problem)[1] if x.requires_grad)

    def explain(self) -> str:
        """What was compiled so far: operations by line of func, source, cost, and time spent; a text."""
        return explain(self)

    def checked(self, kind, y0, t, rtol, atol, method, options, event_fn, args):
        """``kind.from_call``. Where the call before differed in ``y0`` and ``args`` alone, as those of a training
        loop do, only these are looked at: to check the rest again would take as long as a short solve."""
        said = _said(t, rtol, atol, method, options) if event_fn is None else None
        before = self._before_as(t, said)
        if before is not None:
            problem = before.problem.again(y0, t, args)
            if problem is not None:
                return problem
        problem = kind.from_call(self, y0, t, rtol, atol, method, options, event_fn, args)
        if said is not None:
            said = (*said[:-1], None if options is None else dict(options))
            vars(self)["_before"] = _Before(t.detach().clone(), said, problem.released())
        return problem

    def again(self, y0, t, rtol, atol, method, options, args):
        """What `odeint` returns, where a program has solved the call before, which differed in ``y0`` and in the
        numbers that func reads alone; None where it is not so, or the solve fails: the long way says why."""
        before = self._before_as(t, _said(t, rtol, atol, method, options))
        if before is None or before.solved is None or type(args) is not tuple:
            return None
        captured, ready = before.solved
        tensors = captured.current(args)
        if tensors is None:
            return None
        ys = ready.again(y0, tensors)
        vars(self)["evaluations"] = ready.nfe
        return ys

    def ready(self, problem, captured, make):
        """The ``ProgramSolve`` of a problem by the program whose tensors are ``captured``: that of the call before, if
        it was like this one, else what ``make()`` gives, kept for the next."""
        before = self._before
        if before is None or before.problem.times is not problem.times:
            return make()
        solved = before.solved
        if solved is None or solved[0] is not captured:
            before.solved = solved = captured, make()
        return solved[1]

    def _before_as(self, t, said) -> _Before | None:
        before = self._before
        alike = said is not None and before is not None and before.said == said
        # Numbers: many programs make the same times anew for every solve, and what is written to t.data, or to a
        # NumPy array that shares its memory, shows in nothing else.
        return before if alike and torch.equal(t, before.t) else None

    def _key(self, problem) -> tuple:
        """What a program is made for, beside what func refers to.

        Whole shapes are in it, as func may compute with them. Where it does not, the generated source is the same
        for more samples, and so is the library.
        """
        y0 = problem.y0
        kind = (type(problem), problem.method.name, problem.dense)
        state = (y0.shape, problem.shapes, problem.dtypes, y0.dtype, y0.device)
        if y0.is_cuda:
            state += (has_each_tolerance(problem),)
        return kind, state, torch.is_grad_enabled() and (y0.requires_grad, problem.differentiates_time)

    def _hold(self, key, program, captured, args):
        if sum(map(len, self._programs.values())) >= PROGRAMS:
            self._programs.pop(next(iter(self._programs)))  # the oldest kind
        alike = self._programs.setdefault(key, [])
        if len(alike) == OFTEN:
            warnings.warn(
                f"{self!r} was compiled {OFTEN + 1} times for states alike, which takes seconds each time, because what func "
                f"reads has changed: {alike[-1][1].change(args)}. What changes from solve to solve should be a "
                "floating point Tensor: its numbers are looked up, and may change without that.",
                stacklevel=2,
            )
        alike.append((program, captured))

    # ---- func in all else ------------------------------------------------------------------

    def __getattr__(self, name):
        own = vars(self)
        for kind in ("_parameters", "_buffers", "_modules"):
            if name in own.get(kind, ()):
                return own[kind][name]
        if "func" not in own:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(own["func"], name)

    def __setattr__(self, name, value):
        if "func" in vars(self) and name not in vars(self):
            setattr(self.func, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def training(self) -> bool:
        return getattr(vars(self).get("func"), "training", vars(self).get("training", True))

    @training.setter
    def training(self, mode: bool):
        vars(self)["training"] = mode

    def train(self, mode: bool = True):
        if not isinstance(self.func, nn.Module):
            return super().train(mode)
        self.func.train(mode)
        return self

    def apply(self, fn):
        if not isinstance(self.func, nn.Module):
            return super().apply(fn)
        self.func.apply(fn)
        return self

    def _apply(self, fn, recurse=True):
        if not isinstance(self.func, nn.Module):
            return super()._apply(fn, recurse)
        self.func._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, *args, **kwargs):
        own = self.func if isinstance(self.func, nn.Module) else super()
        own._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        own = self.func if isinstance(self.func, nn.Module) else super()
        own._load_from_state_dict(*args, **kwargs)

    def __repr__(self):
        return f"CompiledField({self.func!r})"

    def __reduce__(self):
        name = vars(self).get("__qualname__")
        if name is not None and self._is_global():
            return name  # pickled as a function is, by where it stands
        return compile, (self.func,)

    def _is_global(self) -> bool:
        """Whether func's own name leads to the field, as where `compile` decorated it."""
        found = sys.modules.get(self.func.__module__)
        for part in self.func.__qualname__.split("."):
            found = getattr(found, part, None)
        return found is self


@dataclass(eq=False)
class _Before:
    """The call before: its times, what it said beside, what became of it, and how it was solved by a program."""

    t: torch.Tensor
    said: tuple
    problem: object
    solved: tuple[Captured, object] | None = None  # together, for threads


def _said(t, rtol, atol, method, options):
    """What a call says of a problem beside its start, where it can be compared at little cost, or None."""
    usual = (
        type(rtol) is type(atol) is float
        and type(t) is torch.Tensor
        and t.is_cpu
        and not (t.requires_grad or transforms.active())
        and all(type(x) in _PLAIN for x in (options or {}).values())
    )
    return (t.dtype, t.shape, rtol, atol, method, options) if usual else None


def _wants_gradients(problem):
    """The backward pass that there is to be, once the tensors are known that the field reads."""
    if not torch.is_grad_enabled():
        return lambda inputs: None
    known = problem.y0.requires_grad or problem.differentiates_time
    return lambda inputs: "reverse" if known or any(x.requires_grad for x in inputs) else None

"""The graph of a field: `func` is called, and every operation of ATen that it does is written down.

Python code of ``func`` that looks at anything but shapes would be fixed in the graph, so it is refused: what
reads the numbers of a tensor, draws random ones, or writes to tensors that are not its own. What else may
differ from call to call is found by recording twice.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from ..errors import CompileError
from .recorder import Readers, Recorder, leaves

Tensor = torch.Tensor


@dataclass(frozen=True)
class Trace:
    """What a field computes.

    Attributes:
        graph: ``(t, y, *inputs) -> f``, or with ``adj``, the cotangent of f, ``(t, y, adj, *inputs) ->
            (f, of_y, of_t, *of_inputs)``, where None stands for what there is no dependence on. Functional:
            nothing is written in place. Operations are ATen's; what has no code of its own is taken apart.
        inputs: the tensors that func took from elsewhere, in the order of their placeholders.
        constants: tensors that func makes alike in every call, by the target of their get_attr nodes.
        lines: of nodes, the line of the user's code that they come from as "file.py:12: source". Those of the
            backward pass have the line whose derivative they are a part of.
    """

    graph: fx.Graph
    inputs: tuple[Tensor, ...]
    constants: dict[str, Tensor]
    lines: dict[fx.Node, str]


def trace(func: Callable, t: Tensor, y: Tensor) -> Trace:
    """Records ``func(t, y)``, in three calls: one as it is, in which it may set itself up, and two recorded.

    Where func writes to tensors of its own there is one call more, so that the graph need not.
    Exceptions of func pass unchanged. Raises CompileError for what a graph cannot hold.
    """
    _require_traceable(t, y)
    with _ordinary():
        func(t.detach().clone(), y.detach().clone())
    return _twice(func, {"t": t, "y": y}, ())


def trace_joint(func: Callable, t: Tensor, y: Tensor, inputs: tuple[Tensor, ...]) -> Trace:
    """Records ``func(t, y)`` and its vector-Jacobian product, in two calls, or three.

    Args:
        inputs: those of the `Trace` of func alone; the ones that require grad are differentiated for.
    """
    _require_traceable(t, y)
    return _twice(func, {"t": t, "y": y, "adj": torch.ones_like(y)}, inputs)


class _Weighted(torch.autograd.Function):
    """``adj . f``, as far as its derivative goes: given the weights, torch would import SymPy to look at them."""

    @staticmethod
    def forward(ctx, f, adj):
        ctx.adj = adj
        return f.new_zeros(())

    @staticmethod
    def backward(ctx, one):
        return ctx.adj, None


def _derivatives(f, t, y, adj, inputs, replaced) -> list[Tensor | None]:
    """Those of ``adj . f`` by y, t and the inputs; recorded, because the recorder is at work."""
    results: list[Tensor | None] = [None] * (2 + len(inputs))
    if not f.requires_grad:
        return results
    wanted = {i: replaced.get(id(x), (x, x))[1] for i, x in enumerate((y, t, *inputs)) if x.requires_grad}
    originals = [x for x, _ in replaced.values()]
    grads = torch.autograd.grad(_Weighted.apply(f, adj), [*wanted.values(), *originals], allow_unused=True)
    if any(g is not None for g in grads[len(wanted) :]):
        raise CompileError(
            "func cannot be compiled for gradients: it gives a captured tensor that is a result, or has hooks, to a "
            "torch.autograd.Function; pass that tensor through args="
        )
    for i, g in zip(wanted, grads):
        results[i] = g
    return results


def _record(func, given, inputs, functional=False) -> Recorder:
    """One recorded call of func, and where ``adj`` is given, the backward pass.

    With ``functional``, what is written in place is recorded as new tensors.
    """
    recorder, joint = Recorder(), "adj" in given
    # What is a result itself or has hooks must not be differentiated through: the caller's graph does that.
    replaced = {
        id(x): (x, x.detach().requires_grad_())
        for x in inputs
        if x.requires_grad and (not x.is_leaf or x._backward_hooks)
    }
    with _ordinary(True if joint else None):
        given = {name: x.detach().clone() for name, x in given.items()}
        for name, x in [*given.items(), *((f"input{i}", x) for i, x in enumerate(inputs))]:
            recorder.placeholder(name, x)
            for other in replaced.get(id(x), ())[1:]:
                recorder.set_node(other, recorder.nodes[id(x)])
        with recorder, _functionalized(functional) as (into, out_of):
            t, y, *adj = map(into, given.values())
            t.requires_grad_(joint), y.requires_grad_(joint)
            with Readers(recorder, replaced):
                results = [func(t, y)]
            if joint:
                with Readers(recorder, {}):
                    results += _derivatives(results[0], t, y, *adj, inputs, replaced)
            results = [None if x is None else recorder.node_of(out_of(x)) for x in results]
    recorder.graph.output(tuple(results))
    return recorder


@contextlib.contextmanager
def _functionalized(on: bool):
    """What makes tensors into such that nothing is written to where operations are recorded, and back."""
    if not on:
        yield (lambda x: x), (lambda x: x)
        return

    def out_of(x):
        if not torch._is_functional_tensor(x):
            return x
        torch._sync(x)
        return torch._from_functional_tensor(x)

    torch._enable_functionalization(reapply_views=True)
    try:
        yield torch._to_functional_tensor, out_of
    finally:
        torch._disable_functionalization()


# ---- two recordings --------------------------------------------------------------------------


def _twice(func, given, inputs) -> Trace:
    """The graph of two recorded calls, which have to agree."""
    first = _record(func, given, inputs)
    if writes := first.writes:
        first = _record(func, given, inputs, writes)
    # Other values, however little: what slipped out of torch shows in the constants.
    second = _record(func, {name: _next_to(x) for name, x in given.items()}, inputs, writes)
    for recorder in (first, second):
        recorder.graph.eliminate_dead_code()
    captured = _compare(first, second)
    return _finish(first, captured, inputs, given["y"].device)


def _compare(first: Recorder, second: Recorder) -> list[fx.Node]:
    """The nodes of captured tensors. Raises CompileError where the graphs differ."""
    numbers: list[dict[fx.Node, int]] = [{}, {}]
    captured = []
    pairs = zip(*(list(r.graph.nodes) for r in (first, second)))
    for i, (a, b) in enumerate(pairs):
        for numbered, node in zip(numbers, (a, b)):
            numbered[node] = i
        line = first.lines.get(a) or second.lines.get(b, "")
        if a.op == b.op == "get_attr":
            if _is_captured(first.leaves[a], second.leaves[b], line):
                captured.append(a)
            continue
        said = [(x.op, x.target, _numbered((x.args, x.kwargs), n)) for x, n in zip((a, b), numbers)]
        if said[0] != said[1]:
            raise _differs(line, _said(a), _said(b))
    if len(first.graph.nodes) != len(second.graph.nodes):
        raise _differs("", *(f"{len(r.graph.nodes)} operations" for r in (first, second)))
    return captured


def _is_captured(a: Tensor, b: Tensor, line: str) -> bool:
    """Whether a tensor comes from outside of func: it is the same in both calls; else its values have to be."""
    if a is b:
        return True
    alike = a.shape == b.shape and a.dtype == b.dtype
    if alike and a.numel() and a.data_ptr() == b.data_ptr():
        raise CompileError(
            f"func cannot be compiled: it makes a tensor of memory that changes unseen, as of a NumPy array, at {line}; "
            "make it once, outside of func"
        )
    if not alike or not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)):
        raise _differs(line, _shown(a), _shown(b))
    return False


def _differs(line, a, b) -> CompileError:
    return CompileError(
        f"func cannot be compiled: two calls of it did not compute the same{f', at {line}' * bool(line)}: first {a}, then "
        f"{b}; it must depend on t, y and what it captures alone, not on counters, clocks or random numbers"
    )


def _said(node) -> str:
    numbers = [x for x in leaves((node.args, node.kwargs)) if isinstance(x, (int, float))]
    return " ".join([getattr(node.target, "__name__", str(node.target)), *(f"{x!r}" for x in numbers)])


def _shown(x: Tensor) -> str:
    return f"{x.tolist()}" if x.numel() <= 8 else f"a Tensor of shape {tuple(x.shape)}"


def _finish(recorder: Recorder, captured, inputs, device) -> Trace:
    """Captured tensors become inputs, after those that are."""
    graph, inputs, constants = recorder.graph, list(inputs), {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        x = recorder.leaves[node]
        if node not in captured:
            node.target = f"constant{len(constants)}"
            constants[node.target] = x
            continue
        if x.device != device:
            raise CompileError(
                f"func cannot be compiled: it uses a Tensor on {x.device}, at {recorder.lines[node]}, and y0 is on "
                f"{device}; move it there"
            )
        with graph.inserting_after(last):
            last = graph.placeholder(f"input{len(inputs)}")
        inputs.append(x)
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    lines = {node: recorder.lines[node] for node in graph.nodes if recorder.lines.get(node)}
    return Trace(graph, tuple(inputs), constants, lines)


# ---- around it -------------------------------------------------------------------------------


def _require_traceable(t: Tensor, y: Tensor):
    for x in (t, y):
        if x.is_complex():
            raise CompileError(
                "a field of complex numbers cannot be compiled; solve without flashode.compile"
            )


# The stance of torch.compile is the process's: of two threads that change and restore it in turns, the second
# would restore what the first had set.
_recording = threading.RLock()


@contextlib.contextmanager
def _ordinary(grad_mode: bool | None = None):
    """Tensors as they are everywhere: no inference mode, and functions of torch.compile as they were written."""
    grad_mode = torch.is_grad_enabled() if grad_mode is None else grad_mode
    with _recording:
        # Without TorchDynamo nothing has been compiled, and naming it here would import it.
        eager = (
            torch.compiler.set_stance("force_eager")
            if "torch._dynamo" in sys.modules
            else contextlib.nullcontext()
        )
        with eager, torch.inference_mode(False), torch.set_grad_enabled(grad_mode):
            yield


def _next_to(x: Tensor) -> Tensor:
    x = x.detach()
    return (
        torch.nextafter(x, torch.full_like(x, math.inf)) if x.dtype in (torch.float32, torch.float64) else x
    )


def _numbered(x, numbers):
    """Arguments with nodes by their numbers, and numbers that compare as they are written."""
    if isinstance(x, fx.Node):
        return ("node", numbers[x])
    if isinstance(x, (list, tuple)):
        return tuple(_numbered(e, numbers) for e in x)
    if isinstance(x, dict):
        return tuple((k, _numbered(v, numbers)) for k, v in x.items())
    return (type(x).__name__, repr(x)) if isinstance(x, (bool, int, float)) else x

"""Tensors that a field uses and that get no gradient from a backward pass of our own: a warning names them.

Such a pass gives gradients to the tensors that it lists. Others that require grad, as a closure may
hold, are left out: the graph of one evaluation is searched for them, and the field for their names.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import types
import warnings
from collections import deque

import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves

from ..errors import GradientWarning
from .once import first_time

# References followed from func to a tensor; those from a Module to its own do not count.
DEPTH = 3
# Members looked at in one container: a longer one holds data.
MEMBERS = 1000
# Names in one warning.
SHOWN = 8


def warn_unlisted(func, value, listed):
    """Warns of tensors behind ``value`` that require grad and get none; once for every ``func``.

    Args:
        func: the caller's field; its variables and attributes are searched for names.
        value: what ``func`` returned in grad mode, a Tensor or several.
        listed: the Tensors that get a gradient.
    """
    if not first_time(func, "unlisted tensors"):
        return
    roots, ends = _edges(value), set(_edges(listed))
    reached = set(_behind(roots, ends))
    if not any(_is_leaf(edge) for edge in reached - ends):
        return
    names = {}
    for name, x in _tensors(func):
        for edge in _edges(x):
            names.setdefault(edge, name)
    # A captured result, as of z = encoder(x), stands for all behind it. Where a listed tensor is behind
    # it, func has computed it just now and stored it.
    stored = {edge for edge in names.keys() & reached if not ends.isdisjoint(_behind([edge], ends))}
    captured = names.keys() - stored
    missing = {e for e in _behind(roots, ends | captured) if e in captured or _is_leaf(e)} - ends
    found = [name for edge, name in names.items() if edge in missing]
    found += [f"an unnamed tensor of shape {tuple(e[0].variable.shape)}" for e in missing - names.keys()]
    rest = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    warnings.warn(
        f"odeint_adjoint gives no gradient to {', '.join(found[:SHOWN] + rest)}, though func uses it and it "
        "requires one: add to adjoint_params=, or pass through args=, what is to have one",
        GradientWarning,
        stacklevel=2,
    )


# ---- the graph -------------------------------------------------------------------------------


def _edges(tensors) -> list:
    """Where each tensor that requires grad stands in the graph: a node, and the number of its output."""
    tensors = [x for x in tree_leaves(tensors) if isinstance(x, torch.Tensor) and x.requires_grad]
    return [(edge.node, edge.output_nr) for edge in map(get_gradient_edge, tensors)]


def _behind(roots, ends):
    """Edges from ``roots`` on, each once; of what is behind ``ends`` none."""
    stack, seen = list(roots), set()
    while stack:
        edge = stack.pop()
        if edge[0] is None or edge in seen:
            continue
        seen.add(edge)
        yield edge
        if edge not in ends:
            stack += edge[0].next_functions


def _is_leaf(edge) -> bool:
    return isinstance(edge[0], torch._C._functions.AccumulateGrad)


# ---- the field -------------------------------------------------------------------------------


def _tensors(func):
    """The tensors that ``func`` refers to with their names in its code, the nearest first."""
    queue = deque([("func", inspect.unwrap(func), DEPTH), ("func", func, DEPTH)])
    seen = set()
    while queue:
        name, x, depth = queue.popleft()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            yield name, x
        elif depth:
            further = depth if isinstance(x, torch.nn.Module) else depth - 1
            queue += [(n, v, further) for n, v in itertools.islice(_references(name, x), MEMBERS)]


def _references(name, x):
    """What one object refers to, named as code would name it."""
    if isinstance(x, (type, types.ModuleType)):
        return
    if isinstance(x, dict):
        yield from ((f"{name}[{key!r}]", value) for key, value in x.items())
    elif isinstance(x, (list, tuple)):
        yield from ((f"{name}[{i}]", value) for i, value in enumerate(x))
    elif isinstance(x, types.FunctionType):
        yield from _variables(x)
    elif isinstance(x, types.MethodType):
        yield "self", x.__self__
        yield name, x.__func__
    elif isinstance(x, functools.partial):
        yield name, x.func
        yield from _references(f"{name}.args", x.args)
        yield from _references(f"{name}.keywords", x.keywords)
    else:
        yield from _attributes(name, x)


def _attributes(name, x):
    """Of a Module by the names it gives them; then what the code of a callable's class refers to."""
    for key, value in getattr(x, "__dict__", {}).items():
        if isinstance(x, torch.nn.Module) and key in ("_parameters", "_buffers", "_modules"):
            yield from ((f"{name}.{own}", v) for own, v in value.items())
        else:
            yield f"{name}.{key}", value
    if callable(x):
        yield name, getattr(type(x), "forward" if isinstance(x, torch.nn.Module) else "__call__", None)


def _variables(function):
    """Of a function: from the scopes around it, and its defaults."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # not assigned yet
            yield name, cell.cell_contents
    codes = [function.__code__]
    for code in codes:
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
        yield from ((n, function.__globals__[n]) for n in code.co_names if n in function.__globals__)
    parameters = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = function.__defaults__ or ()
    yield from zip(parameters[len(parameters) - len(defaults) :], defaults)
    yield from (function.__kwdefaults__ or {}).items()

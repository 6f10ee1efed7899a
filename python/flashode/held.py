"""The parameters and buffers that a function was called with in a solve, held for a backward pass.

`torch.func.functional_call` puts other tensors in the places of a Module's own while it is called. A backward
pass that comes later would call the field with the Module's own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types

import torch


class Held:
    """The parameters and buffers that the Modules behind some functions have now.

    Behind a function are itself, the object that it is a method of, what it closes over, and what a
    ``functools.partial`` calls: where a Module is one of these.
    """

    def __init__(self, *functions):
        modules = (module for function in functions for module in _modules(function))
        self.places = [
            (members, name, tensor)
            for module in modules
            for inner in module.modules()
            for members in (inner._parameters, inner._buffers)
            if isinstance(members, dict)  # those of a ScriptModule are none, and stay as they are
            for name, tensor in members.items()
            if tensor is not None
        ]

    @contextlib.contextmanager
    def in_place(self):
        """Has them where they were, and in the end what is there now."""
        moved = [
            (members, name, members[name], held)
            for members, name, held in self.places
            if members.get(name, held) is not held
        ]
        for members, name, _, held in moved:
            members[name] = held
        try:
            yield
        finally:
            for members, name, later, _ in moved:
                members[name] = later


def _modules(function):
    if isinstance(function, functools.partial):
        return _modules(function.func)
    function = inspect.unwrap(function)
    behind = [function]
    if isinstance(function, types.MethodType):
        behind = [function.__self__]
    elif isinstance(function, types.FunctionType):
        behind = []
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # not assigned yet
                behind.append(cell.cell_contents)
    return [x for x in behind if isinstance(x, torch.nn.Module)]

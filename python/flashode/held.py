"""The parameters that a function was called with in a solve, held for calls of it in a backward pass.

`torch.func.functional_call` puts other tensors in the places of a Module's parameters while it is called.
A backward pass that comes later would call the field with the Module's own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types

import torch


class Held:
    """The parameters that the Modules behind some functions have now.

    Behind a function are itself, the object that it is a method of, what it closes over, and what a
    ``functools.partial`` calls: where a Module is one of these.
    """

    def __init__(self, *functions):
        modules = (module for function in functions for module in _modules(function))
        self.places = [
            (inner._parameters, name, parameter)
            for module in modules
            for inner in module.modules()
            if isinstance(inner._parameters, dict)  # a ScriptModule's is none, and stays as it is
            for name, parameter in inner._parameters.items()
            if parameter is not None
        ]

    @contextlib.contextmanager
    def in_place(self):
        """Has them where they were, and in the end what is there now."""
        moved = [
            (parameters, name, parameters[name], held)
            for parameters, name, held in self.places
            if parameters.get(name, held) is not held
        ]
        for parameters, name, _, held in moved:
            parameters[name] = held
        try:
            yield
        finally:
            for parameters, name, later, _ in moved:
                parameters[name] = later


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

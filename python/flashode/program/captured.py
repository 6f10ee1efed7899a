"""Where a field finds its tensors and values, so that a program follows them from solve to solve.

A program is made for a field as it was. The references from ``func`` on are walked once, and at every solve
those that matter are looked up again, which takes microseconds: tensors may have been replaced by others
alike; if anything else has changed, the program does not apply. What cannot be seen: the contents of
NumPy arrays and of objects without ``__dict__``, shapes of tensors that are not computed with, attributes
whose names code puts together, and what functions written in C keep.
"""

from __future__ import annotations

import contextlib
import functools
import reprlib
import sys
import types
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves

Tensor = torch.Tensor

# References followed from func on; those from a Module to its own do not count.
DEPTH = 6
# Members looked at in one container: a longer one holds data.
MEMBERS = 1000
_SIMPLE = (int, float, bool, str, type(None), complex, torch.dtype, torch.device)
_FOREIGN = {"torch", "numpy", "scipy", "flashode", *sys.stdlib_module_names} - {"__main__"}
_OF_MODULES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_INTERNAL = set(vars(torch.nn.Module())) - {"training"}


class _Reference(NamedTuple):
    """``get(key)`` is what is referred to; ``name`` is one by which code has to ask for it, or None."""

    get: object
    key: object
    value: object
    place: tuple[int, object]  # of the holder, the same in another walk
    name: str | None


class Walk:
    """What ``func`` refers to at one moment; to be taken before func is recorded.

    Args:
        args: what func is called with after ``(t, y)``.
    """

    def __init__(self, func, args=()):
        self.func, self.args = func, args
        self.references: list[_Reference] = []
        self.tensors: dict[int, list[_Reference]] = {}
        self.sizes: list[tuple] = []
        self.names = {"forward", "__call__"}  # that code asks for
        self._seen: dict[int, object] = {}
        self._unasked: list[tuple[_Reference, int]] = []  # attributes that no code seen so far asks for
        self._follow(func, DEPTH)
        for x in _flat(args):
            if not isinstance(x, Tensor):
                self._follow(x, DEPTH)
        while asked := [u for u in self._unasked if u[0].name in self.names]:
            self._unasked = [u for u in self._unasked if u[0].name not in self.names]
            for reference, depth in asked:
                self._take(reference, depth)

    def captured(self, tensors) -> Captured:
        """How to find ``tensors`` again, once func has been recorded with them."""
        return Captured(self, Walk(self.func, self.args), tensors)

    def _refer(self, holder, get, key, value, depth, name=None):
        reference = _Reference(get, key, value, (id(holder), key), name)
        if isinstance(value, Tensor):
            self.tensors.setdefault(id(value), []).append(reference)
            return
        if name is None or name in self.names:
            self._take(reference, depth)
        else:
            self._unasked.append((reference, depth))

    def _take(self, reference, depth):
        self.references.append(reference)
        if type(reference.value) not in _SIMPLE:
            self._follow(reference.value, depth)

    def _follow(self, x, depth):
        if depth == 0 or id(x) in self._seen:
            return
        self._seen[id(x)] = x
        if isinstance(x, types.FunctionType):
            self._follow_function(x, depth - 1)
        elif isinstance(x, types.MethodType):
            self._follow(x.__self__, depth)
            self._follow(x.__func__, depth)
        elif isinstance(x, (staticmethod, classmethod)):
            self._follow(x.__func__, depth)
        elif isinstance(x, property):
            self._follow(x.fget, depth)
        elif isinstance(x, functools.partial):
            self._follow(x.func, depth)
            self._follow(x.args, depth)
            self._follow(x.keywords, depth)
        elif isinstance(x, (list, tuple)):
            if len(x) <= MEMBERS:
                if isinstance(x, list):
                    self.sizes.append((x, len(x)))
                for i, value in enumerate(x):
                    self._refer(x, x.__getitem__, i, value, depth - 1)
        elif isinstance(x, dict):
            self._follow_dict(x, depth - 1)
        elif isinstance(x, type):
            self._follow_class(x, depth - 1)
        elif not isinstance(x, types.ModuleType):
            self._follow_object(x, depth)

    def _follow_dict(self, x, depth):
        if len(x) <= MEMBERS:
            self.sizes.append((x, len(x)))
            for key, value in x.items():
                self._refer(x, x.__getitem__, key, value, depth)

    def _follow_object(self, x, depth):
        attributes = getattr(x, "__dict__", None)
        if not isinstance(attributes, dict):
            return
        foreign, module = _is_foreign(type(x).__module__), isinstance(x, torch.nn.Module)
        if module and "forward" not in attributes:  # nor is it to be
            self._refer(attributes, attributes.get, "forward", None, depth)
        for key, value in attributes.items():
            if module and key in _INTERNAL:
                if key in _OF_MODULES:
                    self._follow_dict(value, depth)
                continue
            name = None if foreign or key == "training" else key
            self._refer(attributes, attributes.__getitem__, key, value, depth - 1, name)
        if not foreign:
            self._follow(type(x), depth)
            for key in _names_of_class(type(x)):
                if key not in attributes:  # nor is it to be: it would hide that of the class
                    self._refer(attributes, attributes.get, key, None, depth, key)

    def _follow_class(self, x, depth):
        for cls in x.__mro__:
            if _is_foreign(cls.__module__):
                continue
            for key, value in vars(cls).items():
                special = key.startswith("__")  # called by what no name shows, as by an operator
                if not special or (callable(value) and key not in ("__init__", "__new__")):
                    self._refer(cls, vars(cls).__getitem__, key, value, depth, None if special else key)

    def _follow_function(self, function, depth):
        if _is_foreign(function.__module__):
            return
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            self._refer(cell, cell.__getattribute__, "cell_contents", value, depth)
        for x in (function.__defaults__, function.__kwdefaults__):
            if x:
                self._follow(x, depth)
        codes = [function.__code__]
        for code in codes:
            codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
            self.names.update(code.co_names, (x for x in code.co_consts if isinstance(x, str)))
            spaces = [function.__globals__]
            spaces += [vars(m) for m in map(spaces[0].get, code.co_names) if _is_own_module(m)]
            for space in spaces:
                for name in code.co_names:
                    if name in space and not isinstance(space[name], types.ModuleType):
                        self._refer(space, space.__getitem__, name, space[name], depth)


class Captured:
    """Finds the tensors of a recorded field, and notices where it has changed in other ways.

    What func changes itself whenever it is called, as a counter of its calls, counts for nothing: a
    graph that depended on it would have been refused.

    Attributes:
        fixed: positions of tensors that were not found: these stay what they are.
    """

    def __init__(self, before: Walk, after: Walk, tensors):
        own = {r.place for r in before.references if _changed(r)}
        sizes = {id(x) for x, size in before.sizes if len(x) != size}
        used = {r.place: r for r in after.references}.values()
        used = [r for r in used if r.place not in own]
        self._values = [r[:3] for r in used if type(r.value) in _SIMPLE]
        self._objects = [r[:3] for r in used if type(r.value) not in _SIMPLE]
        self._sizes = [(x, size) for x, size in after.sizes if id(x) not in sizes]
        self._args = [Tensor if isinstance(x, Tensor) else x for x in _flat(after.args)]
        self._tensors, self.fixed = [], []
        positions = {id(x): i for i, x in enumerate(_flat(after.args)) if isinstance(x, Tensor)}
        for i, x in enumerate(tensors):
            found = [(r.get, r.key) for r in after.tensors.get(id(x), ())]
            alike = x.shape, x.dtype, x.device, x.requires_grad
            self._tensors.append((x, positions.get(id(x)), found, alike, _numbers_in_program(x)))
            if not found and id(x) not in positions:
                self.fixed.append(i)

    def current(self, args=()) -> tuple[Tensor, ...] | None:
        """The tensors of now, in the order in which they were given, or None if func has to be recorded again."""
        args = _flat(args)
        try:
            if not self._as_it_was(args):
                return None
            return self._now(args)
        except (KeyError, IndexError, ValueError, AttributeError):  # what was there is gone
            return None

    def change(self, args=()) -> str:
        """What is not as it was, for people."""
        for get, key, value in (*self._values, *self._objects):
            with contextlib.suppress(KeyError, IndexError, ValueError, AttributeError):
                if not _same(get(key), value):
                    return f"{_name_of(get, key)} was {reprlib.repr(value)} and is {reprlib.repr(get(key))}"
        for x, value in zip(_flat(args), self._args):
            if value is not Tensor and not _same(x, value):
                return f"one of args was {reprlib.repr(value)} and is {reprlib.repr(x)}"
        for *_, numbers in self._tensors:
            if numbers is not None:
                return f"numbers in a tensor of {numbers.dtype}, which may be indices"
        return "a tensor that it reads is another"

    def _as_it_was(self, args) -> bool:
        for get, key, value in self._objects:
            if get(key) is not value:
                return False
        for get, key, value in self._values:
            if not _same(get(key), value):
                return False
        for x, size in self._sizes:
            if len(x) != size:
                return False
        if len(args) != len(self._args):
            return False
        for x, value in zip(args, self._args):
            if not (isinstance(x, Tensor) if value is Tensor else _same(x, value)):
                return False
        return True

    def _now(self, args) -> tuple[Tensor, ...] | None:
        tensors = []
        for x, position, references, alike, numbers in self._tensors:
            if position is not None:
                x = args[position]
            elif references:
                get, key = references[0]
                x = get(key)
            for get, key in references if position is not None else references[1:]:
                if get(key) is not x:  # one tensor in several places has to stay one
                    return None
            if not isinstance(x, Tensor) or (x.shape, x.dtype, x.device, x.requires_grad) != alike:
                return None
            if numbers is not None and not torch.equal(x, numbers):
                return None
            tensors.append(x)
        return tuple(tensors)


def _numbers_in_program(x: Tensor) -> Tensor | None:
    """Of a tensor of whole numbers, which may be indices: they are in the program, and have to stay."""
    return None if x.is_floating_point() or x.dtype == torch.bool else x.detach().clone()


def _name_of(get, key) -> str:
    """What code calls something that it refers to."""
    return "a variable of an enclosing function" if key == "cell_contents" else repr(key)


def _changed(reference: _Reference) -> bool:
    try:
        return not _same(reference.get(reference.key), reference.value)
    except (KeyError, IndexError, ValueError, AttributeError):
        return True


def _same(x, value) -> bool:
    return x is value or (type(x) is type(value) and type(x) in _SIMPLE and x == value)


def _flat(args):
    for x in args:
        if isinstance(x, (list, tuple, dict)):
            return tree_leaves(args)
    return args


def _names_of_class(cls) -> set[str]:
    own = (c for c in cls.__mro__ if not _is_foreign(c.__module__))
    return {key for c in own for key in vars(c) if not key.startswith("__")}


def _is_foreign(module: str | None) -> bool:
    return module is not None and module.split(".")[0] in _FOREIGN


def _is_own_module(x) -> bool:
    return isinstance(x, types.ModuleType) and not _is_foreign(x.__name__)

"""States of any structure: dicts, lists, tuples and registered classes of Tensors, nested."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_structure

from .arguments import CALLBACKS, kind_of, real_number
from .errors import ArgumentError, ArgumentTypeError


@dataclass(frozen=True)
class Tree:
    """The structure of a state. A solve sees the tuple of its Tensors; the caller's functions see the
    structure.

    Attributes:
        spec: how the Tensors hang together.
        names: where each of them is, as Python writes it: ``['a'][0]``.
    """

    spec: TreeSpec
    names: list[str]

    @staticmethod
    def of(y0) -> Tree | None:
        """The structure of a state; None for a Tensor and for a tuple of Tensors, which need none, and for
        what is no structure at all.

        Raises ArgumentError where there is no Tensor, ArgumentTypeError for anything else in one's place.
        """
        # No structure is looked for in these: torch's functions leave a reference cycle at every call.
        if isinstance(y0, torch.Tensor) or (
            type(y0) is tuple and all(isinstance(x, torch.Tensor) for x in y0)
        ):
            return None
        members, spec = tree_flatten(y0)
        if spec.is_leaf():
            return None
        if not members:
            raise ArgumentError(f"y0 is an empty {type(y0).__name__}; give at least one Tensor")
        names = [name for name, _ in _named(y0)]
        for name, member in zip(names, members):
            if not isinstance(member, torch.Tensor):
                raise ArgumentTypeError(f"y0{name} must be a Tensor, got {kind_of(member)}")
        return Tree(spec, names)

    def __reduce__(self):
        """For copies and pickles: as an example, because torch's specifications warn when they are copied."""
        return _tree_like, (self.rebuild(self.names), self.names)

    def rebuild(self, members):
        """The caller's structure around ``members``."""
        return self.spec.unflatten(list(members))

    def members(self, value, source: str) -> tuple:
        """What ``value`` has in the places of the Tensors of y0; ``source`` names it in errors."""
        try:
            return tuple(self.spec.flatten_up_to(value))
        except ValueError:
            difference = _difference(self.rebuild(self.names), value, source) or "it was made with other data"
        raise ArgumentTypeError(f"{source} must have the structure of y0: {difference}")

    def field(self, func):
        """A caller's ``func`` and its callbacks for tuple states."""
        return _Field(self, func) if callable(func) else func

    def reader(self, function, place: int = 0):
        """A caller's function of which argument number ``place`` is a state."""
        if not callable(function):
            return function

        def of_tuple(*args):
            return function(*args[:place], self.rebuild(args[place]), *args[place + 1 :])

        return of_tuple

    def tolerance(self, name: str, value):
        """One for all, or the tuple of those in a structure like y0's."""
        one = isinstance(value, torch.Tensor) or real_number(value) is not None
        return value if one else self.members(value, name)

    def options(self, options):
        """With a norm for tuple states."""
        if not isinstance(options, dict) or "norm" not in options:
            return options
        return {**options, "norm": self.reader(options["norm"])}


def _tree_like(example, names) -> Tree:
    return Tree(tree_structure(example), names)


class _Field:
    """``func`` for tuple states."""

    def __init__(self, tree: Tree, func):
        self.tree, self.func = tree, func
        for name in CALLBACKS:
            if (callback := getattr(func, name, None)) is not None:
                setattr(self, name, tree.reader(callback, place=1))

    def __call__(self, t, y, *args):
        tree = self.tree
        members = tree.members(self.func(t, tree.rebuild(y), *args), "what func returned")
        # Not y0's own shapes: of samples solved on their own, fewer may be shown.
        for name, shape, member in zip(tree.names, [x.shape for x in y], members):
            if not isinstance(member, torch.Tensor) or member.shape != shape:
                refusal = ArgumentError if isinstance(member, torch.Tensor) else ArgumentTypeError
                raise refusal(
                    f"what func returned has {kind_of(member)} at {name}, expected a Tensor of shape "
                    f"{tuple(shape)} like y0{name}; slopes are never broadcast"
                )
        return members


def _named(value, **only) -> list:
    """The leaves of a structure, each after its place in it."""
    try:
        return [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(value, **only)[0]]
    except ValueError:  # a class that was registered without names for its members
        return [(f"[{i}]", leaf) for i, leaf in enumerate(tree_flatten(value, **only)[0])]


def _difference(expected, value, place: str) -> str | None:
    """The first place where a value is not like an example, in words; None where they are alike."""
    wanted, given = (dict(_named(x, is_leaf=lambda part, x=x: part is not x)) for x in (expected, value))
    if list(wanted) == [""]:  # a leaf
        return None
    if type(value) is not type(expected) and not (isinstance(value, dict) and isinstance(expected, dict)):
        return f"{place} is {kind_of(value)}, expected a {type(expected).__name__}"
    for name in wanted:
        if name not in given:
            return f"{place}{name} is missing"
    for name in given:
        if name not in wanted:
            return f"{place}{name} is not in y0"
    found = (_difference(wanted[name], given[name], place + name) for name in wanted)
    return next(filter(None, found), None)

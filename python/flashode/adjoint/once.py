"""What has been said about a field, so that a training loop hears it once and not at every iteration."""

from __future__ import annotations

import inspect
import types
import weakref

_said = {}


def first_time(func, what: str) -> bool:
    """Whether ``what`` comes up for ``func`` for the first time.

    Remembers ``func`` while it lives; a bound method, which is made anew each time, by its object.
    """
    func = inspect.unwrap(func)
    owner, function = (func.__self__, func.__func__) if isinstance(func, types.MethodType) else (func, None)
    key = id(owner), id(function), what
    if key in _said:
        return False
    try:
        _said[key] = weakref.ref(owner, lambda _: _said.pop(key, None))
    except TypeError:  # what has no weak references is new every time
        pass
    return True

"""A progress bar that shows how far a solve has come, with tqdm, at most ten times a second."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from dataclasses import replace

from .arguments import kind_of
from .errors import ArgumentError, ArgumentTypeError

_INTERVAL = 0.1  # seconds between two looks at the bar


def require_progress(progress):
    """Refuses what is neither True nor False, and True without tqdm."""
    if not isinstance(progress, bool):
        raise ArgumentTypeError(f"progress must be True or False, got {kind_of(progress)}")
    if progress:
        _tqdm()


def _tqdm():
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ArgumentError("progress=True needs tqdm: pip install tqdm, or leave progress out") from None
    return tqdm


class Progress:
    """Stands in for a callback of the caller's, ``inner`` (or None), and shows the steps it is told of.

    ``end`` is None where nobody knows it, as in a solve that runs to an event.
    """

    def __init__(self, name: str, begin: float, end: float | None, direction: float, inner=None):
        self.begin, self.end, self.direction, self.inner = begin, end, direction, inner
        span = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = _tqdm()(
            desc=name,
            total=None if end is None else end - begin,
            bar_format="{desc} {elapsed}{postfix}" if end is None else span,
            leave=True,
        )
        self.steps, self.t, self.looked = 0, begin, time.monotonic()

    def advance(self, t0: float, dt: float):
        """A step from ``t0``, on the forward clock."""
        self.steps += 1
        self.t = t0 + dt
        now = time.monotonic()
        if now - self.looked >= _INTERVAL:
            self.looked = now
            self.show(f", dt={self.direction * dt:.3g}")

    def show(self, more: str = ""):
        t = self.t if self.end is None else min(self.t, self.end)
        self.bar.n = t - self.begin
        self.bar.set_postfix_str(f"t={self.direction * t + 0.0:.6g}, {self.steps} steps{more}", refresh=False)
        self.bar.refresh()

    def close(self):
        self.show()
        self.bar.close()


@contextmanager
def shown(problem, progress: bool, what: str = ""):
    """The problem, with a bar about it while the context lasts if ``progress`` is set."""
    if not progress:
        yield problem
        return
    slot = 1 if problem.adaptive else 0  # the callback of accepted steps, or of all
    begin, end = problem.times[0], problem.until if problem.events else problem.times[-1]
    bar = Progress(
        " ".join(filter(None, (problem.method.name, what))),
        begin, None if end == math.inf else end, problem.direction, problem.callbacks[slot],
    )  # fmt: skip
    callbacks = tuple(bar if i == slot else callback for i, callback in enumerate(problem.callbacks))
    try:
        yield replace(problem, callbacks=callbacks)
    finally:
        bar.close()


@contextmanager
def counted(total: int, progress: bool, name: str):
    """What to call once for each of ``total`` pieces of work; it shows them if ``progress`` is set."""
    if not progress:
        yield lambda: None
        return
    with _tqdm()(desc=name, total=total) as bar:
        yield bar.update

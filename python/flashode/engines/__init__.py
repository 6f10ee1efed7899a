"""The engines, and the choice between them.

An engine is a module with ``supports(problem) -> reason or None``, ``solve(problem, recording=None) ->
Outcome``, which adds every accepted step to a recording if there is one, and ``replay(problem, shifts)``,
which returns a function that takes such a step again; its sweep, ``sweep(augmented) -> Gradients``,
is the backward solve of `odeint_adjoint`. A recording ``as_polynomials`` is an `augmented.Path`: what is
added to it is all that dense output needs of an engine.
"""

from __future__ import annotations

from ..errors import ArgumentError
from ..problem import Problem
from . import adams as adams  # its steps join those of reference
from . import native, reference, reference_sweep, scipy_solver

ENGINES = {"native": native, "reference": reference, "scipy": scipy_solver}
SWEEPS = {"native": native.sweep, "reference": reference_sweep.sweep}


def choose(problem: Problem, engine: str):
    """The engine to use. A named engine that cannot serve raises; only "auto" falls back."""
    if not isinstance(engine, str) or engine not in ("auto", *ENGINES):
        raise ArgumentError(f"engine must be one of {['auto', *ENGINES]}, got {engine!r}")
    if engine == "auto":
        return next(name for name, e in ENGINES.items() if e.supports(problem) is None)
    reason = ENGINES[engine].supports(problem)
    if reason is not None:
        raise ArgumentError(f"the {engine} engine cannot serve this call: {reason}")
    return engine

"""The engines, and the choice between them.

An engine is a module with ``supports(problem) -> reason or None``, ``solve(problem, recording=None) ->
Outcome``, which adds every accepted step to a recording if there is one, and ``replay(problem, shifts)``,
which returns a function that takes such a step again; its sweep, ``sweep(augmented) -> Gradients``,
is the backward solve of `odeint_adjoint`. A recording ``as_polynomials`` is an `augmented.Path`: what is
added to it is all that dense output needs of an engine.
"""

from __future__ import annotations

from ..batched import BatchOutcome, BatchProblem
from ..errors import ArgumentError
from ..problem import Problem
from ..program import CompiledField
from . import adams as adams  # their steps join those of reference
from . import compiled, native, native_batched, reference, reference_batched, reference_sweep, scipy_solver
from . import leapfrog as leapfrog

ENGINES = {"native": native, "reference": reference, "scipy": scipy_solver, "compiled": compiled}
BATCH_ENGINES = {"native": native_batched, "reference": reference_batched, "compiled": compiled}
SWEEPS = {"native": native.sweep, "reference": reference_sweep.sweep, "compiled": compiled.sweep}


def choose(problem: Problem, engine: str, engines=ENGINES):
    """The engine to use. A named engine that cannot serve raises; only "auto" falls back, and never from a
    compiled field to calls of Python: that would be slower in silence, but for a state without numbers."""
    if not isinstance(engine, str) or engine not in ("auto", *engines):
        raise ArgumentError(f"engine must be one of {['auto', *engines]}, got {engine!r}")
    if engine == "auto" and isinstance(problem.func, CompiledField) and problem.y0.numel():
        engine = "compiled"
    if engine == "auto":
        return next(name for name, e in engines.items() if e.supports(problem) is None)
    reason = engines[engine].supports(problem)
    if reason is not None:
        remedy = f"; {compiled.WAY_OUT}" if engine == "compiled" else ""
        raise ArgumentError(f"the {engine} engine cannot serve this call: {reason}{remedy}")
    return engine


def solve_batch(problem: BatchProblem, engine: str):
    """The outcome of samples solved on their own, and the engine that served.

    Whether gradients are recorded shows in the first slope that ``func`` returns: "auto" then goes on with
    the reference engine from there, without another call.
    """
    name = choose(problem, engine, BATCH_ENGINES)
    if name == "reference":
        return reference_batched.solve(problem), name
    if name == "compiled":
        return compiled.solve_batch(problem), name
    outcome = native_batched.solve(problem)
    if isinstance(outcome, BatchOutcome):
        return outcome, name
    if engine == "native":
        raise ArgumentError(f"the native engine cannot serve this call: {native_batched.RECORDS}")
    return reference_batched.solve(problem, f0=problem.rows(outcome)), "reference"

"""What a solve can end with, and the exceptions that say so."""

from __future__ import annotations

import enum
import functools


class Status(enum.IntEnum):
    """How a solve ended; the numbers are shared with the C++ engine.

    NONFINITE_ERROR: the error relative to the tolerance is not finite although the state and its
    slopes are, as where ``atol`` is 0 and the state vanishes. NONCONVERGENCE: the equations of an
    implicit step could not be solved, however short the step where it may be shortened.
    NO_EVENT: the end given as ``until`` was reached, and none of the events was met.
    """

    SUCCESS = 0
    MAX_STEPS = 1
    STEP_UNDERFLOW = 2
    NONFINITE_FIELD = 3
    NONFINITE_STATE = 4
    EVENT = 5
    NONFINITE_ERROR = 6
    NONCONVERGENCE = 7
    NO_EVENT = 8

    @property
    def ok(self) -> bool:
        return self in (Status.SUCCESS, Status.EVENT, Status.NO_EVENT)


class StepFailure(Exception):
    """No further step is possible: how an engine's loop ends, never seen by a caller."""

    def __init__(self, status: Status):
        self.status = status


class ArgumentError(ValueError, AssertionError):
    """An argument has the right type but a value that cannot be used.

    parity: also an AssertionError, because programs written for torchdiffeq catch that.
    """


class ArgumentTypeError(TypeError, AssertionError):
    """An argument, or what ``func`` returned, is of a type that cannot be used."""


class CompileError(ArgumentError):
    """A field that `flashode.compile` cannot make a program of, or that could not be built."""


class GradientWarning(UserWarning):
    """Gradients of `odeint_adjoint` may be wrong, or lack a tensor that ``func`` uses."""


class SolveError(RuntimeError, AssertionError):
    """A solve that could not be finished.

    Attributes:
        reason: the `Status` that ended it.
        t: time (the caller's clock) of the last accepted state.
        dt: size of the step that was tried or refused, signed like time.
        accepted, rejected: steps so far.
        nfe: calls of ``func`` so far.
        index: index of the first offending element in the state, where one is to blame;
            ``(member, *index)`` for tuple states.
    """

    def __init__(self, message, *, reason, t, dt, accepted, rejected, nfe, index=None):
        super().__init__(message)
        self.reason, self.t, self.dt = reason, t, dt
        self.accepted, self.rejected, self.nfe = accepted, rejected, nfe
        self.index = index

    def __reduce__(self):
        """For other processes, as those of a DataLoader: pickle alone would forget the keywords."""
        return functools.partial(SolveError, **vars(self)), self.args

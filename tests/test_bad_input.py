"""Bad and unusual input: a clear error or the right answer, never a hang, a crash or a silent wrong number.

Each bad row names its error, words that the message must hold (the argument, what was given), and
for solves that cannot be finished the reason. The rows run through both engines and the adjoint
interface, and once more under ``python -O``, where every ``assert`` is gone.
"""

import collections
import copy
import dataclasses
import decimal
import fractions
import json
import math
import pathlib
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from problems import EXPLICIT

import flashode
from flashode import ArgumentError, ArgumentTypeError, SolveError, Status, extension
from flashode import arguments as arguments_module

ADAPTIVE = [name for name, m in EXPLICIT.items() if m.adaptive]
FIXED = [name for name, m in EXPLICIT.items() if not m.adaptive]
NAN, INF = math.nan, math.inf

# One representative of each family; every method where the row is about the method itself.
METHOD = pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4", "euler"])


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


ONES, UNIT = f64(1, 1), f64(0, 1)


def decay(t, y):
    return -y


def decay_pair(t, y):
    return tuple(-member for member in y)


# ---- bad rows --------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """A call that must raise ``error``, with all ``words`` in its message."""

    name: str
    error: type
    words: tuple
    func: object
    y0: object
    t: object
    arguments: dict
    reason: Status | None = None
    reference_only: bool = False


ROWS: list[Row] = []


def bad(name, error, *words, func=decay, y0=ONES, t=UNIT, reason=None, reference_only=False, **arguments):
    ROWS.append(Row(name, error, words, func, y0, t, arguments, reason, reference_only))


def unsolvable(name, reason, *words, **arguments):
    bad(name, SolveError, *words, reason=reason, **arguments)


def solve_row(row, entry):
    if entry == "adjoint":
        return flashode.odeint_adjoint(row.func, row.y0, row.t, adjoint_params=(), **row.arguments)
    return flashode.odeint(row.func, row.y0, row.t, **{"engine": entry, **row.arguments})


# Initial state. Two y: a row with a NaN must be named.
bad("y0 NaN", ArgumentError, "y0", "1 non-finite element,", "nan at index [1]", y0=f64(1, NAN))
bad("y0 inf", ArgumentError, "y0", "2 non-finite elements", "-inf at index [0]", y0=f64(-INF, INF))
bad("y0 NaN in a row", ArgumentError, "y0", "nan at index [2, 1]", y0=torch.ones(4, 3).index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(NAN)))  # fmt: skip
bad("y0 NaN in a member", ArgumentError, "y0", "nan at index [0, 1] of member 1", func=decay_pair, y0=(ONES, f64(1, NAN).view(1, 2)))  # fmt: skip
bad("y0 NaN, fixed steps", ArgumentError, "y0", "nan at index [1]", y0=f64(1, NAN), method="euler")
bad("y0 complex NaN", ArgumentError, "y0", "index [0]", y0=torch.tensor([complex(0, NAN)]))
bad("y0 bool", ArgumentTypeError, "y0", "torch.bool", ".float()", y0=torch.ones(2, dtype=torch.bool))
bad("y0 int", ArgumentTypeError, "y0", "torch.int64", ".float()", y0=torch.ones(2, dtype=torch.int64))
bad("y0 float", ArgumentTypeError, "y0", "tuple of Tensors", "float 1.0", y0=1.0)
bad("y0 list of floats", ArgumentTypeError, "y0", "tuple of Tensors", "list", y0=[1.0, 2.0])
bad("y0 list of Tensors", ArgumentTypeError, "y0", "tuple of Tensors", "list", y0=[ONES, ONES])
bad("y0 array", ArgumentTypeError, "y0", "tuple of Tensors", "ndarray", y0=np.ones(2))
bad("y0 dict", ArgumentTypeError, "y0", "tuple of Tensors", "dict", y0={"a": ONES})
bad("y0 None", ArgumentTypeError, "y0", "None", y0=None)
bad("y0 empty tuple", ArgumentError, "y0", "empty tuple", func=decay_pair, y0=())
bad("y0 with an int member", ArgumentTypeError, "y0", "member 1", "torch.int64", func=decay_pair, y0=(ONES, torch.ones(2, dtype=torch.int64)))  # fmt: skip
bad(
    "y0 with a float member",
    ArgumentTypeError,
    "y0",
    "member 1",
    "float 1.0",
    func=decay_pair,
    y0=(ONES, 1.0),
)
bad("y0 meta", NotImplementedError, "y0", "meta", y0=torch.ones(2, device="meta"))
bad("y0 sparse", ArgumentTypeError, "y0", "torch.sparse_coo", "to_dense", y0=ONES.to_sparse())

# Times.
bad("t unsorted", ArgumentError, "t must be strictly", "t[1] = 1.0 and t[2] = 0.5", t=f64(0, 1, 0.5))
bad("t turns", ArgumentError, "t must be strictly", "t[1] = 0.5 and t[2] = 2.0", t=f64(1, 0.5, 2))
bad(
    "t repeated inside",
    ArgumentError,
    "t must be strictly",
    "t[1] = 0.5 and t[2] = 0.5",
    t=f64(0, 0.5, 0.5, 1),
)
bad("t repeated first", ArgumentError, "t must be strictly", "t[0] = 0.0 and t[1] = 0.0", t=f64(0, 0, 1))
bad("t all equal", ArgumentError, "t must be strictly", "t[0] = 1.0 and t[1] = 1.0", t=f64(1, 1))
bad("t empty", ArgumentError, "t is empty", t=f64())
bad("t 2-D", ArgumentError, "t must be one dimensional", "(1, 2)", t=f64(0, 1).view(1, 2))
bad("t 0-d", ArgumentError, "t must be one dimensional", "()", t=torch.tensor(0.0))
bad("t list", ArgumentTypeError, "t must be a torch.Tensor", "list", t=[0.0, 1.0])
bad("t array", ArgumentTypeError, "t must be a torch.Tensor", "ndarray", t=np.array([0.0, 1.0]))
bad("t float", ArgumentTypeError, "t must be a torch.Tensor", "float 1.0", t=1.0)
bad("t int", ArgumentTypeError, "`t`", "floating point", "torch.int64", t=torch.tensor([0, 1]))
bad("t complex", ArgumentTypeError, "`t`", "floating point", "torch.complex64", t=torch.tensor([0j, 1j]))
bad("t NaN", ArgumentError, "t must be finite", "t[1] = nan", t=f64(0, NAN, 1))
bad("t inf", ArgumentError, "t must be finite", "t[1] = inf", t=f64(0, INF))
bad(
    "t -inf first, fixed steps",
    ArgumentError,
    "t must be finite",
    "t[0] = -inf",
    t=f64(-INF, 0),
    method="rk4",
)
bad("t meta", ArgumentTypeError, "t is on the meta device", t=torch.zeros(2, device="meta"))
bad("t sparse", ArgumentTypeError, "t is a torch.sparse_coo Tensor", t=UNIT.to_sparse())
unsolvable("t too coarse for the step", Status.STEP_UNDERFLOW, "underflow in dt", "t=1e+17", "resolution of t", t=f64(1e17, 1e17 + 16))  # fmt: skip

# The right-hand side.
bad("func not callable", ArgumentTypeError, "func must be callable", "int 3", func=3)
bad("func of one argument", TypeError, "positional argument", func=lambda y: -y)


def swapped(t, y):
    return -y[1], -y[0]


PAIR = (torch.ones(2, 3), torch.ones(3, 2))
for _method in ("dopri5", "rk4"):
    bad(f"slope float, {_method}", ArgumentTypeError, "func must return a Tensor", "(2,)", "float 1.0", func=lambda t, y: 1.0, method=_method)  # fmt: skip
    bad(f"slope None, {_method}", ArgumentTypeError, "func must return a Tensor", "None", func=lambda t, y: None, method=_method)  # fmt: skip
    bad(f"slope array, {_method}", ArgumentTypeError, "func must return a Tensor", "ndarray", func=lambda t, y: -y.detach().numpy(), method=_method)  # fmt: skip
    bad(f"slope tuple, {_method}", ArgumentTypeError, "func must return a Tensor", "tuple", func=lambda t, y: (-y,), method=_method)  # fmt: skip
    bad(f"slope Tensor for a tuple, {_method}", ArgumentTypeError, "func must return a tuple", "shape (4,)", func=lambda t, y: torch.cat(y), y0=(ONES, ONES), method=_method)  # fmt: skip
    bad(f"slope members swapped, {_method}", ArgumentError, "func: member 0", "(3, 2)", "expected (2, 3)", func=swapped, y0=PAIR, method=_method)  # fmt: skip
    bad(f"slope tuple short, {_method}", ArgumentError, "func", "1 members, expected 2", func=lambda t, y: (-y[0],), y0=PAIR, method=_method)  # fmt: skip
    bad(f"slope tuple long, {_method}", ArgumentError, "func", "3 members, expected 2", func=lambda t, y: (*y, y[0]), y0=PAIR, method=_method)  # fmt: skip
    bad(f"slope member float, {_method}", ArgumentTypeError, "func: member 1", "float 0.0", func=lambda t, y: (y[0], 0.0), y0=PAIR, method=_method)  # fmt: skip
    bad(f"slope scalar, {_method}", ArgumentError, "func", "()", "expected (2,)", func=lambda t, y: -y.sum(), method=_method)  # fmt: skip
    bad(f"slope (1,), {_method}", ArgumentError, "func", "(1,)", "expected (2,)", func=lambda t, y: -y[:1], method=_method)  # fmt: skip
    bad(f"slope (2,1), {_method}", ArgumentError, "func", "(2, 1)", "expected (2,)", func=lambda t, y: -y[:, None], method=_method)  # fmt: skip
    bad(f"slope row, {_method}", ArgumentError, "func", "(2,)", "expected (3, 2)", func=lambda t, y: -y[0], y0=torch.ones(3, 2), method=_method)  # fmt: skip
    bad(f"slope transposed, {_method}", ArgumentError, "func", "(2, 3)", "expected (3, 2)", func=lambda t, y: -y.T, y0=torch.ones(3, 2), method=_method)  # fmt: skip
    bad(f"slope long, {_method}", ArgumentError, "func", "(4,)", "expected (2,)", func=lambda t, y: torch.cat([y, y]), method=_method)  # fmt: skip
    bad(f"slope complex, {_method}", ArgumentTypeError, "func", "torch.complex128", "torch.float64", func=lambda t, y: -y + 0j, method=_method)  # fmt: skip
    bad(
        f"slope meta, {_method}",
        ArgumentError,
        "func",
        "meta",
        "cpu",
        func=lambda t, y: y.to("meta"),
        method=_method,
    )
    bad(f"slope sparse, {_method}", ArgumentTypeError, "func", "torch.sparse_coo", func=lambda t, y: (-y).to_sparse(), method=_method)  # fmt: skip
bad("slope complex for a real member", ArgumentTypeError, "func: member 0", "complex64", "float32", reference_only=True,
    func=lambda t, y: (y[0] + 0j, y[1]), y0=(torch.ones(2), torch.ones(2, dtype=torch.complex64)))  # fmt: skip


def late(value, when=0.5):
    """One element of the slope is ``value`` after some time."""
    return lambda t, y: torch.where(t > when, f64(0, value), -y)


def square(t, y):
    return y**2


def root(t, y):
    return -torch.sqrt(y)


def stiff(t, y):
    return -1e6 * (y - torch.cos(t))


def van_der_pol(t, y):
    return torch.stack([y[1], 1000 * (1 - y[0] ** 2) * y[1] - y[0]])


def robertson(t, y):
    a, b = -0.04 * y[0] + 1e4 * y[1] * y[2], 3e7 * y[1] ** 2
    return torch.stack([a, -a - b, b])


FEW = {"max_num_steps": 300}
TENTHS = {"step_size": 0.1}
FIELD, STATE, STEPS, UNDERFLOW = Status.NONFINITE_FIELD, Status.NONFINITE_STATE, Status.MAX_STEPS, Status.STEP_UNDERFLOW  # fmt: skip
unsolvable(
    "slope NaN at once", FIELD, "func returned", "nan at element [0]", "t=0.0", func=lambda t, y: y * NAN
)
unsolvable("slope NaN at once, rk4", FIELD, "func returned", "nan at element [0]", "t=0.0", func=lambda t, y: y * NAN, method="rk4")  # fmt: skip
unsolvable("slope NaN later", FIELD, "func returned", "nan at element [1]", "t=0.5", func=late(NAN))
unsolvable("slope inf later", FIELD, "func returned", "inf at element [1]", "t=0.5", func=late(INF))
unsolvable("slope NaN later, rk4", FIELD, "func returned", "nan at element [1]", "t=0.5,", func=late(NAN), method="rk4", options=TENTHS)  # fmt: skip
unsolvable("slope inf later, euler", FIELD, "func returned", "inf at element [1]", "t=0.6", func=late(INF), method="euler", options=TENTHS)  # fmt: skip
unsolvable("slope NaN later, member", FIELD, "func returned", "nan at element [1, 1]", func=lambda t, y: (-y[0], late(NAN)(t, y[1])), y0=(ONES, ONES))  # fmt: skip
unsolvable("slope NaN later, backwards", FIELD, "func returned", "nan at element [1]", "t=0.", func=lambda t, y: late(NAN)(1 - t, y), t=f64(1, 0))  # fmt: skip
unsolvable("slope NaN later, least step", FIELD, "func returned", "nan at element [1]", func=late(NAN), options={"min_step": 0.1})  # fmt: skip
unsolvable(
    "leaves the domain", FIELD, "func returned", "nan at element [0]", "domain", func=root, t=f64(0, 3)
)
unsolvable("leaves the domain, rk4", FIELD, "func returned", "nan at element [0]", func=root, t=f64(0, 3), method="rk4", options=TENTHS)  # fmt: skip
unsolvable("grows past the dtype", FIELD, "func returned", "inf at element [0]", "grows beyond its dtype", func=lambda t, y: y, y0=f64(1e300), t=f64(0, 100))  # fmt: skip
unsolvable("grows past the dtype, euler", STATE, "state `y`", "inf at element [0]", "overflows", func=lambda t, y: y, y0=f64(1e300), t=f64(0, 100), method="euler", options={"step_size": 1.0})  # fmt: skip
unsolvable("grows past the dtype, float32", STEPS, "max_num_steps", "inf at element [0]", func=lambda t, y: y, y0=torch.full((1,), 3e38), t=f64(0, 100), options=FEW)  # fmt: skip
unsolvable("grows past the dtype, constant slope", STEPS, "max_num_steps", "non-finite values (inf at element [0])", func=lambda t, y: torch.full_like(y, 1e308), y0=f64(1.7e308), t=f64(0, 10), options=FEW)  # fmt: skip
unsolvable("pole", UNDERFLOW, "underflow in dt", "t=1.0000", "singularity", func=square, t=f64(0, 2))
unsolvable("pole, rk4", FIELD, "func returned", "inf at element", func=square, t=f64(0, 2), method="rk4", options=TENTHS)  # fmt: skip
unsolvable(
    "stiff", STEPS, "max_num_steps exceeded (300>=300)", "stiff", func=stiff, t=f64(0, 10), options=FEW
)
unsolvable("stiff, van der Pol", STEPS, "max_num_steps exceeded (300>=300)", "stiff", func=van_der_pol, y0=f64(2, 0), t=f64(0, 2000), options=FEW)  # fmt: skip
unsolvable("stiff, Robertson", STEPS, "max_num_steps exceeded (300>=300)", "stiff", func=robertson, y0=f64(1, 0, 0), t=f64(0, 100), options=FEW)  # fmt: skip

# Tolerances.
for _name in ("rtol", "atol"):
    for _value, _words in ((-1e-3, "-0.001"), (INF, "inf"), (NAN, "nan"), (f64(1e-3, -1), "-1.0"), (f64(1e-3, INF), "inf"), (f64(NAN, 1), "nan")):  # fmt: skip
        bad(
            f"{_name} {_value}",
            ArgumentError,
            f"{_name} must be finite and not negative",
            _words,
            **{_name: _value},
        )
    for _value, _words in (("1e-3", "str '1e-3'"), (None, "None"), (1e-3j, "complex 0.001j"), (True, "bool True"), ([1e-3, 1e-3], "list"), (np.ones(2), "ndarray")):  # fmt: skip
        bad(
            f"{_name} {_value}",
            ArgumentTypeError,
            f"{_name} must be a number or a Tensor",
            _words,
            **{_name: _value},
        )
    bad(f"{_name} complex Tensor", ArgumentTypeError, f"{_name} must be real", "torch.complex64", **{_name: torch.tensor(1j)})  # fmt: skip
    bad(f"{_name} requires gradient", ArgumentError, f"{_name} cannot require gradient", **{_name: torch.tensor(1e-3, requires_grad=True)})  # fmt: skip
    bad(f"{_name} of a wrong shape", ArgumentError, _name, "(3,)", "(2,)", **{_name: torch.full((3,), 1e-3)})
    bad(f"{_name} of three for two members", ArgumentError, _name, "got 3 for 2", func=decay_pair, y0=(ONES, ONES), **{_name: (1e-3,) * 3})  # fmt: skip
    bad(f"{_name} of a member negative", ArgumentError, f"{_name}[1]", "-1.0", func=decay_pair, y0=(ONES, ONES), **{_name: (1e-3, -1)})  # fmt: skip
    bad(f"{_name} of a member a string", ArgumentTypeError, f"{_name}[0]", "str 'a'", func=decay_pair, y0=(ONES, ONES), **{_name: ("a", 1)})  # fmt: skip
    bad(f"{_name} of a member requires gradient", ArgumentError, f"{_name}[1] cannot require gradient", func=decay_pair, y0=(ONES, ONES), **{_name: (1e-3, torch.tensor(1e-3, requires_grad=True))})  # fmt: skip
ERROR = Status.NONFINITE_ERROR
bad("both tolerances 0", ArgumentError, "rtol and atol are both 0", rtol=0, atol=0.0)
unsolvable("both tolerances 0 in one element", ERROR, "tolerance atol + rtol * |y| is 0", "element [1]", rtol=f64(1e-3, 0), atol=f64(0, 0))  # fmt: skip
unsolvable("atol 0 at zero", ERROR, "tolerance atol + rtol * |y| is 0", "element [1]", "atol above 0", y0=f64(1, 0), atol=0)  # fmt: skip
unsolvable("atol 0 at zero, member", ERROR, "is 0 at element [1, 0]", func=decay_pair, y0=(ONES, f64(0, 1)), atol=(1e-9, 0))  # fmt: skip
unsolvable("atol 0 reaching zero", UNDERFLOW, "underflow in dt", "t=0.5", "an atol of 0 needs a state that never vanishes", atol=0,
           func=lambda t, y: torch.where(t >= 0.5, f64(0, 0), f64(0, -2)), options={"step_t": f64(0.5), "first_step": 0.5})  # fmt: skip
unsolvable("atol 0, denormal", ERROR, "tolerance atol + rtol * |y| is 0", y0=f64(1e-320, 1), atol=0)
unsolvable(
    "too steep for any step", ERROR, "norm overflows", "rescale", func=lambda t, y: torch.full_like(y, 1e170)
)

# Method and options.
bad("method unknown", ArgumentError, 'Invalid method "dopri6"', 'Did you mean "dopri', method="dopri6")
bad("method misspelt", ArgumentError, 'Invalid method "dorpi5"', 'Did you mean "dopri5"', method="dorpi5")
bad("method list", ArgumentTypeError, "method must be a string", "list", method=["dopri5"])
bad("method number", ArgumentTypeError, "method must be a string", "int 5", method=5)
bad("engine unknown", ArgumentError, "engine must be one of", "'natve'", engine="natve")
bad("options list", ArgumentTypeError, "options must be a dict", "list", options=["step_size"])
for _value in (0, 0.0, -0.1, -INF, NAN):
    bad(f"step_size {_value}", ArgumentError, "options['step_size'] must be greater than 0", f"got {float(_value)}", method="rk4", options={"step_size": _value})  # fmt: skip
    bad(f"first_step {_value}", ArgumentError, "options['first_step'] must be greater than 0", f"got {float(_value)}", options={"first_step": _value})  # fmt: skip
for _name, _method in (
    ("step_size", "rk4"),
    ("first_step", "dopri5"),
    ("ifactor", "dopri5"),
    ("min_step", "dopri5"),
):
    bad(f"{_name} inf", ArgumentError, f"options['{_name}'] must be finite", "got inf", method=_method, options={_name: INF})  # fmt: skip
    bad(f"{_name} string", ArgumentTypeError, f"options['{_name}'] must be a number", "str '0.1'", method=_method, options={_name: "0.1"})  # fmt: skip
    bad(f"{_name} list", ArgumentTypeError, f"options['{_name}'] must be a number", "list", method=_method, options={_name: [0.1]})  # fmt: skip
    bad(f"{_name} vector", ArgumentTypeError, f"options['{_name}'] must be a number", "shape (2,)", method=_method, options={_name: ONES})  # fmt: skip
bad("step_size 1e-12", ArgumentError, "options['step_size'] = 1e-12", "1e+12 steps", method="rk4", options={"step_size": 1e-12})  # fmt: skip
bad("step_size below the resolution of t", ArgumentError, "options['step_size'] = 1.0", "resolution of t", t=f64(1e17, 1e17 + 64), method="rk4", options={"step_size": 1})  # fmt: skip
bad("step_size and grid_constructor", ArgumentError, "step_size and grid_constructor are mutually exclusive", method="rk4", options={"step_size": 0.1, "grid_constructor": lambda f, y, t: t})  # fmt: skip


def grid(*values):
    return {"method": "rk4", "options": {"grid_constructor": lambda f, y0, t: f64(*values)}}


bad("grid_constructor not callable", ArgumentTypeError, "options['grid_constructor'] must be callable", "list", method="rk4", options={"grid_constructor": [0, 1]})  # fmt: skip
bad(
    "grid unsorted",
    ArgumentError,
    "grid_constructor's grid",
    "[1] = 0.7",
    "[2] = 0.3",
    **grid(0, 0.7, 0.3, 1),
)
bad(
    "grid repeated",
    ArgumentError,
    "grid_constructor's grid",
    "[1] = 0.5",
    "[2] = 0.5",
    **grid(0, 0.5, 0.5, 1),
)
bad("grid NaN", ArgumentError, "grid_constructor's grid", "[1] = nan", **grid(0, NAN, 1))
bad("grid empty", ArgumentError, "grid_constructor's grid", "empty", **grid())
bad(
    "grid too short",
    ArgumentError,
    "grid_constructor's grid",
    "t[-1] = 1.0",
    "runs from 0.0 to 0.9",
    **grid(0, 0.9),
)
bad(
    "grid too long",
    ArgumentError,
    "grid_constructor's grid",
    "t[-1] = 1.0",
    "runs from 0.0 to 2.0",
    **grid(0, 2),
)
bad(
    "grid late",
    ArgumentError,
    "grid_constructor's grid",
    "t[0] = 0.0",
    "runs from 0.5 to 1.0",
    **grid(0.5, 1),
)
bad("grid the wrong way", ArgumentError, "grid_constructor's grid", "runs from 1.0 to 0.0", **grid(1, 0))
bad("grid list", ArgumentTypeError, "grid_constructor must return a Tensor", "list", method="rk4", options={"grid_constructor": lambda f, y0, t: [0.0, 1.0]})  # fmt: skip
bad("grid int", ArgumentTypeError, "grid_constructor's grid", "torch.int64", method="rk4", options={"grid_constructor": lambda f, y0, t: torch.arange(2)})  # fmt: skip
unsolvable("max_num_steps reached", STEPS, "max_num_steps exceeded (3>=3)", "options={'max_num_steps': ...}", func=stiff, options={"max_num_steps": 3})  # fmt: skip
for _value in (0, -1, NAN):
    bad(f"max_num_steps {_value}", ArgumentError, "options['max_num_steps'] must be at least 1", f"got {float(_value)}", options={"max_num_steps": _value})  # fmt: skip
bad("max_num_steps 2.5", ArgumentError, "options['max_num_steps'] must be a whole number", "2.5", options={"max_num_steps": 2.5})  # fmt: skip
bad("max_num_steps None", ArgumentTypeError, "options['max_num_steps'] must be a number", "None", options={"max_num_steps": None})  # fmt: skip
bad("min_step over max_step", ArgumentError, "options['min_step'] is 2.0", "options['max_step'], 1.0", options={"min_step": 2.0, "max_step": 1.0})  # fmt: skip
bad(
    "min_step negative",
    ArgumentError,
    "options['min_step'] must be at least 0",
    "-0.1",
    options={"min_step": -0.1},
)
bad(
    "max_step 0",
    ArgumentError,
    "options['max_step'] must be greater than 0",
    "got 0.0",
    options={"max_step": 0},
)
for _name, _value, _words in (("safety", 5, "at most 1"), ("safety", 0, "greater than 0"), ("safety", NAN, "at most 1"), ("ifactor", 0.5, "at least 1"),
                              ("ifactor", -1, "at least 1"), ("dfactor", 1.5, "at most 1"), ("dfactor", 0, "greater than 0")):  # fmt: skip
    bad(f"{_name} {_value}", ArgumentError, f"options['{_name}']", _words, f"got {float(_value)}", options={_name: _value})  # fmt: skip
bad("jump_t string", ArgumentTypeError, "options['jump_t']", "str 'a'", options={"jump_t": "a"})
bad("jump_t NaN", ArgumentError, "options['jump_t'] holds NaN", options={"jump_t": f64(NAN)})
bad("jump_t repeated", ArgumentError, "`step_t` and `jump_t`", "repeated", options={"jump_t": f64(0.5), "step_t": [0.5]})  # fmt: skip
bad("dtype of time", ArgumentError, "options['dtype']", "torch.int64", options={"dtype": torch.int64})
bad(
    "interp unknown",
    ArgumentError,
    "'quartic'",
    "options['interp']",
    method="rk4",
    options={"interp": "quartic"},
)
bad(
    "interp list",
    ArgumentError,
    "['linear']",
    "options['interp']",
    method="rk4",
    options={"interp": ["linear"]},
)
bad(
    "norm a string",
    ArgumentTypeError,
    "options['norm'] must be callable",
    "str 'max'",
    options={"norm": "max"},
)
for _value, _words in ((f64(1, 2), "shape (2,)"), (None, "None"), ("1", "str '1'"), (True, "bool True")):
    bad(f"norm returns {_value}", ArgumentTypeError, "options['norm'] must return a scalar", _words, options={"norm": lambda e, v=_value: v})  # fmt: skip
for _value in (-1.0, torch.tensor(-1.0)):
    bad(f"norm returns {_value!r}", ArgumentError, "options['norm'] must return", "not negative", "-1.0", options={"norm": lambda e, v=_value: v})  # fmt: skip
for _value in (NAN, torch.tensor(NAN)):
    bad(
        f"norm returns {_value!r}",
        ArgumentError,
        "options['norm'] returned nan",
        options={"norm": lambda e, v=_value: v},
    )
unsolvable(
    "norm never satisfied", UNDERFLOW, "underflow in dt", "error ratio 7", options={"norm": lambda e: 7}
)
unsolvable("norm returns inf", ERROR, "options['norm'] overflows", options={"norm": lambda e: INF})


# Events.
def half_way(t, y):
    return y[0] - 0.5


bad("event not callable", ArgumentTypeError, "event_fn must be callable", "str 'y'", event_fn="y")
bad("event with three times", ArgumentError, "len(t)=3", event_fn=half_way, t=f64(0, 1, 2))
bad(
    "event with a list of times",
    ArgumentTypeError,
    "t must be a torch.Tensor",
    "list",
    event_fn=half_way,
    t=[0.0, 1.0],
)
bad("event, rk4 without step_size", ArgumentError, "step_size", event_fn=half_way, method="rk4")
bad("event, step_size negative", ArgumentError, "options['step_size']", "-0.1", event_fn=half_way, method="rk4", options={"step_size": -0.1})  # fmt: skip
bad("event returns a float", ArgumentTypeError, "event_fn must return a Tensor", "float", event_fn=lambda t, y: 1.0, reference_only=True)  # fmt: skip
bad("event returns NaN", ArgumentError, "event_fn returned NaN", "t=0.0", event_fn=lambda t, y: y[0] * NAN, reference_only=True)  # fmt: skip
unsolvable("event never", STEPS, "max_num_steps exceeded (100>=100)", event_fn=lambda t, y: y[0] + 1, options={"max_num_steps": 100}, reference_only=True)  # fmt: skip


def entries_of(row):
    native = extension.C is not None and not row.reference_only
    return ["native", "reference", "adjoint"] if native else ["reference", "adjoint"]


@pytest.mark.parametrize(
    "row, entry", [pytest.param(r, e, id=f"{r.name}-{e}") for r in ROWS for e in entries_of(r)]
)
def test_bad_input_raises_an_error_that_names_it(row, entry):
    with pytest.raises(row.error) as caught:
        solve_row(row, entry)
    error = caught.value
    assert type(error) is row.error
    assert [word for word in row.words if word not in str(error)] == []
    if row.reason is not None:
        assert error.reason is row.reason


def test_names_of_the_rows_are_unique():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)


def test_errors_are_of_the_kinds_that_programs_catch():
    assert issubclass(ArgumentError, ValueError) and issubclass(ArgumentError, AssertionError)
    assert issubclass(ArgumentTypeError, TypeError) and issubclass(ArgumentTypeError, AssertionError)
    assert issubclass(SolveError, RuntimeError) and issubclass(SolveError, AssertionError)
    assert not any(status.ok for status in (FIELD, STATE, STEPS, UNDERFLOW, ERROR))


def errors_of_all_rows():
    """What every row raises, through the native engine where it serves; run under ``python -O`` too."""
    result = {}
    for row in ROWS:
        try:
            solve_row(row, entries_of(row)[0])
            result[row.name] = ["nothing was raised"]
        except Exception as error:
            result[row.name] = [type(error).__name__, str(error)]
    return result


def test_python_O_raises_the_same_errors():
    here = pathlib.Path(__file__)
    run = subprocess.run(
        [sys.executable, "-O", here.name], cwd=here.parent, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    child = json.loads(run.stdout)
    assert child.pop("optimized") is True
    assert child == errors_of_all_rows()


# ---- junk ------------------------------------------------------------------------------------

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a prototype, torch says
    NESTED = torch.nested.nested_tensor([torch.ones(2)], layout=torch.strided)

JUNK = [
    None, True, 0, -1, 7, 2.5, NAN, INF, 1e-300, 1e300, 10**400, 1j, "a", "", b"x", [], [1.0], ["a"], (), (1.0,), ("a",), (None,), {}, {"a": 1}, set(),
    object(), range(3), np.ones(2), np.ones(()), np.array(["a"]), np.float32(3), np.int64(2), fractions.Fraction(1, 3), decimal.Decimal("0.1"),
    torch.tensor(1.0), torch.tensor(NAN), torch.tensor(-1), torch.tensor([]), torch.ones(2), torch.ones(3), torch.ones(2, 2), torch.ones(2, dtype=torch.bool),
    torch.ones(2, dtype=torch.int32), torch.ones(2) * 1j, torch.ones(2).to_sparse(), torch.ones(2, device="meta"), torch.ones(2, requires_grad=True),
    torch.tensor(1.0, requires_grad=True), NESTED, torch.float32, torch.device("cpu"),
]  # fmt: skip


class Reporting:
    """A field with callbacks."""

    def __init__(self, **callbacks):
        self.__dict__.update(callbacks)

    def __call__(self, t, y):
        return -y


def junk_places():
    """For every argument: the name that an error must hold, and the call's arguments with junk in it."""
    both, pair = (
        (("dopri5", EXPLICIT["dopri5"].options), ("rk4", EXPLICIT["rk4"].options)),
        {"func": decay_pair, "y0": (ONES, f64(1))},
    )
    few = {"dopri5": {"max_num_steps": 300}, "rk4": {}}
    for method, options in both:
        for name in ("func", "y0", "t", "rtol", "atol", "method", "options", "engine", "event_fn"):
            yield f"{name}, {method}", name, lambda j, n=name, m=method: {"method": m, n: j}
        for name in ("rtol", "atol"):
            yield (
                f"{name} of a tuple, {method}",
                name,
                lambda j, n=name, m=method: {**pair, "method": m, n: j},
            )
            yield (
                f"{name} of a member, {method}",
                name,
                lambda j, n=name, m=method: {**pair, "method": m, n: (1e-3, j)},
            )
        for name in options:
            yield (
                f"{name}, {method}",
                name,
                lambda j, n=name, m=method: {"method": m, "options": {**few[m], n: j}},
            )
        for name in arguments_module.CALLBACKS:
            yield (
                f"{name}, {method}",
                name,
                lambda j, n=name, m=method: {"method": m, "func": Reporting(**{n: j})},
            )
        yield f"y0 member, {method}", "y0", lambda j, m=method: {**pair, "method": m, "y0": (ONES, j)}
        yield f"slope, {method}", "func", lambda j, m=method: {"method": m, "func": lambda t, y: j}
        yield (
            f"slope of a tuple, {method}",
            "func",
            lambda j, m=method: {**pair, "method": m, "func": lambda t, y: j},
        )
        yield f"slope member, {method}", "func", lambda j, m=method: {**pair, "method": m, "func": lambda t, y: (-y[0], j)}  # fmt: skip
    yield "norm's value", "norm", lambda j: {"options": {"norm": lambda e: j, "max_num_steps": 300}}
    yield (
        "grid",
        "grid_constructor",
        lambda j: {"method": "rk4", "options": {"grid_constructor": lambda f, y, t: j}},
    )
    yield (
        "event's value",
        "event",
        lambda j: {"t": UNIT, "event_fn": lambda t, y: j, "options": {"max_num_steps": 300}},
    )


@pytest.mark.parametrize("name, arguments", [pytest.param(*rest, id=i) for i, *rest in junk_places()])
def test_junk_is_refused_by_name_or_served(name, arguments):
    """Whatever stands in the place of an argument: finite numbers, or an error that names it."""
    wrong = []
    for junk in JUNK:
        given = {"func": decay, "y0": ONES, "t": f64(0, 0.5, 1), **arguments(junk)}
        try:
            result = flashode.odeint(given.pop("func"), given.pop("y0"), given.pop("t"), **given)
            served = (
                [x for x in result if isinstance(x, torch.Tensor)] if isinstance(result, tuple) else [result]
            )
            if not all(x.isfinite().all() for x in served):
                wrong.append((junk, "non-finite numbers"))
        except (ArgumentError, ArgumentTypeError, NotImplementedError, UserWarning) as error:
            if name not in str(error):
                wrong.append((junk, error))
        except SolveError:
            pass
        except Exception as error:
            wrong.append((junk, repr(error)))
    assert wrong == []


# ---- what a SolveError tells ------------------------------------------------------------------


class Counting:
    """A field that counts its calls, and may raise at one of them."""

    def __init__(self, func, raises=None, at=None):
        self.func, self.raises, self.at, self.nfe, self.times = func, raises, at, 0, []

    def __call__(self, t, y):
        self.nfe += 1
        self.times.append(t.item())
        if self.nfe == self.at:
            raise self.raises
        return self.func(t, y)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "rk4", "midpoint"])
def test_solve_error_says_where_it_stopped(method, backward, engine):
    options = None if EXPLICIT[method].adaptive else {"step_size": 0.1}
    t = f64(1, 0) if backward else UNIT
    func = Counting((lambda t, y: late(NAN)(1 - t, y)) if backward else late(NAN))
    with pytest.raises(SolveError) as caught:
        flashode.odeint(func, ONES, t, method=method, options=options, engine=engine)
    error = caught.value
    assert error.reason is Status.NONFINITE_FIELD and error.index == (1,)
    assert error.nfe == func.nfe
    assert abs(error.t - 0.5) < (1e-12 if EXPLICIT[method].adaptive else 0.11)
    assert math.copysign(1, error.dt) == (-1 if backward else 1)
    assert f"t={error.t!r}" in str(error) and f"{error.accepted} steps accepted" in str(error)


def test_solve_without_throwing_marks_rows_that_were_not_reached(engine):
    t = f64(0, 0.25, 0.5, 0.75, 1)
    for method in ("dopri5", "rk4"):
        solution = flashode.solve(late(NAN, 0.6), ONES, t, method=method, engine=engine, throw=False)
        assert solution.status is Status.NONFINITE_FIELD
        torch.testing.assert_close(solution.ys[:3], torch.exp(-t[:3, None]).expand(3, 2), rtol=1e-3, atol=0)
        assert solution.ys[3:].isnan().all()


@pytest.mark.parametrize("method", EXPLICIT)
def test_no_method_returns_non_finite_rows(method, engine):
    """func is NaN at the very end only: interpolants read slopes that the error test never saw."""

    def field(t, y):
        return torch.where(t >= 1, NAN * y, -1e-3 * y)

    options = None if EXPLICIT[method].adaptive else {"step_size": 0.5, "interp": "cubic"}
    try:
        ys = flashode.odeint(field, ONES, f64(0, 0.75, 1), method=method, options=options, engine=engine)
    except SolveError as error:
        assert error.reason is Status.NONFINITE_FIELD and error.index == (0,)
    else:
        torch.testing.assert_close(
            ys, torch.exp(-1e-3 * f64(0, 0.75, 1))[:, None].expand(3, 2), rtol=1e-6, atol=0
        )


def test_noise_in_the_field_ends_in_an_error(engine):
    def field(t, y):
        return torch.nn.functional.dropout(-y)

    with pytest.raises(SolveError, match="max_num_steps exceeded|underflow in dt"):
        flashode.odeint(field, torch.ones(100), UNIT, options=FEW, engine=engine)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("mine"), RuntimeError("mine")], ids=lambda e: type(e).__name__)  # fmt: skip
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_exceptions_of_func_pass_through_and_leave_no_trace(method, error, engine):
    options = None if method == "dopri5" else {"step_size": 0.25}
    expected = flashode.odeint(decay, ONES, UNIT, method=method, options=options, engine=engine)
    for at in (1, 2, 5, 10):
        func = Counting(decay, error, at)
        with pytest.raises(type(error)) as caught:
            flashode.odeint(func, ONES, UNIT, method=method, options=options, engine=engine)
        assert caught.value is error and func.nfe == at
        again = flashode.odeint(func, ONES, UNIT, method=method, options=options, engine=engine)
        assert torch.equal(again, expected)


def test_exceptions_of_func_pass_through_the_backward_solve(engine):
    y0 = f64(1, 1).requires_grad_()
    func = Counting(decay, ZeroDivisionError("mine"))
    ys = flashode.odeint_adjoint(func, y0, UNIT, adjoint_params=(), engine=engine)
    func.at = func.nfe + 3
    with pytest.raises(ZeroDivisionError, match="mine"):
        ys[-1].sum().backward()


# ---- initial states that are accepted ---------------------------------------------------------


def assert_decays(ys, y0, t, tolerance=1e-6):
    expected = y0 * torch.exp(-t.to(torch.float64)).view(-1, *[1] * y0.ndim)
    torch.testing.assert_close(ys, expected.to(ys.dtype), rtol=tolerance, atol=tolerance)


def test_zero_dimensional_state(engine):
    y0 = torch.tensor(2.0, dtype=torch.float64)
    for method in ("dopri5", "rk4"):
        t = torch.linspace(0, 1, 41, dtype=torch.float64)
        ys = flashode.odeint(decay, y0, t, method=method, engine=engine)
        assert ys.shape == (41,)
        assert_decays(ys, y0, t)


@METHOD
def test_strides_of_the_state_change_no_bit(method, engine):
    base = torch.linspace(1, 2, 6, dtype=torch.float64).reshape(2, 3)
    for y0 in (base.T, base[:, ::2], base[:1].expand(4, 3), base[0, 0].expand(2, 2)):
        t = torch.linspace(0, 1, 5, dtype=torch.float64)
        ys = flashode.odeint(decay, y0, t, method=method, engine=engine)
        assert torch.equal(ys, flashode.odeint(decay, y0.contiguous(), t, method=method, engine=engine))
        assert_decays(ys, y0, t, 0.2 if method == "euler" else 1e-3)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_complex_state(method):
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    ys = flashode.odeint(
        lambda t, y: 1j * y, torch.tensor([1 + 0j, 1j], dtype=torch.complex128), t, method=method
    )
    expected = torch.exp(1j * t)[:, None] * torch.tensor([1, 1j])
    torch.testing.assert_close(ys, expected, rtol=1e-6, atol=1e-7)


def test_native_engine_declines_complex_states():
    with pytest.raises(ArgumentError, match="native engine cannot serve this call: .*(complex64|extension)"):
        flashode.odeint(decay, torch.ones(2, dtype=torch.complex64), UNIT, engine="native")


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.complex64), (torch.complex64, torch.float64)], ids=str)  # fmt: skip
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_members_of_a_tuple_keep_their_dtypes(method, dtypes):
    y0 = tuple(torch.full((i + 1,), 1.0 + i, dtype=d, requires_grad=True) for i, d in enumerate(dtypes))
    seen = set()

    def field(t, y):
        seen.add(tuple(member.dtype for member in y))
        return decay_pair(t, y)

    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    ys = flashode.odeint(field, y0, t, method=method)
    assert type(ys) is tuple and seen == {dtypes}
    for member, start, dtype in zip(ys, y0, dtypes):
        assert member.dtype == dtype
        assert_decays(member.detach(), start.detach(), t)
    sum(member[-1].real.sum() for member in ys).backward()
    for start in y0:
        assert start.grad.dtype == start.dtype
        torch.testing.assert_close(start.grad, torch.full_like(start, math.exp(-1)), rtol=1e-6, atol=1e-6)


def test_named_tuples_are_served_as_tuples(engine):
    Pair = collections.namedtuple("Pair", "a b")
    ys = flashode.odeint(decay_pair, Pair(ONES, 2 * ONES), UNIT, engine=engine)
    assert type(ys) is tuple
    assert_decays(ys[1], 2 * ONES, UNIT)


@METHOD
def test_empty_states(method, engine):
    t = f64(0, 0.5, 1)
    assert flashode.odeint(decay, torch.zeros(0), t, method=method, engine=engine).shape == (3, 0)
    assert flashode.odeint(decay, torch.zeros(3, 0, 2), t, method=method, engine=engine).shape == (3, 3, 0, 2)
    empty, full = flashode.odeint(
        decay_pair, (torch.zeros(0), torch.ones(2)), t, method=method, engine=engine
    )
    assert empty.shape == (3, 0)
    assert torch.equal(full, flashode.odeint(decay, torch.ones(2), t, method=method, engine=engine))


def test_editing_the_result_leaves_the_state_alone(engine):
    y0, pair = f64(1, 2), (f64(1, 2), f64(3))
    for t in (UNIT, UNIT[:1]):
        flashode.odeint(decay, y0, t, engine=engine).zero_()
        flashode.odeint_adjoint(decay, y0, t, adjoint_params=(), engine=engine).zero_()
        for member in flashode.odeint(decay_pair, pair, t, engine=engine):
            member.zero_()
    assert torch.equal(y0, f64(1, 2)) and torch.equal(pair[0], f64(1, 2)) and torch.equal(pair[1], f64(3))


@METHOD
def test_inference_mode_changes_no_bit(method, engine):
    expected = flashode.odeint(decay, ONES, UNIT, method=method, engine=engine)
    with torch.inference_mode():
        y0 = f64(1, 1)
        for field in (decay, negate_in_place):
            assert torch.equal(flashode.odeint(field, y0, UNIT, method=method, engine=engine), expected)
    assert torch.equal(flashode.odeint(negate_in_place, y0, UNIT, method=method, engine=engine), expected)
    assert torch.equal(y0, f64(1, 1))


def test_gradients_pass_an_inference_tensor_as_state(engine):
    with torch.inference_mode():
        y0 = f64(1, 1)
    rate = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    for odeint in (flashode.odeint, lambda *a, **k: flashode.odeint_adjoint(*a, adjoint_params=(rate,), **k)):
        ys = odeint(lambda t, y: -rate * y, y0, UNIT, engine=engine)
        (gradient,) = torch.autograd.grad(ys[-1].sum(), rate)
        torch.testing.assert_close(gradient, f64(-2 * math.exp(-1))[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_default_tolerances_are_raised_to_what_16_bits_can_meet(dtype, engine):
    y0 = torch.tensor([1.0, 2.0], dtype=dtype)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    with pytest.warns(
        UserWarning, match=f"{dtype} cannot meet these tolerances: rtol raised to .*, atol to"
    ) as seen:
        ys = flashode.odeint(decay, y0, t, engine=engine)
    assert len(seen) == 1 and ys.dtype == dtype
    error = (ys.double() - y0.double() * torch.exp(-t)[:, None]).abs().max().item()
    assert error < 50 * torch.finfo(dtype).eps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flashode.odeint(decay, y0, t, rtol=0.05, atol=0.05, engine=engine)


# ---- times that are accepted ------------------------------------------------------------------


@METHOD
def test_descending_times(method, engine):
    t = torch.linspace(1, 0, 81, dtype=torch.float64)
    ys = flashode.odeint(decay, ONES, t, method=method, engine=engine)
    assert_decays(ys, ONES, t - 1, 0.03 if method == "euler" else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_times_of_other_precision(dtype, engine):
    t = torch.tensor([0, 0.3, 1], dtype=dtype)
    for method, tolerance in (("dopri5", 1e-6), ("rk4", 1e-2)):
        ys = flashode.odeint(decay, ONES, t, method=method, engine=engine)
        assert ys.dtype == torch.float64
        assert_decays(ys, ONES, t, tolerance)


def test_one_time_returns_the_state(engine):
    for method in ("dopri5", "rk4"):
        assert torch.equal(flashode.odeint(decay, ONES, f64(3), method=method, engine=engine), ONES[None])


def test_ten_thousand_times(engine):
    t = torch.linspace(0, 10, 10_000, dtype=torch.float64)
    assert_decays(flashode.odeint(decay, ONES, t, engine=engine), ONES, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:.*cannot meet these tolerances")
def test_func_gets_time_as_a_scalar_of_the_real_dtype_of_the_state(dtype):
    seen = set()

    def field(t, y):
        seen.add((t.dtype, t.shape, t.requires_grad))
        return -y

    for method in ("dopri5", "rk4"):
        flashode.odeint(field, torch.ones(2, dtype=dtype), UNIT, method=method)
    assert seen == {(dtype.to_real(), torch.Size(()), False)}


@pytest.mark.parametrize("interface", ["direct", "adjoint"])
def test_gradients_of_the_times(interface, engine):
    """y(t1) = exp(t0 - t1): the derivatives are y and -y."""
    t = f64(0.25, 1).requires_grad_()
    arguments = {"adjoint_params": ()} if interface == "adjoint" else {}
    odeint = flashode.odeint_adjoint if interface == "adjoint" else flashode.odeint
    ys = odeint(decay, f64(1), t, engine=engine, **arguments)
    ys[-1].sum().backward()
    y1 = math.exp(-0.75)
    torch.testing.assert_close(t.grad, f64(y1, -y1), rtol=1e-6, atol=0)


# ---- right-hand sides that are accepted -------------------------------------------------------


def negate_in_place(t, y):
    return y.neg_()


def add_to_time(t, y):
    rate = t.item() + 1
    t.add_(17)
    return -y * rate


def with_buffer(kind):
    """A field that returns the same memory at every call."""
    memory = np.empty(2) if kind == "array" else torch.empty(4, dtype=torch.float64)

    def field(t, y):
        if kind == "array":
            np.negative(y.detach().numpy(), out=memory)
            return torch.from_numpy(memory)
        place = memory[:2] if kind == "view" else memory[::2] if kind == "strided view" else memory
        return (
            torch.neg(y.detach(), out=place)
            if kind != "tensor"
            else place.resize_(2).copy_(y.detach()).neg_()
        )

    return field


def kept():
    """A field that keeps every tensor that it is shown or returns."""
    memory = []

    def field(t, y):
        memory.append((t, y, -y))
        assert all(torch.equal(-old, slope) for _, old, slope in memory), (
            "a tensor that func kept was overwritten"
        )
        return memory[-1][-1]

    return field


ODD = {
    "writes into y": lambda: negate_in_place,
    "returns a buffer": lambda: with_buffer("tensor"),
    "returns a view of a buffer": lambda: with_buffer("view"),
    "returns a strided view of a buffer": lambda: with_buffer("strided view"),
    "returns an array's memory": lambda: with_buffer("array"),
    "keeps what it sees": kept,
    "returns a parameter's copy": lambda: lambda t, y: torch.nn.Parameter(-y).detach(),
    "returns a lazily negated tensor": lambda: lambda t, y: torch._neg_view(y),
    "returns a non-contiguous tensor": lambda: lambda t, y: torch.stack([-y, y], -1)[:, 0],
}


@METHOD
@pytest.mark.parametrize("odd", ODD)
def test_odd_fields_give_the_same_bits_as_the_clean_one(odd, method, engine):
    options = None if EXPLICIT[method].adaptive else {"step_size": 0.125}
    y0, t = f64(1, 2), f64(0, 0.3, 1)
    expected = flashode.odeint(decay, y0, t, method=method, options=options, engine=engine)
    assert torch.equal(
        flashode.odeint(ODD[odd](), y0, t, method=method, options=options, engine=engine), expected
    )
    assert torch.equal(y0, f64(1, 2)) and torch.equal(t, f64(0, 0.3, 1))


@METHOD
def test_func_may_return_its_own_input(method, engine):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    expected = flashode.odeint(lambda t, y: y.clone(), ONES, t, method=method, engine=engine)
    ys = flashode.odeint(lambda t, y: y, ONES, t, method=method, engine=engine)
    assert torch.equal(ys, expected)
    assert_decays(ys, ONES, -t, 0.01 if method == "euler" else 1e-6)
    y0 = f64(1, 1).requires_grad_()
    flashode.odeint(lambda t, y: y, y0, t, method=method, engine=engine)[-1].sum().backward()
    torch.testing.assert_close(y0.grad, ys[-1], rtol=1e-9, atol=0)


@METHOD
def test_func_may_write_into_the_members_of_a_tuple(method, engine):
    def field(t, y):
        return tuple(member.neg_() for member in y)

    y0 = (f64(1, 2), f64(3))
    expected = flashode.odeint(decay_pair, y0, UNIT, method=method, engine=engine)
    for member, clean in zip(flashode.odeint(field, y0, UNIT, method=method, engine=engine), expected):
        assert torch.equal(member, clean)
    assert torch.equal(y0[0], f64(1, 2)) and torch.equal(y0[1], f64(3))


@METHOD
def test_func_may_write_into_the_time(method, engine):
    t = f64(0, 0.3, 1)
    expected = flashode.odeint(lambda t, y: -y * (t.item() + 1), ONES, t, method=method, engine=engine)
    assert torch.equal(flashode.odeint(add_to_time, ONES, t, method=method, engine=engine), expected)
    assert torch.equal(t, f64(0, 0.3, 1))


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_func_that_writes_into_y_has_right_gradients(method, engine):
    gradients = []
    for field in (negate_in_place, decay):
        y0 = f64(1, 2).requires_grad_()
        flashode.odeint(field, y0, UNIT, method=method, engine=engine)[-1].square().sum().backward()
        gradients.append(y0.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "euler"])
def test_func_that_begins_to_write_late_is_served_or_refused(method, engine):
    def field(t, y):
        return y.neg_() if t > 0.5 else -y

    options = None if method == "dopri5" else {"step_size": 0.125}
    y0 = f64(1, 2)
    expected = flashode.odeint(decay, y0, UNIT, method=method, options=options, engine=engine)
    try:
        ys = flashode.odeint(field, y0, UNIT, method=method, options=options, engine=engine)
    except ArgumentError as error:
        assert engine == "native" and "func changed its argument y in place" in str(error)
    else:
        assert torch.equal(ys, expected)
    assert torch.equal(y0, f64(1, 2))


@METHOD
def test_slopes_of_another_precision_are_cast(method, engine):
    y0, arguments = torch.tensor([1.0, 2.0]), {"method": method, "engine": engine, "rtol": 1e-3, "atol": 1e-3}
    for dtype in (torch.float64, torch.bfloat16):
        clean = flashode.odeint(lambda t, y: -y.to(dtype).float(), y0, UNIT, **arguments)
        ys = flashode.odeint(lambda t, y: -y.to(dtype), y0, UNIT, **arguments)
        assert ys.dtype == torch.float32 and torch.equal(ys, clean)
    ys = flashode.odeint(lambda t, y: torch.ones(2, dtype=torch.int64), y0, UNIT, **arguments)
    torch.testing.assert_close(ys[-1], y0 + 1)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_a_detached_field_has_gradient_one(method, engine):
    y0 = f64(1, 2).requires_grad_()
    flashode.odeint(lambda t, y: -y.detach(), y0, UNIT, method=method, engine=engine)[-1].sum().backward()
    assert torch.equal(y0.grad, f64(1, 1))


def test_batch_norm_in_training_is_accepted(engine):
    layer = torch.nn.BatchNorm1d(2).double()
    ys = flashode.odeint(
        lambda t, y: layer(y), torch.randn(8, 2, dtype=torch.float64), UNIT, rtol=1e-3, engine=engine
    )
    assert ys.isfinite().all() and layer.num_batches_tracked > 2


@pytest.mark.parametrize("inner", ["direct", "adjoint"])
def test_nested_solves(inner, engine):
    """The field solves z' = -z over a unit of time: y' = -y / e."""
    arguments = {"adjoint_params": ()} if inner == "adjoint" else {}
    odeint = flashode.odeint_adjoint if inner == "adjoint" else flashode.odeint
    y0, rate = f64(1).requires_grad_(), math.exp(-1)
    arguments |= {"engine": engine, "rtol": 1e-6, "atol": 1e-8}
    ys = flashode.odeint(lambda t, y: -odeint(decay, y, UNIT, **arguments)[-1], y0, UNIT, engine=engine)
    ys[-1].sum().backward()
    torch.testing.assert_close(
        torch.stack([ys[-1, 0], y0.grad[0]]), f64(*[math.exp(-rate)] * 2), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_domain_that_ends_with_the_interval(method, dtype, engine):
    """y' = sqrt(1 - t) from 0 to 1 is 2/3; beyond 1 it is NaN."""
    y0, tolerance = torch.zeros(1, dtype=dtype), 1e-4 if EXPLICIT[method].order < 4 else 1e-6

    def field(t, y):
        return torch.sqrt(1 - t).expand(1)

    ys = flashode.odeint(field, y0, UNIT, method=method, rtol=tolerance, atol=tolerance, engine=engine)
    # The error estimate of fehlberg2 is weak.
    assert abs(ys[-1].item() - 2 / 3) < (100 if method == "fehlberg2" else 30) * tolerance


@pytest.mark.parametrize("method", EXPLICIT)
def test_func_is_never_called_outside_the_interval(method, engine):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        # 0.1 and 0.7 have no exact float32: rounding alone must not leave the interval.
        for ends in ((0.1, 0.7), (0.7, 0.1), (-0.3, 0.9), (1000.1, 1000.7), (-3.3, -9.7)):
            if dtype == torch.bfloat16 and abs(ends[0]) > 100:
                continue  # no bfloat16 lies between them
            t = torch.linspace(*ends, 4, dtype=torch.float64)
            adaptive = EXPLICIT[method].adaptive
            variants = [{}] if adaptive else [{}, {"step_size": 0.17, "interp": "cubic"}, {"perturb": True}]
            for options in variants:
                func = Counting(lambda t, y: torch.cos(3 * t) * y)
                y0 = torch.ones(2, dtype=dtype)
                flashode.odeint(
                    func, y0, t, method=method, rtol=0.1, atol=0.1, options=options, engine=engine
                )
                low, high = min(ends), max(ends)
                assert [x for x in func.times if not low <= x <= high] == []
                assert len(func.times) >= len(t) - 1 or adaptive


def test_the_probe_of_the_first_step_stays_inside_the_interval(engine):
    """Its state belongs to its time, however short the interval."""
    seen = []

    def field(t, y):
        seen.append((t.item(), y.tolist()))
        return -y

    flashode.odeint(field, ONES, f64(0, 1e-5), options={"max_num_steps": 10}, engine=engine)
    assert seen[1] == (1e-5, [1 - 1e-5, 1 - 1e-5])


def test_a_spike_between_steps_is_found_with_max_step(engine):
    """Known limit of any step-size control: a step over a spike does not see it."""

    def spike(t, y):
        return 100 / math.sqrt(math.pi) * torch.exp(-((100 * (t - 5.3)) ** 2)).expand(1)

    t = f64(0, 10)
    found = flashode.odeint(spike, f64(0), t, options={"max_step": 0.02}, engine=engine)
    torch.testing.assert_close(found[-1], f64(1), rtol=1e-6, atol=0)


def test_callbacks_cannot_change_the_solve(engine):
    class Field(torch.nn.Module):
        def forward(self, t, y):
            return -y

        def callback_step(self, t0, y0, dt):
            y0.zero_(), t0.zero_(), dt.zero_()

        callback_accept_step = callback_step

    y0 = f64(1, 1)
    expected = flashode.odeint(decay, y0, UNIT, engine=engine)
    assert torch.equal(flashode.odeint(Field(), y0, UNIT, engine=engine), expected)
    assert torch.equal(y0, f64(1, 1))


# ---- tolerances that are accepted -------------------------------------------------------------


@pytest.mark.parametrize(
    "tolerances",
    [
        {"rtol": 0},
        {"atol": 0},
        {"rtol": 1e-20},
        {"rtol": 1e-14, "atol": 0},
        {"rtol": np.float64(1e-7), "atol": np.float32(1e-8)},
        {"rtol": torch.tensor(1e-7), "atol": torch.tensor([1e-9], dtype=torch.float64)},
        {"rtol": f64(1e-7, 1e-6), "atol": f64(0, 1e-9)},
        {"rtol": torch.tensor([[1e-7], [1e-8]])},
    ],
    ids=lambda t: str(t).replace("\n", ""),
)
def test_tolerances_that_are_accepted(tolerances, engine):
    y0 = torch.ones(2, 2, dtype=torch.float64)
    assert_decays(flashode.odeint(decay, y0, UNIT, engine=engine, **tolerances), y0, UNIT, 1e-5)


def test_rtol_that_asks_for_nothing_is_warned_of(engine):
    with pytest.warns(UserWarning, match="rtol is 10000000000.0"):
        flashode.odeint(decay, ONES, UNIT, rtol=1e10, engine=engine)


@pytest.mark.parametrize("odeint", ["direct", "adjoint"])
def test_tolerances_per_member(odeint, engine):
    """The member with the loose tolerance may be wrong; the other must not be."""
    y0 = (f64(1, 1).requires_grad_(), f64(1).requires_grad_())
    arguments = {"rtol": (1e-9, 1e-6), "atol": (1e-11, torch.tensor(1e-8)), "engine": engine}
    if odeint == "direct":
        ys = flashode.odeint(decay_pair, y0, UNIT, **arguments)
    else:
        ys = flashode.odeint_adjoint(decay_pair, y0, UNIT, adjoint_params=(), **arguments)
    (ys[0][-1].sum() + ys[1][-1].sum()).backward()
    for member, tolerance in zip(y0, (1e-8, 1e-5)):
        torch.testing.assert_close(member.grad, torch.full_like(member, math.exp(-1)), rtol=tolerance, atol=0)


@pytest.mark.parametrize("tolerance", [1e10, 0, -1, None, "tight"])
def test_fixed_step_methods_ignore_tolerances(tolerance, engine):
    expected = flashode.odeint(decay, ONES, UNIT, method="rk4", engine=engine)
    ys = flashode.odeint(decay, ONES, UNIT, method="rk4", rtol=tolerance, atol=tolerance, engine=engine)
    assert torch.equal(ys, expected)


# ---- options that are accepted ----------------------------------------------------------------


@pytest.mark.parametrize("method, name, value, hint", [("rk4", "step_sise", 0.1, 'Did you mean "step_size"'), ("dopri5", "max_num_step", 10, 'Did you mean "max_num_steps"'),
                                                       ("dopri5", "step_size", 0.1, "Allowed options: .*first_step"), ("rk4", "jump_t", None, "Allowed options: .*step_size")])  # fmt: skip
def test_unknown_options_are_warned_of(method, name, value, hint, engine):
    with pytest.warns(UserWarning, match=f"{method}: Unexpected arguments .*'{name}': {value}.*{hint}"):
        ys = flashode.odeint(decay, ONES, UNIT, method=method, options={name: value}, engine=engine)
    assert torch.equal(ys, flashode.odeint(decay, ONES, UNIT, method=method, engine=engine))


def test_nothing_that_is_passed_is_changed(engine):
    def norm(error):
        return error.abs().max()

    for method, options in (("dopri5", {"first_step": torch.tensor(0.1), "jump_t": f64(0.5), "norm": norm, "max_num_steps": 50}),
                            ("rk4", {"step_size": torch.tensor(0.1), "interp": "cubic"})):  # fmt: skip
        rtol, atol, y0, t = f64(1e-6, 1e-7), f64(1e-8, 1e-9), f64(1, 2), f64(0, 1)
        before = copy.deepcopy((options, rtol, atol, y0, t))
        flashode.odeint(decay, y0, t, rtol=rtol, atol=atol, method=method, options=options, engine=engine)
        flashode.odeint_adjoint(decay, y0, t, rtol=rtol, atol=atol, method=method, options=options, adjoint_params=(), engine=engine)  # fmt: skip
        assert options.keys() == before[0].keys() and all(options[k] == before[0][k] for k in options)
        assert all(torch.equal(*pair) for pair in zip((rtol, atol, y0, t), before[1:]))


@pytest.mark.parametrize(
    "options",
    [
        {"first_step": 1e-3},
        {"first_step": np.float32(0.1), "safety": 1, "ifactor": 1.5, "dfactor": 0.5},
        {"first_step": 1e9},
        {"max_step": torch.tensor(0.1), "min_step": 1e-9},
        {"max_num_steps": 2**40},
        {"max_num_steps": INF},
        {"max_num_steps": 1e3},
        {"dtype": torch.float32},
        {"step_t": [0.25, 0.5], "jump_t": (0.75, -3, 9)},
        {"norm": lambda e: e.abs().max().item()},
        {"norm": lambda e: np.float64(e.abs().max())},
        {"norm": lambda e: e.abs().max().reshape(1, 1)},
        {"norm": lambda e: 0},
    ],
    ids=lambda o: "norm" if "norm" in o else str(o).replace("\n", ""),
)
def test_options_that_are_accepted(options, engine):
    for t in (UNIT, UNIT.flip(0)):
        ys = flashode.odeint(decay, ONES, t, options=options, engine=engine)
        assert_decays(ys, ONES, t - t[0], 0.2 if "norm" in options and options["norm"](ONES) == 0 else 1e-6)


def test_steps_of_the_least_length_are_taken_whatever_their_error(engine):
    """The last of them, too: 0.7 + 0.3 lands on 1, and 1 - 0.7 is longer than 0.3 by rounding."""
    options = {"min_step": 0.3, "first_step": 0.3, "max_num_steps": 5}
    solution = flashode.solve(stiff, ONES, f64(0.7, 1), options=options, engine=engine)
    assert solution.stats.accepted == 1 and solution.stats.rejected == 0


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("jumps", [[0.5], [0, 0.5], [0.5, 1], [0.25, 0.5], [-1, 0.5, 2]], ids=str)
def test_jumps_at_ends_and_outputs(jumps, backward, engine):
    """y' = sign(t - 1/2): |t - 1/2| + 1/2."""
    t = f64(0, 0.25, 0.5, 1)
    t = t.flip(0) if backward else t
    ys = flashode.odeint(lambda t, y: torch.sign(t - 0.5).expand(1), f64(1), t, options={"jump_t": f64(*jumps)}, engine=engine)  # fmt: skip
    torch.testing.assert_close(ys[:, 0], (t - 0.5).abs() + 0.5, rtol=0, atol=1e-12)


def test_max_num_steps_counts_between_outputs(engine):
    """parity: the count starts again at every output."""
    t = torch.linspace(0, 20, 11, dtype=torch.float64)
    steps = flashode.solve(decay, ONES, t, engine=engine).stats
    assert steps.accepted > 20
    flashode.odeint(decay, ONES, t, options={"max_num_steps": 20}, engine=engine)
    with pytest.raises(SolveError, match="max_num_steps exceeded \\(20>=20\\)"):
        flashode.odeint(decay, ONES, t[[0, -1]], options={"max_num_steps": 20}, engine=engine)


# ---- events -----------------------------------------------------------------------------------

EVENT = pytest.mark.parametrize("method, options", [("dopri5", None), ("rk4", {"step_size": 0.01})], ids=["dopri5", "rk4"])  # fmt: skip


@EVENT
@pytest.mark.parametrize("kind", ["number", "vector", "switch on", "switch off"])
def test_events(kind, method, options):
    """exp(-t) = 1/2 at log 2, whether the event is a number, one of several, or a switch."""
    event_fn = {
        "number": half_way,
        "vector": lambda t, y: torch.stack([y[0] - 0.5, y[0] + 1]),
        "switch on": lambda t, y: y[0] < 0.5,
        "switch off": lambda t, y: y[0] > 0.5,
    }[kind]
    event_t, ys = flashode.odeint(decay, ONES, UNIT, event_fn=event_fn, method=method, options=options)
    tolerance = 1e-6 if method == "dopri5" else 1e-4
    assert abs(event_t.item() - math.log(2)) < tolerance and ys.shape == (2, 2)
    assert abs(ys[-1, 0].item() - 0.5) < tolerance


@EVENT
def test_an_event_that_is_zero_at_the_start_has_fired(method, options):
    event_t, ys = flashode.odeint(
        decay, ONES, UNIT, event_fn=lambda t, y: y[0] - 1, method=method, options=options
    )
    assert event_t.item() == 0 and torch.equal(ys, torch.stack([ONES, ONES]))


@EVENT
def test_exceptions_of_the_event_pass_through(method, options):
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt) as caught:
        flashode.odeint(
            decay, ONES, UNIT, event_fn=Counting(half_way, error, 3), method=method, options=options
        )
    assert caught.value is error


if __name__ == "__main__":  # the child of test_python_O_raises_the_same_errors
    warnings.simplefilter("ignore")
    json.dump({"optimized": not __debug__, **errors_of_all_rows()}, sys.stdout)


@pytest.mark.parametrize("name", ["jump_t", "step_t"])
@pytest.mark.parametrize("solve", ["odeint", "odeint_adjoint"])
def test_times_to_land_on_that_all_lie_outside_the_solve_draw_a_sentence(name, solve, engine):
    """One of them inside is enough, the ends count, and no interval of a backward pass repeats it."""
    t, w = f64(1, 0.5, 0), torch.ones(2, dtype=torch.float64, requires_grad=True)
    extra = {"adjoint_params": w, "adjoint_options": {"restart": True}} if solve == "odeint_adjoint" else {}

    def solved(times):
        return getattr(flashode, solve)(
            lambda t, y: -w * y, ONES, t, options={name: f64(*times)}, engine=engine, **extra
        )

    with pytest.warns(
        UserWarning, match=rf"options\['{name}'\]: none of its 2 times lies between t\[0\] = 1.0"
    ):
        expected = solved([3, -2])
    torch.testing.assert_close(solved([0, 9]), expected, rtol=0, atol=0)
    solved([0.7, 9])[-1].sum().backward()

"""Every method that torchdiffeq has, by dtype, direction, kind of state and option: its values, and its calls."""

import math
import warnings

import pytest
import torch
from problems import Counted

import flashode
from flashode.methods import METHODS

torchdiffeq = pytest.importorskip("torchdiffeq", reason="the comparison needs torchdiffeq")
from torchdiffeq._impl.odeint import SOLVERS  # noqa: E402

SHARED = [name for name in SOLVERS if name in METHODS]
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
TOL = dict(rtol=1e-5, atol=1e-7)
SINGLE = (torch.float32, torch.complex64)


def grid_of_seven(func, y0, t):
    return torch.linspace(t[0].item(), t[-1].item(), 7, dtype=t.dtype)


ADAPTIVE = [
    {},
    {"first_step": 0.01},
    {"safety": 0.7, "ifactor": 3.0, "dfactor": 0.5},
    {"max_step": 0.2},
    {"min_step": 0.05},
    {"max_num_steps": 5000},
    {"dtype": torch.float64},
    {"step_t": torch.tensor([0.3, 0.9], dtype=torch.float64)},
    {"jump_t": torch.tensor([0.5], dtype=torch.float64)},
]
FIXED = [
    {},
    {"step_size": 0.07},
    {"step_size": 0.05, "interp": "cubic"},
    {"grid_constructor": grid_of_seven},
    {"step_size": 0.1, "perturb": True},
]
OPTIONS = {
    "explicit": lambda m: ADAPTIVE if m.adaptive else FIXED,
    # The explicit formula of order 11 is hardly stable, and rounding grows; and on grids that are not uniform,
    # theirs has the weights of uniform ones.
    "adams": lambda m: [
        *({"max_order": 6, "max_iters": 30, **options} for options in FIXED[2:]),
        {"step_size": 0.02, "max_order": 5},
        {"step_size": 0.02, "max_order": 7, "max_iters": 10},
    ],
    "scipy": lambda m: [{"solver": s} for s in ("LSODA", "RK45", "BDF")],
}
OF_THE_NORM = {
    "tensor": lambda y: y.abs().max(),
    "tuple": lambda y: max(member.abs().max() for member in y),
}


def slope(t, y):
    factor = complex(-0.3, 1.0) if y.is_complex() else -0.3
    return factor * y * torch.cos(t) + 0.2 * y.flip(0) * torch.sin(3 * t)


def field_of(kind):
    return slope if kind == "tensor" else lambda t, state: tuple(slope(t, y) for y in state)


def start(kind, dtype):
    generator = torch.Generator().manual_seed(3)
    y = [torch.rand(shape, dtype=torch.complex128, generator=generator) + 0.5 for shape in ((3,), (2, 2))]
    y = [m.to(dtype) if dtype.is_complex else m.real.to(dtype) for m in y]
    return y[0] if kind == "tensor" else tuple(y)


def flat(y):
    return torch.cat([m.reshape(len(m), -1) for m in (y if isinstance(y, tuple) else (y,))], 1)


def solved(library, kind, dtype, t, **arguments):
    """Values, times at which the field was called, and what was said."""
    field = Counted(field_of(kind))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with torch.no_grad():
            y = library.odeint(field, start(kind, dtype), t, **TOL, **arguments)
    return flat(y), field.times, [str(w.message) for w in said]


@pytest.mark.parametrize("kind", ["tensor", "tuple"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", SHARED)
def test_same_values_with_every_option(name, dtype, backward, kind):
    method = METHODS[name]
    if method.family == "scipy" and dtype.is_complex:
        pytest.skip("torchdiffeq's wrapper hands complex states to solvers that refuse them")
    t = torch.linspace(0, 1.2, 5, dtype=dtype.to_real())
    t = t.flip(0) if backward else t
    if method.family == "scipy" and backward:
        pytest.skip("torchdiffeq's wrapper fails with descending times")
    tried = [dict(options) for options in OPTIONS[method.family](method)]
    if method.adaptive and method.family == "explicit":
        tried.append({"norm": OF_THE_NORM[kind]})
    for options in tried:
        theirs, their_times, _ = solved(torchdiffeq, kind, dtype, t, method=name, options=dict(options))
        ours, our_times, _ = solved(flashode, kind, dtype, t, method=name, options=dict(options))
        close = 2e-5 if dtype in SINGLE else 1e-12
        if method.adaptive:
            # Steps that end elsewhere differ by the tolerance; interpolants but dopri5's by their order.
            close = 1e-4 if name == "dopri5" else 2e-3
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close, msg=lambda m: f"{options}\n{m}")


@pytest.mark.parametrize("kind", ["tensor", "tuple"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", [n for n in SHARED if METHODS[n].family in ("explicit", "adams")])
def test_same_calls_in_double_precision(name, backward, kind):
    """Adaptive methods with ``overshoot``; without it never more, if no output lies inside a step."""
    method = METHODS[name]
    t = torch.tensor([0.0, 1.2], dtype=torch.float64)
    t = t.flip(0) if backward else t
    for options in OPTIONS[method.family](method):
        theirs, their_times, _ = solved(
            torchdiffeq, kind, torch.float64, t, method=name, options=dict(options)
        )
        _, landed, _ = solved(flashode, kind, torch.float64, t, method=name, options=dict(options))
        exactly = dict(options, overshoot=True) if method.adaptive else dict(options)
        ours, our_times, _ = solved(flashode, kind, torch.float64, t, method=name, options=exactly)
        if name in ("implicit_adams", "fixed_adams") or options.get("interp") == "cubic":
            # They go on where the iteration does not converge, and interpolate at the ends of steps too.
            assert len(our_times) <= len(their_times), options
            continue
        assert len(our_times) == len(their_times), options
        assert len(landed) <= len(their_times), options
        # dopri8's error estimate is a small difference: here it is rounding, and step sizes follow it.
        assert our_times == pytest.approx(their_times, abs=1e-5 if name == "dopri8" else 1e-9), options
        if name == "dopri5" or not method.adaptive:
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12, msg=lambda m: f"{options}\n{m}")


@pytest.mark.parametrize("name", SHARED)
def test_unknown_options_are_warned_of_as_there(name):
    t = torch.tensor([0.0, 0.1], dtype=torch.float64)
    for library in (torchdiffeq, flashode):
        *_, said = solved(library, "tensor", torch.float64, t, method=name, options={"max_steps": 3})
        assert any("Unexpected arguments" in s and "max_steps" in s for s in said), library
    if METHODS[name].adaptive and METHODS[name].family == "explicit":
        assert any('Did you mean "max_num_steps"' in s or 'Did you mean "max_step"' in s for s in said)


def test_every_method_of_torchdiffeq_is_there():
    assert set(SOLVERS) <= set(METHODS), sorted(set(SOLVERS) - set(METHODS))


def test_values_are_right_and_not_only_alike():
    """The exact solution where the coupling vanishes."""
    y = flashode.odeint(
        lambda t, y: 1j * y * torch.cos(t),
        torch.ones(1, dtype=torch.complex128), torch.tensor([0.0, 1.2], dtype=torch.float64),
        rtol=1e-10, atol=1e-10,
    )  # fmt: skip
    assert abs(y[-1].item() - complex(math.cos(math.sin(1.2)), math.sin(math.sin(1.2)))) < 1e-9

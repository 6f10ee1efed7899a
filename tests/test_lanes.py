"""Numbers of many samples side by side: exact where arithmetic is, within stated bounds elsewhere, as torch at the edges."""

import ctypes
import math
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from flashode import control

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++")
FLAGS = [
    "-std=c++17",
    "-O2",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
]
REALS = {"float": np.float32, "double": np.float64}
LANES = [1, 4, 8, 16, 32]
INF, NAN = math.inf, math.nan

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to build programs with")
by_real = pytest.mark.parametrize("real", REALS)


# ---- building and calling ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """The functions of csrc/compiled on arrays, of float and of double."""
    folder = tmp_path_factory.mktemp("lanes")
    native = ["-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"]
    builds = [
        subprocess.Popen(
            [COMPILER, *FLAGS, *native, f"-DREAL={real}", f"-I{ROOT / 'csrc'}", ROOT / "tests/lanes.cpp",
             "-o", folder / f"{real}.so"],
            stderr=subprocess.PIPE, text=True,
        )
        for real in REALS
    ]  # fmt: skip
    messages = [build.communicate()[1] for build in builds]
    assert not any(build.returncode for build in builds), "\n".join(messages)
    return {real: ctypes.CDLL(str(folder / f"{real}.so")) for real in REALS}


@pytest.fixture
def of(libraries, real):
    """``of(name, lanes, x, y)``: a function of every number, so many at a time."""

    def call(name, lanes, x, y=None):
        x = np.asarray(x, REALS[real])
        n = -(-len(x) // 32) * 32
        padded = [np.resize(np.asarray(v, REALS[real]), n) for v in (x, x if y is None else y)]
        out = np.empty_like(padded[0])
        getattr(libraries[real], f"of_{name}")(lanes, *map(pointer, (*padded, out)), ctypes.c_int64(n))
        return out[: len(x)]

    return call


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def aligned(shape, dtype):
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def ulps(got, exact):
    """How many units of its last place a number is off; ``exact`` has more digits."""
    unit = np.spacing(np.abs(exact).astype(got.dtype)).astype(exact.dtype)
    return np.max(np.abs(got.astype(exact.dtype) - exact) / unit)


# ---- elementary functions ----------------------------------------------------------------------

# Where a function is looked at, and how far off it may be. The references of numpy are in extended
# precision where the machine has it, those of torch (erf) are a unit off themselves.
FUNCTIONS = {
    "exp": (np.exp, [(-86, 88), (-1, 1)], 1.5),
    "expm1": (np.expm1, [(-20, 88), (-1, 1), (-1e-4, 1e-4)], 2.5),
    "log": (np.log, [(1e-3, 4), (0.9, 1.1), (1e-37, 1e37)], 1.5),
    "log1p": (np.log1p, [(-0.99, 3), (-0.3, 0.3), (-1e-4, 1e-4), (0, 1e6)], 1.5),
    "tanh": (np.tanh, [(-12, 12), (-1, 1), (-1e-4, 1e-4)], 2.75),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), [(-40, 40), (-3, 3)], 2.75),
    "softplus": (lambda x: np.where(x > 20, x, np.log1p(np.exp(x))), [(-30, 25), (-2, 2)], 2.5),
    "sin": (np.sin, [(-7, 7), (-1e5, 1e5), (-1e-3, 1e-3)], 2.5),
    "cos": (np.cos, [(-7, 7), (-1e5, 1e5), (-1e-3, 1e-3)], 2.5),
    "atan": (np.arctan, [(-3, 3), (-1e3, 1e3), (0.9, 1.1)], 2.5),
    "erf": (lambda x: torch.erf(torch.from_numpy(x.astype(float))).numpy(), [(-5, 5), (-1, 1)], 2.5),
}
LANE_BY_LANE = {
    "tan": (np.tan, -7, 7), "sinh": (np.sinh, -9, 9), "cosh": (np.cosh, -9, 9), "asin": (np.arcsin, -1, 1),
    "acos": (np.arccos, -1, 1), "asinh": (np.arcsinh, -9, 9), "acosh": (np.arccosh, 1, 9),
    "atanh": (np.arctanh, -1, 1), "erfc": (lambda x: torch.erfc(torch.from_numpy(x.astype(float))).numpy(), -3, 3),
}  # fmt: skip


def wider(x):
    return x.astype(np.float64 if x.dtype == np.float32 else np.longdouble)


@by_real
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_within_their_bounds(of, real, name):
    reference, ranges, bound = FUNCTIONS[name]
    draw = np.random.default_rng(0).uniform
    x = np.concatenate([draw(low, high, 20000) for low, high in ranges]).astype(REALS[real])
    exact = reference(wider(x))
    results = [of(name, lanes, x) for lanes in LANES]
    for got in results:
        assert ulps(got, exact) <= bound
    for got in results[2:]:  # the number of lanes makes no difference
        np.testing.assert_array_equal(got, results[1])


@by_real
@pytest.mark.parametrize("name", LANE_BY_LANE)
def test_rarer_functions_are_those_of_the_c_library(of, real, name):
    reference, low, high = LANE_BY_LANE[name]
    x = np.random.default_rng(0).uniform(low, high, 2000).astype(REALS[real])
    assert ulps(of(name, 16, x), reference(wider(x))) <= (2 if name != "erfc" else 6)
    np.testing.assert_array_equal(of(name, 16, x), of(name, 1, x))


@by_real
@pytest.mark.parametrize(
    "base, exponent", [((0.01, 10), (-3, 3)), ((0.9, 1.1), (-700, 700)), ((1e-30, 1e30), (0.2, 0.2))]
)
def test_powers_are_within_their_bound(of, real, base, exponent):
    draw = np.random.default_rng(0).uniform
    x, y = draw(*base, 20000).astype(REALS[real]), draw(*exponent, 20000).astype(REALS[real])
    exact = np.power(wider(x), wider(y))
    keep = (exact < np.finfo(x.dtype).max) & (exact > np.finfo(x.dtype).tiny)
    for lanes in LANES:
        assert ulps(of("pow", lanes, x, y)[keep], exact[keep]) <= 2


def edges(dtype):
    info = np.finfo(dtype)
    x = [0.0, info.smallest_subnormal, 37 * info.smallest_subnormal, info.tiny, info.eps, 1e-3, 0.5, 1, 2, 3, 20, 20.5,
         103, 104.5, 745.5, 1e5, 3e5, 1e8, 1e30, 2**24 + 2, info.max, INF]  # fmt: skip
    return np.array([*x, *(-v for v in x), NAN], dtype)


def same_as(got, expected, bound=4, eps=0.0):
    """As near as that, and alike in what is not finite, and in the signs of zeros."""
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    sure = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(got[sure]), np.signbit(expected[sure]))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(expected))
    finite = np.isfinite(expected)
    error = np.abs(wider(got[finite]) - wider(expected[finite]))
    assert np.all(
        error <= bound * np.spacing(np.abs(wider(expected[finite]).astype(got.dtype) / 2)) * 2 + eps
    )


@by_real
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_at_the_edges_functions_are_those_of_the_c_library(of, real, name, lanes):
    x = edges(REALS[real])
    with np.errstate(all="ignore"):
        expected = FUNCTIONS[name][0](wider(x)).astype(x.dtype)
    # exp(-x) overflows before a sigmoid is as small as a number can be, and torch's does.
    same_as(of(name, lanes, x), expected, eps=np.finfo(x.dtype).tiny if name == "sigmoid" else 0)


@by_real
@pytest.mark.parametrize("lanes", LANES)
def test_at_the_edges_powers_are_those_of_the_c_library(of, real, lanes):
    x = np.concatenate([edges(REALS[real]), np.array([-1.5, -2, 1 / 3], REALS[real])])
    x, y = (v.ravel() for v in np.meshgrid(x, x))
    with np.errstate(all="ignore"):
        expected = np.power(wider(x), wider(y)).astype(x.dtype)
        same_as(of("pow", lanes, x, y), expected)


# ---- arithmetic --------------------------------------------------------------------------------


def correct_root(x):  # torch's may be a unit off
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.sqrt(x.numpy()))


EXACT = {
    "floor": torch.floor, "ceil": torch.ceil, "trunc": torch.trunc, "round_even": torch.round, "square_root": correct_root,
    "sign": torch.sign, "magnitude": torch.abs, "nan": torch.isnan, "finite": torch.isfinite,
}  # fmt: skip
EXACT_OF_TWO = {
    "maximum": torch.maximum, "minimum": torch.minimum, "less": torch.lt, "at_most": torch.le, "equal": torch.eq,
    "unequal": torch.ne,
    "neither": lambda a, b: (a == a) & ~((a < b) | (a > b)),
}  # fmt: skip


@by_real
@pytest.mark.parametrize("lanes", LANES)
def test_what_is_exact_is_what_torch_gives(of, real, lanes):
    x = np.concatenate([edges(REALS[real]), np.arange(-3, 3, 0.25, REALS[real])])
    for name, function in EXACT.items():
        expected = function(torch.from_numpy(x)).numpy().astype(x.dtype)
        np.testing.assert_array_equal(of(name, lanes, x), expected, err_msg=name)
    a, b = (v.ravel().copy() for v in np.meshgrid(x, x))
    for name, function in EXACT_OF_TWO.items():
        expected = function(torch.from_numpy(a), torch.from_numpy(b)).numpy().astype(x.dtype)
        np.testing.assert_array_equal(of(name, lanes, a, b), expected, err_msg=name)


@by_real
@pytest.mark.parametrize("lanes", LANES)
def test_operators_work_lane_by_lane(of, real, lanes):
    x, y = np.random.default_rng(0).normal(size=(2, 320)).astype(REALS[real])
    expected = (wider(x) * 2 - wider(y) / 3) * (1 - wider(x)) - wider(y)
    np.testing.assert_allclose(
        of("formula", lanes, x, y), expected, rtol=0, atol=8 * np.finfo(x.dtype).eps * 10
    )
    expected_sum = np.repeat(wider(x).reshape(-1, lanes).sum(1), lanes)
    np.testing.assert_allclose(of("sum", lanes, x), expected_sum, rtol=0, atol=50 * np.finfo(x.dtype).eps)
    y[: len(y) // 2] = x[: len(y) // 2] - 1  # tiles of which all are greater
    greater = (x > y).reshape(-1, lanes)
    np.testing.assert_array_equal(of("any", lanes, x, y), np.repeat(greater.any(1), lanes))
    np.testing.assert_array_equal(of("all", lanes, x, y), np.repeat(greater.all(1), lanes))


@by_real
@pytest.mark.parametrize("lanes", LANES)
def test_conversions_round_as_numpy_does(of, real, lanes):
    x = np.random.default_rng(0).normal(size=64).astype(REALS[real])
    np.testing.assert_array_equal(of("float_and_back", lanes, x), x.astype(np.float32).astype(x.dtype))
    np.testing.assert_array_equal(of("double_and_back", lanes, x), x)
    for name in ("mask_of_floats", "mask_of_doubles"):
        np.testing.assert_array_equal(of(name, lanes, x), x < 0)


# ---- products ----------------------------------------------------------------------------------


@by_real
@pytest.mark.parametrize("lanes", [1, 4, 48])
@pytest.mark.parametrize("order", ["rows", "columns", "neither"])
@pytest.mark.parametrize("m, k", [(2, 50), (50, 2), (33, 37)])
def test_products_and_their_gradients(libraries, real, lanes, order, m, k):
    dtype, rng = REALS[real], np.random.default_rng(0)
    strides = {"rows": (k, 1), "columns": (1, m), "neither": (2 * k, 2)}[order]
    size = 2 * m * k
    w, sums = rng.normal(size=(2, size)).astype(dtype)
    x, g = aligned((k, lanes), dtype), aligned((m, lanes), dtype)
    x[:], g[:] = rng.normal(size=x.shape), rng.normal(size=g.shape)

    def matrix(flat):
        steps = [s * flat.itemsize for s in strides]
        return np.lib.stride_tricks.as_strided(flat, (m, k), steps)

    def run():
        out, total, each = aligned((m, lanes), dtype), sums.copy(), aligned((m, k, lanes), dtype)
        getattr(libraries[real], f"multiply_{m}_{k}")(
            lanes, pointer(w), (ctypes.c_int64 * 2)(*strides), *map(pointer, (x, g, out, total, each))
        )
        return out, total, each

    out, total, each = run()
    close = dict(rtol=0, atol=100 * np.finfo(dtype).eps)
    np.testing.assert_allclose(out, wider(matrix(w)) @ wider(x), **close)
    np.testing.assert_allclose(matrix(total), matrix(sums) + wider(g) @ wider(x).T, **close)
    np.testing.assert_allclose(each, g[:, None] * x[None], rtol=1e-6)
    untouched = np.ones(size, bool)
    matrix(untouched)[:] = False
    np.testing.assert_array_equal(total[untouched], sums[untouched])
    for a, b in zip(run(), (out, total, each)):
        np.testing.assert_array_equal(a, b)


# ---- control and times -------------------------------------------------------------------------


class Given(ctypes.Structure):
    _fields_ = [("order", ctypes.c_int)] + [
        (name, ctypes.c_double) for name in "safety ifactor dfactor min_step max_step".split()
    ]
    _fields_ += [("betas", ctypes.c_double * 3), ("past", ctypes.c_double * 2)]


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("betas", [control.ELEMENTARY, (0.6, -0.2, 0.0)])
def test_every_lane_is_controlled_like_a_solve_of_its_own(libraries, betas, lanes):
    ratio = np.array([0, 1e-12, 0.3, 0.99, 1, 1.01, 7, 1e9, INF, NAN, 0.5, 0.5, 2, 2, 1e-300, 1e300])
    dt = np.array([1.0] * 10 + [1e-4, 90, 1e-4, 90, 0.1, 0.1])
    settings = control.Controller(order=5, min_step=1e-3, max_step=20.0, betas=betas)
    past = (0.7, 0.02)
    given = Given(5, 0.9, 10, 0.2, 1e-3, 20, betas, past)
    out = np.empty((3, len(ratio)))
    libraries["double"].control_of(
        lanes, ctypes.byref(given), *map(pointer, (ratio, dt, *out)), ctypes.c_int64(len(ratio))
    )
    for r, h, (next_dt, accepted, remembered) in zip(ratio, dt, out.T):
        assert next_dt == pytest.approx(control.next_step(r, h, settings, past), rel=1e-14)
        assert accepted == control.accept(r, h, settings)
        if math.isfinite(r):
            assert remembered == pytest.approx(control.remember(r, settings, past)[0], rel=1e-14)


@pytest.mark.parametrize("lanes", [1, 8])
def test_every_lane_begins_like_a_solve_of_its_own(libraries, lanes):
    d0, d1, d2 = (
        v.ravel().copy() for v in np.meshgrid([1e-6, 1, 30], [1e-16, 1e-6, 2], [1e-16, 5, 1e9, INF, NAN])
    )
    pad = -len(d0) % 8
    d0, d1, d2 = (np.concatenate([v, v[:pad]]) for v in (d0, d1, d2))
    out = np.empty((2, len(d0)))
    libraries["double"].first_of(lanes, *map(pointer, (d0, d1, d2, *out)), ctypes.c_int64(len(d0)))
    for a, b, c, (guess, step) in zip(d0, d1, d2, out.T):
        h0 = control.first_guess(a, b)
        assert guess == pytest.approx(h0, rel=1e-15)
        assert step == pytest.approx(control.initial_step(h0, b, c, 5), rel=1e-14)


@by_real
@pytest.mark.parametrize("lanes", [1, 4, 16])
@pytest.mark.parametrize("nudge", [-1, 0, 1])
def test_times_of_every_lane_are_rounded_and_nudged(libraries, real, lanes, nudge):
    t = np.array(
        [0, -0.0, 1, -1, 0.1, -0.1, 1e-310, 5e-324, -5e-324, 1e-45, 3e38, -3e38, INF, -INF, 1e39, 1e300]
    )
    out = np.empty_like(t)
    libraries[real].rounded_of(lanes, pointer(t), nudge, pointer(out), ctypes.c_int64(len(t)))
    with np.errstate(over="ignore"):
        x = t.astype(REALS[real])
    limit = x.dtype.type(math.copysign(INF, nudge))
    expected = np.where(x == limit, x, np.nextafter(x, limit)) if nudge else x
    finite = np.isfinite(x) | (nudge == 0) | (x == limit)
    np.testing.assert_array_equal(out[finite], expected[finite].astype(float))

"""Every table is what it claims: order conditions, measured orders, continuous extensions."""

import math
import statistics
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
import torch
from problems import EXPLICIT, detest, growth, growth_solution, twisted, twisted_solution, twisted_start

import flashode
from flashode.methods import METHODS
from flashode.tableau import Tableau, row
from flashode.tables import written_into

# Tolerances far too large let a test prescribe the steps of an adaptive method.
pytestmark = pytest.mark.filterwarnings("ignore:rtol is 1000")
ALL = list(EXPLICIT.values())
ADAPTIVE = [m for m in ALL if m.adaptive]
by_name = pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
adaptive = pytest.mark.parametrize("method", ADAPTIVE, ids=lambda m: m.name)


# ---- rooted trees: Hairer, Nørsett, Wanner I, II.2 -----------------------------------------


@cache
def trees(order):
    """All rooted trees with this many nodes, each a sorted tuple of its root's subtrees."""
    if order == 1:
        return [()]

    def forests(total, largest):
        if total == 0:
            yield ()
        for size in range(min(total, largest), 0, -1):
            for tree in trees(size):
                for rest in forests(total - size, size):
                    yield tuple(sorted((tree, *rest)))

    return sorted(set(forests(order - 1, order - 1)))


@cache
def size(tree):
    return 1 + sum(map(size, tree))


@cache
def density(tree):
    return size(tree) * math.prod(map(density, tree))


def stage_weights(tree, a):
    """The elementary weight of a tree at every stage."""
    below = [stage_weights(child, a) for child in tree]
    return [math.prod(sum(a_i[j] * w[j] for j in range(len(a_i))) for w in below) for a_i in a]


def residuals(weights, a, order, x=1):
    """How far ``weights`` are from the order conditions up to ``order`` at position ``x``."""
    for p in range(1, order + 1):
        for tree in trees(p):
            phi = stage_weights(tree, a)
            yield float(
                sum(w * f for w, f in zip(weights, phi)) - type(weights[0])(Fraction(x) ** p / density(tree))
            )


def numbers(rows, order):
    """Exact up to order 5, where that is quick; floats beyond."""
    return [list(r) if order <= 5 else [float(x) for x in r] for r in rows]


def test_the_number_of_trees_is_right():
    assert [len(trees(p)) for p in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


@by_name
def test_weights_satisfy_all_order_conditions(method):
    tableau = method.tableau
    *a, b = numbers([*tableau.a, tableau.b], method.order)
    assert max(map(abs, residuals(b, a, method.order))) < 2e-15
    assert max(map(abs, residuals(b, a, method.order + 1))) > 1e-9, "the order is claimed too low"


@adaptive
def test_embedded_weights_have_a_lower_order(method):
    tableau = method.tableau
    b_hat = [b - e for b, e in zip(tableau.b, tableau.b_err)]
    *a, b_hat = numbers([*tableau.a, b_hat], method.order)
    assert max(map(abs, residuals(b_hat, a, 1))) < 2e-15
    assert max(map(abs, residuals(b_hat, a, method.order))) > 1e-6


@adaptive
@pytest.mark.parametrize("x", [0.1, 0.5, 0.77, 1])
def test_dense_output_satisfies_the_order_conditions(method, x):
    dense = method.dense
    weights = [sum(w * Fraction(x) ** (d + 1) for d, w in enumerate(w_j)) for w_j in dense.weights]
    *a, weights = numbers([*method.tableau.a, *dense.extra_a, weights], method.order)
    assert max(map(abs, residuals(weights, a, dense.order, x))) < 5e-14
    if x < 1:
        assert max(map(abs, residuals(weights, a, dense.order + 1, x))) > 1e-9, "the order is claimed too low"


@adaptive
def test_dense_output_is_smooth_across_steps(method):
    """At the ends it has the step's own values, and f0; all but the parabolas also have f1."""
    dense, tableau = method.dense, method.tableau
    at_end = [sum(w_j) for w_j in dense.weights]
    slope_at_end = [sum((d + 1) * w for d, w in enumerate(w_j)) for w_j in dense.weights]
    padding = [Fraction(0)] * len(dense.extra_c)
    assert [float(w_j[0]) for w_j in dense.weights] == [1.0] + [0.0] * (len(dense.weights) - 1)
    assert max(abs(float(x - y)) for x, y in zip(at_end, [*tableau.b, *padding])) < 1e-13
    if method.name not in ("adaptive_heun", "fehlberg2"):
        f1 = [Fraction(int(j == tableau.stages - 1)) for j in range(len(dense.weights))]
        assert max(abs(float(x - y)) for x, y in zip(slope_at_end, f1)) < 1e-12


# ---- a table that contradicts itself is refused --------------------------------------------


@pytest.mark.parametrize(
    "table",
    [
        dict(c=row(0, "1/2"), a=(row(), row("1/3")), b=row(0, 1)),
        dict(c=row(0, "1/2"), a=(row(), row("1/2")), b=row(0, "1/2")),
        dict(c=row(0, "1/2", 1), a=(row(), row("1/2"), row(1)), b=row(0, 1, 0)),
        dict(c=row(0, "1/2"), a=(row(), row("1/2")), b=row(0, 1), b_err=row(1, 1)),
        dict(c=row(0, "1/2"), a=(row(), row("1/2")), b=row(0, 1), b_err=row(0)),
    ],
    ids=["node", "weights", "shape", "error sum", "error shape"],
)
def test_a_contradictory_table_is_refused(table):
    with pytest.raises(ValueError, match="tableau"):
        Tableau(**table)


# ---- measured orders -----------------------------------------------------------------------


def fixed_steps(method, h):
    """Options that make any method take steps of length h."""
    if not method.adaptive:
        return {"step_size": h, "interp": "cubic"}
    return {"first_step": h, "max_step": h}


def errors(method, engine, between):
    """Largest errors for a ladder of step sizes, at step ends or between them."""
    low = method.order <= 3
    field, solution, y0, end = (
        (growth, lambda t: growth_solution(t)[:, None], torch.ones(1, dtype=torch.float64), 2.0)
        if low
        else (twisted, twisted_solution, twisted_start(dtype=torch.float64), 1.5)
    )
    counts = [40, 80, 160] if low else [24, 48, 96] if method.order < 8 else [12, 24, 48]
    if method.name == "tsit5":
        # Its leading error term is so small that it rules only over long intervals.
        end, counts = 3.0, [384, 768]
    result = []
    for n in counts:
        h = end / n
        inner = torch.tensor([0.2, 0.45, 0.8], dtype=torch.float64)
        steps = torch.arange(n, dtype=torch.float64)
        t = ((steps[:, None] + inner) * h).reshape(-1) if between else steps[1:] * h
        t = torch.cat([torch.zeros(1, dtype=torch.float64), t, torch.tensor([end], dtype=torch.float64)])
        ys = flashode.odeint(
            field,
            y0,
            t,
            rtol=1e3,
            atol=1e3,
            method=method.name,
            options=fixed_steps(method, h),
            engine=engine,
        )
        rows = slice(1, -1) if between else slice(-1, None)
        result.append((ys - solution(t))[rows].abs().max().item())
    return result


@by_name
def test_measured_order_at_step_ends(method, engine):
    e = errors(method, engine, between=False)
    order = math.log2(e[-2] / e[-1])
    assert abs(order - method.order) < 0.2, e


@adaptive
def test_measured_order_between_steps(method, engine):
    e = errors(method, engine, between=True)
    order = math.log2(e[-2] / e[-1])
    assert order > method.order - 1.2, e


@pytest.mark.parametrize("name", ["euler", "midpoint", "heun2", "heun3", "rk4", "fehlberg4", "fehlberg5"])
def test_cubic_interpolation_of_fixed_steps_has_order_four_or_the_methods(name, engine):
    method = EXPLICIT[name]
    e = errors(method, engine, between=True)
    assert math.log2(e[-2] / e[-1]) > min(4, method.order) - 0.25, e


@pytest.mark.parametrize(
    "name, tolerance, median, largest",
    [
        ("dopri5", 1e-6, 7, 1500),
        ("tsit5", 1e-6, 4, 400),
        ("fehlberg45", 1e-6, 8, 1500),
        ("bosh3", 1e-3, 8, 550),
        ("dopri8", 1e-6, 1, 60),
        ("dopri8", 1e-9, 1, 60),
        ("dopri8", 1e-11, 1, 60),
    ],
)
def test_detest_errors_stay_near_the_tolerance(name, tolerance, median, largest):
    """At t = 20, in tolerances, on all 25 problems. scipy's DOP853 has 0.8 and 214 at 1e-6;
    torchdiffeq's dopri8 has 111 and 3,004 at 1e-9, for its last value is interpolated."""
    errors = []
    for problem in detest().values():
        ys = flashode.odeint(
            problem.field(), problem.y0, problem.t, rtol=tolerance, atol=tolerance, method=name
        )
        scale = tolerance + tolerance * problem.y_end.abs()
        errors.append(((ys[-1] - problem.y_end).abs() / scale).max().item())
    assert statistics.median(errors) < median
    assert max(errors) < largest


def test_the_tables_of_the_readme_are_those_of_the_methods():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert written_into(readme) == readme, "run python -m flashode.tables README.md"
    for name in METHODS:
        assert f"| `{name}`" in readme


def test_a_document_without_room_for_the_tables_is_left_alone():
    with pytest.raises(ValueError, match="methods"):
        written_into("# nothing")

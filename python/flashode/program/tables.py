"""Methods as text: the ``Method`` struct of a generated program."""

from __future__ import annotations

from ..interp import Dense
from ..methods import Method


def method_source(method: Method, dense: Dense) -> str:
    """The C++ struct of an explicit Runge-Kutta method with this dense output.

    Tables are printed so that their doubles are the engine's to the last bit; stages that dense output
    adds have weights there, and no row in the method's own table.
    """
    tableau, extra = method.tableau, len(dense.extra_c)
    c, a, b, b_err = tableau.numbers
    s = tableau.stages
    extra_rows = [[float(x) for x in row] for row in dense.extra_a]
    weights = [[float(x) for x in row] for row in dense.weights]
    lines = [
        f"  static constexpr int stages = {s}, order = {method.order};",
        f"  static constexpr bool adaptive = {_flag(method.adaptive)}, fsal = {_flag(tableau.fsal)};",
        f"  static constexpr double c[{s}] = {_row(c, s)};",
        f"  static constexpr double a[{s}][{s}] = {_rows(a, s)};",
        f"  static constexpr double b[{s}] = {_row(b, s)};",
        f"  static constexpr double b_err[{s}] = {_row(b_err, s)};",
        f"  static constexpr int extra = {extra};",
        f"  static constexpr double extra_c[{max(extra, 1)}] = {_row(dense.extra_c, max(extra, 1))};",
        f"  static constexpr double extra_a[{max(extra, 1)}][{s + extra}] = "
        f"{_rows(extra_rows or [[]], s + extra)};",
        f"  static constexpr int degree = {dense.degree};",
        f"  static constexpr double weights[{s + extra}][{dense.degree}] = {_rows(weights, dense.degree)};",
    ]
    return "\n".join(["struct Method {", *lines, "};\n"])


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _row(numbers, length: int) -> str:
    numbers = [*map(float, numbers), *[0.0] * (length - len(numbers))]
    return "{" + ", ".join(map(repr, numbers)) + "}"


def _rows(rows, length: int) -> str:
    return "{" + ", ".join(_row(row, length) for row in rows) + "}"

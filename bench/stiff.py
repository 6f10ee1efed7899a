"""Stiff problems to their published ends: steps, calls and errors of the implicit methods, and of scipy's Radau.

    python bench/stiff.py [--tolerance 1e-6]

Equality comes first: a result further than ``--within`` tolerances from the published one is not reported
as solved. An explicit method shows, with a bound on its steps, that the problems are what they are said to be.
"""

import argparse
import time

import numpy as np
import torch

import flashode


def robertson(t, y, stack=torch.stack):
    a, b, c = y[0], y[1], y[2]
    slow, back, fast = 0.04 * a, 1e4 * b * c, 3e7 * b * b
    return stack([back - slow, slow - back - fast, fast])


def van_der_pol(t, y, stack=torch.stack):
    return stack([y[1], 1000 * (1 - y[0] ** 2) * y[1] - y[0]])


# End values from Mazzia and Magherini, Test Set for Initial Value Problem Solvers, 2008; atol per unit of rtol.
PROBLEMS = {
    "Robertson, t = 0 … 1e11": (
        robertson,
        [1.0, 0.0, 0.0],
        1e11,
        [0.2083340149701255e-7, 0.8333360770334713e-13, 0.9999999791665050],
        1e-4,
    ),
    "van der Pol, mu = 1000, t = 0 … 2000": (
        van_der_pol,
        [2.0, 0.0],
        2000.0,
        [1.706167732170483, -0.8928097010247975e-3],
        1.0,
    ),
}


def flashode_row(method, field, y0, end, rtol, atol, max_num_steps):
    y0, t = torch.tensor(y0, dtype=torch.float64), torch.tensor([0.0, end], dtype=torch.float64)
    options = {"max_num_steps": max_num_steps}
    with torch.no_grad():
        s = flashode.solve(field, y0, t, rtol=rtol, atol=atol, method=method, options=options, throw=False)
    return s.status.name.lower(), s.stats.accepted, s.stats.rejected, s.stats.nfe, s.ys[-1].numpy()


def scipy_row(field, y0, end, rtol, atol):
    """None where there is no scipy. It counts refused steps nowhere."""
    try:
        from scipy.integrate import solve_ivp
    except ImportError:
        return None
    s = solve_ivp(lambda t, y: field(t, y, np.stack), (0, end), y0, method="Radau", rtol=rtol, atol=atol)
    return "success" if s.success else "failed", len(s.t) - 1, "", s.nfev, s.y[:, -1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tolerance", type=float, default=1e-6, help="rtol")
    parser.add_argument("--within", type=float, default=10.0, help="tolerances an end value may be off")
    parser.add_argument("--explicit-steps", type=int, default=20_000, help="bound on the steps of dopri5")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for title, (field, y0, end, want, scale) in PROBLEMS.items():
        rtol, atol, want = arguments.tolerance, arguments.tolerance * scale, np.array(want)
        print(f"\n{title}; rtol {rtol:g}, atol {atol:g}")
        print(
            f"{'method':16}{'result':>12}{'steps':>8}{'refused':>9}{'calls':>8}{'error / tol':>13}{'seconds':>9}"
        )
        rows = {
            name: lambda name=name, limit=limit: flashode_row(name, field, y0, end, rtol, atol, limit)
            for name, limit in (
                ("kvaerno5", 100_000),
                ("kvaerno3", 100_000),
                ("dopri5", arguments.explicit_steps),
            )
        }
        rows["scipy Radau"] = lambda: scipy_row(field, y0, end, rtol, atol)
        for name, solve in rows.items():
            begin = time.perf_counter()
            row = solve()
            if row is None:
                continue
            result, steps, refused, calls, y = row
            seconds = time.perf_counter() - begin
            error = (np.abs(y - want) / (atol + rtol * np.abs(want))).max()
            if result == "success" and not error <= arguments.within:
                result = "off"
            print(f"{name:16}{result:>12}{steps:>8}{refused:>9}{calls:>8}{error:>13.2g}{seconds:>9.2f}")


if __name__ == "__main__":
    main()

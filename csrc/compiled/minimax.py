"""Fits the polynomials of math.h: Remez's exchange in 60 digits. Prints them, and how far they are off."""

import sys

from mpmath import mp, mpf

mp.dps = 50


def remez(target, weight, low, high, degree, rounds=12):
    """Coefficients c, lowest first, that minimise the largest |weight(x) (sum c_k x^k - target(x))|."""
    n = degree + 2
    middle, half = (mpf(low) + high) / 2, (mpf(high) - low) / 2
    points = [middle - half * mp.cos(mp.pi * (i + mpf(1) / 2) / n) for i in range(n)]
    grid = [middle - half * mp.cos(mp.pi * (i + mpf(1) / 2) / (30 * n)) for i in range(30 * n)]
    sampled = [(x, target(x), weight(x)) for x in grid]
    for _ in range(rounds):
        rows = [[x**k for k in range(degree + 1)] + [(-1) ** i / weight(x)] for i, x in enumerate(points)]
        solution = mp.lu_solve(mp.matrix(rows), mp.matrix([target(x) for x in points]))
        c = list(solution)[:-1]
        errors = [w * (mp.polyval(c[::-1], x) - g) for x, g, w in sampled]
        peaks = []  # the largest error of each run of one sign
        for x, error in zip(grid, errors):
            if peaks and (error > 0) == (peaks[-1][1] > 0):
                if abs(error) > abs(peaks[-1][1]):
                    peaks[-1] = (x, error)
            else:
                peaks.append((x, error))
        while len(peaks) > n:
            peaks.pop(0 if abs(peaks[0][1]) < abs(peaks[-1][1]) else -1)
        if len(peaks) < n:
            break
        points = [x for x, _ in peaks]
    return c, max(map(abs, errors))


def root(f):
    return lambda z: f(mp.sqrt(z))


ln2, quarter = mp.log(2), mp.pi / 4
SEEN = {
    # name: (target, weight, low, high, degree for float, for double)
    "exp": (lambda r: (mp.expm1(r) - r) / r**2, lambda r: abs(r) + mpf(1) / 50, -0.3501, 0.35, 4, 9),
    "log": (lambda f: (mp.log1p(f) - f + f**2 / 2) / f**3, lambda f: f**2 + mpf(1) / 100, mp.sqrt(0.5) - 1, mp.sqrt(2) - 1, 7, None),
    "sin": (root(lambda t: (mp.sin(t) - t) / t**3), root(lambda t: t**3 / mp.sin(t)), 0, 1.58**2, 3, 7),
    "atan": (root(lambda t: (mp.atan(t) - t) / t**3), root(lambda t: t**3 / mp.atan(t)), 0, 1, 8, 19),
    "atanh": (root(lambda s: (2 * mp.atanh(s) - 2 * s - s**3 * 2 / 3) / s**5), root(lambda s: s**5 / mp.atanh(s) / 2), 0, 0.1717**2, 2, 7),
    "erf near 0": (root(lambda t: mp.erf(t) / t - 1), root(lambda t: t / mp.erf(t)), 0, 1, 6, 11),
    "log of erfc": (lambda x: mp.log(mp.erfc(x)), lambda x: mp.erfc(x) / mp.erf(x), 1, None, 5, 17),
}  # fmt: skip

if __name__ == "__main__":
    for name, (target, weight, low, high, *degrees) in SEEN.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        for kind, degree, end in zip(("float", "double"), degrees, (4, 6)):
            if degree is None:
                continue
            c, error = remez(target, weight, low, high or end, degree)
            print(f"{name}, {kind}: off by 2^{mp.nstr(mp.log(error, 2), 4)}")
            print("  {" + ", ".join(mp.nstr(x, 10 if kind == "float" else 19) for x in c) + "}")

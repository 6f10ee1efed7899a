"""The quartic of a step, in values where flashode has it in weights."""

from types import SimpleNamespace

from flashode.interp import quartic
from flashode.tableau import row

# The same quartic with f0, the mean slopes of the whole step and of its first half, and f1 for stages.
_QUARTIC = quartic(SimpleNamespace(stages=4, b=row(0, 1, 0, 0)), row(0, 0, "1/2", 0)).matrix.T.tolist()


def _interp_fit(y0, y1, y_mid, f0, f1, dt):
    """Coefficients of 1, x, …, x^4, with x from 0 to 1 over the step."""
    changes = dt * f0, y1 - y0, 2 * (y_mid - y0), dt * f1
    return [y0, *(sum(w * change for w, change in zip(weights, changes)) for weights in _QUARTIC)]


def _interp_evaluate(coefficients, t0, t1, t):
    """The polynomial of a step from ``t0`` to ``t1`` at a time ``t`` between them."""
    if not t0 <= t <= t1:
        raise ValueError(f"invalid interpolation, fails `t0 <= t <= t1`: {t0}, {t}, {t1}")
    x = ((t - t0) / (t1 - t0)).to(coefficients[0].dtype)
    total = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):  # Horner
        total = coefficient + x * total
    return total

"""The time at which an event function changes sign, on the dense output of one step."""

import torch


def combine_event_functions(event_fn, t0, y0):
    """One event function from one of several values: positive until the first of them fires."""
    with torch.no_grad():
        signs = torch.sign(event_fn(t0, y0))
    return lambda t, y: (event_fn(t, y) * signs).min()


def find_event(interp_fn, sign0, t0, t1, event_fn, tol):
    """Halves ``[t0, t1]``, at whose start the event has the sign ``sign0``, until it is as short as ``tol``.

    Returns the time and the state there.
    """
    tol = float(torch.as_tensor(tol).min())
    with torch.no_grad():
        while t1 - t0 > tol:
            middle = t0 + 0.5 * (t1 - t0)
            if not t0 < middle < t1:
                break
            if torch.sign(event_fn(middle, interp_fn(middle))) == sign0:
                t0 = middle
            else:
                t1 = middle
        event_t = t0 + 0.5 * (t1 - t0)
    return event_t, interp_fn(event_t)

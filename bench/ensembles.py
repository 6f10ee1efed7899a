"""Times whole solves of compiled fields on many samples, on a GPU or a CPU: ``python bench/ensembles.py --device cuda``.

As ``run.py`` does it. Lorenz's equations are taken through 1,000 steps of one length, by a classical
method and by one that would choose its steps; torchdiffeq's example and van der Pol's equation choose
theirs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import torch
import torchdiffeq
from cases import Contest, Oscillators, Spiral, random
from run import Table, compete, headline, parsed, parser_of, pinned, surroundings
from workloads import Lorenz

import flashode

COMPARED = 4096  # samples that the truth is worked out for
FEW = 1 << 17  # more than so many take torchdiffeq many seconds


def contest(name, func, y0, t, bound, ours: dict, theirs: dict | None, exact: dict) -> Contest:
    """``ours``, ``theirs``, ``exact``: settings of flashode, of torchdiffeq, and of what gives the truth."""
    compiled = flashode.compile(func)

    def ends(odeint, func, y0=y0, t=t, **call):
        return odeint(func, y0, t, **call)[-1, :COMPARED]

    contestants = (
        {} if theirs is None else {"torchdiffeq": lambda f: ends(torchdiffeq.odeint, func, **theirs)}
    )
    contestants["native"] = lambda f: ends(flashode.odeint, func, engine="native", **ours)
    contestants["compiled"] = lambda f: ends(flashode.odeint, compiled, **ours)
    few = y0[:COMPARED].double()
    truth = type(func)().to(y0.device).double()
    return Contest(name, contestants, lambda: ends(flashode.odeint, truth, few, t.double(), **exact), bound)


def lorenz(device, quick) -> Iterator[Contest]:
    """1,000 steps of one length; a method that would choose them is left no choice."""
    steps, end = (100, 0.1) if quick else (1000, 1.0)
    t, length = torch.tensor([0.0, end], device=device), end / steps
    fixed = {"method": "rk4", "options": {"step_size": length}}
    lengths = {"first_step": length, "min_step": length, "max_step": length}
    chosen = {"method": "tsit5", "options": lengths | {"batched": True, "max_num_steps": 2 * steps}}
    for samples in (1024,) if quick else (1024, FEW, 1 << 23):
        (y0,) = random(samples, 1, samples, 3, device=device)
        exact = {"method": "dopri8", "rtol": 1e-10, "atol": 1e-10}
        theirs = fixed if samples <= FEW else None
        yield contest(f"lorenz rk4 {samples}", Lorenz(), y0, t, 1e-3, fixed, theirs, exact)
        yield contest(f"lorenz tsit5 {samples}", Lorenz(), y0, t, 1e-3, chosen, None, exact)


def spiral(device, quick) -> Iterator[Contest]:
    """torchdiffeq's examples/ode_demo.py: one sample."""
    y0, t = torch.tensor([[2.0, 0.0]], device=device), torch.linspace(0, 25, 1000, device=device)
    exact = {"rtol": 1e-10, "atol": 1e-12}
    yield contest("spiral", Spiral().to(device), y0, t[: 100 if quick else None], 2e-5, {}, {}, exact)


def oscillators(device, quick) -> Iterator[Contest]:
    """One cycle: all samples in steps of one size, then each in its own."""
    (y0,) = random(10, 1, 32 if quick else 16_384, 2, device=device)
    t, call, exact = (
        torch.linspace(0, 7.63, 200, device=device),
        {"rtol": 1e-5, "atol": 1e-5},
        {"rtol": 1e-10, "atol": 1e-12},
    )
    yield contest("oscillators", Oscillators(), y0, t, 2e-3, call, call, exact)
    yield contest(
        "oscillators own", Oscillators(), y0, t, 2e-3, call | {"options": {"batched": True}}, call, exact
    )


CASES = {"lorenz": lorenz, "spiral": spiral, "oscillators": oscillators}


def main(arguments=None) -> int:
    parser = parser_of(__doc__, CASES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args, timer = parsed(parser, arguments, CASES)
    if args.device == "cuda":
        timer.wait = torch.cuda.synchronize
    timer.clock = time.perf_counter
    settings = {
        "device": args.device,
        "threads": 1,
        "quick": args.quick,
        "repeats": timer.repeats,
        "clock": "perf_counter",
    }
    document = surroundings(args.device) | {"settings": settings, "contests": []}
    print(headline(document))
    contests = ((case, contest) for case in args.case for contest in CASES[case](args.device, args.quick))
    with pinned(1, args.device):
        refused = compete(
            contests, document, timer, Table((20, 11), ("median", "25%", "75%", "speed", "off_by")), args.json
        )
    print(f"{len(document['contests'])} contests, {refused} refused")
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())

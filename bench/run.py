"""Times flashode against torchdiffeq: ``python bench/run.py [case ...]``.

Equality comes first: each contestant's result is compared with a more accurate one, and a contest
in which one is further off than allowed is refused, not timed (exit code 1). Then the contestants
take turns (ABAB...) in one process, pinned to as many cores as threads are used. Figures
are medians over the turns; ratios and differences are taken turn by turn, then the median. On one
CPU thread the clock is the process's own CPU time, which leaves out what other processes take of
the core (though not what they take of caches and memory); otherwise it is the wall's.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import CASES, Contest

import flashode

# ---- one contest ---------------------------------------------------------------------------


class Counted(torch.nn.Module):
    """A field that counts its calls."""

    def __init__(self, func):
        super().__init__()
        self.func, self.calls = func, 0

    def forward(self, t, y):
        self.calls += 1
        return self.func(t, y)


def difference(result, truth) -> float:
    """Largest difference relative to the largest entry of each tensor of the truth; inf if not comparable."""
    result, truth = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (result, truth))
    if [x.shape for x in result] != [x.shape for x in truth]:
        return math.inf
    pairs = [(x.detach().double(), exact.detach().double()) for x, exact in zip(result, truth)]
    worst = [((x - exact).abs().max() / exact.abs().max()).item() for x, exact in pairs]
    return max(math.inf if math.isnan(d) else d for d in worst)


def check(contest: Contest) -> dict:
    """Difference and number of calls of every contestant, by name."""
    truth, rows = contest.truth(), {}
    for name, run in contest.contestants.items():
        func = None if contest.func is None else Counted(contest.func)
        row = {"difference": difference(run(func), truth), "nfe": (func.calls or None) if func else None}
        rows[name] = row | getattr(run, "stats", dict)()
    return rows


@dataclass
class Timer:
    """How to time: ``clock`` in seconds, ``wait`` until the device is idle, and when to stop.

    Short runs are repeated until a turn takes ``turn`` seconds, so that it is long beside the clock and
    the wait.
    """

    clock: Callable = time.perf_counter
    wait: Callable = lambda: None
    repeats: int = 25
    seconds: float = 40
    turn: float = 2e-3


def interleave(runs: dict, timer: Timer) -> dict:
    """Seconds per run of each, turn by turn; less than ``repeats`` turns when ``seconds`` run out."""

    def timed(run, number):
        if hasattr(run, "seconds_of"):
            return run.seconds_of(number) / number
        timer.wait()
        begin = timer.clock()
        for _ in range(number):
            run()
        timer.wait()
        return (timer.clock() - begin) / number

    numbers = {
        name: max(1, round(timer.turn / min(timed(run, 1) for _ in range(2)))) for name, run in runs.items()
    }
    turns = {name: [] for name in runs}
    begin = time.perf_counter()
    for turn in range(timer.repeats):
        if turn >= 3 and time.perf_counter() - begin > timer.seconds:
            break
        for name, run in runs.items():
            turns[name].append(timed(run, numbers[name]))
    return turns


def measure(contest: Contest, timer: Timer) -> dict:
    """Checks a contest, then times it unless a contestant is refused."""
    with torch.set_grad_enabled(contest.grad), contest.within():
        rows = check(contest)
        refused = [name for name, row in rows.items() if row["difference"] > contest.bound]
        report = {"name": contest.name, "bound": contest.bound, "refused": refused, "rows": rows}
        if refused:
            return report
        runs = contest.yardsticks | {name: _ready(run, contest) for name, run in contest.contestants.items()}
        calls = list(rows.values())[-1]["nfe"]
        if contest.at:
            runs["func alone"] = lambda: _call(contest.func, contest.at, calls)
        turns = interleave(runs, timer)
    report["against"] = base = next(iter(runs))
    alone = turns.get("func alone")
    report["rows"] = {name: rows.get(name, {}) for name in runs}
    for name, row in report["rows"].items():
        own, nfe = turns[name], row.get("nfe")
        q1, median, q3 = statistics.quantiles(own, n=4, method="inclusive")
        row |= {"seconds": {"median": median, "q1": q1, "q3": q3, "turns": len(own)}}
        if name != "func alone":
            row["speed"] = statistics.median(b / a for a, b in zip(own, turns[base]))
        beyond = median
        if alone and nfe:
            per_call = statistics.median(a / nfe - b / calls for a, b in zip(own, alone))
            row["us_per_call"], beyond = 1e6 * per_call, nfe * per_call
        if contest.moved and name != "func alone":
            row["gb_per_s"] = contest.moved(nfe) / beyond / 1e9
        if contest.flops:
            row["gflop_per_s"] = contest.flops(nfe) / median / 1e9
    return report


def _ready(run, contest):
    """What is timed of a contestant; one in another process has the field there."""
    return run if hasattr(run, "seconds_of") else lambda: run(contest.func)


def _call(func, arguments, calls):
    for _ in range(calls):
        func(*arguments)


# ---- the surroundings ----------------------------------------------------------------------


def surroundings(device: str) -> dict:
    """What a reader needs to judge the figures; neither paths nor host names."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or os.environ.get("FLASHODE_COMMIT"),
        "dirty": None if (status := _git("status", "--porcelain")) is None else bool(status),
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "vectors": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "torchdiffeq", "flashode")},
        "build": {k: _without_paths(v) for k, v in flashode.build_config().items()},
    }


def _git(*arguments):
    folder = Path(__file__).parent
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model():
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.processor() or platform.machine()


def _without_paths(value):
    return re.sub(r"(/[^\s/:]+)+/", "", value) if isinstance(value, str) else value


@contextlib.contextmanager
def pinned(threads: int, device: str):
    """Runs torch on so many threads, kept to as many cores; a GPU's own threads are left alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    cores = os.sched_getaffinity(0) if device == "cpu" and hasattr(os, "sched_setaffinity") else None
    if cores:
        os.sched_setaffinity(0, sorted(cores)[-threads:])
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if cores:
            os.sched_setaffinity(0, cores)


# ---- the table -----------------------------------------------------------------------------

_LEGEND = """
us/call: solver cost per call of func beyond the call itself. speed: times as fast as the
first line of the contest. off_by: largest difference from a more accurate answer.
"""


def _time(seconds):
    unit, scale = next((u, x) for u, x in (("s", 1), ("ms", 1e-3), ("us", 1e-6)) if seconds >= x or u == "us")
    return f"{seconds / scale:.{2 if seconds < 100 * scale else 1}f} {unit}"


def _duration(key):
    return lambda row: _time(row["seconds"][key]) if "seconds" in row else "-"


def _number(key, form):
    def cell(row):
        value = row.get(key)
        return "-" if value is None else format(value, ".0f" if form == ".2f" and value >= 1000 else form)

    return cell


# Width and cell by heading; a dash where a figure makes no sense.
COLUMNS = {
    "calls": (6, _number("nfe", "d")),
    "steps": (7, _number("steps", ".0f")),
    "median": (9, _duration("median")),
    "25%": (9, _duration("q1")),
    "75%": (9, _duration("q3")),
    "us/call": (8, _number("us_per_call", ".2f")),
    "GB/s": (6, _number("gb_per_s", ".1f")),
    "GFLOP/s": (7, _number("gflop_per_s", ".1f")),
    "speed": (7, _number("speed", ".2f")),
    "off_by": (8, _number("difference", ".1e")),
}


@dataclass
class Table:
    """Contests as lines of text: the widths of their names and of contestants', and the columns."""

    widths: tuple[int, int] = (18, 11)
    headings: tuple[str, ...] = ("calls", "median", "25%", "75%", "us/call", "GB/s", "speed", "off_by")

    def line(self, name, contestant, cells):
        first, second = self.widths
        cells = [f"{cell:>{COLUMNS[heading][0]}}" for heading, cell in zip(self.headings, cells)]
        print(" ".join([f"{name:<{first}}", f"{contestant:<{second}}", *cells]), flush=True)

    def head(self):
        self.line("contest", "contestant", self.headings)

    def show(self, report: dict):
        name = report["name"]
        for contestant, row in report["rows"].items():
            self.line(name, contestant, [COLUMNS[heading][1](row) for heading in self.headings])
            name = ""
        for contestant in report["refused"]:
            off, bound = report["rows"][contestant]["difference"], report["bound"]
            print(
                f"  REFUSED, not timed: {contestant} is off by {off:.1e}, {bound:.1e} is allowed", flush=True
            )


# ---- the command ---------------------------------------------------------------------------


def parser_of(doc: str, cases) -> argparse.ArgumentParser:
    """The arguments that all tables of contests share."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("case", nargs="*", help=f"of {', '.join(cases)}; all by default")
    parser.add_argument("--quick", action="store_true", help="small sizes and 3 turns: does it run?")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--repeats", type=int, help="turns of each contest (default 25; 3 if quick)")
    parser.add_argument("--seconds", type=float, default=40, help="after which a contest has turns enough")
    return parser


def parsed(parser, arguments, cases):
    """The arguments, with ``case`` in the order of ``cases`` whichever were asked for, and their `Timer`."""
    args = parser.parse_args(arguments)
    if unknown := set(args.case) - set(cases):
        parser.error(f"no case named {', '.join(sorted(unknown))}; there are {', '.join(cases)}")
    args.case = [name for name in cases if name in args.case or not args.case]
    return args, Timer(repeats=max(2, args.repeats or (3 if args.quick else 25)), seconds=args.seconds)


def compete(contests, document: dict, timer: Timer, table: Table, file: Path | None) -> int:
    """Measures ``(case, contest)`` after ``(case, contest)`` into the document; the number refused."""
    table.head()
    for case, contest in contests:
        report = {"case": case} | measure(contest, timer)
        table.show(report)
        document["contests"].append(report)
        if file:  # after every contest, in case a time limit ends the run
            text = json.dumps(document, indent=1) + "\n"
            file.write_text(text.replace(": Infinity", ": 1e999"))  # JSON has no infinity
    return sum(bool(report["refused"]) for report in document["contests"])


def main(arguments=None) -> int:
    parser = parser_of(__doc__, CASES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args, timer = parsed(parser, arguments, CASES)
    if args.device == "cuda":
        timer.wait = torch.cuda.synchronize
    elif args.threads == 1:
        timer.clock = time.process_time
    settings = {
        "device": args.device, "threads": args.threads, "quick": args.quick, "repeats": timer.repeats,
        "clock": timer.clock.__name__,
    }  # fmt: skip
    document = surroundings(args.device) | {"settings": settings, "contests": []}
    print(headline(document))
    contests = ((case, contest) for case in args.case for contest in CASES[case](args.device, args.quick))
    with pinned(args.threads, args.device):
        refused = compete(contests, document, timer, Table(), args.json)
    print(_LEGEND, f"{len(document['contests'])} contests, {refused} refused", sep="\n")
    return int(refused > 0)


def headline(document: dict) -> str:
    machine, versions = document["machine"], document["versions"]
    commit = (document["commit"] or "no commit")[:9] + ("+changes" if document["dirty"] else "")
    return (
        f"flashode {versions['flashode']} ({commit}), torchdiffeq {versions['torchdiffeq']}, "
        f"torch {versions['torch']}, python {versions['python']}\n"
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, "
        f"threads: {document['settings']['threads']}, {document['date']}\n"
    )


if __name__ == "__main__":
    sys.exit(main())

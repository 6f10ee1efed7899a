"""Times compiled fields against torchdiffeq, against fields called from Python, and against diffrax.

    python bench/compiled.py [workload ...] [--jax-python PYTHON] [--cold]

As ``run.py`` does it: equality first, then turns on one core, CPU time. diffrax runs in a process of its
own, under a Python that has it (README), on the same core in the same turns, and XLA has one thread.
``--cold`` adds what the first call takes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torchdiffeq
from cases import Contest
from run import Table, compete, headline, parsed, parser_of, pinned, surroundings
from torch.utils._pytree import tree_leaves, tree_map
from workloads import LOSSES, WORKLOADS, Workload

import flashode

TABLE = Table((18, 19), ("calls", "steps", "median", "GFLOP/s", "speed", "off_by"))
LEGEND = """
calls: of the field, with those of the backward solve. steps: tried in the forward solve; the mean
of samples that have their own. speed: times as fast as the first line. off_by: largest difference
from a more accurate answer. GFLOP/s: the field's own, where nothing else counts.
"""
HAS_COMPILE = hasattr(flashode, "compile")
NATIVE = {"engine": "native"}

# ---- contestants in this process -------------------------------------------------------------


@dataclass
class Solve:
    """A contestant that calls ``odeint`` or ``odeint_adjoint`` of either library, with a compiled field if given."""

    workload: Workload
    odeint: object
    call: dict = field(default_factory=dict)
    compiled: object = None

    def __call__(self, func):
        w, func = self.workload, self.compiled or func
        if w.loss:
            w.field.zero_grad()
        ys = self.odeint(func, w.y0, w.t, rtol=w.rtol, atol=w.atol, **self.call)
        if not w.loss:
            return [y[: w.compared] for y in tree_leaves(ys)]
        value = LOSSES[w.loss](ys, w.target)
        value.backward()
        return [value.detach(), *(p.grad for p in w.field.parameters())]

    @torch.no_grad()
    def stats(self) -> dict:
        w = self.workload
        if self.odeint in (torchdiffeq.odeint, torchdiffeq.odeint_adjoint):
            return {"steps": _steps_of_torchdiffeq(w)}
        s = flashode.solve(self.compiled or w.field, w.y0, w.t, rtol=w.rtol, atol=w.atol, **self.call).stats
        steps = torch.as_tensor(s.accepted + s.rejected).double().mean().item()
        return {"steps": steps} if self.compiled is None or w.loss else {"steps": steps, "nfe": s.nfe}


def _steps_of_torchdiffeq(w: Workload) -> int:
    steps = []

    def func(t, y):
        return w.field(t, y)

    func.callback_step = lambda t0, y0, dt: steps.append(t0)
    torchdiffeq.odeint(func, w.y0, w.t, rtol=w.rtol, atol=w.atol)
    return len(steps)


def compiled(w: Workload, odeint, **call) -> dict[str, Solve]:
    """The contestant that is compiled, by name; none where this flashode cannot, which it is asked once."""
    if not HAS_COMPILE:
        return {}
    with torch.set_grad_enabled(w.loss is not None):
        try:
            run = Solve(w, odeint, call, flashode.compile(w.field))
            run(None)
        except Exception as error:  # any: one field that cannot be compiled leaves the others their figures
            print(f"  compiled {w.name} is left out: {type(error).__name__}: {error}", file=sys.stderr)
            return {}
    return {"compiled": run}


def settings_of(w: Workload) -> dict:
    return {"options": {"batched": True}} if w.batched else {}


def forward(w: Workload) -> dict[str, Solve]:
    theirs = {} if w.crowd else {"torchdiffeq": Solve(w, torchdiffeq.odeint)}
    ours = {"native": Solve(w, flashode.odeint, NATIVE | settings_of(w))}
    return theirs | ours | compiled(w, flashode.odeint, **settings_of(w))


def training(w: Workload) -> dict[str, Solve]:
    """By gradients of the discrete solve, and by solving an adjoint equation back."""
    direct = {"torchdiffeq": Solve(w, torchdiffeq.odeint), "native": Solve(w, flashode.odeint, NATIVE)}
    adjoint = {
        "torchdiffeq": Solve(w, torchdiffeq.odeint_adjoint),
        "native": Solve(w, flashode.odeint_adjoint, NATIVE),
    }
    direct |= compiled(w, flashode.odeint)
    adjoint |= compiled(w, flashode.odeint_adjoint)
    return direct | {f"{name} adjoint": run for name, run in adjoint.items()}


def truth(w: Workload) -> list[torch.Tensor]:
    """By torchdiffeq in double precision."""
    y0, t, target = tree_map(lambda x: x if x is None else x.double(), (w.y0, w.t, w.target))
    exact = replace(
        w, field=copy.deepcopy(w.field).double(), y0=y0, t=t, target=target, rtol=1e-10, atol=1e-12
    )
    if not w.loss:  # nothing beyond what is compared is solved for
        exact = replace(exact, t=t[: w.compared])
    return Solve(exact, torchdiffeq.odeint)(exact.field)


# ---- other solvers for Lorenz's equations ----------------------------------------------------


def slopes_of_lorenz(t, y):
    a, b, c = y
    return 10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c


class Scipy:
    """DOP853 of SciPy; the field is Python, on three numbers."""

    def __init__(self, w: Workload):
        self.workload, self.nfe = w, None

    def __call__(self, func):
        from scipy.integrate import solve_ivp

        w = self.workload
        t, y0 = w.t.numpy(), w.y0.numpy()
        s = solve_ivp(slopes_of_lorenz, (t[0], t[-1]), y0, "DOP853", t, rtol=w.rtol, atol=w.atol)
        self.nfe = s.nfev
        return torch.as_tensor(s.y.T[: w.compared].copy())

    def stats(self):
        return {"nfe": self.nfe}


def numbalsoda(w: Workload):
    """DOP853 of numbalsoda, Fortran; the field is compiled by numba."""
    import numba
    from numbalsoda import dop853, lsoda_sig

    @numba.cfunc(lsoda_sig)
    def slopes(t, y, dy, data):
        dy[0], dy[1], dy[2] = 10 * (y[1] - y[0]), y[0] * (28 - y[2]) - y[1], y[0] * y[1] - 8 / 3 * y[2]

    def run(func):
        t, y0 = w.t.numpy(), w.y0.numpy()
        ys, _ = dop853(slopes.address, y0, t, rtol=w.rtol, atol=w.atol, mxstep=100_000)
        return torch.as_tensor(ys[: w.compared])

    return run


def for_lorenz(w: Workload) -> dict:
    eight = {"method": "dopri8"}
    runs = {"native dopri8": Solve(w, flashode.odeint, NATIVE | eight)}
    runs |= {f"{name} dopri8": run for name, run in compiled(w, flashode.odeint, **eight).items()}
    for name, make in {"scipy": Scipy, "numbalsoda": numbalsoda}.items():
        if _found(name):
            runs[f"{name} DOP853"] = make(w)
    return runs


def _found(module) -> bool:
    try:
        __import__(module)
    except ImportError:
        print(f"  {module} is not installed: left out", file=sys.stderr)
        return False
    return True


# ---- diffrax, in a process of its own --------------------------------------------------------


class Worker:
    """``diffrax_worker.py`` under another Python, for one workload, while it is entered."""

    def __init__(self, python: str, w: Workload, cache: str | None = None):
        self.python, self.workload, self.cache = python, w, cache

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        double = tree_leaves(self.workload.y0)[0].dtype == torch.float64
        settings = {
            "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": str(int(double)), "OMP_NUM_THREADS": "1",
            "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
        }  # fmt: skip
        if self.cache:
            settings |= {
                "JAX_COMPILATION_CACHE_DIR": self.cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            }  # fmt: skip
        self.process = subprocess.Popen(
            [self.python, Path(__file__).with_name("diffrax_worker.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=os.environ | settings,
        )  # fmt: skip
        try:
            self.versions = self.answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.folder.cleanup()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"diffrax_worker.py ended; has {self.python} jax and diffrax?")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"diffrax_worker.py: {answer['error']}")
        return answer

    def ask(self, **question) -> dict:
        print(json.dumps(question), file=self.process.stdin)
        return self.answer()

    def set_up(self, name: str, adjoint: str, result: Path) -> dict:
        """Has the worker compile the workload and save its result."""
        w, data = self.workload, Path(self.folder.name) / "data.npz"
        arrays = {"t": w.t, **{f"p.{key}": x for key, x in w.field.state_dict().items()}}
        arrays |= {"y0": w.y0} if torch.is_tensor(w.y0) else {f"y0.{i}": y for i, y in enumerate(w.y0)}
        arrays |= {} if w.target is None else {"target": w.target}
        np.savez(data, **{key: x.detach().numpy() for key, x in arrays.items()})
        return self.ask(
            name=name, field=type(w.field).__name__, rtol=w.rtol, atol=w.atol, batched=w.batched, loss=w.loss,
            trained=[key for key, _ in w.field.named_parameters()], adjoint=adjoint, data=str(data),
            result=str(result),
        )  # fmt: skip


class Diffrax:
    """A contestant whose worker is set up by its first call."""

    def __init__(self, worker: Worker, adjoint: str):
        self.worker, self.adjoint = worker, adjoint

    def __call__(self, func):
        result = Path(self.worker.folder.name) / f"{self.adjoint}.npz"
        self.steps = self.worker.set_up(self.adjoint, self.adjoint, result)["steps"]
        with np.load(result) as arrays:
            tensors = [torch.as_tensor(x) for x in arrays.values()]
        w = self.worker.workload
        return tensors if w.loss else [y[: w.compared] for y in tensors]

    def stats(self):
        w, steps = self.worker.workload, self.steps
        counts = {"steps": steps}  # the first step is 0.01 long, whatever the field, which takes no call
        return counts if w.loss or w.batched else counts | {"nfe": int(6 * steps + 1)}

    def seconds_of(self, number):
        return self.worker.ask(name=self.adjoint, number=number)["seconds"]


def with_diffrax(w: Workload, worker: Worker) -> dict:
    runs = {"diffrax": Diffrax(worker, "RecursiveCheckpointAdjoint")}
    return runs | ({"diffrax backsolve": Diffrax(worker, "BacksolveAdjoint")} if w.loss else {})


# ---- contests --------------------------------------------------------------------------------


def contest(w: Workload, jax_python: str | None) -> Contest:
    runs = training(w) if w.loss else forward(w)
    if w.name == "lorenz":
        runs |= for_lorenz(w)
    worker = Worker(jax_python, w) if jax_python else contextlib.nullcontext()
    if jax_python:
        runs |= with_diffrax(w, worker)
    made = Contest(
        w.name, runs, lambda: truth(w), w.bound, func=w.field, grad=w.loss is not None, within=lambda: worker
    )
    if w.flops:
        calls = flashode.solve(w.field, w.y0, w.t, rtol=w.rtol, atol=w.atol).stats.nfe
        made.flops = lambda nfe: w.flops * (nfe or calls)
        made.yardsticks = {"torch.mm": lambda: _products(w, calls)}
    return made


def _products(w: Workload, calls: int):
    """The matrix products alone of so many calls of the field."""
    weights = [p.T for p in w.field.parameters() if p.dim() == 2]
    for _ in range(calls):
        y = w.y0
        for weight in weights:
            y = torch.mm(y, weight)


# ---- the first call --------------------------------------------------------------------------


def first_call(case: str, index: int, quick: bool) -> float:
    """Seconds that compiling a field and its first solve take beyond the second; NaN where it cannot be."""
    torch.set_num_threads(1)
    w = list(WORKLOADS[case](quick))[index]
    with torch.set_grad_enabled(w.loss is not None):
        begin = time.perf_counter()
        runs = compiled(w, flashode.odeint, **settings_of(w))
        between = time.perf_counter()
        for run in runs.values():
            run(None)
    return 2 * between - begin - time.perf_counter() if runs else math.nan


def show_first_calls(args):
    """With nothing cached, then with what that left on the disk: all but the compiler's part, by the wall's clock."""
    print(
        f"\nseconds that the first call takes beyond others\n{'':<18}{'nothing cached':>38}{'disk cache':>12}"
    )
    spawn = multiprocessing.get_context("spawn")
    for case in args.case:
        for index, w in enumerate(WORKLOADS[case](args.quick)):
            rows = {}
            with tempfile.TemporaryDirectory() as cache:
                if HAS_COMPILE:
                    rows["compiled"] = []
                    for _ in range(2):
                        with _caching_in(cache), spawn.Pool(1) as pool:
                            rows["compiled"].append(pool.apply(first_call, (case, index, args.quick)))
                if args.jax_python:
                    rows["diffrax"] = []
                    for _ in range(2):
                        with Worker(args.jax_python, w, cache) as worker:
                            name = "RecursiveCheckpointAdjoint"
                            answer = worker.set_up(name, name, Path(worker.folder.name) / "result.npz")
                            rows["diffrax"].append(answer["compiling"])
            for contestant, (cold, warm) in rows.items():
                print(f"{w.name:<18} {contestant:<18}{cold:>19.2f}{warm:>12.2f}", flush=True)


@contextlib.contextmanager
def _caching_in(folder: str):
    before = os.environ.get("FLASHODE_CACHE")
    os.environ["FLASHODE_CACHE"] = folder
    try:
        yield
    finally:
        os.environ.pop("FLASHODE_CACHE")
        if before is not None:
            os.environ["FLASHODE_CACHE"] = before


# ---- the command -----------------------------------------------------------------------------


def main(arguments=None) -> int:
    parser = parser_of(__doc__, WORKLOADS)
    parser.add_argument("--jax-python", metavar="PYTHON", help="a Python that has jax and diffrax")
    parser.add_argument("--cold", action="store_true", help="also time the first calls")
    args, timer = parsed(parser, arguments, WORKLOADS)
    timer.clock, timer.turn = (
        time.process_time,
        2e-2,
    )  # a process finds the core's caches as another left them
    settings = {
        "device": "cpu", "threads": 1, "quick": args.quick, "repeats": timer.repeats, "clock": "process_time"
    }  # fmt: skip
    document = surroundings("cpu") | {"settings": settings, "contests": []}
    if args.jax_python:
        try:
            with Worker(args.jax_python, next(WORKLOADS["spiral"](True))) as worker:
                document["versions"] |= worker.versions
        except (OSError, RuntimeError) as error:
            parser.error(f"--jax-python: {error}")
        print(", ".join(f"{name} {version}" for name, version in worker.versions.items()), end=", ")
    print(headline(document))
    if not HAS_COMPILE:
        print("This flashode has no flashode.compile: compiled fields are left out.")
    if not args.jax_python:
        print("Without --jax-python, diffrax is left out.")
    contests = (
        (case, contest(w, args.jax_python)) for case in args.case for w in WORKLOADS[case](args.quick)
    )
    with pinned(1, "cpu"):
        refused = compete(contests, document, timer, TABLE, args.json)
        print(LEGEND, f"{len(document['contests'])} contests, {refused} refused", sep="\n")
        if args.cold:
            show_first_calls(args)
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Programs of fields that are written by hand in C++, and their calls by a `Problem`."""

import ctypes
import functools
import hashlib
import math
import subprocess
import tempfile
from pathlib import Path

import torch

from flashode.batched import BatchProblem
from flashode.problem import Problem
from flashode.program.call import Call, Interrupted, load
from flashode.program.tables import method_source

HEADERS = Path(__file__).resolve().parents[1] / "csrc" / "compiled"
ENTRIES = {
    "solve": "solve<Field, Method>",
    "reverse": "reverse<Field, Method>",
    "pull_back": "pull_back<Field>",
    "sweep": "sweep<Field, Method>",
    "solve_batch": "solve_batch<Field, Method>",
    "reverse_batch": "reverse_batch<Field, Method>",
    "pull_back_batch": "pull_back_batch<Field>",
}
FLAGS = "-O1 -march=native -fopenmp -fPIC -shared -std=c++17 -fno-math-errno -fno-trapping-math -Wall -Wextra".split()


@functools.cache
def _folder():
    return tempfile.TemporaryDirectory(prefix="flashode-programs-")


@functools.cache
def compiled(field: str, method, dense, entries: tuple[str, ...]) -> ctypes.CDLL:
    """The program of a field, given as the text of its struct, and a method."""
    source = f'#include "program.h"\nusing namespace flashode;\nnamespace {{\n{field}\n{method_source(method, dense)}}}\n'
    for entry in entries:
        source += f'extern "C" int flashode_{entry}(Call* call) {{ return {ENTRIES[entry]}(*call); }}\n'
    source += 'extern "C" int64_t flashode_call_size() { return sizeof(Call); }\n'
    source += 'extern "C" void flashode_release(void* recording) { release<Field>(recording); }\n'
    name = Path(_folder().name) / hashlib.sha256(source.encode()).hexdigest()[:16]
    name.with_suffix(".cpp").write_text(source)
    command = ["g++", *FLAGS, f"-I{HEADERS}", name.with_suffix(".cpp"), "-o", name.with_suffix(".so")]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return load(str(name.with_suffix(".so")))


class Program:
    """A field in C++, called as `odeint` is; ``backward`` is the entry that gradients come from."""

    def __init__(self, field: str, backward="reverse"):
        self.field, self.backward = field, backward

    def solve(
        self,
        func,
        y0,
        t,
        *,
        inputs=(),
        own=(),
        threads=1,
        rtol=1e-7,
        atol=1e-9,
        method="dopri5",
        options=None,
    ):
        kind = BatchProblem if (options or {}).get("batched") else Problem
        p = kind.from_call(func, y0.detach(), t.detach(), rtol, atol, method, options or {}, None)
        return Solved(self, p, inputs, own, threads)


class Solved:
    """A solve by a program, and its gradients."""

    def __init__(self, program, p, inputs, own, threads):
        self.p, self.batched = p, isinstance(p, BatchProblem)
        self.kept, self.backward = [], program.backward
        self.suffix = "_batch" * self.batched
        entries = ("solve" + self.suffix, self.backward + self.suffix)
        self.library = compiled(program.field, p.method, p.dense, entries)
        samples = p.y0.shape[0]
        width = p.y0[0].numel()
        self.inputs = [x.detach().contiguous() for x in inputs]
        self.own = [x.detach().contiguous() for x in own]
        self.ys = torch.full((p.t.shape[-1], *p.y0.shape), math.nan, dtype=p.y0.dtype)
        status = torch.zeros((4, samples), dtype=torch.int64)
        reals = torch.zeros((3, samples), dtype=torch.float64)
        call = self.call = Call(
            samples=samples, row=p.y0.numel(), offset=self.numbers(range(width)), stride=self.numbers([width] * width),
            y0=self.of(p.y0.contiguous()), ys=self.of(self.ys), y_end=self.of(torch.empty_like(p.y0)),
            member_count=1, members=self.numbers([0, width]), rtol=p.rtol, atol=p.atol,
            safety=p.control.safety, ifactor=p.control.ifactor, dfactor=p.control.dfactor,
            min_step=p.control.min_step, max_step=p.control.max_step, betas=(ctypes.c_double * 3)(*p.control.betas),
            first_step=math.nan if p.first_step is None else p.first_step, max_num_steps=p.max_num_steps,
            outputs=p.t.shape[-1], perturb=p.perturb, inputs=self.pointers(self.inputs), own=self.pointers(self.own),
            own_offset=self.numbers([0] * len(own)), own_stride=self.numbers([1] * len(own)), threads=threads,
            records=1, status=self.of(status[0]), accepted=self.of(status[1]), rejected=self.of(status[2]),
            filled=self.of(status[3]), t=self.of(reals[0]), dt=self.of(reals[1]), error_ratio=self.of(reals[2]),
            interrupted=Interrupted(),
        )  # fmt: skip
        if self.batched:
            shared = p.times.stride(0) == 0
            times = (p.times[:1] if shared else p.times).contiguous()
            call.times, call.times_stride = self.of(times), 0 if shared else p.times.shape[1]
            call.direction = self.of(p.direction.contiguous())
            call.low, call.high = (self.of(x.contiguous()) for x in p.time_bounds)
        else:
            call.times, call.direction = self.doubles(p.times), self.doubles([p.direction])
            call.low, call.high = (self.doubles([x]) for x in p.time_bounds)
            call.end, call.stop_count = p.end, len(p.stops)
            call.stops = self.doubles([s for s, _ in p.stops])
            call.stop_jumps = self.of(torch.tensor([jump for _, jump in p.stops], dtype=torch.uint8))
            if p.grid is not None:
                call.grid, call.grid_points = self.of(p.grid.detach().contiguous()), len(p.grid)
        self.status, self.accepted, self.rejected, self.reals = *status[:3], reals
        self.run("solve")

    def run(self, entry):
        assert getattr(self.library, f"flashode_{entry}{self.suffix}")(ctypes.byref(self.call)) == 0
        return self

    def of(self, x):
        self.kept.append(x)
        return x.data_ptr()

    def doubles(self, values):
        return self.of(torch.tensor(list(values), dtype=torch.float64))

    def numbers(self, values):
        return self.of(torch.tensor(list(values), dtype=torch.int64))

    def pointers(self, tensors):
        return self.numbers([0 if x is None else self.of(x) for x in tensors])

    def gradients(self, grad_ys, needs_time=True):
        """To y0, the times (on a grid of fixed steps: the grid), the shared inputs, and the constants."""
        p, call = self.p, self.call
        found = torch.full_like(p.y0, math.nan)
        inputs = [torch.zeros_like(x) for x in self.inputs]
        own = [torch.full_like(x, math.nan) for x in self.own]
        grad_t = torch.zeros(p.t.shape, dtype=torch.float64)
        grad_grid = None if p.grid is None else torch.zeros(p.grid.shape, dtype=torch.float64)
        call.grad_ys, call.adj_y0 = self.of(grad_ys.contiguous()), self.of(found)
        call.grad_inputs, call.grad_own = self.pointers(inputs), self.pointers(own)
        # Where steps are from one time to the next, an output is the end of a step and moves with it.
        call.grad_t = self.of(grad_t) if needs_time and not p.steps_on_times else None
        call.grad_grid = self.of(grad_grid) if needs_time and grad_grid is not None else None
        self.run(self.backward)
        return found, grad_t.to(p.t), grad_grid, inputs, own

    def turn(self, back, first_step, seminorm):
        """Makes the call one of a sweep, which ``back``, the problem with its times reversed, describes."""
        call = self.call
        call.times, call.direction = self.doubles(back.times), self.doubles([back.direction])
        call.low, call.high = (self.doubles([x]) for x in back.time_bounds)
        call.end, call.stop_count = back.end, len(back.stops)
        call.stops = self.doubles([s for s, _ in back.stops])
        call.stop_jumps = self.of(torch.tensor([jump for _, jump in back.stops], dtype=torch.uint8))
        call.first_step, call.seminorm = first_step, seminorm
        if back.grid is not None:
            call.grid, call.grid_points = self.of(back.grid.contiguous()), len(back.grid)
        call.input_sizes, call.input_count = self.numbers([x.numel() for x in self.inputs]), len(self.inputs)
        return self

    def __del__(self):
        if getattr(self, "call", None) is not None and self.call.recording:
            self.library.flashode_release(ctypes.c_void_p(self.call.recording))

"""The CUDA kernels, run on the host by the emulator in cuda_on_host/: indexing, sums, last block."""

import ctypes
import math
import mmap
import re
import shutil
import subprocess
import sys
from ctypes import c_bool, c_char, c_char_p, c_double, c_int, c_int64, c_uint, c_uint64, c_void_p
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch

from flashode.control import ELEMENTARY, Controller, next_step

HERE = Path(__file__).parent / "cuda_on_host"
KERNELS = Path(__file__).parents[1] / "csrc" / "kernels"

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # in the order of rk.h's Dtype
SIXTEEN = DTYPES[2:]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SIZES = [1, 31, 33, 1000, 4097]
MAX_TERMS = 20
MAX_BLOCKS = [1, 3, 1056]  # every thread loops; some do; none does, as on a GPU for small states

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_sixteen = pytest.mark.parametrize("dtype", SIXTEEN, ids=lambda d: str(d).removeprefix("torch."))

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels for the host"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs ucontext and its signals"),
]


# ---- building --------------------------------------------------------------------------------

TRANSLATION = [
    (
        r"kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>\(stream\)>>>\(arguments\.\.\.\);",
        r"on_host::launch(grid, kThreads, [&] { kernel(arguments...); });",
    ),
    (r"__shared__ (\w+) (\w+)(\[\w+\])?;", r"auto& \2 = on_host::shared<\1\3>(__LINE__);"),
    # A warp is enough to show a fault. The number of blocks is varied from test to test.
    (r"constexpr int kThreads = \d+;", "constexpr int kThreads = 32;"),
    (r"constexpr int64_t kMaxBlocks =", "int64_t kMaxBlocks ="),
]


CUDA_SOURCES = ["cuda_block.h", "cuda.cu", "cuda_batched.cu"]


def translate(folder):
    """Writes the CUDA sources into a folder, their launches turned into calls of the emulator."""
    unused = {pattern for pattern, _ in TRANSLATION}
    for name in CUDA_SOURCES:
        source = (KERNELS / name).read_text()
        for pattern, replacement in TRANSLATION:
            source, found = re.subn(pattern, replacement, source)
            unused -= {pattern} if found else set()
        assert "<<<" not in source and "__shared__" not in source
        (folder / name).write_text(f'#line 1 "{KERNELS / name}"\n{source}')
    assert not unused, f"the CUDA sources no longer have {unused}: change the translation with them"


class Operands(ctypes.Structure):
    """driver.cpp's struct of the same name."""

    _fields_ = (
        [(name, c_int) for name in ("dtype", "count")]
        + [(name, c_int64) for name in ("n", "rows", "members")]
        + [(name, c_void_p) for name in ("y0", "y1", "k", "coef")]
        + [(name, c_double) for name in ("rtol", "atol")]
        + [(name, c_void_p) for name in ("each_rtol", "each_atol", "offsets", "segments")]
    )


class Segment(ctypes.Structure):
    _fields_ = [("n", c_int64)] + [(name, c_void_p) for name in ("slope", "base", "value", "error")]


class Control(ctypes.Structure):
    _fields_ = [
        ("order", c_int),
        *((name, c_double) for name in ("safety", "ifactor", "dfactor", "min_step", "max_step")),
        ("betas", c_double * 3),
        ("past", c_double * 2),
    ]


class BatchOperands(ctypes.Structure):
    """driver.cpp's struct of the same name."""

    _fields_ = (
        [("dtype", c_int), ("stages", c_int)]
        + [(name, c_int64) for name in ("count", "outputs", "members", "width", "widest", "caller")]
        + [("reals", c_void_p), ("wholes", c_void_p), ("times", c_void_p), ("offsets", c_void_p)]
        + [("steps", c_void_p), ("each_rtol", c_void_p), ("rtol", c_double), ("atol", c_double)]
        + [("control", Control), ("scratch", c_void_p)]
    )


class Tally(ctypes.Structure):
    _fields_ = [("running", c_uint), ("inside", c_uint)]


class Decision(ctypes.Structure):
    _fields_ = [("error_ratio", c_double), ("next_dt", c_double), ("accepted", c_bool)]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The kernels of both devices as a library."""
    folder = tmp_path_factory.mktemp("cuda_on_host")
    translate(folder)
    flags = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", f"-I{HERE}", f"-I{folder}", f"-I{KERNELS}"]
    objects = [folder / name for name in ("driver.o", "cpu.o", "cpu_batched.o")]
    sources = [HERE / "driver.cpp", KERNELS / "cpu.cpp", KERNELS / "cpu_batched.cpp"]
    compilers = [
        subprocess.Popen(["g++", *flags, "-c", source, "-o", target], stderr=subprocess.PIPE, text=True)
        for source, target in zip(sources, objects)
    ]
    messages = [compiler.communicate()[1] for compiler in compilers]
    assert not any(compiler.returncode for compiler in compilers), "\n".join(messages)
    subprocess.run(["g++", "-shared", *objects, "-o", folder / "host.so"], check=True)

    library = ctypes.CDLL(str(folder / "host.so"))
    library.schedule.argtypes = c_uint64, c_int64
    library.error_text.restype = c_char_p
    library.cuda_combine.argtypes = c_void_p, c_void_p, c_void_p, c_double
    library.cpu_combine.argtypes = c_void_p, c_void_p
    library.cuda_scaled_error.argtypes = c_void_p, c_void_p
    library.cpu_scaled_error.argtypes = c_void_p, c_void_p
    library.inner_scratch_bytes.argtypes = (c_void_p,)
    library.inner_scratch_bytes.restype = c_int64
    library.cuda_inner.argtypes = (c_void_p,) * 4
    library.cpu_inner.argtypes = (c_void_p,) * 3
    library.norm_scratch_bytes.argtypes = c_int64, c_int64
    library.norm_scratch_bytes.restype = c_int64
    library.cuda_error_norm.argtypes = c_void_p, c_int64, *[c_void_p] * 3, c_double, c_double, c_void_p
    library.cpu_error_norm.argtypes = (c_void_p,)
    library.cpu_error_norm.restype = c_double
    library.cuda_accumulate.argtypes = library.cpu_accumulate.argtypes = c_void_p, c_double, c_double, c_bool
    library.segment_scratch_bytes.argtypes = (c_void_p,)
    library.segment_scratch_bytes.restype = c_int64
    library.cuda_segment_norm.argtypes = c_void_p, c_void_p, c_void_p, c_double
    library.cpu_segment_norm.argtypes = (c_void_p,)
    library.cpu_segment_norm.restype = c_double
    library.decision_of.argtypes = c_double, c_double, c_void_p, c_void_p
    library.widen_all.argtypes = library.narrow_all.argtypes = c_int, c_void_p, c_void_p, c_int64
    library.round_times.argtypes = c_int, c_void_p, c_int, c_void_p, c_int64
    library.sum_twice.argtypes = c_void_p, c_void_p
    for name, pointers in (
        ("stage", 5),
        ("probe", 2),
        ("first_trials", 3),
        ("begin", 0),
        ("judge", 5),
        ("commit", 7),
    ):
        getattr(library, f"batch_{name}").argtypes = c_bool, c_void_p, *[c_void_p] * pointers
    return library


def succeed(host, error):
    assert error == 0, host.error_text(error).decode()


# ---- states ----------------------------------------------------------------------------------

mprotect = ctypes.CDLL(None, use_errno=True).mprotect
mprotect.argtypes = c_void_p, ctypes.c_size_t, c_int


def guarded(values):
    """The values in memory that ends at an unmapped page: access past their end is a fault."""
    if values.nbytes == 0:
        return values
    used = -(-values.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, used + mmap.PAGESIZE)
    address = ctypes.addressof(c_char.from_buffer(memory))
    assert mprotect(address + used, mmap.PAGESIZE, 0) == 0
    offset = used - values.nbytes
    return torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset).copy_(values)


class Target:
    """Where an operation writes n elements: NaN before, with more of them in front."""

    def __init__(self, dtype, n, margin=8):
        self.whole = guarded(torch.full((margin + n,), math.nan, dtype=dtype))
        self.untouched = bits(self.whole[:margin]).clone()
        self.margin, self.values = margin, self.whole[margin:]
        self.address = self.values.data_ptr()

    def written(self):
        assert torch.equal(bits(self.whole[: self.margin]), self.untouched)
        return self.values


def bits(x):
    return x.view(INTEGERS[x.element_size()])


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def state(n, dtype):
    """Numbers of many magnitudes, so that every rounding shows."""
    magnitude = torch.exp2(torch.randint(-8, 9, (n,)))
    return guarded((torch.randn(n, dtype=torch.float64) * magnitude).to(dtype))


class Case:
    """Random operands, as tensors for the reference and as addresses for the kernels."""

    def __init__(self, dtype, n, count, rows=1, rtol=1e-3, atol=1e-2, sizes=None):
        self.dtype, self.n, self.rows = dtype, n, rows
        self.y0, self.y1 = state(n, dtype), state(n, dtype)
        self.k = [state(n, dtype) for _ in range(count)]
        self.coef = torch.randn(rows, count, dtype=torch.float64)
        self.rtol, self.atol = rtol, atol
        self.sizes = sizes or [n]
        self.offsets = guarded(torch.tensor([0, *accumulate(self.sizes)]))

    def operands(self):
        pointers = (c_void_p * MAX_TERMS)(*(k.data_ptr() for k in self.k))
        each = {
            f"each_{name}": value.data_ptr()
            for name in ("rtol", "atol")
            if isinstance(value := getattr(self, name), torch.Tensor)
        }
        uniform = {name: getattr(self, name) for name in ("rtol", "atol") if f"each_{name}" not in each}
        operands = Operands(
            dtype=DTYPES.index(self.dtype), count=len(self.k), n=self.n, rows=self.rows,
            members=len(self.sizes), y0=None if self.y0 is None else self.y0.data_ptr(), y1=self.y1.data_ptr(),
            k=ctypes.cast(pointers, c_void_p), coef=self.coef.data_ptr(),
            offsets=self.offsets.data_ptr(), **each, **uniform,
        )  # fmt: skip
        operands.alive = pointers
        return ctypes.byref(operands)

    def weighted_sums(self):
        """One a row, in the order of the terms, each operation rounded to the wide dtype."""
        coef = self.coef.to(wide(self.dtype))
        totals = torch.zeros(self.rows, self.n, dtype=coef.dtype)
        for j, k in enumerate(self.k):
            product = coef[:, j : j + 1] * k.to(coef.dtype)
            totals = product if j == 0 else totals + product
        return totals

    def combined(self):
        y0 = torch.zeros(()) if self.y0 is None else self.y0
        return (y0.to(wide(self.dtype)) + self.weighted_sums()).to(self.dtype).flatten()

    def scaled_error(self):
        y0, y1 = self.y0.to(wide(self.dtype)), self.y1.to(wide(self.dtype))
        rtol, atol = (torch.as_tensor(tol, dtype=y0.dtype) for tol in (self.rtol, self.atol))
        return self.weighted_sums()[0] / (atol + rtol * torch.maximum(y0.abs(), y1.abs()))

    def error_norm(self):
        errors = self.scaled_error().double()
        return max(math.sqrt(math.fsum(e.square()) / len(e)) for e in errors.split(self.sizes) if len(e))


# ---- combine ---------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("rows", [1, 3, 40])  # 16 travel with a launch
@pytest.mark.parametrize("from_zero", [False, True], ids=["from y0", "from zero"])
def test_combine_has_the_same_bits_everywhere(host, dtype, n, rows, from_zero):
    for count in [*range(18), MAX_TERMS]:
        case = Case(dtype, n, count, rows)
        if from_zero:
            case.y0 = None
        expected, on_cpu, on_gpu = case.combined(), Target(dtype, rows * n), Target(dtype, rows * n)
        host.schedule(count, MAX_BLOCKS[count % 3])
        succeed(host, host.cuda_combine(case.operands(), on_gpu.address, None, 0))
        host.cpu_combine(case.operands(), on_cpu.address)
        assert torch.equal(bits(on_cpu.written()), bits(expected))
        assert torch.equal(bits(on_gpu.written()), bits(expected))


@by_dtype
def test_combine_may_write_over_y0(host, dtype):
    for combine in (
        lambda case: host.cpu_combine(case.operands(), case.y0.data_ptr()),
        lambda case: host.cuda_combine(case.operands(), case.y0.data_ptr(), None, 0),
    ):
        case = Case(dtype, 1000, 5)
        expected = case.combined()
        host.schedule(0, 3)
        combine(case)
        assert torch.equal(bits(case.y0), bits(expected))


@by_dtype
@pytest.mark.parametrize("n", [0, 1000])
def test_combine_writes_the_time_that_func_sees(host, dtype, n):
    for value in (0.1, -3.0, 1e-6, 70000.0):
        time = Target(dtype, 1)
        case, out = Case(dtype, n, 2, rows=17), Target(dtype, 17 * n)
        host.schedule(0, 3)
        succeed(host, host.cuda_combine(case.operands(), out.address, time.address, value))
        assert torch.equal(bits(time.written()), bits(torch.tensor([value], dtype=dtype)))


@by_dtype
def test_not_finite_elements_stay_where_they_are(host, dtype):
    case, out = Case(dtype, 1000, 3), Target(dtype, 1000)
    case.k[1][10], case.k[2][20], case.y0[999] = math.nan, math.inf, -math.inf
    host.schedule(0, 3)
    succeed(host, host.cuda_combine(case.operands(), out.address, None, 0))
    assert torch.equal(out.written().isnan(), case.combined().isnan())
    assert torch.equal(out.written().nan_to_num(), case.combined().nan_to_num())


# ---- inner products ------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("n", [0, *SIZES])
@pytest.mark.parametrize("rows", [1, 3])
def test_inner_products_of_rows_and_slopes(host, dtype, n, rows):
    """To a few roundings of double, whatever the order of the blocks."""
    for count in (1, 7, MAX_TERMS):
        case, g = Case(dtype, n, count, rows), state(rows * n, dtype)
        on_cpu = Target(torch.float64, rows * count)
        host.cpu_inner(case.operands(), g.data_ptr(), on_cpu.address)
        results = []
        for seed in range(2):
            host.schedule(seed, MAX_BLOCKS[count % 3])
            doubles = host.inner_scratch_bytes(case.operands()) // 8
            scratch = guarded(torch.full((doubles,), math.nan, dtype=torch.float64))
            on_gpu = Target(torch.float64, rows * count)
            error = host.cuda_inner(case.operands(), g.data_ptr(), on_gpu.address, scratch.data_ptr())
            succeed(host, error)
            results.append(on_gpu.written())
        assert torch.equal(*results)
        products = g.double().view(rows, 1, n) * torch.stack(case.k).double()
        scale = products.abs().sum(-1).flatten() * 1e-14
        for result in (on_cpu.written(), results[0]):
            assert ((result - products.sum(-1).flatten()).abs() <= scale).all()


# ---- errors ----------------------------------------------------------------------------------


def tolerances(case, each):
    """The case with tolerances of every element in place of the ones named in ``each``."""
    for name in each:
        setattr(case, name, guarded(state(case.n, wide(case.dtype)).abs() + 1e-3))
    return case


by_tolerances = pytest.mark.parametrize(
    "each", [(), ("rtol",), ("atol",), ("rtol", "atol")], ids=lambda each: "+".join(each) or "uniform"
)


@by_dtype
@by_tolerances
@pytest.mark.parametrize("n", SIZES)
def test_scaled_error_has_the_same_bits_everywhere(host, dtype, n, each):
    for count in (1, 6, 7, 17):
        case = tolerances(Case(dtype, n, count), each)
        on_cpu, on_gpu = Target(wide(dtype), n), Target(wide(dtype), n)
        host.schedule(count, MAX_BLOCKS[count % 3])
        succeed(host, host.cuda_scaled_error(case.operands(), on_gpu.address))
        host.cpu_scaled_error(case.operands(), on_cpu.address)
        assert torch.equal(bits(on_cpu.written()), bits(case.scaled_error()))
        assert torch.equal(bits(on_gpu.written()), bits(case.scaled_error()))


class Norm:
    """Repeated norms of one case, with one scratch: only the counter and the norm so far start at zero."""

    def __init__(self, host, case, max_blocks):
        self.host, self.case, self.max_blocks = host, case, max_blocks
        self.longest = max(case.sizes)
        host.schedule(0, max_blocks)
        doubles = host.norm_scratch_bytes(self.longest, len(case.sizes)) // 8
        self.scratch = guarded(torch.tensor([0.0] * 2 + [math.nan] * (doubles - 2), dtype=torch.float64))

    def __call__(self, seed=0, dt=1.0, control=None):
        """What the kernel says of the norm and of the step."""
        norm, decision = Target(torch.float64, 1), Decision()
        self.host.schedule(seed, self.max_blocks)
        error = self.host.cuda_error_norm(
            self.case.operands(), self.longest, self.scratch.data_ptr(), norm.address,
            ctypes.byref(decision), 0.0, dt, ctypes.byref(control or Control(order=5, max_step=math.inf)),
        )  # fmt: skip
        succeed(self.host, error)
        assert not bits(self.scratch)[:2].any(), "the counter and the norm so far are not left at zero"
        return norm.written().item(), decision


MEMBERS = {
    "one": [5000],
    "three": [1, 0, 4097],
    "forty": [0, 1500, *[1, 31, 33, 0, 100, 128, 129, 7] * 4, 0, 1000, 2, 0, 640, 0],
    "empty": [0, 0],
}


@by_dtype
@pytest.mark.parametrize("max_blocks", MAX_BLOCKS)
@pytest.mark.parametrize("sizes", ["one", "three", "forty"])
def test_error_norm_does_not_depend_on_the_order_of_the_blocks(host, dtype, sizes, max_blocks):
    sizes = MEMBERS[sizes]
    case = Case(dtype, sum(sizes), 7, sizes=sizes)
    norm = Norm(host, case, max_blocks)
    first, *others = [norm(seed)[0] for seed in range(4)]
    assert all(other == first for other in others)
    assert first == pytest.approx(case.error_norm(), rel=1e-14)
    assert host.cpu_error_norm(case.operands()) == pytest.approx(case.error_norm(), rel=1e-14)


@by_dtype
@by_tolerances
def test_error_norm_takes_tolerances_of_every_element(host, dtype, each):
    sizes = MEMBERS["three"]
    case = tolerances(Case(dtype, sum(sizes), 3, sizes=sizes), each)
    assert Norm(host, case, 3)()[0] == pytest.approx(case.error_norm(), rel=1e-14)
    assert host.cpu_error_norm(case.operands()) == pytest.approx(case.error_norm(), rel=1e-14)


def test_the_largest_member_decides_wherever_it_is(host):
    sizes = [300, 5, 0, 1000]
    for member, size in enumerate(sizes):
        if size == 0:
            continue
        case = Case(torch.float32, sum(sizes), 4, sizes=sizes)
        for k in case.k:
            k.split(sizes)[member].mul_(1000)
        assert Norm(host, case, 3)()[0] == pytest.approx(case.error_norm(), rel=1e-14)


@by_dtype
@pytest.mark.parametrize("at", [0, 4, 5, 1304])
def test_error_norm_keeps_what_is_not_finite(host, dtype, at):
    sizes = [5, 0, 300, 1000]
    for y1, k, other, expected in [
        (math.nan, 1.0, 1.0, math.nan),
        (math.inf, 1.0, 1.0, math.nan),
        (1.0, math.inf, 1.0, math.inf),
        (1.0, 1.0, math.inf, math.inf),
        (math.nan, 1.0, math.inf, math.nan),  # an infinite norm hides no NaN of a later member
    ]:
        case = Case(dtype, sum(sizes), 2, sizes=sizes)
        case.y1[at], case.k[0][at], case.k[1][2] = y1, k, other
        case.coef.abs_()
        norm, decision = Norm(host, case, 3)()
        assert norm == pytest.approx(expected, nan_ok=True)
        assert host.cpu_error_norm(case.operands()) == pytest.approx(expected, nan_ok=True)
        assert not decision.accepted


def test_one_scratch_serves_many_norms(host):
    norm = Norm(host, Case(torch.float32, 4097, 7), 1056)
    for seed in range(20):
        norm.case.k = [state(4097, torch.float32) for _ in range(7)]
        assert norm(seed)[0] == pytest.approx(norm.case.error_norm(), rel=1e-14)


@pytest.mark.parametrize("betas", [ELEMENTARY, (0.49, -0.34, 0.1)])
def test_the_decision_is_that_of_control(host, betas):
    control = Control(5, 0.9, 10.0, 0.2, 1e-3, 2.0, betas, (0.5, 0.25))
    python = Controller(5, 0.9, 10.0, 0.2, 1e-3, 2.0, betas)
    for scale in (0.0, 1e-9, 1e-2, 1.0, 30.0, 1e9, math.nan):
        case = Case(torch.float64, 1000, 7, sizes=[600, 400], rtol=1.0, atol=1.0)
        case.coef *= scale
        for dt in (1e-3, 0.1, 1.9):
            norm, decision = Norm(host, case, 1056)(dt=dt, control=control)
            expected = Decision()
            host.decision_of(norm, dt, ctypes.byref(control), ctypes.byref(expected))
            assert decision.accepted == expected.accepted
            assert decision.next_dt == expected.next_dt
            assert expected.next_dt == pytest.approx(next_step(norm, dt, python, (0.5, 0.25)), rel=1e-14)
            np.testing.assert_equal([decision.error_ratio], [norm])


@pytest.mark.parametrize("asked", ["norm", "decision"])
def test_the_norm_and_the_decision_come_alone_too(host, asked):
    norm = Norm(host, Case(torch.float32, 1000, 7), 1056)
    value, decision = torch.zeros(1, dtype=torch.float64), Decision()
    host.schedule(0, 1056)
    error = host.cuda_error_norm(
        norm.case.operands(), 1000, norm.scratch.data_ptr(), value.data_ptr() if asked == "norm" else None,
        ctypes.byref(decision) if asked == "decision" else None, 0.0, 1.0, ctypes.byref(Control(order=5)),
    )  # fmt: skip
    succeed(host, error)
    given = value.item() if asked == "norm" else decision.error_ratio
    assert given == norm()[0]


@by_dtype
def test_an_empty_state_is_no_fault(host, dtype):
    case = Case(dtype, 0, 7, rows=3, sizes=MEMBERS["empty"])
    host.schedule(0, 1056)
    succeed(host, host.cuda_combine(case.operands(), None, None, 0))
    succeed(host, host.cuda_scaled_error(case.operands(), None))
    norm, decision = Norm(host, case, 1056)()
    assert norm == host.cpu_error_norm(case.operands()) == 0
    assert decision.accepted


def test_block_sum_gives_every_thread_the_sum_in_a_fixed_order(host):
    threads = host.threads_per_block()
    for seed in range(20):
        values = torch.randn(2, threads, dtype=torch.float64)
        sums = guarded(torch.full_like(values, math.nan).flatten()).view_as(values)
        host.schedule(seed, 1)
        succeed(host, host.sum_twice(values.data_ptr(), sums.data_ptr()))
        expected = values
        while expected.shape[1] > 1:
            first, second = expected.chunk(2, dim=1)
            expected = first + second
        assert torch.equal(sums, expected.expand_as(sums))


@pytest.mark.parametrize(
    ("fault", "code"), [(0, 719), (1, 719), (2, 700), (3, 9), (4, 9)],
    ids=["early return", "two barriers", "bad access", "no blocks", "too many members"],
)  # fmt: skip
def test_the_emulator_refuses_what_cuda_does_not_define(host, fault, code):
    assert host.faulty(fault) == code


# ---- quadrature ------------------------------------------------------------------------------

SEGMENTS = [1, 0, 31, 33, 4097, *[5, 128, 129] * 25, 3000]  # more than travel with one launch


class Quadrature:
    """Tensors that are integrated by quadrature, as a table of segments."""

    def __init__(self, dtype, sizes, with_error=True):
        self.dtype, self.sizes = dtype, sizes
        n = sum(sizes)
        self.slope, self.base = state(n, dtype), state(n, dtype)
        self.value = Target(dtype, n)
        self.error = Target(dtype, n) if with_error else None

    def operands(self, without_slope=(), in_place=False, **numbers):
        segments, begin = (Segment * len(self.sizes))(), 0
        for i, (segment, n) in enumerate(zip(segments, self.sizes)):
            offset = begin * self.dtype.itemsize
            segment.n = n
            segment.value = self.value.address + offset
            segment.base = segment.value if in_place else self.base.data_ptr() + offset
            segment.slope = None if i in without_slope else self.slope.data_ptr() + offset
            segment.error = self.error.address + offset if self.error else None
            begin += n
        operands = Operands(
            dtype=DTYPES.index(self.dtype), rows=len(self.sizes),
            segments=ctypes.cast(segments, c_void_p), **numbers,
        )  # fmt: skip
        operands.alive = segments
        return ctypes.byref(operands)


@by_dtype
@pytest.mark.parametrize("on", ["cuda", "cpu"])
@pytest.mark.parametrize("with_error", [True, False])
def test_quadrature_adds_up_slopes(host, dtype, on, with_error):
    """The first slope of a step starts from base, over whatever was there; one that is missing is zero."""
    case = Quadrature(dtype, SEGMENTS, with_error)
    missing = {2, 4, 7}
    absent = torch.cat([torch.full((n,), i in missing) for i, n in enumerate(SEGMENTS)])
    value, error = case.base.to(wide(dtype)), torch.zeros(len(case.base), dtype=wide(dtype))
    for step, (w_value, w_error) in enumerate([(0.3, -0.01), (-1.7, 0.2), (0.1, 0.0)]):
        case.slope.copy_(state(len(case.slope), dtype))
        without = missing if step != 1 else ()
        host.schedule(step, MAX_BLOCKS[step])
        operands = case.operands(without, in_place=step > 0)
        result = getattr(host, f"{on}_accumulate")(operands, w_value, w_error, step == 0)
        if on == "cuda":
            succeed(host, result)
        slope = case.slope.to(wide(dtype)).masked_fill(absent, 0) if without else case.slope.to(wide(dtype))
        value = (value + torch.tensor(w_value, dtype=wide(dtype)) * slope).to(dtype).to(wide(dtype))
        error = (error + torch.tensor(w_error, dtype=wide(dtype)) * slope).to(dtype).to(wide(dtype))
        assert torch.equal(bits(case.value.written()), bits(value.to(dtype)))
        if with_error:
            assert torch.equal(bits(case.error.written()), bits(error.to(dtype)))


def segment_norm(host, case, seed=0, max_blocks=3, known=0.0):
    """On both devices; the scratch of a GPU is used twice."""
    operands = case.operands(rtol=1e-3, atol=1e-2)
    host.schedule(seed, max_blocks)
    doubles = host.segment_scratch_bytes(operands) // 8
    scratch = guarded(torch.tensor([0.0] * 2 + [math.nan] * (doubles - 2), dtype=torch.float64))
    norms = []
    for _ in range(2):
        norm = Target(torch.float64, 1)
        succeed(host, host.cuda_segment_norm(operands, scratch.data_ptr(), norm.address, known))
        norms.append(norm.written().item())
    np.testing.assert_equal(norms[0], norms[1])
    return norms[0], host.cpu_segment_norm(operands)


def filled(dtype, sizes):
    """A step that has been taken."""
    case = Quadrature(dtype, sizes)
    case.value.values.copy_(state(sum(sizes), dtype))
    case.error.values.copy_(state(sum(sizes), dtype))
    return case


def alone(case, i):
    """One segment as a flat state with its error as the only slope."""
    y0, y1, error = (x.split(case.sizes)[i] for x in (case.base, case.value.values, case.error.values))
    like = Case(case.dtype, len(y0), 0, sizes=[len(y0)])
    like.y0, like.y1, like.k, like.coef = y0, y1, [error], torch.ones(1, 1, dtype=torch.float64)
    return like


@by_dtype
def test_the_norm_of_segments_is_the_largest_of_their_error_norms(host, dtype):
    case = filled(dtype, SEGMENTS)
    each = [alone(case, i) for i, n in enumerate(SEGMENTS) if n]
    on_gpu, on_cpu = segment_norm(host, case)
    assert on_cpu == max(host.cpu_error_norm(one.operands()) for one in each)
    assert on_gpu == pytest.approx(max(one.error_norm() for one in each), rel=1e-14)
    assert segment_norm(host, case, seed=5)[0] == on_gpu
    assert segment_norm(host, case, known=2 * on_gpu)[0] == 2 * on_gpu


def test_the_norm_of_segments_keeps_what_is_not_finite(host):
    for where in (0, 40, -1):  # in the first table, and in the last
        case = filled(torch.float32, SEGMENTS)
        case.error.values[where] = math.inf
        assert segment_norm(host, case) == (math.inf, math.inf)
        case.value.values[64] = math.nan
        np.testing.assert_equal(segment_norm(host, case), (math.nan, math.nan))


def test_norms_of_several_parts_make_one_decision(host):
    """A state and two tables of segments, each the largest once; then what the host knows already."""
    host.schedule(0, 3)
    for largest in range(4):
        whole = Case(torch.float32, 5000, 4, sizes=[1000, 4000])
        tables = [filled(torch.float32, SEGMENTS), filled(torch.float64, [7, 200])]
        for i, part in enumerate([whole.k[0], *(table.error.values for table in tables)]):
            part.mul_(1e4 if i == largest else 1e-3)
        known = 1e9 if largest == 3 else 0.5
        expected = max(known, host.cpu_error_norm(whole.operands()),
                       *(host.cpu_segment_norm(t.operands(rtol=1e-3, atol=1e-2)) for t in tables))  # fmt: skip
        operands = [table.operands(rtol=1e-3, atol=1e-2) for table in tables]
        size = max(host.norm_scratch_bytes(4000, 2), *(host.segment_scratch_bytes(o) for o in operands))
        scratch = guarded(torch.tensor([0.0] * 2 + [math.nan] * (size // 8), dtype=torch.float64))
        for table in operands:
            succeed(host, host.cuda_segment_norm(table, scratch.data_ptr(), None, 0.0))
        decision = Decision()
        error = host.cuda_error_norm(
            whole.operands(), 4000, scratch.data_ptr(), None, ctypes.byref(decision), known, 1.0,
            ctypes.byref(Control(order=5, max_step=math.inf)),
        )  # fmt: skip
        succeed(host, error)
        assert decision.error_ratio == pytest.approx(expected, rel=1e-14)
        assert not bits(scratch)[:2].any()


# ---- 16-bit floats and times -----------------------------------------------------------------


def every_pattern(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def same(x, y):
    """Bitwise equal, but for what a NaN carries."""
    assert torch.equal(x.isnan(), y.isnan())
    assert torch.equal(bits(x)[~x.isnan()], bits(y)[~y.isnan()])


@by_sixteen
def test_every_16_bit_float_widens(host, dtype):
    given, result = every_pattern(dtype), torch.empty(2**16)
    host.widen_all(DTYPES.index(dtype), given.data_ptr(), result.data_ptr(), 2**16)
    same(result, given.float())
    if dtype == torch.float16:
        same(result, torch.from_numpy(given.numpy().astype(np.float32)))


@by_sixteen
def test_floats_round_to_16_bits_ties_to_even(host, dtype):
    values = every_pattern(dtype).float()
    values = values[values.isfinite()].sort().values
    ties = (values[1:] / 2 + values[:-1] / 2).unique()
    beyond = torch.tensor([65519.996, 65520, 65536, 3.3961775e38, 3.4028235e38, math.inf, math.nan])
    exact = torch.cat([values, ties, beyond, -beyond])
    near = [torch.nextafter(exact, torch.tensor(toward)) for toward in (-math.inf, math.inf)]
    anything = torch.randint(-(2**31), 2**31, (2**19,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    given = torch.cat([exact, *near, anything])
    result = torch.empty(len(given), dtype=dtype)
    host.narrow_all(DTYPES.index(dtype), given.data_ptr(), result.data_ptr(), len(given))
    same(result, given.to(dtype))
    if dtype == torch.float16:
        with np.errstate(all="ignore"):
            same(result, torch.from_numpy(given.numpy().astype(np.float16)))


@by_dtype
@pytest.mark.parametrize("nudge", [-1, 0, 1])
def test_times_round_as_torch_rounds_them(host, dtype, nudge):
    special = torch.tensor([0.0, -0.0, 1e-300, 65520, -65520, 1e300, -1e300, math.inf, -math.inf, math.nan])
    anything = torch.randn(4096, dtype=torch.float64) * torch.exp2(torch.randint(-160, 140, (4096,)))
    t = torch.cat([special.double(), anything, *(every_pattern(d).double() for d in SIXTEEN)])
    result = torch.empty_like(t)
    host.round_times(DTYPES.index(dtype), t.data_ptr(), nudge, result.data_ptr(), len(t))
    expected = t.to(dtype)
    if nudge:
        expected = torch.nextafter(expected, torch.tensor(nudge * math.inf, dtype=dtype))
    same(result, expected.double())
    if nudge and dtype == torch.float16:
        with np.errstate(all="ignore"):
            toward = np.float16(nudge * math.inf)
            same(result, torch.from_numpy(np.nextafter(t.to(dtype).numpy(), toward)).double())


# ---- batches of samples solved on their own --------------------------------------------------

REALS = ["t0", "t1", "size", "step", "dt", "error_ratio", "past0", "past1", "direction", "low", "high"]
WHOLES = ["sample", "filled", "accepted", "rejected", "trials", "status", "cause", "verdict"]
RUNNING = -1


class Device:
    """A batch in the memory of one device: every step of a solve, on the CPU or on the emulator."""

    def __init__(self, host, gpu, dtype, widths, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.host, self.gpu, self.dtype, self.count = host, gpu, dtype, count
        width = sum(widths)
        self.y0, self.y1, self.f0, self.f1, *self.k = (
            guarded(torch.randn(count * width, generator=generator).to(dtype)) for _ in range(9)
        )
        self.k[0] = self.f0
        self.reals = guarded(torch.full((len(REALS) * count,), math.nan, dtype=torch.float64)).view(-1, count)
        self.wholes = guarded(torch.zeros(len(WHOLES) * count, dtype=torch.int64)).view(-1, count)
        caller = count + 3  # the first three samples have left the batch
        self.times = torch.linspace(0, 2, 9, dtype=torch.float64) * torch.arange(1, caller + 1)[:, None]
        self.times = guarded(self.times.flatten()).view(caller, 9)
        draws = torch.rand(count, dtype=torch.float64, generator=generator)
        of = self.real
        of("t0")[:], of("dt")[:], of("direction")[:] = 0.1 * draws, 0.5 * draws, (draws > 0.5) * 2.0 - 1
        of("low")[:], of("high")[:], of("step")[:] = 0.0, self.times[3:, -1], 0.0
        of("past0")[:], of("past1")[:] = 0.5, 0.25
        self.whole("sample")[:], self.whole("filled")[:] = torch.arange(3, caller), 1
        self.whole("status")[:] = RUNNING
        self.whole("status")[::5] = 0
        self.whole("cause")[:] = 2
        self.whole("trials")[1::7] = 10  # one more is allowed
        scale = torch.exp2(torch.randint(-9, 3, (count,), generator=generator).float())  # of the slopes
        self.k = [guarded((k.float() * self.of_elements(scale, widths)).to(dtype)) for k in self.k]
        self.f0 = self.k[0]
        self.k[3][width // 2 :: 7 * max(width, 1)] = math.nan
        self.ys = guarded(torch.zeros(9 * caller * width, dtype=dtype))
        self.out, self.t = (Target(dtype, n) for n in (count * width, count))
        self.offsets = guarded(torch.tensor([0, *accumulate(widths)]))
        self.each = guarded(torch.rand(count * width, generator=generator).to(wide(dtype)) * 1e-2)
        short = not gpu and max(widths) < 16
        self.steps = guarded(torch.zeros(count * width, dtype=torch.float64)) if short else None
        self.scratch = guarded(torch.zeros(3, dtype=torch.int32))
        self.weights = torch.linspace(-1, 1, len(self.k), dtype=torch.float64)
        self.dense = torch.randn(4, len(self.k), dtype=torch.float64, generator=generator)
        self.pointers = (c_void_p * MAX_TERMS)(*(k.data_ptr() for k in self.k))
        self.operands = BatchOperands(
            dtype=DTYPES.index(dtype), stages=len(self.k), count=count, outputs=9, members=len(widths), width=width,
            widest=max(widths), caller=caller, reals=self.reals.data_ptr(), wholes=self.wholes.data_ptr(),
            times=self.times.data_ptr(), offsets=self.offsets.data_ptr(), steps=short and self.steps.data_ptr() or None,
            each_rtol=self.each.data_ptr(), rtol=0.0, atol=1e-3,
            control=Control(5, 0.9, 10.0, 0.2, 0.0, 2.0, (0.49, -0.34, 0.1)), scratch=self.scratch.data_ptr(),
        )  # fmt: skip

    def real(self, name):
        return self.reals[REALS.index(name)]

    def whole(self, name):
        return self.wholes[WHOLES.index(name)]

    def of_elements(self, values, widths):
        return torch.cat([values.repeat_interleave(width) for width in widths])

    def __call__(self, operation, *arguments):
        tally = Tally()
        addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        addresses = [a.address if isinstance(a, Target) else a for a in addresses]
        error = getattr(self.host, f"batch_{operation}")(
            self.gpu, ctypes.byref(self.operands), *addresses, ctypes.byref(tally)
        )
        succeed(self.host, error)
        assert not self.scratch.any(), "the counters are not left at zero"
        written = [self.reals, self.wholes, self.y0, self.f0, self.ys, self.out.written(), self.t.written()]
        return [x.clone() for x in written], (tally.running, tally.inside)

    def solve(self):
        """What is there after every operation of a step."""
        k = ctypes.cast(self.pointers, c_void_p)
        yield self("probe", self.y0, self.f0)
        yield self("stage", self.y0, k, self.weights, self.out, self.t)
        yield self("first_trials", self.y0, self.f0, self.f1)
        yield self("begin")
        for _ in range(3):
            yield self("stage", self.y0, k, self.weights, self.out, self.t)
            yield self("judge", self.y0, self.y1, k, self.weights, 1)
            yield self("stage", self.y0, k, self.weights, self.out, self.t)
            yield self("commit", self.y0, self.f0, self.y1, k, self.f1, self.dense, self.ys)


@by_dtype
@pytest.mark.parametrize("widths", [(2,), (1, 0, 3), (40,), (100, 3)], ids=str)
def test_batches_take_the_same_steps_on_both_devices(host, dtype, widths):
    """To the last bit where a sample is one thread's; where it is a block's, sums have their own order."""
    for count, seed in ((1, 0), (33, 1), (70, 2)):
        host.schedule(seed, MAX_BLOCKS[seed])
        exact = max(widths) < 16
        on_cpu, on_gpu = (Device(host, gpu, dtype, widths, count, seed) for gpu in (False, True))
        for (ours, our_tally), (theirs, their_tally) in zip(on_gpu.solve(), on_cpu.solve()):
            assert our_tally == their_tally
            assert torch.equal(ours[1], theirs[1])
            for x, y in zip(ours, theirs):
                if exact or x.dtype == torch.int64:
                    assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())
                else:
                    bound = 1e-12 if x.dtype == torch.float64 else 4 * torch.finfo(x.dtype).eps
                    torch.testing.assert_close(x, y, rtol=bound, atol=bound, equal_nan=True)
        if count > 1:
            statuses = set(on_gpu.whole("status").tolist())
            assert {RUNNING, 0, 1} <= statuses and on_gpu.whole("accepted").max() > 0 < on_gpu.whole(
                "rejected"
            ).max()


def test_a_sample_has_the_same_bits_in_every_batch_on_a_gpu(host):
    for widths in ((2,), (100,)):
        results = []
        for count, seed, blocks in ((40, 5, 1), (40, 6, 3), (40, 7, 1056)):
            host.schedule(seed, blocks)
            *_, (last, _) = Device(host, True, torch.float32, widths, count, 11).solve()
            results.append(last)
        for other in results[1:]:
            assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(results[0], other))

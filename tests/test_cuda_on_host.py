"""The CUDA kernels, run on the host by the emulator in cuda_on_host/: indexing, sums, last block."""

import ctypes
import math
import mmap
import re
import shutil
import subprocess
import sys
from ctypes import c_char, c_char_p, c_double, c_int, c_int64, c_uint64, c_void_p
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch

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


def translated(source):
    for pattern, replacement in TRANSLATION:
        source, found = re.subn(pattern, replacement, source)
        assert found, f"cuda.cu no longer has {pattern!r}: change the translation with it"
    assert "<<<" not in source and "__shared__" not in source
    return f'#line 1 "{KERNELS / "cuda.cu"}"\n{source}'


class Operands(ctypes.Structure):
    """driver.cpp's struct of the same name."""

    _fields_ = (
        [(name, c_int) for name in ("dtype", "count")]
        + [(name, c_int64) for name in ("n", "rows", "members")]
        + [(name, c_void_p) for name in ("y0", "y1", "k", "coef")]
        + [(name, c_double) for name in ("rtol", "atol")]
        + [(name, c_void_p) for name in ("each_rtol", "each_atol", "offsets")]
    )


class Control(ctypes.Structure):
    _fields_ = [("order", c_int)] + [
        (name, c_double) for name in ("safety", "ifactor", "dfactor", "min_step", "max_step")
    ]


class Decision(ctypes.Structure):
    _fields_ = [("error_ratio", c_double), ("next_dt", c_double), ("accepted", c_int)]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The kernels of both devices as a library."""
    folder = tmp_path_factory.mktemp("cuda_on_host")
    (folder / "translated.cu").write_text(translated((KERNELS / "cuda.cu").read_text()))
    flags = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", f"-I{HERE}", f"-I{folder}", f"-I{KERNELS}"]
    objects = [folder / "driver.o", folder / "cpu.o"]
    sources = [HERE / "driver.cpp", KERNELS / "cpu.cpp"]
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
    library.norm_scratch_bytes.argtypes = c_int64, c_int64
    library.norm_scratch_bytes.restype = c_int64
    library.cuda_error_norm.argtypes = c_void_p, c_int64, *[c_void_p] * 3, c_double, c_void_p
    library.cpu_error_norm.argtypes = (c_void_p,)
    library.cpu_error_norm.restype = c_double
    library.decision_of.argtypes = c_double, c_double, c_void_p, c_void_p
    library.widen_all.argtypes = library.narrow_all.argtypes = c_int, c_void_p, c_void_p, c_int64
    library.round_times.argtypes = c_int, c_void_p, c_int, c_void_p, c_int64
    library.sum_twice.argtypes = c_void_p, c_void_p
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
            members=len(self.sizes), y0=self.y0.data_ptr(), y1=self.y1.data_ptr(),
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
        return (self.y0.to(wide(self.dtype)) + self.weighted_sums()).to(self.dtype).flatten()

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
def test_combine_has_the_same_bits_everywhere(host, dtype, n, rows):
    for count in [*range(18), MAX_TERMS]:
        case = Case(dtype, n, count, rows)
        expected, on_cpu, on_gpu = case.combined(), Target(dtype, rows * n), Target(dtype, rows * n)
        host.schedule(count, MAX_BLOCKS[count % 3])
        succeed(host, host.cuda_combine(case.operands(), on_gpu.address, None, 0))
        host.cpu_combine(case.operands(), on_cpu.address)
        assert torch.equal(bits(on_cpu.written()), bits(expected))
        assert torch.equal(bits(on_gpu.written()), bits(expected))


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
    """Repeated norms of one case, with one scratch: nothing but the counter starts at zero."""

    def __init__(self, host, case, max_blocks):
        self.host, self.case, self.max_blocks = host, case, max_blocks
        self.longest = max(case.sizes)
        host.schedule(0, max_blocks)
        doubles = host.norm_scratch_bytes(self.longest, len(case.sizes)) // 8
        self.scratch = guarded(torch.tensor([0.0] + [math.nan] * (doubles - 1), dtype=torch.float64))

    def __call__(self, seed=0, dt=1.0, control=None):
        """What the kernel says of the norm and of the step."""
        norm, decision = Target(torch.float64, 1), Decision()
        self.host.schedule(seed, self.max_blocks)
        error = self.host.cuda_error_norm(
            self.case.operands(), self.longest, self.scratch.data_ptr(), norm.address,
            ctypes.byref(decision), dt, ctypes.byref(control or Control(order=5, max_step=math.inf)),
        )  # fmt: skip
        succeed(self.host, error)
        assert bits(self.scratch)[0] == 0, "the counter is not left at zero"
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


def test_the_decision_is_that_of_control(host):
    control = Control(5, 0.9, 10.0, 0.2, 1e-3, 2.0)
    for scale in (0.0, 1e-9, 1e-2, 1.0, 30.0, 1e9, math.nan):
        case = Case(torch.float64, 1000, 7, sizes=[600, 400], rtol=1.0, atol=1.0)
        case.coef *= scale
        for dt in (1e-3, 0.1, 1.9):
            norm, decision = Norm(host, case, 1056)(dt=dt, control=control)
            expected = Decision()
            host.decision_of(norm, dt, ctypes.byref(control), ctypes.byref(expected))
            assert decision.accepted == expected.accepted
            assert decision.next_dt == expected.next_dt
            np.testing.assert_equal([decision.error_ratio], [norm])


@pytest.mark.parametrize("asked", ["norm", "decision"])
def test_the_norm_and_the_decision_come_alone_too(host, asked):
    norm = Norm(host, Case(torch.float32, 1000, 7), 1056)
    value, decision = torch.zeros(1, dtype=torch.float64), Decision()
    host.schedule(0, 1056)
    error = host.cuda_error_norm(
        norm.case.operands(), 1000, norm.scratch.data_ptr(), value.data_ptr() if asked == "norm" else None,
        ctypes.byref(decision) if asked == "decision" else None, 1.0, ctypes.byref(Control(order=5)),
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

"""Programs for GPUs: compiled by nvcc where there is one, and run on the host by the emulator in cuda_on_host/."""

import contextlib
import ctypes
import hashlib
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fields import FIELDS
from test_cuda_on_host import TRANSLATION
from torch import nn
from torch.utils._pytree import tree_map_only

import flashode
from flashode.engines.on_device import OnDevice
from flashode.errors import CompileError
from flashode.program import build, cuda
from flashode.program.call import DeviceCall

F32, F64 = torch.float32, torch.float64
EMULATOR = Path(__file__).parent / "cuda_on_host"
NAMES = ("prepare", "solve", "evaluate")
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]

needs_emulator = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="the emulator needs g++ and Linux"
)


# ---- a GPU on the host -----------------------------------------------------------------------------


class Emulated:
    """A program run by the emulator; as `cuda.Kernels`."""

    def __init__(self, source, folder):
        self.source = self.path = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.cpp"
        self.seconds, self.cached = 0.0, False
        launches = "".join(
            f'extern "C" int launch_{name}(int blocks, const flashode::DeviceCall* call) {{\n'
            f"  on_host::launch(dim3(blocks), flashode::kThreads, [&] {{ flashode::flashode_{name}(call); }});\n"
            "  return cudaGetLastError();\n}\n"
            for name in NAMES
        )
        size = 'extern "C" int64_t call_size() { return sizeof(flashode::DeviceCall); }\n'
        size += 'extern "C" const char* error_text() { return cudaGetErrorString(cudaSuccess); }\n'
        size += 'extern "C" void schedule(uint64_t seed) { on_host::chance.seed(seed); }\n'
        self.source.write_text('#include "cuda_runtime.h"\n' + source + launches + size)
        device = (build.headers()[0] / "device.h").read_text()
        for pattern, replacement in TRANSLATION[1:3]:
            device, found = re.subn(pattern, replacement, device)
            assert found
        (folder / "device.h").write_text(device)
        library = self.source.with_suffix(".so")
        places = [f"-iquote{place}" for place in (EMULATOR, folder, *build.headers())]
        subprocess.run(["g++", *FLAGS, *places, self.source, "-o", library], check=True)
        self.library = ctypes.CDLL(str(library))
        assert self.library.call_size() == ctypes.sizeof(DeviceCall)
        self.library.error_text.restype = ctypes.c_char_p

    def launch(self, name, blocks, call, together):
        assert not together or blocks <= Host.blocks, "blocks that wait for each other must be resident"
        error = getattr(self.library, f"launch_{name}")(blocks, ctypes.c_void_p(call))
        assert error == 0, self.library.error_text()


class Host(cuda.Gpu):
    """The emulator as `cuda.Gpu`: a warp a block, and four blocks at a time."""

    threads, blocks = 32, 4
    folder: Path

    def __init__(self, device=None):
        pass

    def load(self, source):
        return Emulated(source, self.folder)


@pytest.fixture
def host(monkeypatch, tmp_path):
    Host.folder = tmp_path
    monkeypatch.setattr(cuda, "gpu_of", Host)


def on_both(func, y0, t, **settings):
    """By the kernels, and by the reference engine."""
    with torch.no_grad():
        ours = flashode.solve(func, y0, t, throw=False, engine="compiled", **settings)
        theirs = flashode.solve(func.func, y0, t, throw=False, engine="reference", **settings)
    return ours, theirs


def require_alike(ours, theirs, rtol=1e-9):
    """Values, how the solve ended, and all counts."""
    torch.testing.assert_close(ours.ys, theirs.ys, rtol=rtol, atol=rtol, equal_nan=True)
    for name, a, b in [
        ("status", ours.status, theirs.status),
        *(
            (name, getattr(ours.stats, name), getattr(theirs.stats, name))
            for name in ("nfe", "accepted", "rejected")
        ),
    ]:
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), name
    if hasattr(theirs.stats, "accepted_times"):
        assert ours.stats.accepted_times == pytest.approx(theirs.stats.accepted_times, rel=1e-6)


# ---- problems --------------------------------------------------------------------------------------


def lorenz(t, y):
    a, b, c = y.unbind(-1)
    return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)


def van_der_pol(t, y):
    x, v = y.unbind(-1)
    return torch.stack([v, 5 * (1 - x * x) * v - x], -1)


def pendulum(t, y):
    return y[1], -torch.sin(y[0]) - 0.3 * y[1]


class Timed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()

    def forward(self, t, y):
        return self.net(torch.cat([y, t.expand(len(y), 1)], 1))


class Decay(nn.Module):
    """Every sample has a rate of its own, and all share a net."""

    def __init__(self, samples):
        super().__init__()
        self.register_buffer("rate", torch.linspace(0.5, 4, samples, dtype=F64)[:, None])
        self.net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 2)).double()

    def forward(self, t, y):
        return self.net(y) * torch.cos(t).reshape(-1, 1) - self.rate * y


def problem(name):
    """func, y0, t and how to solve."""
    torch.manual_seed(0)
    t = torch.linspace(0.2, 1.2, 6, dtype=F64)
    if name == "together":  # by several blocks, whose threads have several samples each
        return Timed(), torch.randn(300, 3, dtype=F64), t, {"rtol": 1e-6, "atol": 1e-8}
    if name == "members":  # two, with a tolerance for each number, and a time where the field jumps
        y0 = torch.randn(20, 1, dtype=F64), torch.randn(20, 1, dtype=F64)
        settings = {
            "method": "tsit5",
            "rtol": 1e-6,
            "atol": (1e-8, torch.logspace(-9, -6, 20, dtype=F64)[:, None]),
        }
        return pendulum, y0, t, settings | {"options": {"jump_t": torch.tensor([0.55], dtype=F64)}}
    if name == "own":
        settings = {"method": "dopri8", "rtol": 1e-7, "atol": 1e-9, "options": {"batched": True}}
        return Decay(40), torch.randn(40, 2, dtype=F64), t, settings
    y0 = torch.randn(100, 2, dtype=F32)
    return van_der_pol, y0, t.float(), {"method": "rk4", "options": {"step_size": 0.03, "interp": "cubic"}}


PROBLEMS = ["together", "members", "own", "fixed"]


# ---- on the host -----------------------------------------------------------------------------------


@needs_emulator
@pytest.mark.parametrize("name", PROBLEMS)
def test_kernels_solve_as_the_reference_engine_does(host, monkeypatch, name):
    monkeypatch.setattr(OnDevice, "room", 2)  # for ends of steps: a solve that has more of them is done again
    func, y0, t, settings = problem(name)
    func = flashode.compile(func)
    rtol = 1e-5 if name == "fixed" else 1e-9
    require_alike(*on_both(func, y0, t, **settings), rtol)

    if name == "own":  # one starts nowhere, one is stopped on its way
        y0[3, 0] = torch.nan
        settings["options"] |= {"max_num_steps": 3}
    elif name == "fixed":  # one sample leaves, and takes the others with it
        y0[70] = 6.0
    else:
        settings["options"] = settings.get("options", {}) | {"max_num_steps": 1}
    ours, theirs = on_both(func, y0, t, **settings)
    assert torch.as_tensor(theirs.status).max() > 0
    require_alike(ours, theirs, rtol)


# ---- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_gpu_solves_as_the_reference_engine_does(device, name):
    if device.type != "cuda" or cuda.missing():
        pytest.skip(cuda.missing() or "no --device cuda")
    func, *rest = problem(name)
    func = func.to(device) if isinstance(func, nn.Module) else func
    y0, t, settings = tree_map_only(torch.Tensor, lambda x: x.to(device), tuple(rest))
    with torch.no_grad():
        ours = flashode.solve(flashode.compile(func), y0, t, engine="compiled", **settings)
        theirs = flashode.solve(func, y0, t, engine="reference", **settings)
    require_alike(ours, theirs, 1e-5 if name == "fixed" else 1e-9)


# ---- by nvcc ---------------------------------------------------------------------------------------


class Written(Exception):
    """The source of a program, where it would be compiled."""


class Writer(cuda.Gpu):
    blocks = 264

    def __init__(self, device=None):
        pass

    def load(self, source):
        raise Written(source)


def source_of(monkeypatch, func, y0, t, settings):
    monkeypatch.setattr(cuda, "gpu_of", Writer)
    with torch.no_grad(), pytest.raises(Written) as written:
        flashode.solve(flashode.compile(func), y0, t, engine="compiled", **settings)
    return str(written.value)


def assembled(folder, name, source):
    """What ptxas says of the kernels of a source: registers and bytes spilled of each."""
    path = folder / f"{name}.cu"
    path.write_text(source)
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-cubin", "-Werror", "all-warnings", "-Xptxas", "-v"]
    command += [f"-Xcompiler=-iquote{place}" for place in build.headers()]
    outcome = subprocess.run(
        [*command, path, "-o", path.with_suffix(".cubin")], capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    said = re.findall(
        r"Function properties for flashode_(\w+)\n.* (\d+) bytes spill stores.*\n.*Used (\d+) registers",
        outcome.stderr,
    )
    return {kernel: (int(registers), int(spilled)) for kernel, spilled, registers in said}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_takes_the_kernels_and_small_systems_stay_in_registers(monkeypatch, tmp_path):
    sources = {name: source_of(monkeypatch, *problem(name)) for name in ("members", "own")}
    y0, t = torch.randn(1000, 3), torch.linspace(0, 1, 2)
    own = {"method": "tsit5", "options": {"batched": True}}
    sources["lorenz fixed"] = source_of(monkeypatch, lorenz, y0, t, {"method": "rk4"})
    sources["lorenz own"] = source_of(monkeypatch, lorenz, y0, t, own)
    sources["lorenz together"] = source_of(monkeypatch, lorenz, y0, t, {"method": "tsit5"})
    sources["scattered"] = source_of(monkeypatch, *FIELDS["written_in_place"](), t.double(), {})
    with ThreadPoolExecutor(2) as pool:
        used = dict(zip(sources, pool.map(lambda item: assembled(tmp_path, *item), sources.items())))
    for name, kernels in used.items():
        assert set(kernels) == set(NAMES), name
        if name.startswith("lorenz"):
            registers, spilled = kernels["solve"]
            assert spilled == 0 and registers <= 168, name


@needs_emulator
def test_nvrtc_needs_no_header_of_the_c_library(monkeypatch, tmp_path):
    path = tmp_path / "program.cu"
    path.write_text(source_of(monkeypatch, *problem("own")))
    command = ["g++", "-std=c++17", "-E", "-nostdinc", "-D__CUDACC__", "-D__CUDACC_RTC__", "-x", "c++", path]
    command += [f"-iquote{place}" for place in build.headers()]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr


# ---- what there is not -----------------------------------------------------------------------------


def test_gradients_on_gpus_are_refused_with_a_reason(monkeypatch):
    monkeypatch.setattr(cuda, "gpu_of", Writer)
    y0, t = torch.randn(4, 2, dtype=F64), torch.linspace(0, 1, 2, dtype=F64)
    with pytest.raises(CompileError, match="no backward pass yet: solve under torch.no_grad"):
        flashode.odeint(flashode.compile(Decay(4)), y0, t)


def test_a_sample_that_a_thread_has_no_room_for_is_refused():
    with pytest.raises(CompileError, match="a thread of the GPU would need .* bytes"):
        cuda.require_room({"width": 5000, "own": 0, "scratch": 0}, 7, False, 1, 4)


def test_without_cuda_core_the_reason_names_it(monkeypatch):
    monkeypatch.setattr(cuda, "_cuda_core", lambda: None)
    assert "pip install cuda-core" in cuda.missing()
    with pytest.raises(CompileError, match="pip install cuda-core"):
        cuda.Gpu.load(Writer(), "")


class FakeCore:
    """Of cuda-core's names those that are used."""

    __name__, __version__ = "cuda.core", "0"
    compiled = 0

    class Device:
        def __init__(self, index):
            self.set_current = lambda: None

    class ObjectCode:
        @classmethod
        def from_cubin(cls, cubin):
            assert cubin == b"cubin"
            return cls()

        def get_kernel(self, name):
            return name

    @staticmethod
    def ProgramOptions(std, arch, include_path, device_as_default_execution_space):
        assert (std, arch) == ("c++17", "sm_90") and device_as_default_execution_space
        assert (Path(include_path[0]) / "device.h").exists()

    class Program:
        def __init__(self, source, kind, options):
            self.source = source

        def compile(self, kind):
            if "broken" in self.source:
                raise RuntimeError("NVRTC_ERROR_COMPILATION: identifier undefined")
            FakeCore.compiled += 1
            return SimpleNamespace(code=kind.encode())

    class LaunchConfig:
        is_cooperative = False

        def __init__(self, **options):
            self.options = options

    launched = []

    @classmethod
    def launch(cls, stream, config, kernel, call):
        cls.launched.append((stream.__cuda_stream__(), config.options, kernel, call))


def test_a_cubin_is_compiled_once_and_its_kernels_launched_on_the_stream_of_torch(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHODE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda, "_cuda_core", lambda: FakeCore)
    monkeypatch.setattr(cuda.importlib, "import_module", lambda name: FakeCore)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = cuda.Gpu(torch.device("cuda", 0))
    assert [gpu.turns(n) for n in (1, 33_792, 33_793, 1 << 20)] == [1, 1, 2, 32]

    kernels = [gpu.load("source") for _ in range(2)]
    assert [k.cached for k in kernels] == [False, True] and FakeCore.compiled == 1
    assert kernels[0].source.read_text() == "source"
    kernels[1].launch("prepare", 1, 4096, False)
    kernels[1].launch("solve", 3, 4096, True)
    assert FakeCore.launched == [
        ((0, 7), {"grid": 1, "block": 128}, "flashode_prepare", 4096),
        ((0, 7), {"grid": 3, "block": 128, "is_cooperative": True}, "flashode_solve", 4096),
    ]
    with pytest.raises(CompileError, match="NVRTC failed for sm_90: .*identifier undefined"):
        gpu.load("broken")

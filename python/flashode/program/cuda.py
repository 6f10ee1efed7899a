"""Programs on GPUs: the same field and templates as CUDA C++, compiled at run time by NVIDIA's cuda-core.

cuda-core brings NVRTC, loads what it made, and launches kernels; it is an optional dependency (``flashode[cuda]``).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import CompileError
from . import build

_LOCAL_BYTES = 1 << 16  # of the work space of a thread: all that are on a device at once have theirs
_HEAD = '#include "device.h"\n\nnamespace flashode {\n\n'
# Blocks that a multiprocessor is to hold: the fewer, the more registers there are for each thread.
_TOGETHER, _ALONE = 2, 4


def missing() -> str | None:
    """Why there are no programs on GPUs here, or None."""
    if _cuda_core() is None:
        return "programs on GPUs are compiled by cuda-core, which is not installed: `pip install cuda-core[cu13]`, or [cu12]"
    return None


@functools.cache
def _cuda_core():
    for name in ("cuda.core", "cuda.core.experimental"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if hasattr(module, "Program"):
            return module
    return None


def cuda_source(field: str, method: str, own_clocks: bool, has_each: bool, turns: int) -> str:
    """A program for a GPU.

    Args:
        field, method: the structs of that name, as the C++ that they are on a CPU.
        own_clocks: whether samples choose their own steps.
        has_each: whether there are tolerances of each number.
        turns: samples that each thread has where all step together; 0 where they do not.
    """
    spread = (
        f"struct Spread {{\n  static constexpr bool has_each = {str(has_each).lower()};\n"
        f"  static constexpr int turns = {turns};\n}};\n"
    )
    batch = "_batch" if own_clocks else ""
    text = _HEAD + field + method + spread + "\n"
    text += _entry("prepare", 1, "prepare_on_device<Field>")
    text += _entry("solve", _TOGETHER if turns else _ALONE, f"solve{batch}_on_device<Field, Method, Spread>")
    text += _entry("evaluate", _ALONE, f"evaluate{batch}_on_device<Field>")
    return text + "\n}  // namespace flashode\n"


def _entry(name: str, blocks: int, function: str) -> str:
    return (
        f'extern "C" __global__ void __launch_bounds__(kThreads, {blocks})\n'
        f"flashode_{name}(const DeviceCall* __restrict__ call) {{\n  {function}(*call);\n}}\n"
    )


class Gpu:
    """A device as programs see it.

    Attributes:
        threads: of a block, device.h's kThreads.
        blocks: so many are on the device at the same time where all of them wait for each other.
    """

    threads = 128

    def __init__(self, device: torch.device):
        found = torch.cuda.get_device_properties(device)
        self.device, self.arch = device, f"sm_{found.major}{found.minor}"
        self.blocks = _TOGETHER * found.multi_processor_count

    def turns(self, samples: int) -> int:
        """Samples that a thread has where all of them step together; a power of two, so that kernels are few."""
        each = -(-samples // (self.threads * self.blocks))
        return 1 << (each - 1).bit_length()

    def load(self, source: str) -> Kernels:
        """Compiles a program, unless that was done before, and loads it. Raises CompileError."""
        began = time.perf_counter()
        core = _cuda_core()
        if core is None:
            raise CompileError(missing())
        with torch.cuda.device(self.device):
            core.Device(self.device.index or 0).set_current()
            parts = [source, self.arch, build.headers_hash(), _version(core)]
            name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
            cubin, path, cached = build.kept(f"{name}.cubin", source, lambda: self._compiled(core, source))
            kernels = core.ObjectCode.from_cubin(cubin)
        return Kernels(
            core, self.device, kernels, path, path.with_suffix(".cu"), time.perf_counter() - began, cached
        )

    def _compiled(self, core, source: str) -> bytes:
        options = core.ProgramOptions(
            std="c++17", arch=self.arch, include_path=[str(folder) for folder in build.headers()],
            device_as_default_execution_space=True,
        )  # fmt: skip
        try:
            return bytes(core.Program(source, "c++", options).compile("cubin").code)
        except Exception as error:  # of several kinds; the text has what the compiler says
            raise CompileError(
                f"NVRTC failed for {self.arch}: {error}\nSolve with func itself; where the source is at fault, it is "
                "flashode's error: please report it"
            ) from error


@dataclass(frozen=True)
class Kernels:
    """A program on a GPU, loaded; see `build.Library` for what it shares with one for a CPU."""

    core: object
    device: torch.device
    code: object
    path: Path
    source: Path
    seconds: float
    cached: bool

    def launch(self, name: str, blocks: int, call: int, together: bool):
        """Runs ``flashode_<name>`` with the call at that address, on torch's current stream; `together`: blocks wait
        for each other, and all of them are to be on the device at the same time."""
        with torch.cuda.device(self.device):
            stream = _Stream(torch.cuda.current_stream(self.device))
            options = {_cooperative(self.core): True} if together else {}
            config = self.core.LaunchConfig(grid=blocks, block=Gpu.threads, **options)
            self.core.launch(stream, config, self.code.get_kernel(f"flashode_{name}"), call)


class _Stream:
    """A stream of torch's, as cuda-core takes it."""

    def __init__(self, stream):
        self.stream = stream

    def __cuda_stream__(self):
        return 0, self.stream.cuda_stream


def _cooperative(core) -> str:
    """What the option of a launch is called, by the version."""
    return "is_cooperative" if hasattr(core.LaunchConfig, "is_cooperative") else "cooperative_launch"


def _version(core) -> str:
    return str(importlib.import_module(core.__name__.split(".experimental")[0]).__version__)


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU that programs for states on this device run on; None for a CPU."""
    return _gpu(device) if device.type == "cuda" else None


_gpu = functools.cache(Gpu)


def require_room(sizes: dict[str, int], slopes: int, has_each: bool, turns: int, real_bytes: int):
    """Raises CompileError where the work space of a thread is more than it should be."""
    width = sizes["width"]
    needed = real_bytes * (
        max(turns, 1) * ((2 + slopes + 2 * has_each) * width + sizes["own"]) + width + sizes["scratch"]
    )
    if needed > _LOCAL_BYTES:
        raise CompileError(
            f"a thread of the GPU would need {needed:,} bytes of work space for a sample of {width:,} numbers, and may have "
            f"{_LOCAL_BYTES:,}: solve with func itself, or fewer samples at a time"
        )

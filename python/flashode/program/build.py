"""Generated C++ becomes a loaded library: the compiler is found and run, and what it made is kept on disk.

A library is found again by all that went into it: the source, the headers, flags, the compiler and the
processor, since it is compiled for this one. Files are named by the hash of that, come to be by renaming,
and end in a checksum: several processes may do the same at once, and one that dies leaves no damage.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import CompileError

_CHECKSUM = hashlib.sha256().digest_size
_COMPILERS = ("c++", "g++", "clang++")
_SHOWN = 6  # lines of what a compiler says


@dataclass(frozen=True)
class Library:
    """A generated program, loaded.

    Attributes:
        functions: its ``extern "C"`` functions.
        path, source: the files of the library and of its C++.
        seconds: spent on finding or compiling it.
        cached: whether it was found.
    """

    functions: ctypes.CDLL
    path: Path
    source: Path
    seconds: float
    cached: bool


_loaded: dict[str, Library] = {}


def load(source: str) -> Library:
    """The library of a C++ source, compiled unless that was done before.

    The files are in the folder that the environment variable FLASHODE_CACHE names, by default
    ``~/.cache/flashode``; where that cannot be written to, in a temporary folder of this process.

    Raises CompileError where there is no compiler, where it fails, or where others may write to the folder.
    """
    began = time.perf_counter()
    command = [*compiler(), *flags()]
    name = _hash(source, command)
    if name in _loaded:
        return _loaded[name]
    folder = cache_folder()
    path = folder / f"{name}.so"
    cached = _is_whole(path)
    if not cached:
        if not os.access(folder, os.W_OK):
            folder = _temporary()
            path = folder / f"{name}.so"
        _compile(command, source, path)
    library = Library(
        ctypes.CDLL(str(path)), path, path.with_suffix(".cpp"), time.perf_counter() - began, cached
    )
    return _loaded.setdefault(name, library)


# ---- the compiler ----------------------------------------------------------------------------


def compiler() -> list[str]:
    """The command of the C++ compiler: what CXX says, or the first that there is."""
    named = shlex.split(os.environ.get("CXX", ""))
    for candidate in [named] if named else [[name] for name in _COMPILERS]:
        if shutil.which(candidate[0]):
            return candidate
    tried = f"CXX={shlex.join(named)!r} is not one" if named else f"tried {', '.join(_COMPILERS)}"
    raise CompileError(
        f"flashode.compile needs a C++ compiler, and none was found ({tried}): install one, as with `apt install g++` or "
        "`conda install gxx`, or name it in the environment variable CXX; without one, solve with func itself"
    )


def flags() -> list[str]:
    """How programs are compiled: for this processor, with the freedom that numbers of both signs of zero allow."""
    arm = platform.machine() in ("aarch64", "arm64")
    chosen = ["-std=c++17", "-O3", "-mcpu=native" if arm else "-march=native"]
    if "avx512f" in _processor().split():
        chosen.append("-mprefer-vector-width=512")
    chosen += [
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fopenmp",
        "-fPIC",
        "-shared",
        "-w",
    ]
    # Not -I: <math.h> is the C library's, whoever includes it.
    return [*chosen, *(f"-iquote{folder}" for folder in headers())]


@functools.cache
def headers() -> tuple[Path, ...]:
    """The folders of what generated programs include: installed, or of the source tree."""
    package = Path(__file__).resolve().parents[1]
    for root in (package / "include", package.parents[1] / "csrc"):
        if (root / "compiled" / "program.h").exists():
            return root / "compiled", root / "kernels"
    raise CompileError(
        f"the headers of generated programs are neither in {package / 'include'} nor in {package.parents[1] / 'csrc'}: the "
        "installation is incomplete; run `pip install --no-build-isolation --force-reinstall --no-deps .` again"
    )


@functools.cache
def _openmp() -> str | None:
    """The OpenMP library that torch has loaded: a second one would bring threads of its own."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    files = (line.split(maxsplit=5)[5] for line in lines if line.count("/"))
    return next((f for f in files if os.path.basename(f).startswith(("libgomp", "libomp", "libiomp5"))), None)


def _compile(command, source, path: Path):
    """Writes the source, and the library with its checksum behind it."""
    written = path.with_suffix(".cpp")
    _replace(written, source.encode())
    handle, made = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        # As it is needed no more, the library that -fopenmp would link to is left out.
        shared = ["-Wl,--as-needed", *filter(None, [_openmp()])]
        outcome = _run([*command, str(written), "-o", made, *shared])
        if outcome.returncode and _openmp():
            outcome = _run([*command, str(written), "-o", made])
        if outcome.returncode:
            raise CompileError(_failure(command, outcome, written))
        binary = Path(made).read_bytes()
        _replace(path, binary + hashlib.sha256(binary).digest())
    finally:
        os.unlink(made)


def _run(command):
    try:
        # Messages in English, whatever the locale: errors are looked for by that word.
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", env={**os.environ, "LC_ALL": "C"}
        )
    except OSError as error:
        raise CompileError(
            f"the C++ compiler {command[0]} could not be run: {error}; name another one in CXX"
        ) from error


def _failure(command, outcome, written) -> str:
    lines = outcome.stderr.splitlines()
    errors = [line.strip() for line in lines if "error" in line.lower()] or lines
    return (
        f"the C++ compiler failed ({shlex.join(command[:1])}, status {outcome.returncode}) on {written}:\n  "
        + "\n  ".join(errors[:_SHOWN])
        + "\nIt is to know C++17 and this processor: name another one in the environment variable CXX, or solve with func "
        "itself; where the source is at fault, it is flashode's error: please report it"
    )


# ---- files -----------------------------------------------------------------------------------


def kept(file: str, source: str, make) -> tuple[bytes, Path, bool]:
    """What make() gives: from the cache's file of that name if it is there, else made and put there, with its source
    beside it. Also the file, and whether it was there."""
    path = cache_folder() / file
    if _is_whole(path):
        return path.read_bytes()[:-_CHECKSUM], path, True
    if not os.access(path.parent, os.W_OK):
        path = _temporary() / file
    _replace(path.with_suffix(".cu"), source.encode())
    content = make()
    _replace(path, content + hashlib.sha256(content).digest())
    return content, path, False


def cache_folder() -> Path:
    """The folder of compiled programs, created if need be."""
    named = os.environ.get("FLASHODE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(named) if named else Path(base) / "flashode"
    if not folder.is_absolute() and not named:
        return _temporary()  # there is no home
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:
        return _temporary()
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or found.st_uid not in (os.geteuid(), 0):
        raise CompileError(
            f"others than you may write to {folder}, where compiled programs are kept, and so could have you run their "
            f"code: `chmod go-w {folder}` if it is yours, or name a folder of your own in the environment variable "
            "FLASHODE_CACHE"
        )
    return folder


@functools.cache
def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="flashode-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _replace(path: Path, content: bytes):
    """Writes a file at once: nobody sees a part of it."""
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return len(content) > _CHECKSUM and hashlib.sha256(content[:-_CHECKSUM]).digest() == content[-_CHECKSUM:]


# ---- what a library depends on ---------------------------------------------------------------


def _hash(source: str, command) -> str:
    parts = [
        source,
        shlex.join(command),
        _version(tuple(compiler())),
        _openmp() or "",
        _processor(),
        headers_hash(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@functools.cache
def _version(command) -> str:
    return _run([*command, "--version"]).stdout + os.path.realpath(shutil.which(command[0]))


@functools.cache
def headers_hash() -> str:
    """Of the contents of all headers."""
    content = hashlib.sha256()
    for folder in headers():
        for path in sorted(folder.glob("*.h")):
            content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()


@functools.cache
def _processor() -> str:
    """The model and the abilities of this processor: homes are shared by machines that differ in them."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{sys.platform} {platform.machine()} {platform.processor()}"
    told = (line.partition(":") for line in first)
    named = (
        "vendor_id",
        "cpu family",
        "model",
        "model name",
        "flags",
        "Features",
        "CPU part",
        "CPU implementer",
    )
    return " ".join(value.strip() for name, _, value in told if name.strip() in named)

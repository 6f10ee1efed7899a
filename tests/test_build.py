"""Generated C++ is compiled once for a machine, and found again; what can go wrong on the way is said."""

import ctypes
import os
import shutil
import stat
import threading
from pathlib import Path

import pytest

from flashode.errors import CompileError
from flashode.program import build

ROOT = Path(__file__).parent.parent
SOURCE = 'extern "C" int answer() {{ return {}; }}\n'
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, build._COMPILERS)), reason="no C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FLASHODE_CACHE", str(folder))
    monkeypatch.setattr(build, "_loaded", {})
    return folder


def forget():
    build._loaded.clear()


@needs_compiler
def test_a_source_is_compiled_once_and_then_found(cache):
    first = build.load(SOURCE.format(42))
    assert first.functions.answer() == 42 and not first.cached
    assert first.source.read_text() == SOURCE.format(42) and first.path.parent == cache
    assert build.load(SOURCE.format(42)) is first
    forget()
    again = build.load(SOURCE.format(42))
    assert again.cached and again.path == first.path and again.functions.answer() == 42
    assert build.load(SOURCE.format(43)).functions.answer() == 43
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert len(list(cache.iterdir())) == 4, "temporary files were left"


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_broken_library_is_compiled_again(cache, damage):
    path = build.load(SOURCE.format(7)).path
    forget()
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(
        {"truncated": content[: len(content) // 2], "empty": b"", "text": b"no library" * 10}[damage]
    )
    again = build.load(SOURCE.format(7))
    assert not again.cached and again.functions.answer() == 7


@needs_compiler
@pytest.mark.parametrize("what", ["_processor", "headers_hash", "_openmp"])
def test_another_machine_or_version_has_libraries_of_its_own(cache, monkeypatch, what):
    first = build.load(SOURCE.format(1))
    monkeypatch.setattr(build, what, lambda: "another")
    assert build._hash(SOURCE.format(1), [*build.compiler(), *build.flags()]) != first.path.stem


def libraries_of_threads():
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return {line.split()[-1] for line in lines if "libgomp" in line}


@needs_compiler
def test_generated_programs_find_their_headers_and_the_threads_of_torch(cache):
    source = """
        #include "call.h"
        #include "control.h"
        extern "C" int threads() {
          int n = 0;
          #pragma omp parallel num_threads(2) reduction(+ : n)
          n += 1;
          return n;
        }
        extern "C" long size() { return sizeof(flashode::Call); }
    """
    before = libraries_of_threads()
    functions = build.load(source).functions
    functions.size.restype = ctypes.c_long
    assert functions.size() > 0 and functions.threads() == 2
    assert libraries_of_threads() == before  # other packages may have brought theirs


@needs_compiler
def test_two_that_compile_the_same_at_once_both_get_a_library(cache):
    start, answers = threading.Barrier(2), []

    def run():
        start.wait()
        answers.append(build.load(SOURCE.format(5)).functions.answer())

    both = [threading.Thread(target=run) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert answers == [5, 5] and len(list(cache.iterdir())) == 2


@needs_compiler
def test_what_the_compiler_says_is_shown_and_the_source_kept(cache):
    with pytest.raises(CompileError, match="error: .*nonsense") as error:
        build.load("int x = nonsense;")
    (source,) = cache.glob("*.cpp")
    assert str(source) in str(error.value) and source.read_text() == "int x = nonsense;"
    assert list(cache.iterdir()) == [source]


def test_without_a_compiler_the_remedy_is_said(cache, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CompileError, match=r"tried c\+\+, g\+\+, clang\+\+.*install one.*CXX"):
        build.load(SOURCE.format(1))


def test_a_named_compiler_that_is_none_is_named(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(CompileError, match="CXX='no-such-compiler -O1' is not one"):
        build.load(SOURCE.format(1))


@needs_compiler
def test_the_compiler_that_CXX_names_is_taken_with_its_arguments(cache, monkeypatch):
    found = next(filter(shutil.which, build._COMPILERS))
    monkeypatch.setenv("CXX", f"{found} -DANSWER=11")
    assert build.load(SOURCE.format("ANSWER")).functions.answer() == 11


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_may_write_to_is_refused(cache, mode):
    cache.mkdir()
    cache.chmod(mode)
    with pytest.raises(
        CompileError, match=f"others than you may write to {cache}.*chmod go-w.*FLASHODE_CACHE"
    ):
        build.cache_folder()


def test_a_folder_of_another_user_is_refused(cache, monkeypatch):
    cache.mkdir(mode=0o700)
    owner = cache.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner:
        with pytest.raises(CompileError, match="others than you may write"):
            build.cache_folder()


def test_where_no_folder_can_be_made_a_temporary_one_serves(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASHODE_CACHE", str(tmp_path / "file" / "cache"))
    folder = build.cache_folder()
    assert folder.is_dir() and stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.delenv("FLASHODE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert build.cache_folder() == folder


@needs_compiler
def test_a_folder_that_can_only_be_read_gives_what_it_has(cache, monkeypatch):
    first = build.load(SOURCE.format(3))
    forget()
    monkeypatch.setattr(build.os, "access", lambda path, mode: mode != os.W_OK)
    assert build.load(SOURCE.format(3)).path == first.path
    other = build.load(SOURCE.format(4))
    assert other.path.parent != cache and other.functions.answer() == 4


def test_caches_are_where_the_desktop_wants_them(tmp_path, monkeypatch):
    monkeypatch.delenv("FLASHODE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_folder() == tmp_path / "xdg" / "flashode"


def test_headers_are_installed():
    assert all((folder / "control.h").exists() or (folder / "call.h").exists() for folder in build.headers())
    text = (ROOT / "CMakeLists.txt").read_text()
    assert "install(DIRECTORY csrc/compiled csrc/kernels DESTINATION flashode/include" in text

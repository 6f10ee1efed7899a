"""Options and fixtures that all tests share."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import flashode
from flashode import extension


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device that the states live on: cpu or cuda")
    parser.addoption(
        "--torchdiffeq-tests", metavar="DIR", help="torchdiffeq's own tests, to be run unchanged"
    )


def pytest_configure(config):
    # Tests of threads ask for them; elsewhere, small tensors on busy cores only wait for each other.
    torch.set_num_threads(1)
    # What a script starts in the background ignores Ctrl-C, and so would the processes of tests that send it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "FLASHODE_CACHE" not in os.environ:  # name one to keep compiled fields from run to run
        config.programs = tempfile.TemporaryDirectory(prefix="flashode-")
        os.environ["FLASHODE_CACHE"] = config.programs.name


def pytest_unconfigure(config):
    if hasattr(config, "programs"):
        config.programs.cleanup()


def pytest_report_header(config):
    build = flashode.build_config()
    return f"flashode {flashode.__version__}: " + ", ".join(
        f"{k}={v}" for k, v in build.items() if k != "python"
    )


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(params=["reference", "native"])
def engine(request):
    if request.param == "native" and extension.C is None:
        pytest.skip(f"no compiled extension: {extension.missing}")
    return request.param


@pytest.fixture
def native():
    if extension.C is None:
        pytest.skip(f"no compiled extension: {extension.missing}")
    return "native"


@pytest.fixture
def example(tmp_path):
    """Runs a script of examples/ as a user does, in an empty folder: ``example("moons.py", "--quick")``."""

    def run(name, *args):
        script = Path(__file__).resolve().parent.parent / "examples" / name
        command = [sys.executable, script, *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)

    return run


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)

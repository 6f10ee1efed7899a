"""The benchmark harness: what it reports, and that it refuses to time an unequal result."""

import ast
import importlib
import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def run(monkeypatch):
    """The module bench/run.py."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("run")
    for name in ("run", "cases", "workloads", "compiled", "ensembles"):
        sys.modules.pop(name, None)


def decay(run, **contestants):
    """A contest for ``exp(-1)``."""
    truth = torch.tensor([math.exp(-1)])
    return run.Contest("decay", contestants, lambda: truth, bound=1e-6, func=lambda t, y: -y)


def test_quick_spiral_reports_what_a_reader_needs(native, tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, str(BENCH / "run.py"), "spiral", "--quick", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100

    text = report.read_text()
    document = json.loads(text)
    keys = {"date", "commit", "dirty", "machine", "versions", "build", "settings", "contests"}
    assert document.keys() == keys
    assert document["machine"].keys() == {"cpu", "cores", "vectors", "gpu"}
    assert document["versions"].keys() == {"python", "torch", "torchdiffeq", "flashode"}
    assert document["build"]["extension"] is True
    settings = {"device": "cpu", "threads": 1, "quick": True, "repeats": 3, "clock": "process_time"}
    assert document["settings"] == settings
    for secret in (str(BENCH.parent), sys.prefix, f'"{socket.gethostname()}"'):
        assert secret not in text

    (contest,) = document["contests"]
    assert (contest["case"], contest["refused"], contest["against"]) == ("spiral", [], "torchdiffeq")
    rows = contest["rows"]
    assert list(rows) == ["torchdiffeq", "native", "reference", "func alone"]
    assert rows["native"]["nfe"] == rows["reference"]["nfe"] <= rows["torchdiffeq"]["nfe"]
    assert rows["torchdiffeq"]["speed"] == 1
    for name, row in rows.items():
        seconds = row["seconds"]
        assert 0 < seconds["q1"] <= seconds["median"] <= seconds["q3"] and seconds["turns"] == 3
        if name != "func alone":
            assert 0 <= row["difference"] <= contest["bound"]
            assert row["speed"] > 0 and math.isfinite(row["us_per_call"])


@pytest.mark.parametrize("wrong", [math.exp(-1) + 1e-5, math.nan, math.inf, [1.0, 2.0]])
def test_an_unequal_result_is_refused_and_nothing_is_timed(run, monkeypatch, tmp_path, capsys, wrong):
    calls = {"good": 0, "bad": 0}

    def good(func):
        calls["good"] += 1
        return torch.tensor([math.exp(-1)])

    def bad(func):
        calls["bad"] += 1
        return torch.tensor(wrong).reshape(-1)

    monkeypatch.setitem(run.CASES, "wrong", lambda device, quick: [decay(run, good=good, bad=bad)])
    assert run.main(["wrong", "--quick", "--json", str(tmp_path / "report.json")]) == 1
    assert calls == {"good": 1, "bad": 1}
    (contest,) = json.loads((tmp_path / "report.json").read_text())["contests"]
    assert contest["refused"] == ["bad"]
    assert contest["rows"]["bad"]["difference"] > 1e-6
    assert not any("seconds" in row or "speed" in row for row in contest["rows"].values())
    assert "REFUSED, not timed: bad is off by" in capsys.readouterr().out


def test_contestants_take_turns(run):
    order = []

    def contestant(name):
        def go(func):
            order.append(name)
            func(None, torch.ones(1))
            return torch.tensor([math.exp(-1)])

        return go

    clock = iter(range(1000))  # every look at the clock is a second later: no run is repeated
    timer = run.Timer(clock=lambda: next(clock), repeats=4)
    report = run.measure(decay(run, a=contestant("a"), b=contestant("b")), timer)
    check, warm_up, turns = order[:2], order[2:6], order[6:]
    assert (check, warm_up, turns) == (["a", "b"], ["a", "a", "b", "b"], ["a", "b"] * 4)
    assert report["rows"]["a"]["nfe"] == report["rows"]["b"]["nfe"] == 1
    assert report["rows"]["b"]["seconds"] == {"median": 1, "q1": 1, "q3": 1, "turns": 4}


def test_every_case_makes_contests_with_distinct_names(run):
    names = [contest.name for case in run.CASES.values() for contest in case("cpu", True)]
    assert len(set(names)) == len(names) >= len(run.CASES)


def test_an_unknown_case_is_an_error(run, capsys):
    with pytest.raises(SystemExit):
        run.main(["sprial"])
    assert "no case named sprial; there are spiral" in capsys.readouterr().err


def test_gradients_are_measured_and_drawn(tmp_path):
    read = pytest.importorskip("matplotlib.image").imread
    command = [sys.executable, BENCH / "gradients.py", "--quick", "--out", tmp_path / "deep" / "g.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100

    def table(title):
        """The rows below a line that starts so, without their head; one column a mode."""
        rows = done.stdout.split(f"\n{title}", 1)[1].split("\n\n")[0].splitlines()[2:]
        return [[float(cell.replace("fails", "nan")) for cell in row.split()[-2:]] for row in rows]

    (direct_few, backsolve_few), (direct, backsolve) = table("peak memory in MB against accepted steps")
    assert direct > 3 * direct_few and direct > 5 * backsolve
    assert backsolve < backsolve_few + 5
    assert len(table("peak memory in MB against outputs")) == 2
    errors = table("relative error of the gradient against rtol, atol = rtol / 100: pendulum")
    assert max(errors[-1]) < 1e-3 < max(errors[0])
    image = read(tmp_path / "deep" / "g.png")
    assert image.shape[0] > 500 and (image[:, :, :3].min(axis=-1) < 0.3).mean() > 0.005


def test_compiled_fields_are_contestants_with_calls_of_their_own(run, monkeypatch, tmp_path, capsys):
    class Unseen(torch.nn.Module):  # calls of it are none of the field's that is counted
        def __init__(self, field):
            super().__init__()
            self.field = field

        def forward(self, t, y):
            return self.field(t, y)

    monkeypatch.setattr(run.flashode, "compile", Unseen, raising=False)
    compiled, report = importlib.import_module("compiled"), tmp_path / "report.json"
    assert compiled.main(["spiral", "train", "--quick", "--repeats", "2", "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert "Without --jax-python, diffrax is left out." in out
    assert max(map(len, out.splitlines())) <= 100

    spiral, train = json.loads(report.read_text())["contests"]
    rows = spiral["rows"]
    assert list(rows) == ["torchdiffeq", "native", "compiled"]
    assert rows["compiled"]["nfe"] == rows["native"]["nfe"] == 6 * rows["native"]["steps"] + 2
    assert rows["torchdiffeq"]["nfe"] == 6 * rows["torchdiffeq"]["steps"] + 2
    assert list(train["rows"]) == [
        f"{name}{mode}" for mode in ("", " adjoint") for name in ("torchdiffeq", "native", "compiled")
    ]
    assert train["rows"]["torchdiffeq adjoint"]["nfe"] > train["rows"]["torchdiffeq"]["nfe"]
    for contest in (spiral, train):
        assert all(row["difference"] <= contest["bound"] for row in contest["rows"].values())


def test_ensembles_are_compared_and_timed(run, tmp_path):
    report = tmp_path / "report.json"
    ensembles = importlib.import_module("ensembles")
    assert ensembles.main(["spiral", "--quick", "--repeats", "2", "--json", str(report)]) == 0
    (contest,) = json.loads(report.read_text())["contests"]
    assert list(contest["rows"]) == ["torchdiffeq", "native", "compiled"]


def test_a_field_that_cannot_be_compiled_is_said_to_be_left_out(run, monkeypatch, capsys):
    def refuse(field):
        raise NotImplementedError("no fields today")

    monkeypatch.setattr(run.flashode, "compile", refuse, raising=False)
    compiled = importlib.import_module("compiled")
    assert compiled.main(["spiral", "--quick", "--repeats", "2"]) == 0
    said = capsys.readouterr()
    assert "compiled spiral is left out: NotImplementedError: no fields today" in said.err
    assert "native" in said.out


def test_every_workload_has_twins_for_diffrax_and_a_name(run):
    module = importlib.import_module("workloads")
    workloads = [w for make in module.WORKLOADS.values() for w in make(True)]
    assert len({w.name for w in workloads}) == len(workloads) >= len(module.WORKLOADS)
    tables = {
        node.targets[0].id: [key.value for key in node.value.keys]
        for node in ast.parse((BENCH / "diffrax_worker.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
    }
    assert set(tables["FIELDS"]) == {type(w.field).__name__ for w in workloads}
    assert set(tables["LOSSES"]) == set(module.LOSSES)


def test_another_process_answers_with_its_result_and_its_times(run, tmp_path):
    compiled = importlib.import_module("compiled")
    workload = next(importlib.import_module("workloads").spiral(True))
    worker = tmp_path / "python"
    worker.write_text(f"#!{sys.executable}\n{WORKER}")
    worker.chmod(0o755)
    with compiled.Worker(str(worker), workload) as other:
        assert other.versions == {"jax": "0", "diffrax": "0"}
        contestant = compiled.with_diffrax(workload, other)["diffrax"]
        (t,) = contestant(None)
        assert torch.equal(t, workload.t) and contestant.stats() == {"steps": 7, "nfe": 43}
        assert contestant.seconds_of(3) == 1.5
        with pytest.raises(RuntimeError, match="no workload of that name"):
            other.ask(name="sprial", number=1)


# Speaks as diffrax_worker.py does; its result is the times that it was given.
WORKER = """
import json, sys
import numpy as np

print(json.dumps({"jax": "0", "diffrax": "0"}), flush=True)
known = set()
for line in sys.stdin:
    question = json.loads(line)
    if question["name"] not in known and "number" in question:
        answer = {"error": "no workload of that name"}
    elif "number" in question:
        answer = {"seconds": question["number"] / 2}
    else:
        known.add(question["name"])
        np.savez(question["result"], np.load(question["data"])["t"])
        answer = {"steps": 7, "compiling": 0.1}
    print(json.dumps(answer), flush=True)
"""


def test_a_python_without_diffrax_is_an_error(run, capfd):
    compiled = importlib.import_module("compiled")
    with pytest.raises(SystemExit):
        compiled.main(["spiral", "--quick", "--jax-python", "/bin/false"])
    assert "has /bin/false jax and diffrax?" in capfd.readouterr().err


def test_the_script_for_gpu_machines_is_valid_bash():
    subprocess.run(["bash", "-n", str(BENCH / "gpu_check.sh")], check=True)

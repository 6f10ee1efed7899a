"""The loop that the examples share: trainings that are interrupted, resumed, and end as if nothing had been."""

import io
import runpy
import shlex
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

# Two trainings with everything that has a state: momentum, a schedule, random batches, random numbers in between.
# A file interrupt_NAME_STEP sends the program as many signals as it has characters, in the middle of that step.
PROGRAM = '''"""Fits two lines."""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {examples!r})
import torch
from training import Training, parser, prepare, table

torch.set_num_threads(1)
p = parser(__doc__, "lines.png")
p.add_argument("--width", type=int, default=3)
args = p.parse_args()
prepare(args)
models = [torch.nn.Linear(args.width, 1) for _ in range(2)]
for name, model in zip(("first", "second"), models):
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 20)
    training = Training(args, name, 5 if args.quick else 20, model=model, optimizer=adam, falling=falling)
    for step in training:
        adam.zero_grad()
        x = torch.randn(8, args.width)
        loss = (model(torch.nn.functional.dropout(x)) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        adam.step()
        sent = Path(f"interrupt_{{name}}_{{step}}")
        if sent.exists():
            signals = len(sent.read_text())
            sent.unlink()
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGINT)
        falling.step()
        training.show(loss=loss)
    print(name, training.history["loss"][-1], torch.rand(1).item(), len(training.history["loss"]))
torch.save([[m.state_dict() for m in models], adam.state_dict(), torch.get_rng_state()], args.out.with_suffix(".end"))
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "lines.py").write_text(PROGRAM.format(examples=str(EXAMPLES)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("training", None)


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*args, program="lines.py") -> Done:
    """A run in this process, which starts at once."""
    out, usual, code = io.StringIO(), sys.argv, None
    sys.argv = [program, *map(str, args)]
    try:
        with redirect_stdout(out), redirect_stderr(io.StringIO()):  # the latter has the progress bar
            runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = usual
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as it was before
    if isinstance(code, str):  # as the interpreter has it
        return Done(1, out.getvalue(), f"{code}\n")
    return Done(code or 0, out.getvalue(), "")


def interrupted(training, step, *args, times=1) -> Done:
    """A run that is sent SIGINT in the middle of a step."""
    Path(f"interrupt_{training}_{step}").write_text(times * "!")
    return run(*args)


def command_in(done):
    """What an interrupted run says to go on with."""
    assert done.returncode == 1
    return shlex.split(done.stderr.splitlines()[-1])


def end(name="lines.end"):
    return torch.load(Path("out") / name, weights_only=True)


@pytest.mark.parametrize(
    "places",
    [[("first", 0)], [("first", 7)], [("second", 3)], [("first", 19)], [("first", 4), ("second", 11)]],
    ids=str,
)
def test_what_goes_on_ends_as_what_was_never_interrupted(folder, places):
    whole = run("--seed", 5, "--out", "out/whole.png")
    assert whole.stdout.startswith("first ")
    arguments = ["--seed", "5"]
    for training, step in places:
        done = interrupted(training, step, *arguments)
        assert f"interrupted after step {step + 1} of 20 ({training})" in done.stderr
        arguments = command_in(done)[2:]
    assert run(*arguments) == whole
    torch.testing.assert_close(end(), end("whole.end"), rtol=0, atol=0)


def test_the_command_that_is_printed_works_as_it_stands(folder):
    whole = run("--out", "out/whole.png")
    Path("interrupt_second_3").write_text("!")
    done = subprocess.run([sys.executable, "lines.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    resumed = subprocess.run(command_in(done), capture_output=True, text=True, timeout=120)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == whole.stdout


def test_the_command_names_the_last_checkpoint_once(folder):
    done = interrupted("first", 2, "--width=4", "--out", "out/a b.png")
    Path("out/a b.pt").rename("kept.pt")
    again = interrupted("first", 5, "--resume=kept.pt", "--width=4", "--out", "out/a b.png")
    assert command_in(again)[1:] == [
        "lines.py",
        "--width=4",
        "--out",
        "out/a b.png",
        "--resume",
        "out/a b.pt",
    ]
    assert command_in(again) == command_in(done)
    third = interrupted("first", 9, "--resume", "out/a b.pt", "--width=4", "--out", "out/a b.png")
    assert command_in(third) == command_in(done)


def test_a_second_interruption_ends_at_once(folder):
    with pytest.raises(KeyboardInterrupt):
        interrupted("first", 2, times=2)
    assert not Path("out/lines.pt").exists()


def test_what_an_earlier_run_left_is_not_taken_for_a_part_of_this_one(folder):
    run("--seed", 1)
    expected = run("--seed", 2, "--out", "out/whole.png")
    command = command_in(interrupted("first", 3, "--seed", 2))
    assert run(*command[2:]) == expected


def test_a_finished_run_can_be_resumed_and_trains_no_more(folder):
    whole = run()
    Path("interrupt_first_0").write_text("!")  # would end it
    assert run("--resume", "out/lines.pt") == whole


STRANGE = "is no checkpoint of an example: give the .pt file that an interrupted run names"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "lines.py: some.pt: No such file or directory\n"),
        (b"words\n", f"lines.py: some.pt {STRANGE}\n"),
        (bytes(50), f"lines.py: some.pt {STRANGE}\n"),
        (b"", "lines.py: some.pt is empty, and no checkpoint\n"),
        ("half", "lines.py: some.pt is damaged: of a checkpoint only "),
        ("folder", "lines.py: some.pt: Is a directory\n"),
        ({"weight": torch.zeros(2)}, f"lines.py: some.pt {STRANGE}\n"),
        (torch.zeros(2), f"lines.py: some.pt {STRANGE}\n"),
        (torch.nn.Linear(1, 1), f"lines.py: some.pt {STRANGE}\n"),
    ],
    ids=["nothing", "words", "zeros", "empty", "half", "folder", "state_dict", "tensor", "module"],
)
def test_what_is_no_checkpoint_is_named(folder, content, message):
    if isinstance(content, bytes):
        Path("some.pt").write_bytes(content)
    elif isinstance(content, str) and content == "folder":
        Path("some.pt").mkdir()
    elif isinstance(content, str) and content == "half":
        interrupted("first", 2)
        Path("some.pt").write_bytes(Path("out/lines.pt").read_bytes()[:1000])
    elif content is not None:
        torch.save(content, "some.pt")
    done = run("--resume", "some.pt")
    assert done.returncode == 1 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seed", 9], "was made with seed=0, and this run has seed=9: give the same"),
        (["--quick"], "was made with quick=False, and this run has quick=True: give the same"),
        (["--width", 2], "was made with width=3, and this run has width=2: give the same"),
    ],
)
def test_a_checkpoint_of_other_arguments_is_refused(folder, args, message):
    interrupted("first", 2)
    assert run(*args, "--resume", "out/lines.pt") == Done(1, "", f"lines.py: out/lines.pt {message}\n")


def test_checkpoints_of_other_programs_and_of_earlier_versions_are_refused(folder):
    interrupted("first", 2)
    text = Path("lines.py").read_text()
    Path("other.py").write_text(text)
    done = run("--resume", "out/lines.pt", program="other.py")
    assert done.stderr == "other.py: out/lines.pt is a checkpoint of lines.py: resume that with it\n"
    for old, new, message in (
        ("torch.nn.Linear(args.width, 1)", "torch.nn.Linear(args.width, 2)", "does not fit first"),
        ("falling=falling", "later=falling", "does not fit first"),
        ("else 20, model", "else 21, model", "is of 20 steps of first, this run has 21"),
    ):
        assert old in text
        Path("lines.py").write_text(text.replace(old, new))
        done = run("--resume", "out/lines.pt")
        assert done.returncode == 1 and message in done.stderr

"""What the examples share: their arguments, loops of training that can be interrupted and resumed, and tables."""

from __future__ import annotations

import argparse
import copy
import shlex
import shutil
import signal
import statistics
import sys
import time
import zipfile
from pathlib import Path

import torch

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


def parser(doc: str, picture: str) -> argparse.ArgumentParser:
    """The arguments that every example takes.

    Args:
        doc: the example's docstring; its first line is the description.
        picture: name of its picture, without folder.
    """
    made = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False)
    add = made.add_argument
    add("--quick", action="store_true", help="a minute's worth: only to see that it runs")
    add("--out", type=Path, default=Path("out") / picture, metavar="PNG", help=f"picture (out/{picture})")
    add("--seed", type=int, default=0, metavar="N", help="of everything random (0)")
    add("--resume", type=Path, metavar="PT", help="go on from the checkpoint of an interrupted run")
    return made


def prepare(args):
    """Seeds torch, makes the folder of the picture, reads the checkpoint to go on from.

    Ends the program, with a line that says why, where one of them cannot be done.
    """
    torch.manual_seed(args.seed)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"{_program()}: {error.filename}: {error.strerror}")
    args.trained = {} if args.resume is None else _checkpoint(args)


class Training:
    """Iterates over the steps of a training; an interrupted one leaves a checkpoint, and says how to go on from it.

    ::

        training = Training(args, "moons", 300, model=model, optimizer=optimizer)
        for step in training:
            ...
            training.show(loss=loss)

    Ctrl-C lets the step in hand finish, so that what goes on from the checkpoint is what would have come, bit
    for bit; a second one ends the program at once. The state of torch's random numbers on the CPU is kept too,
    that of other generators is not.

    Args:
        args: of `parser`, after `prepare`.
        name: of the training, of which a program may have several that run one after the other.
        steps: how many.
        parts: what has ``state_dict`` and ``load_state_dict``, by name.

    Attributes:
        history: what `show` was given, a list of numbers by name.
        seconds: spent in all, those before an interruption included.
    """

    def __init__(self, args, name: str, steps: int, **parts):
        self.args, self.name, self.steps, self.parts = args, name, steps, parts
        self.history: dict[str, list[float]] = {}
        self.seconds, self.first, self.random = 0.0, 0, None
        if name in args.trained:  # if not, the interruption came in a training before this one
            self._go_on_from(args.trained[name])

    def __iter__(self):
        if self.random is not None:
            torch.set_rng_state(self.random)
        if self.first == self.steps:
            return
        began, steps = time.perf_counter() - self.seconds, range(self.first, self.steps)
        if tqdm:
            pause = 0.1 if sys.stderr.isatty() else 2  # seconds; a log need not have it all
            steps = tqdm(steps, self.name, self.steps, initial=self.first, leave=False, mininterval=pause)
        self.bar, self.interrupted = steps, False
        usual = signal.signal(signal.SIGINT, self._interrupt)
        try:
            for step in steps:
                yield step
                self.seconds = time.perf_counter() - began
                if self.interrupted:
                    break
            self._save(step + 1)
        finally:
            signal.signal(signal.SIGINT, usual)
        if self.interrupted:
            sys.exit(self._farewell(step + 1))

    def show(self, **figures):
        """Figures of a step, for the progress bar and the history."""
        figures = {name: float(torch.as_tensor(value).detach()) for name, value in figures.items()}
        for name, value in figures.items():
            self.history.setdefault(name, []).append(value)
        if tqdm:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)

    @property
    def checkpoint(self) -> Path:
        return self.args.out.with_suffix(".pt")

    def _interrupt(self, *_):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def _go_on_from(self, saved):
        path = self.args.resume
        if saved["steps"] != self.steps:
            sys.exit(
                f"{_program()}: {path} is of {saved['steps']} steps of {self.name}, this run has {self.steps}"
            )
        try:
            for name, part in self.parts.items():
                part.load_state_dict(saved["parts"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            sys.exit(
                f"{_program()}: {path} does not fit {self.name}, was it made by another version? {error}"
            )
        self.first, self.history, self.seconds = saved["step"], saved["history"], saved["seconds"]
        self.random = saved["random"]

    def _save(self, step: int):
        """This training, and those before it in this run; never those of another run in the same place."""
        self.args.trained[self.name] = {
            "step": step,
            "steps": self.steps,
            "parts": {name: copy.deepcopy(part.state_dict()) for name, part in self.parts.items()},
            "history": self.history,
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
        }
        written = self.checkpoint.with_suffix(".pt.part")
        torch.save({"made by": _made_by(self.args), "trained": self.args.trained}, written)
        written.replace(self.checkpoint)

    def _farewell(self, step: int) -> str:
        name = Path(sys.executable).name
        python = name if shutil.which(name) == sys.executable else sys.executable
        words = shlex.join([python, *_without_resume(sys.argv), "--resume", str(self.checkpoint)])
        return f"\n{_program()}: interrupted after step {step} of {self.steps} ({self.name}). Go on with\n  {words}"


def _made_by(args) -> dict[str, str]:
    """The program and its arguments, without those that may differ when it goes on."""
    given = {k: str(v) for k, v in vars(args).items() if k not in ("out", "resume", "trained")}
    return {"program": _program()} | given


_STRANGE = "is no checkpoint of an example: give the .pt file that an interrupted run names"


def _checkpoint(args) -> dict:
    """The trainings in the file ``args.resume``, by name."""
    try:
        saved = torch.load(args.resume, weights_only=True)
    except OSError as error:
        sys.exit(f"{_program()}: {args.resume}: {error.strerror}")
    except Exception:  # whatever torch and pickle make of bytes that are not theirs
        sys.exit(f"{_program()}: {args.resume} {_damage(args.resume)}")
    if not isinstance(saved, dict) or set(saved) != {"made by", "trained"}:
        sys.exit(f"{_program()}: {args.resume} {_STRANGE}")
    then, now = saved["made by"], _made_by(args)
    if then["program"] != now["program"]:
        sys.exit(f"{_program()}: {args.resume} is a checkpoint of {then['program']}: resume that with it")
    for name in then | now:
        if then.get(name) != now.get(name):
            sys.exit(
                f"{_program()}: {args.resume} was made with {name}={then.get(name)}, and this run has "
                f"{name}={now.get(name)}: give the same"
            )
    return saved["trained"]


def _damage(path: Path) -> str:
    """Why a file cannot be read as a checkpoint."""
    content = path.read_bytes()
    if not content:
        return "is empty, and no checkpoint"
    if content.startswith(b"PK") and not zipfile.is_zipfile(path):  # an archive, as torch.save writes it
        return f"is damaged: of a checkpoint only {len(content):,} bytes are there, or some were changed"
    return _STRANGE


def _without_resume(words: list[str]) -> list[str]:
    rest, left = iter(words), []
    for word in rest:
        if word == "--resume":
            next(rest)
        elif not word.startswith("--resume="):
            left.append(word)
    return left


def table(headings: list[str], rows: list[list]):
    """Prints rows under headings: words to the left, numbers to the right."""
    cells = [headings, *([_text(x) for x in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    numeric = [all(not isinstance(row[i], str) for row in rows) for i in range(len(headings))]
    for row in cells:
        padded = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric))
        print("  ".join(padded).rstrip())


def race(runs, turns):
    """Times functions in turns, after a call of each to warm up, and prints a table of the medians.

    Args:
        runs: what to call, by name; the last is what the others are compared with.
        turns: calls of each that are timed.
    """
    seconds = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name] += [time.perf_counter() - began] * (turn > 0)
    medians = [statistics.median(seconds[name]) for name in runs]
    print()
    table(["", "ms", "times as fast"], [[n, 1000 * m, medians[-1] / m] for n, m in zip(runs, medians)])


def _text(x) -> str:
    return f"{x:.4g}" if isinstance(x, float) else f"{x:,}" if isinstance(x, int) else str(x)


def _program() -> str:
    return Path(sys.argv[0]).name

"""What the examples share: arguments, loops of training that can be interrupted and resumed, tables, pictures."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
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
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    add = made.add_argument
    add("--quick", action="store_true", help="a minute's worth: only to see that it runs")
    add("--out", type=Path, default=Path("out") / picture, metavar="PNG", help=f"picture (out/{picture})")
    add("--seed", type=int, default=0, metavar="N", help="of everything random (0)")
    add("--resume", type=Path, metavar="PT", help="go on from the checkpoint of an interrupted run")
    return made


def prepare(args):
    """Seeds torch, and makes the folder of the picture. Ends the program where that cannot be done."""
    torch.manual_seed(args.seed)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"{_program()}: {error.filename}: {error.strerror}")


class Training:
    """Iterates over the steps of a training; an interrupted one leaves a checkpoint, and says how to go on from it.

    ::

        training = Training(args, "moons", 300, model=model, optimizer=optimizer)
        for step in training:
            ...
            training.show(loss=loss)

    Args:
        args: of `parser`; ``args.resume`` is a checkpoint to go on from.
        name: of the training: one in the program, or one of several that run one after the other.
        steps: how many.
        parts: what has ``state_dict`` and ``load_state_dict``, by name.

    Attributes:
        history: what `show` was given, a list of numbers by name.
        seconds: spent in all, those before an interruption included.
    """

    def __init__(self, args, name: str, steps: int, **parts):
        self.args, self.name, self.steps, self.parts = args, name, steps, parts
        self.history: dict[str, list[float]] = {}
        self.seconds, self.first = 0.0, 0
        if args.resume is not None:
            self._load(args.resume)

    def __iter__(self):
        if self.first == self.steps:
            return
        began, step = time.perf_counter() - self.seconds, self.first
        steps = range(self.first, self.steps)
        self.bar = tqdm(steps, self.name, self.steps, initial=self.first, leave=False) if tqdm else steps
        try:
            for step in self.bar:
                yield step
                self.seconds = time.perf_counter() - began
        except KeyboardInterrupt:
            self.seconds = time.perf_counter() - began
            sys.exit(self._saved(step))
        self._save(self.steps)

    def show(self, **figures):
        """Figures of a step, for the progress bar and the history."""
        for name, value in figures.items():
            self.history.setdefault(name, []).append(float(value))
        if tqdm:
            self.bar.set_postfix(
                {name: f"{float(value):.4g}" for name, value in figures.items()}, refresh=False
            )

    @property
    def checkpoint(self) -> Path:
        return self.args.out.with_suffix(".pt")

    def _load(self, path: Path):
        try:
            saved = torch.load(path, weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            sys.exit(f"{_program()}: {path} is no checkpoint: {error}")
        if self.name not in saved:
            return  # it was interrupted in a training before this one
        saved = saved[self.name]
        for name, part in self.parts.items():
            part.load_state_dict(saved["parts"][name])
        self.first, self.history, self.seconds = saved["step"], saved["history"], saved["seconds"]
        torch.set_rng_state(saved["random"])

    def _save(self, step: int):
        others = {}
        if self.checkpoint.exists():
            others = torch.load(self.checkpoint, weights_only=True)
        mine = {
            "step": step,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "history": self.history,
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
        }
        torch.save(others | {self.name: mine}, self.checkpoint)

    def _saved(self, step: int) -> str:
        self._save(step)
        words = [a for a in sys.argv if a != "--resume" and a != str(self.args.resume)]
        command = shlex.join([Path(sys.executable).name, *words, "--resume", str(self.checkpoint)])
        return f"\n{_program()}: interrupted at step {step} of {self.steps} ({self.name}). Go on with\n  {command}"


def table(headings: list[str], rows: list[list]):
    """Prints rows under headings: words to the left, numbers to the right."""
    cells = [headings, *([_text(x) for x in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    numeric = [all(not isinstance(row[i], str) for row in rows) for i in range(len(headings))]
    for row in cells:
        padded = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric))
        print("  ".join(padded).rstrip())


INK, PALE, COLOURS = "#2b2b33", "#d3d7e0", ("#1f6fb4", "#d1495b", "#3a9172", "#e0a030")
_STYLE = {
    "font.size": 10, "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip


def save_picture(args, draw, size):
    """Calls ``draw(figure)`` with a figure of matplotlib, ``size`` inches wide and high, and saves what it drew."""
    try:
        import matplotlib
    except ImportError:
        print("\nno picture: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(_STYLE)
    figure = plt.figure(figsize=size, layout="constrained")
    draw(figure)
    figure.savefig(args.out, format="png", dpi=110)
    print(f"\npicture: {args.out}")


def _text(x) -> str:
    return f"{x:.4g}" if isinstance(x, float) else f"{x:,}" if isinstance(x, int) else str(x)


def _program() -> str:
    return Path(sys.argv[0]).name

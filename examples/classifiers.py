"""Trains classifiers of images, and measures them: what digits.py, solver_table.py and cifar.py share."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from training import Training

COLOURS = ("#8a93a6", "#2b2b33", "#1f6fb4", "#d1495b")


@dataclass
class Trained:
    """A trained net and its figures: test error in %, memory of a step in MB, calls of the field in a step."""

    name: str
    net: nn.Module
    error: float
    parameters: int
    seconds: float
    memory: float
    nfe: tuple[float, float]
    losses: list[float]

    HEADINGS = ["model", "test error %", "parameters", "s", "MB a step", "nfe forward", "nfe backward"]

    @property
    def row(self):
        return [self.name, self.error, self.parameters, self.seconds, self.memory, *self.nfe]


def small_stem(net, channels):
    """The stem for images of 8x8 pixels: one strided convolution, so that 4x4 of them are left for the body."""
    net.stem = nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.GroupNorm(min(32, channels), channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 4, stride=2, padding=1),
    )
    return net


def compare(
    args, nets, train, test, steps, batch=128, rate=2e-3, change=lambda images: images
) -> list[Trained]:
    """Trains nets, one after the other, on the cross entropy of random batches, the same ones for all.

    Adam, with a learning rate that falls along a cosine.

    Args:
        args: of `training.parser`.
        nets: by name.
        train, test: `flashode.datasets.Labelled` images.
        change: what is done to a batch of training images: augmentation.
    """
    memory = peak_memory(nets, train.images[:batch], train.labels[:batch])
    trained = []
    for name, net in nets.items():
        torch.manual_seed(args.seed)
        adam = torch.optim.Adam(net.parameters(), rate)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        training = Training(args, name, steps, net=net, adam=adam, falling=falling)
        for _ in training:
            rows = torch.randint(len(train.labels), (batch,))
            adam.zero_grad()
            loss = cross_entropy(net(change(train.images[rows])), train.labels[rows])
            loss.backward()
            adam.step()
            falling.step()
            forward, backward = calls(net)
            training.show(loss=loss.item(), forward=forward, backward=backward)
        history = training.history
        nfe = tuple(sum(history[way]) / steps for way in ("forward", "backward"))
        parameters = sum(p.numel() for p in net.parameters())
        error = 100 * wrong(net, test).float().mean().item()
        trained.append(
            Trained(name, net, error, parameters, training.seconds, memory[name], nfe, history["loss"])
        )
    return trained


def calls(net) -> tuple[int, int]:
    """Calls of the field in the last step, forward and backward; a residual block is one call, of its own field."""
    if isinstance(net.body, nn.Sequential):
        return len(net.body), 0
    return net.body.nfe_forward, net.body.nfe_backward


@torch.no_grad()
def wrong(net, test) -> torch.Tensor:
    """Which of the images get a wrong label."""
    scores = torch.cat([net(images) for images in test.images.split(500)])
    return scores.argmax(1) != test.labels


# ---- memory ----------------------------------------------------------------------------------


def peak_memory(nets, images, labels, loss=cross_entropy) -> dict[str, float]:
    """What a training step of a batch needs in MB, by net, beside the net, the images and the libraries.

    It is the rise of the peak of resident memory over what was resident before the step, in a process of its own, on
    one thread, after a step of two images: activations and gradients of all kinds, those of the solver too.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc there gives memory back as soon as it is free
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flashode"])  # imported once for all processes, torch with it
    rises = {}
    for name, net in nets.items():
        with ProcessPoolExecutor(1, context) as pool:
            rises[name] = pool.submit(_rise, net, images, labels, loss).result() / 2**20
    return rises


def _rise(net, images, labels, loss) -> int:
    torch.set_num_threads(1)

    def step(rows):
        loss(net(images[:rows]), labels[:rows]).backward()

    step(2)
    _peak()
    before = _peak()
    step(len(images))
    return _peak() - before


def _peak() -> int:
    """Peak of resident memory since the last call, in bytes; without Linux's /proc since the start of the process."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    try:
        reset.write_text("5")
    except OSError:
        pass  # not everyone may; then it is the peak since the start
    return peak


# ---- pictures --------------------------------------------------------------------------------


def draw_wrong(figure, row, net, test, title):
    """The first ten images that a net gets wrong, each in a column of a row of the grid, under ``title(label, answer)``."""
    rows = wrong(net, test).nonzero()[:10, 0]
    with torch.no_grad():
        answers = net(test.images[rows]).argmax(1) if len(rows) else rows
    for place, (image, label, answer) in zip(row, zip(test.images[rows], test.labels[rows], answers)):
        axes = figure.add_subplot(place)
        axes.axis("off")
        axes.imshow(image[0] if len(image) == 1 else image.permute(1, 2, 0), cmap="gray_r")
        axes.set_title(title(int(label), int(answer)), fontsize=8, loc="center", fontweight="normal")


def draw_losses(axes, trained):
    for each, colour in zip(trained, COLOURS):
        losses = torch.tensor(each.losses)
        width = max(1, len(losses) // 25)
        smooth = torch.stack([losses[max(0, i - width) : i + width + 1].median() for i in range(len(losses))])
        axes.plot(losses, color=colour, lw=0.6, alpha=0.25)
        axes.plot(smooth, color=colour, lw=1.7, label=each.name)
    axes.set(title="Training loss", xlabel="step", ylabel="cross entropy", yscale="log")
    axes.legend(loc="lower left")

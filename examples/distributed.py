"""Trains a neural ODE on several processes: each has a part of every batch, DDP averages the gradients.

    torchrun --nproc-per-node 2 examples/distributed.py      # two processes, on one machine or GPU each
    python examples/distributed.py                           # the same training in one process

Problem. The law of a damped pendulum, (angle, velocity)' = (velocity, -sin(angle) - 0.2 velocity), is
learned as a network net(y) from pairs of states: at some time and one unit later.

Right answer. The network predicts states that it has not seen to an rms error of about 0.02, where the
states themselves have an rms of 0.81. One process or several, the error is the same to two digits: they
see the same batches, and their gradients differ by rounding and the solver's tolerance alone.

How it works, and what to keep to in a program of your own:
- The model that DDP wraps is the whole one, with the solve inside `forward`: DDP waits for every
  parameter's gradient, and a solve delivers each of them once, at the end of its backward pass.
- A solve never communicates. Step-size control sees the part of the batch that a process has, so that
  processes may take different numbers of steps (the table counts calls), and wait for each other only
  where DDP averages gradients. A batch split by difficulty would leave some of them idle.
- Parts are of equal size: DDP takes the mean of the processes' gradients, whatever their parts.
- One process that fails, say with a `flashode.SolveError`, must end the program: the others wait for it.
  torchrun sees to that. Do not catch the error and go on with the next batch.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import flashode

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them


class Pendulum(nn.Module):
    """The state ``duration`` later, by a law that is learned; counts calls of the field."""

    def __init__(self, duration=1.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
        self.register_buffer("t", torch.tensor([0.0, duration]))
        self.calls = 0

    def field(self, t, y):
        self.calls += 1
        return self.net(y)

    def forward(self, y0):
        params = tuple(self.net.parameters())
        return flashode.odeint_adjoint(self.field, y0, self.t, rtol=1e-5, atol=1e-6, adjoint_params=params)[
            -1
        ]


def law(t, y):
    angle, velocity = y.unbind(-1)
    return torch.stack([velocity, -torch.sin(angle) - 0.2 * velocity], -1)


def pairs(rows, generator, model):
    """Random states, and those that follow them by the true law; the same on every process."""
    start = 3 * torch.rand(rows, 2, generator=generator) - 1.5
    y0 = start.to(model.t.device)
    with torch.no_grad():
        return y0, flashode.odeint(law, y0, model.t, rtol=1e-6, atol=1e-7)[-1]


def train(model, args):
    """The seconds it took."""
    wrapped = DistributedDataParallel(model) if PROCESSES > 1 else model
    adam = torch.optim.Adam(model.parameters(), lr=0.03)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, args.iterations)
    generator = torch.Generator().manual_seed(args.seed)
    begin = time.perf_counter()
    for iteration in progress(args.iterations):
        y0, y1 = pairs(args.batch, generator, model)
        own = slice(RANK, None, PROCESSES)
        adam.zero_grad()
        loss = nn.functional.mse_loss(wrapped(y0[own]), y1[own])
        loss.backward()
        adam.step()
        falling.step()
    return time.perf_counter() - begin


def progress(iterations):
    """Counts to ``iterations``; the first process shows it as a bar, or by lines without tqdm."""
    if tqdm:
        pause = 0.1 if sys.stderr.isatty() else 2  # seconds; a log need not have it all
        yield from tqdm(range(iterations), "training", ncols=88, mininterval=pause, disable=RANK > 0)
        return
    for iteration in range(iterations):
        yield iteration
        if RANK == 0 and (iteration + 1) % max(1, iterations // 5) == 0:
            print(f"training: {iteration + 1}/{iterations}", flush=True)


def gathered(numbers) -> torch.Tensor:
    """A row of numbers from every process, on all of them."""
    own = torch.tensor(numbers, dtype=torch.float64)
    rows = [torch.empty_like(own) for _ in range(PROCESSES)]
    if PROCESSES > 1:
        dist.all_gather(rows, own)
    else:
        rows = [own]
    return torch.stack(rows)


def report(model, args, seconds):
    calls = model.calls / args.iterations
    y0, y1 = pairs(1000, torch.Generator().manual_seed(args.seed + 1), model)
    with torch.no_grad():
        rms = (model(y0) - y1).square().mean().sqrt().item()
    size = sum(p.double().abs().sum().item() for p in model.parameters())
    table = gathered([args.batch / PROCESSES, calls, 1000 * seconds / args.iterations, size])
    if RANK > 0:
        return
    print("\nprocess   rows   calls of the field   ms per iteration")
    for rank, (rows, calls, ms, _) in enumerate(table.tolist()):
        print(f"{rank:>7}{rows:>7.0f}{calls:>21.1f}{ms:>19.1f}")
    spread = (table[:, -1].max() - table[:, -1].min()).item()
    print(f"sum of |parameters|: {table[0, -1]:.6f}, differs between processes by {spread:.1g}")
    print(f"rms error on 1,000 other states: {rms:.5f}, of an rms of {y1.square().mean().sqrt():.2f}")


def main():
    args = parse()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # tensors this small only lose by being shared out
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if PROCESSES > 1:
        # gloo averages what lives on CPUs, nccl what lives on GPUs.
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    model = Pendulum().to(device)
    report(model, args, train(model, args))
    if PROCESSES > 1:
        dist.barrier()
        dist.destroy_process_group()
        # Threads of gloo outlive the group (torch 2.13). One that still holds a Tensor of DistributedDataParallel's
        # while Python is torn down aborts the process, now and then; so it is left without being torn down.
        sys.stdout.flush()
        os._exit(0)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--iterations", type=int, default=400, metavar="N", help="iterations (400)")
    add("--quick", action="store_true", help="20 iterations: only to see that it runs")
    add("--batch", type=int, default=256, metavar="ROWS", help="of all processes together (256)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU for each process (cpu)")
    add("--seed", type=int, default=0, metavar="N", help="of the first network and the batches (0)")
    args = parser.parse_args()
    if args.quick:
        args.iterations = 20
    if args.iterations < 1:
        parser.error(f"--iterations must be at least 1, got {args.iterations}")
    if args.batch < 1 or args.batch % PROCESSES:
        parser.error(f"--batch must be a multiple of the number of processes, {PROCESSES}, got {args.batch}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    return args


if __name__ == "__main__":
    main()

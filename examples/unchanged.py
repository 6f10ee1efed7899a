"""A continuous normalizing flow written for torchdiffeq, which flashode runs as it is.

    python examples/unchanged.py                              by torchdiffeq
    python -m flashode.compat examples/unchanged.py           by flashode

Problem. Points in the plane come from eight Gaussians on a circle. A flow carries them to one Gaussian, and
is trained to make them likely: with the noise z1 that a point z0 is carried to, log p(z0) = log N(z1) minus
the change of log-density on the way, d log p/dt = -trace(df/dz) (Chen et al. 2018).

Right answer. The mean of -log p comes near that of the Gaussians themselves, 2.50: nothing can be below it.
Training for longer, and a wider network, get nearer.
"""

import argparse
import math
import time

import torch
import torchdiffeq
from torchdiffeq import odeint_adjoint as odeint

NOISE = 0.3
CENTRES = torch.tensor([[2 * math.cos(k * math.pi / 4), 2 * math.sin(k * math.pi / 4)] for k in range(8)])
SPAN = torch.tensor([0.0, 1.0])


class CNF(torch.nn.Module):
    """The slopes of a point and of its log-density, with an exact trace."""

    def __init__(self, width):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, width), torch.nn.Tanh(),
            torch.nn.Linear(width, 2),
        )  # fmt: skip
        self.calls = 0

    def forward(self, t, state):
        self.calls += 1
        z, _ = state
        with torch.enable_grad():
            z = z.requires_grad_()
            dz = self.net(torch.cat([z, t.expand(len(z), 1)], 1))
            rows = [torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0] for i in range(2)]
        return dz, -(rows[0][:, 0] + rows[1][:, 1])


def data(n):
    return CENTRES[torch.randint(8, (n,))] + NOISE * torch.randn(n, 2)


def normal(z, centre, spread):
    """log-density of a Gaussian in the plane."""
    return -((z - centre) ** 2).sum(-1) / (2 * spread**2) - math.log(2 * math.pi * spread**2)


def loss(cnf, z0):
    """Mean of -log p(z0)."""
    z, change = odeint(cnf, (z0, torch.zeros(len(z0))), SPAN, rtol=1e-4, atol=1e-4, method="dopri5")
    return (change[-1] - normal(z[-1], 0.0, 1.0)).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--quick", action="store_true", help="a few iterations, to see that it runs")
    args = parser.parse_args()
    iterations, width = (10, 16) if args.quick else (args.iterations, 64)
    served_by = getattr(torchdiffeq, "__flashode__", None)
    print(f"torchdiffeq is {torchdiffeq.__version__ if served_by is None else f'flashode {served_by}'}")

    torch.manual_seed(0)
    cnf = CNF(width)
    adam = torch.optim.Adam(cnf.parameters(), 5e-3)
    begin = time.perf_counter()
    for iteration in range(1, iterations + 1):
        adam.zero_grad()
        value = loss(cnf, data(256))
        value.backward()
        adam.step()
        if iteration % max(1, iterations // 10) == 0:
            print(
                f"iteration {iteration:4d}: loss {value.item():.4f}, {cnf.calls} calls of the field so far",
                flush=True,
            )
    seconds = time.perf_counter() - begin

    test = data(1000)
    best = -torch.logsumexp(
        torch.stack([normal(test, centre, NOISE) for centre in CENTRES]), 0
    ).mean() + math.log(8)
    print(
        f"loss on 1,000 other points: {loss(cnf, test).item():.4f}; of the Gaussians themselves {best.item():.2f}"
    )
    print(f"{seconds:.1f} s for {iterations} iterations, {cnf.calls} calls of the field")


if __name__ == "__main__":
    main()

"""Continuous normalizing flows learn four densities of the plane: circles, moons, Gaussians and a picture.

Problem. Samples of a density are given, and the density is wanted: a field whose flow carries a standard normal at
t = 0 to the data at t = 1,

    dz/dt = f(t, z),    d log p / dt = -trace(df/dz),    f(t, z) = sum_i sigma_i(t) w_i(t) tanh(u_i(t) . z + b_i(t)),

all of whose parameters a hypernetwork gives for the time (`flashode.nn.GatedSum`; Chen et al. 2018, Neural ordinary
differential equations, section 4). It is trained by the likelihood of the samples: solved from t = 1 back to t = 0,
with Fehlberg's method.

Many fields carry the normal to the data, and the likelihood does not say which to take: left to itself it finds ones
that whirl all points about, and make errors of the solver larger on the way. So the loss has two costs as well, with
small weights: the kinetic energy of the paths, and the squared norm of the field's Jacobian along them (Finlay et al.
2020, How to train your neural ODE, arXiv:2002.02798). `--free` leaves them out.

Right answer. All four densities are known, and so is the least negative log-likelihood (NLL) that any model can have
on new points: that of the true density on them. What a flow's exceeds it by is its Kullback-Leibler divergence
from the truth, in nats. (FFJORD's paper gives no figures for data of the plane, only pictures.) Samples must
find every mode: both circles, all eight Gaussians. A flow can be inverted: points that go to the base and come back,
or the other way round, must be where they were to 1e-4.

Cost. The same training step by the same field, with the same loss, is timed three times: compiled, called from Python
by flashode, and with torchdiffeq's odeint_adjoint, if that is installed; with dopri5, which all of them have.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from dataclasses import dataclass, replace

import torch

import flashode
from flashode import datasets
from flashode.nn import CNF, GatedSum, exact_divergence
from pictures import save_picture
from training import Training, parser, prepare, table

try:
    import torchdiffeq
except ImportError:
    torchdiffeq = None

BATCH = 512
SOLVER = {"method": "fehlberg45", "rtol": 1e-3, "atol": 1e-3}
TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the pictures
ACCURACIES = [(torch.float32, 1e-5), (torch.float32, 1e-6), (torch.float32, 1e-7), (torch.float64, 1e-8)]
HALF = 2.6  # of the width of a picture
NOISE = {"circles": 0.1, "moons": 0.1, "eight_gaussians": 0.2}


# ---- data, and the densities that they are drawn from ---------------------------------------------


def circles_log_prob(x, n=200):
    """Two circles of radius 1 and 2, as likely as each other, blurred: a sum over points of them."""
    angle = torch.arange(n) * (2 * math.pi / n)
    ring = torch.stack([angle.cos(), angle.sin()], -1)
    return blurred_log_prob(x, torch.cat([ring, 2 * ring]), NOISE["circles"])


def moons_log_prob(x, n=200):
    angle = (torch.arange(n) + 0.5) * (math.pi / n)
    upper = torch.stack([angle.cos(), angle.sin()], -1)
    return blurred_log_prob(x, torch.cat([upper, torch.tensor([1.0, 0.5]) - upper]), NOISE["moons"])


def eight_gaussians_log_prob(x):
    angle = torch.arange(8) * (math.pi / 4)
    return blurred_log_prob(x, 2 * torch.stack([angle.cos(), angle.sin()], -1), NOISE["eight_gaussians"])


def blurred_log_prob(x, centres, noise):
    """Of equal Gaussians around centres."""
    squared = torch.cdist(x, centres).square() / noise**2
    return torch.logsumexp(-squared / 2, 1) - math.log(len(centres) * 2 * math.pi * noise**2)


def drawn_image(size=64) -> torch.Tensor:
    """A grey image of a spiral that gets darker outwards around a dark disc: brightness from 0 to 1."""
    y, x = torch.meshgrid(*[torch.linspace(1, -1, size), torch.linspace(-1, 1, size)], indexing="ij")
    radius, angle = torch.hypot(x, y), torch.atan2(y, x)
    arm = torch.cos(2 * (angle - 3.2 * radius)).clamp(min=0) ** 2
    dark = torch.where(radius < 0.2, 0.9, torch.where(radius > 0.32, arm * radius, 0.0))
    return 1 - torch.where(radius < 0.95, dark, 0.0)


def image_log_prob(x, image):
    """Even inside of a pixel, in proportion to its darkness."""
    size = len(image)
    weight = (1 - image.double()) / (1 - image.double()).sum() * (size / 4) ** 2
    column, row = ((x[:, 0] + 2) * size / 4).long(), ((2 - x[:, 1]) * size / 4).long()
    return weight[row.clamp(0, size - 1), column.clamp(0, size - 1)].log().float()


def problems():
    """By name: a function that draws points, and the log-density of them."""
    image = drawn_image()
    return {
        "circles": (lambda n: datasets.circles(n, noise=NOISE["circles"])[0], circles_log_prob),
        "moons": (lambda n: datasets.moons(n, noise=NOISE["moons"])[0], moons_log_prob),
        "eight_gaussians": (
            lambda n: datasets.eight_gaussians(n, noise=NOISE["eight_gaussians"]), eight_gaussians_log_prob,
        ),
        "image": (lambda n: datasets.image_points(image, n), lambda x: image_log_prob(x, image)),
    }  # fmt: skip


# ---- training ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How one density is learned."""

    units: int = 64
    hidden: int = 32  # of the hypernetwork
    steps: int = 2500
    rate: float = 1e-2  # of learning, at its highest
    kinetic: float = 1e-2  # weights of the costs
    jacobian: float = 1e-3

    def loss(self, log_prob, kinetic, jacobian):
        """The negative log-likelihood, and the costs of paths."""
        return (self.kinetic * kinetic + self.jacobian * jacobian - log_prob).mean()


def recipe_of(name, args) -> Recipe:
    recipe = Recipe(128, 64, 4000, 2e-2, 3e-3, 5e-4) if name == "image" else Recipe()
    recipe = replace(recipe, kinetic=0.0, jacobian=0.0) if args.free else recipe
    return replace(recipe, steps=12) if args.quick else recipe


@dataclass
class Fit:
    """What became of one density."""

    name: str
    flow: CNF
    points: torch.Tensor  # new ones, which it was not trained on
    samples: torch.Tensor
    nll: float
    least: float
    energy: float  # integral of the squared speed along a path, on average
    ms: float  # a step of training

    @property
    def calls(self) -> int:
        """Of the field, by one solve from base to data."""
        with torch.no_grad():
            z, t = self.flow.base.sample((BATCH,)), torch.tensor([0.0, 1.0])
            return flashode.solve(self.flow.field, z, t, **SOLVER).stats.nfe

    @torch.no_grad()
    def round_trips(self, dtype, tolerance) -> torch.Tensor:
        """Distances of points to where the flow takes them by way of the base, and of base points by way of data."""
        net = copy.deepcopy(self.flow.field.func)
        flow = CNF(flashode.compile(net), method="dopri8", rtol=tolerance, atol=tolerance).to(dtype)
        x, z = self.points[:1000].to(dtype), flow.base.sample((1000,))
        return torch.cat([flow(flow.inverse(x)) - x, flow.inverse(flow(z)) - z]).norm(dim=1)


def fit(args, name, draw, log_prob):
    recipe = recipe_of(name, args)
    torch.manual_seed(args.seed)
    points = draw(4000)
    flow = CNF(flashode.compile(GatedSum(2, recipe.units, recipe.hidden)), **SOLVER)
    adam = torch.optim.Adam(flow.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, recipe.rate, recipe.steps, pct_start=0.1)
    training = Training(args, name, recipe.steps, flow=flow, adam=adam, schedule=schedule)
    for _ in training:
        adam.zero_grad()
        found, *costs = flow.log_prob_and_costs(draw(BATCH))
        recipe.loss(found, *costs).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        adam.step()
        schedule.step()
        training.show(nll=-found.mean())
    fine = CNF(flow.field, method="fehlberg45", rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        found, energy, _ = fine.log_prob_and_costs(points)
        samples = fine.sample(4000)
    nll, least = -found.mean().item(), -log_prob(points).mean().item()
    ms = 1e3 * training.seconds / recipe.steps
    return Fit(name, fine, points, samples, nll, least, energy.mean().item(), ms)


def spread(distances) -> str:
    return f"{distances.max():.1e} {distances.median():.1e}"


def shares_of_circles(samples) -> tuple[float, float]:
    """Part of the samples within three standard deviations of either circle."""
    radius = samples.norm(dim=1)
    return tuple(((radius - r).abs() < 3 * NOISE["circles"]).float().mean().item() for r in (1, 2))


def shares_of_gaussians(samples) -> torch.Tensor:
    """Part of the samples within three standard deviations of each of the eight."""
    angle = torch.arange(8) * (math.pi / 4)
    centres = 2 * torch.stack([angle.cos(), angle.sin()], -1)
    return (torch.cdist(samples, centres) < 3 * NOISE["eight_gaussians"]).float().mean(0)


# ---- cost --------------------------------------------------------------------------------------------


def compare(recipe, flow, points, turns):
    """Name, milliseconds of processor time, and times the first, of a training step with the field as it is now."""
    field, tolerances = flow.field.func, {"rtol": 1e-3, "atol": 1e-3}
    ours = CNF(flow.field, **tolerances)
    called = CNF(field, **tolerances)
    runs = {
        "compiled": lambda: ours.log_prob_and_costs(points),
        "called from Python": lambda: called.log_prob_and_costs(points),
    }
    if torchdiffeq:
        runs["torchdiffeq"] = lambda: torchdiffeq_log_prob_and_costs(field, flow.base, points, tolerances)
    seconds, losses = {name: [] for name in runs}, {}
    for turn in range(turns + 1):  # the first is not counted: programs are made
        for name, log_prob_and_costs in runs.items():
            field.zero_grad()
            began = time.process_time()
            losses[name] = recipe.loss(*log_prob_and_costs())
            losses[name].backward()
            seconds[name] += [time.process_time() - began] if turn else []
    first = seconds["compiled"]
    for name, each in seconds.items():
        times = statistics.median(b / a for a, b in zip(first, each))
        yield name, 1e3 * statistics.median(each), times, losses[name].item()


class WithCosts(torch.nn.Module):
    """The field of a flow as torchdiffeq is given it."""

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, t, state):
        slope, divergence, jacobian = exact_divergence(self.field, t, state[0], frobenius=True)
        return slope, -divergence, slope.square().sum(1), jacobian


def torchdiffeq_log_prob_and_costs(field, base, x, tolerances):
    state, t = (x, *torch.zeros(3, len(x))), torch.tensor([1.0, 0.0])
    ys = torchdiffeq.odeint_adjoint(WithCosts(field), state, t, method="dopri5", **tolerances)
    z, fallen, kinetic, jacobian = (y[-1] for y in ys)
    return base.log_prob(z) - fallen, -kinetic, -jacobian


# ---- picture ----------------------------------------------------------------------------------------


def draw(figure, fits):
    """A row for every density: data, the density of the flow at five times, and samples."""
    columns = 2 + len(TIMES)
    axes = figure.subplots(len(fits), columns, squeeze=False)
    side = torch.linspace(-HALF, HALF, 100)
    grid = torch.cartesian_prod(side, side)
    for row, fit in zip(axes, fits):
        panels = [histogram(fit.points)]
        with torch.no_grad():
            panels += [fit.flow.log_prob(grid, t).exp().view(100, 100) for t in TIMES]
        panels.append(histogram(fit.samples))
        top = panels[-2].flatten().quantile(0.998)
        for place, (ax, panel) in enumerate(zip(row, panels)):
            high = top if 0 < place < columns - 1 else panel.flatten().quantile(0.998)
            ax.imshow(panel.T, origin="lower", cmap="magma", vmin=0, vmax=max(high.item(), 1e-9))
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        row[0].set_ylabel(fit.name.replace("_", " "))
    for ax, title in zip(axes[0], ["data", *(f"density, t = {t:g}" for t in TIMES), "samples"]):
        ax.set_title(title, fontsize=9, loc="center")


def histogram(points) -> torch.Tensor:
    inside = points[points.abs().amax(1) < HALF]
    place = ((inside + HALF) / (2 * HALF) * 65).long()
    return (65 * place[:, 0] + place[:, 1]).bincount(minlength=65 * 65).view(65, 65).float()


# ---- command line ---------------------------------------------------------------------------------


def main():
    arguments = parser(__doc__, "flows.png")
    arguments.add_argument("--free", action="store_true", help="train without the costs of paths")
    args = arguments.parse_args()
    prepare(args)
    torch.set_num_threads(1)  # tensors this small only lose by being shared out
    fits = [fit(args, name, *functions) for name, functions in problems().items()]
    rows = [[f.name, f.nll, f.least, f.nll - f.least, f.energy, f.calls, f.ms] for f in fits]
    table(["density", "NLL", "least NLL", "KL to truth", "energy", "calls", "ms a step"], rows)
    print("\nlargest and median distance of points after there and back:")
    headings = [f"{str(dtype)[6:]}, {tolerance:g}" for dtype, tolerance in ACCURACIES]
    table(["density", *headings], [[f.name, *(spread(f.round_trips(*a)) for a in ACCURACIES)] for f in fits])
    inner, outer = shares_of_circles(fits[0].samples)
    print(f"\ncircles: {inner:.1%} of the samples are on the inner one, {outer:.1%} on the outer one")
    shares = shares_of_gaussians(fits[2].samples)
    print(
        f"eight Gaussians: {shares.sum():.1%} of the samples are in one, {shares.min():.1%} in the rarest\n"
    )
    turns = 3 if args.quick else 15
    table(
        ["a training step on circles", "ms", "times compiled", "loss"],
        list(map(list, compare(recipe_of("circles", args), fits[0].flow, fits[0].points[:BATCH], turns))),
    )
    size = (1.55 * (2 + len(TIMES)), 1.62 * len(fits))
    save_picture(args, lambda figure: draw(figure, fits), size)


if __name__ == "__main__":
    main()

"""Stochastic differential equations with diagonal noise, by Euler-Maruyama's and Milstein's methods."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import ArgumentError, ArgumentTypeError
from ..arguments import kind_of, require_number

MOST_STEPS = 10**8  # their ends are kept
METHODS = ("euler_maruyama", "milstein")


def sdeint(
    drift, diffusion, y0: Tensor, t: Tensor, *, step_size: float, method: str = "euler_maruyama",
    generator: torch.Generator | int | None = None, noise: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Integrates ``dy = f(t, y) dt + g(t, y) dW`` in Ito's sense, and returns ``y`` at every time in ``t``.

    Noise is diagonal: every element of y has a Brownian motion of its own, and g has the shape of y. Steps of
    equal length run from ``t[0]`` to ``t[-1]``, the last one cut short where it would pass the end:

        euler_maruyama   y1 = y + f dt + g dW                              strong order 1/2, weak order 1
        milstein         y1 = y + f dt + g dW + (g dg/dy) (dW^2 - dt) / 2  strong order 1

    (Kloeden, Platen, *Numerical Solution of Stochastic Differential Equations*, 10.2 and 10.3). ``milstein``
    takes ``g dg/dy`` from one vector-Jacobian product of g. That is right where an element of g depends on t and
    on the *same* element of y, and on no other; where it depends on others, take ``euler_maruyama``.

    Steps, and the noise in them, do not depend on the times between ``t[0]`` and ``t[-1]``: the same seed gives
    the same path, whatever is looked at. Gradients are those of the discrete steps, to ``y0``, ``noise``, and
    all that f and g reach; ``t`` has none.

    Args:
        drift, diffusion: callables ``f(t, y)`` and ``g(t, y)``; ``t`` is a 0-d Tensor of y's dtype; they return Tensors
            shaped like ``y``.
        y0: floating point Tensor of any shape.
        t: 1-d floating point Tensor, strictly increasing.
        step_size: length of the steps. Between their ends y is interpolated linearly, which a Brownian path is not:
            let steps end at the times in ``t`` where the spread there matters.
        method: ``"euler_maruyama"`` or ``"milstein"``.
        generator: of the noise, on the device of ``y0``, or a whole number that seeds one; default: torch's own.
        noise: in its place the increments dW of the Brownian motions themselves, of variance dt, one for every
            step: shape (steps, *y0.shape), where there are ``ceil((t[-1] - t[0]) / step_size)`` steps.

    Returns:
        Tensor of shape (T, *y0.shape); row 0 is ``y0``.

    Raises:
        ArgumentError, ArgumentTypeError: an argument, or what ``drift`` or ``diffusion`` returned, cannot be used.

    Example:
        >>> y0, t = torch.ones(1000), torch.tensor([0.0, 1.0])
        >>> y = sdeint(lambda t, y: -y, lambda t, y: 0.1 * torch.ones_like(y), y0, t, step_size=0.01, generator=0)
        >>> round(y[-1].mean().item(), 1)
        0.4
    """
    times, ends = _checked_times(t, step_size)
    _check(drift, diffusion, y0, method)
    draw = _increments(y0, generator, noise, len(ends) - 1)
    rows, y = [y0], y0
    for number, (begin, end) in enumerate(zip(ends, ends[1:])):
        dt = end - begin
        y1 = _step(drift, diffusion, method, begin, dt, y, draw(number, dt))
        while len(rows) < len(times) and times[len(rows)] <= end:
            time = times[len(rows)]
            rows.append(y1 if time == end else torch.lerp(y, y1, (time - begin) / dt))
        y = y1
    return torch.stack(rows)


class NeuralSDE(nn.Module):
    """``dy = drift(t, y) dt + diffusion(t, y) dW`` with diagonal noise, as a Module.

    Args:
        drift, diffusion: Modules, or other callables, of ``(t, y)`` that return Tensors shaped like ``y``.
        step_size, method: as for `sdeint`.
    """

    def __init__(self, drift, diffusion, *, step_size: float, method: str = "euler_maruyama"):
        super().__init__()
        self.drift, self.diffusion = drift, diffusion
        self.step_size, self.method = step_size, method

    def forward(self, y0: Tensor, t: Tensor, *, generator=None, noise=None) -> Tensor:
        """Paths from ``y0`` at the times ``t``, of shape (T, *y0.shape): `sdeint`."""
        return sdeint(
            self.drift, self.diffusion, y0, t, step_size=self.step_size, method=self.method,
            generator=generator, noise=noise,
        )  # fmt: skip


def _step(drift, diffusion, method, begin, dt, y, dW):
    """One step from ``y`` at time ``begin``."""
    t = torch.tensor(begin, dtype=y.dtype, device=y.device)
    y1 = torch.add(y, _like(y, drift(t, y), "drift"), alpha=dt)
    if method == "milstein":
        g, product = _with_derivative(diffusion, t, y)
        y1, g = torch.add(y1, product, alpha=-dt / 2), torch.addcmul(g, product, dW, value=0.5)
    else:
        g = _like(y, diffusion(t, y), "diffusion")
    return torch.addcmul(y1, g, dW)


def _with_derivative(diffusion, t, y):
    """``g`` and ``g dg/dy``, element by element."""
    # A graph only where something but the leaf made below would get a gradient.
    recorded = torch.is_grad_enabled() and (y.requires_grad or diffusion(t, y).requires_grad)
    with torch.inference_mode(False), torch.enable_grad():
        t, y = (x.clone() if x.is_inference() else x for x in (t, y))
        y = y if y.requires_grad else y.detach().requires_grad_()
        g = _like(y, diffusion(t, y), "diffusion")
        if not g.requires_grad:
            return g, torch.zeros_like(g)
        cotangent = g if recorded else g.detach()
        (product,) = torch.autograd.grad(g, y, cotangent, create_graph=recorded, materialize_grads=True)
    return (g, product) if recorded else (g.detach(), product)


def _increments(y0, generator, noise, steps):
    """``draw(number, dt)``, the increments of the Brownian motions in a step."""
    if noise is not None:
        if generator is not None:
            raise ArgumentError("noise is the noise itself, and generator would make it: give one of them")
        shape = (steps, *y0.shape)
        if not isinstance(noise, Tensor) or noise.shape != shape:
            given = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
            raise ArgumentError(
                f"noise must be a Tensor of increments, one for each of the {steps} steps: shape {shape}, got {given}"
            )
        noise = noise.to(y0)
        return lambda number, dt: noise[number]
    if isinstance(generator, int) and not isinstance(generator, bool):
        if not -(2**63) <= generator < 2**64:
            raise ArgumentError(
                f"generator must be a seed of 64 bits, from -2**63 to 2**64 - 1, got {generator}"
            )
        generator = torch.Generator(y0.device).manual_seed(generator)
    elif generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentTypeError(
            f"generator must be a torch.Generator or a whole number, got {kind_of(generator)}"
        )

    def draw(number, dt):
        z = torch.randn(y0.shape, dtype=y0.dtype, device=y0.device, generator=generator)
        return z * math.sqrt(dt)

    return draw


def _checked_times(t, step_size):
    """The times as numbers, and the ends of the steps."""
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.ndim != 1 or not t.numel():
        raise ArgumentTypeError("t must be a floating point Tensor of one dimension that is not empty")
    times = t.tolist()
    if not all(map(math.isfinite, times)) or any(b <= a for a, b in zip(times, times[1:])):
        raise ArgumentError(
            f"t must be finite and strictly increasing: Ito's integral runs forwards, got {times}"
        )
    require_number("step_size", step_size, "the length of a step")
    steps = (times[-1] - times[0]) / step_size
    if steps > MOST_STEPS:
        raise ArgumentError(
            f"step_size = {step_size} asks for {steps:.3g} steps; at most {MOST_STEPS:.0e} are possible"
        )
    # A quotient that is whole up to rounding must not add a step of no length.
    ends = [times[0] + number * step_size for number in range(math.ceil(steps * (1 - 1e-9)))]
    return times, [*ends, times[-1]]


def _check(drift, diffusion, y0, method):
    for name, value in (("drift", drift), ("diffusion", diffusion)):
        if not callable(value):
            raise ArgumentTypeError(f"{name} must be callable as {name}(t, y), got {type(value).__name__}")
    if not isinstance(y0, Tensor) or not y0.is_floating_point():
        given = y0.dtype if isinstance(y0, Tensor) else type(y0).__name__
        raise ArgumentTypeError(f"y0 must be a floating point Tensor, got {given}")
    if method not in METHODS:
        raise ArgumentError(f"method must be one of {list(METHODS)}, got {method!r}")


def _like(y, value, name):
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name} must return a Tensor, got {type(value).__name__}")
    if value.shape != y.shape:
        raise ArgumentError(
            f"{name} returned shape {tuple(value.shape)}, expected {tuple(y.shape)} like y0; nothing is broadcast, "
            "see expand_as"
        )
    return value.to(y.dtype)

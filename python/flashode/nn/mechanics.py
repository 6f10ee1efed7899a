"""Fields of mechanics: equations of second order, and Hamilton's equations of a given or a learned energy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ArgumentError


class SecondOrder(nn.Module):
    """``y'' = field(t, y, v)`` as a field of first order, of the state ``(y, v)`` with ``v = y'``.

    Every method serves; ``"leapfrog"`` is the one for long times where ``field`` does not depend on ``v``.

    Args:
        field: callable ``field(t, y, v)`` that returns the acceleration, shaped like ``y``. Parameters of
            a Module become those of this one.

    Example:
        >>> import math
        >>> from flashode import odeint
        >>> oscillator = SecondOrder(lambda t, y, v: -y)
        >>> y, v = odeint(oscillator, (torch.ones(1), torch.zeros(1)), torch.tensor([0.0, math.pi]))
        >>> round(y[-1].item(), 4)
        -1.0
    """

    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y, v = state
        return v, self.field(t, y, v)


class Hamiltonian(nn.Module):
    """Hamilton's equations ``dq/dt = dH/dp``, ``dp/dt = -dH/dq``, of the state ``(q, p)``.

    ``H`` may be a network, whose energy every exact solution then keeps, whatever it has learned (Greydanus,
    Dzamba, Yosinski, *Hamiltonian Neural Networks*, 2019). The derivatives of ``H`` are autograd's, and can be
    differentiated again for training: ``H`` has to be twice differentiable then, as with tanh, and a ReLU is not.
    They are taken inside the field, which transforms of `torch.func` (vmap, grad) do not go through: batch q and p.

    Args:
        H: callable ``H(q, p)`` with q and p of shape (..., n); returns energies, of shape (...) or (..., 1), or one
            energy for all. The energy of a sample must not depend on other samples.

    Raises:
        ArgumentError: in a solve, where ``H`` depends on neither q nor p by differentiable operations.

    Example:
        >>> import math
        >>> from flashode import odeint
        >>> oscillator = Hamiltonian(lambda q, p: (q**2 + p**2).sum(-1) / 2)
        >>> q, p = odeint(oscillator, (torch.ones(1), torch.zeros(1)), torch.tensor([0.0, math.pi]))
        >>> round(q[-1].item(), 4)
        -1.0
    """

    def __init__(self, H):
        super().__init__()
        self.H = H

    def energy(self, q: Tensor, p: Tensor) -> Tensor:
        return self.H(q, p)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        # A graph only where something but the leaves made below would get a gradient.
        recorded = torch.is_grad_enabled() and (
            any(x.requires_grad for x in state) or self.energy(*state).requires_grad
        )
        with torch.inference_mode(False), torch.enable_grad():
            state = (x.clone() if x.is_inference() else x for x in state)
            q, p = (x if x.requires_grad else x.detach().requires_grad_() for x in state)
            energy = self.energy(q, p).sum()
            if not energy.requires_grad:
                raise ArgumentError(
                    "H(q, p) must depend on q or p by operations that can be differentiated; what it returned has no graph"
                )
            of_q, of_p = torch.autograd.grad(energy, (q, p), create_graph=recorded, materialize_grads=True)
        return of_p, -of_q


class _Sum(nn.Module):
    """Kinetic and potential energy, added up."""

    def __init__(self, kinetic, potential):
        super().__init__()
        self.kinetic, self.potential = kinetic, potential

    def forward(self, q: Tensor, p: Tensor) -> Tensor:
        return self.kinetic(p) + self.potential(q)


class Separable(Hamiltonian):
    """Hamilton's equations of ``H(q, p) = kinetic(p) + potential(q)``, which is what ``method="leapfrog"`` is for.

    Args:
        kinetic: callable of p, (..., n), that returns energies of shape (...) or (..., 1), or one for all.
        potential: the same of q.

    Example:
        >>> pendulum = Separable(lambda p: p**2 / 2, lambda q: 1 - torch.cos(q))
        >>> dq, dp = pendulum(torch.tensor(0.0), (torch.zeros(1), torch.ones(1)))
        >>> dq.item(), dp.item()
        (1.0, -0.0)
    """

    def __init__(self, kinetic, potential):
        super().__init__(_Sum(kinetic, potential))

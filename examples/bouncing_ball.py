"""Learns gravity, drag and bounce of a ball from the times at which it lands.

    python examples/bouncing_ball.py

Problem. A ball falls from 3 metres, (height, velocity)' = (velocity, -gravity - drag velocity), and keeps a
part of its speed at every landing. Six times of landing are known, to a thousandth of a second, and
neither heights nor speeds.

Right answer. The times were made with gravity 9.81, drag 0.1 and bounce 0.8. From 5, 0 and 0.5 they are
found to less than a hundredth, the times off by the thousandth of a second that was added to them.

How it works. `odeint_event` ends each flight at the ground and gives its time a gradient, to everything
that moves a landing, through all the bounces before it. The gradients of the six times are the Jacobian
of a least-squares fit by Gauss and Newton. The event has a direction: a flight that begins on the ground
does not end there.
"""

from __future__ import annotations

import torch

from flashode import Event, odeint_event

F64 = torch.float64


class Ball(torch.nn.Module):
    def __init__(self, gravity, drag, bounce):
        super().__init__()
        self.gravity, self.drag, self.bounce = (
            torch.nn.Parameter(torch.tensor(x, dtype=F64)) for x in (gravity, drag, bounce)
        )
        # A parameter that went astray must not make a flight without end.
        self.ground = Event(lambda t, y: y[0], direction=-1, until=30.0)

    def forward(self, t, y):
        height, velocity = y
        return torch.stack([velocity, -self.gravity - self.drag * velocity])

    def landings(self, count):
        t, y, times = torch.tensor(0.0, dtype=F64), torch.tensor([3.0, 0.0], dtype=F64), []
        for _ in range(count):
            t, ys = odeint_event(self, y, t, event_fn=self.ground, rtol=1e-8, atol=1e-10)
            times.append(t)
            height, velocity = ys[-1]
            y = torch.stack([height, -self.bounce * velocity])
        return torch.stack(times)

    def __repr__(self):
        return ", ".join(f"{name} {x.item():.3f}" for name, x in self.named_parameters())


def main():
    torch.manual_seed(0)
    with torch.no_grad():
        observed = Ball(9.81, 0.1, 0.8).landings(6)
        observed += 0.001 * torch.randn(6, dtype=F64)
    ball = Ball(5.0, 0.0, 0.5)
    parameters = tuple(ball.parameters())
    for iteration in range(6):
        times = ball.landings(6)
        residuals = observed - times.detach()
        print(f"{iteration}  {ball}, times off by {residuals.square().mean().sqrt().item():.4f} s")
        rows = [torch.stack(torch.autograd.grad(t, parameters, retain_graph=True)) for t in times]
        step = torch.linalg.lstsq(torch.stack(rows), residuals[:, None]).solution[:, 0]
        with torch.no_grad():
            for parameter, change in zip(parameters, step):
                parameter += change


if __name__ == "__main__":
    main()

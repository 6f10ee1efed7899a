"""Solves with diffrax what ``compiled.py`` asks for, in an environment of its own.

``compiled.py --jax-python`` runs this file and speaks to it in lines of JSON, one answer to each. Its
fields and losses are the twins of those of ``compiled.py``, under the same names.
"""

import importlib.metadata
import json
import os
import sys
import time

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

# ---- fields: f(p, t, y), where p has the parameters by their names in PyTorch ----------------


def affine(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def spiral(p, t, y):
    return y**3 @ p["A"]


def van_der_pol(p, t, y):
    x, v = y[..., 0], y[..., 1]
    return jnp.stack([v, 5 * (1 - x * x) * v - x], -1)


def lorenz(p, t, y):
    a, b, c = y[..., 0], y[..., 1], y[..., 2]
    return jnp.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)


def net(p, t, y):
    return affine(p, "net.2", jnp.tanh(affine(p, "net.0", y**3)))


def soft(p, t, y):
    return jnp.tanh(affine(p, "net.2", jax.nn.softplus(affine(p, "net.0", y))))


def deep(p, t, y):
    for name in ("net.0", "net.2"):
        y = jnp.tanh(affine(p, name, y))
    return affine(p, "net.4", y)


def flow(p, t, state):
    """The velocity and minus its divergence, exact: one product with the Jacobian for each dimension."""

    def velocity(z):
        for i in range(4):
            gate = jax.nn.sigmoid(affine(p, f"gates.{i}", t[None]))
            z = affine(p, f"layers.{i}", z) * gate + t * p[f"shifts.{i}.weight"][:, 0]
            z = jnp.tanh(z) if i < 3 else z
        return z

    dz, pull_back = jax.vjp(velocity, state[0])
    units = jnp.eye(dz.shape[-1], dtype=dz.dtype)
    divergence = sum(pull_back(jnp.broadcast_to(unit, dz.shape))[0][:, i] for i, unit in enumerate(units))
    return dz, -divergence[:, None]


FIELDS = {
    "Spiral": spiral,
    "VanDerPol": van_der_pol,
    "Lorenz": lorenz,
    "Net": net,
    "Soft": soft,
    "Deep": deep,
    "Flow": flow,
}

LOSSES = {
    "distance": lambda ys, target: jnp.abs(ys - target).mean(),
    "square": lambda ys, target: (ys**2).mean(),
    "likelihood": lambda ys, target: (0.5 * (ys[0][-1] ** 2).sum(-1) + ys[1][-1][:, 0]).mean(),
}


# ---- one solve -------------------------------------------------------------------------------


def largest(tree):
    """torchdiffeq's norm: root mean square, of a tuple the largest of its members'."""
    return jnp.stack([jnp.sqrt(jnp.mean(x**2)) for x in jax.tree.leaves(tree)]).max()


def program(spec: dict, data: dict):
    """What is timed, compiled by its first call, and its arguments; it returns results and numbers of steps."""
    field, t = FIELDS[spec["field"]], jnp.asarray(data["t"])
    y0 = jnp.asarray(data["y0"]) if "y0" in data else (jnp.asarray(data["y0.0"]), jnp.asarray(data["y0.1"]))
    tensors = {name[2:]: jnp.asarray(x) for name, x in data.items() if name.startswith("p.")}
    trained = {name: tensors.pop(name) for name in spec["trained"]}
    control = diffrax.PIDController(
        rtol=spec["rtol"], atol=spec["atol"], norm=largest, pcoeff=0, icoeff=1, dcoeff=0
    )

    def solve(y0, trained):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, trained: field(tensors | trained, t, y)), diffrax.Dopri5(),
            t[0], t[-1], None, y0, args=trained, saveat=diffrax.SaveAt(ts=t), stepsize_controller=control,
            adjoint=getattr(diffrax, spec["adjoint"])(), max_steps=4096 if spec["loss"] else None,
        )  # fmt: skip
        return solution.ys, solution.stats["num_steps"]

    if spec["batched"]:
        return jax.jit(jax.vmap(solve, in_axes=(0, None))), (y0, trained)
    if not spec["loss"]:
        return jax.jit(solve), (y0, trained)
    target = jnp.asarray(data["target"]) if "target" in data else None

    def loss(trained):
        ys, steps = solve(y0, trained)
        return LOSSES[spec["loss"]](ys, target), steps

    return jax.jit(jax.value_and_grad(loss, has_aux=True)), (trained,)


class Contestant:
    """A compiled solve and what it gave."""

    def __init__(self, spec: dict):
        self.run, self.arguments = program(spec, np.load(spec["data"]))
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            result = jax.block_until_ready(self.run(*self.arguments))
            times.append(time.perf_counter() - begin)
        if spec["loss"]:
            (value, steps), gradients = result
            arrays = [value, *(gradients[name] for name in spec["trained"])]
        else:
            ys, steps = result
            arrays = [jnp.moveaxis(ys, 0, 1)] if spec["batched"] else jax.tree.leaves(ys)
        np.savez(spec["result"], *arrays)
        self.answer = {"steps": float(jnp.mean(steps)), "compiling": times[0] - times[1]}

    def seconds_of(self, number: int) -> float:
        begin = time.process_time()
        for _ in range(number):
            jax.block_until_ready(self.run(*self.arguments))
        return time.process_time() - begin


# ---- the conversation ------------------------------------------------------------------------


def main():
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    contestants = {}
    print(json.dumps({name: importlib.metadata.version(name) for name in ("jax", "diffrax")}), file=answers)
    for line in sys.stdin:
        question = json.loads(line)
        name = question["name"]
        try:
            if "number" in question:
                answer = {"seconds": contestants[name].seconds_of(question["number"])}
            else:
                contestants[name] = Contestant(question)
                answer = contestants[name].answer
        except Exception as error:  # whatever it is, the one who asked tells of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()

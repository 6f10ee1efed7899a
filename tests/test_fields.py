"""Fields of every kind are compiled, and solved and differentiated as the reference engine does it."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fields import FIELDS, Closure, state
from torch import nn

import flashode
from flashode import CompileError

# torch multiplies by 1/6 in single precision, whatever the state's: F.hardsigmoid's own derivative is off by 1e-8.
LOOSE = {"hardsigmoid": 1e-7, "hardswish": 1e-7}


def tensors_of(x):
    """The tensors with gradients that a field made by `fields` reads."""
    if isinstance(x, torch.Tensor):
        return [x] if x.requires_grad else []
    if isinstance(x, nn.Module):
        return list(x.parameters())
    if isinstance(x, (list, tuple)):
        return [leaf for e in x for leaf in tensors_of(e)]
    return tensors_of(list(vars(x).values())) if isinstance(x, Closure) else []


def members(y):
    return y if isinstance(y, tuple) else (y,)


def solved(func, y0, args, wanted, **kwargs):
    """Outputs of a solve, and gradients of a functional of them to ``wanted``, the last of them t."""
    with torch.enable_grad():
        y = flashode.odeint(func, y0, wanted[-1], args=args, **kwargs)
        weights = [torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape) for x in members(y)]
        loss = sum((w * x).sum() for w, x in zip(weights, members(y)))
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [*members(y), *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, wanted))]


def difference(a, b):
    """Largest relative difference of two lists of tensors, each measured by its largest entry."""
    assert [x.shape for x in a] == [x.shape for x in b]
    worst = [((x - y).abs().max() / (y.abs().max() + 1e-3)).item() for x, y in zip(a, b) if x.numel()]
    return max(worst)


def compared(name):
    """How far a compiled solve and its gradients are from the reference engine's."""
    torch.manual_seed(0)
    func, y0, *args = FIELDS[name]()
    args = args[0] if args else ()
    y0 = (
        tuple(x.clone().requires_grad_() for x in y0)
        if isinstance(y0, tuple)
        else y0.clone().requires_grad_()
    )
    t = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64, requires_grad=True)
    wanted = [*members(y0), *tensors_of(func), *tensors_of(args), t]
    ours = solved(flashode.compile(func), y0, args, wanted, method="rk4")
    theirs = solved(func, y0, args, wanted, method="rk4", engine="reference")
    return difference(ours, theirs)


@pytest.fixture(scope="module")
def differences(request):
    """Of all fields that are to be tested: the compiler is what takes the time, so it runs twice at once."""
    names = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.fspath == request.path and hasattr(item, "callspec") and "name" in item.callspec.params
    }
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(compared, name) for name in FIELDS if name in names}


@pytest.mark.parametrize("name", FIELDS)
def test_a_compiled_field_is_solved_and_differentiated_as_the_reference_engine_does(differences, name):
    assert differences[name].result() < LOOSE.get(name, 1e-9)


REFUSED = {
    "convolution": (lambda t, y: nn.functional.conv1d(y[:, None], torch.ones(1, 1, 3, dtype=y.dtype), padding=1)[:, 0], "convolution"),
    "batch_norm": (lambda t, y: nn.functional.batch_norm(y, None, None, training=True), "batch"),
    "dropout": (lambda t, y: nn.functional.dropout(y, 0.5), "random"),
    "noise": (lambda t, y: y + torch.randn_like(y), "random"),
    "branch": (lambda t, y: y if y.max() > 0 else -y, "depends on a number that it computes"),
    "item": (lambda t, y: y * y.sum().item(), "depends on a number that it computes"),
    "sorted": (lambda t, y: torch.sort(y, 1)[0], "sort"),
    "masked": (lambda t, y: y + y[y > 0].sum(), "depends on values"),
    "complex": (lambda t, y: torch.fft.fft(y).real, "complex"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_refused_with_the_line_of_func(name):
    func, words = REFUSED[name]
    with pytest.raises(CompileError, match=words) as error:
        flashode.odeint(flashode.compile(func), state(5, 3), torch.tensor([0.0, 1.0]))
    assert "test_fields.py" in str(error.value)


@pytest.mark.parametrize("options", [None, {"batched": True}])
def test_samples_that_see_each_other_are_one_system_or_refused(options):
    def func(t, y):
        return y.mean(0) - y

    def solve(f):
        return flashode.odeint(
            f, state(5, 2), torch.tensor([0.0, 1.0]), rtol=1e-6, atol=1e-6, options=options
        )

    torch.manual_seed(1)
    if options is None:
        ours = solve(flashode.compile(func))
        torch.manual_seed(1)
        assert difference([ours], [solve(func)]) < 1e-12
    else:
        with pytest.raises(CompileError, match=r"samples.*test_fields.py.*batched"):
            solve(flashode.compile(func))


# Steps from 0 to 1 that are as long as f(0): what y = 1 then is, is f there.
POINTS = [0.5, 1.0, 2.0, 3.0, -0.5, -1.0, 700.0, 1e10, 1e20, -1e20, 1e200, 0.0, 1e-30]
EXACT = {
    "remainder": lambda y: torch.remainder(y, 0.1),
    "remainder of a negative": lambda y: torch.remainder(y, -0.1),
    "remainder of infinity": lambda y: torch.remainder(y, math.inf).clamp(max=1.0),
    "fmod": lambda y: torch.fmod(y, 0.1),
    "floor of a quotient": lambda y: torch.div(y, 0.1, rounding_mode="floor"),
    "hypot": lambda y: torch.hypot(y, 2 * y),
    "sgn": torch.sgn,
    "nothing of y": torch.ones_like,
}


@pytest.mark.parametrize("name", EXACT)
def test_functions_give_what_torch_gives_at_the_ends_of_their_domains(name):
    def func(t, y):
        return EXACT[name](y)

    y0 = torch.tensor(POINTS, dtype=torch.float64).requires_grad_()
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    ours, theirs = (
        flashode.odeint(f, y0, t, method="euler", engine=engine)[1]
        for f, engine in ((flashode.compile(func), "auto"), (func, "reference"))
    )
    assert torch.allclose(ours, theirs, rtol=1e-14, atol=0, equal_nan=True)
    ours, theirs = (torch.autograd.grad(x.sum(), y0)[0] for x in (ours, theirs))
    assert torch.allclose(ours, theirs, rtol=1e-14, atol=0, equal_nan=True)

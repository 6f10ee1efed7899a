"""States that are dicts, lists and classes of Tensors: `solve` hands out and returns the same structure."""

import collections
import copy
import dataclasses
import gc
import pickle
import weakref

import pytest
import torch
import torch.utils._pytree as pytree
from problems import EXPLICIT

import flashode

F64 = torch.float64
T = torch.linspace(0, 1.5, 6, dtype=F64)

Pair = collections.namedtuple("Pair", "q p")


@dataclasses.dataclass
class Body:
    place: torch.Tensor
    spin: torch.Tensor


class Box:
    """Registered without names for its members."""

    def __init__(self, *content):
        self.content = content


pytree.register_dataclass(Body)
pytree.register_pytree_node(Box, lambda box: (list(box.content), None), lambda content, _: Box(*content))

A, B = torch.rand(2, 3, dtype=F64), torch.rand((), dtype=F64)
BUILD = {
    "dict": lambda a, b: {"a": a, "b": b},
    "ordered": lambda a, b: collections.OrderedDict(a=a, b=b),
    "list": lambda a, b: [a, b],
    "nested tuples": lambda a, b: ((a,), (b, ())),
    "named tuple": lambda a, b: Pair(a, b),
    "dataclass": lambda a, b: Body(a, b),
    "box": lambda a, b: Box(a, b),
    "dict of lists": lambda a, b: {"x": [a, {"y": b}], "empty": []},
}
STRUCTURE = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)


def slopes(t, a, b):
    return torch.sin(t) * b - a, -b * a.mean()


def parts(tree):
    return pytree.tree_leaves(tree)


def field_in(build):
    like = pytree.tree_structure(build(A, B))

    def func(t, y):
        assert pytree.tree_structure(y) == like
        return build(*slopes(t, *parts(y)))

    return func


def of_tuple(t, y):
    return slopes(t, *y)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@STRUCTURE
def test_a_structure_gives_what_the_tuple_of_its_tensors_gives(build, backward, engine):
    t = T.flip(0) if backward else T
    solution = flashode.solve(field_in(build), build(A, B), t, dense=True, engine=engine)
    expected = flashode.solve(of_tuple, (A, B), t, dense=True, engine=engine)
    assert solution.stats == expected.stats
    at = 1.5 * torch.rand(3, 2, dtype=F64)
    for ours, theirs in (
        (solution.ys, expected.ys),
        (solution.sol(at), expected.sol(at)),
        (solution.sol.derivative(0.3), expected.sol.derivative(0.3)),
    ):
        assert pytree.tree_structure(ours) == pytree.tree_structure(build(A, B))
        assert all(torch.equal(x, y) for x, y in zip(parts(ours), theirs))
    assert "(6, 2, 3) float64, (6,) float64" in repr(solution)


@pytest.mark.parametrize("method", list(EXPLICIT))
def test_every_method(method, engine):
    options = {} if EXPLICIT[method].adaptive else {"step_size": 0.1}
    arguments = {"method": method, "options": options, "rtol": 1e-4, "atol": 1e-4, "engine": engine}
    ours = flashode.solve(field_in(BUILD["dict"]), {"a": A, "b": B}, T, **arguments)
    theirs = flashode.solve(of_tuple, (A, B), T, **arguments)
    assert all(torch.equal(x, y) for x, y in zip(parts(ours.ys), theirs.ys))


def test_tensors_and_tuples_of_tensors_stay_as_they_are(engine):
    solution = flashode.solve(
        lambda t, y: [-y[0], -y[1]], (A, B), T, engine=engine
    )  # a list will do, as in odeint
    assert type(solution.ys) is tuple
    assert isinstance(flashode.solve(lambda t, y: -y, A, T, engine=engine).ys, torch.Tensor)


def test_odeint_dense_takes_structures(engine):
    sol = flashode.odeint_dense(field_in(BUILD["dict"]), {"a": A, "b": B}, 0.0, 1.0, engine=engine)
    assert sol(torch.rand(4))["a"].shape == (4, 2, 3)


def test_odeint_names_solve(engine):
    for solve in (flashode.odeint, flashode.odeint_adjoint):
        for y0 in ({"a": A}, [A]):
            with pytest.raises(
                flashode.ArgumentTypeError, match="solve takes dicts, lists and nested tuples"
            ):
                solve(torch.nn.Identity(), y0, T, engine=engine)


def test_members_of_mixed_dtypes():
    y0 = {"a": A.float(), "b": B, "c": A.to(torch.complex64), "d": torch.rand(0), "e": torch.rand(1).half()}
    seen = []

    def func(t, y):
        seen.append({name: (x.dtype, x.shape) for name, x in y.items()})
        return {name: -x for name, x in y.items()}

    solution = flashode.solve(func, y0, T, dense=True, rtol=1e-2, atol=1e-2)
    for name, y in solution.ys.items():
        assert y.dtype == y0[name].dtype and y.shape == (6, *y0[name].shape)
        assert solution.sol(0.5)[name].dtype == y0[name].dtype
    assert all(s == {name: (x.dtype, x.shape) for name, x in y0.items()} for s in seen)


def test_gradients(engine):
    a, b, w = (
        A.clone().requires_grad_(),
        B.clone().requires_grad_(),
        torch.rand(3, dtype=F64, requires_grad=True),
    )
    t0, t1, at = torch.tensor([0.1, 1.0, 0.4], dtype=F64, requires_grad=True).unbind()

    def function(a, b, w, t0, t1, at):
        sol = flashode.odeint_dense(
            lambda t, y, w: {"b": -y["b"] * t, "a": torch.sin(w["w"] * y["a"]) + y["b"]}, {"a": a, "b": b}, t0, t1,
            options={"first_step": 0.25, "max_step": 0.25}, rtol=0.1, atol=10, args=({"w": w},), engine=engine,
        )  # fmt: skip
        return tuple(parts(sol(at)))

    assert torch.autograd.gradcheck(function, (a, b, w, t0, t1, at))


def test_dicts_may_come_back_in_any_order(engine):
    y0 = {"a": A, "b": B}
    reordered = flashode.solve(
        lambda t, y: dict(reversed(list(zip("ab", slopes(t, y["a"], y["b"]))))), y0, T, engine=engine
    )
    expected = flashode.solve(field_in(BUILD["dict"]), y0, T, engine=engine)
    assert torch.equal(reordered.ys["a"], expected.ys["a"]) and list(reordered.ys) == ["a", "b"]


@pytest.mark.parametrize(
    "returned, message",
    [
        ({"a": A, "x": [A]}, r"what func returned\['x'\] is list, expected a dict"),
        ({"a": A}, r"what func returned\['x'\] is missing"),
        ({"a": A, "x": {"b": B, "c": B}}, r"what func returned\['x'\]\['c'\] is not in y0"),
        ({"a": A, "x": {}}, r"what func returned\['x'\]\['b'\] is missing"),
        ((A, {"b": B}), r"what func returned is tuple, expected a dict"),
        (A, r"what func returned is a Tensor of shape \(2, 3\), expected a dict"),
        (None, r"what func returned is None, expected a dict"),
        ({"a": A, "x": {"b": B[None]}}, r"has a Tensor of shape \(1,\) at \['x'\]\['b'\], expected a Tensor of shape \(\)"),
        ({"a": [A], "x": {"b": B}}, r"has list at \['a'\], expected a Tensor of shape \(2, 3\)"),
        ({"a": A, "x": {"b": 1.0}}, r"has float 1.0 at \['x'\]\['b'\]"),
    ],
)  # fmt: skip
def test_what_func_returns_is_named_by_its_place(returned, message, engine):
    with pytest.raises((flashode.ArgumentError, flashode.ArgumentTypeError), match=message):
        flashode.solve(lambda t, y: returned, {"a": A, "x": {"b": B}}, T, engine=engine)


def test_places_in_classes(engine):
    with pytest.raises(
        flashode.ArgumentError, match=r"at \.spin, expected a Tensor of shape \(\) like y0\.spin"
    ):
        flashode.solve(lambda t, y: Body(-y.place, -y.place), Body(A, B), T, engine=engine)
    with pytest.raises(flashode.ArgumentError, match=r"at \.p, expected"):
        flashode.solve(lambda t, y: Pair(-y.q, -y.q), Pair(A, B), T, engine=engine)
    with pytest.raises(flashode.ArgumentTypeError, match="what func returned is tuple, expected a Pair"):
        flashode.solve(lambda t, y: tuple(y), Pair(A, B), T, engine=engine)
    with pytest.raises(flashode.ArgumentError, match=r"at \[1\], expected"):
        flashode.solve(lambda t, y: Box(y.content[0], A), Box(A, B), T, engine=engine)
    with pytest.raises(flashode.ArgumentTypeError, match=r"what func returned\[1\] is missing"):
        flashode.solve(lambda t, y: Box(A), Box(A, B), T, engine=engine)


@pytest.mark.parametrize("y0", [{}, [], [()], {"a": {}}])
def test_a_state_without_tensors(y0, engine):
    with pytest.raises(
        flashode.ArgumentError, match=f"y0 is an empty {type(y0).__name__}; give at least one"
    ):
        flashode.solve(lambda t, y: y, y0, T, engine=engine)


def test_what_y0_cannot_hold(engine):
    for value in (1.0, None, "a", object()):
        with pytest.raises(flashode.ArgumentTypeError, match=r"y0\['a'\]\[1\] must be a Tensor, got"):
            flashode.solve(lambda t, y: y, {"a": [A, value]}, T, engine=engine)
    with pytest.raises(flashode.ArgumentTypeError, match=r"y0\[1\] must be a Tensor, got None"):
        flashode.solve(lambda t, y: y, (A, None), T, engine=engine)
    for value in (1.0, None, "a", object(), torch.nn.Linear(1, 1)):
        with pytest.raises(flashode.ArgumentTypeError, match="y0 must be either a torch.Tensor or a tuple"):
            flashode.solve(lambda t, y: y, value, T, engine=engine)
    with pytest.raises(flashode.ArgumentError, match="y0 is an empty tuple"):
        flashode.solve(lambda t, y: y, (), T, engine=engine)
    with pytest.raises(flashode.ArgumentTypeError, match="func must be callable"):
        flashode.solve(None, {"a": A}, T, engine=engine)


def test_tolerances_of_a_structure(engine):
    y0, calls = {"a": A, "x": [B]}, []

    def func(t, y):
        calls.append(t)
        return {"a": torch.cos(9 * t) * y["a"], "x": [-y["x"][0]]}

    def cost(rtol, atol):
        return flashode.solve(func, y0, T, rtol=rtol, atol=atol, engine=engine).stats.nfe

    loose, tight = {"a": 1e3, "x": [1e3]}, {"a": 1e-9, "x": [1e-9]}
    ignores_a = cost({"a": 1e3, "x": [1e-9]}, {"x": [1e-9], "a": 1e3})
    assert cost(loose, loose) < ignores_a < cost(tight, tight) == cost(1e-9, 1e-9)
    each = {"a": torch.full_like(A, 1e-9), "x": [torch.tensor(1e-9)]}
    assert cost(each, each) == cost(1e-9, 1e-9)
    for name, bad in (("rtol", {"a": 1e-3}), ("atol", [1e-3, 1e-3])):
        with pytest.raises(flashode.ArgumentTypeError, match=f"{name} must have the structure of y0"):
            flashode.solve(func, y0, T, **{name: bad}, engine=engine)
    with pytest.raises(flashode.ArgumentError, match="not negative"):
        flashode.solve(func, y0, T, rtol={"a": -1.0, "x": [1e-3]}, engine=engine)


def test_norm_events_and_callbacks_are_given_the_structure(engine):
    seen = collections.Counter()

    def check(name, y):
        seen[name] += 1
        assert isinstance(y, Body) and y.place.shape == A.shape and y.spin.shape == ()

    class Field(torch.nn.Module):
        def forward(self, t, y, scale):
            return Body(-scale * y.place, torch.ones_like(y.spin))

        def callback_step(self, t0, y0, dt):
            check("step", y0)

        def callback_accept_step(self, t0, y0, dt):
            check("accept", y0)

    def norm(y):
        check("norm", y)
        return max(y.place.abs().max(), y.spin.abs())

    def event(t, y):
        check("event", y)
        return y.spin - 1.0

    arguments = {"options": {"norm": norm}, "args": (2.0,)}
    flashode.solve(Field(), Body(A, B), T, engine=engine, **arguments)
    assert seen["step"] and seen["accept"] and seen["norm"] and not seen["event"]
    solution = flashode.solve(Field(), Body(A, B), T[:2], event_fn=event, dense=True, **arguments)
    assert seen["event"] and solution.status is flashode.Status.EVENT
    torch.testing.assert_close(solution.ys.spin[1], torch.ones((), dtype=F64))
    torch.testing.assert_close(solution.sol(solution.sol.t1).spin, torch.ones((), dtype=F64))


def test_events_with_a_direction_and_several():
    y0 = {"angle": torch.zeros((), dtype=F64), "speed": torch.ones((), dtype=F64)}
    w = torch.tensor(2.0, dtype=F64, requires_grad=True)

    def swing(t, y):
        return {"angle": w * y["speed"], "speed": -w * y["angle"]}  # angle = sin wt, speed = cos wt

    down = flashode.Event(lambda t, y: y["angle"] - 0.5, direction=-1)
    solution = flashode.solve(swing, y0, T[:2], event_fn=[lambda t, y: y["speed"] + 0.9, down], dense=True)
    at = 5 * torch.pi / 6  # the angle is back at 0.5, and the speed at -0.87
    torch.testing.assert_close(w * solution.event_t, torch.tensor(at, dtype=F64), rtol=1e-6, atol=1e-6)
    assert solution.event_index == 1 and abs(solution.ys["angle"][1] - 0.5) < 1e-6
    (by_w,) = torch.autograd.grad(solution.event_t, w)
    torch.testing.assert_close(by_w, -solution.event_t.detach() / w.detach(), rtol=1e-5, atol=1e-6)
    never = flashode.Event(lambda t, y: y["angle"] - 2, until=4.0)
    ended = flashode.solve(swing, y0, T[:2], event_fn=never, dense=True)
    assert ended.status is flashode.Status.NO_EVENT and torch.equal(
        ended.sol(4.0)["speed"], ended.ys["speed"][1]
    )


def test_failures(engine):
    y0 = {"a": A, "b": torch.ones(2, dtype=F64)}

    def func(t, y):
        return {"a": -y["a"], "b": y["b"] * torch.tensor([1.0, float("nan")])}

    with pytest.raises(flashode.SolveError) as caught:
        flashode.solve(func, y0, T, engine=engine)
    assert caught.value.index == (1, 1)
    solution = flashode.solve(func, y0, T, throw=False, dense=True, engine=engine)
    assert solution.ys["a"][1:].isnan().all() and torch.equal(solution.sol(0.0)["b"], y0["b"])


def test_no_tensor_waits_for_the_garbage_collector(engine):
    gc.collect()
    gc.disable()
    try:
        y0 = {"a": A.clone().requires_grad_(), "b": B}
        sol = flashode.odeint_dense(lambda t, y: {"a": -y["a"], "b": -y["b"]}, y0, 0.0, 1.0, engine=engine)
        sol(0.3)["a"].sum().backward()
        ghosts = weakref.ref(sol), weakref.ref(y0["a"]), weakref.ref(y0["a"].grad)
        del sol, y0
        assert [ghost() for ghost in ghosts] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(duplicate, engine):
    y0 = {"x": Pair(A.clone().requires_grad_(), [B])}
    solution = flashode.solve(
        lambda t, y: {"x": Pair(-y["x"].q, [-y["x"].p[0]])}, y0, T, dense=True, engine=engine
    )
    twin = duplicate(solution)
    for ours, theirs in ((twin.ys, solution.ys), (twin.sol(0.4), solution.sol(0.4))):
        assert torch.equal(ours["x"].q, theirs["x"].q) and torch.equal(ours["x"].p[0], theirs["x"].p[0])
        assert not ours["x"].q.requires_grad


def test_explain_takes_what_solve_takes():
    state = {"a": torch.ones(2), "b": [torch.ones(())]}
    tolerance = {"a": 1e-3, "b": [1e-4]}
    text = flashode.explain(lambda t, y: y, state, torch.tensor([0.0, 1.0]), rtol=tolerance)
    assert "native" in text and "reference: can serve" in text
    text = flashode.explain(lambda t, y: y, state, torch.tensor([0.0, 1.0]), event_fn=lambda t, y: y["a"])
    assert "native: declines: " in text

"""Tensors that a field uses and that get no gradient through odeint_adjoint: one warning names them."""

import functools
import gc
import time
import warnings

import pytest
import torch
from problems import Net

import flashode
from flashode.adjoint import once
from flashode.adjoint.reached import warn_unlisted

T = torch.tensor([0.0, 1.0])


def weight(*shape):
    return torch.full(shape, 0.5, requires_grad=True)


SCALE = weight(2)
WEIGHTS = {"a": weight(2), "b": [weight(2)]}
HELPER_WEIGHT = weight(2)


def helper(y):
    return y * HELPER_WEIGHT


def warnings_of(func, *, adjoint_params=None, args=()):
    """The texts of the warnings that one solve and its backward pass give."""
    if adjoint_params is None and not isinstance(func, torch.nn.Module):
        adjoint_params = ()
    y0 = torch.ones(2, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ys = flashode.odeint_adjoint(func, y0, T, rtol=1e-2, adjoint_params=adjoint_params, args=args)
        ys[-1].sum().backward()
    return [str(w.message) for w in caught]


def named_by(func, **arguments):
    """What the one warning of a solve gives no gradient to."""
    (text,) = warnings_of(func, **arguments)
    names, remedy = text.removeprefix("odeint_adjoint gives no gradient to ").split(", though ")
    assert "adjoint_params=" in remedy and "args=" in remedy
    return names


class Linear(torch.nn.Module):
    """A field with a tensor that is no parameter, and perhaps a method with another name."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(2, 2)
        self.scale = weight(2)

    def forward(self, t, y):
        return self.encoder(y) * self.scale

    def slope(self, t, y):
        return self(t, y)


class Callable:
    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __call__(self, t, y):
        return y * sum(w for w in vars(self).values() if isinstance(w, torch.Tensor))


class CallableByGlobal:
    def __call__(self, t, y):
        return y * SCALE


class ModuleByGlobal(torch.nn.Module):
    def forward(self, t, y):
        return y * SCALE


def closure_of(w):
    return lambda t, y: y * w


def closure_of_members():
    pairs, table = (weight(2), weight(2)), {"k": weight(2)}
    return lambda t, y: y * pairs[1] * table["k"]


def closure_of_module():
    net = torch.nn.Linear(2, 2)
    return lambda t, y: net(y)


def closure_of_deep_module():
    nets = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2)))
    return lambda t, y: nets(y)


def with_default(t, y, w=weight(2)):
    return y * w


def with_keyword_default(t, y, *, w=weight(2)):
    return y * w


def wrapped():
    def plain(t, y):
        return y * SCALE

    @functools.wraps(plain)
    def decorated(*args):
        return plain(*args)

    return decorated


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: Linear(), "func.scale"),
        (lambda: Linear().slope, "self.scale, self.encoder.weight, self.encoder.bias"),
        (lambda: Callable(w=weight(2)), "func.w"),
        (lambda: CallableByGlobal(), "SCALE"),
        (lambda: ModuleByGlobal(), "SCALE"),
        (lambda: closure_of(weight(2)), "w"),
        (closure_of_members, "pairs[1], table['k']"),
        (closure_of_module, "net.weight, net.bias"),
        (closure_of_deep_module, "nets.0.weight, nets.0.bias, nets.1.0.weight, nets.1.0.bias"),
        (lambda: lambda t, y: y * SCALE, "SCALE"),
        (lambda: lambda t, y: sum(y * w for w in [SCALE]), "SCALE"),
        (lambda: lambda t, y: y * WEIGHTS["a"] * WEIGHTS["b"][0], "WEIGHTS['a'], WEIGHTS['b'][0]"),
        (lambda: lambda t, y: helper(y), "HELPER_WEIGHT"),
        (lambda: with_default, "w"),
        (lambda: with_keyword_default, "w"),
        (lambda: functools.partial(lambda w, t, y: y * w, weight(2)), "func.args[0]"),
        (lambda: functools.partial(lambda t, y, w: y * w, w=weight(2)), "func.keywords['w']"),
        (lambda: functools.partial(closure_of(weight(2))), "w"),
        (wrapped, "SCALE"),
    ],
)
def test_a_tensor_without_a_gradient_is_named(make, names):
    assert named_by(make()) == names


def test_a_tensor_that_no_name_leads_to_is_told_by_its_shape():
    hidden = iter([weight(3)] * 1000)
    assert named_by(lambda t, y: y * next(hidden).sum()) == "an unnamed tensor of shape (3,)"


def test_a_captured_result_is_named_in_place_of_what_made_it():
    encoder = torch.nn.Linear(2, 2)
    z = encoder(torch.ones(2))
    assert named_by(lambda t, y: y * z) == "z"
    first, second = encoder(torch.ones(2)).unbind()
    assert named_by(lambda t, y: y * second, args=()) == "second"
    assert not warnings_of(lambda t, y, first: y * first, args=(first,))


def test_one_output_of_an_operation_listed_leaves_the_others_missing():
    first, second = torch.nn.Linear(2, 2)(torch.ones(2)).unbind()
    assert named_by(lambda t, y: y * first * second, adjoint_params=(first,)) == "second"


def test_what_the_field_computes_and_stores_is_not_taken_for_a_captured_result():
    class Storing(Linear):
        def forward(self, t, y):
            self.hidden = self.encoder(y)
            return self.hidden * self.scale

    assert named_by(Storing()) == "func.scale"


def test_a_captured_function_of_a_listed_tensor_is_not_missing():
    w = weight(2)
    half = w[:1]
    assert not warnings_of(lambda t, y: y * half, adjoint_params=(w,))


@pytest.mark.parametrize("at", ["adjoint_params", "args", "state", "nowhere"])
def test_tensors_with_gradients_are_not_missed(at):
    w = weight(2)
    if at == "adjoint_params":
        assert not warnings_of(closure_of(w), adjoint_params=(w,))
    elif at == "args":
        assert not warnings_of(lambda t, y, params: y * params["w"], args=({"w": w},))
    elif at == "state":
        assert not warnings_of(lambda t, y: -y)
    else:
        assert not warnings_of(closure_of(w.detach()))


def test_the_start_of_the_solve_inside_the_field_is_missing():
    """The state gets its gradient, but not by this way."""
    y0 = weight(2)
    assert named_by(lambda t, y: y - y0) == "y0"


def test_many_names_are_cut_short():
    many = [weight(2) for _ in range(30)]
    names = named_by(lambda t, y: y * sum(many))
    assert names.startswith("many[0], many[1], ") and names.endswith("many[7], and 22 more")


def test_members_of_a_tuple_state_are_all_looked_at():
    w = weight(2)
    with pytest.warns(UserWarning, match="no gradient to w, though"):
        ys = flashode.odeint_adjoint(
            lambda t, state: (-state[0], state[1] * w), (weight(1), weight(2)), T, adjoint_params=()
        )
        ys[1].sum().backward()


@pytest.mark.parametrize("make", [Linear, lambda: Linear().slope, lambda: closure_of(weight(2))])
def test_a_field_is_warned_of_once(make):
    func = make()
    assert [len(warnings_of(func)) for _ in range(3)] == [1, 0, 0]
    if hasattr(func, "__self__"):
        assert not warnings_of(func.__self__.slope)  # another object of the same method
    assert len(warnings_of(make())) == 1


def test_fields_are_forgotten_when_they_die():
    before = len(once._said)
    fields = [closure_of(weight(2)) for _ in range(10)]
    for func in fields:
        assert len(warnings_of(func)) == 1
    assert len(once._said) == before + 10
    del fields, func
    gc.collect()
    assert len(once._said) == before


def test_graphs_may_be_deep_and_slopes_without_graph():
    x, w = torch.ones(1), weight(1)
    for _ in range(20_000):
        x = x * w
    with pytest.warns(UserWarning, match="no gradient to w, though"):
        warn_unlisted(closure_of(w), x, ())
    warn_unlisted(lambda t, y: y, torch.ones(2), ())
    warn_unlisted(lambda t, y: y, (None, torch.ones(2)), (None,))


class Slotted:
    """Has neither a __dict__ nor weak references."""

    __slots__ = ("w",)

    def __call__(self, t, y):
        return y * self.w


def test_objects_of_any_kind_are_looked_into_without_harm():
    slotted = Slotted()
    slotted.w = weight(2)
    assert [len(warnings_of(slotted)) for _ in range(2)] == [1, 1]  # it cannot be remembered

    def early(t, y):
        return y * late

    circle = Callable(many=list(range(10**5)), range=range(10**9), torch=torch, early=early, w=weight(2))
    circle.itself = circle
    assert named_by(circle) == "func.w"
    late = 1.0


def test_a_known_field_costs_microseconds():
    net = Net()
    value = net(torch.tensor(0.0), torch.ones(1, 2))
    warn_unlisted(net, value, list(net.parameters()))

    def seconds():
        begin = time.perf_counter()
        for _ in range(100):
            warn_unlisted(net, value, ())
        return (time.perf_counter() - begin) / 100

    assert min(seconds() for _ in range(5)) < 2e-5

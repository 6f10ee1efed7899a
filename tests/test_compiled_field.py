"""A compiled field is its function or Module in all but how it is solved, and notices what has changed in it."""

import copy
import gc
import math
import pickle
import threading
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from flashode import odeint
from flashode.errors import ArgumentError, ArgumentTypeError
from flashode.program import CompiledField, compile, field
from flashode.program.captured import Walk
from flashode.program.trace import trace

T = torch.tensor(0.0)
SCALE = torch.ones(2)
FACTOR = 2.0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Dropout(0.0), nn.Linear(4, 2))
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("offset", torch.zeros(2))
        self.noise, self.sign, self.nfe, self.epoch = torch.ones(2), 1.0, 0, 0

    def forward(self, t, y):
        self.nfe += 1
        return self.sign * self.net(y) * self.weight + self.offset + self.noise

    def callback_step(self, t0, y0, dt):
        pass


@compile
def decorated(t, y):
    """Goes round."""
    return torch.stack([y[..., 1], -y[..., 0]], -1)


# ---- a field is its function -----------------------------------------------------------------


def test_a_field_is_called_as_its_function():
    y = torch.randn(3, 2)
    net = Net()
    assert torch.equal(compile(net)(T, y), net(T, y))
    assert torch.equal(compile(lambda t, y, k: k * y)(T, y, 2), 2 * y)
    assert decorated.__doc__ == "Goes round." and decorated.__name__ == "decorated"
    assert compile(decorated) is decorated


@pytest.mark.parametrize(
    "func, given", [(3, "int 3"), (None, "None"), (Net, "the class Net; give an instance")]
)
def test_what_cannot_be_called_is_refused(func, given):
    with pytest.raises(ArgumentTypeError, match=given):
        compile(func)


def test_parameters_and_state_are_those_of_the_module():
    net = Net()
    compiled = compile(net)
    assert compiled.state_dict().keys() == net.state_dict().keys()
    assert [(n, id(p)) for n, p in compiled.named_parameters()] == [
        (n, id(p)) for n, p in net.named_parameters()
    ]
    other = {k: v + 1 for k, v in net.state_dict().items()}
    compiled.load_state_dict(other)
    assert torch.equal(net.net[0].weight, other["net.0.weight"])
    compiled.double()
    assert net.weight.dtype == net.offset.dtype == torch.float64
    net.weight.sum().backward()
    compiled.zero_grad()
    assert net.weight.grad is None
    compiled.eval()
    assert not net.training and not net.net[2].training and not compiled.training
    net.train()
    assert compiled.training
    compiled.weight = nn.Parameter(torch.zeros(2))
    assert net.weight is compiled.weight and dict(net.named_parameters())["weight"] is net.weight


def test_as_a_part_of_a_larger_module_it_is_saved_under_its_own_name():
    outer = nn.Module()
    outer.field = compile(Net())
    assert list(outer.state_dict()) == ["field." + name for name in Net().state_dict()]
    outer.load_state_dict(outer.state_dict())
    outer.eval()
    assert not outer.field.func.training
    assert len(list(outer.parameters())) == len(list(Net().parameters()))


def test_hooks_of_the_module_run_once():
    net, calls = Net(), []
    net.register_forward_hook(lambda *_: calls.append(1))
    compile(net)(T, torch.ones(2))
    assert calls == [1]


def test_other_attributes_are_those_of_the_function():
    net = Net()
    compiled = compile(net)
    assert compiled.callback_step == net.callback_step
    compiled.sign = 3.0
    assert net.sign == 3.0 and compiled.sign == 3.0
    with pytest.raises(AttributeError, match="absent"):
        compiled.absent

    def func(t, y):
        return y

    func.callback_accept_step = print
    assert compile(func).callback_accept_step is print


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_the_function_and_no_programs(duplicate):
    compiled = compile(Net())
    compiled._programs["key"] = ["program"]
    other = duplicate(compiled)
    assert type(other) is CompiledField and not other._programs
    assert other.func is not compiled.func and other.weight is not compiled.weight
    assert torch.equal(other(T, torch.ones(2)), compiled(T, torch.ones(2)))
    assert duplicate(decorated) is decorated


# ---- what has changed ------------------------------------------------------------------------


def captured(func, *args):
    """Where the tensors of ``func`` are, and what they are now."""
    y = torch.randn(3, 2)
    walk = Walk(func, args)
    inputs = trace(lambda t, y: func(t, y, *args), T, y).inputs
    return walk.captured(inputs), inputs


def same(tensors, others):
    return [id(x) for x in tensors] == [id(x) for x in others]


def test_tensors_of_now_are_found():
    net = Net()
    now, inputs = captured(net)
    assert not now.fixed and len(inputs) == 7
    assert same(now.current(), inputs)


def replace_weight(net):
    net.net[0].weight = nn.Parameter(torch.zeros(4, 2))
    return net.net[0].weight


def replace_attribute(net):
    net.noise = torch.zeros(2)
    return net.noise


def replace_buffer(net):
    net.offset = torch.zeros(2)
    return net.offset


def replace_parameter_in_place(net):
    with torch.no_grad():
        net.weight.add_(1)
    return net.weight


@pytest.mark.parametrize(
    "replace", [replace_weight, replace_attribute, replace_buffer, replace_parameter_in_place]
)
def test_replaced_tensors_are_followed(replace):
    net = Net()
    now, inputs = captured(net)
    new = replace(net)
    current = now.current()
    assert any(x is new for x in current)
    assert sum(x is not y for x, y in zip(current, inputs)) == (replace is not replace_parameter_in_place)


CHANGES = {
    "value": lambda net: setattr(net, "sign", -1.0),
    "value of another type": lambda net: setattr(net, "sign", 1),
    "mode": lambda net: net.eval(),
    "mode of a part": lambda net: net.net[2].eval(),
    "dtype": lambda net: net.double(),
    "shape": lambda net: setattr(net, "noise", torch.ones(1)),
    "gradient": lambda net: net.weight.requires_grad_(False),
    "a part": lambda net: net.net.__setitem__(1, nn.ReLU()),
    "one more part": lambda net: net.net.append(nn.Tanh()),
    "a value of a part": lambda net: setattr(net.net[2], "p", 0.5),
    "a hook": lambda net: net.net[0].register_forward_hook(lambda *_: None),
    "another forward": lambda net: setattr(net, "forward", lambda t, y: y),
    "a tensor that is gone": lambda net: delattr(net, "noise"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_else_changes_asks_for_another_recording(change):
    net = Net()
    now, _ = captured(net)
    CHANGES[change](net)
    assert now.current() is None


@pytest.mark.parametrize("name", ["nfe", "epoch"])
def test_what_func_counts_itself_or_does_not_read_is_left_alone(name):
    net = Net()
    now, _ = captured(net)
    setattr(net, name, 100)
    assert now.current() is not None


def test_what_only_other_methods_use_is_left_alone(monkeypatch):
    class Trained(Net):
        def step(self):
            self.steps += 1
            self.net.requires_grad_(self.steps > 3)

    net = Trained()
    net.steps, net.record = 0, [object()]
    now, _ = captured(net)
    net.steps = 5
    net.record.append(object())
    assert now.current() is not None
    monkeypatch.setattr(Net, "forward", lambda self, t, y: y)
    assert now.current() is None


def test_properties_and_operators_of_own_classes_are_looked_through():
    class Gains:
        def __init__(self):
            self.first = 1.0

        def __getitem__(self, i):
            return self.first

    class Field:
        def __init__(self):
            self.gains, self._scale = Gains(), torch.ones(2)

        @property
        def scale(self):
            return self._scale

        @staticmethod
        def twice(y):
            return FACTOR * y

        def __call__(self, t, y):
            return self.twice(y) * self.scale * self.gains[0]

    it = Field()
    now, _ = captured(it)
    assert not now.fixed
    it._scale = torch.zeros(2)
    assert now.current()[0] is it._scale
    it.gains.first = 2.0
    assert now.current() is None


def test_what_hides_an_attribute_of_the_class_is_seen():
    class Decay(nn.Module):
        rate, called = 1.0, 0

        def forward(self, t, y):
            self.called += 1  # hides that of the class, too
            return self.slope(y)

        def slope(self, y):
            return -self.rate * y

    field, y0, t = Decay(), torch.ones(2), torch.tensor([0.0, 1.0])
    compiled, said = compile(field), []
    odeint(compiled, y0, t)
    called = field.called
    for change in (
        lambda: None,
        lambda: setattr(field, "rate", 2.0),
        lambda: setattr(field, "slope", lambda y: y),
    ):
        change()
        torch.testing.assert_close(odeint(compiled, y0, t), odeint(copy.copy(field), y0, t))
        said.append(field.called - called)
    assert said[0] == 0 < said[1] < said[2]


def test_whole_numbers_are_a_part_of_the_program():
    order = torch.tensor([0, 1])
    now, inputs = captured(lambda t, y: y[:, order])
    assert same(now.current(), inputs)
    order = torch.tensor([0, 1])
    assert same(now.current(), [order])
    order.copy_(torch.tensor([1, 0]))
    assert now.current() is None


def test_shared_tensors_have_to_stay_shared():
    net = Net()
    net.net[0].bias = nn.Parameter(torch.ones(4))
    net.bias = net.net[0].bias
    now, _ = captured(net)
    net.net[0].bias = nn.Parameter(torch.ones(4))
    assert now.current() is None


def test_variables_around_a_function_are_followed(monkeypatch):
    scale, power, nested = torch.ones(2), 2, [torch.ones(2), {"key": torch.ones(2)}]

    def func(t, y, default=torch.full((2,), 3.0)):
        def inner():
            return SCALE * FACTOR

        return scale * y**power * inner() + nested[0] + nested[1]["key"] + default

    now, inputs = captured(func)
    assert len(inputs) == 5 and not now.fixed
    scale = torch.zeros(2)
    nested[1]["key"] = torch.zeros(2)
    monkeypatch.setattr(f"{__name__}.SCALE", torch.zeros(2))
    current = now.current()
    assert sum(not x.any() for x in current) == 3 and any(x is scale for x in current)
    power = 3
    assert now.current() is None
    power = 2
    assert now.current() is not None
    monkeypatch.setattr(f"{__name__}.FACTOR", 3.0)
    assert now.current() is None


def test_bound_methods_and_partials_are_looked_through():
    class Field:
        gain = 2.0

        def __init__(self):
            self.scale = torch.ones(2)

        def rhs(self, k, t, y):
            return self.helper(y) * k

        def helper(self, y):
            return y * self.scale * self.gain

    for make in (lambda f: partial(f.rhs, torch.ones(())), lambda f: partial(Field.rhs, f, torch.ones(()))):
        it = Field()
        now, inputs = captured(make(it))
        assert len(inputs) == 2 and not now.fixed
        it.scale = torch.zeros(2)
        assert any(x is it.scale for x in now.current())
        it.gain = 3.0
        Field.gain = 4.0
        assert now.current() is None
        Field.gain = 2.0


def test_arguments_are_taken_from_the_call():
    now, inputs = captured(
        lambda t, y, k, n, options: y * k * n + options["shift"], torch.ones(2), 2, {"shift": torch.ones(2)}
    )
    other, shift = torch.zeros(2), torch.zeros(2)
    assert same(now.current((other, 2, {"shift": shift})), [other, shift])
    assert now.current((other, 3, {"shift": shift})) is None
    assert now.current((torch.zeros(1), 2, {"shift": shift})) is None
    assert now.current((2, 2, {"shift": shift})) is None
    assert now.current((other,)) is None


def test_a_tensor_out_of_sight_stays_what_it_is():
    hidden = {i: torch.ones(2) for i in range(2000)}
    now, inputs = captured(lambda t, y: y * hidden[7])
    assert now.fixed == [0] and same(now.current(), [hidden[7]])


# ---- programs --------------------------------------------------------------------------------


class Problem:
    """What a field looks at of a problem."""

    def __init__(self, y0, args=(), method="dopri5"):
        self.y0, self.args, self.shapes, self.dtypes, self.dense = y0, args, None, None, None
        self.method = type("Method", (), {"name": method})
        self.differentiates_time = False


@pytest.fixture
def assembled(monkeypatch):
    """Counts the programs that are made; each is a number."""
    made = []

    def assemble(problem, func, gradients):
        inputs = trace(lambda t, y: func(t, y, *problem.args), T, problem.y0.detach()).inputs
        made.append(gradients(inputs))
        return len(made), inputs

    monkeypatch.setattr(field, "assemble", assemble)
    return made


def test_a_program_is_made_once_for_each_kind_of_problem(assembled):
    net = Net()
    compiled, y0 = compile(net), torch.randn(3, 2)
    with torch.no_grad():
        assert compiled.program(Problem(y0))[0] == 1 and compiled.program(Problem(y0 + 1))[0] == 1
        assert compiled.program(Problem(torch.randn(4, 2)))[0] == 2
        assert compiled.program(Problem(y0, method="bosh3"))[0] == 3
    assert compiled.program(Problem(y0))[0] == 4
    assert assembled == [None, None, None, "reverse"]
    net.noise = torch.zeros(2)
    program, tensors, _ = compiled.program(Problem(y0))
    assert program == 4 and any(x is net.noise for x in tensors)


def test_programs_for_both_modes_are_kept(assembled):
    compiled, y0 = compile(Net()), torch.randn(3, 2)
    found = []
    for mode in (True, False, True, False):
        compiled.train(mode)
        found.append(compiled.program(Problem(y0))[0])
    assert found == [1, 2, 1, 2]


def test_the_number_of_programs_has_a_limit(assembled, monkeypatch):
    monkeypatch.setattr(field, "PROGRAMS", 3)
    compiled = compile(lambda t, y, k: y * k)
    for k in range(5):
        compiled.program(Problem(torch.randn(3, 2), args=(k,)))
    for n in range(1, 5):
        compiled.program(Problem(torch.randn(n, 2), args=(1,)))
    assert sum(map(len, compiled._programs.values())) <= 3


def test_a_field_that_changes_with_every_solve_draws_a_warning(assembled, monkeypatch):
    monkeypatch.setattr(field, "OFTEN", 2)
    net = Net()
    compiled, y0 = compile(net), torch.randn(3, 2)
    for sign in (1.0, 2.0, 1.0):
        net.sign = sign
        compiled.program(Problem(y0))
    net.sign = 3.0
    with pytest.warns(UserWarning, match="compiled 3 times .* 'sign' was 2.0 and is 3.0.*Tensor"):
        compiled.program(Problem(y0))
    decay = compile(lambda t, y, k: -k * y)
    with pytest.warns(UserWarning, match="one of args was 1.0 and is 2.0"):
        for k in (0.0, 1.0, 2.0):
            decay.program(Problem(y0, args=(k,)))


def test_threads_make_one_program(assembled):
    compiled, y0, found = compile(Net()), torch.randn(3, 2), []
    threads = [
        threading.Thread(target=lambda: found.append(compiled.program(Problem(y0))[0])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1, 1, 1, 1] and len(assembled) == 1


def test_a_call_like_the_one_before_is_not_checked_again_but_its_start_is():
    field, t = compile(lambda t, y: -y), torch.tensor([0.0, 1.0])
    for scale in (1.0, 2.0):
        assert odeint(field, torch.full((3,), scale), t)[-1, 0].item() == pytest.approx(scale * math.exp(-1))
    with pytest.raises(ArgumentError, match="y0 must be finite"):
        odeint(field, torch.tensor([1.0, math.nan, 1.0]), t)
    with pytest.raises(ArgumentError, match="rtol"):
        odeint(field, torch.ones(3), t, rtol=-1.0)
    assert odeint(field, torch.ones(4), t).shape == (2, 4)
    t[1] = 2.0
    assert odeint(field, torch.ones(3), t)[-1, 0].item() == pytest.approx(math.exp(-2))
    options = {"first_step": 0.1}
    odeint(field, torch.ones(3), t, options=options)
    options["first_step"] = -1.0
    with pytest.raises(ArgumentError, match="first_step"):
        odeint(field, torch.ones(3), t, options=options)


def test_what_is_remembered_of_a_call_holds_no_graph():
    field, t, y0 = compile(lambda t, y: -y), torch.tensor([0.0, 1.0]), torch.ones(3, requires_grad=True)
    start = y0 * 2
    gone = weakref.ref(start)
    odeint(field, start, t)
    del start
    gc.collect()
    assert gone() is None

"""Solves inside PyTorch's modes: on many threads, nested, under autocast and hooks, in other processes."""

import contextlib
import copy
import functools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import Net, growth, pickled, saved
from solves import F64, MODES, SOLVES, Block, T, derivatives, each_solve, run, same

import flashode
from flashode import extension
from flashode.methods import METHODS

pytestmark = [
    # torch.compile looks for a gradient wherever there could be one, and compiles forward-mode formulas.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]


@pytest.fixture
def net():
    return Net(dtype=F64)


@pytest.fixture
def y0():
    return torch.randn(3, 2, dtype=F64, requires_grad=True)


# ---- threads ---------------------------------------------------------------------------------


@pytest.fixture
def impatient():
    """Threads that take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def at_once(tasks, workers=8):
    """What the tasks return, begun together on threads of their own."""
    gate = threading.Barrier(workers, timeout=30)

    def begin(i, task):
        if i < workers:
            gate.wait()
        return task()

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(begin, i, task) for i, task in enumerate(tasks)]
        return [future.result(timeout=60) for future in futures]


def test_threads_that_share_a_field_solve_as_one_does(engine, net, impatient):
    def solve(i):
        method, mode = SOLVES[i % len(SOLVES)]
        y0 = torch.full((1 + i % 3, 2), 0.1 * i, dtype=F64, requires_grad=True)
        ys = run(net, y0, mode=mode, method=method, engine=engine)
        return ys, *derivatives(ys, [y0, *net.parameters()])

    tasks = [functools.partial(solve, i) for i in range(2 * len(SOLVES))]
    for ours, theirs in zip(at_once(tasks), [task() for task in tasks]):
        assert all(map(torch.equal, ours, theirs))


def test_threads_solve_large_states_at_once(engine, impatient):
    """States from which the native engine lets other threads run."""

    def solve(i):
        y0 = torch.linspace(0, 1 + i, 70_001, requires_grad=i % 2 == 0)
        t = torch.tensor([0.0, 0.3, 0.8])
        ys = flashode.odeint(lambda t, y: torch.sin(y) - t, y0, t, rtol=1e-4, atol=1e-4, engine=engine)
        return ys, *(derivatives(ys, y0) if y0.requires_grad else [])

    tasks = [functools.partial(solve, i) for i in range(8)]
    for ours, theirs in zip(at_once(tasks), [task() for task in tasks]):
        assert all(map(torch.equal, ours, theirs))


def test_one_graph_can_be_walked_by_several_threads(engine, net, y0):
    for method, mode in SOLVES:
        ys = run(net, y0, mode=mode, method=method, engine=engine)
        inputs = [y0, *net.parameters()]
        walk = functools.partial(torch.autograd.grad, ys.sum(), inputs, retain_graph=True)
        for grads in at_once([walk] * 4, workers=4):
            same(grads, walk())


def test_an_error_in_one_thread_is_its_own(engine):
    def solve(i):
        def func(t, y):
            if i % 2 and t > 0.5:
                raise KeyError(i)
            return -y

        try:
            return run(func, torch.ones(2, dtype=F64), engine=engine)
        except KeyError as error:
            return error.args[0]

    results = at_once([functools.partial(solve, i) for i in range(16)])
    for i, result in enumerate(results):
        assert result == i if i % 2 else torch.equal(result, results[0])


# ---- solves inside solves --------------------------------------------------------------------


@each_solve
def test_a_field_may_solve(engine, y0, method, mode):
    """y' = -a * (what z' = -a z takes y to in a second), so y(t) = y0 exp(-a exp(-a) t)."""
    a, t = torch.tensor(0.8, dtype=F64, requires_grad=True), torch.tensor([0.0, 0.6, 1.0], dtype=F64)
    params = {} if mode == "direct" else dict(adjoint_params=(a,))
    call = dict(mode=mode, method=method, engine=engine) | params
    call |= dict(options=dict(step_size=0.1)) if method == "rk4" else {}

    def inner(t, z):
        return -a * z

    def outer(t, y):
        return -a * run(inner, y, torch.tensor([0.0, 1.0], dtype=F64), **call)[-1]

    ys = run(outer, y0, t, **call)
    exact = y0 * torch.exp(-a * torch.exp(-a) * t)[:, None, None]
    close = dict(rtol=1e-4, atol=1e-4)
    same(ys, exact, **close)
    same(derivatives(ys, [y0, a]), derivatives(exact, [y0, a]), **close)


def decay(engine, y=1.0):
    """A solve on the side: exp(-1)."""
    return run(
        lambda t, y: -y, torch.full((2,), y, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64), engine=engine
    )[-1]


def test_callbacks_and_events_may_solve(engine, net, y0):
    plain, heard = Net(dtype=F64), []
    for name in ("callback_step", "callback_accept_step", "callback_reject_step"):
        setattr(net, name, lambda t, y, dt: heard.append(decay(engine)))
    assert torch.equal(run(net, y0, engine=engine), run(plain, y0, engine=engine))
    assert heard and all(torch.equal(x, decay(engine)) for x in heard)

    def event(t, y):
        return y[0] - decay("auto")[0]

    event_t, _ = flashode.odeint(lambda t, y: -y, torch.ones(1, dtype=F64), T[:2] - T[0], event_fn=event)
    assert abs(event_t.item() - 1) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_backward_pass_may_solve(engine, y0, mode):
    class Doubled(torch.autograd.Function):
        """The identity, whose gradients are solved for: z' = z over log 2."""

        forward = staticmethod(lambda ctx, x: x.clone())

        @staticmethod
        def backward(ctx, grad):
            t = torch.tensor([0.0, 2.0], dtype=F64).log1p()[:2] * (0.6931471805599453 / 1.0986122886681098)
            z = grad.detach().requires_grad_()
            with torch.enable_grad():
                ys = run(lambda t, z: z, z, t, rtol=1e-9, atol=1e-11, engine=engine)[-1]
            return ys.detach()

    params = {} if mode == "direct" else dict(adjoint_params=())
    t = torch.tensor([0.0, 1.0], dtype=F64)
    ys = run(lambda t, y: Doubled.apply(y), y0, t, mode=mode, engine=engine, rtol=1e-7, **params)[-1]
    (grad,) = torch.autograd.grad(ys.sum(), y0)
    expected = torch.full_like(grad, 2.0).exp()  # a' = -2 a in place of -a
    same(grad, expected, rtol=1e-4, atol=1e-4)


# ---- gradient modes --------------------------------------------------------------------------


def test_values_are_the_same_in_every_gradient_mode(engine, net, y0):
    for method, mode in SOLVES:
        solve = functools.partial(run, net, mode=mode, method=method, engine=engine)
        plain = solve(y0)
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                ys = solve(y0)
                inside = solve(y0 * 1)
            assert torch.equal(ys, plain) and torch.equal(inside, plain) and not ys.requires_grad
            assert ys.is_inference() == (off is torch.inference_mode)


@each_solve
def test_an_inference_tensor_may_be_a_start(engine, net, y0, method, mode):
    with torch.inference_mode():
        start = y0 * 1
        times = T * 1
    ours = run(net, start, times, mode=mode, method=method, engine=engine)
    theirs = run(net, y0.detach(), mode=mode, method=method, engine=engine)
    assert torch.equal(ours, theirs)
    inputs = list(net.parameters())
    same(derivatives(ours, inputs), derivatives(theirs, inputs))


class Flow(torch.nn.Module):
    """A state and the integral of the field's divergence, which the field differentiates itself for."""

    def __init__(self):
        super().__init__()
        self.net = Net(dtype=F64)

    def forward(self, t, state):
        y = state[0]
        with torch.enable_grad():
            y.requires_grad_(True)
            f = self.net(t, y)
            terms = [torch.autograd.grad(f[:, i].sum(), y, create_graph=True)[0][:, i] for i in range(2)]
        return f, sum(terms)


@each_solve
def test_a_field_may_differentiate_itself_with_gradients_off(engine, y0, method, mode):
    flow, state, t = Flow(), (y0, torch.zeros(3, dtype=F64)), torch.linspace(0, 1, 9, dtype=F64)
    solve = functools.partial(run, flow, state, t, mode=mode, method=method, engine=engine)
    ys = solve()
    with torch.no_grad():
        same(solve(), ys)
    inputs = [y0, *flow.parameters()]
    exact = mode in ("direct", "checkpoint")
    reference = derivatives(run(flow, state, t, method=method, engine="reference"), inputs)
    same(derivatives(ys, inputs), reference, **({} if exact else dict(rtol=1e-3, atol=1e-3)))


# ---- autocast --------------------------------------------------------------------------------


class Half(torch.nn.Module):
    """A field that autocast takes to bfloat16, and what it made in each call."""

    def __init__(self):
        super().__init__()
        self.linear, self.dtypes = torch.nn.Linear(2, 2), []

    def forward(self, t, y):
        f = self.linear(y)
        self.dtypes.append(f.dtype)
        return f


@pytest.mark.filterwarnings("ignore::flashode.GradientWarning")
@each_solve
def test_backward_passes_replay_autocast(engine, method, mode):
    y0 = torch.randn(3, 2, requires_grad=True)
    loose = dict(rtol=1e-2, atol=1e-2) if method == "dopri5" else {}
    for inside, outside in ((True, False), (False, True)):
        field = Half()
        solve = functools.partial(run, field, y0, T.float(), mode=mode, method=method, engine=engine, **loose)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            ys = solve()
        forward = len(field.dtypes)
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            ys.sum().backward()
        assert ys.dtype == y0.grad.dtype == field.linear.weight.grad.dtype == torch.float32
        assert set(field.dtypes) == {torch.bfloat16 if inside else torch.float32}
        assert mode == "direct" or len(field.dtypes) > forward
        y0.grad = None


# ---- hooks, checkpoints, anomalies, determinism ----------------------------------------------


@contextlib.contextmanager
def through_numpy():
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().numpy().copy(), torch.from_numpy):
        yield


@contextlib.contextmanager
def deterministic():
    """What is not written before it is read is NaN, here."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AROUND = {
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "saved_tensors_hooks": through_numpy,
    "deterministic": deterministic,
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@each_solve
def test_contexts_around_a_solve_change_nothing(engine, net, y0, method, mode, around):
    t = T.clone().requires_grad_()
    inputs, weights = [y0, t, *net.parameters()], torch.randn(3, 3, 2, dtype=F64)
    found = []
    for context in (contextlib.nullcontext, around):
        with context():
            ys = run(net, y0, t, mode=mode, method=method, engine=engine)
            found.append((ys, *torch.autograd.grad(ys, inputs, weights)))
    assert torch.equal(found[0][0], found[1][0])
    same(found[1], found[0])


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.family != "symplectic"])
def test_the_default_device_is_no_part_of_any_method(y0, method):
    """Nothing that a method makes for itself may land on a device that is not the state's."""
    if METHODS[method].family == "scipy":
        pytest.importorskip("scipy")
    y0, t = y0.detach(), torch.linspace(0.1, 0.4, 4, dtype=F64)
    call = dict(method=method, rtol=1e-4, atol=1e-6)
    expected = flashode.odeint(growth, y0, t, **call)
    with torch.device("meta"):
        ys = flashode.odeint(growth, y0, t, **call)
    assert torch.equal(ys, expected)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_the_default_device_is_no_part_of_dense_output(y0, method):
    sol = flashode.odeint_dense(growth, y0.detach(), 0.1, 0.9, method=method)
    expected = sol(0.3)
    with torch.device("meta"):
        sol = flashode.odeint_dense(growth, y0.detach(), 0.1, 0.9, method=method)
        assert torch.equal(sol(0.3), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@each_solve
def test_a_solve_may_be_checkpointed(engine, net, y0, method, mode, reentrant):
    solve = functools.partial(run, net, mode=mode, method=method, engine=engine)
    theirs = solve(torch.sin(y0)).cos()

    def segment(y0):
        return solve(torch.sin(y0)).cos()

    ours = torch.utils.checkpoint.checkpoint(segment, y0, use_reentrant=reentrant)
    assert torch.equal(ours, theirs)
    for ys in (ours, theirs):
        for x in (y0, *net.parameters()):
            x.grad = None
        ys.square().sum().backward()
        grads = [x.grad for x in (y0, *net.parameters())]
        if ys is ours:
            found = grads
    same(found, grads)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode_finds_the_field_at_fault(engine, net, y0):
    for method, mode in SOLVES:
        with torch.autograd.detect_anomaly():
            ours = run(net, y0, mode=mode, method=method, engine=engine)
            grads = derivatives(ours, y0)
        same(grads, derivatives(run(net, y0, mode=mode, method=method, engine=engine), y0))

    class NoSlope(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, grad: grad * torch.nan)

    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="NoSlopeBackward.*nan"):
        run(lambda t, y: NoSlope.apply(y), y0, engine=engine).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_default_dtype_is_no_part_of_a_solve(engine, dtype):
    nets = {state: Net(dtype=state) for state in (torch.float32, F64)}

    def everything():
        found = []
        for state, net in nets.items():
            y0 = torch.linspace(-1, 1, 6, dtype=state).reshape(3, 2).requires_grad_()
            t = T.to(state, copy=True).requires_grad_()
            inputs = [y0, t, *net.parameters()]
            for method, mode in SOLVES:
                options = (
                    dict(step_size=0.2, interp="cubic")
                    if method == "rk4"
                    else dict(first_step=0.1, step_t=[0.7])
                )
                call = dict(mode=mode, method=method, engine=engine, options=options, rtol=1e-4, atol=1e-5)
                ys = run(net, y0, t, **call)
                found += [ys, *derivatives(ys, inputs)]
            if engine == "reference":
                event_t, ys = flashode.odeint(net, y0, t[:2], event_fn=lambda t, y: t - 0.3, engine=engine)
                found += [event_t, ys]
        return found

    expected, default = everything(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert all(map(torch.equal, everything(), expected))
    finally:
        torch.set_default_dtype(default)


class Tagged(torch.Tensor):
    """A subclass as libraries make them: through __torch_function__ it stays what it is."""


def test_tensor_subclasses_are_served_by_the_reference_engine(net, y0):
    tagged = y0.detach().as_subclass(Tagged)
    assert "subclass" in flashode.explain(net, tagged, T) or extension.C is None
    ys = run(net, tagged)
    same(torch.Tensor(ys), run(net, y0.detach(), engine="reference"))


# ---- DataParallel ----------------------------------------------------------------------------


def replica_of(module, copies):
    """What DataParallel makes of a module for one device: its parameters are plain attributes, and copies
    through which gradients reach the original."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(replica, name, replica_of(child, copies))
    for name, param in module._parameters.items():
        copies.append(param * 1)
        setattr(replica, name, copies[-1])
    return replica


@each_solve
def test_replicas_of_data_parallel_pass_gradients_to_the_module(engine, net, y0, method, mode):
    copies = []
    ours = run(replica_of(net, copies), y0, mode=mode, method=method, engine=engine)
    theirs = run(net, y0, mode=mode, method=method, engine=engine)
    inputs = [y0, *net.parameters()]
    assert len(copies) == 2
    same(derivatives(ours, inputs), derivatives(theirs, inputs))


# ---- pickles and processes -------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@each_solve
def test_a_model_that_has_solved_can_be_copied(y0, method, mode, copied):
    options = dict(step_size=0.3) if method == "rk4" else dict(first_step=0.1, jump_t=torch.tensor([0.4]))
    block = Block(mode, method=method, options=options, rtol=1e-5)
    block(y0).sum().backward()
    twin = copied(block)
    assert torch.equal(block(y0), twin(y0))
    twin(y0).sum().backward()
    same([p.grad for p in twin.parameters()], [p.grad for p in block.parameters()])


class Trajectories(torch.utils.data.Dataset):
    """A dataset that solves for its items."""

    def __init__(self):
        self.block = Block("checkpoint", method="rk4")

    def __len__(self):
        return 4

    def __getitem__(self, i):
        y0 = torch.full((3, 2), float(i), dtype=F64, requires_grad=True)
        y = self.block(y0)
        return y.detach(), torch.autograd.grad(y.sum(), y0)[0]


@pytest.fixture
def threads():
    """Two threads for every kernel, which a forked process has lost."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("start", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_of_a_data_loader_solve(start, threads):
    data = Trajectories()
    expected = [data[i] for i in range(4)]  # solved here before the workers begin
    flashode.odeint(growth, torch.ones(100_000), T.float(), method="rk4")
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=start)
    for ours, theirs in zip(loader, expected):
        assert all(map(torch.equal, ours, theirs))

"""`import torchdiffeq` gives flashode: its public names, the private ones that programs use, and other packages."""

import contextlib
import copy
import functools
import importlib
import importlib.metadata
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import Net, Spiral, growth

import flashode
from flashode import compat
from flashode.methods import METHODS

real = pytest.importorskip(
    "torchdiffeq", reason="torchdiffeq, which these tests compare with, is not installed"
)

ROOT = Path(__file__).resolve().parent.parent
double = functools.partial(torch.tensor, dtype=torch.float64)
TIMES = double([0.0, 0.4, 0.5, 1.3])


# What public code imports, by how a search through it found them.
WILD = {
    "odeint": "SOLVERS odeint odeint_event odeint_dense",
    "misc": "Perturb _PerturbFunc _ReverseFunc _TupleFunc _TupleInputOnlyFunc _all_adjoint_callback_names "
    "_all_callback_names _assert_increasing _check_inputs _check_timelike _compute_error_ratio _decreasing "
    "_flat_to_shape _flip_option _handle_unused_kwargs _linf_norm _mixed_norm _nextafter _null_callback "
    "_optimal_step_size _rms_norm _select_initial_step _tuple_tol _zero_norm",
    "solvers": "AdaptiveStepsizeODESolver AdaptiveStepsizeEventODESolver FixedGridODESolver",
    "rk_common": "_ButcherTableau _RungeKuttaState _runge_kutta_step RKAdaptiveStepsizeODESolver "
    "rk4_step_func rk4_alt_step_func rk3_step_func rk2_step_func",
    "fixed_grid": "Euler Midpoint Heun2 Heun3 RK4",
    "fixed_adams": "AdamsBashforth AdamsBashforthMoulton _dot_product",
    "dopri5": "Dopri5Solver _DORMAND_PRINCE_SHAMPINE_TABLEAU DPS_C_MID",
    "dopri8": "Dopri8Solver _DOPRI8_TABLEAU _C_mid",
    "bosh3": "Bosh3Solver _BOGACKI_SHAMPINE_TABLEAU _BS_C_MID",
    "adaptive_heun": "AdaptiveHeunSolver _ADAPTIVE_HEUN_TABLEAU _AH_C_MID",
    "fehlberg2": "Fehlberg2 _FEHLBERG2_TABLEAU _FE_C_MID",
    "interp": "_interp_fit _interp_evaluate",
    "event_handling": "find_event combine_event_functions",
    "adjoint": "odeint_adjoint find_parameters handle_adjoint_norm_ OdeintAdjointMethod",
    "scipy_wrapper": "ScipyWrapperODESolver",
}
REAL = {name: importlib.import_module(f"torchdiffeq._impl.{name}") for name in WILD}


@contextlib.contextmanager
def imported_anew(name):
    """A package imported afresh, by what torchdiffeq is at the time."""

    def of_package():
        return [key for key in sys.modules if key == name or key.startswith(name + ".")]

    before = {key: sys.modules.pop(key) for key in of_package()}
    try:
        yield importlib.import_module(name)
    finally:
        for key in of_package():
            del sys.modules[key]
        sys.modules.update(before)


@pytest.fixture(scope="module")
def layer():
    """The package that is imported as torchdiffeq."""
    compat.install()
    yield importlib.import_module("torchdiffeq")
    compat.uninstall()


@pytest.fixture
def private(layer):
    """A private module of the layer, by the end of its name."""
    return lambda name: importlib.import_module(f"torchdiffeq._impl.{name}")


@pytest.fixture
def solvers(private):
    """The table of solvers, put back when the test is over."""
    table = private("odeint").SOLVERS
    before = dict(table)
    yield table
    table.clear()
    table.update(before)


def real_private(name):
    """The same private module of torchdiffeq itself."""
    return REAL[name]


@contextlib.contextmanager
def uninstalled():
    """torchdiffeq itself for a while, and then the same modules of the layer again."""
    was_installed = compat._Finder in sys.meta_path
    ours = (
        {name: sys.modules[name] for name in sys.modules if name.startswith("torchdiffeq")}
        if was_installed
        else {}
    )
    compat.uninstall()
    try:
        yield
    finally:
        if was_installed:
            compat.install()
            sys.modules.update(ours)


# ---- who is found ----------------------------------------------------------------------------


def test_imports_give_flashode_until_it_is_uninstalled():
    before, version = sys.modules["torchdiffeq"], importlib.metadata.version("torchdiffeq")
    compat.install()
    compat.install()
    try:
        import torchdiffeq as found
        from torchdiffeq import odeint_adjoint as odeint  # noqa: F401

        assert found is not before and found.__flashode__ == flashode.__version__
        assert found.__version__ == "0.2.5" and found.__file__.startswith(compat.SITE)
        assert importlib.reload(found) is found and found.__flashode__
        assert importlib.metadata.version("torchdiffeq") == version
    finally:
        compat.uninstall()
        compat.uninstall()
    import torchdiffeq

    assert torchdiffeq is before and not hasattr(torchdiffeq, "__flashode__")
    assert importlib.import_module("torchdiffeq._impl.misc").__file__.startswith(
        os.path.dirname(before.__file__)
    )


def test_nothing_else_is_asked_for_torchdiffeq():
    """So that it need not be installed."""

    class Spy:
        @staticmethod
        def find_spec(name, path=None, target=None):
            assert not name.startswith("torchdiffeq"), name

    with uninstalled():
        before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("torchdiffeq")}
        compat.install()
        sys.meta_path.insert(1, Spy)
        try:
            assert importlib.import_module("torchdiffeq").__flashode__
            assert importlib.import_module("torchdiffeq._impl.dopri5")
        finally:
            sys.meta_path.remove(Spy)
            compat.uninstall()
            sys.modules.update(before)


def test_functions_can_be_pickled_and_copied(layer):
    for name in layer.__all__:
        function = getattr(layer, name)
        assert pickle.loads(pickle.dumps(function)) is function and copy.deepcopy(function) is function


@pytest.mark.parametrize("module", WILD)
def test_private_names_that_programs_import_are_there(private, module):
    for name in WILD[module].split():
        found = getattr(private(module), name)
        assert not callable(found) or found.__module__.startswith("torchdiffeq._impl")
        assert hasattr(real_private(module), name)


def test_a_name_that_is_missing_draws_an_error_that_says_what_there_is(layer, private):
    with pytest.raises(ImportError, match=r"_impl.misc has no '_flatten'; it has .*_flat_to_shape"):
        from torchdiffeq._impl.misc import _flatten  # noqa: F401
    with pytest.raises(ImportError, match="_impl has no 'conv'; it has .*dopri5, .*solvers"):
        from torchdiffeq._impl import conv  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="torchdiffeq has no 'covar'"):
        import torchdiffeq.covar  # noqa: F401
    assert not hasattr(private("misc"), "_flatten") and not hasattr(layer, "nothing")


# ---- public functions ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [None, {"norm": lambda x: x.abs().max()}])
@pytest.mark.parametrize("reverse", [False, True])
def test_public_functions_are_flashodes(layer, reverse, options):
    y0, t = torch.randn(33, 2, dtype=torch.float64), TIMES.flip(0) if reverse else TIMES
    field = Net(dtype=torch.float64)
    kwargs = dict(rtol=1e-6, atol=1e-8, options=options)
    assert torch.equal(layer.odeint(field, y0, t, **kwargs), flashode.odeint(field, y0, t, **kwargs))
    expected = real.odeint_adjoint(field, y0, t, **kwargs)
    found = layer.odeint_adjoint(field, y0, t, **kwargs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)
    for ys in (expected, found):
        ys.square().sum().backward()
        grads = [p.grad for p in field.parameters()]
        field.zero_grad()
        if ys is expected:
            wanted = grads
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-3)


def test_what_users_of_torchdiffeq_write(layer):
    """Tolerances for each member, options by method, one state in two shapes, methods by old names."""
    field = Net(dtype=torch.float64)

    def flow(t, state):  # a flow with its log-density, as in FFJORD
        z, _ = state
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            dz = field(t, z)
            trace = sum(torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2))
        return dz, -trace[:, None]

    z = torch.randn(7, 2, dtype=torch.float64)
    state, span = (z, torch.zeros(7, 1, dtype=torch.float64)), double([0.0, 1.0])
    for kwargs in (
        dict(rtol=[1e-5, 1e-3], atol=[1e-6, 1e-4], method="dopri5"),
        dict(rtol=1e-5, atol=1e-5, method="rk4", options={"step_size": 0.25}),
        dict(atol=[1e-5, 1e-5], rtol=[1e-5, 1e-5], method="bosh3", options={"max_num_steps": 10_000}),
    ):
        for t in (span, span.flip(0)):
            expected = real.odeint(flow, state, t, **kwargs)
            torch.testing.assert_close(layer.odeint(flow, state, t, **kwargs), expected, rtol=1e-3, atol=1e-4)


def test_events_are_flashodes(layer):
    def rise(t, y):
        return torch.ones_like(y)

    for interface in (layer.odeint, functools.partial(layer.odeint_adjoint, adjoint_params=())):
        y0, t0 = torch.zeros(1, dtype=torch.float64, requires_grad=True), double(0.0)
        event_t, ys = layer.odeint_event(
            rise, y0, t0, event_fn=lambda t, y: y[0] - 2, odeint_interface=interface, atol=1e-10
        )
        assert abs(event_t.item() - 2) < 1e-8 and abs(ys[-1].item() - 2) < 1e-8
        event_t.backward()
        assert y0.grad.item() == pytest.approx(-1)


def test_the_time_of_an_event_has_its_gradient(layer):
    """torchdiffeq gives it a graph too, and a gradient of zero; the state is held at a fixed time in both."""
    grads = []
    for module in (layer, real):
        y0 = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        event_t, ys = module.odeint_adjoint(
            lambda t, y: 1 + 0 * y, y0, double([1.0, 2.0]), event_fn=lambda t, y: y[0] - 0.5,
            adjoint_params=(), atol=1e-10,
        )  # fmt: skip
        assert event_t.item() == pytest.approx(1.5) and ys.shape == (2, 2)
        grads.append(
            [torch.autograd.grad(x, y0, retain_graph=True)[0].tolist() for x in (event_t, ys[-1].sum())]
        )
    assert grads == [[[-1, 0], [1, 1]], [[0, 0], [1, 1]]]
    with pytest.raises(flashode.ArgumentError, match="len\\(t\\) == 2"):
        layer.odeint_adjoint(growth, y0, TIMES, event_fn=lambda t, y: y[0] - 2, adjoint_params=())


def test_dense_output_is_flashodes(layer):
    y0 = torch.ones(2, dtype=torch.float64)
    sol = layer.odeint_dense(growth, y0, double(0.0), double(1.0))
    torch.testing.assert_close(sol(double(0.3)), torch.exp(torch.sin(double(0.3))) * y0)


# ---- the table of solvers --------------------------------------------------------------------


def call_of(module, table, func, y0, t, method, options=None, **tolerances):
    """A solve in the words of torchdiffeq's own `odeint`, as programs that have copied it write it."""
    tolerances = {"rtol": 1e-7, "atol": 1e-9, **tolerances}
    shapes, func, y0, t, rtol, atol, method, options, _, _ = module._check_inputs(
        func, y0, t, tolerances["rtol"], tolerances["atol"], method, options, None, table
    )
    solution = table[method](func=func, y0=y0, rtol=rtol, atol=atol, **options).integrate(t)
    return solution if shapes is None else module._flat_to_shape(solution, (len(t),), shapes)


OPTIONS = [None, {"step_size": 0.17}, {"step_size": 0.17, "interp": "cubic"}, {"perturb": True}]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tupled", [False, True])
def test_every_solver_of_the_table_can_be_used_by_itself(private, solvers, tupled, reverse):
    def pair(t, y):
        return growth(t, y[0]), -y[1] * torch.cos(t)

    y0, t = torch.randn(3, 2, dtype=torch.float64), TIMES.flip(0) if reverse else TIMES
    func, y0 = (pair, (y0, torch.ones((), dtype=torch.float64))) if tupled else (growth, y0)
    for name in solvers:
        steps = "step_size" in METHODS[name].options
        for options in OPTIONS if steps else [None]:
            found = call_of(private("misc"), solvers, func, y0, t, name, options)
            if issubclass(
                solvers[name], private("rk_common").RKAdaptiveStepsizeODESolver
            ):  # as torchdiffeq steps
                options = {"overshoot": True}
            expected = flashode.odeint(func, y0, t, method=name, options=options)
            tolerance = 1e-11 if steps else 1e-5 if name == "scipy_solver" else 1e-7
            torch.testing.assert_close(
                found, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}"
            )


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "heun2", "heun3", "dopri5", "dopri8"])
def test_solvers_take_plain_callables_and_give_torchdiffeqs_answers(solvers, method):
    """No wrapped field is needed, nor a norm."""
    y0 = torch.randn(5, 2, dtype=torch.float64)
    solver = solvers[method](func=growth, y0=y0, rtol=1e-6, atol=1e-8)
    expected = real.odeint(growth, y0, TIMES, method=method, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(solver.integrate(TIMES), expected, rtol=1e-6, atol=1e-6)


def own_heun(private):
    class OwnHeun(private("solvers").FixedGridODESolver):
        order = 2

        def _step_func(self, func, t0, dt, t1, y0):
            perturb = private("misc").Perturb
            f0 = func(t0, y0, perturb=perturb.NEXT if self.perturb else perturb.NONE)
            f1 = func(t1, y0 + dt * f0, perturb=perturb.PREV if self.perturb else perturb.NONE)
            return dt * 0.5 * (f0 + f1), f0

    return OwnHeun


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_solver_of_the_users_own_is_taken_from_the_table(layer, private, solvers, reverse, options):
    solvers["own"] = own_heun(private)
    y0, t = torch.randn(33, dtype=torch.float64), TIMES.flip(0) if reverse else TIMES
    found = layer.odeint(growth, y0, t, method="own", options=options)
    expected = flashode.odeint(growth, y0, t, method="heun2", options=options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="Invalid method"):
        layer.odeint(growth, y0, t, method="owm")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tupled", [False, True])
def test_gradients_through_a_solver_of_the_users_own(layer, private, solvers, tupled, reverse):
    """Direct ones are those of the same method; the adjoint method calls the solver, and converges to them."""
    solvers["own"] = own_heun(private)
    net = Net(dtype=torch.float64)

    def func(t, y):
        return (net(t, y[0]), -y[1] * torch.cos(t)) if tupled else net(t, y)

    def gradients(odeint, method, **kwargs):
        y0, c0 = (torch.ones(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
        t = (TIMES.flip(0) if reverse else TIMES).clone().requires_grad_()
        ys = odeint(func, (y0, c0) if tupled else y0, t, method=method, options={"step_size": 0.03}, **kwargs)
        loss = sum((y**3).sum() for y in ys) if tupled else (ys**3).sum()
        inputs = [y0, t, *net.parameters(), *([c0] if tupled else [])]
        return torch.autograd.grad(loss, inputs)

    expected = gradients(flashode.odeint, "heun2")
    torch.testing.assert_close(gradients(layer.odeint, "own"), expected, rtol=1e-9, atol=1e-9)
    adjoint = gradients(layer.odeint_adjoint, "own", adjoint_params=tuple(net.parameters()))
    torch.testing.assert_close(adjoint, expected, rtol=1e-2, atol=2e-2)


def test_callbacks_and_events_of_a_solver_of_the_users_own(layer, private, solvers):
    solvers["own"] = own_heun(private)
    seen = []

    def fall(t, y):
        return -torch.ones_like(y)

    fall.callback_step = lambda t0, y0, dt: seen.append((float(t0), y0[0].shape, float(dt)))
    y0, t = (torch.ones(2, 3, dtype=torch.float64),), double([3.0, 2.0])
    pair = lambda t, y: (fall(t, y[0]),)  # noqa: E731
    pair.callback_step = fall.callback_step
    layer.odeint(pair, y0, t, method="own", options={"step_size": 0.5})
    assert seen == [(3.0, (2, 3), 0.5), (2.5, (2, 3), 0.5)]
    event_t, ys = layer.odeint(
        fall, torch.ones(3, dtype=torch.float64), double([1.0, 2.0]), event_fn=lambda t, y: y.sum() - 0.75,
        method="own", options={"step_size": 0.1},
    )  # fmt: skip
    assert event_t.item() == pytest.approx(1.75) and ys[-1].sum().item() == pytest.approx(0.75)
    with pytest.warns(UserWarning, match="does not support callbacks {'callback_accept_step'}"):
        fall.callback_accept_step = lambda t0, y0, dt: None
        layer.odeint(fall, torch.ones(3), torch.tensor([0.0, 1.0]), method="own")


# ---- base classes of adaptive solvers --------------------------------------------------------


def watching(module_of):
    """A solver with a loop of its own, as in GRAND, that keeps the ends of its steps."""
    dopri5, evaluate = module_of("dopri5"), module_of("interp")._interp_evaluate

    class Watching(module_of("rk_common").RKAdaptiveStepsizeODESolver):
        order = 5
        tableau = dopri5._DORMAND_PRINCE_SHAMPINE_TABLEAU
        mid = dopri5.DPS_C_MID

        def __init__(self, func, y0, rtol, atol, **kwargs):
            super().__init__(func, y0, rtol, atol, **kwargs)
            self.ends = []

        def integrate(self, t):
            solution = torch.empty(len(t), *self.y0.shape, dtype=self.y0.dtype)
            solution[0] = self.y0
            t = t.to(self.dtype)
            self._before_integrate(t)
            for i in range(1, len(t)):
                while t[i] > self.rk_state.t1:
                    self.rk_state = self._adaptive_step(self.rk_state)
                    self.ends.append(self.rk_state.t1.item())
                solution[i] = evaluate(self.rk_state.interp_coeff, self.rk_state.t0, self.rk_state.t1, t[i])
            return solution

    return Watching


@pytest.mark.parametrize("reverse", [False, True])
def test_a_subclass_with_a_loop_of_its_own_takes_torchdiffeqs_steps(private, reverse):
    y0, t, found = torch.randn(4, 2, dtype=torch.float64), TIMES.flip(0) if reverse else TIMES, []
    for module_of in (private, real_private):
        table = {"watching": watching(module_of)}
        _, func, y, times, rtol, atol, _, options, _, _ = module_of("misc")._check_inputs(
            growth, y0, t, 1e-6, 1e-8, "watching", None, None, table
        )
        solver = table["watching"](func, y, rtol, atol, **options)
        # A rejected step of torchdiffeq's is a step that ends where it began.
        found.append(
            (solver.integrate(times), sorted({round(end, 9) for end in solver.ends} - {times[0].item()}))
        )
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-9)
    assert len(found[0][1]) > 2 and found[0][1] == pytest.approx(found[1][1], abs=1e-8)


def test_gradients_of_an_adaptive_subclass_are_torchdiffeqs(private):
    """Of the state, the parameters and every time. The first step is given: torchdiffeq differentiates its choice."""
    found = []
    for module_of in (private, real_private):
        net = Net(dtype=torch.float64)
        y0, t = torch.ones(3, 2, dtype=torch.float64, requires_grad=True), TIMES.clone().requires_grad_()
        table = {"watching": watching(module_of)}
        options = {"first_step": double(0.1)}
        ys = call_of(module_of("misc"), table, net, y0, t, "watching", options, rtol=1e-6, atol=1e-6)
        found.append(torch.autograd.grad((ys**3).sum(), [y0, t, *net.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_a_tableau_of_the_users_own_may_be_rounded(layer, private, solvers):
    """Kutta's third-order rule with Euler's in it, in six digits."""
    rk = private("rk_common")

    class Third(rk.RKAdaptiveStepsizeODESolver):
        order = 3
        tableau = rk._ButcherTableau(
            alpha=double([0.333333, 0.666667, 1.0]),
            beta=[double([0.333333]), double([0.0, 0.666667]), double([0.25, 0.0, 0.75])],
            c_sol=double([0.25, 0.0, 0.75, 0.0]),
            c_error=double([-0.25, 0.5, 0.0, -0.25]),
        )
        mid = double([0.25, 0.125, 0.125, 0.0])

    solvers["third"] = Third
    y0 = torch.ones(2, dtype=torch.float64)
    found = layer.odeint(growth, y0, TIMES, method="third", rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[-1], torch.exp(torch.sin(TIMES[-1])) * y0, rtol=1e-4, atol=1e-4)


def test_a_step_that_a_program_replaces_is_the_one_that_is_taken(layer, private, monkeypatch):
    cls, taken = private("dopri5").Dopri5Solver, []
    step = cls._adaptive_step
    y0 = torch.ones(2, dtype=torch.float64)
    before = layer.odeint(growth, y0, TIMES)

    def watched(self, rk_state):
        state = step(self, rk_state)
        taken.append(float(state.dt))
        return state

    monkeypatch.setattr(cls, "_adaptive_step", watched)
    torch.testing.assert_close(layer.odeint(growth, y0, TIMES), before, rtol=1e-5, atol=1e-5)
    assert len(taken) > 3


def test_a_step_that_cannot_be_taken_is_a_solve_error(private):
    solver = private("dopri5").Dopri5Solver(lambda t, y: y**2, torch.ones(1, dtype=torch.float64), 1e-6, 1e-8)
    with pytest.raises(flashode.SolveError, match="underflow in dt|non-finite"):
        solver.integrate(double([0.0, 2.0]))


def test_an_adaptive_subclass_finds_events(private):
    solver = private("bosh3").Bosh3Solver(growth, torch.ones(1, dtype=torch.float64), 1e-9, 1e-10)
    event_t, ys = solver.integrate_until_event(double(0.0), lambda t, y: y.sum() - 2)
    assert torch.sin(event_t).item() == pytest.approx(torch.log(double(2.0)).item(), abs=1e-7)
    assert ys.shape == (2, 1) and ys[-1].item() == pytest.approx(2, abs=1e-7)


# ---- functions -------------------------------------------------------------------------------


def both(private, module, name, *args, **kwargs):
    return [getattr(m(module), name)(*args, **kwargs) for m in (private, real_private)]


@pytest.mark.parametrize("shape", [(1,), (33,), (4, 3)])
def test_private_functions_return_what_torchdiffeqs_return(private, shape):
    x, y, f0, f1, mid = (torch.randn(shape, dtype=torch.float64) for _ in range(5))
    t0, dt, t1, t = double(0.3), double(0.2), double(0.5), double(0.37)
    rms, tiny = real_private("misc")._rms_norm, 1e-300
    calls = [
        ("misc", "_rms_norm", x), ("misc", "_linf_norm", x), ("misc", "_mixed_norm", (x, 3 * y)),
        ("misc", "_zero_norm", x), ("misc", "_mixed_norm", ()),
        ("misc", "_select_initial_step", growth, t0, x, 4, 1e-3, 1e-6, rms),
        ("misc", "_select_initial_step", growth, t0, x, 2, 1e-3, 1e-6, rms, f0),
        ("misc", "_compute_error_ratio", x, 1e-3, 1e-6, y, f0, rms),
        *(("misc", "_optimal_step_size", dt, double(r), double(0.9), double(10.0), double(0.2), 5)
          for r in (0.0, tiny, 0.5, 1.5, 1e9)),
        ("misc", "_nextafter", t0, t1), ("misc", "_decreasing", -TIMES),
        ("misc", "_tuple_tol", "rtol", (1e-3, 1e-4), [torch.Size([2]), torch.Size([])]),
        ("misc", "_tuple_tol", "rtol", 1e-3, [torch.Size([2])]),
        ("misc", "_flat_to_shape", torch.arange(14.0).reshape(2, 7), (2,), [torch.Size([2, 3]), torch.Size([])]),
        ("interp", "_interp_fit", x, y, mid, f0, f1, dt),
        ("interp", "_interp_evaluate", [x, y, mid, f0, f1], t0, t1, t),
        ("event_handling", "find_event", lambda t: x + t, double(-1.0), t0, t1, lambda t, y: t - 0.4, 1e-9),
        ("fixed_adams", "_dot_product", [1.0, 2.0], [x, y]),
    ]  # fmt: skip
    field = real_private("misc")._PerturbFunc(growth)
    ours = private("misc")._PerturbFunc(growth)
    calls += [("rk_common", name, field, t0, dt, t1, x) for name in ("rk4_step_func", "rk4_alt_step_func")]
    two, three = [[0, 0, 0], [1, 1, 0], [0, 0.5, 0.5]], [[0, 0, 0, 0], [0.5, 0.5, 0, 0], [1, -1, 2, 0]]
    calls.append(("rk_common", "rk2_step_func", field, t0, dt, t1, x, two))
    calls.append(("rk_common", "rk3_step_func", field, t0, dt, t1, x, [*three, [0, 1 / 6, 2 / 3, 1 / 6]], f0))
    for module, name, *args in calls:
        expected = getattr(real_private(module), name)(*args)
        found = getattr(private(module), name)(*[ours if a is field else a for a in args])
        torch.testing.assert_close(
            found, expected, rtol=1e-12, atol=1e-9 if name == "find_event" else 1e-13,
            msg=lambda m: f"{name}: {m}",
        )  # fmt: skip


def test_a_step_of_a_tableau_is_torchdiffeqs(private):
    x = torch.randn(3, 2, dtype=torch.float64)
    found = []
    for module_of in (private, real_private):
        func = module_of("misc")._PerturbFunc(growth)
        table = module_of("dopri5")._DORMAND_PRINCE_SHAMPINE_TABLEAU
        step = module_of("rk_common")._runge_kutta_step
        found.append(step(func, x, func(double(0.3), x), double(0.3), double(0.2), double(0.5), table))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-13)


def test_tableaus_are_torchdiffeqs(private):
    for module, name in (
        ("dopri5", "_DORMAND_PRINCE_SHAMPINE_TABLEAU"), ("dopri8", "_DOPRI8_TABLEAU"), ("bosh3", "_BOGACKI_SHAMPINE_TABLEAU"),
        ("adaptive_heun", "_ADAPTIVE_HEUN_TABLEAU"), ("fehlberg2", "_FEHLBERG2_TABLEAU"),
    ):  # fmt: skip
        found, expected = (getattr(m(module), name) for m in (private, real_private))
        # The sign of an error estimate is anyone's choice.
        errors = found.c_error.abs(), expected.c_error.abs()
        torch.testing.assert_close([*found[:3]], [*expected[:3]], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(*errors, rtol=1e-9, atol=1e-12)


def test_inputs_are_checked_as_flashode_checks_them(private):
    check, table = private("misc")._check_inputs, private("odeint").SOLVERS
    y0 = torch.ones(2)
    with pytest.raises(flashode.ArgumentError, match="must be strictly increasing or decreasing"):
        check(growth, y0, torch.tensor([0.0, 1.0, 1.0]), 1e-3, 1e-3, None, None, None, table)
    with pytest.raises(flashode.ArgumentTypeError, match="y0 must be"):
        check(growth, [y0], torch.tensor([0.0, 1.0]), 1e-3, 1e-3, None, None, None, table)
    with pytest.raises(ValueError, match="Invalid method"):
        check(growth, y0, torch.tensor([0.0, 1.0]), 1e-3, 1e-3, "dopri6", None, None, table)


# ---- the adjoint method ----------------------------------------------------------------------


@pytest.mark.parametrize("norm", [None, "seminorm", "own"])
@pytest.mark.parametrize("tupled", [False, True])
def test_the_options_of_the_backward_solve_are_in_view(layer, tupled, norm):
    """torchdiffeq's tests read them from the graph, and put a norm there."""
    spiral, seen = Spiral(dtype=torch.float64), []
    y0 = torch.ones(3, 2, dtype=torch.float64)
    func = (lambda t, y: (spiral(t, y[0]), -y[1])) if tupled else spiral
    options = {"norm": lambda parts: max(p.abs().max() for p in parts)} if norm == "own" else {"norm": norm}
    ys = layer.odeint_adjoint(
        func, (y0, y0[0]) if tupled else y0, TIMES, adjoint_params=tuple(spiral.parameters()),
        adjoint_options=options if norm else None,
    )  # fmt: skip
    node = (ys[0] if tupled else ys).grad_fn
    while not hasattr(node, "adjoint_options"):
        node = node.next_functions[0][0]
    shown = node.adjoint_options["norm"]

    def spy(parts):
        seen.append([tuple(p.shape) for p in parts])
        return shown(parts)

    node.adjoint_options["norm"] = spy
    (ys[0] if tupled else ys).sum().backward()
    flat = (8,) if tupled else (3, 2)
    assert seen and seen[0] == [(), flat, flat, (2, 2)]
    assert torch.isfinite(spiral.A.grad).all()


def test_parameters_are_found_as_torchdiffeq_finds_them(private):
    net = Net()
    assert [id(p) for p in private("adjoint").find_parameters(net)] == [id(p) for p in net.parameters()]


# ---- programs --------------------------------------------------------------------------------


def program(*args, folder=ROOT, timeout=300):
    command = [sys.executable, "-m", "flashode.compat", *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )


WORKER = """
import multiprocessing, sys
import torchdiffeq, beside

def who(x):
    return torchdiffeq.__flashode__, x

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.map(who, [7])[0], *sys.argv[1:], beside.NAME, __file__)
    raise SystemExit(3)
"""


def test_a_script_is_run_with_its_arguments_and_its_processes(tmp_path):
    (tmp_path / "script.py").write_text(WORKER)
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    done = program(tmp_path / "script.py", "-x", "y", folder=ROOT)
    expected = f"{flashode.__version__} 7 -x y beside {tmp_path / 'script.py'}\n"
    assert (done.returncode, done.stdout) == (3, expected), done.stderr


def test_a_module_and_a_line_of_code_are_run(tmp_path):
    code = "import sys, torchdiffeq; print(torchdiffeq.__flashode__, sys.argv, __name__)"
    (tmp_path / "mine.py").write_text(code)
    for args, argv in (
        (["-m", "mine", "1"], [str(tmp_path / "mine.py"), "1"]),
        (["-c", code, "-m", "2"], ["-c", "-m", "2"]),
    ):
        done = program(*args, folder=tmp_path)
        assert done.stdout == f"{flashode.__version__} {argv} __main__\n", done.stderr


@pytest.mark.parametrize(("args", "code"), [([], 2), (["-m"], 2), (["--help"], 0)])
def test_usage(capsys, monkeypatch, args, code):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("flashode.compat.__main__").main(args)
    assert stop.value.code == code and "usage: python -m flashode.compat" in "".join(capsys.readouterr())


def test_the_example_runs_unchanged():
    done = program(ROOT / "examples" / "unchanged.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"torchdiffeq is flashode {flashode.__version__}\n")
    assert "loss on 1,000 other points: 3." in done.stdout


def test_torchdiffeqs_own_tests_pass(request):
    folder = request.config.getoption("--torchdiffeq-tests")
    if folder is None:
        pytest.skip("needs --torchdiffeq-tests DIR, the tests folder of a checkout of torchdiffeq")
    done = program("run_all.py", folder=Path(folder).resolve(), timeout=3600)
    failed = set(re.findall(r"^(?:FAIL|ERROR): (\w+)", done.stderr, re.M))
    assert re.search(r"^Ran \d+ tests", done.stderr, re.M), done.stderr[-5000:]
    # Both fail there too: SciPy's LSODA of today takes as many steps with a min_step as without, and no
    # gradient flows through SciPy's solvers, which one subtest of torchdiffeq's gradcheck asks for.
    assert failed <= {"test_min_max_step", "test_odeint"}, done.stderr[-20_000:]
    of_scipy = re.findall(r"^(?:FAIL|ERROR): test_odeint \(gradient_tests.*", done.stderr, re.M)
    assert all("scipy_solver" in line for line in of_scipy) and not re.search(
        r"^(?:FAIL|ERROR): test_odeint \((?!gradient_tests)", done.stderr, re.M
    ), done.stderr[-20_000:]


# ---- packages --------------------------------------------------------------------------------

pytest_ignored = pytest.mark.filterwarnings("ignore")  # theirs


@pytest_ignored
@pytest.mark.parametrize("kwargs", [
    dict(method="dopri5", options={"jump_t": True}),
    dict(method="rk4", options={"step_size": 0.25}),
    dict(method="dopri5", adjoint_options={"norm": "seminorm"}),
    dict(method="dopri5", adjoint_options={"norm": lambda parts: max(p.abs().max() for p in parts)}),
    dict(adjoint=False, method="bosh3"),
    dict(adjoint_method="rk4", adjoint_options={"step_size": 0.1}),
])  # fmt: skip
def test_torchcde_gives_the_values_and_gradients_that_torchdiffeq_gives(layer, kwargs):
    pytest.importorskip("torchcde", reason="torchcde is not installed")
    results = []
    for served in (True, False):
        with contextlib.nullcontext() if served else uninstalled(), imported_anew("torchcde") as torchcde:
            assert hasattr(torchcde.solver.torchdiffeq, "__flashode__") == served
            torch.manual_seed(1)
            x = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
            linear = "jump_t" in kwargs.get("options", {})
            control = (
                torchcde.LinearInterpolation(torchcde.linear_interpolation_coeffs(x))
                if linear
                else torchcde.CubicSpline(torchcde.hermite_cubic_coefficients_with_backward_differences(x))
            )
            if linear:
                kwargs = {**kwargs, "options": {"jump_t": control.grid_points.double()}}
            net = torch.nn.Sequential(
                torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Unflatten(-1, (4, 2))
            ).double()
            with torch.no_grad():
                for p in net.parameters():
                    p.mul_(0.5)

            class Field(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    self.net = net

                def forward(self, t, z):
                    return self.net(z)

            z0 = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
            t = control.interval.double()
            extra = {} if kwargs.get("adjoint") is False else {"adjoint_params": (*net.parameters(), x)}
            z = torchcde.cdeint(control, Field(), z0, t, rtol=1e-6, atol=1e-8, **extra, **kwargs)
            results.append([z, *torch.autograd.grad(z[:, -1].square().sum(), [z0, x, *net.parameters()])])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item())


@pytest_ignored
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun3", "dopri5"])
def test_flow_matching_gives_the_samples_and_likelihoods_that_torchdiffeq_gives(layer, method):
    pytest.importorskip("flow_matching.solver", reason="flow_matching is not installed")
    results = []
    for served in (True, False):
        with contextlib.nullcontext() if served else uninstalled(), imported_anew("flow_matching") as _:
            solver = importlib.import_module("flow_matching.solver")
            wrapper = importlib.import_module("flow_matching.utils").ModelWrapper
            net = Net()

            class Velocity(wrapper):
                def forward(self, x, t, **extras):
                    return self.model(t, x)

            ode = solver.ODESolver(velocity_model=Velocity(net))
            assert ("flashode" in solver.ode_solver.odeint.__code__.co_filename) == served
            x = torch.linspace(-1, 1, 10).reshape(5, 2).requires_grad_()
            step_size = None if method == "dopri5" else 0.05
            sample = ode.sample(x_init=x, step_size=step_size, method=method, enable_grad=True)
            gradient = torch.autograd.grad(sample.square().sum(), x)[0]
            likelihood = ode.compute_likelihood(
                x_1=x, log_p0=lambda z: -z.square().sum(1) / 2, step_size=step_size, method=method,
                exact_divergence=True,
            )  # fmt: skip
            results.append([sample, gradient, *likelihood])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)

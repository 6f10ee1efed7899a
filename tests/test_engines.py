"""Every engine against the reference: the same steps, then the same values; nothing of the user's touched."""

import pytest
import torch
from problems import EXPLICIT, Counted, Net, Spiral, detest, growth, growth_solution, twisted, twisted_start

import flashode

ADAPTIVE = [name for name, m in EXPLICIT.items() if m.adaptive]
FIXED = [name for name, m in EXPLICIT.items() if not m.adaptive]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BACKWARD = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


def both(field, y0, t, **arguments):
    """The same solve on both engines, with the calls that each made."""
    result = []
    for engine in ("reference", "native"):
        counted = Counted(field)
        with torch.no_grad():
            solution = flashode.solve(counted, y0, t, engine=engine, **arguments)
        result.append((solution, counted))
    return result


def assert_same_steps(reference, native):
    (a, f), (b, g) = reference, native
    assert (a.stats.accepted, a.stats.rejected, a.stats.nfe) == (
        b.stats.accepted,
        b.stats.rejected,
        b.stats.nfe,
    )
    assert b.stats.nfe == g.nfe == f.nfe
    torch.testing.assert_close(
        torch.tensor(f.times), torch.tensor(g.times), rtol=1e-9, atol=1e-9 * max(map(abs, f.times))
    )


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("name", ["A3", "B1", "C3", "D3", "E2", "E4"])
def test_adaptive_methods_take_the_same_steps(method, name, native, device):
    problem = detest()[name]
    t = torch.linspace(0, 20 if method != "adaptive_heun" else 5, 9, dtype=torch.float64)
    reference, compiled = both(problem.field(), problem.y0.to(device), t, method=method, rtol=1e-5, atol=1e-7)
    assert_same_steps(reference, compiled)
    torch.testing.assert_close(compiled[0].ys, reference[0].ys, rtol=1e-9, atol=1e-11)


@BACKWARD
@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:.*cannot meet these tolerances")
def test_adaptive_methods_agree_in_every_dtype_and_direction(method, dtype, backward, native, device):
    y0 = torch.linspace(0.5, 2, 33, dtype=torch.float64).reshape(3, 11).to(device, dtype)
    t = torch.linspace(0, 2, 5, dtype=torch.float64)
    t = t.flip(0) if backward else t
    eps = torch.finfo(dtype).eps
    short = dtype in DTYPES[2:]
    tol = 4 * eps if short else max(100 * eps, 1e-9 if EXPLICIT[method].order >= 5 else 1e-6)
    a, b = (s.ys for s, _ in both(growth, y0, t, method=method, rtol=tol, atol=tol))
    # Step sizes follow from sums, which the engines round differently.
    torch.testing.assert_close(b, a, rtol=max(8 * eps, 1e-12), atol=max(8 * eps, 1e-12))
    if short and method == "fehlberg2":
        return  # its error estimate, 1/512 of a difference of slopes, is lost in their rounding
    exact = growth_solution(t[:, None, None]) / growth_solution(t[0]) * y0.cpu().double()
    tolerance = 0.15 if short else 1e-2 if method == "fehlberg2" else 1e-3
    torch.testing.assert_close(b.cpu().double(), exact, rtol=tolerance, atol=tolerance)


@BACKWARD
@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fixed_steps_agree_to_the_bit(method, dtype, interp, backward, native, device):
    """No sum over the state enters a fixed-step solve, so that not even a rounding may differ."""
    y0 = torch.linspace(0.5, 2, 33, dtype=torch.float64).to(device, dtype)
    t = torch.tensor([0.0, 0.3, 0.5, 1.3], dtype=torch.float64)
    t = -t if backward else t
    options = {"step_size": 0.25, "interp": interp, "perturb": True}
    reference, compiled = both(growth, y0, t, method=method, options=options)
    assert_same_steps(reference, compiled)
    a, b = reference[0].ys, compiled[0].ys
    exact_rows = [0, 2, 3]  # between steps, positions are rounded in another order
    if dtype == torch.float64:
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
        exact_rows = [0, 3]
    else:
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=2 * eps, atol=2 * eps)
    assert torch.equal(a[exact_rows], b[exact_rows])


@pytest.mark.parametrize("shape", [(), (0,), (1,), (31,), (33,), (2, 3, 5), (1, 0, 4)], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_states_of_any_shape(shape, method, engine, device):
    y0 = torch.ones(shape, dtype=torch.float64, device=device)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    ys = flashode.odeint(growth, y0, t, method=method, engine=engine)
    assert ys.shape == (11, *shape)
    expected = growth_solution(t).reshape(11, *(1 for _ in shape)).expand(11, *shape)
    torch.testing.assert_close(ys.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [1_000_001, 3_000_000])
def test_large_states_do_not_depend_on_the_number_of_threads(n, native):
    """Sums are taken in fixed chunks: bitwise equal with one thread and two."""
    y0 = torch.rand(n) + 0.5
    t = torch.tensor([0.0, 0.5, 1.0])
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            solution = flashode.solve(lambda t, y: -y * y, y0, t, rtol=1e-4, atol=1e-4, engine=native)
            results.append((solution.stats.accepted_times, solution.ys))
    finally:
        torch.set_num_threads(threads)
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][1][-1], y0 / (1 + y0), rtol=1e-3, atol=1e-3)


def test_strided_and_expanded_states_equal_contiguous_ones(engine, device):
    base = torch.rand(4, 6, dtype=torch.float64, device=device) + 0.5
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    for y0 in (base.t(), base[:, ::2], base[:1].expand(5, 6)):
        ys = flashode.odeint(growth, y0, t, engine=engine)
        assert torch.equal(ys, flashode.odeint(growth, y0.contiguous(), t, engine=engine))


@pytest.mark.parametrize("method", ["dopri5", "rk4", "dopri8"])
def test_a_tuple_state_is_its_members_side_by_side(method, engine, device):
    """One flat solve with a norm per member; each member comes back in its own shape."""

    def field(t, state):
        a, b, c = state
        return [-a, (b * a.sum()).cos(), c * torch.cos(t)]

    y0 = (
        torch.rand(3, dtype=torch.float64, device=device),
        torch.rand(2, 2, dtype=torch.float64, device=device),
        torch.tensor(1.0, dtype=torch.float64, device=device),
    )
    t = torch.linspace(0, 2, 5, dtype=torch.float64)
    ys = flashode.odeint(
        field, y0, t, method=method, engine=engine, options={"step_size": 0.01} if method == "rk4" else None
    )
    assert [y.shape for y in ys] == [(5, 3), (5, 2, 2), (5,)]
    torch.testing.assert_close(ys[0][-1], y0[0] * torch.exp(-t[-1]), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ys[2].cpu(), growth_solution(t), rtol=1e-6, atol=1e-8)


# ---- what belongs to the user --------------------------------------------------------------


def kept_by(keep):
    """A field that keeps something of every y and t it is shown, and what those were worth."""
    kept = []

    def field(t, y):
        kept.append((keep(y), y.clone(), keep(t), t.clone()))
        return -y * torch.cos(t)

    return field, kept


@pytest.mark.parametrize(
    "keep",
    [
        lambda x: x,
        lambda x: x.view(-1),
        lambda x: x.detach(),
        lambda x: torch.from_numpy(x.numpy()),
        lambda x: torch.tensor([], dtype=x.dtype).set_(x.untyped_storage(), 0, (1,)),
        lambda x: x.reshape(-1)[:1].view(1, 1),
    ],
    ids=["tensor", "view", "detached", "numpy", "storage", "view of a view"],
)
@pytest.mark.parametrize("method", ["dopri5", "rk4", "adaptive_heun"])
def test_tensors_shown_to_the_field_are_never_written_again(keep, method, engine):
    field, kept = kept_by(keep)
    y0, t = torch.rand(3), torch.linspace(0, 3, 20)
    with torch.no_grad():
        ys = flashode.odeint(field, y0, t, method=method, rtol=1e-4, atol=1e-4, engine=engine)
        clean = flashode.odeint(
            lambda t, y: -y * torch.cos(t), y0, t, method=method, rtol=1e-4, atol=1e-4, engine=engine
        )
    assert torch.equal(ys, clean)
    for kept_y, y, kept_t, t_seen in kept:
        assert torch.equal(kept_y.reshape(-1), y[: kept_y.numel()])
        assert torch.equal(kept_t.reshape(()), t_seen)


def test_members_shown_to_the_field_are_never_written_again(engine):
    kept = []

    def field(t, state):
        kept.append((state[1], state[1].clone()))
        return tuple(-y for y in state)

    flashode.odeint(field, (torch.rand(3), torch.rand(2)), torch.linspace(0, 3, 20), engine=engine)
    assert all(torch.equal(a, b) for a, b in kept)


def test_a_field_may_ask_for_gradients_of_what_it_is_shown(engine):
    """As fields with a divergence or an energy in them do; the flag must not outlive the call."""
    seen = []

    def field(t, y):
        seen.append(y.requires_grad)
        with torch.enable_grad():
            y.requires_grad_()
            return torch.autograd.grad((-(y**2) / 2).sum(), y)[0]

    with torch.no_grad():
        ys = flashode.odeint(field, torch.ones(2), torch.tensor([0.0, 1.0]), engine=engine)
    assert not any(seen)
    torch.testing.assert_close(ys[-1], torch.full((2,), -1.0).exp())


@pytest.mark.parametrize("method", ["dopri5", "rk4", "fehlberg2"])
def test_what_the_field_returns_is_consumed_at_once(method, engine):
    """One buffer for every slope, its own argument, a view of a buffer: all as good as fresh ones."""
    y0, t = torch.rand(4, dtype=torch.float64), torch.linspace(0, 1, 7, dtype=torch.float64)
    buffer, wide = torch.empty(4, dtype=torch.float64), torch.empty(8, dtype=torch.float64)
    fields = {
        "fresh": lambda t, y: y * 1,
        "argument": lambda t, y: y,
        "buffer": lambda t, y: torch.mul(y, 1, out=buffer),
        "view": lambda t, y: torch.mul(y, 1, out=wide[4:]),
        "expanded": lambda t, y: (y * 1)[None][0],
    }
    with torch.no_grad():
        results = {k: flashode.odeint(f, y0, t, method=method, engine=engine) for k, f in fields.items()}
    for name, ys in results.items():
        assert torch.equal(ys, results["fresh"]), name


def test_lazily_negated_and_strided_slopes_are_read_right(engine):
    """A tensor whose negation is only a flag, or whose strides are not the state's."""
    z = torch.complex(torch.zeros(3, 2), torch.ones(3, 2))
    y0, t = torch.ones(3, 2), torch.tensor([0.0, 1.0])
    lazy = flashode.odeint(lambda t, y: (z * y).conj().imag, y0, t, engine=engine)
    torch.testing.assert_close(lazy[-1], torch.full((3, 2), -1.0).exp())
    strided = flashode.odeint(lambda t, y: (-y.t().contiguous()).t(), y0, t, engine=engine)
    torch.testing.assert_close(strided[-1], torch.full((3, 2), -1.0).exp())


def test_slopes_saved_for_a_backward_pass_inside_the_field_stay_intact(engine):
    """Graphs built by the field while the solver reuses memory."""
    graphs = []

    def field(t, y):
        with torch.enable_grad():
            x = y.detach().requires_grad_()
            value = (x * y).sum()
            graphs.append((value, x, y.clone()))
        return -y

    with torch.no_grad():
        flashode.odeint(field, torch.rand(3), torch.linspace(0, 2, 5), engine=engine)
    for value, x, y in graphs:
        assert torch.equal(torch.autograd.grad(value, x)[0], y)


def test_nested_solves(engine):
    """A field that solves another problem for each of its values."""

    def field(t, y):
        inner = flashode.odeint(lambda s, z: -z, y, torch.tensor([0.0, 1.0], dtype=y.dtype), engine=engine)
        return inner[-1]

    y0, t = torch.ones(2, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    ys = flashode.odeint(field, y0, t, rtol=1e-8, atol=1e-10, engine=engine)
    torch.testing.assert_close(ys[-1], y0 * torch.exp(torch.exp(torch.tensor(-1.0, dtype=torch.float64))))


def test_solves_in_threads_equal_serial_ones(native):
    from concurrent.futures import ThreadPoolExecutor

    net, t = Net(dtype=torch.float64), torch.linspace(0, 2, 5, dtype=torch.float64)
    starts = [torch.rand(5, 2, dtype=torch.float64) for _ in range(16)]

    def one(y0):
        with torch.no_grad():
            return flashode.odeint(net, y0, t, engine=native)

    serial = [one(y0) for y0 in starts]
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(a, b) for a, b in zip(serial, pool.map(one, starts)))


def test_the_same_call_twice_gives_the_same_bits(engine, device):
    field, y0 = Spiral().to(device), torch.tensor([[2.0, 0.0]], device=device)
    t = torch.linspace(0, 5, 100)
    with torch.no_grad():
        assert torch.equal(*(flashode.odeint(field, y0, t, engine=engine) for _ in range(2)))


def test_more_outputs_change_no_bit_of_the_others(engine, device):
    y0 = twisted_start(dtype=torch.float64, device=device)
    few = torch.tensor([0.0, 0.5, 1.5], dtype=torch.float64)
    many = torch.unique(torch.cat([few, torch.linspace(0, 1.5, 97, dtype=torch.float64)]))
    for method in ("dopri5", "dopri8"):
        a = flashode.odeint(twisted, y0, few, method=method, engine=engine)
        b = flashode.odeint(twisted, y0, many, method=method, engine=engine)
        assert torch.equal(a[-1], b[-1])
        torch.testing.assert_close(a[1], b[many.tolist().index(0.5)], rtol=1e-15, atol=1e-15)

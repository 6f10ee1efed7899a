"""The gradient of a solve by a program: that of the reference engine, taken from recorded steps."""

import pytest
import torch
from programs import Program

import flashode

F64 = torch.float64


# ---- fields, in C++ and in torch --------------------------------------------------------------

# van der Pol's; mu is what samples share, or each has its own, and a factor of its own is there anyhow.
OSCILLATOR = """
struct Field {
  using Real = REAL;
  static constexpr int lanes = LANES, width = 2, own = 1, prepared = 1, kept = 1, scratch = 0;
  static constexpr int lane_sums = 1, sums = 0;
  static constexpr bool timed = false;
  static void prepare(const Real* const* inputs, Real* prepared) { *prepared = *inputs[0]; }
  template <class V, class Time>
  static void slope(const Real* mu, const V* own, Time, const V* y, V* f, V*) {
    f[0] = own[0] * y[1];
    f[1] = *mu * (Real(1) - y[0] * y[0]) * y[1] - y[0];
  }
  template <class V, class Time>
  static void slope_keeping(const Real* mu, const V* own, Time, const V* y, V* f, V* kept, V*) {
    kept[0] = (Real(1) - y[0] * y[0]) * y[1];
    f[0] = own[0] * y[1];
    f[1] = *mu * kept[0] - y[0];
  }
  template <class V, class Time>
  static void pull_back(const Real* mu, const V* own, Time, const V* y, const V* kept, const V* adj,
                        V* adj_y, V*, V* adj_own, V* lane_sums, Real*, V*) {
    adj_y[0] = -(adj[1] * (Real(2) * *mu * y[0] * y[1] + Real(1)));
    adj_y[1] = adj[0] * own[0] + adj[1] * *mu * (Real(1) - y[0] * y[0]);
    adj_own[0] = adj_own[0] + adj[0] * y[1];
    lane_sums[0] = lane_sums[0] + adj[1] * kept[0];
  }
  static void finish(const Real*, const Real* lane_sums, const Real*, Real* const* gradients) {
    if (gradients[0]) *gradients[0] += lane_sums[0];
  }
};
"""


def oscillator(y0, mu, own):
    def func(t, y):
        x, v = y[..., 0], y[..., 1]
        return torch.stack([own * v, mu * (1 - x * x) * v - x], -1)

    return func


# A field that looks at the time, and jumps at 0.5.
DRIVEN = """
struct Field {
  using Real = REAL;
  static constexpr int lanes = LANES, width = 2, own = 0, prepared = 1, kept = 3, scratch = 0;
  static constexpr int lane_sums = 1, sums = 0;
  static constexpr bool timed = true;
  static void prepare(const Real* const* inputs, Real* prepared) { *prepared = *inputs[0]; }
  template <class V, class Time>
  static void slope(const Real* p, const V* own, Time t, const V* y, V* f, V* scratch) {
    V kept[3];
    slope_keeping(p, own, t, y, f, kept, scratch);
  }
  template <class V, class Time>
  static void slope_keeping(const Real* p, const V*, Time t, const V* y, V* f, V* kept, V*) {
    const V time = t + zero<V>();
    const V phase = *p * time * y[1];
    kept[0] = cos(phase);
    kept[1] = sin(phase);
    kept[2] = select(time < Real(0.5), splat<V>(1), splat<V>(-2));
    f[0] = kept[0] - y[0];
    f[1] = kept[2] * time * y[0];
  }
  template <class V, class Time>
  static void pull_back(const Real* p, const V*, Time t, const V* y, const V* kept, const V* adj,
                        V* adj_y, V* adj_t, V*, V* lane_sums, Real*, V*) {
    const V time = t + zero<V>();
    const V adj_phase = -(adj[0] * kept[1]);
    adj_y[0] = adj[1] * kept[2] * time - adj[0];
    adj_y[1] = adj_phase * *p * time;
    adj_t[0] = adj_phase * *p * y[1] + adj[1] * kept[2] * y[0];
    lane_sums[0] = lane_sums[0] + adj_phase * time * y[1];
  }
  static void finish(const Real*, const Real* lane_sums, const Real*, Real* const* gradients) {
    if (gradients[0]) *gradients[0] += lane_sums[0];
  }
};
"""


def driven(y0, p):
    def func(t, y):
        x, v = y[..., 0], y[..., 1]
        t = t.squeeze(-1) if t.ndim else t
        return torch.stack([torch.cos(p * t * v) - x, torch.where(t < 0.5, 1.0, -2.0) * t * x], -1)

    return func


# A matrix that all samples share.
LINEAR = """
struct Field {
  using Real = REAL;
  static constexpr int lanes = LANES, width = 3, own = 0, prepared = 9, kept = 0, scratch = 0;
  static constexpr int lane_sums = 0, sums = 9;
  static constexpr bool timed = false;
  static void prepare(const Real* const* inputs, Real* prepared) {
    for (int i = 0; i < 9; ++i) prepared[i] = inputs[0][i];
  }
  template <class V, class Time>
  static void slope(const Real* w, const V*, Time, const V* y, V* f, V*) { product<3, 3>(w, 3, 1, y, f); }
  template <class V, class Time>
  static void slope_keeping(const Real* w, const V*, Time, const V* y, V* f, V*, V*) {
    product<3, 3>(w, 3, 1, y, f);
  }
  template <class V, class Time>
  static void pull_back(const Real* w, const V*, Time, const V* y, const V*, const V* adj, V* adj_y, V*,
                        V*, V*, Real* sums, V*) {
    product<3, 3>(w, 1, 3, adj, adj_y);
    outer<3, 3>(adj, y, sums, 3, 1);
  }
  static void finish(const Real*, const Real*, const Real* sums, Real* const* gradients) {
    for (int i = 0; i < 9 && gradients[0]; ++i) gradients[0][i] += sums[i];
  }
};
"""


def linear(y0, w):
    return lambda t, y: y @ w.T


def numbers(*shape, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def problem(name, samples, dtype=F64):
    """The field in C++, in torch, the state, and what the field reads: shared, and of each sample."""
    if name == "oscillator":
        shared, own = [torch.tensor(0.8, dtype=dtype)], [1 + 0.1 * numbers(samples, seed=1, dtype=dtype)]
        return OSCILLATOR, oscillator, numbers(samples, 2, dtype=dtype) / 4, shared, own
    if name == "driven":
        return DRIVEN, driven, numbers(samples, 2, dtype=dtype), [torch.tensor(1.7, dtype=dtype)], []
    return LINEAR, linear, numbers(samples, 3, dtype=dtype), [numbers(3, 3, seed=2, dtype=dtype)], []


JUMPS = {"jump_t": torch.tensor([0.5], dtype=F64)}


def times(direction=1, rows=5):
    t = torch.linspace(0.1, 1.3, rows, dtype=F64) ** 1.1
    return t if direction > 0 else t.flip(0)


# ---- claims -----------------------------------------------------------------------------------


def gradients(name, t, *, samples=3, lanes=4, dtype=F64, needs_time=True, threads=1, **arguments):
    """By a program, and by the reference engine: to y0, t, and what the field reads."""
    text, make, y0, shared, own = problem(name, samples, dtype)
    text = text.replace("REAL", {F64: "double", torch.float32: "float"}[dtype]).replace("LANES", str(lanes))
    # No tighter: where the error of a step is rounding, so is the length of the next.
    arguments = {"rtol": 1e-4, "atol": 1e-5} | arguments
    leaves = [x.clone().requires_grad_() for x in (y0, t, *shared, *own)]
    reference = flashode.odeint(make(leaves[0], *leaves[2:]), *leaves[:2], engine="reference", **arguments)
    weights = torch.cos(torch.arange(reference.numel(), dtype=F64)).to(dtype).reshape(reference.shape)
    expected = torch.autograd.grad((reference * weights).sum(), leaves)
    solved = Program(text).solve(
        make(y0, *shared, *own), y0, t, inputs=shared, own=own, threads=threads, **arguments
    )
    adj_y0, grad_t, grad_grid, of_shared, of_own = solved.gradients(weights, needs_time)
    if solved.p.grid is not None and needs_time:
        t = t.clone().requires_grad_()
        p = type(solved.p).from_call(
            lambda t, y: y, y0, t, 0, 0, arguments["method"], arguments.get("options"), None
        )
        grad_t = grad_t + torch.autograd.grad(p.grid, t, grad_grid)[0]
    found = [adj_y0, grad_t, *of_shared, *of_own]
    if not needs_time:
        found[1] = expected[1]
    assert torch.equal(solved.status, torch.zeros_like(solved.status))
    return found, expected, (solved.ys, reference)


def assert_equal(found, expected, tolerance=1e-10):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max(), (a, b)


ADAPTIVE = ["dopri5", "dopri8", "bosh3", "tsit5"]
FIXED = ["euler", "midpoint", "rk4"]


@pytest.mark.parametrize("direction", [1, -1], ids=["forward", "backward"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_gradients_are_those_of_the_reference(method, direction):
    found, expected, (ys, reference) = gradients("driven", times(direction), method=method, options=JUMPS)
    assert_equal([ys], [reference])
    assert_equal(found, expected)


@pytest.mark.parametrize("direction", [1, -1], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "options", [{}, {"step_size": 0.07}, {"step_size": 0.07, "perturb": True, "interp": "cubic"}]
)
@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps(method, options, direction):
    found, expected, _ = gradients("driven", times(direction), method=method, options=options)
    assert_equal(found, expected)


@pytest.mark.parametrize("direction", [1, -1], ids=["forward", "backward"])
def test_perturbed_steps_see_their_side_of_a_jump(direction):
    t = torch.tensor([0.25, 0.5, 1.0], dtype=F64)
    t = t if direction > 0 else t.flip(0)
    found, expected, _ = gradients("driven", t, method="rk4", options={"perturb": True})
    assert_equal(found, expected)


@pytest.mark.parametrize("samples", [1, 3, 33])
@pytest.mark.parametrize("lanes", [1, 8])
def test_any_number_of_samples_and_lanes(samples, lanes):
    for name in ("linear", "oscillator"):
        found, expected, _ = gradients(name, times(), samples=samples, lanes=lanes)
        assert_equal(found, expected)


def test_states_of_many_numbers():
    found, expected, _ = gradients("linear", times(), samples=70, lanes=64)
    assert_equal(found, expected)


@pytest.mark.parametrize("name", ["linear", "oscillator", "driven"])
def test_single_precision(name):
    options = JUMPS if name == "driven" else {}
    found, expected, _ = gradients(name, times().float(), dtype=torch.float32, lanes=16, options=options)
    assert_equal(found, expected, 1e-4)


def test_threads_change_no_bit():
    one, _, _ = gradients("linear", times(rows=9), samples=203, lanes=8)
    for threads in (2, 3):
        more, _, _ = gradients("linear", times(rows=9), samples=203, lanes=8, threads=threads)
        assert all(torch.equal(a, b) for a, b in zip(one, more))


@pytest.mark.parametrize("overshoot", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "dopri8"])
def test_steps_past_the_last_time_and_gradients_without_time(method, overshoot):
    for needs_time in (True, False):
        found, expected, _ = gradients(
            "driven",
            times(rows=30),
            method=method,
            options={"overshoot": overshoot} | JUMPS,
            needs_time=needs_time,
        )
        assert_equal(found, expected)


def test_stops_do_not_move_and_steps_end_on_them():
    options = {"step_t": torch.tensor([0.4, 0.7], dtype=F64)} | JUMPS
    found, expected, _ = gradients("driven", times(rows=3), options=options)
    assert_equal(found, expected)


# ---- samples with clocks of their own ----------------------------------------------------------

BATCHED = {"batched": True}


def own_times(samples, direction, repeats=False):
    """Every other sample goes the other way; ends that repeat are outputs like others."""
    t = torch.stack([(1 + 0.3 * b / samples) * times(direction * (-1) ** b) for b in range(samples)])
    return torch.cat([t[:, :1], t, t[:, -1:]], 1) if repeats else t


@pytest.mark.parametrize("repeats", [False, True], ids=["", "repeats"])
@pytest.mark.parametrize("direction", [1, -1], ids=["forward", "backward"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_samples_with_clocks_of_their_own(method, direction, repeats):
    t = own_times(6, direction, repeats) / 4  # before the jump, which steps would not land on
    for needs_time in (True, False):
        found, expected, (ys, reference) = gradients(
            "driven", t, method=method, samples=6, options=BATCHED, needs_time=needs_time
        )
        assert_equal([ys], [reference])
        assert_equal(found, expected)


@pytest.mark.parametrize("samples", [1, 3, 33])
@pytest.mark.parametrize("lanes", [1, 8])
def test_any_number_of_clocks(samples, lanes):
    for name in ("linear", "oscillator"):
        found, expected, _ = gradients(name, times(rows=12), samples=samples, lanes=lanes, options=BATCHED)
        assert_equal(found, expected)


def test_a_sample_that_cannot_be_solved_leaves_the_others_alone():
    text, make, y0, shared, own = problem("oscillator", 6)
    lost = y0.clone()
    lost[2] = torch.nan
    t, program = times(), Program(text.replace("REAL", "double").replace("LANES", "4"))
    arguments = {"inputs": shared, "own": own, "rtol": 1e-4, "atol": 1e-5, "options": BATCHED}
    whole, part = (program.solve(make(y, *shared, *own), y, t, **arguments) for y in (y0, lost))
    assert part.status.tolist() == [0, 0, 4, 0, 0, 0]
    weights = torch.cos(torch.arange(whole.ys.numel(), dtype=F64)).reshape(whole.ys.shape)
    weights[:, 2] = 0  # what comes from a loss over the others
    ours, theirs = part.gradients(weights), whole.gradients(weights)
    assert_equal([ours[0], ours[1], *ours[3], *ours[4]], [theirs[0], theirs[1], *theirs[3], *theirs[4]])


# ---- single evaluations ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, BATCHED], ids=["one clock", "clocks of their own"])
def test_the_gradient_of_one_evaluation(options):
    text, make, y0, shared, _ = problem("driven", 11)
    text = text.replace("REAL", "double").replace("LANES", "4")
    t = own_times(11, 1).sort(1).values if options else times()
    solved = Program(text, backward="pull_back").solve(
        make(y0, *shared), y0, t, inputs=shared, options=options
    )
    adj = numbers(1, 11, 2, seed=5)
    found, grad_t, _, of_shared, _ = solved.gradients(adj)
    leaves = [x.clone().requires_grad_() for x in (y0, t, *shared)]
    slope = make(leaves[0], *leaves[2:])(leaves[1][..., 0], leaves[0])
    expected = torch.autograd.grad((slope * adj[0]).sum(), leaves)
    assert_equal([found, grad_t, *of_shared], expected, 1e-13)

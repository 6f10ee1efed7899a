"""flashode.check_gradients: it finds wrong gradients where they are wrong, and counts what they cost."""

import io
import re

import pytest
import torch
from problems import Counted, Net

import flashode
from flashode import check_gradients

F64 = torch.float64
MODES = ("direct", "backsolve")
INTERVAL = torch.tensor([0.0, 1.0], dtype=F64)


class VanDerPol(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mu = torch.nn.Parameter(torch.tensor(1.0, dtype=F64))

    def forward(self, t, y):
        a, b = y
        return torch.stack([b, self.mu * (1 - a * a) * b - a])


def relaxing(t, y, p):
    """Stiff: back in time, whatever is off grows like exp(50 t)."""
    return -50 * (y - p * torch.cos(t)) * (1 + y * y)


def last(ys):
    return ys[-1].sum()


def rows(report):
    return {row.mode: row for row in report.rows}


def test_van_der_pol_to_20_is_found_wrong_by_backsolve():
    """At default tolerances the cycle is left on the way back: (-6.4, 5.7) in place of (2.6, 0.96)."""
    y0, t = torch.tensor([2.0, 0.0], dtype=F64), torch.tensor([0.0, 20.0], dtype=F64)
    report = check_gradients(VanDerPol(), y0, t, loss=last, modes=(*MODES, "checkpoint", "interpolated"))
    for mode in ("direct", "checkpoint", "interpolated"):
        assert rows(report)[mode].error < 1e-5
    assert rows(report)["backsolve"].errors["y0"] > 1
    assert re.fullmatch(r"backsolve is wrong by [34]\.\d here: use adjoint='checkpoint'", report.verdict)
    least, *_, most = sorted(report.rows, key=lambda row: row.bytes)
    assert (least.mode, most.mode) == ("backsolve", "direct")


def test_a_stiff_scalar_is_right_by_checkpoint_and_its_backsolve_is_reported():
    """y' = -50 (y - cos t): torchdiffeq's adjoint has the wrong sign at 1e-3, or many times the size."""
    t, y0 = torch.tensor([0.0, 5.0], dtype=F64), torch.zeros(1, dtype=F64)

    def report(tol):
        rate = torch.tensor(50.0, dtype=F64, requires_grad=True)
        return check_gradients(
            lambda t, y, rate: -rate * (y - torch.cos(t)), y0, t, args=(rate,), rtol=tol, atol=tol, loss=last,
            modes=("direct", "checkpoint", "interpolated", "backsolve"),
        )  # fmt: skip

    loose = report(1e-3)
    assert rows(loose)["backsolve"].errors["params"] > 1e3
    assert rows(loose)["interpolated"].errors["params"] < 0.1
    assert loose.verdict.startswith("no mode is right here")  # the gradient to y0 is exp(-250)
    tight = report(1e-6)
    # The derivative itself is 0.000388.
    assert 0.000388 * rows(tight)["checkpoint"].errors["params"] < 1e-6
    off_direct = rows(tight)["direct"].errors["params"]
    assert rows(tight)["checkpoint"].errors["params"] == pytest.approx(off_direct, rel=1e-6)
    assert rows(tight)["backsolve"].errors["params"] > 10 * off_direct


def test_a_stiff_solve_that_cannot_go_back_is_told_so():
    p = torch.ones((), dtype=F64, requires_grad=True)
    y0 = torch.tensor([0.5], dtype=F64)
    report = check_gradients(relaxing, y0, INTERVAL, args=(p,), rtol=1e-3, atol=1e-6, modes=MODES)
    assert rows(report)["direct"].error < 0.01
    assert "underflow in dt" in rows(report)["backsolve"].failure
    assert report.verdict == "backsolve fails here: use odeint"
    assert "backsolve fails: in the backward solve, underflow in dt" in str(report)


def test_agreement_is_told_with_what_it_costs(capsys, engine):
    net = Net(dtype=F64)
    report = check_gradients(net, torch.ones(3, 2, dtype=F64), INTERVAL, modes=MODES, engine=engine)
    direct, backsolve = report.rows
    assert set(direct.errors) == set(backsolve.errors) == {"y0", "params"}
    assert max(direct.error, backsolve.error) < 1e-5
    assert (
        "all modes are right here" in report.verdict and "backsolve holds the least memory" in report.verdict
    )

    field = Counted(net)
    params = tuple(net.parameters())
    ys = flashode.odeint_adjoint(
        field, torch.ones(3, 2, dtype=F64), INTERVAL, adjoint_params=params, engine=engine
    )
    nfe = field.nfe
    torch.cos(torch.arange(12, dtype=F64)).mul(ys.reshape(-1)).sum().backward()
    assert (backsolve.nfe_forward, backsolve.nfe_backward) == (nfe, field.nfe - nfe)
    assert (direct.nfe_forward, direct.nfe_backward) == (nfe, 0)
    assert 0 < backsolve.seconds < 10 and 0 < backsolve.bytes < direct.bytes
    assert capsys.readouterr().out == f"{report}\n"


def test_bytes_are_those_of_the_saved_tensors():
    """Every call of this field saves its sine's argument, 8,000 bytes; what the caller holds is free."""
    y0, t = torch.ones(1000, dtype=F64), torch.linspace(0, 1, 11, dtype=F64)
    w = torch.ones(1000, dtype=F64, requires_grad=True)

    def bytes_of(field):
        report = check_gradients(
            field, y0, t, params=[w], method="euler", modes=("direct",), file=io.StringIO(), loss=last
        )
        return report.rows[0].bytes

    of_sines = bytes_of(lambda t, y: torch.sin(y + w)) - bytes_of(lambda t, y: y + w)
    assert of_sines == 10 * 8000


def test_times_are_compared_where_they_require_grad():
    t = torch.tensor([0.0, 0.3, 1.0], dtype=F64, requires_grad=True)
    report = check_gradients(Net(dtype=F64), torch.ones(1, 2, dtype=F64), t, modes=MODES)
    assert all(row.errors["t"] < 1e-5 for row in report.rows)
    assert "error t" in str(report)


def test_the_truth_is_in_double_precision_where_the_field_can_be():
    y0, t = torch.ones(2, 2), torch.tensor([0.0, 1.0])
    net = Net()
    report = check_gradients(net, y0, t, rtol=1e-4, atol=1e-5, modes=("direct",))
    assert report.truth == "direct gradients by dopri8 in float64 at rtol 1e-07, atol 1e-08"
    assert 0 < report.rows[0].error < 1e-3
    assert all(p.dtype == torch.float32 and p.grad is None for p in net.parameters())

    matrix = torch.eye(2)
    report = check_gradients(lambda t, y: y @ matrix, y0, t, rtol=1e-4, atol=1e-5, modes=("direct",))
    assert report.truth == "direct gradients by dopri8 in float32 at rtol 1e-05, atol 1e-05"
    assert report.rows[0].error < 1e-3


def test_tensors_of_args_and_members_of_tuples_are_compared():
    """Also results of other operations, which a copy of the field could not hold."""
    z = torch.nn.Linear(2, 2)(torch.ones(2))
    y0 = torch.ones(2), torch.zeros(())
    report = check_gradients(
        lambda t, y, p: (-y[0] * p["z"], y[0].sum()), y0, torch.tensor([0.0, 1.0]), args=({"z": z},),
        rtol=[1e-4, 1e-5], atol=1e-6, modes=MODES,
    )  # fmt: skip
    assert "float64 at rtol 1e-08 to 1e-07" in report.truth
    assert all(set(row.errors) == {"y0", "params"} and row.error < 1e-3 for row in report.rows)


def test_complex_states():
    y0 = torch.tensor([1 + 1j], dtype=torch.complex128)
    w = torch.tensor(0.3 + 1j, dtype=torch.complex128, requires_grad=True)
    report = check_gradients(lambda t, y: w * y, y0, INTERVAL, params=[w], modes=MODES)
    assert all(row.error < 1e-5 for row in report.rows)


def test_a_coarse_solve_is_blamed_on_its_steps():
    report = check_gradients(
        Net(dtype=F64), torch.ones(1, 2, dtype=F64), INTERVAL, method="euler", modes=MODES
    )
    assert report.verdict.startswith("no mode is right here; at best ")
    assert "step_size" in report.verdict


def test_a_gradient_that_has_died_away_does_not_count():
    """exp(-60) of it is left: none of its digits can be right, and nobody needs them."""
    p = torch.ones((), dtype=F64, requires_grad=True)
    report = check_gradients(
        lambda t, y: p * torch.cos(t) - 60 * y, torch.ones(1, dtype=F64), INTERVAL, params=[p], loss=last, modes=MODES
    )  # fmt: skip
    assert all(row.error < 1e-3 for row in report.rows)


def test_callbacks_of_the_field_are_called_still():
    class Watched(Net):
        steps = 0

        def callback_step(self, t0, y0, dt):
            type(self).steps += 1

    check_gradients(Watched(dtype=F64), torch.ones(1, 2, dtype=F64), INTERVAL, modes=("direct",))
    assert Watched.steps > 0


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"modes": ("direct", "bakcsolve")}, ValueError, "modes must be one or more of .* got .*bakcsolve"),
        ({"modes": ()}, ValueError, "modes must be one or more"),
        ({"modes": "direct"}, TypeError, "modes must be a tuple"),
        ({"loss": 3}, TypeError, "loss must be callable"),
        ({"loss": lambda ys: ys}, TypeError, "loss must return a real scalar Tensor, got a Tensor of shape"),
        ({"tight": 2}, ValueError, "tight must be a number between 0 and 1, got 2"),
        ({"rtol": -1}, ValueError, "rtol"),
        ({"params": [1]}, TypeError, "params"),
    ],
)
def test_bad_arguments_are_named(arguments, error, text):
    with pytest.raises(error, match=text):
        check_gradients(
            lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0]), **{"modes": MODES} | arguments
        )


def test_a_mode_without_a_graph_is_named():
    pytest.importorskip("scipy")
    y0, t = torch.ones(2, dtype=torch.float64, requires_grad=True), torch.tensor([0.0, 1.0])
    with (
        pytest.warns(flashode.GradientWarning),
        pytest.raises(ValueError, match="in mode 'direct' the loss has no graph"),
    ):
        check_gradients(lambda t, y: -y, y0, t, method="scipy_solver", modes=("direct", "backsolve"))
    report = check_gradients(
        lambda t, y: -y, y0, t, method="scipy_solver", modes=("backsolve",), file=io.StringIO()
    )
    assert report.verdict.startswith("backsolve is right")

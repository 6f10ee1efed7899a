"""``progress=True``: a bar on every entry point, that changes nothing else."""

import sys

import pytest
import torch
from problems import Counted, Net, growth

import flashode

pytest.importorskip("tqdm", reason="the bar is tqdm's")
T = torch.linspace(0, 2, 5, dtype=torch.float64)
ONE = torch.ones(1, dtype=torch.float64)


def bars(text):
    """What the bars said last, one line each."""
    return [line.split("\r")[-1].strip() for line in text.split("\n") if line.strip()]


@pytest.mark.parametrize("method, options", [("dopri5", {}), ("rk4", {"step_size": 0.1})])
@pytest.mark.parametrize("backward", [False, True])
def test_a_bar_ends_at_the_last_time_and_changes_nothing(method, options, backward, engine, capsys):
    t = T.flip(0) if backward else T
    arguments = dict(method=method, options=options, engine=engine)
    plain, shown = Counted(growth), Counted(growth)
    expected = flashode.odeint(plain, ONE, t, **arguments)
    torch.testing.assert_close(
        flashode.odeint(shown, ONE, t, progress=True, **arguments), expected, rtol=0, atol=0
    )
    assert shown.times == plain.times
    (bar,) = bars(capsys.readouterr().err)
    assert bar.startswith(f"{method} 100%") and f"t={0 if backward else 2}," in bar
    steps = flashode.solve(growth, ONE, t, **arguments).stats.accepted
    assert f"{steps} steps" in bar


def test_callbacks_of_the_caller_still_hear_of_every_step(engine):
    heard = {False: [], True: []}
    for progress in heard:
        field = Counted(growth)
        field.callback_accept_step = lambda t0, y0, dt, into=heard[progress]: into.append((t0.item(), y0, dt))
        flashode.odeint(field, ONE, T, engine=engine, progress=progress)
    assert heard[True] == heard[False] != []


@pytest.mark.parametrize("mode", ["backsolve", "checkpoint", "interpolated", "restart"])
def test_the_backward_pass_has_a_bar_of_its_own(mode, capsys, engine):
    field = Net(dtype=torch.float64)
    arguments = {"adjoint_options": {"restart": True}} if mode == "restart" else {"adjoint": mode}
    y = flashode.odeint_adjoint(
        field, torch.ones(3, 2, dtype=torch.float64), T, progress=True, engine=engine, **arguments
    )
    assert [bar.split("%")[0] for bar in bars(capsys.readouterr().err)] == ["dopri5 100"]
    y.sum().backward()
    (bar,) = bars(capsys.readouterr().err)
    assert bar.startswith(("dopri5 backward 100%", "dopri5 backward: 100%"))


def test_a_solve_until_an_event_shows_where_it_is(capsys):
    flashode.odeint(growth, ONE, T[:2], event_fn=lambda t, y: t - 1.5, progress=True)
    assert "steps" in capsys.readouterr().err


def test_a_failed_solve_leaves_the_bar_where_it_stood(engine, capsys):
    def field(t, y):
        return y if t < 1 else y * torch.nan

    with pytest.raises(flashode.SolveError):
        flashode.odeint(field, ONE, T, progress=True, engine=engine)
    (bar,) = bars(capsys.readouterr().err)
    assert "100%" not in bar and any(f"t={t}" in bar for t in ("0.9", "1,"))


def test_what_is_no_flag_is_refused():
    with pytest.raises(flashode.ArgumentTypeError, match="progress must be True or False, got int 1"):
        flashode.odeint(growth, ONE, T, progress=1)


def test_without_tqdm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(flashode.ArgumentError, match="progress=True needs tqdm: pip install tqdm"):
        flashode.odeint(growth, ONE, T, progress=True)

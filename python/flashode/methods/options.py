"""Every option by name: which methods take it, and what it means; README's table is made of this one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """``groups`` are the kinds of methods that take the option: ``"adaptive"`` or ``"fixed"`` steps, or a
    family of methods. ``meaning`` is a line for people, with units and the default."""

    groups: tuple[str, ...]
    meaning: str


_ADAPTIVE, _FIXED, _ADAMS, _SCIPY = ("adaptive",), ("fixed",), ("adams",), ("scipy",)

OPTIONS = {
    "first_step": Option(
        (*_ADAPTIVE, *_SCIPY), "length of the first trial step, in units of `t`; default: chosen"
    ),
    "min_step": Option((*_ADAPTIVE, *_SCIPY), "a step this short stands whatever its error; default 0"),
    "max_step": Option((*_ADAPTIVE, *_SCIPY), "no step is longer"),
    "max_num_steps": Option(
        (*_ADAPTIVE, *_SCIPY), "trial steps allowed between two outputs; default 100,000"
    ),
    "safety": Option(
        _ADAPTIVE, "part of the optimal step that is tried; default 0.9, of implicit methods 0.7"
    ),
    "ifactor": Option(_ADAPTIVE, "most that a step grows by; default 10"),
    "dfactor": Option(_ADAPTIVE, "most that a step shrinks by; default 0.2"),
    "controller": Option(
        _ADAPTIVE,
        '`"i"` (default, torchdiffeq\'s), `"pi"` (PI.4.2) or `"pid"` step-size control, which also look at the '
        'steps before and refuse fewer; implicit methods have `"predictive"` (Gustafsson\'s) too, their default',
    ),
    "pcoeff": Option(_ADAPTIVE, "proportional part of the controller; see `controller`"),
    "icoeff": Option(_ADAPTIVE, "integral part"),
    "dcoeff": Option(_ADAPTIVE, "derivative part"),
    "norm": Option(
        (*_ADAPTIVE, *_FIXED),
        "of the scaled error, a callable; default: root mean square over the whole tensor, the largest over a "
        "tuple's members",
    ),
    "step_t": Option(_ADAPTIVE, "times to land on"),
    "jump_t": Option(_ADAPTIVE, "times to land on, and to evaluate the field again from the other side"),
    "dtype": Option(_ADAPTIVE, "accepted as torchdiffeq has it; time is always kept in float64"),
    "overshoot": Option(_ADAPTIVE, "take torchdiffeq's steps exactly, past the final time"),
    "batched": Option(
        _ADAPTIVE,
        "solve every index of the leading dimension on its own: own steps, times, tolerances, status",
    ),
    "compact": Option(
        _ADAPTIVE, "with `batched`: `func` treats rows alone, and need not be called with finished ones"
    ),
    "step_size": Option(_FIXED, "length of the steps, in units of `t`; default: from one output to the next"),
    "grid_constructor": Option(_FIXED, "`f(func, y0, t)` returns the ends of the steps"),
    "interp": Option(_FIXED, '`"linear"` (default) or `"cubic"`, between the ends of steps'),
    "perturb": Option(_FIXED, "evaluate just inside the ends of a step"),
    "max_order": Option(
        _ADAMS,
        "most that the order grows to, from 4 to 12; below 4 it is `rk4`; default 12. Single precision is "
        "fit for 6, lower precision for 4: higher orders would make the rounding of slopes count",
    ),
    "max_iters": Option(
        ("implicit", *_ADAMS),
        "iterations of Newton's method for a stage, default 100, of adaptive methods 10; of Adams methods: corrections "
        "of a step that need not halve, default 4",
    ),
    "solver": Option(_SCIPY, '`"LSODA"` (default), `"RK45"`, `"RK23"`, `"DOP853"`, `"Radau"` or `"BDF"`'),
}

"""The checks of ``options``, and what they become in a `Problem`."""

from __future__ import annotations

import functools
import math
import warnings

import torch

from .arguments import forward_times, kind_of, nearest, real_number
from .control import Controller
from .errors import ArgumentError, ArgumentTypeError
from .methods import Method
from .methods.adams import LEAST_SLOPES, MAX_ORDER

# torchdiffeq's default of 2**31 - 1 lets a stiff problem run for days; this is an order of
# magnitude beyond what any DETEST problem takes at tolerance 1e-12.
MAX_NUM_STEPS = 100_000

# Grids are held in memory; this one takes 800 MB.
MAX_GRID = 100_000_000

# Iterations of Newton's method in steps whose length is prescribed.
NEWTON = 100

SCIPY_SOLVERS = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")


def known_options(options, method: Method) -> dict:
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise ArgumentTypeError(f"options must be a dict, got {kind_of(options)}")
    allowed = method.options
    unknown = {k: v for k, v in options.items() if k not in allowed}
    if unknown:
        # parity: a warning, because programs share one options dict between methods.
        hints = "".join(nearest(name, allowed) for name in unknown)
        warnings.warn(
            f"{method.name}: Unexpected arguments {unknown}, ignored.{hints} Allowed options: {allowed}"
        )
    return {k: v for k, v in options.items() if k in allowed}


def _number(options, name, default, *, low=0.0, high=math.inf, strict=False, finite=True):
    value = options.get(name, default)
    if value is default:
        return default
    number = real_number(value)
    if number is None:
        raise ArgumentTypeError(f"options[{name!r}] must be a number, got {kind_of(value)}")
    if math.isnan(number) or number < low or number > high or (strict and number == low):
        bound = f"greater than {low:g}" if strict else f"at least {low:g}"
        upper = "" if math.isinf(high) else f" and at most {high:g}"
        raise ArgumentError(f"options[{name!r}] must be {bound}{upper}, got {number}")
    if finite and math.isinf(number):
        raise ArgumentError(f"options[{name!r}] must be finite, got {number}")
    return number


def _whole(options, name, default, high=math.inf) -> int:
    limit = min(_number(options, name, default, low=1, high=high, finite=False), 2**31 - 1)
    if limit != int(limit):
        raise ArgumentError(f"options[{name!r}] must be a whole number, got {limit}")
    return int(limit)


def flag(options, name, argument="options") -> bool:
    value = options.get(name, False)
    if not isinstance(value, (bool, int)) or value not in (0, 1):
        raise ArgumentTypeError(f"{argument}[{name!r}] must be True or False, got {kind_of(value)}")
    return bool(value)


def adaptive_fields(options, method: Method, begin: float, direction: float) -> dict:
    # Most solves are given none: these are worth more than their check.
    return _adaptive_fields(options, method, begin, direction) if options else _usual_fields(method)


@functools.cache
def _usual_fields(method: Method) -> dict:
    return _adaptive_fields({}, method, 0.0, 1.0)


def _adaptive_fields(options, method: Method, begin: float, direction: float) -> dict:
    control = Controller(
        order=method.order,
        # An implicit step that is refused costs far more than one more step does: on van der Pol's equation
        # 0.7 has a third of 0.9's error for an eighth more calls.
        safety=_number(options, "safety", 0.7 if method.family == "implicit" else 0.9, high=1, strict=True),
        ifactor=_number(options, "ifactor", 10.0, low=1),
        dfactor=_number(options, "dfactor", 0.2, high=1, strict=True),
        min_step=_number(options, "min_step", 0.0),
        max_step=_number(options, "max_step", math.inf, strict=True, finite=False),
        betas=_betas(options, method),
        predictive=_controller(options, method) == "predictive",
    )
    if control.min_step > control.max_step:
        raise ArgumentError(
            f"options['min_step'] is {control.min_step}, above options['max_step'], {control.max_step}"
        )
    dtype = options.get("dtype", torch.float64)
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.float64):
        # Time is kept in float64 whichever of the two is asked for.
        raise ArgumentError(f"options['dtype'] must be torch.float32 or torch.float64, got {dtype}")
    norm = options.get("norm")
    if norm is not None and not callable(norm):
        raise ArgumentTypeError(f"options['norm'] must be callable, got {kind_of(norm)}")
    first_step = _number(options, "first_step", None, strict=True)
    overshoot = flag(options, "overshoot")
    return {
        "control": control,
        "dense": method.dense_overshoot if overshoot and method.dense_overshoot else method.dense,
        "first_step": first_step,
        "max_num_steps": _whole(options, "max_num_steps", MAX_NUM_STEPS),
        "overshoot": overshoot,
        "norm": norm,
        "stops": _stops(options, begin, direction),
        **(_scipy_fields(options) if method.family == "scipy" else {}),
        "max_iters": _whole(options, "max_iters", 10),
    }


def _scipy_fields(options) -> dict:
    solver = options.get("solver", "LSODA")
    if not isinstance(solver, str) or solver not in SCIPY_SOLVERS:
        raise ArgumentError(
            f"options['solver'] must be one of {list(SCIPY_SOLVERS)}, got {kind_of(solver)}."
            + nearest(solver, SCIPY_SOLVERS)
        )
    if options.get("min_step") and solver != "LSODA":
        warnings.warn(f"scipy_solver: options['min_step'] is for LSODA, {solver} takes none: ignored.")
    return {"solver": solver}


# Söderlind's PI.4.2 (ACM TOMS 29, 2003, table III), and the PID controller of Kennedy and Carpenter (Appl. Numer.
# Math. 44, 2003), as their proportional, integral and derivative parts.
_CONTROLLERS = {"i": (0.0, 1.0, 0.0), "pi": (0.2, 0.4, 0.0), "pid": (0.14, 0.25, 0.1)}


def _controller(options, method: Method) -> str:
    own = ("predictive",) if method.family == "implicit" else ()
    allowed = [*own, *_CONTROLLERS]
    name = options.get("controller", allowed[0])
    if not isinstance(name, str) or name not in allowed:
        raise ArgumentError(
            f"options['controller'] must be one of {allowed}, got {kind_of(name)}.{nearest(name, allowed)}"
        )
    return name


def _betas(options, method: Method) -> tuple[float, float, float]:
    """Exponents of the error ratios of a step and the two before it."""
    name = _controller(options, method)
    p, i, d = (
        _number(options, key, default, low=-math.inf)
        for key, default in zip(("pcoeff", "icoeff", "dcoeff"), _CONTROLLERS.get(name, _CONTROLLERS["i"]))
    )
    if p + i + d <= 0 or i <= 0:
        raise ArgumentError(
            f"options: pcoeff={p}, icoeff={i}, dcoeff={d} do not control the step; icoeff and the sum of the "
            "three must be positive"
        )
    return p + i + d, -p - 2 * d, d


def _stops(options, begin, direction):
    """Times that steps must end on, ascending on the forward clock."""
    stops = []
    for name, is_jump in (("step_t", False), ("jump_t", True)):
        values = _times_of(options, name)
        # parity: times before the start are dropped in silence.
        stops += [(direction * v, is_jump) for v in values if direction * v > begin]
    stops.sort()
    if any(a[0] == b[0] for a, b in zip(stops, stops[1:])):
        raise ArgumentError("`step_t` and `jump_t` must not have any repeated elements between them.")
    return tuple(stops)


def _times_of(options, name) -> list[float]:
    values = options.get(name)
    if values is None:
        return []
    try:
        if isinstance(values, torch.Tensor) and values.is_complex():
            raise TypeError("complex times")
        values = torch.as_tensor(values, dtype=torch.float64, device="cpu").reshape(-1).tolist()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ArgumentTypeError(f"options[{name!r}] must hold times, got {kind_of(values)}") from error
    if any(math.isnan(v) for v in values):
        raise ArgumentError(f"options[{name!r}] holds NaN")
    return values


def warn_of_idle_stops(options, t):
    """Warns where none of the times to land on lies in the solve: they may be meant for another clock.

    That some lie outside is no mistake: a path's jumps are given for every part of it that is solved.
    """
    for name in ("step_t", "jump_t"):
        values = _times_of(options or {}, name)
        if not values or len(t) == 1:
            continue
        ends = t[0].item(), t[-1].item()
        if not any(min(ends) <= v <= max(ends) for v in values):
            warnings.warn(
                f"options[{name!r}]: none of its {len(values)} times lies between t[0] = {ends[0]} and t[-1] = {ends[1]}; "
                "the solve will land on none"
            )


def fixed_fields(options, method: Method, func, y0, t, times, direction, until) -> dict:
    """``until`` is the forward time at which a solve until an event ends, inf for none; None for other
    solves."""
    interp = options.get("interp", "linear")
    if not isinstance(interp, str) or interp not in ("linear", "cubic"):
        raise ArgumentError(
            f"Unknown interpolation method {interp!r}; options['interp'] is 'linear' or 'cubic'"
        )
    step_size = _number(options, "step_size", None, strict=True)
    constructor = options.get("grid_constructor")
    if step_size is not None and constructor is not None:
        raise ArgumentError("step_size and grid_constructor are mutually exclusive arguments.")
    if until is not None and step_size is None:
        raise ArgumentError(
            "Event handling for fixed step solvers currently requires `step_size` to be provided in options."
        )
    clock = direction * t.to("cpu", torch.float64)
    if until == math.inf:
        grid = clock[:1]  # steps go on from there
    elif until is not None:
        grid = even_grid(torch.cat([clock[:1], clock.new_tensor([until])]), [times[0], until], step_size)
    elif step_size is not None:
        grid = even_grid(clock, times, step_size)
    elif constructor is not None:
        grid = _constructed_grid(constructor, func, y0, t, times, direction)
    else:
        grid = clock
    return {
        "control": Controller(order=method.order, max_step=step_size or math.inf),
        "dense": method.dense if interp == "linear" else method.cubic,
        "grid": grid,
        "steps_on_times": grid is clock,
        "perturb": flag(options, "perturb"),
        "max_iters": _whole(options, "max_iters", NEWTON),
        **(_adams_fields(options) if method.family == "adams" else {}),
    }


def _adams_fields(options) -> dict:
    max_order = _whole(options, "max_order", MAX_ORDER, MAX_ORDER)
    if max_order <= LEAST_SLOPES:
        warnings.warn(f"max_order is below {LEAST_SLOPES + 1}, so the solver reduces to `rk4`.")
    return {"max_order": max_order, "corrections": _whole(options, "max_iters", 4), "max_iters": NEWTON}


def even_grid(clock, times, step_size):
    """``t[0] + i * step_size`` while before the end, then the end itself."""
    steps = (times[-1] - times[0]) / step_size
    if steps > MAX_GRID:
        raise ArgumentError(
            f"options['step_size'] = {step_size} asks for {steps:.3g} steps; at most {MAX_GRID:.0e} are possible"
        )
    if step_size < math.ulp(max(-times[0], times[-1])):
        raise ArgumentError(
            f"options['step_size'] = {step_size} is below the resolution of t at {times[-1]!r}"
        )
    # A quotient that is whole up to rounding must not add a step of no length.
    whole = max(1, math.ceil(steps * (1 - 4 * torch.finfo(torch.float64).eps))) if len(times) > 1 else 0
    inner = clock[0] + step_size * torch.arange(whole, dtype=torch.float64, device=clock.device)
    return torch.cat([inner, clock[-1:]])


def _constructed_grid(constructor, func, y0, t, times, direction):
    if not callable(constructor):
        raise ArgumentTypeError(f"options['grid_constructor'] must be callable, got {kind_of(constructor)}")
    grid = constructor(func, y0, t)
    if not isinstance(grid, torch.Tensor):
        raise ArgumentTypeError(f"grid_constructor must return a Tensor, got {kind_of(grid)}")
    values, grid_direction = forward_times(grid, "grid_constructor's grid")
    if values[0] != times[0] or values[-1] != times[-1] or (len(values) > 1 and grid_direction != direction):
        raise ArgumentError(
            f"grid_constructor's grid must run from t[0] = {direction * times[0]} to t[-1] = {direction * times[-1]}, "
            f"it runs from {grid[0].item()} to {grid[-1].item()}"
        )
    return direction * grid.to("cpu", torch.float64)

"""The checks of what a caller gives, one argument each.

Every error names the argument, what was given, what is allowed and what to do.
"""

from __future__ import annotations

import cmath
import difflib
import math
import numbers
import operator
import reprlib
import warnings

import torch

from .errors import ArgumentError, ArgumentTypeError
from .methods import METHODS, Method
from .transforms import has_no_values, is_batched, require_readable

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)  # fmt: skip


def kind_of(value) -> str:
    """A value for an error message: short ones as they are, others by type and shape."""
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return f"{type(value).__name__} {reprlib.repr(value)}" if value is not None else "None"
    if isinstance(value, torch.Tensor) and not value.is_nested:
        return f"a Tensor of shape {tuple(value.shape)}"
    return type(value).__name__


def require_dense(name, x: torch.Tensor):
    """Refuses Tensors that are not arrays of numbers in memory."""
    odd = "nested" if x.is_nested else "quantized" if x.is_quantized else x.layout
    if odd != torch.strided:
        raise ArgumentTypeError(f"{name} is a {odd} Tensor; give a dense one, see .to_dense()")
    if x.device.type == "meta":
        raise ArgumentTypeError(f"{name} is on the meta device; a solve needs real data")


def require_values(name, x: torch.Tensor):
    """Refuses Tensors that torch.export and FakeTensorMode make, where they cannot be traced."""
    if has_no_values(x):
        raise ArgumentError(
            f"{name} is a fake Tensor, which has no values. Where operations are recorded, as by torch.export, only "
            "odeint with a fixed-step method on the times t themselves can be: no step_size, grid_constructor, "
            "event_fn, callbacks or engine='native'"
        )


def to_dtype(dtype, y: torch.Tensor) -> torch.Tensor:
    """``y`` in another dtype; the imaginary part of a real member is zero."""
    return (y if dtype.is_complex or not y.is_complex() else y.real).to(dtype)


def flat_state(y0):
    """The state as one tensor, with the members' shapes and dtypes if it is a tuple."""
    if isinstance(y0, torch.Tensor):
        _state_member(y0, "y0")
        return y0, None, None
    if not isinstance(y0, tuple):
        raise ArgumentTypeError(
            f"y0 must be either a torch.Tensor or a tuple of Tensors, got {kind_of(y0)}; solve takes dicts, "
            "lists and nested tuples of Tensors"
        )
    if not y0:
        raise ArgumentError("y0 is an empty tuple; give at least one Tensor")
    for i, member in enumerate(y0):
        if not isinstance(member, torch.Tensor):
            raise ArgumentTypeError(
                f"y0 must be either a torch.Tensor or a tuple of Tensors; member {i} is {kind_of(member)}"
            )
        _state_member(member, f"y0: member {i}")
        if member.device != y0[0].device:
            raise ArgumentError(f"y0: member {i} is on {member.device}, member 0 on {y0[0].device}")
    flat = torch.cat([member.reshape(-1) for member in y0])
    return flat, tuple(m.shape for m in y0), tuple(m.dtype for m in y0)


def require_pair(shapes, method: Method):
    """Refuses a state that is not positions and momenta."""
    if shapes is not None and len(shapes) == 2 and shapes[0] == shapes[1]:
        return
    given = "one Tensor" if shapes is None else f"a tuple of shapes {[tuple(shape) for shape in shapes]}"
    raise ArgumentError(
        f"method={method.name!r} needs a state (q, p), a tuple of two Tensors of the same shape: positions and momenta or "
        f"velocities, with func(t, (q, p)) -> (dq/dt, dp/dt); y0 is {given}"
    )


def _state_member(y, name):
    if y.device.type == "meta":
        raise NotImplementedError(f"{name} is on the meta device; a solve needs real data")
    require_dense(name, y)
    if y.dtype not in DTYPES:
        raise ArgumentTypeError(
            f"{name} must be a floating point or complex Tensor, got {y.dtype}; call .float() or .double() first"
        )


def require_finite(y0, shapes, method):
    require_values("y0", y0)
    # A fixed-step solve on a GPU never waits for the device, not even for this check; and vmap lets
    # nobody look.
    if not method.adaptive and (y0.device.type != "cpu" or is_batched(y0)):
        return
    require_readable(y0, "step-size control")
    # A sum is finite only where every term is, and takes one pass over the state.
    if cmath.isfinite(y0.detach().sum().item()):
        return
    finite = torch.isfinite(y0.detach())
    if finite.all():
        return
    bad = (~finite).reshape(-1).nonzero().reshape(-1)
    place, member, shape = bad[0], "", y0.shape
    value = y0.detach().reshape(-1)[place].item()
    if shapes is not None:
        number = 0
        while place >= shapes[number].numel():
            place = place - shapes[number].numel()
            number += 1
        member, shape = f" of member {number}", shapes[number]
    index = [int(i) for i in torch.unravel_index(place, shape)]
    raise ArgumentError(
        f"y0 must be finite; it has {len(bad)} non-finite element{'s' * (len(bad) > 1)}, "
        f"the first is {value} at index {index}{member}"
    )


def require_tuple(args):
    if not isinstance(args, tuple):
        raise ArgumentTypeError(
            f"args must be a tuple of what func takes after (t, y), got {kind_of(args)}; for one value write args=(value,)"
        )


def method_named(method, argument="method") -> Method:
    name = "dopri5" if method is None else method
    if not isinstance(name, str):
        raise ArgumentTypeError(f"{argument} must be a string, got {kind_of(method)}")
    if name not in METHODS:
        raise ArgumentError(
            f'Invalid {argument} "{name}".{nearest(name, METHODS)} Must be one of '
            + '{"' + '", "'.join(METHODS) + '"}'
        )  # fmt: skip
    return METHODS[name]


def nearest(name, names) -> str:
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f' Did you mean "{close[0]}"?' if close else ""


def check_times(t, name):
    """Refuses what cannot be times, whatever its values are."""
    if not isinstance(t, torch.Tensor):
        raise ArgumentTypeError(f"{name} must be a torch.Tensor, got {kind_of(t)}")
    require_dense(name, t)
    if not t.is_floating_point():
        raise ArgumentTypeError(f"`{name}` must be a floating point Tensor but is a {t.dtype}")
    if t.ndim != 1:
        raise ArgumentError(f"{name} must be one dimensional, got shape {tuple(t.shape)}")
    if t.numel() == 0:
        raise ArgumentError(f"{name} is empty; it must hold at least the initial time")


def forward_times(t, name) -> tuple[list[float], float]:
    """The times on the forward clock, and the direction of the caller's clock."""
    check_times(t, name)
    require_values(name, t)
    require_readable(t, f"the check of {name}")
    values = t.tolist()
    direction = -1.0 if len(values) > 1 and values[0] > values[1] else 1.0
    forward = values if direction > 0 else [-value for value in values]
    ascending = all(map(operator.lt, forward, forward[1:]))
    if not (ascending and math.isfinite(forward[0]) and math.isfinite(forward[-1])):
        _require_ordered(name, values, forward)
    return forward, direction


def _require_ordered(name, values, forward):
    """Names the times at fault."""
    for i, value in enumerate(values):
        if not math.isfinite(value):
            raise ArgumentError(
                f"{name} must be finite and strictly increasing or decreasing, got {name}[{i}] = {value}"
            )
    for i in range(1, len(forward)):
        if forward[i] <= forward[i - 1]:
            raise ArgumentError(
                f"{name} must be strictly increasing or decreasing, got {name}[{i - 1}] = "
                f"{values[i - 1]!r} and {name}[{i}] = {values[i]!r}"
            )


def initial_time(t0, y0) -> torch.Tensor:
    """The time at which a solve begins as a 0-d tensor; a number takes the state's precision."""
    if isinstance(t0, torch.Tensor):
        if not t0.is_floating_point():
            raise ArgumentTypeError(f"t0 must be a number or a floating point Tensor, got {t0.dtype}")
        if t0.numel() != 1:
            raise ArgumentError(f"t0 must have one element, got shape {tuple(t0.shape)}")
        return t0.reshape(())
    number = real_number(t0)
    if number is None:
        raise ArgumentTypeError(f"t0 must be a number or a Tensor of one element, got {kind_of(t0)}")
    flat, _, _ = flat_state(y0)
    return torch.tensor(number, dtype=_wide(flat), device=flat.device)


def joined_times(t0, t1) -> torch.Tensor:
    """The ends of an interval, numbers or Tensors of one element, as ``t``; equal ones are one time."""
    like = [end for end in (t0, t1) if isinstance(end, torch.Tensor)]
    ends = []
    for name, end in (("t0", t0), ("t1", t1)):
        if isinstance(end, torch.Tensor):
            require_readable(end, f"the check of {name}")
        if real_number(end) is None:
            raise ArgumentTypeError(f"{name} must be a number or a Tensor of one element, got {kind_of(end)}")
        if not isinstance(end, torch.Tensor):
            end = torch.tensor(real_number(end), dtype=torch.float64, device="cpu")
        ends.append(end.to(like[0].device if like else "cpu").reshape(()))
    dtype = torch.promote_types(*(end.dtype for end in ends))
    t = torch.stack([end.to(dtype) for end in ends])
    return t[:1] if t[0] == t[1] else t


def tolerance(name, value, y0, sizes):
    """A float, or a flat tensor with one entry per element of the state."""
    if sizes is None:
        return _one_tolerance(name, value, y0, y0.shape)
    per_member = isinstance(value, torch.Tensor) and value.ndim == 1 and len(value) == len(sizes)
    if not per_member and not isinstance(value, (tuple, list)):
        return _one_tolerance(name, value, y0, y0.shape)
    if len(value) != len(sizes):
        raise ArgumentError(
            f"If using tupled {name} it must have the same length as the tuple y0, got {len(value)} for {len(sizes)}"
        )
    parts = [_one_tolerance(f"{name}[{i}]", v, y0, (n,)) for i, (v, n) in enumerate(zip(value, sizes))]
    return torch.cat(
        [torch.as_tensor(p, dtype=_wide(y0), device=y0.device).expand(n) for p, n in zip(parts, sizes)]
    )


def _one_tolerance(name, value, y0, shape):
    """A float, or a tensor spread over ``shape`` and flat."""
    value = check_tolerance(name, value)
    if isinstance(value, float):
        return value
    value = value.to(y0.device, _wide(y0))
    if value.numel() == math.prod(shape):
        return value.reshape(-1)
    try:
        return value.expand(shape).reshape(-1)
    except RuntimeError:
        raise ArgumentError(
            f"{name} has shape {tuple(value.shape)}, which does not broadcast to the state's {tuple(shape)}"
        ) from None


def check_tolerance(name, value) -> float | torch.Tensor:
    """One tolerance: a float, or a Tensor of several."""
    if not isinstance(value, torch.Tensor):
        number = real_number(value)
        if number is None:
            raise ArgumentTypeError(f"{name} must be a number or a Tensor, got {kind_of(value)}")
        if not math.isfinite(number) or number < 0:
            raise ArgumentError(f"{name} must be finite and not negative, got {number}")
        return number
    require_dense(name, value)
    if value.requires_grad:
        raise ArgumentError(f"{name} cannot require gradient")
    if value.is_complex():
        raise ArgumentTypeError(f"{name} must be real, got {value.dtype}")
    low, high = (value.min().item(), value.max().item()) if value.numel() else (0.0, 0.0)
    if math.isnan(low) or low < 0 or math.isinf(high):
        raise ArgumentError(f"{name} must be finite and not negative, got values from {low} to {high}")
    return float(value) if value.numel() == 1 else value


def real_number(value) -> float | None:
    """A real number of any library as a float; None for everything else."""
    if isinstance(value, torch.Tensor):
        scalar = (
            not value.is_nested
            and value.numel() == 1
            and not value.is_complex()
            and value.device.type != "meta"
        )
        return float(value.detach()) if scalar else None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an int beyond the floats
        return math.inf if value > 0 else -math.inf


def require_whole(name, value, least=1):
    """Refuses what is no size or count that torch can hold: an int from ``least`` to 2**63 - 1, of NumPy's too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ArgumentTypeError(
            f"{name} must be an int, a whole number of {least} or more, got {kind_of(value)}"
        )
    if not least <= value < 2**63:
        most = "" if value < least else " and below 2**63"
        raise ArgumentError(f"{name} must be at least {least}{most}, got {reprlib.repr(value)}")


def require_number(name, value, what, zero=False):
    """Refuses what is no positive number; with ``zero`` 0 will do. ``what`` says what it is."""
    number = None if isinstance(value, torch.Tensor) else real_number(value)
    if number is None:
        raise ArgumentTypeError(f"{name} must be a number, {what}, got {kind_of(value)}")
    if not (math.isfinite(number) and (number >= 0 if zero else number > 0)):
        least = "not negative" if zero else "positive"
        raise ArgumentError(f"{name} must be finite and {least}, got {reprlib.repr(value)}; it is {what}")


def require_generator(generator):
    """Refuses what draws no random numbers."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentTypeError(
            f"generator must be a torch.Generator or None, got {kind_of(generator)}; a seeded one is "
            "torch.Generator().manual_seed(0)"
        )


def require_plausible(rtol, atol):
    """Two tolerances that error control can work with."""
    if isinstance(rtol, torch.Tensor) or isinstance(atol, torch.Tensor):
        return
    if rtol == atol == 0:
        raise ArgumentError("rtol and atol are both 0; an adaptive method needs one of them positive")
    if rtol > 0.1:
        warnings.warn(f"rtol is {rtol}: errors as large as the solution would pass", stacklevel=2)


def _wide(y0) -> torch.dtype:
    """The dtype of arithmetic on the state: at least float32."""
    return torch.promote_types(y0.dtype.to_real(), torch.float32)


def floored(rtol, atol, y0):
    """Tolerances that a 16-bit state can meet; below its rounding, error control sees noise."""
    dtype = y0.dtype.to_real()
    if dtype not in (torch.float16, torch.bfloat16) or y0.numel() == 0:
        return rtol, atol
    eps = torch.finfo(dtype).eps
    least_rtol, least_atol = 4 * eps, eps * (y0.detach().abs().max().item() or 1.0)
    floored, raised = [], False
    for value, least in ((rtol, least_rtol), (atol, least_atol)):
        of_several = isinstance(value, torch.Tensor)
        floored.append(value.clamp(min=least) if of_several else max(value, least))
        raised |= bool((value < least).any()) if of_several else value < least
    if raised:
        warnings.warn(
            f"{dtype} cannot meet these tolerances: rtol raised to at least {least_rtol:.3g}, atol to at "
            f"least {least_atol:.3g}. Use a float32 state for more accuracy.",
            stacklevel=2,
        )
    return tuple(floored)


def norm_result(returned, is_finite) -> float:
    """What the caller's norm returned, as a non-negative float; ``is_finite()`` tells of its argument."""
    if isinstance(returned, complex) or (isinstance(returned, torch.Tensor) and returned.is_complex()):
        returned = abs(returned)
    value = real_number(returned)
    if value is None:
        raise ArgumentTypeError(
            f"options['norm'] must return a scalar Tensor or a float, got {kind_of(returned)}"
        )
    if value < 0:
        raise ArgumentError(f"options['norm'] must return a number that is not negative, got {value}")
    if math.isnan(value) and is_finite():
        raise ArgumentError(f"options['norm'] returned {value} for a finite tensor")
    return value


def callbacks_of(func, method: Method):
    found = tuple(getattr(func, name, None) for name in CALLBACKS)
    if all(callback is None for callback in found):
        return found
    for name, callback in zip(CALLBACKS, found):
        if callback is not None and not callable(callback):
            raise ArgumentTypeError(f"func.{name} must be callable, got {kind_of(callback)}")
    served = CALLBACKS if method.adaptive else CALLBACKS[:1]
    if method.family == "scipy":
        served = CALLBACKS[1:2]  # SciPy tells of a step when it is done
    refused = {
        name for name, callback in zip(CALLBACKS, found) if callback is not None and name not in served
    }
    if refused:
        warnings.warn(f"Solver '{method.name}' does not support callbacks {refused}")
    return tuple(c if name in served else None for name, c in zip(CALLBACKS, found))

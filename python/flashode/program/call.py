"""What a program is called with: the mirror of ``csrc/compiled/call.h``, and of ``device.h`` for GPUs."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from enum import IntEnum

Interrupted = ctypes.CFUNCTYPE(ctypes.c_int)


class Returned(IntEnum):
    """What a program returns."""

    DONE, INTERRUPTED, OUT_OF_MEMORY = range(3)


class Call(ctypes.Structure):
    """One call of a program. Pointers are addresses, of memory that the caller keeps alive."""

    _fields_ = [
        *((name, c_int64) for name in ("samples", "row")),
        *((name, c_void_p) for name in ("offset", "stride", "y0", "ys", "y_end")),
        ("member_count", c_int64),
        ("members", c_void_p),
        *((name, c_double) for name in ("rtol", "atol")),
        *((name, c_void_p) for name in ("each_rtol", "each_atol")),
        *((name, c_double) for name in ("safety", "ifactor", "dfactor", "min_step", "max_step")),
        ("betas", c_double * 3),
        ("first_step", c_double),
        ("max_num_steps", c_int64),
        ("times", c_void_p),
        *((name, c_int64) for name in ("outputs", "times_stride")),
        *((name, c_void_p) for name in ("direction", "low", "high")),
        ("end", c_double),
        *((name, c_void_p) for name in ("stops", "stop_jumps")),
        ("stop_count", c_int64),
        ("grid", c_void_p),
        *((name, c_int64) for name in ("grid_points", "perturb")),
        *((name, c_void_p) for name in ("inputs", "own", "own_offset", "own_stride")),
        *((name, c_int64) for name in ("threads", "records")),
        ("interrupted", Interrupted),
        *((name, c_void_p) for name in ("status", "accepted", "rejected", "filled")),
        *((name, c_void_p) for name in ("t", "dt", "error_ratio")),
        ("nfe", c_int64),
        *((name, c_void_p) for name in ("accepted_times", "recording")),
        *(
            (name, c_void_p)
            for name in ("grad_ys", "adj_y0", "grad_inputs", "grad_own", "grad_t", "grad_grid")
        ),
        ("input_sizes", c_void_p),
        *((name, c_int64) for name in ("input_count", "seminorm")),
        *((name, c_double) for name in ("drift", "drift_t")),
    ]


class DeviceCall(ctypes.Structure):
    """What a kernel is called with. Pointers are addresses on the device."""

    _fields_ = [
        ("call", Call),
        *(
            (name, c_void_p)
            for name in ("prepared", "sums", "of_blocks", "arrived", "accepted_times", "extends")
        ),
        ("room", c_int64),
        *((name, c_void_p) for name in ("rounds", "failed", "returned", "started", "probed", "nfe")),
    ]


def load(path: str) -> ctypes.CDLL:
    """A compiled program. Raises OSError where its `Call` is not this one: it was made by another version."""
    program = ctypes.CDLL(path)
    program.flashode_call_size.restype = c_int64
    if program.flashode_call_size() != ctypes.sizeof(Call):
        raise OSError(f"{path} was compiled for another version of flashode: compile it anew")
    return program

"""Calls of programs on GPUs: what a call points to is brought there in one copy, kernels run, results come back."""

from __future__ import annotations

import ctypes
import time
from array import array

import torch

from ..batched import BatchOutcome
from ..errors import Status
from ..program.call import DeviceCall, Returned
from ..solution import Outcome

# Results of all threads together, of 8 bytes each, zero to begin with.
_WORDS = ("arrived", "rounds", "failed", "returned", "started", "probed", "nfe")
_ROOM = 1 << 14  # for the ends of steps, to begin with
_ALIGNMENT = 16


class OnDevice:
    """What is different on a GPU in a run of a program (`compiled._Run`).

    Tensors are on the device. Other memory is packed behind the call, and what points to it is moved with it.
    """

    room = _ROOM

    @property
    def device(self) -> torch.device:
        return self.p.y0.device

    def array(self, x: torch.Tensor, dtype) -> torch.Tensor:
        x = x.detach().to(self.device, dtype).contiguous()
        self.kept.append(x)
        return x

    def set_results(self):
        n, call = (self.call.samples if self.batched else 1), self.call
        self.whole = torch.zeros((4, n), dtype=torch.int64, device=self.device)
        self.real = torch.zeros((3, n), dtype=torch.float64, device=self.device)
        call.status, call.accepted, call.rejected, call.filled = (row.data_ptr() for row in self.whole)
        call.t, call.dt, call.error_ratio = (row.data_ptr() for row in self.real)

    def execute(self, name: str):
        began = time.perf_counter()
        self.launch(name)
        if name == "solve":
            while self.words["returned"] == Returned.OUT_OF_MEMORY:
                self.room *= 8
                self.launch(name)
            self.finish()
        self.program.spend(name, time.perf_counter() - began)

    def launch(self, name: str):
        """Runs the kernels of an entry, and waits for them."""
        gpu, program, call = self.program.gpu, self.program, DeviceCall(call=self.call)
        together = name == "solve" and self.p.method.adaptive and not self.batched
        turns = gpu.turns(self.call.samples) if together else 1
        blocks = -(-self.call.samples // (gpu.threads * turns))
        extra = len(self.p.dense.extra_c)
        space = {
            "prepared": (program.sizes["prepared"], program.dtype),
            "sums": ((self.call.member_count - 1) * blocks * gpu.threads, torch.float64),
            "of_blocks": (2 * blocks, torch.float64),
            "accepted_times": (self.room if together else 0, torch.float64),
            "extends": (self.room if self.batched and extra else 0, torch.uint8),
            **{word: (1, torch.int64) for word in _WORDS},
        }
        call.room = self.room
        self.memory, self.space = self.placed(call, space)
        address = self.memory.data_ptr()
        program.library.launch("prepare", 1, address, False)
        program.library.launch(name, blocks, address, together and blocks > 1)
        words = torch.cat([self.space[word] for word in _WORDS]).tolist()
        self.words = dict(zip(_WORDS, words))

    def placed(self, call: DeviceCall, space: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The call, what it points to on the host, and zeros of these sizes and dtypes, in one piece of the device's
        memory; and the zeros by name."""
        memories = {ctypes.addressof(call): call}
        for m in (*self.kept, *self.program.placed(self.p).memory.values()):
            if isinstance(m, ctypes.Array):
                memories[ctypes.addressof(m)] = m
        ends, end = {}, 0
        for key, size in [
            *((address, ctypes.sizeof(m)) for address, m in memories.items()),
            *((name, count * dtype.itemsize) for name, (count, dtype) in space.items()),
        ]:
            end += -end % _ALIGNMENT + size
            ends[key] = end
        device = torch.zeros(end, dtype=torch.uint8, device=self.device)
        begins = {key: ends[key] - ctypes.sizeof(m) for key, m in memories.items()}

        for name, kind in call.call._fields_:
            pointer = getattr(call.call, name) if kind is ctypes.c_void_p else None
            for address, m in memories.items():
                if pointer is not None and address <= pointer < address + ctypes.sizeof(m):
                    setattr(call.call, name, device.data_ptr() + begins[address] + pointer - address)
                    break
        zeros = {}
        for name, (count, dtype) in space.items():
            zeros[name] = device[ends[name] - count * dtype.itemsize : ends[name]].view(dtype)
            setattr(call, name, device.data_ptr() + ends[name] - count * dtype.itemsize)
        content = bytearray(max(ends[address] for address in memories))
        for address, m in memories.items():
            content[begins[address] : ends[address]] = bytes(m)
        device[: len(content)] = torch.frombuffer(content, dtype=torch.uint8)
        return device, zeros

    def solve(self) -> Outcome | BatchOutcome:
        self.execute("solve")
        (status, accepted, rejected, filled), (t, dt, error_ratio) = self.whole, self.real
        if self.batched:
            return BatchOutcome(
                status, self.ys, self.call.nfe, accepted, rejected, filled, t, dt, error_ratio
            )
        return Outcome(
            Status(status),
            self.ys,
            self.call.nfe,
            accepted,
            rejected,
            self.ends,
            t,
            dt,
            error_ratio,
            y1=self.y_end,
        )

    def finish(self):
        """Results as those of a program on a CPU."""
        tableau, words, call = self.p.method.tableau, self.words, self.call
        if self.batched:
            extending = int(self.space["extends"].count_nonzero()) * len(self.p.dense.extra_c)
            self.whole, self.real = self.whole.cpu(), self.real.cpu()
            call.nfe = words["started"] + words["probed"] + words["rounds"] * (tableau.stages - 1) + extending
            return
        if words["failed"]:
            return self.finish_failed(words["failed"])
        self.whole, self.real = self.whole.flatten().tolist(), self.real.flatten().tolist()
        call.nfe, accepted = words["nfe"], self.whole[1]
        ends = self.space["accepted_times"] if self.p.method.adaptive else self.p.grid[1:].double()
        self.ends = array("d", ends[:accepted].tolist())

    def finish_failed(self, left: int):
        """Some sample has failed in a fixed step: all of them are taken to the start of that step again."""
        points = self.call.grid_points
        accepted = points - left
        self.call.grid_points = accepted + 1
        self.launch("solve")
        self.finish()
        self.call.grid_points = points
        self.whole[0] = int(Status.NONFINITE_FIELD)
        self.real[1] = float(self.p.grid[accepted + 1] - self.p.grid[accepted])
        self.call.nfe += self.p.method.tableau.stages

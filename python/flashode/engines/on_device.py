"""Calls of programs on GPUs: what a call points to is brought there in one copy, kernels run, results come back."""

from __future__ import annotations

import ctypes
import time

import torch

from ..errors import Status
from ..program.call import DeviceCall, Returned

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
        }
        space = {
            key: torch.zeros(size, dtype=dtype, device=self.device) for key, (size, dtype) in space.items()
        }
        words = torch.zeros(len(_WORDS), dtype=torch.int64, device=self.device)
        for key, memory in space.items():
            setattr(call, key, memory.data_ptr())
        for i, key in enumerate(_WORDS):
            setattr(call, key, words.data_ptr() + 8 * i)
        call.room = self.room
        packed = self.packed(call)
        program.library.launch("prepare", 1, packed.data_ptr(), False)
        program.library.launch(name, blocks, packed.data_ptr(), together and blocks > 1)
        self.words, self.space = dict(zip(_WORDS, words.tolist())), space

    def packed(self, call: DeviceCall) -> torch.Tensor:
        """The call and all memory of the host that it points to, on the device."""
        memories = [
            m
            for m in (*self.kept, *self.program.placed(self.p).memory.values())
            if isinstance(m, ctypes.Array)
        ]
        places, end = [], ctypes.sizeof(call)
        for memory in memories:
            end += -end % _ALIGNMENT
            places.append((ctypes.addressof(memory), ctypes.sizeof(memory), end))
            end += ctypes.sizeof(memory)
        target = torch.empty(end, dtype=torch.uint8, device=self.device)
        for name, kind in call.call._fields_:
            pointer = getattr(call.call, name) if kind is ctypes.c_void_p else None
            for address, size, offset in places:
                if pointer is not None and address <= pointer < address + size:
                    setattr(call.call, name, target.data_ptr() + offset + pointer - address)
                    break
        content = bytearray(end)
        content[: ctypes.sizeof(call)] = bytes(call)
        for memory, (_, size, offset) in zip(memories, places):
            content[offset : offset + size] = bytes(memory)
        return target.copy_(torch.frombuffer(content, dtype=torch.uint8))

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
        self.ends = (ctypes.c_double * accepted)(*ends[:accepted].tolist())
        call.accepted_times = ctypes.addressof(self.ends)

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

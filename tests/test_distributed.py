"""DistributedDataParallel: two processes with half of the batch each train as one with all of it."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import flashode

F64 = torch.float64
MODES = ["direct", "checkpoint", "backsolve"]
BATCH, ITERATIONS = 8, 5
SOLVERS = {
    # Fixed steps are the same for any part of a batch.
    "rk4": ({"method": "rk4", "options": {"step_size": 0.25}}, 1e-12),
    # Step-size control sees the part that a process has: its steps differ, its answers by the tolerance.
    "dopri5": ({"method": "dopri5", "rtol": 1e-10, "atol": 1e-12}, 1e-6),
}

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


class NeuralODE(torch.nn.Module):
    """From the start of a trajectory to its end: a solve inside a model, as DDP wraps it."""

    def __init__(self, mode, solver):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).to(F64)
        self.mode, self.solver = mode, solver

    def forward(self, y0):
        t = torch.tensor([0.0, 1.0], dtype=F64)
        if self.mode == "direct":
            return flashode.odeint(self.field, y0, t, **self.solver)[-1]
        params = tuple(self.net.parameters())
        return flashode.odeint_adjoint(
            self.field, y0, t, adjoint=self.mode, adjoint_params=params, **self.solver
        )[-1]

    def field(self, t, y):
        return self.net(y)


def train(mode, method, rank=0, processes=1) -> list[torch.Tensor]:
    """The parameters after a few steps of SGD on the rows that belong to one process."""
    torch.manual_seed(0)
    model = NeuralODE(mode, SOLVERS[method][0])
    y0 = torch.randn(BATCH, 2, dtype=F64)[rank::processes]
    wrapped = DistributedDataParallel(model) if processes > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(ITERATIONS):
        optimizer.zero_grad()
        (wrapped(y0) - y0.flip(-1)).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def work(rank, port, folder):
    """What one of two processes does: every training in turn; its parameters go to a file."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    trained = {(mode, method): train(mode, method, int(rank), 2) for mode in MODES for method in SOLVERS}
    torch.save(trained, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
    # Threads of gloo outlive the group. One that still holds a tensor of DistributedDataParallel while
    # Python is being torn down aborts the process ("terminate called without an active exception", seen
    # with torch 2.13 and no solve at all), so the work done, Python is left without being torn down.
    os._exit(0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The parameters of both processes after each training."""
    folder = tmp_path_factory.mktemp("trained")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    commands = [[sys.executable, __file__, rank, port, folder] for rank in "01"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    return [torch.load(folder / f"{rank}.pt") for rank in "01"]


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_as_one(trained, mode, method):
    ours, theirs = (each[mode, method] for each in trained)
    assert all(map(torch.equal, ours, theirs))
    for p, q in zip(ours, train(mode, method)):
        torch.testing.assert_close(p, q, rtol=SOLVERS[method][1], atol=1e-12)


def test_training_moves_the_parameters():
    torch.manual_seed(0)
    before = NeuralODE("direct", {}).parameters()
    assert all((p - q).abs().max() > 1e-3 for p, q in zip(train("direct", "rk4"), before))


def test_the_error_of_a_failed_solve_can_be_sent_to_another_process():
    with pytest.raises(flashode.SolveError) as caught:
        flashode.odeint(lambda t, y: y**3, torch.full((1,), 3.0), torch.tensor([0.0, 1.0]))
    sent = pickle.loads(pickle.dumps(caught.value))
    assert type(sent) is flashode.SolveError and str(sent) == str(caught.value)
    assert vars(sent) == vars(caught.value) and sent.reason.name


if __name__ == "__main__":
    work(*sys.argv[1:])

"""Tensors in parts: the runs of a part, and two processes that share models over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from noisytune_cli.memory.sharded import LocalRun, held_part

_WORKER = Path(__file__).parents[1] / "inputs" / "distributed_worker.py"


def test_a_plain_tensor_is_held_whole() -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    held = held_part(parameter, "w")
    assert held.runs == (LocalRun(0, 0, 12),)
    assert held.values.data_ptr() == parameter.data_ptr()
    assert not held.values.requires_grad
    assert held.mesh is None


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this build of torch has no gloo",
)
def test_two_processes_add_the_noise_of_the_whole_to_their_parts(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", _WORKER, str(rank), tmp_path / "rendezvous"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)

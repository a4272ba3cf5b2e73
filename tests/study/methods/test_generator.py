"""Random numbers on the CPU and elsewhere: both follow the run's one generator."""

from __future__ import annotations

import pytest
import torch

from .runs import tiny_bert, training_of


def test_on_the_cpu_it_is_the_runs_own_generator() -> None:
    training = training_of(tiny_bert())
    assert training.generator_on(torch.device("cpu")) is training.generator


def test_another_devices_generator_is_seeded_anew_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    training = training_of(tiny_bert())

    def seeds(start: int) -> list[int]:
        training.generator = real("cpu").manual_seed(start)
        return [training.generator_on(torch.device("cuda:1")).initial_seed() for _ in range(3)]

    real, devices = torch.Generator, []

    def on_the_cpu(device: torch.device) -> torch.Generator:
        devices.append(device)
        return real("cpu")

    monkeypatch.setattr(torch, "Generator", on_the_cpu)
    first = seeds(0)
    assert len(set(first)) == 3
    assert first == seeds(0) != seeds(1)
    assert set(devices) == {torch.device("cuda:1")}

"""Where a method's random numbers come from: the run's one generator, whatever the model's device.

The generator is on the CPU, and there a run's noise follows its seed alone. For another device each use seeds
a generator there: to draw a large tensor here and copy it would take longer than a step.
"""

from __future__ import annotations

import torch


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """Return a generator for `device`: `generator` itself on the CPU, else one that it seeds."""
    if device.type == "cpu":
        return generator
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)

"""An evolution strategy in memory: noise, a score, and a step towards the noise that scored well.

After Qiu et al., "Evolution Strategies at Scale" (2025): each member of the population is the model with the
noise of a seed; a step is a sum of the members' noises, weighted with their scores. So a run is a
list of seeds and coefficients, a few kilobytes, from which `noisytune perturb --mix` makes its checkpoint.

python evolution.py [FILE]     the seeds and coefficients go into FILE
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import noisytune_cli

SIGMA, RATE, MEMBERS, STEPS = 0.02, 0.02, 16, 8


def main(out: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).requires_grad_(False)
    rows = torch.randn(128, 8)
    wanted = rows[:, :1] - rows[:, 1:2]

    def score() -> float:
        """A reward that needs no gradient: it could as well be a game or a human."""
        return -nn.functional.mse_loss(model(rows), wanted).item()

    history: list[dict[str, float]] = []
    print(f"start: {score():.3f}")
    with noisytune_cli.Population(model) as population:
        for step in range(STEPS):
            seeds = range(step * MEMBERS, (step + 1) * MEMBERS)
            scores = []
            for seed in seeds:
                population.set(mix=[*history, {"seed": seed, "sigma": SIGMA}])
                scores.append(score())
            mean, std = statistics.mean(scores), statistics.stdev(scores)
            history += [
                {"seed": seed, "sigma": 1.0, "coefficient": RATE * (one - mean) / std / MEMBERS}
                for seed, one in zip(seeds, scores, strict=True)
            ]
            population.set(mix=history)
            print(f"step {step}: {score():.3f}")
    # Here the model has its own bits again.
    out.write_text("".join(json.dumps(line) + "\n" for line in history))
    print(f"{len(history)} seeds in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()) / "steps.jsonl")

"""Studies for tests of what comes after training: records of runs made by code, with known scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: Of the dev rows that the made-up predictions are on.
LABELS = [1, 0, 1, 1, 0, 1, 0, 1]

PREDICTIONS = [1, 0, 1, 0, 0, 1, 1, 1]


def run(
    method: str = "plain",
    seed: int = 0,
    dev: float = 0.5,
    *,
    held_out: float | None = 0.5,
    lam: float | None = None,
    noise: str | None = None,
    scope: str | None = None,
    share: float = 1.0,
    options: Mapping[str, Any] | None = None,
    predictions: Sequence[float] = PREDICTIONS,
    metric: str = "matthews",
    **others: Any,
) -> dict[str, Any]:
    """Return a run's record as the study writes it; noisytune's part has its defaults where it takes one."""
    if "noisytune" in method:
        lam, noise, scope = lam or 0.15, noise or "uniform", scope or "matrix"
    return {
        "schema": 1,
        "key": f"{method}-{lam}-{noise}-{scope}-{share}-{seed}-{options}",
        "task": "cola",
        "method": method,
        "lambda": lam,
        "noise": noise,
        "scope": scope,
        "options": dict(options or {}),
        "seed": seed,
        "init_seed": seed,
        "order_seed": seed,
        "noise_seed": seed,
        "share": share,
        "train_rows": round(1000 * share),
        "held_out_rows": 500 if held_out is not None else 0,
        "dev_rows": len(LABELS),
        "epochs": 5,
        "steps": 315,
        "anchor": "original",
        "dev": {metric: dev, "accuracy": 0.75},
        "held_out": None if held_out is None else {metric: held_out, "accuracy": 0.7},
        "primary": metric,
        "predictions": list(predictions),
        "drift": None,
        "probe": None,
        "member_steps": 315,
        "forwards": 315,
        "seconds": 60.0,
        "loss": 0.3,
        **others,
    }


def runs(method: str, dev: Iterable[float], **others: Any) -> list[dict[str, Any]]:
    """Return a condition's runs, one for each score, with the seeds 0, 1, 2…"""
    return [run(method, seed, score, **others) for seed, score in enumerate(dev)]


def study(
    planned: Iterable[Mapping[str, Any]], labels: Sequence[float] = LABELS, **others: Any
) -> dict[str, Any]:
    """Return the study.json of a study that planned these runs."""
    return {
        "schema": 1,
        "tool": {"name": "noisytune", "version": "0.1.0"},
        "settings": {"train_rows": 1000, "held_out": 500, "epochs": 5, "learning_rate": 2e-5, "probe": None},
        "model": {"id": "minilm", "revision": None, "parameters": 22_700_000},
        "task": "cola",
        "primary": "matthews",
        "regression": False,
        "label_names": ["0", "1"],
        "dev_labels": list(labels),
        "machine": {"cpu": "a processor", "cpus": 2, "device": "cpu", "threads": 2, "torch": "2.13.0"},
        "design": [{field: record[field] for field in _PLANNED} for record in planned],
        **others,
    }


#: What is known of a run before it is carried out.
_PLANNED = (
    "key",
    "method",
    "lambda",
    "noise",
    "scope",
    "options",
    "share",
    "seed",
    "init_seed",
    "order_seed",
    "noise_seed",
)

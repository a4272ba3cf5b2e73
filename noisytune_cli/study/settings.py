"""What all runs of a study share: model, rows, and the recipe of training. Plain data, fit for study.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from noisytune_cli.study.data.splits import Files
from noisytune_cli.study.data.tasks import Task


@dataclass(frozen=True)
class Recipe:
    """How every run is trained: AdamW, a linear schedule with warm-up, gradients clipped at norm 1.

    `warmup` is a share of the steps; `group_by_length` makes batches of rows of similar length; `anchor` says
    which weights methods hold on to; `lora_rank` 0 is full finetuning. `precision` is that of the forward and
    backward pass, `float32` or `bfloat16` (autocast); weights and optimizer are float32 in both.
    """

    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    max_length: int = 128
    group_by_length: bool = False
    anchor: str = "original"
    lora_rank: int = 0
    lora_alpha: int = 16
    lora_dropout: float = 0.1
    precision: str = "float32"


@dataclass(frozen=True)
class Material:
    """Where the model and the rows lie, and which rows are used (`design.split_rows`)."""

    model: Path
    task: Task
    train: Files
    dev: Files
    train_rows: int | None = None
    held_out: int | None = None
    data_seed: int = 0
    probe: Task | None = None
    probe_train: Files = ()
    probe_dev: Files = ()
    probe_rows: int = 1000


#: What earlier versions did not look at: a study that one of them began goes on without.
LATER = ("config", "probe_data")


def record(
    material: Material, recipe: Recipe, digests: Mapping[str, str | None], device: str
) -> dict[str, Any]:
    """Return the settings that change a study's numbers, without paths of this machine."""
    task = material.task
    return {
        "model": digests["model"],
        "config": digests["config"],
        "task": task.name,
        "text": list(task.text),
        "label": task.label,
        "metrics": list(task.metrics),
        "train": digests["train"],
        "dev": digests["dev"],
        "train_rows": material.train_rows,
        "held_out": material.held_out,
        "data_seed": material.data_seed,
        "probe": None if material.probe is None else material.probe.name,
        "probe_rows": material.probe_rows if material.probe is not None else None,
        "probe_data": digests["probe_data"],
        "device": device,
        **asdict(recipe),
    }


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings by which a study is known, with the precision that earlier versions left unsaid.

    What the task is called is none of them: own rows are called after their file, which may be renamed.
    """
    precision = "bfloat16" if settings.get("device") == "cuda" else "float32"
    return {name: value for name, value in {"precision": precision, **settings}.items() if name != "task"}

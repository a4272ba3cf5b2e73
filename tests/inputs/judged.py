"""Checkpoints that get noise, and what their manifests say of each tensor: why, and what told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Tensor, save
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from noisytune_cli.cli.app import app
from noisytune_cli.commands.perturb import Perturbed, Request, perturb
from noisytune_cli.records import NoiseSpec

Told = dict[str, tuple[str | None, str | None]]

BY_CHECKPOINT, BY_STRUCTURE, BY_VALUES = (("buffer", by) for by in ("checkpoint", "structure", "values"))
NOISE = (None, None)

#: A rotary embedding's, which a formula gives.
FREQUENCIES = 500_000.0 ** (-np.arange(64) / 64)


def noisytune(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def drawn(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def told(done: Perturbed) -> Told:
    """Reason and, of a buffer or a doubt, what told it, as the manifest says."""
    document = json.loads(done.manifest_path.read_bytes())
    return {t["name"]: (t.get("reason"), t.get("told_by")) for t in document["tensors"]}


def noised(
    tmp_path: Path, tensors: Mapping[str, NDArray[Any]], noise: NoiseSpec | None = None, **options: Any
) -> Perturbed:
    stored = {name: Tensor("F32", np.asarray(values, np.float32)) for name, values in tensors.items()}
    source = save(tmp_path / "m.safetensors", stored)
    out = tmp_path / "o.safetensors"
    return perturb(Request(str(source), noise or NoiseSpec(), **options), str(out), overwrite=True)


def pickled(tmp_path: Path, content: Any) -> Perturbed:
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "m.pt")
    return perturb(Request(str(tmp_path / "m.pt"), NoiseSpec()), str(tmp_path / "o.pt"))


def tensors(**shapes: tuple[int, ...]) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    return {name: torch.from_numpy(drawn(*shape, seed=i)) for i, (name, shape) in enumerate(shapes.items())}

"""The tiny model and its rows, made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from .tiny import save_model, save_rows


@dataclass(frozen=True)
class Tiny:
    """Where the model's folder and the files of rows lie."""

    model: Path
    train: Path
    dev: Path

    @property
    def arguments(self) -> list[str]:
        """The arguments of `noisytune study` that name them, and settings that make it quick."""
        return [
            *("study", str(self.model), "--train", str(self.train), "--dev", str(self.dev)),
            *("--text", "sentence", "--label", "label", "--learning-rate", "0.01"),
            *("--epochs", "6", "--batch-size", "8", "--threads", "1", "--quiet"),
        ]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    return Tiny(save_model(folder / "model"), *save_rows(folder))

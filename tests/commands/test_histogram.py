"""inspect --histogram: the values of one tensor, counted as NumPy counts them."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import FLOATS, Tensor, floats, numbers, save, weights
from typer.testing import CliRunner, Result

from noisytune_cli.cli import show_histogram
from noisytune_cli.cli.app import app
from noisytune_cli.commands.histogram import BINS, histogram
from noisytune_cli.errors import UsageError


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("dtype", FLOATS)
def test_counts_are_those_of_numpy(tmp_path: Path, dtype: str) -> None:
    tensor = weights(dtype, 200, 1000, seed=1)
    path = save(tmp_path / "m.safetensors", {"w": tensor, "v": weights("F32", 3)})
    found = histogram(str(path), "w").histogram
    values = np.array(floats(tensor))
    assert found.edges == pytest.approx(np.histogram(values, BINS)[1].tolist(), rel=1e-12)
    assert list(found.counts) == np.histogram(values, found.edges)[0].tolist()
    assert (sum(found.counts), found.left_out) == (200_000, 0)


def test_what_is_not_finite_is_left_out_and_a_constant_is_one_bin(tmp_path: Path) -> None:
    tensors = {
        "broken": numbers("F32", 1.0, float("nan"), float("inf"), 3.0),
        "nothing": numbers("F32", float("nan")),
        "same": numbers("F32", 2.0, 2.0),
        "wide": numbers("F64", -1.7e308, 1.7e308),
    }
    path = str(save(tmp_path / "m.safetensors", tensors))
    broken = histogram(path, "broken").histogram
    assert (broken.counts[0], broken.counts[-1], broken.left_out) == (1, 1, 2)
    assert histogram(path, "nothing").histogram.counts == ()
    assert histogram(path, "same").histogram.counts == (2,)
    assert sum(histogram(path, "wide").histogram.counts) == 2


@pytest.mark.parametrize("ulps", [1, 2, 3, 4, 50])
def test_values_that_are_neighbours_are_counted(tmp_path: Path, ulps: int) -> None:
    low = 1.0
    high = low + ulps * np.spacing(low)
    path = save(tmp_path / "m.safetensors", {"w": numbers("F64", low, low, high)})
    found = histogram(str(path), "w").histogram
    assert (found.edges[0], found.edges[-1], sum(found.counts)) == (low, high, 3)
    assert list(found.edges) == sorted(found.edges)


def test_a_tensor_of_a_component_is_counted(tmp_path: Path) -> None:
    save(tmp_path / "pipe/vae/model.safetensors", {"w": weights("F32", 9)})
    (tmp_path / "pipe/model_index.json").write_text(json.dumps({"vae": ["diffusers", "X"]}))
    shown = ("inspect", tmp_path / "pipe", "--component", "vae", "--histogram", "vae/w", "--json")
    result = invoke(*shown)
    assert result.exit_code == 0, result.output
    assert sum(json.loads(result.stdout)["counts"]) == 9


def test_formats_figures_and_names(tmp_path: Path) -> None:
    name = "\x1b[2J"
    path = save(tmp_path / "m.safetensors", {name: weights("F32", 500), "n": weights("F32", 2)})
    shown = ("inspect", path, "--histogram", name)
    result = invoke(*shown)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == BINS + 2
    assert result.stdout.startswith(r"\x1b[2J  F32 [500]")
    document = json.loads(invoke(*shown, "--format", "json").stdout)
    assert sum(document["counts"]) == 500
    rows = csv.DictReader(io.StringIO(invoke(*shown, "--format", "csv").stdout))
    assert [int(row["count"]) for row in rows] == document["counts"]
    pytest.importorskip("matplotlib")
    assert invoke(*shown, "--plot", tmp_path / "h.png").exit_code == 0
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")


def test_bars_line_up_where_the_terminal_has_no_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "m.safetensors", {"w": weights("F32", 500)})
    shown = ("inspect", path, "--histogram", "w")
    blocks = invoke(*shown).stdout
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    show_histogram.show_histogram(histogram(str(path), "w"), "table")
    assert raw.getvalue().decode("ascii") == blocks.replace("█", "#").replace("▏", "|")


def test_what_cannot_be_counted_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", {"w": weights("F32", 5), "n": Tensor("I64", np.arange(2))})
    for name in ("n", "absent"):
        with pytest.raises(UsageError, match="no tensor of floats has this name"):
            histogram(str(path), name)
    assert invoke("inspect", path, "--histogram", "w", "--format", "html").exit_code == 2

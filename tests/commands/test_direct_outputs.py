"""--direct changes no byte of any output, whatever verb writes it in which format."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import Tensor, save, save_sharded, weights
from chunked import save_chunked
from pickles import saved, to_torch
from typer.testing import CliRunner

import noisytune_cli
from noisytune_cli.checkpoint.formats import _direct
from noisytune_cli.cli.app import app

#: Of all that lies about the edges of a chunk: tensors of a few bytes, and one that has none.
TENSORS = {
    "w": weights("F32", 90, 41, seed=1),
    **{f"tiny.{n}": Tensor("U8", np.arange(n, dtype=np.uint8)) for n in range(1, 6)},
    "half": weights("BF16", 77, 13, seed=2),
    "empty": Tensor("F32", np.empty((0, 3), "<f4")),
    "odd": Tensor("U8", np.arange(255, dtype=np.uint8)),
    "long": weights("F16", 20001, seed=3),
    "deep": weights("F64", 5, 7, 11, seed=4),
}


@pytest.fixture(autouse=True, params=[4096, 16384])
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_direct, "_MOST", request.param)
    monkeypatch.setattr(_direct, "_LEAST", request.param)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the direct writes that are made."""
    made: list[int] = []
    real = _direct.DirectFile._write_directly

    def write(file: _direct.DirectFile, offset: int, memory: bytes) -> int:
        made.append(real(file, offset, memory))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(_direct.DirectFile, "_write_directly", write)
    return made


def of_file(root: Path) -> Path:
    return save(root / "in.safetensors", TENSORS)


def of_shards(root: Path) -> Path:
    names = list(TENSORS)
    return save_sharded(root / "in", *({name: TENSORS[name] for name in names[n::3]} for n in range(3)))


def of_pickle(root: Path) -> Path:
    (root / "in.bin").write_bytes(saved({name: to_torch(tensor) for name, tensor in TENSORS.items()}))
    return root / "in.bin"


def of_views(root: Path) -> Path:
    whole = torch.arange(1.0, 20001.0).view(100, 200)
    (root / "in.bin").write_bytes(saved({"a.weight": whole.t(), "b.weight": torch.randn(90, 90).t()}))
    return root / "in.bin"


def of_chunks(root: Path) -> Path:
    (root / "in").mkdir()
    save_chunked(root / "in", {(name,): to_torch(t) for name, t in TENSORS.items()}, grid=2, files=3)
    return root / "in"


SOURCES = (of_file, of_shards, of_pickle, of_views, of_chunks)
SEVERAL = ("--seed", "0-4")


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def both(root: Path, command: Callable[[Path], Sequence[str]], *options: str) -> dict[str, bytes]:
    """Run a command with and without direct writes; return what it wrote, which must be the same."""
    found = []
    for how in ("--no-direct", "--direct"):
        place = root / how
        place.mkdir()
        arguments = [*command(place), how, *options]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        found.append(contents(place))
    assert found[0]
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("threads", ["1", "2", "4"])
@pytest.mark.parametrize("options", [(), SEVERAL, ("--scope", "global"), ("--lambda", "0")])
@pytest.mark.parametrize("source", SOURCES)
def test_perturb(
    tmp_path: Path,
    source: Callable[[Path], Path],
    options: Sequence[str],
    threads: str,
    written: list[int],
) -> None:
    path = source(tmp_path)
    name = "out{seed}" if options == SEVERAL else "out"
    both(
        tmp_path,
        lambda place: ["perturb", str(path), "-o", str(place / f"{name}{path.suffix}"), *options],
        "--threads",
        threads,
    )
    assert written


def test_a_conversion(tmp_path: Path, written: list[int]) -> None:
    path = of_pickle(tmp_path)
    options = ("--to", "safetensors", "--dtype", "bfloat16")
    both(tmp_path, lambda place: ["perturb", str(path), "-o", str(place / "out.safetensors"), *options])
    assert written


def test_a_matrix_that_turns_out_to_be_left_as_it_is(tmp_path: Path, written: list[int]) -> None:
    # What only shows once noise was added is written a second time, over chunks that are on the disk.
    huge = np.full(30000, 1e-3, "<f4")
    huge[-1] = np.inf
    path = save(tmp_path / "in.safetensors", {"a": weights("F32", 3000, seed=1), "w": Tensor("F32", huge)})
    made = both(
        tmp_path,
        lambda place: ["perturb", str(path), "-o", str(place / "out.safetensors"), "--sigma", "0.1"],
    )
    assert made["out.safetensors"].endswith(huge.tobytes())
    assert written


def test_average(tmp_path: Path, written: list[int]) -> None:
    path = of_shards(tmp_path)
    made = CliRunner().invoke(app, ["perturb", str(path), "-o", str(tmp_path / "other")])
    assert made.exit_code == 0, made.output
    written.clear()
    both(
        tmp_path,
        lambda place: ["average", str(path), str(tmp_path / "other"), "-o", str(place / "out")],
    )
    assert written


def test_replay(tmp_path: Path, written: list[int]) -> None:
    path = of_file(tmp_path)
    out = tmp_path / "made.safetensors"
    made = CliRunner().invoke(app, ["perturb", str(path), "-o", str(out)])
    assert made.exit_code == 0, made.output
    written.clear()
    both(
        tmp_path,
        lambda place: ["replay", str(out), "--base", str(path), "-o", str(place / "out.safetensors")],
    )
    assert written


@pytest.mark.parametrize("engine", [(), ("--engine", "local")])
def test_shares(tmp_path: Path, engine: Sequence[str], written: list[int]) -> None:
    path = of_shards(tmp_path)
    wanted = ["perturb", str(path), "-o", str(tmp_path / "plain" / "out")]
    assert CliRunner().invoke(app, wanted).exit_code == 0

    def command(place: Path) -> Sequence[str]:
        if engine:
            return ["perturb", str(path), "-o", str(place / "out"), *engine]
        planned = CliRunner().invoke(app, ["plan", str(path), "-o", str(place / "out"), "--share-bytes", "1"])
        assert planned.exit_code == 0, planned.output
        return ["work", str(place / "out")]

    for how in ("--no-direct", "--direct"):
        assert bool(written) is False
        result = CliRunner().invoke(app, [*command(tmp_path / how), how])
        assert result.exit_code == 0, result.output
        if not engine:
            assert CliRunner().invoke(app, ["finish", str(tmp_path / how / "out")]).exit_code == 0
        assert contents(tmp_path / how / "out") == contents(tmp_path / "plain" / "out")
    assert written


def test_from_python(tmp_path: Path, written: list[int]) -> None:
    path = of_file(tmp_path)
    a, b = (tmp_path / f"{name}.safetensors" for name in "ab")
    noisytune_cli.perturb(path, a, direct=False)
    assert not written
    noisytune_cli.perturb(path, b, direct=True)
    assert written
    assert a.read_bytes() == b.read_bytes()
    written.clear()
    noisytune_cli.replay(b, tmp_path / "c.safetensors", base=path, direct=True)
    assert written
    assert (tmp_path / "c.safetensors").read_bytes() == a.read_bytes()


def test_what_would_fill_the_memory_is_written_directly(
    tmp_path: Path, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = of_file(tmp_path)
    monkeypatch.setattr(_direct, "_WORTH", 0)
    monkeypatch.setattr(_direct, "_LEAST_UNASKED", 0)
    monkeypatch.setattr(_direct, "free_memory", lambda: 2 * os.path.getsize(path) + 2)
    noisytune_cli.perturb(path, tmp_path / "a.safetensors")
    assert not written
    monkeypatch.setattr(_direct, "free_memory", lambda: 2 * os.path.getsize(path))
    noisytune_cli.perturb(path, tmp_path / "b.safetensors")
    assert written

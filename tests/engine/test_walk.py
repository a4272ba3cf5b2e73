"""The walk of a tensor: bytes and manifests are the reference's, whatever the tiles, threads and reads."""

from __future__ import annotations

import itertools
import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from checkpoints import FLOATS, Tensor, noised, numbers, save, split, std32, weights

from noisytune_cli.commands import perturb as command
from noisytune_cli.commands.perturb import Perturbed, Request, perturb
from noisytune_cli.engine import walk as walk_module
from noisytune_cli.engine.threads import Worker
from noisytune_cli.engine.walk import Walk
from noisytune_cli.manifest.read import read_manifest
from noisytune_cli.records import NoiseSpec

#: Sizes on both sides of a counter's four elements, of a tile of 32 bytes, and of each other.
TENSORS = {
    f"{dtype}.{elements}": weights(dtype, elements, seed=elements)
    for dtype in FLOATS
    for elements in (2, 3, 5, 16, 1237)
}
COPIED = {"ids": Tensor("I64", np.arange(500)), "mask": Tensor("BOOL", np.array([0, 1, 2]))}
SEED = 2**64 - 1
WIDE = weights("F32", 64)


def run(source: Path, noise: NoiseSpec, **options: Any) -> Perturbed:
    """Perturb into a new file beside the source."""
    taken = sum(1 for _ in source.parent.glob("out-*"))
    mmap = options.pop("mmap", False)
    return perturb(Request(str(source), noise, mmap=mmap), str(source.parent / f"out-{taken}"), **options)


def content(result: Perturbed) -> tuple[bytes, bytes]:
    return result.output.read_bytes(), result.manifest_path.read_bytes()


def chunks(content: bytes, size: int) -> list[bytes]:
    return [content[at : at + size] for at in range(0, len(content), size)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("walk") / "in.safetensors", TENSORS | COPIED)


@pytest.fixture(scope="module", params=itertools.product(("uniform", "gaussian"), ("matrix", "global")))
def case(request: pytest.FixtureRequest, source: Path) -> tuple[NoiseSpec, Perturbed]:
    """Noise, and what one thread with tiles of the usual size makes of the source."""
    distribution, scope = request.param
    noise = NoiseSpec(seed=SEED, distribution=distribution, scope=scope)
    return noise, run(source, noise, threads=1)


def test_equals_the_reference(source: Path, case: tuple[NoiseSpec, Perturbed]) -> None:
    noise, result = case
    header, found = split(result.output.read_bytes())
    assert header == split(source.read_bytes())[0]
    assert found == noised(TENSORS, noise) | {name: tensor.data for name, tensor in COPIED.items()}


def test_receipts_equal_the_reference(source: Path, case: tuple[NoiseSpec, Perturbed]) -> None:
    noise, result = case
    _, before = split(source.read_bytes())
    _, after = split(result.output.read_bytes())
    for receipt in result.manifest.receipts:
        name = receipt.step.tensor.name
        assert receipt.source_digest == f"blake3:{blake3(before[name]).hexdigest()}"
        assert receipt.digest == f"blake3:{blake3(after[name]).hexdigest()}"
        if name in COPIED:
            assert (receipt.reason, receipt.std, receipt.unchanged) == ("not-float", None, 0)
            continue
        size = len(before[name]) // TENSORS[name].values.size
        pairs = zip(chunks(before[name], size), chunks(after[name], size), strict=True)
        assert receipt.unchanged == sum(a == b for a, b in pairs)
        if noise.scope == "matrix":
            assert receipt.std == std32(TENSORS[name])


@pytest.mark.parametrize(
    ("tile", "buffer", "threads"),
    [
        (32, 0, 1),
        (32, 0, 5),
        (32, 1 << 20, 2),
        (96, 512, 2),
        (96, 512, 5),
        (1056, 0, 5),
        (4096, 512, 1),
        (walk_module.TILE_BYTES, 0, 2),
        (walk_module.TILE_BYTES, 1 << 20, 5),
    ],
)
def test_tiles_threads_and_slabs_change_nothing(
    source: Path,
    case: tuple[NoiseSpec, Perturbed],
    tile: int,
    buffer: int,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noise, expected = case
    monkeypatch.setattr(command, "Walk", partial(Walk, tile_bytes=tile))
    monkeypatch.setattr(walk_module, "_LARGEST_KEPT", buffer)
    assert content(run(source, noise, threads=threads)) == content(expected)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_what_may_be_kept_is_read_once_whatever_the_threads(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [6000, 10, 8000, 300, 7000, 7900, 20, 6500, 8000, 40, 5000, 8000]
    tensors = {f"layer.{n}.weight": weights("F32", size // 10, 10) for n, size in enumerate(sizes)}
    source = save(tmp_path / "in.safetensors", tensors)
    expected = content(run(source, NoiseSpec(), threads=1))
    read: list[int] = []
    original = walk_module.TensorWalk._read

    def counting(self: walk_module.TensorWalk, worker: Worker, index: int) -> memoryview:
        data = original(self, worker, index)
        read.append(len(data))
        return data

    monkeypatch.setattr(walk_module.TensorWalk, "_read", counting)
    monkeypatch.setattr(command, "Walk", partial(Walk, tile_bytes=1024))
    monkeypatch.setattr(walk_module, "_LARGEST_KEPT", 32_000)
    monkeypatch.setattr(walk_module, "_ALL_KEPT", 65_000)
    assert content(run(source, NoiseSpec(), threads=threads)) == expected
    assert sum(read) == 4 * sum(sizes)


@pytest.mark.parametrize("tile", [32, 1056])
def test_mapped_and_misaligned_reads_change_nothing(
    source: Path, case: tuple[NoiseSpec, Perturbed], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise, expected = case
    monkeypatch.setattr(command, "Walk", partial(Walk, tile_bytes=tile))
    monkeypatch.setattr(walk_module, "_LARGEST_KEPT", 512)
    assert content(run(source, noise, mmap=True, threads=2)) == content(expected)
    for pad in (1, 3):  # data that begins at an odd offset
        shifted = save(source.parent / f"shifted-{pad}.safetensors", TENSORS | COPIED, pad=pad)
        _, found = split(run(shifted, noise, mmap=True, threads=2).output.read_bytes())
        assert found == split(expected.output.read_bytes())[1]


def test_a_real_file_with_misaligned_data(data: Path, tmp_path: Path) -> None:
    source = data / "checkpoints/mlx-kan/model.safetensors"
    results = [
        perturb(Request(str(source), NoiseSpec(), mmap=mmap), str(tmp_path / f"{mmap}.safetensors"))
        for mmap in (False, True)
    ]
    assert len({content(result) for result in results}) == 1
    assert results[0].manifest.receipts[0].step.tensor.offset % 4


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_a_rounding_that_float64_cannot_decide(
    scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk_module, "round_std", lambda parts: None)
    monkeypatch.setattr(walk_module, "_LARGEST_KEPT", 512)
    monkeypatch.setattr(command, "Walk", partial(Walk, tile_bytes=64))
    tensors = {"small": weights("F32", 100), "large": weights("BF16", 1000, centre=1.0)}
    noise = NoiseSpec(scope=scope)  # type: ignore[arg-type]
    result = run(save(tmp_path / "in.safetensors", tensors), noise, threads=3)
    assert split(result.output.read_bytes())[1] == noised(tensors, noise)


def test_global_scope_takes_in_constants_and_single_elements(tmp_path: Path) -> None:
    tensors = {
        "w": weights("F32", 30, 10),
        "constant": numbers("F32", 1.0, 1.0, 1.0),
        "logit_scale": Tensor("F32", np.array(2.5, "<f4")),
    }
    noise = NoiseSpec(scope="global")
    result = run(save(tmp_path / "in.safetensors", tensors), noise)
    assert split(result.output.read_bytes())[1] == noised(tensors, noise)
    assert [r.action for r in result.manifest.receipts] == ["perturb"] * 3


def test_global_scope_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    tensors = {"w": weights("F32", 300), "nan": numbers("F32", 1.0, float("nan"))}
    noise = NoiseSpec(scope="global")
    result = run(save(tmp_path / "in.safetensors", tensors), noise)
    found = split(result.output.read_bytes())[1]
    assert found["w"] == noised({"w": tensors["w"]}, noise)["w"]
    assert found["nan"] == tensors["nan"].data


@pytest.mark.parametrize("scope", ["matrix", "global"])
@pytest.mark.parametrize("buffer", [0, 1 << 20])
def test_progress_adds_up(scope: str, buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module, "_LARGEST_KEPT", buffer)
    monkeypatch.setattr(command, "Walk", partial(Walk, tile_bytes=64))
    promised, done = [], []

    @contextmanager
    def progress(nbytes: int) -> Any:
        promised.append(nbytes)
        yield done.append

    tensors = TENSORS | COPIED | {"constant": numbers("F32", *[1.0] * 50)}
    run(save(tmp_path / "in.safetensors", tensors), NoiseSpec(scope=scope), progress=progress, threads=2)  # type: ignore[arg-type]
    assert promised == [sum(done)]


def test_golden_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change here is a change of the noise stream or of the manifest's layout: both are contracts."""
    monkeypatch.setattr(command, "__version__", "golden")
    golden = json.loads((Path(__file__).parents[1] / "golden" / "perturb.json").read_text())
    ramp = (np.arange(600) * 37 % 255 - 127) * 2.0**-9
    tensors = {
        "encoder.layer.0.weight": Tensor("F32", ramp.astype("<f4").reshape(20, 30)),
        "encoder.layer.0.bias": Tensor("F16", ramp[:77].astype("<f2")),
        "encoder.layer.1.weight": Tensor("F64", ramp.reshape(30, 20)),
        "encoder.layer.1.bias": numbers("BF16", *(ramp[:64])),
        "position_ids": Tensor("I64", np.arange(8)),
    }
    source = save(tmp_path / "golden.safetensors", tensors, {"format": "pt"})
    for distribution in ("uniform", "gaussian"):
        result = run(source, NoiseSpec(seed=42, distribution=distribution))
        digests = [f"blake3:{blake3(part).hexdigest()}" for part in content(result)]
        assert digests == [golden[distribution]["output"], golden[distribution]["manifest"]]


def test_a_spread_too_small_for_float32_is_not_called_constant(tmp_path: Path) -> None:
    tiny = numbers("F64", *([0.0] * 7 + [1e-200]))
    source = save(tmp_path / "in.safetensors", {"flat": numbers("F64", *[3.0] * 8), "tiny": tiny, "w": WIDE})
    result = run(source, NoiseSpec())
    reasons = {r.step.tensor.name: (r.reason, r.std) for r in result.manifest.receipts}
    assert reasons["flat"] == ("constant", 0.0)
    assert reasons["tiny"] == ("unrepresentable", 0.0)
    assert read_manifest(result.manifest_path).is_original

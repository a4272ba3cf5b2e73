"""Every format, by name: what its Source and Sink promise."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from checkpoints import Tensor, Tensors, noised, numbers, safetensors_bytes, weights
from pickles import torch_bytes

from noisytune_cli import formats
from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.errors import InputInvalid, InputUnreadable, Mismatch, NoisytuneError, ResourceExhausted
from noisytune_cli.records import NoiseSpec

NAMES = sorted(m.name for m in pkgutil.iter_modules(formats.__path__) if not m.name.startswith("_"))

#: For each format, how a file of it is built without the package.
BUILD: dict[str, Callable[[Tensors], bytes]] = {
    "safetensors": lambda tensors: safetensors_bytes(
        tensors, {"format": "pt", "note": "kept"}, pad=13, order="reversed"
    ),
    "torch": torch_bytes,
}

FLOAT = weights("F32", 13, 5)
TENSORS = {
    "w": FLOAT,
    "ids": Tensor("I64", np.arange(7)),
    "half": weights("F16", 33),
    "empty": Tensor("F32", np.empty((0, 3), "<f4")),
    "nan": numbers("BF16", 1.0, float("nan")),
    "one": numbers("F64", 1.0),
}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def module(name: str) -> ModuleType:
    return importlib.import_module(f"{formats.__name__}.{name}")


@pytest.fixture
def path(name: str, tmp_path: Path) -> Path:
    path = tmp_path / f"in.{name}"
    path.write_bytes(BUILD[name](TENSORS))
    return path


@pytest.mark.parametrize("mmap", [False, True])
def test_every_tensor_is_found_and_read(module: ModuleType, path: Path, mmap: bool) -> None:
    source = module.open_source(path, "a name", mmap)
    assert source.path == path
    assert source.name == "a name"
    assert source.size == path.stat().st_size
    found = {spec.name: spec for spec in source.tensors}
    assert found.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        spec = found[key]
        assert (spec.dtype, spec.shape, spec.file) == (tensor.dtype, tensor.values.shape, "a name")
        assert spec.nbytes == len(tensor.data)
        buffer = memoryview(bytearray(spec.nbytes))
        assert bytes(source.read(spec, 0, buffer)) == tensor.data
        if spec.nbytes > 4:
            assert bytes(source.read(spec, 3, buffer[:1])) == tensor.data[3:4]
    source.check_unchanged()
    source.close()
    source.close()


def test_a_twin_filled_in_any_order_is_the_same_file(module: ModuleType, path: Path, tmp_path: Path) -> None:
    source = module.open_source(path, "in", False)
    sink = source.create_sink(tmp_path / "twin")
    for spec in reversed(source.tensors):
        data = TENSORS[spec.name].data
        middle = len(data) // 2
        sink.write(spec, middle, memoryview(data)[middle:])
        sink.write(spec, 0, data[:middle])
    sink.finish()
    sink.abort()
    source.close()
    assert (tmp_path / "twin").read_bytes() == path.read_bytes()


def test_a_twin_never_replaces_a_file(module: ModuleType, path: Path, tmp_path: Path) -> None:
    (tmp_path / "twin").write_bytes(b"precious")
    source = module.open_source(path, "in", False)
    with pytest.raises(ResourceExhausted):
        source.create_sink(tmp_path / "twin")
    source.close()
    assert (tmp_path / "twin").read_bytes() == b"precious"


def test_no_noise_gives_the_same_file(path: Path, tmp_path: Path) -> None:
    before = path.stat()
    result = perturb(Request(str(path), NoiseSpec(lam=0.0)), str(tmp_path / "out"))
    assert result.output.read_bytes() == path.read_bytes()
    assert {r.reason for r in result.manifest.receipts if r.step.tensor.dtype in ("F32", "F16")} == {
        "lambda-zero",
        "empty",
    }
    after = path.stat()
    assert (after.st_mtime_ns, after.st_mode, after.st_size) == (
        before.st_mtime_ns,
        before.st_mode,
        before.st_size,
    )


def test_noise_changes_the_bytes_of_its_tensors_alone(module: ModuleType, path: Path, tmp_path: Path) -> None:
    result = perturb(Request(str(path), NoiseSpec()), str(tmp_path / "out"))
    before, after = module.open_source(path, "in", False), module.open_source(result.output, "in", False)
    assert after.tensors == before.tensors
    assert after.header_digest == before.header_digest
    assert result.output.stat().st_size == path.stat().st_size
    expected = noised({"w": TENSORS["w"], "half": TENSORS["half"]}, NoiseSpec())
    for spec in after.tensors:
        found = bytes(after.read(spec, 0, memoryview(bytearray(spec.nbytes))))
        assert found == expected.get(spec.name, TENSORS[spec.name].data)
    before.close()
    after.close()


def test_a_damaged_file_is_refused(module: ModuleType, path: Path) -> None:
    content = path.read_bytes()
    for damaged in (
        b"",
        content[:7],
        content[:-1],
        content + b"\0",
        content[: len(content) // 2],
        b"\xff" * 64,
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputInvalid):
            module.open_source(path, "in", False)


def test_a_missing_file_and_a_folder(module: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputUnreadable):
        module.open_source(tmp_path / "nowhere", "in", False)
    with pytest.raises(NoisytuneError):
        module.open_source(tmp_path, "in", False)


def test_a_file_that_changes_is_noticed(module: ModuleType, path: Path) -> None:
    source = module.open_source(path, "in", False)
    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(Mismatch):
        source.check_unchanged()
    source.close()

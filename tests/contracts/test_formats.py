"""Every format, by name, and every way a file of it may be laid out: what its Source and Sink promise."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from checkpoints import Tensor, Tensors, noised, numbers, safetensors_bytes, weights
from chunked import save_chunked
from pickles import saved, to_torch, torch_bytes

from noisytune_cli.checkpoint import formats
from noisytune_cli.checkpoint.checkpoint import open_checkpoint
from noisytune_cli.checkpoint.formats._direct import Room
from noisytune_cli.commands.perturb import Perturbed, Request, perturb
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.errors import InputInvalid, InputUnreadable, Mismatch, NoisytuneError, ResourceExhausted
from noisytune_cli.records import NoiseSpec

NAMES = sorted(m.name for m in pkgutil.iter_modules(formats.__path__) if not m.name.startswith("_"))


@dataclass(frozen=True)
class Layout:
    """A way to store tensors: the format's name, what writes them into a folder, and which file to open."""

    format: str
    write: Callable[[Path, Tensors], object]
    file: str

    @property
    def is_folder(self) -> bool:
        return self.format == "dcp"


def _file(name: str, build: Callable[[Tensors], bytes]) -> Callable[[Path, Tensors], object]:
    return lambda folder, tensors: (folder / name).write_bytes(build(tensors))


def _torch(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors in torch, equal ones on one storage."""
    made: dict[int, torch.Tensor] = {}
    return {name: made.setdefault(id(tensor.values), to_torch(tensor)) for name, tensor in tensors.items()}


def _transposed(tensors: Tensors) -> bytes:
    return saved({k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in _torch(tensors).items()})


def _training(tensors: Tensors) -> bytes:
    """A training checkpoint: the model beside an optimizer that has a state for each of its tensors."""
    state = dict(enumerate(torch.full((3,), 0.5) for _ in tensors))
    optimizer = {"state": state, "param_groups": [{"lr": 0.1, "params": list(state)}]}
    return saved({"epoch": 3, "state_dict": _torch(tensors), "optimizer": optimizer})


def _chunks(inside: tuple[str, ...], grid: int, files: int) -> Callable[[Path, Tensors], object]:
    """The same in chunks; `inside` is where in what was saved the model lies."""

    def write(folder: Path, tensors: Tensors) -> object:
        model = {(*inside, name): tensor for name, tensor in _torch(tensors).items()}
        state = {("optimizer", "state", str(i), "exp_avg"): torch.full((3,), 0.5) for i in range(len(model))}
        return save_chunked(
            folder, {**model, **state, ("optimizer", "param_groups", 0, "lr"): 0.1}, grid=grid, files=files
        )

    return write


LAYOUTS = {
    "safetensors": Layout(
        "safetensors",
        _file(
            "in.safetensors",
            lambda tensors: safetensors_bytes(
                tensors, {"format": "pt", "note": "kept"}, pad=13, order="reversed"
            ),
        ),
        "in.safetensors",
    ),
    "torch ZIP": Layout("torch", _file("in.pt", lambda tensors: saved(_torch(tensors))), "in.pt"),
    "torch legacy": Layout("torch", _file("in.pt", lambda t: torch_bytes(t, zipped=False)), "in.pt"),
    "torch nested": Layout("torch", _file("in.ckpt", _training), "in.ckpt"),
    "torch transposed": Layout("torch", _file("in.bin", _transposed), "in.bin"),
    "chunks of one process": Layout("dcp", _chunks(("model",), 1, 1), ".metadata"),
    "chunks in a grid": Layout("dcp", _chunks(("app", "model"), 2, 3), ".metadata"),
    "chunks of rows, flat": Layout("dcp", _chunks((), 3, 2), ".metadata"),
}

FLOAT = weights("F32", 13, 5)
TENSORS = {
    "w": FLOAT,
    "ids": Tensor("I64", np.arange(7)),
    "half": weights("F16", 33),
    "empty": Tensor("F32", np.empty((0, 3), "<f4")),
    "nan": numbers("BF16", 1.0, float("nan")),
    "one": numbers("F64", 1.0),
    "deep": weights("F64", 3, 4, 2, 5),
}
NOISED = ("w", "half", "deep")


def test_every_format_has_a_layout() -> None:
    assert sorted({layout.format for layout in LAYOUTS.values()}) == NAMES


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


@pytest.fixture
def module(layout: Layout) -> ModuleType:
    return importlib.import_module(f"{formats.__name__}.{layout.format}")


@pytest.fixture
def path(layout: Layout, tmp_path: Path) -> Path:
    """The file to open, of a checkpoint alone in its folder."""
    return laid(layout, tmp_path / "in", TENSORS)


def laid(layout: Layout, folder: Path, tensors: Tensors) -> Path:
    folder.mkdir()
    layout.write(folder, tensors)
    return folder / layout.file


def run(layout: Layout, path: Path, out: Path, noise: NoiseSpec | None = None) -> tuple[Perturbed, Path]:
    """Perturb, and return the result with the file of the output that corresponds to `path`."""
    source = path.parent if layout.is_folder else path
    result = perturb(Request(str(source), noise or NoiseSpec()), str(out))
    return result, result.output / layout.file if layout.is_folder else result.output


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def values(module: ModuleType, path: Path) -> dict[str, bytes]:
    """Every tensor's bytes."""
    source = module.open_source(path, path.name, False)
    found = {
        spec.name: bytes(source.read(spec, 0, memoryview(bytearray(spec.nbytes)))) for spec in source.tensors
    }
    source.check_sums()
    source.close()
    return found


@pytest.mark.parametrize("mmap", [False, True])
def test_every_tensor_is_found_and_read(module: ModuleType, path: Path, mmap: bool) -> None:
    source = module.open_source(path, path.name, mmap)
    assert (source.path, source.name) == (path, path.name)
    assert source.size == sum((path.parent / file).stat().st_size for file in source.files)
    assert {*source.files} == {*contents(path.parent)}
    found = {spec.name: spec for spec in source.tensors}
    assert found.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        spec = found[key]
        assert (spec.dtype, spec.shape, spec.file) == (tensor.dtype, tensor.values.shape, path.name)
        assert spec.nbytes == len(tensor.data)
        buffer = memoryview(bytearray(spec.nbytes))
        assert bytes(source.read(spec, 0, buffer)) == tensor.data
        size = spec.nbytes // max(1, spec.elements)
        for start in range(0, spec.nbytes, max(1, size)):
            for length in (size, 2 * size, 7 * size):
                if start + length <= spec.nbytes:
                    part = source.read(spec, start, buffer[:length])
                    assert bytes(part) == tensor.data[start : start + length]
    source.check_unchanged()
    source.check_sums()
    source.close()
    source.close()


@pytest.mark.parametrize("room", [None, 8 << 20, 1024], ids=["buffered", "direct", "little room"])
def test_a_twin_filled_in_any_order_is_the_same_file(
    module: ModuleType, path: Path, tmp_path: Path, room: int | None
) -> None:
    source = module.open_source(path, path.name, False)
    (tmp_path / "twin").mkdir()
    with nullcontext() if room is None else Room(512, room) as chunks:
        sink = source.create_sink(tmp_path / "twin" / path.name, room=chunks)
        for spec in reversed(source.tensors):
            data = TENSORS[spec.name].data
            middle = spec.elements // 2 * (len(data) // max(1, spec.elements))
            sink.write(spec, middle, memoryview(data)[middle:])
            sink.write(spec, 0, data[:middle])
        sink.finish()
        sink.abort()
    source.close()
    assert contents(tmp_path / "twin") == contents(path.parent)


def test_a_twin_never_replaces_a_file(module: ModuleType, path: Path, tmp_path: Path) -> None:
    source = module.open_source(path, path.name, False)
    for name in source.files:
        folder = tmp_path / f"twin of {name}"
        folder.mkdir()
        (folder / name).write_bytes(b"precious")
        with pytest.raises(ResourceExhausted):
            source.create_sink(folder / path.name)
        assert (folder / name).read_bytes() == b"precious"
    source.close()


def test_no_noise_gives_the_same_file(layout: Layout, path: Path, tmp_path: Path) -> None:
    before = path.stat()
    result, out = run(layout, path, tmp_path / "out", NoiseSpec(lam=0.0))
    for name in contents(path.parent):
        assert (out.parent / (name if layout.is_folder else out.name)).read_bytes() == (
            path.parent / name
        ).read_bytes()
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


def test_noise_changes_the_bytes_of_its_tensors_alone(
    layout: Layout, module: ModuleType, path: Path, tmp_path: Path
) -> None:
    _, out = run(layout, path, tmp_path / "out")
    before, after = module.open_source(path, "in", False), module.open_source(out, "in", False)
    assert after.tensors == before.tensors
    assert after.header_digest == before.header_digest
    assert after.size == before.size
    expected = noised({name: TENSORS[name] for name in NOISED}, NoiseSpec())
    assert values(module, out) == {name: expected.get(name, TENSORS[name].data) for name in TENSORS}
    before.close()
    after.close()


def test_an_output_verifies_and_replays(layout: Layout, path: Path, tmp_path: Path) -> None:
    result, _ = run(layout, path, tmp_path / "out", NoiseSpec(seed=3, distribution="gaussian"))
    base = str(path.parent if layout.is_folder else path)
    assert verify(str(result.output)).ok
    assert verify(str(result.output), base=base).ok
    again = replay(str(result.manifest_path), str(tmp_path / "again"), base=base)
    written = contents(result.output) if layout.is_folder else {"": result.output.read_bytes()}
    remade = contents(again.output) if layout.is_folder else {"": again.output.read_bytes()}
    assert remade == written


def test_a_flipped_bit_anywhere_is_a_mismatch(layout: Layout, path: Path, tmp_path: Path) -> None:
    result, out = run(layout, path, tmp_path / "out")
    source = open_checkpoint(str(result.output))
    names = source.sources[0].files
    source.close()
    for name in names:
        file = out.parent / name
        whole = file.read_bytes()
        for place in range(5, len(whole), max(1, len(whole) // 15)):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            assert not verify(str(result.output)).ok, (name, place)
        file.write_bytes(whole)
    assert verify(str(result.output)).ok


def test_ties_and_buffers(layout: Layout, module: ModuleType, tmp_path: Path) -> None:
    table = weights("F32", 9, 4)
    tensors = {
        "lm_head.weight": table,
        "model.embed_tokens.weight": table,
        "model.rotary_emb.inv_freq": weights("F32", 8),
        "bn.weight": weights("F32", 6),
        "bn.running_mean": weights("F32", 6, seed=1),
        "bn.running_var": weights("F32", 6, seed=2, centre=1.0),
        "bn.num_batches_tracked": Tensor("I64", np.array(7)),
    }
    path = laid(layout, tmp_path / "in", tensors)
    result, out = run(layout, path, tmp_path / "out")
    expected = noised(
        {name: tensors[name] for name in ("lm_head.weight", "model.embed_tokens.weight", "bn.weight")},
        NoiseSpec(),
        {"lm_head.weight": "model.embed_tokens.weight"},
    )
    found = values(module, out)
    assert found == {name: expected.get(name, tensor.data) for name, tensor in tensors.items()}
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"] != table.data
    reasons = {r.step.tensor.name: r.reason for r in result.manifest.receipts}
    assert [reasons[f"bn.{name}"] for name in ("running_mean", "running_var")] == ["buffer", "buffer"]
    assert reasons["model.rotary_emb.inv_freq"] == "buffer"


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
    for name in contents(path.parent):
        source = module.open_source(path, path.name, False)
        whole = (path.parent / name).read_bytes()
        (path.parent / name).write_bytes(whole + b"\0")
        with pytest.raises(Mismatch):
            source.check_unchanged()
        (path.parent / name).write_bytes(whole)
        source.close()


def test_training_state_is_carried_over(tmp_path: Path) -> None:
    stored: Mapping[str, Tensor] = {"w": FLOAT}
    for layout in (LAYOUTS["torch nested"], LAYOUTS["chunks in a grid"]):
        path = laid(layout, tmp_path / f"in-{layout.format}", stored)
        result, _ = run(layout, path, tmp_path / f"out-{layout.format}")
        assert [r.step.tensor.name for r in result.manifest.receipts] == ["w"]

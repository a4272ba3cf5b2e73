"""What must hold for any bytes whatever: refused with a known error, or read as what they say.

Refused means a NoisytuneError with exit code 3, 4 or 8 and one printable line, at the cost of at most two
seconds of CPU time and 64 MB (inputs are small). Read means that everything comes back: a weight file's twin
is the file, a manifest is written as it was read, and where there is another reader, it agrees.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import safetensors
import torch
from chunked import save_chunked
from differences import documented
from hostile import weight_file
from malformed_indexes import FIRST, INDEX, SECOND

from noisytune_cli.checkpoint.formats import Source, open_source
from noisytune_cli.checkpoint.formats.dcp import open_source as open_chunked
from noisytune_cli.checkpoint.index import read_index
from noisytune_cli.commands.inspect import inspect
from noisytune_cli.errors import InputInvalid, NoisytuneError
from noisytune_cli.manifest.read import parse, read_manifest
from noisytune_cli.manifest.write import encode
from noisytune_cli.output import staging
from noisytune_cli.reading import JsonFault

CPU_SECONDS = 2.0
GROWTH_BYTES = 64 << 20
CHUNKS = "__0_0.distcp"
_STATUS = Path("/proc/self/status")

#: A property takes the bytes and an empty folder, and raises what is no NoisytuneError if it does not hold.
Property = Callable[[bytes, Path], None]

#: Holds what runs inside to its time and memory.
Bounds = Callable[[], AbstractContextManager[None]]


@contextmanager
def bounded() -> Iterator[None]:
    """Hold what runs inside to its CPU time and memory."""
    before = peak(reset=True)
    previous = signal.signal(signal.SIGPROF, too_slow)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    grown = peak() - before
    assert grown < GROWTH_BYTES, f"it took {grown:,} bytes"


def holds(check: Property, content: bytes, folder: Path, bounds: Bounds = bounded) -> bool:
    """Whether `content` was accepted; raises AssertionError, or whatever the bug raises, if `check` fails."""
    refusal: NoisytuneError | None = None
    try:
        with bounds():
            check(content, folder)
    except NoisytuneError as error:
        refusal = error
    assert refusal is None or (refusal.exit_code in (3, 4, 8) and refusal.line().isprintable()), refusal
    return refusal is None


def header(content: bytes, folder: Path) -> None:
    """A safetensors file: agrees with the safetensors package, but for the documented differences."""
    path = folder / "f.safetensors"
    path.write_bytes(content)
    try:
        official = {name: bytes(info["data"]) for name, info in safetensors.deserialize(content)}
    except safetensors.SafetensorError:
        official = None
    try:
        source = open_source(path, "f", False)
    except NoisytuneError as error:
        if official is None or documented(error.line()):
            raise
        raise AssertionError("a difference that is not documented") from error
    assert _twin(source, folder) == content
    assert {
        t.name: bytes(source.read(t, 0, memoryview(bytearray(t.nbytes)))) for t in source.tensors
    } == official
    source.close()


def pickle(content: bytes, folder: Path) -> None:
    """A PyTorch checkpoint: its twin is the file, and where torch.load(weights_only=True) reads it, alike."""
    path = folder / "f.pt"
    path.write_bytes(content)
    source = open_source(path, "f", False)
    assert _twin(source, folder) == content
    stored = [bytes(source.read(t, 0, memoryview(bytearray(t.nbytes)))) for t in source.tensors]
    source.close()
    loaded = _loaded_by_torch(path)
    assert loaded is None or all(data in loaded for data in stored)


def _loaded_by_torch(path: Path) -> list[bytes] | None:
    """The bytes of every tensor in a file, or None where torch does not load it, for whatever reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of protocols that torch does not write
        try:
            value = torch.load(path, weights_only=True)
        except Exception:  # it has no error of its own: anything may come out of a damaged pickle
            return None
    return [tensor.detach().numpy().tobytes() for tensor in _tensors_in(value)]


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    """All tensors in what was loaded."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


def index(content: bytes, folder: Path) -> None:
    """An index beside two valid shards: says what a lenient reader finds, and fits the shards."""
    for name, names in ((FIRST, "ab"), (SECOND, "c")):
        (folder / name).write_bytes(weight_file(*names))
    (folder / INDEX).write_bytes(content)
    shard_of = read_index(folder, INDEX).shard_of
    assert shard_of == json.loads(content)["weight_map"]
    result = inspect(str(folder), headers_only=True)
    assert {row.name: row.file for row in result.tensors} == shard_of


def config(content: bytes, folder: Path) -> None:
    """A config beside valid weights: whatever it says, the weights are listed."""
    (folder / "model.safetensors").write_bytes(weight_file("wte.weight", "lm_head.weight"))
    (folder / "config.json").write_bytes(content)
    assert len(inspect(str(folder), headers_only=True).tensors) == 2


def manifest(content: bytes, folder: Path) -> None:
    """A manifest: what is accepted is written again as it means, and nothing in it leaves the folder."""
    path = folder / "noisytune.json"
    path.write_bytes(content)
    found = read_manifest(path).manifest
    again = parse(encode(found))
    assert again == found
    names = [file.name for file in found.source.files] + [name for name, _ in found.copied]
    assert all((folder / name).resolve().is_relative_to(folder.resolve()) for name in names)


def metadata(content: bytes, folder: Path) -> None:
    """The `.metadata` of chunks: what is accepted can be read to its end."""
    _chunked(folder, content, None)


def chunks(content: bytes, folder: Path) -> None:
    """A file of chunks beside the `.metadata` that they were written with."""
    _chunked(folder, None, content)


@functools.cache
def chunked_files() -> dict[str, bytes]:
    """The files of a small checkpoint in chunks: a tensor in four of them, and a value."""
    with tempfile.TemporaryDirectory() as scratch:
        values = {("model", "w"): torch.arange(24.0).reshape(4, 6), ("step",): 7}
        folder = save_chunked(Path(scratch), values, files=1)
        return {name: (folder / name).read_bytes() for name in (".metadata", CHUNKS)}


def _chunked(folder: Path, metadata: bytes | None, chunks: bytes | None) -> None:
    intact = chunked_files()
    (folder / ".metadata").write_bytes(intact[".metadata"] if metadata is None else metadata)
    (folder / CHUNKS).write_bytes(intact[CHUNKS] if chunks is None else chunks)
    source = open_chunked(folder / ".metadata", ".metadata", False)
    try:
        for tensor in source.tensors:
            data = source.read(tensor, 0, memoryview(bytearray(tensor.nbytes)))
            assert len(data) == tensor.nbytes
        source.check_unchanged()
        source.check_sums()
    finally:
        source.close()


def moves(content: bytes, folder: Path) -> None:
    """What a killed run says it moved: whatever that is, only files that it can have moved are removed."""
    output, precious = folder / "out", folder / "precious"
    precious.write_bytes(b"somebody else's")
    stage, lock = staging.create(folder, output)
    try:
        (stage / staging._MOVES).write_bytes(content)
        try:
            _, names, _ = staging._announced(lock)
        except JsonFault as fault:
            raise InputInvalid("no announcement", path=stage, why=fault.why, next_step="None") from fault
        assert all("/" not in name and name not in ("", ".", "..") for name in names)
    finally:
        os.close(lock)
        assert staging.clear_dead(folder, output) == (stage.name,)
        assert precious.read_bytes() == b"somebody else's"


def _twin(source: Source, folder: Path) -> bytes:
    """The bytes of the file that is written from all that is read of `source`."""
    twin = folder / "twin"
    twin.unlink(missing_ok=True)
    sink = source.create_sink(twin)
    try:
        for tensor in source.tensors:
            sink.write(tensor, 0, bytes(source.read(tensor, 0, memoryview(bytearray(tensor.nbytes)))))
        source.check_unchanged()
        source.check_sums()
        sink.finish()
    finally:
        sink.abort()
    return twin.read_bytes()


def too_slow(signum: int, frame: FrameType | None) -> NoReturn:
    raise AssertionError(f"it took more than {CPU_SECONDS} s of CPU time")


def peak(*, reset: bool = False) -> int:
    """Return the most bytes that were resident so far, counted from now if `reset`; 0 where none counts."""
    if not _STATUS.exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    return int(found[1]) * 1024 if found else 0

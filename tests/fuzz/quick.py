"""The readers without files: bytes in memory, thousands a second, for runs that coverage guides.

Each property is as those of `properties.py`: it raises a NoisytuneError for what is refused, and compares
what is accepted with another reader where there is one.
"""

from __future__ import annotations

import fnmatch
import io
import json
import os
import resource
import signal
import zipfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors
from differences import documented

from fuzz.properties import CPU_SECONDS, GROWTH_BYTES, too_slow
from noisytune_cli import reading
from noisytune_cli.checkpoint.config import Hyperparameters, library_of, read_config
from noisytune_cli.checkpoint.formats.dcp.metadata import read_metadata
from noisytune_cli.checkpoint.formats.safetensors.header import PREFIX, HeaderFault, header_end, parse_header
from noisytune_cli.checkpoint.formats.torch.archive import read_legacy, read_zip
from noisytune_cli.checkpoint.formats.torch.globals import StoredTensor
from noisytune_cli.checkpoint.formats.torch.pickle import MAX_OPCODES
from noisytune_cli.checkpoint.formats.torch.state_dict import declared_by, sort_content
from noisytune_cli.checkpoint.formats.torch.values import PickleFault
from noisytune_cli.checkpoint.formats.torch.zip import ZipFault, read_records
from noisytune_cli.checkpoint.index import read_index
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.manifest import read as read_manifest
from noisytune_cli.manifest.fields import ManifestFault
from noisytune_cli.manifest.mixture import read_mix
from noisytune_cli.manifest.read import parse
from noisytune_cli.manifest.write import encode
from noisytune_cli.plan.patterns import KINDS, match_names
from noisytune_cli.reading import JsonFault, Reach, parse_json


@contextmanager
def bounded() -> Iterator[None]:
    """Hold what runs inside to its CPU time, and to memory beyond the most that was taken before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGPROF, too_slow)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < GROWTH_BYTES, f"it took {grown:,} bytes"


@contextmanager
def given(path: Path, content: bytes) -> Iterator[None]:
    """Have whatever small file is read hold `content`: to write one costs more than to read most."""

    def read_chunks(path: Path, limit: int, reach: Reach | None = None) -> Generator[bytes]:
        yield content

    from_disk = reading.read_chunks
    reading.read_chunks = read_manifest.read_chunks = read_chunks
    try:
        yield
    finally:
        reading.read_chunks = read_manifest.read_chunks = from_disk


def _refused(why: str) -> InputInvalid:
    return InputInvalid("cannot read", path="f", why=why, next_step="None")


def _range(content: bytes) -> Callable[[int, int], bytes]:
    """How the readers of archives are given bytes."""

    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(content), "it reads beyond the end"
        return content[offset : offset + length]

    return read


def header(content: bytes, folder: Path) -> None:
    """A safetensors file: the tensors that the safetensors package finds, but for documented differences."""
    try:
        official = {name: bytes(info["data"]) for name, info in safetensors.deserialize(content)}
    except safetensors.SafetensorError:
        official = None
    end = header_end(content)
    try:
        if not PREFIX < end <= len(content):
            raise HeaderFault("it is truncated: N says so")
        found = parse_header(bytearray(content[:end]), "f", len(content) - end)
    except HeaderFault as fault:
        refusal = _refused(fault.why)
        assert official is None or documented(refusal.line()), "a difference that is not documented"
        raise refusal from fault
    assert {t.name: content[t.offset : t.offset + t.nbytes] for t in found.tensors} == official


def records(content: bytes, folder: Path) -> None:
    """A ZIP archive's directory: the records that the standard library finds, all of them within the file."""
    try:
        found = read_records(_range(content), len(content))
    except ZipFault as fault:
        raise _refused(str(fault)) from fault
    assert all(record.start + record.size <= len(content) for record in found.values())
    try:
        listed = zipfile.ZipFile(io.BytesIO(content)).infolist()
    except (zipfile.BadZipFile, NotImplementedError):
        return  # it asks for what torch does not look at, such as the version of ZIP
    assert {r.name: (r.size, r.crc) for r in found.values()} == {
        info.orig_filename: (info.file_size, info.CRC) for info in listed
    }


def archive(content: bytes, folder: Path) -> None:
    """What torch.save writes: whatever the pickle says, its storages lie within the file."""
    read = read_zip if content.startswith(b"PK") else read_legacy
    try:
        found = read(_range(content), len(content))
        weights = sort_content(found.root, StoredTensor).weights
        declared_by(found.root, weights)
    except PickleFault as fault:
        raise _refused(fault.why) from fault
    assert all(0 <= start <= len(content) for start in found.starts.values())
    assert all(weight.tensor.key in found.starts for weight in weights)


def metadata(content: bytes, folder: Path) -> None:
    """The `.metadata` of torch.distributed.checkpoint: files beside it alone, chunks that lie in them."""
    try:
        saved = read_metadata(content, MAX_OPCODES)
    except PickleFault as fault:
        raise _refused(fault.why) from fault
    assert all("/" not in file and file.endswith(".distcp") and file.isprintable() for file in saved.files)


def index(content: bytes, folder: Path) -> None:
    """An index: says what a lenient reader finds, in names of files beside it."""
    name = "i.safetensors.index.json"
    with given(folder / name, content):
        shard_of = read_index(folder, name).shard_of
    assert shard_of == json.loads(content)["weight_map"]
    assert all(os.path.normpath(f"/f/{shard}").startswith("/f/") for shard in shard_of.values())


def config(content: bytes, folder: Path) -> None:
    """A config: its sizes can be asked for, whatever they are."""
    with given(folder, content):
        found = read_config(folder)  # which has to be there
    assert found is not None
    library_of(found)
    sizes = Hyperparameters(found)
    sizes.attention(12, 4, grouped=True)
    heads = sizes.heads()
    assert heads is None or heads > 0


def manifest(content: bytes, folder: Path) -> None:
    """A manifest: what is accepted is written again as it means."""
    try:
        found = parse(content)
    except (JsonFault, ManifestFault) as fault:
        raise _refused(fault.why) from fault
    assert parse(encode(found)) == found


def document(content: bytes, folder: Path) -> None:
    """Any JSON: what the strict reader takes, Python's own takes too, for the same."""
    try:
        found = parse_json(content)
    except ValueError as error:
        raise _refused(str(error)) from error
    assert found == json.loads(content)


def patterns(content: bytes, folder: Path) -> None:
    """A pattern, and names on the lines below it: chosen as fnmatch chooses."""
    text, *names = content.decode("utf-8", "replace").split("\n")
    try:
        (found,) = match_names([text], names)
    except UsageError as error:
        raise _refused(error.line()) from error
    if text not in KINDS:
        assert found == {name for name in names if fnmatch.fnmatchcase(name, text)}


def mix(content: bytes, folder: Path) -> None:
    """A mixture's file: the terms that a lenient reader finds on its lines."""
    path = folder / "mix.jsonl"
    with given(path, content):
        terms, absolute = read_mix(str(path))
    lines = [json.loads(line) for line in content.split(b"\n") if line.strip()]
    strength = "sigma" if absolute else "lambda"
    assert [(term.seed, term.strength, term.coefficient) for term in terms] == [
        (int(line["seed"]), float(line[strength]), float(line.get("coefficient", 1.0))) for line in lines
    ]

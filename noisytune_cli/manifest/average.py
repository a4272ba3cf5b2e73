"""The manifest of an average: what was averaged, with which coefficients, and what came of each tensor.

It lies where a perturbed checkpoint's does, under the same name, and tells itself apart by `operation`.
Like that it is deterministic and written last, and from a stranger it is read believing nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.manifest.fields import Fields, ManifestFault, check_digest
from noisytune_cli.manifest.read import (
    RecordedManifest,
    begin,
    fetching,
    of_version,
    read_on,
    read_other_files,
    read_source,
)
from noisytune_cli.manifest.tensors import Tensors
from noisytune_cli.manifest.write import (
    MAX_LINES,
    SCHEMA,
    beside_json,
    lay_out,
    left_out_json,
    source_json,
)
from noisytune_cli.reading import Document
from noisytune_cli.records import (
    Manifest,
    NoiseSpec,
    Receipt,
    SourceRecord,
    Step,
    TensorSpec,
    copied,
    outcome_fields,
)
from noisytune_cli.version import __version__

OPERATION = "average"

_MAX_MEMBERS = 10_000

_KEYS = ("name", "file", "dtype", "shape", "action", "source_digests", "digest")

#: What an entry takes at most beside its names, its shape and its digests; a number of its shape, a digest.
_ENTRY_BYTES, _DIMENSION_BYTES, _DIGEST_BYTES = 260, 21, 75


@dataclass(frozen=True, slots=True)
class AveragedTensor:
    """What was done to one tensor; digests are `blake3:HEX` over stored bytes, one for each member."""

    tensor: TensorSpec
    action: Literal["average", "copy"]
    source_digests: tuple[str, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class AverageManifest:
    """The members with their coefficients, in order, and the tensors, copied and left-out files.

    `rewritten` is the model card, as in `Manifest`.
    """

    members: tuple[tuple[float, SourceRecord], ...]
    tensors: tuple[AveragedTensor, ...]
    copied: tuple[tuple[str, str], ...]
    left_out: tuple[tuple[str, str], ...]
    tool_version: str = __version__
    rewritten: tuple[tuple[str, str | None, str], ...] = ()

    def as_copies(self) -> Manifest:
        """Return the manifest of the output as it is, every tensor a copy: what `verify` holds it against.

        The output has the first member's files, headers and order of tensors.
        """
        receipts = tuple(
            Receipt(
                *outcome_fields(copied("excluded")),
                Step(done.tensor, "copy", "excluded", 0.0, done.tensor.name),
                done.digest,
                done.digest,
            )
            for done in self.tensors
        )
        first = self.members[0][1]
        return Manifest(
            "noisytune",
            self.tool_version,
            first,
            NoiseSpec(),
            receipts,
            self.copied,
            rewritten=self.rewritten,
        )


def _members(manifest: AverageManifest) -> Iterator[tuple[str, Any]]:
    """Yield the members of the manifest, its tensors one at a time."""
    yield "schema", SCHEMA
    yield "tool", {"name": "noisytune", "version": manifest.tool_version}
    yield "operation", OPERATION
    members = [
        {"coefficient": float(coefficient), **source_json(source)} for coefficient, source in manifest.members
    ]
    yield "members", members
    yield "tensors", map(_tensor, manifest.tensors)
    yield from beside_json(manifest.copied, manifest.rewritten).items()
    yield "left_out", left_out_json(manifest.left_out)
    yield "totals", _totals(manifest)


def _tensor(done: AveragedTensor) -> dict[str, Any]:
    return {
        "name": done.tensor.name,
        "file": done.tensor.file,
        "dtype": done.tensor.dtype,
        "shape": list(done.tensor.shape),
        "action": done.action,
        "source_digests": list(done.source_digests),
        "digest": done.digest,
    }


def _totals(manifest: AverageManifest) -> dict[str, int]:
    tensors = [done.tensor for done in manifest.tensors]
    return {
        "tensors": len(tensors),
        "averaged": sum(done.action == "average" for done in manifest.tensors),
        "parameters": sum(tensor.elements for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
    }


def manifest_bytes(tensors: Sequence[TensorSpec], members: int) -> int:
    """Return how many bytes the entries of these tensors take at most, for so many members."""
    return sum(
        len(json.dumps(tensor.name))
        + len(json.dumps(tensor.file))
        + _ENTRY_BYTES
        + _DIMENSION_BYTES * len(tensor.shape)
        + _DIGEST_BYTES * members
        for tensor in tensors
    )


def pieces(manifest: AverageManifest) -> Iterator[bytes]:
    """Yield the manifest as JSON in ASCII, one line for each tensor and file, a thousand at a time."""
    return lay_out(_members(manifest))


@dataclass(frozen=True)
class RecordedAverage(RecordedManifest):
    """An average's manifest as it was read; `manifest` is what its output has to be."""

    average: AverageManifest

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes that noisytune writes for this content."""
        return pieces(self.average)


def read_any_manifest(path: Path) -> RecordedManifest:
    """Read and validate the manifest at `path`, of noise or of an average; raises as `read_manifest`."""
    with fetching(path) as content:
        document, version = begin(content)
        if (key := document.key("source")) != "operation":
            manifest = read_on(document, key, version)
            return RecordedManifest(path, content.digest(), manifest)
        if (operation := document.value()) != OPERATION:
            raise ManifestFault(f'its operation is "{str(operation)[:40]}"', next_step="Upgrade noisytune")
        with of_version(version):
            average = _parse(document, version)
        return RecordedAverage(path, content.digest(), average.as_copies(), average)


def _parse(document: Document, version: str) -> AverageManifest:
    """Read on after the `operation` of a manifest by noisytune `version`; JsonFault or ManifestFault."""
    document.member("members")
    members = tuple(_member(entry, i) for i, entry in enumerate(document.entries(_MAX_MEMBERS)))
    if len(members) < 2:
        raise ManifestFault("it has fewer than two members")
    files = members[0][1].files
    document.member("tensors")
    reader = _Reader((file.name for file in files), len(members))
    tensors = tuple(
        reader.read(entry, f"tensors[{i}]") for i, entry in enumerate(document.entries(MAX_LINES))
    )
    if len({done.tensor.name for done in tensors}) < len(tensors):
        raise ManifestFault("it has two tensors of one name")
    copied, rewritten, left_out = read_other_files(document, files)
    manifest = AverageManifest(members, tensors, copied, left_out, version, rewritten)
    document.member("totals")
    totals = document.value()
    document.end()
    if totals != _totals(manifest):
        raise ManifestFault("totals are not what its tensors add up to")
    return manifest


def _member(value: Any, index: int) -> tuple[float, SourceRecord]:
    where = f"members[{index}]"
    fields = Fields(value, where, ("coefficient", "id", "revision", "files"))
    coefficient = fields.number("coefficient")
    if coefficient is None or not 0 < coefficient < math.inf:
        raise fields.fault("coefficient", "is not a number > 0")
    return coefficient, read_source({k: v for k, v in value.items() if k != "coefficient"}, where)


class _Reader:
    """What an entry is read against: the first member's files, and how many members there are."""

    def __init__(self, files: Iterable[str], members: int) -> None:
        self._tensors, self._members = Tensors(files), members

    def read(self, entry: Any, where: str) -> AveragedTensor:
        """Return what an entry stands for; where its tensor lies (offset) it does not say."""
        fields = Fields(entry, where, _KEYS)
        tensor, _ = self._tensors.read(fields, where)
        action = fields.choice("action", ("average", "copy"))
        if (action == "average") != (tensor.dtype in FLOAT_DTYPES):
            raise fields.fault("action", "does not fit the dtype")
        digests = tuple(
            check_digest(digest, f"{where}.source_digests") for digest in fields.list("source_digests")
        )
        if len(digests) != self._members:
            raise fields.fault("source_digests", f"are not {self._members}, one for each member")
        if action == "copy" and fields.digest("digest") != digests[0]:
            raise fields.fault("digest", "is not that of the first member, of which it is a copy")
        return AveragedTensor(
            tensor, "average" if action == "average" else "copy", digests, fields.digest("digest")
        )

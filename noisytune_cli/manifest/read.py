"""Read a manifest, believing nothing.

A manifest may come from a stranger, and a replay follows it: so every field is checked before it becomes a
record, and so is what fields say together (an amplitude is that of its λ and std, a copy has a reason that
fits its tensor, totals add up). Names are checked to be plain relative ones before anybody makes a path of
them. `manifest/write.py` writes what this reads, and `docs/manifest.md` explains every field.

It is read entry by entry, as it is written: in memory are its records and a window of its text.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from blake3 import blake3

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.errors import InputInvalid, Mismatch
from noisytune_cli.manifest.fields import Fields, ManifestFault, check_string
from noisytune_cli.manifest.tensors import SMALLEST_FILE, read_tensors
from noisytune_cli.manifest.write import CARD, MAX_BYTES, MAX_LINES, SCHEMA, pieces, why_not_together
from noisytune_cli.noise import distributions
from noisytune_cli.noise.stream import STREAM
from noisytune_cli.reading import Document, JsonFault, JsonLimits, read_chunks
from noisytune_cli.records import (
    MAX_TERMS,
    Conversion,
    FileRecord,
    Manifest,
    NoiseSpec,
    OutputRecord,
    Scope,
    SourceRecord,
    Term,
    mixed_strength,
)
from noisytune_cli.version import __version__

_LIMITS = JsonLimits()

#: The longest list in a manifest.
MAX_ENTRIES = 1_000_000

_MAX_SIZE = 2**63 - 1


@dataclass(frozen=True)
class RecordedManifest:
    """A manifest as it was read: its path, the BLAKE3 digest of its bytes, and what they say."""

    path: Path
    digest: bytes
    manifest: Manifest

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes that noisytune writes for this content."""
        return pieces(self.manifest)

    @property
    def is_original(self) -> bool:
        """Whether the bytes are those that noisytune writes for this content."""
        written = blake3()
        for piece in self.pieces():
            written.update(piece)
        return written.digest() == self.digest

    def require_original(self) -> None:
        """Raise Mismatch where the manifest was reformatted: its copy would not be what noisytune wrote."""
        if not self.is_original:
            raise Mismatch(
                "the manifest is not as noisytune wrote it",
                path=self.path,
                why=REFORMATTED,
                next_step="Fetch the manifest again, byte for byte",
            )

    def require_files(self) -> None:
        """Raise InputInvalid where the noise was added in memory: there is no file to check or to make."""
        manifest = self.manifest
        if not manifest.source.files or any(not receipt.digest for receipt in manifest.receipts[:1]):
            raise InputInvalid(
                "cannot use the manifest",
                path=self.path,
                why="it is the record of noise that was added to a model in memory, so it knows no files",
                next_step="Add the same noise to a model in memory with perturb_(model, manifest=PATH)",
            )


#: What is wrong with a manifest whose content is valid but whose bytes are not noisytune's.
REFORMATTED = "its numbers, spaces or line ends are spelt in another way"


def read_manifest(path: Path) -> RecordedManifest:
    """Read and validate the manifest at `path`, of noise in files or in memory.

    Raises InputInvalid that names the field, InputUnreadable where it is missing or cannot be read.
    """
    with fetching(path) as content:
        manifest = parse(content)
        return RecordedManifest(path, content.digest(), manifest)


class Content:
    """The bytes of a manifest as they are fetched: each call returns some, at the end none."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._hash = chunks, blake3()

    def __call__(self) -> bytes:
        """Return the next bytes."""
        chunk = next(self._chunks, b"")
        self._hash.update(chunk)
        return chunk

    def digest(self) -> bytes:
        """Return the digest of all that was fetched."""
        return self._hash.digest()


#: What to do about a manifest that cannot be read.
_FETCH_AGAIN = "Fetch the manifest again; it is not meant to be edited"


@contextmanager
def fetching(
    path: Path, what: str = "cannot use the manifest", next_step: str = _FETCH_AGAIN
) -> Iterator[Content]:
    """Open a manifest to be read; InputUnreadable, or InputInvalid for `what` is wrong with it."""
    with (
        closing(read_chunks(path, MAX_BYTES)) as chunks,
        _refusing(path, what, next_step),
        _collector_paused(),
    ):
        yield Content(chunks)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep the garbage collector from looking through records again and again: none of them is a cycle."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _refusing(path: Path, what: str, next_step: str) -> Iterator[None]:
    """Turn what is wrong with the manifest at `path` into the error the user sees."""
    try:
        yield
    except (JsonFault, ManifestFault) as fault:
        raise InputInvalid(
            what,
            path=path,
            why=fault.why,
            next_step=(fault.next_step if isinstance(fault, ManifestFault) else None) or next_step,
        ) from fault


def parse(content: bytes | Callable[[], bytes]) -> Manifest:
    """Return what a manifest's bytes say, all or as they are fetched; raises JsonFault or ManifestFault."""
    document, version = begin(content)
    return read_on(document, document.key("source"), version)


def read_on(document: Document, key: str, version: str) -> Manifest:
    """Read on from the value of `key`, the member after those of `begin`; raises as `parse`."""
    with of_version(version):
        return _read_on(document, key, version)


@contextmanager
def of_version(version: str) -> Iterator[None]:
    """Say of what is wrong with a manifest that a newer noisytune wrote it, where one did."""
    try:
        yield
    except (JsonFault, ManifestFault) as fault:
        if _release(version) <= _release(__version__):
            raise
        raise _newer(f"{fault.why}, and noisytune {version[:40]} wrote it") from fault


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with; none where it begins with none."""
    found = re.match(r"[0-9]{1,9}(?:\.[0-9]{1,9}){0,9}", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _read_on(document: Document, key: str, version: str) -> Manifest:
    if key != "source":
        if key == "operation":
            raise ManifestFault(
                "it is that of an average", next_step="Average its members again, or name a manifest of noise"
            )
        raise ManifestFault(f'"{key[:40]}" stands where "source" is due')
    source = read_source(document.value(), "source", fewest=0)
    output = None
    if (key := document.key("noise")) == "output":
        output = _output(document.value(), source)
        document.member("noise")
    elif key != "noise":
        raise ManifestFault(f'"{key[:40]}" stands where "noise" is due')
    noise = read_noise(document.value())
    document.member("tensors")
    receipts = read_tensors(document, MAX_LINES, noise, source.files, output)
    copied, rewritten, left_out = read_other_files(document, source.files)
    if output is not None:
        _check_output_names(source, output, _names_of(copied, rewritten))
    document.member("totals")
    totals = document.value()
    document.end()
    manifest = Manifest("noisytune", version, source, noise, receipts, copied, left_out, output, rewritten)
    _check_totals(totals, manifest)
    return manifest


def begin(content: bytes | Callable[[], bytes]) -> tuple[Document, str]:
    """Read the members that every manifest begins with; return the document and the tool's version."""
    if isinstance(content, bytes):
        document = Document(content, _LIMITS)
    else:
        document = Document(b"", _LIMITS, more=content)
    document.member("schema")
    schema = document.value()
    if type(schema) is not int or schema < 1:
        raise ManifestFault("schema is not a version number")
    if schema != SCHEMA:
        raise _newer(f"it has schema {schema}")
    document.member("tool")
    tool = Fields(document.value(), "tool", ("name", "version"))
    tool.choice("name", ("noisytune",))
    return document, tool.string("version")


def read_other_files(
    document: Document, files: Sequence[FileRecord]
) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str | None, str], ...], tuple[tuple[str, str], ...]]:
    """Read what was copied beside the weight files (name, digest), the model card if it was written anew
    (name, its name in the source, digest), and what was left out (name, why).
    """
    document.member("copied")
    copied = tuple(_copied(entry, i) for i, entry in enumerate(document.entries(MAX_ENTRIES)))
    rewritten: tuple[tuple[str, str | None, str], ...] = ()
    if (key := document.key("left_out")) == "rewritten":
        rewritten = tuple(_card(entry, i) for i, entry in enumerate(document.entries(MAX_ENTRIES)))
        document.member("left_out")
    elif key != "left_out":
        raise ManifestFault(f'"{key[:40]}" stands where "left_out" is due')
    _check_names([*(file.name for file in files), *_names_of(copied, rewritten)])
    left_out = tuple(read_left_out(entry, i) for i, entry in enumerate(document.entries(MAX_ENTRIES)))
    return copied, rewritten, left_out


def read_source(value: Any, where: str, *, fewest: int = 1) -> SourceRecord:
    """Return the source, of `fewest` files at least, that an object at `where` in the manifest describes."""
    fields = Fields(value, where, ("id", "revision", "files"))
    files = _files(fields, where, fewest)
    revision = fields.commit("revision")
    return SourceRecord(fields.string("id"), revision, files)


def _files(fields: Fields, where: str, fewest: int = 1) -> tuple[FileRecord, ...]:
    entries = fields.list("files")
    if len(entries) < fewest:
        raise ManifestFault(f"{where}.files is empty")
    files = []
    for i, entry in enumerate(entries):
        file = Fields(entry, f"{where}.files[{i}]", ("name", "size", "header_digest"))
        size = file.count("size", _MAX_SIZE)
        if size < SMALLEST_FILE:
            raise ManifestFault(f"{where}.files[{i}].size is less than any weight file's")
        files.append(FileRecord(file.name("name"), size, file.digest("header_digest")))
    return tuple(files)


def _output(value: Any, source: SourceRecord) -> OutputRecord:
    fields = Fields(value, "output", ("dtype", "format", "dequantized", "files", "rewritten"))
    conversion = read_conversion(fields)
    files = _files(fields, "output")
    if len(files) != len(source.files):
        raise ManifestFault("output.files are not as many as source.files")
    rewritten = tuple(_rewritten(entry, i) for i, entry in enumerate(fields.list("rewritten")))
    return OutputRecord(conversion, files, rewritten)


def read_conversion(fields: Fields) -> Conversion:
    """Return what an object says that an output converts, among other things."""
    conversion = Conversion(
        dtype=fields.optional_choice("dtype", tuple(FLOAT_DTYPES)),
        format="safetensors" if fields.optional_choice("format", ("safetensors",)) else None,
        dequantized="BF16" if fields.optional_choice("dequantized", ("BF16",)) else None,
    )
    if conversion == Conversion():
        raise ManifestFault("output converts nothing")
    return conversion


def _rewritten(value: Any, index: int) -> tuple[str, str, str]:
    fields = Fields(value, f"output.rewritten[{index}]", ("name", "source", "digest"))
    return fields.name("name"), fields.name("source"), fields.digest("digest")


def _check_output_names(source: SourceRecord, output: OutputRecord, others: Sequence[str]) -> None:
    _check_names([*(file.name for file in source.files), *(old for _, old, _ in output.rewritten), *others])
    _check_names([*(file.name for file in output.files), *(new for new, _, _ in output.rewritten), *others])


def read_noise(value: Any, where: str = "noise") -> NoiseSpec:
    """Return the noise that an object at `where` in the manifest describes."""
    scopes: dict[str, Scope] = {scope: scope for scope in get_args(Scope)}
    fields = Fields(
        value,
        where,
        ("stream", "distribution", "scope", "granularity", "seed", "lambda", "rules", "include", "exclude"),
        ("sigma", "shrink", "mix"),
    )
    if (stream := fields.string("stream")) != STREAM:
        raise _newer(f'its noise stream is "{stream}"')
    if (distribution := fields.string("distribution")) not in distributions.names():
        raise _newer(f'its noise is "{distribution}"')
    if (granularity := fields.string("granularity")) not in ("tensor", "matrix"):
        raise _newer(f'its granularity is "{granularity}"')
    scope = scopes[fields.choice("scope", tuple(scopes))]
    strength = "sigma" if scope == "absolute" else "lambda"
    other = "lambda" if scope == "absolute" else "sigma"
    if fields.has(other) and not fields.equals(other, None):
        raise fields.fault(other, f"is given in scope {scope}")
    if not fields.has(strength):
        raise fields.fault(strength, "is missing")
    lam = fields.strength(strength)
    mix = _mix(fields, strength) if fields.has("mix") else ()
    if mix and (not fields.equals("seed", None) or lam != mixed_strength(mix)):
        raise fields.fault("mix", f"does not make {strength}, or there is a seed beside it")
    kept = fields.strength("shrink") if fields.has("shrink") else 1.0
    if fields.has("shrink") and not 0.0 <= kept < 1.0:
        raise fields.fault("shrink", "is not a number from 0 to less than 1")
    return NoiseSpec(
        lam=lam,
        seed=0 if mix else fields.seed("seed"),
        distribution=distribution,
        scope=scope,
        kept=kept,
        mix=mix,
        granularity="matrix" if granularity == "matrix" else "tensor",
        rules=tuple(_rule(rule, f"noise.rules[{i}]") for i, rule in enumerate(fields.list("rules"))),
        include=tuple(check_string(p, "noise.include") for p in fields.list("include")),
        exclude=tuple(check_string(p, "noise.exclude") for p in fields.list("exclude")),
    )


def _mix(fields: Fields, strength: str) -> tuple[Term, ...]:
    entries = fields.list("mix")
    if not 1 <= len(entries) <= MAX_TERMS:
        raise fields.fault("mix", f"is not a list of 1 to {MAX_TERMS:,} noises")
    terms = []
    for i, entry in enumerate(entries):
        term = Fields(entry, f"noise.mix[{i}]", ("seed", strength, "coefficient"))
        terms.append(Term(term.seed("seed"), term.strength(strength), term.strength("coefficient")))
    return tuple(terms)


def _rule(value: Any, where: str) -> tuple[str, float]:
    if not (isinstance(value, list) and len(value) == 2):
        raise ManifestFault(f"{where} is no pair of a pattern and λ")
    fields = Fields({"pattern": value[0], "lambda": value[1]}, where, ("pattern", "lambda"))
    return fields.string("pattern"), fields.strength("lambda")


def _copied(value: Any, index: int) -> tuple[str, str]:
    fields = Fields(value, f"copied[{index}]", ("name", "digest"))
    return fields.name("name"), fields.digest("digest")


def _card(value: Any, index: int) -> tuple[str, str | None, str]:
    fields = Fields(value, f"rewritten[{index}]", ("name", "source", "digest"))
    if (name := fields.string("name")) != CARD:
        raise _newer(f'its rewritten "{name[:100]}" is no model card')
    return name, fields.optional_choice("source", (CARD,)), fields.digest("digest")


def read_left_out(value: Any, index: int) -> tuple[str, str]:
    """Return the file that is not in an output, and why, as the `index`-th entry of a list says."""
    fields = Fields(value, f"left_out[{index}]", ("name", "why"))
    return fields.string("name"), fields.string("why")


def _names_of(
    copied: Iterable[tuple[str, str]], rewritten: Iterable[tuple[str, str | None, str]]
) -> list[str]:
    return [*(name for name, _ in copied), *(name for name, _, _ in rewritten)]


def _check_names(names: list[str]) -> None:
    """Refuse files that could not lie in one folder together, or would take the manifest's place."""
    if why := why_not_together(names):
        raise ManifestFault(f"it has {why}")


def _check_totals(value: Any, manifest: Manifest) -> None:
    fields = Fields(value, "totals", ("tensors", "perturbed", "parameters", "bytes"))
    tensors = [receipt.step.tensor for receipt in manifest.receipts]
    expected: Mapping[str, int] = {
        "tensors": len(tensors),
        "perturbed": sum(receipt.action == "perturb" for receipt in manifest.receipts),
        "parameters": sum(tensor.elements for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
    }
    for key, total in expected.items():
        if fields.integer(key) != total:
            raise ManifestFault(f"totals.{key} is not what its tensors add up to, {total:,}")


def _newer(what: str) -> ManifestFault:
    """Return the fault of what only a later version can have written."""
    return ManifestFault(f"{what}, so it was written by a newer noisytune", next_step="Upgrade noisytune")

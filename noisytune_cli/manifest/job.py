"""The plan of a job: a run that is divided into shares, so that many processes can do it.

`plan.json` says what is to be done and holds everything that was decided; the steps of each share lie in a
file of their own (`manifest/share.py`), whose digest the plan has, so that nobody reads more than his part.
Both are deterministic, as manifests are, and are read as these are: believing nothing. What a share has done
is recorded by ordinary manifests of its weight files alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from noisytune_cli.manifest.fields import Fields, ManifestFault
from noisytune_cli.manifest.read import (
    MAX_ENTRIES,
    Content,
    begin,
    fetching,
    read_conversion,
    read_left_out,
    read_noise,
    read_source,
)
from noisytune_cli.manifest.write import (
    SCHEMA,
    conversion_json,
    lay_out,
    left_out_json,
    noise_json,
    source_json,
)
from noisytune_cli.reading import Document
from noisytune_cli.records import Conversion, NoiseSpec, SourceRecord, Tie
from noisytune_cli.version import __version__

#: The most outputs of a job, which are those of a run, and the largest number of a file's time or size.
MOST_OUTPUTS, LARGEST = 1000, 2**63 - 1

_TIE_EVIDENCE = ("alias", "storage", "equal-bytes")
_OPTIONS = ("again", "follow_links", "card", "recipe_only", "overwrite", "overwrite_changed")

#: What `checkpoint/address.py` takes for an address.
_ADDRESS = re.compile(r"(?:s3|gs|az)://[^/?@]+(?:/(?!\.{1,2}(?:/|$))[^/?]+)*/*")

#: What tells a file from another of its size: its time in ns where it lies here, its ETag in an object store,
#: where it has one. A hub's has none, for its commit says it all.
Stamp = int | str | None


@dataclass(frozen=True)
class Beside:
    """A file to be copied, as it was when the job was planned."""

    name: str
    size: int
    stamp: Stamp


@dataclass(frozen=True)
class Share:
    """A unit of work: whole weight files of the source, by name, and the digest of the steps for them."""

    files: tuple[str, ...]
    nbytes: int
    steps: str


@dataclass(frozen=True)
class JobOutput:
    """An output of a job: its absolute path, or its address, and its noise."""

    path: str
    noise: NoiseSpec


@dataclass(frozen=True)
class Job:
    """What is to be done, and all that was decided when it was planned.

    `asked` is the source as the workers open it, an absolute path, an address or a hub id, with `weights`,
    `components` and `commit` (a hub's); it is one file where `is_file`. `stamps` are those of `source.files`.
    """

    version: str
    source: SourceRecord
    asked: str
    is_file: bool
    weights: str | None
    components: tuple[str, ...]
    commit: str | None
    again: bool
    follow_links: bool
    card: bool
    recipe_only: bool
    overwrite: bool
    overwrite_changed: bool
    conversion: Conversion | None
    outputs: tuple[JobOutput, ...]
    stamps: tuple[Stamp, ...]
    others: tuple[Beside, ...]
    left_out: tuple[tuple[str, str], ...]
    ties: tuple[Tie, ...]
    shares: tuple[Share, ...]

    @property
    def strengths(self) -> tuple[float, ...]:
        """The λ or σ of the outputs, each once: what their steps differ in."""
        return tuple(dict.fromkeys(output.noise.lam for output in self.outputs))

    @property
    def has_sums(self) -> bool:
        """Whether a round of sums comes before the noise."""
        return self.outputs[0].noise.scope == "global"


def job_pieces(job: Job) -> Iterator[bytes]:
    """Yield the bytes of a job's plan."""
    stamps = zip(job.source.files, job.stamps, strict=True)
    return lay_out(
        [
            ("schema", SCHEMA),
            ("tool", {"name": "noisytune", "version": job.version}),
            ("source", source_json(job.source)),
            (
                "asked",
                {
                    "source": job.asked,
                    "is_file": job.is_file,
                    "weights": job.weights,
                    "components": list(job.components),
                    "commit": job.commit,
                    **{option: getattr(job, option) for option in _OPTIONS},
                },
            ),
            ("conversion", None if job.conversion is None else conversion_json(job.conversion)),
            ("outputs", [{"path": one.path, "noise": noise_json(one.noise)} for one in job.outputs]),
            ("stamps", [{"name": file.name, "stamp": stamp} for file, stamp in stamps]),
            ("others", [{"name": o.name, "size": o.size, "stamp": o.stamp} for o in job.others]),
            ("left_out", left_out_json(job.left_out)),
            ("ties", [_tie(tie) for tie in job.ties]),
            ("shares", [{"files": list(s.files), "bytes": s.nbytes, "steps": s.steps} for s in job.shares]),
        ]
    )


def fetching_of_job(path: Path) -> AbstractContextManager[Content]:
    """Open a file of a job to be read, as `fetching` opens a manifest."""
    return fetching(path, "cannot use the job", "Remove the job's folder, and plan it again")


def read_job(path: Path) -> tuple[Job, str]:
    """Read the plan at `path`; return it and the digest of its bytes, in hexadecimal digits.

    Raises InputInvalid for one that is malformed, or another version's.
    """
    with fetching_of_job(path) as content:
        document, version = begin(content)
        if version != __version__:
            raise ManifestFault(
                f"noisytune {version[:40]} planned it, and this is {__version__}",
                next_step=f"Use noisytune {version[:40]} for all of the job, or plan it again",
            )
        job = _read_job(document, version)
        return job, content.digest().hex()


def _read_job(document: Document, version: str) -> Job:
    document.member("source")
    source = read_source(document.value(), "source")
    document.member("asked")
    asked = Fields(document.value(), "asked", _ASKED)
    where = asked.string("source")
    is_address = _is_address(where)
    if (is_address or where.startswith("/")) != (asked.commit("commit") is None):
        raise asked.fault("source", "is no absolute path, no address, and no hub id with its commit")
    stamped = str if is_address else int if where.startswith("/") else None
    document.member("conversion")
    found = document.value()
    conversion = None if found is None else read_conversion(Fields(found, "conversion", CONVERSION_KEYS))
    document.member("outputs")
    outputs = tuple(_output(entry, i) for i, entry in enumerate(document.entries(MOST_OUTPUTS)))
    if not outputs:
        raise ManifestFault("it has no outputs")
    document.member("stamps")
    stamps = [_file_stamp(entry, i, stamped) for i, entry in enumerate(document.entries(MAX_ENTRIES))]
    if [name for name, _ in stamps] != [file.name for file in source.files]:
        raise ManifestFault("stamps are not those of source.files")
    document.member("others")
    others = tuple(_beside(entry, i, stamped) for i, entry in enumerate(document.entries(MAX_ENTRIES)))
    document.member("left_out")
    left_out = tuple(read_left_out(entry, i) for i, entry in enumerate(document.entries(MAX_ENTRIES)))
    document.member("ties")
    ties = tuple(_read_tie(entry, i) for i, entry in enumerate(document.entries(MAX_ENTRIES)))
    document.member("shares")
    shares = tuple(_share(entry, i) for i, entry in enumerate(document.entries(MAX_ENTRIES)))
    document.end()
    if [name for share in shares for name in share.files] != [file.name for file in source.files]:
        raise ManifestFault("the files of its shares are not source.files, each once and in order")
    return Job(
        version=version,
        source=source,
        asked=where,
        is_file=asked.flag("is_file"),
        weights=asked.optional_string("weights"),
        components=asked.strings("components"),
        commit=asked.commit("commit"),
        **{option: asked.flag(option) for option in _OPTIONS},
        conversion=conversion,
        outputs=outputs,
        stamps=tuple(stamp for _, stamp in stamps),
        others=others,
        left_out=left_out,
        ties=ties,
        shares=shares,
    )


CONVERSION_KEYS = ("dtype", "format", "dequantized")

_ASKED = ("source", "is_file", "weights", "components", "commit", *_OPTIONS)


def _is_address(text: str) -> bool:
    return text.isprintable() and _ADDRESS.fullmatch(text) is not None


def _output(value: Any, index: int) -> JobOutput:
    fields = Fields(value, f"outputs[{index}]", ("path", "noise"))
    path = fields.string("path")
    if not (path.startswith("/") or _is_address(path)) or "\0" in path:
        raise fields.fault("path", "is neither an absolute path nor an address")
    return JobOutput(path, read_noise(value["noise"], f"outputs[{index}].noise"))


def _file_stamp(value: Any, index: int, kind: type[int | str] | None) -> tuple[str, Stamp]:
    fields = Fields(value, f"stamps[{index}]", ("name", "stamp"))
    return fields.name("name"), _stamp(fields, kind)


def _beside(value: Any, index: int, kind: type[int | str] | None) -> Beside:
    fields = Fields(value, f"others[{index}]", ("name", "size", "stamp"))
    return Beside(fields.name("name"), fields.count("size", LARGEST), _stamp(fields, kind))


def _stamp(fields: Fields, kind: type[int | str] | None) -> Stamp:
    """Return what a file of a source of this kind has as its stamp."""
    if kind is int:
        return fields.count("stamp", LARGEST)
    if kind is str:
        return fields.optional_string("stamp")
    if not fields.equals("stamp", None):
        raise fields.fault("stamp", "is given for a file of the hub's")
    return None


def _tie(tie: Tie) -> dict[str, Any]:
    return {
        "stream": tie.stream,
        "names": list(tie.names),
        "evidence": tie.evidence,
        "dropped": [list(pair) for pair in tie.dropped],
    }


def _read_tie(value: Any, index: int) -> Tie:
    fields = Fields(value, f"ties[{index}]", ("stream", "names", "evidence", "dropped"))
    evidence = fields.choice("evidence", _TIE_EVIDENCE)
    names = fields.strings("names")
    dropped = []
    for pair in fields.list("dropped"):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(name, str) for name in pair)):
            raise fields.fault("dropped", "has what is no pair of names")
        dropped.append((pair[0], pair[1]))
    return Tie(fields.string("stream"), names, evidence, tuple(dropped))  # type: ignore[arg-type]


def _share(value: Any, index: int) -> Share:
    fields = Fields(value, f"shares[{index}]", ("files", "bytes", "steps"))
    files = fields.strings("files")
    if not files:
        raise fields.fault("files", "is empty")
    return Share(files, fields.count("bytes", LARGEST), fields.digest("steps"))


def digest_of(content: bytes) -> str:
    """Return `blake3:HEX` of some bytes."""
    return f"blake3:{blake3(content).hexdigest()}"

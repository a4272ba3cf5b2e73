"""The record of a job: a run that is divided into shares, so that many processes can do it.

`plan.json` says what is to be done and holds everything that was decided; the steps of each share lie in a
file of their own, whose digest the plan has, so that nobody reads more than his part. Both are deterministic,
as manifests are, and are read as these are: believing nothing. What a share has done is recorded by ordinary
manifests of its weight files alone.

With scope global a share's exact sums (`noise/std.py`) come before its noise: they add up to one std.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from noisytune_cli.manifest.consistency import REASONS, cover_exactly
from noisytune_cli.manifest.fields import Fields, ManifestFault, check_string
from noisytune_cli.manifest.read import (
    MAX_ENTRIES,
    begin,
    fetching,
    read_conversion,
    read_noise,
    read_source,
)
from noisytune_cli.manifest.tensors import ACTIONS, PART_KEYS, TOLD_BY, Tensors, read_part
from noisytune_cli.manifest.write import (
    MAX_LINES,
    SCHEMA,
    conversion_json,
    lay_out,
    left_out_json,
    noise_json,
    part_json,
    source_json,
)
from noisytune_cli.noise.std import EXACT_BINS, EXACT_SUMS, new_exact_sums
from noisytune_cli.reading import Document
from noisytune_cli.records import (
    MAX_PARTS,
    Conversion,
    NoiseSpec,
    SourceRecord,
    Step,
    Tie,
    out_dtype_of,
)
from noisytune_cli.version import __version__

#: The most outputs of a job, which are those of a run, and the largest number of a file's time or size.
_MOST_OUTPUTS, _LARGEST = 1000, 2**63 - 1

#: What cannot be done with a file of a job that is not as it has to be, and what to do about it.
_WHAT, _PLAN_AGAIN = "cannot use the job", "Remove the job's folder, and plan it again"

_TIE_EVIDENCE = ("alias", "storage", "equal-bytes")
_OPTIONS = ("again", "follow_links", "card", "recipe_only", "overwrite", "overwrite_changed")


@dataclass(frozen=True)
class Beside:
    """A file to be copied, as it was when the job was planned; `mtime` in ns, None for a hub's file."""

    name: str
    size: int
    mtime: int | None


@dataclass(frozen=True)
class Share:
    """A unit of work: whole weight files of the source, by name, and the digest of the steps for them."""

    files: tuple[str, ...]
    nbytes: int
    steps: str


@dataclass(frozen=True)
class JobOutput:
    """An output of a job: its absolute path and its noise."""

    path: str
    noise: NoiseSpec


@dataclass(frozen=True)
class Job:
    """What is to be done, and all that was decided when it was planned.

    `asked` is the source as the workers open it, an absolute path or a hub id, with `weights`, `components`
    and `commit` (a hub's). `mtimes` are those of `source.files`, in ns, None for a hub's.
    """

    version: str
    source: SourceRecord
    asked: str
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
    mtimes: tuple[int | None, ...]
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


@dataclass(frozen=True)
class ShareSteps:
    """The steps of a share: for each of the job's strengths those of every tensor, in file order.

    `repeated` are names of a parameter that another share, or a later name in this one, stands for already:
    its values count once in a std of all.
    """

    steps: tuple[tuple[Step, ...], ...]
    repeated: frozenset[str]


@dataclass(frozen=True)
class ShareSums:
    """How many values a share adds to the std of all, for one strength, and their exact sums."""

    elements: int
    exact: NDArray[np.int64]


def job_pieces(job: Job) -> Iterator[bytes]:
    """Yield the bytes of a job's plan."""
    times = zip(job.source.files, job.mtimes, strict=True)
    return lay_out(
        [
            ("schema", SCHEMA),
            ("tool", {"name": "noisytune", "version": job.version}),
            ("source", source_json(job.source)),
            (
                "asked",
                {
                    "source": job.asked,
                    "weights": job.weights,
                    "components": list(job.components),
                    "commit": job.commit,
                    **{option: getattr(job, option) for option in _OPTIONS},
                },
            ),
            ("conversion", None if job.conversion is None else conversion_json(job.conversion)),
            ("outputs", [{"path": one.path, "noise": noise_json(one.noise)} for one in job.outputs]),
            ("times", [{"name": file.name, "mtime": mtime} for file, mtime in times]),
            ("others", [{"name": o.name, "size": o.size, "mtime": o.mtime} for o in job.others]),
            ("left_out", left_out_json(job.left_out)),
            ("ties", [_tie(tie) for tie in job.ties]),
            ("shares", [{"files": list(s.files), "bytes": s.nbytes, "steps": s.steps} for s in job.shares]),
        ]
    )


def read_job(path: Path) -> tuple[Job, str]:
    """Read the plan at `path`; return it and the digest of its bytes, in hexadecimal digits.

    Raises InputInvalid for one that is malformed, or another version's.
    """
    with fetching(path, _WHAT, _PLAN_AGAIN) as content:
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
    asked = Fields(document.value(), "asked", ("source", "weights", "components", "commit", *_OPTIONS))
    if asked.string("source").startswith("/") != (asked.commit("commit") is None):
        raise asked.fault("source", "is neither an absolute path nor a hub id with its commit")
    document.member("conversion")
    found = document.value()
    conversion = None if found is None else read_conversion(Fields(found, "conversion", CONVERSION_KEYS))
    document.member("outputs")
    outputs = tuple(_output(entry, i) for i, entry in enumerate(document.entries(_MOST_OUTPUTS)))
    if not outputs:
        raise ManifestFault("it has no outputs")
    document.member("times")
    times = [_time(entry, i) for i, entry in enumerate(document.entries(MAX_ENTRIES))]
    if [name for name, _ in times] != [file.name for file in source.files]:
        raise ManifestFault("times are not those of source.files")
    document.member("others")
    others = tuple(_beside(entry, i) for i, entry in enumerate(document.entries(MAX_ENTRIES)))
    document.member("left_out")
    left_out = tuple(_left_out(entry, i) for i, entry in enumerate(document.entries(MAX_ENTRIES)))
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
        asked=asked.string("source"),
        weights=asked.optional_string("weights"),
        components=asked.strings("components"),
        commit=asked.commit("commit"),
        **{option: asked.flag(option) for option in _OPTIONS},
        conversion=conversion,
        outputs=outputs,
        mtimes=tuple(mtime for _, mtime in times),
        others=others,
        left_out=left_out,
        ties=ties,
        shares=shares,
    )


CONVERSION_KEYS = ("dtype", "format", "dequantized")


def _output(value: Any, index: int) -> JobOutput:
    fields = Fields(value, f"outputs[{index}]", ("path", "noise"))
    path = fields.string("path")
    if not path.startswith("/") or "\0" in path:
        raise fields.fault("path", "is no absolute path")
    return JobOutput(path, read_noise(value["noise"], f"outputs[{index}].noise"))


def _time(value: Any, index: int) -> tuple[str, int | None]:
    fields = Fields(value, f"times[{index}]", ("name", "mtime"))
    return fields.name("name"), fields.optional_count("mtime", _LARGEST)


def _beside(value: Any, index: int) -> Beside:
    fields = Fields(value, f"others[{index}]", ("name", "size", "mtime"))
    return Beside(
        fields.name("name"), fields.count("size", _LARGEST), fields.optional_count("mtime", _LARGEST)
    )


def _left_out(value: Any, index: int) -> tuple[str, str]:
    fields = Fields(value, f"left_out[{index}]", ("name", "why"))
    return fields.string("name"), fields.string("why")


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
    return Share(files, fields.count("bytes", _LARGEST), fields.digest("steps"))


def steps_bytes(share: ShareSteps, strengths: Sequence[float]) -> bytes:
    """Return the file of a share's steps; of each tensor it says once what it is, then what is done to it."""
    return b"".join(
        lay_out(
            [
                ("schema", SCHEMA),
                ("tool", {"name": "noisytune", "version": __version__}),
                ("strengths", [float(strength) for strength in strengths]),
                ("repeated", sorted(share.repeated)),
                ("tensors", (_steps(of_tensor) for of_tensor in zip(*share.steps, strict=True))),
            ]
        )
    )


def digest_of(content: bytes) -> str:
    """Return `blake3:HEX` of some bytes."""
    return f"blake3:{blake3(content).hexdigest()}"


def _steps(steps: Sequence[Step]) -> dict[str, Any]:
    step = steps[0]
    tensor = step.tensor
    return {
        "name": tensor.name,
        "stream": step.stream,
        "file": tensor.file,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "told_by": step.told_by,
        "doubt": any(one.doubt for one in steps),
        "parts": [part_json(part) for part in step.parts],
        "steps": [[one.action, one.reason, float(one.lam)] for one in steps],
    }


def read_steps(path: Path, job: Job, share: Share) -> ShareSteps:
    """Read a share's steps, which must be those that the job's plan knows by their digest.

    Their tensors lie at offset 0: where they are, the source's headers tell. Raises InputInvalid.
    """
    with fetching(path, _WHAT, _PLAN_AGAIN) as content:
        found = _read_steps(*begin(content), job, share)
        if f"blake3:{content.digest().hex()}" != share.steps:
            raise ManifestFault("it is not the file that the plan knows by its digest")
    return found


def _read_steps(document: Document, version: str, job: Job, share: Share) -> ShareSteps:
    document.member("strengths")
    if list(document.entries(_MOST_OUTPUTS)) != list(job.strengths) or version != job.version:
        raise ManifestFault("it is another job's")
    document.member("repeated")
    repeated = frozenset(check_string(name, "repeated") for name in document.entries(MAX_LINES))
    document.member("tensors")
    tensors, conversion = Tensors(share.files), job.conversion or Conversion()
    rows = [
        _step_row(entry, f"tensors[{i}]", tensors, conversion, len(job.strengths))
        for i, entry in enumerate(document.entries(MAX_LINES))
    ]
    document.end()
    return ShareSteps(tuple(zip(*rows, strict=True)) or ((),) * len(job.strengths), repeated)


_STEP_KEYS = ("name", "stream", "file", "dtype", "shape", "told_by", "doubt", "parts", "steps")


def _step_row(
    value: Any, where: str, tensors: Tensors, conversion: Conversion, count: int
) -> tuple[Step, ...]:
    """Return what an entry says of a tensor: its step for each strength."""
    fields = Fields(value, where, _STEP_KEYS)
    tensor, elements = tensors.read(fields, where)
    told_by = TOLD_BY.get(fields.optional_choice("told_by", tuple(TOLD_BY)) or "")
    doubt = fields.flag("doubt")
    parts = tuple(
        read_part(Fields(entry, f"{where}.parts[{i}]", PART_KEYS), f"{where}.parts[{i}]", tensor, elements)
        for i, entry in enumerate(fields.list("parts"))
    )
    if parts and not (2 <= len(parts) <= MAX_PARTS and cover_exactly(parts, elements)):
        raise fields.fault("parts", "are not all of the tensor")
    stream = fields.string("stream")
    row = []
    for entry in fields.list("steps"):
        if not (isinstance(entry, list) and len(entry) == 3):
            raise fields.fault("steps", "has what is no action, reason and strength")
        one = Fields(
            dict(zip(("action", "reason", "lambda"), entry, strict=True)),
            where,
            ("action", "reason", "lambda"),
        )
        found = one.optional_choice("reason", tuple(REASONS))
        reason = None if found is None else REASONS[found]
        action, lam = ACTIONS[one.choice("action", tuple(ACTIONS))], one.strength("lambda")
        if (action == "perturb") != (reason is None) or (lam == 0.0) != (reason is not None):
            raise fields.fault("steps", "has an action that its reason or strength contradicts")
        row.append(
            Step(
                tensor,
                action,
                reason,
                lam,
                stream,
                told_by=told_by,
                out_dtype=out_dtype_of(tensor, reason, conversion),
                parts=parts,
                doubt=doubt and reason is None,
            )
        )
    if len(row) != count:
        raise fields.fault("steps", "are not as many as strengths")
    return tuple(row)


def sums_bytes(sums: Sequence[ShareSums]) -> bytes:
    """Return the file of a share's sums, one for each of the job's strengths."""
    entries = ({"elements": one.elements, "exact": _exact(one.exact)} for one in sums)
    return b"".join(
        lay_out(
            [
                ("schema", SCHEMA),
                ("tool", {"name": "noisytune", "version": __version__}),
                ("sums", entries),
            ]
        )
    )


def _exact(sums: NDArray[np.int64]) -> list[list[int]]:
    """Return the rows of exact sums that are not all 0, each after its number."""
    return [[int(row), *map(int, sums[row])] for row in np.flatnonzero(sums.any(axis=1))]


def read_sums(path: Path, job: Job) -> tuple[ShareSums, ...]:
    """Read a share's sums; raises InputInvalid."""
    with fetching(path, _WHAT, _PLAN_AGAIN) as content:
        document, version = begin(content)
        if version != job.version:
            raise ManifestFault("it is another version's")
        document.member("sums")
        found = tuple(_sums(entry, i) for i, entry in enumerate(document.entries(_MOST_OUTPUTS)))
        document.end()
        if len(found) != len(job.strengths):
            raise ManifestFault("it has not a sum for each strength")
    return found


def _sums(value: Any, index: int) -> ShareSums:
    fields = Fields(value, f"sums[{index}]", ("elements", "exact"))
    exact = new_exact_sums()
    seen = set()
    for row in fields.list("exact"):
        is_row = isinstance(row, list) and len(row) == EXACT_SUMS + 1 and all(type(n) is int for n in row)
        if not (is_row and 0 <= row[0] < EXACT_BINS and all(-_LARGEST <= n <= _LARGEST for n in row)):
            raise fields.fault("exact", "has a row that is none")
        if row[0] in seen:
            raise fields.fault("exact", "has a row twice")
        seen.add(row[0])
        exact[row[0]] = row[1:]
    return ShareSums(fields.count("elements", _LARGEST), exact)

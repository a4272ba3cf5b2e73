"""What is to be done in a share of a job, and with scope global what its values add to the std of all.

The steps of its tensors are decided when the job is planned, one for each strength. Its exact sums
(`noise/std.py`) are left before any noise is added: those of all shares add up to one std.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from noisytune_cli.manifest.consistency import REASONS, cover_exactly
from noisytune_cli.manifest.fields import Fields, ManifestFault, check_string
from noisytune_cli.manifest.job import LARGEST, MOST_OUTPUTS, Job, Share, fetching_of_job
from noisytune_cli.manifest.read import begin
from noisytune_cli.manifest.tensors import ACTIONS, PART_KEYS, TOLD_BY, Tensors, read_part
from noisytune_cli.manifest.write import MAX_LINES, SCHEMA, lay_out, part_json
from noisytune_cli.noise.std import EXACT_BINS, EXACT_SUMS, are_of_values, new_exact_sums
from noisytune_cli.reading import Document
from noisytune_cli.records import MAX_PARTS, Conversion, Step, out_dtype_of
from noisytune_cli.version import __version__


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
    with fetching_of_job(path) as content:
        found = _read_steps(*begin(content), job, share)
        if f"blake3:{content.digest().hex()}" != share.steps:
            raise ManifestFault("it is not the file that the plan knows by its digest")
    return found


def _read_steps(document: Document, version: str, job: Job, share: Share) -> ShareSteps:
    document.member("strengths")
    if list(document.entries(MOST_OUTPUTS)) != list(job.strengths) or version != job.version:
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
    with fetching_of_job(path) as content:
        document, version = begin(content)
        if version != job.version:
            raise ManifestFault("it is another version's")
        document.member("sums")
        found = tuple(_sums(entry, i) for i, entry in enumerate(document.entries(MOST_OUTPUTS)))
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
        if not (is_row and 0 <= row[0] < EXACT_BINS and all(-LARGEST <= n <= LARGEST for n in row)):
            raise fields.fault("exact", "has a row that is none")
        if row[0] in seen:
            raise fields.fault("exact", "has a row twice")
        seen.add(row[0])
        exact[row[0]] = row[1:]
    elements = fields.count("elements", LARGEST)
    if not are_of_values(exact, elements):
        raise fields.fault("exact", "has sums that no values have")
    return ShareSums(elements, exact)

"""The manifest: all that is needed to check an output, or to rebuild it from its source.

Deterministic: the same inputs and options give the same bytes. It holds no time, host, user, thread count or
absolute path. Its JSON Schema, `manifest/manifest.schema.json`, is shipped beside this file;
`docs/manifest.md` explains every field.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from noisytune_cli.errors import InputInvalid
from noisytune_cli.noise import distributions
from noisytune_cli.noise.stream import STREAM
from noisytune_cli.records import (
    Conversion,
    FileRecord,
    Manifest,
    NoiseSpec,
    Outcome,
    OutputRecord,
    Part,
    PartReceipt,
    Plan,
    Receipt,
    SourceRecord,
    Term,
)

#: The manifest in an output directory, and what follows the file's name for an output file.
MANIFEST = "noisytune.json"
MANIFEST_SUFFIX = ".noisytune.json"

#: The model card in a folder, the one file that noise itself can rewrite.
CARD = "README.md"

#: The version of the manifest's layout.
SCHEMA = 1

#: The largest manifest that is written, and read back: some 200,000 tensors.
MAX_BYTES = 128 << 20

#: Lines of a manifest that are written together.
_LINES_AT_ONCE = 1000

#: What an entry takes at most beside its names and its shape, and a number of its shape.
_ENTRY_BYTES, _DIMENSION_BYTES = 520, 21

#: So many tensors and parts no manifest can have, as they are counted before it is written.
MAX_LINES = MAX_BYTES // _ENTRY_BYTES

#: The most amplitudes that a mixture gives all tensors and parts: a reader works each of them out.
MAX_AMPLITUDES = 1 << 24

#: The most that a noise of a mixture takes.
_TERM_BYTES = 120

#: What to do where parts are what makes a manifest too large.
FEWER_PARTS = "Keep the tensors with the most of them whole, with --split='PATTERN=0:/1'"


def manifest_beside(output: Path) -> Path:
    """Return where the manifest of an output that is a file lies."""
    return Path(f"{output}{MANIFEST_SUFFIX}")  # with_name refuses the root


def why_not_together(names: Iterable[str]) -> str | None:
    """Say which files could not lie in one folder with a manifest; None where all can."""
    files = {MANIFEST}
    for name in names:
        if name in files:
            return f'two files of the name "{name}"'
        files.add(name)
    # With the lowest character for "/", a file comes right before what lies in a folder of its name.
    ordered = sorted(files, key=lambda name: name.replace("/", "\0"))
    for name, following in pairwise(ordered):
        if following.startswith(name + "/"):
            return f'both a file "{name}" and a folder of that name'
    return None


def encode(manifest: Manifest) -> bytes:
    """Return the manifest as JSON in ASCII, one line for each tensor and file."""
    return b"".join(pieces(manifest))


def pieces(manifest: Manifest) -> Iterator[bytes]:
    """Yield the bytes of a manifest a thousand lines at a time."""
    return lay_out(_members(manifest))


def lay_out(document: Iterable[tuple[str, Any]]) -> Iterator[bytes]:
    """Yield a manifest's members as JSON in ASCII, one line for each entry of a list or an iterator."""
    lines: list[str] = []
    before = "{\n"
    for key, value in document:
        if isinstance(value, (list, Iterator)):
            opening = f'{before} "{key}": [\n  '
            for entry in value:
                lines.append(f"{opening}{_dump(entry)}")
                opening = ",\n  "
                if len(lines) >= _LINES_AT_ONCE:
                    yield "".join(lines).encode("ascii")
                    lines.clear()
            lines.append("\n ]" if opening == ",\n  " else f'{before} "{key}": []')
        else:
            lines.append(f'{before} "{key}": {_dump(value)}')
        before = ",\n"
    lines.append("\n}\n")
    yield "".join(lines).encode("ascii")


def check_recordable(plan: Plan, *, path: str | os.PathLike[str]) -> None:
    """Raise InputInvalid where the manifest could be larger than what is read back."""
    terms = len(plan.noise.mix)
    if (matrices := sum(len(step.parts) or 1 for step in plan.steps)) * terms > MAX_AMPLITUDES:
        raise InputInvalid(
            "too much noise for one manifest",
            path=path,
            why=f"{terms:,} noises of {matrices:,} matrices are more than {MAX_AMPLITUDES:,} amplitudes",
            next_step="Add the noises up in several runs, each with a part of them, with --again",
        )
    nbytes = _TERM_BYTES * terms
    for step in plan.steps:
        tensor = step.tensor
        nbytes += sum(len(_dump(name)) for name in (tensor.name, step.stream, tensor.file))
        nbytes += _ENTRY_BYTES + _DIMENSION_BYTES * len(tensor.shape)
        nbytes += sum(
            _ENTRY_BYTES + len(part.name) + _DIMENSION_BYTES * len(part.shape) for part in step.parts
        )
    if nbytes > MAX_BYTES:
        parts = sum(len(step.parts) for step in plan.steps)
        counted = f"{len(plan.steps):,} tensors" + (f" with {parts:,} matrices" if parts else "")
        raise InputInvalid(
            "too many tensors for one manifest",
            path=path,
            why=f"{counted} can take {nbytes:,} bytes of it; the limit is {MAX_BYTES:,}",
            next_step=FEWER_PARTS
            if parts
            else "Add the noise to the loaded model with perturb_(), which needs no manifest",
        )


def to_json(manifest: Manifest) -> dict[str, Any]:
    """Return the manifest as the JSON document it is stored as."""
    return {key: list(value) if isinstance(value, Iterator) else value for key, value in _members(manifest)}


def _members(manifest: Manifest) -> Iterator[tuple[str, Any]]:
    """Yield the members of a manifest, its tensors one at a time."""
    range_keys = distributions.load(manifest.noise.distribution).noise_range(0.0).keys()
    yield "schema", SCHEMA
    yield "tool", {"name": manifest.tool_name, "version": manifest.tool_version}
    yield "source", source_json(manifest.source)
    if manifest.output is not None:
        yield "output", _output(manifest.output)
    yield "noise", noise_json(manifest.noise)
    yield "tensors", (_tensor(r, range_keys, manifest.noise.needs_std) for r in manifest.receipts)
    yield from beside_json(manifest.copied, manifest.rewritten).items()
    yield "left_out", left_out_json(manifest.left_out)
    totals = {
        "tensors": len(manifest.receipts),
        "perturbed": sum(r.action == "perturb" for r in manifest.receipts),
        "parameters": sum(r.step.tensor.elements for r in manifest.receipts),
        "bytes": sum(r.step.tensor.nbytes for r in manifest.receipts),
    }
    yield "totals", totals


def source_json(source: SourceRecord) -> dict[str, Any]:
    """Return a source as it stands in a manifest."""
    return {
        "id": source.id,
        "revision": source.revision,
        "files": [_file(file) for file in source.files],
    }


def beside_json(
    copied: Iterable[tuple[str, str]], rewritten: Iterable[tuple[str, str | None, str]]
) -> dict[str, Any]:
    """Return the files beside the weights as they stand in a manifest: those copied, and a new model card."""
    anew = [{"name": name, "source": source, "digest": digest} for name, source, digest in rewritten]
    return {
        "copied": [{"name": name, "digest": digest} for name, digest in copied],
        **({"rewritten": anew} if anew else {}),
    }


def left_out_json(left_out: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Return the files that are not in an output as they stand in a manifest."""
    return [{"name": name, "why": why} for name, why in left_out]


def _file(file: FileRecord) -> dict[str, Any]:
    return {"name": file.name, "size": file.size, "header_digest": file.header_digest}


def _output(output: OutputRecord) -> dict[str, Any]:
    return {
        **conversion_json(output.conversion),
        "files": [_file(file) for file in output.files],
        "rewritten": [
            {"name": name, "source": source, "digest": digest} for name, source, digest in output.rewritten
        ],
    }


def conversion_json(conversion: Conversion) -> dict[str, str | None]:
    """Return what an output converts as it stands in a manifest."""
    return {
        "dtype": conversion.dtype,
        "format": conversion.format,
        "dequantized": conversion.dequantized,
    }


_dump = json.JSONEncoder(allow_nan=False).encode


def noise_json(noise: NoiseSpec) -> dict[str, Any]:
    """Return the noise as it stands in a manifest."""
    return {
        "stream": STREAM,
        "distribution": noise.distribution,
        "scope": noise.scope,
        "granularity": noise.granularity,
        "seed": None if noise.mix else str(noise.seed),  # a u64 does not survive jq, nor JavaScript
        "lambda": float(noise.lam) if noise.needs_std else None,
        **({} if noise.needs_std else {"sigma": float(noise.lam)}),
        "rules": [[pattern, float(lam)] for pattern, lam in noise.rules],
        "include": list(noise.include),
        "exclude": list(noise.exclude),
        **({} if noise.kept == 1.0 else {"shrink": float(noise.kept)}),
        **({"mix": [_term(term, noise) for term in noise.mix]} if noise.mix else {}),
    }


def _term(term: Term, noise: NoiseSpec) -> dict[str, Any]:
    strength = "lambda" if noise.needs_std else "sigma"
    return {
        "seed": str(term.seed),
        strength: float(term.strength),
        "coefficient": float(term.coefficient),
    }


def _tensor(receipt: Receipt, range_keys: Iterable[str], has_lambda: bool) -> dict[str, Any]:
    tensor = receipt.step.tensor
    entry: dict[str, Any] = {
        "name": tensor.name,
        "stream": receipt.step.stream,
        "file": tensor.file,
        "dtype": tensor.dtype,
        **({} if receipt.step.out_dtype is None else {"out_dtype": receipt.step.out_dtype}),
        "shape": list(tensor.shape),
    }
    entry |= _done(receipt, range_keys, has_lambda)
    if receipt.step.told_by and (receipt.reason == "buffer" or receipt.step.doubt):
        entry["told_by"] = receipt.step.told_by
    if receipt.digest:  # noise in memory has no stored bytes to digest
        entry["source_digest"] = receipt.source_digest
        entry["digest"] = receipt.digest
    if receipt.parts:
        entry["parts"] = [_part(part, range_keys, has_lambda) for part in receipt.parts]
    return entry


def _part(receipt: PartReceipt, range_keys: Iterable[str], has_lambda: bool) -> dict[str, Any]:
    return {**part_json(receipt.part), **_done(receipt, range_keys, has_lambda)}


def part_json(part: Part) -> dict[str, Any]:
    """Return a part of a tensor, and where it lies, as they stand in a manifest."""
    return {
        "name": part.name,
        "shape": list(part.shape),
        "first": part.first,
        "length": part.length,
        "stride": part.stride,
        "repeat": part.repeat,
    }


def _done(receipt: Outcome, range_keys: Iterable[str], has_lambda: bool) -> dict[str, Any]:
    """Return what was done to a tensor or to a part of one."""
    reason = {} if receipt.reason is None else {"reason": receipt.reason}
    return {
        "action": receipt.action,
        **reason,
        "lambda": float(receipt.lam) if has_lambda else None,
        "std": _finite(receipt.std),
        "amplitude": receipt.amplitude,
        **{key: getattr(receipt, key) for key in range_keys},
        "unchanged": receipt.unchanged,
        "clamped": receipt.clamped,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

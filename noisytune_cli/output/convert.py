"""The output's weight files where they are no twins of the source's: other dtypes, names or format.

Everything follows from headers. A rewritten file is safetensors with the source's tensors in the source's
order, and it is a pure function of what the source's header says and of the dtypes: `verify` and `replay`
make the same header again.

Names that a pickle stores as one become one tensor, under the name whose noise they get; `__metadata__` maps
the others to it, as safetensors' own `save_model` writes and transformers and torch loaders expect.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from blake3 import blake3

from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.checkpoint.formats import Sink, Source
from noisytune_cli.checkpoint.formats._direct import Room
from noisytune_cli.checkpoint.formats.safetensors import SafetensorsSource, create_file
from noisytune_cli.checkpoint.formats.safetensors.header import MAX_ENTRIES, MAX_HEADER, PREFIX
from noisytune_cli.checkpoint.layout import METADATA, PICKLE_SUFFIXES, SAFETENSORS_SUFFIX
from noisytune_cli.dtypes import DTYPES, FLOAT_DTYPES
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.manifest.write import why_not_together
from noisytune_cli.plan.ties import stream_of
from noisytune_cli.records import Conversion, FileRecord, Plan, Step, TensorSpec

_METADATA = "__metadata__"

#: What transformers calls the weights as a pickle and as safetensors.
_STEMS = ("pytorch_model", "model")


@dataclass(frozen=True)
class OutputFile:
    """One weight file of the output: its header, and for each tensor of the source the slot it goes to.

    `aliases` maps names that are stored under another one to that; `mode` is the source's.
    """

    name: str
    header: bytes
    slots: Mapping[str, TensorSpec]
    aliases: Mapping[str, str]
    mode: int

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return max((slot.offset + slot.nbytes for slot in self.slots.values()), default=len(self.header))

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """What the file holds, in its order."""
        stored = (slot for name, slot in self.slots.items() if name not in self.aliases)
        return tuple(sorted(stored, key=lambda slot: (slot.offset, slot.nbytes)))

    @cached_property
    def record(self) -> FileRecord:
        """The file as a manifest records it."""
        return FileRecord(self.name, self.size, f"blake3:{blake3(self.header).hexdigest()}")

    def create_sink(self, path: Path, *, room: Room | None = None) -> Sink:
        """Create the file at `path`, which must not exist, with its header and empty slots."""
        return create_file(path, self.header, self.size, self.mode, room)


def lay_out(sources: Sequence[Source], plan: Plan, conversion: Conversion) -> tuple[OutputFile, ...]:
    """Return the output's file for each weight file; `plan` says in which dtype each tensor is written.

    Raises UsageError where a file's own format cannot be kept, InputInvalid where safetensors cannot hold it.
    """
    steps: dict[str, list[Step]] = {source.name: [] for source in sources}
    for step in plan.steps:
        steps[step.tensor.file].append(step)
    return tuple(_lay_out(source, steps[source.name], conversion) for source in sources)


def _lay_out(source: Source, steps: Iterable[Step], conversion: Conversion) -> OutputFile:
    from noisytune_cli.checkpoint.dequantize import Dequantized  # not for outputs like their source

    dtypes = {step.tensor.name: step.out_dtype or step.tensor.dtype for step in steps}
    same_dtypes = all(dtypes[tensor.name] == tensor.dtype for tensor in source.tensors)
    file = source.inner if isinstance(source, Dequantized) else source
    if isinstance(file, SafetensorsSource):
        if same_dtypes and file is source:
            slots = {tensor.name: tensor for tensor in source.tensors}
            return OutputFile(source.name, bytes(file.header), slots, {}, source.mode)
    elif conversion.format is None:
        raise UsageError(
            "--to=safetensors is missing",
            path=source.path,
            why="the weights are pickled, and a pickle is written back as it is but for the noise",
            next_step="Add --to=safetensors",
        )
    kept = [(names, stream_of(names)) for names in source.ties]
    aliases = {name: keep for names, keep in kept for name in names if name != keep}
    stored = [
        replace(tensor, dtype=dtypes[tensor.name], nbytes=_nbytes(tensor, dtypes[tensor.name]))
        for tensor in source.tensors
        if tensor.name not in aliases
    ]
    for tensor in stored:
        if tensor.dtype not in DTYPES:
            raise _cannot_hold(source, f"safetensors has no dtype {tensor.dtype}", tensor.name)
        if tensor.name == _METADATA:
            raise _cannot_hold(source, "safetensors keeps this name for itself", tensor.name)
    metadata = source.metadata
    if not isinstance(file, SafetensorsSource):
        metadata = {**dict(sorted(aliases.items())), "format": "pt"}
    head, slots = _build(aligned(stored), metadata)
    if len(head) - PREFIX > MAX_HEADER or len(stored) > MAX_ENTRIES:
        raise _cannot_hold(source, "its tensors' names need a header larger than readers accept")
    name = output_name(source.name, conversion)
    slots |= {alias: slots[keep] for alias, keep in aliases.items()}
    return OutputFile(name, head, slots, aliases, source.mode)


def check_names(source: Checkpoint, files: Sequence[OutputFile] = ()) -> None:
    """Raise InputInvalid where an output would have a file, its manifest too, and a folder of one name."""
    weights = [file.name for file in files] or source.weight_files
    if why := why_not_together([*weights, *source.others]):
        raise InputInvalid(
            "cannot make an output of the checkpoint",
            path=source.path,
            why=f"it would have {why}",
            next_step="Rename or move the folder, or give the weight file alone",
        )


def output_name(name: str, conversion: Conversion) -> str:
    """Return what a weight file (relative to the checkpoint) is called in the output."""
    folder, base = posixpath.split(name)
    if conversion.format is not None and base == METADATA:
        return posixpath.join(folder, _STEMS[1] + SAFETENSORS_SUFFIX)
    if conversion.format is None or not name.endswith(PICKLE_SUFFIXES):
        return name
    stem = base[: base.rindex(".")]
    if stem.startswith(_STEMS[0]):
        stem = _STEMS[1] + stem.removeprefix(_STEMS[0])
    return posixpath.join(folder, stem + SAFETENSORS_SUFFIX)


def _nbytes(tensor: TensorSpec, dtype: str) -> int:
    return tensor.nbytes if dtype == tensor.dtype else tensor.elements * FLOAT_DTYPES[dtype]


def aligned(tensors: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Return a file's tensors in an order in which each begins at a multiple of its elements' size.

    That is their own, unless a new dtype leaves one unaligned, which torch could not view: then the larger
    elements come first, as the safetensors package lays out every file.
    """
    at = 0
    for tensor in tensors:
        if at % _itemsize(tensor):
            return sorted(tensors, key=_itemsize, reverse=True)
        at += tensor.nbytes
    return list(tensors)


def _itemsize(tensor: TensorSpec) -> int:
    return max(1, tensor.nbytes // tensor.elements) if tensor.nbytes else 1


def _build(tensors: Iterable[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, TensorSpec]]:
    """Return the header of a safetensors file with these tensors in this order, and where each lies."""
    entries: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    at = 0
    begins = []
    for tensor in tensors:
        begins.append((tensor, at))
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(PREFIX, "little") + text
    return header, {tensor.name: replace(tensor, offset=len(header) + begin) for tensor, begin in begins}


def _cannot_hold(source: Source, why: str, tensor: str | None = None) -> InputInvalid:
    return InputInvalid(
        "cannot write safetensors",
        path=source.path,
        tensor=tensor,
        why=why,
        next_step="Leave --to=safetensors out, which keeps the file's own format",
    )

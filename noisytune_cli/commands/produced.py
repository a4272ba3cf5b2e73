"""What a manifest says of the output's own weight files: theirs may be other names, dtypes and headers.

A manifest records tensors as the base has them. This is the same manifest with each tensor as the output
has it, so that one comparison serves both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from noisytune_cli.checkpoint.formats import Source
from noisytune_cli.commands.compare import Difference
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.output.convert import aligned
from noisytune_cli.records import Manifest, Receipt, with_output_files


def as_produced(manifest: Manifest, files: Mapping[str, Source]) -> tuple[Manifest, list[Difference]]:
    """Return the manifest as it reads for the output, and what contradicts itself in that.

    `files` are the output's weight files, by recorded name, as far as they could be opened. A name that one
    of them stores under another is left out; what is recorded of it has to be what is recorded of that.
    """
    if manifest.output is None:
        return manifest, []
    receipts: list[Receipt] = []
    found: list[Difference] = []
    by_file: dict[str, list[Receipt]] = {file.name: [] for file in manifest.source.files}
    for receipt in manifest.receipts:
        by_file[receipt.step.tensor.file].append(receipt)
    digests = {receipt.step.tensor.name: receipt.digest for receipt in manifest.receipts}
    for base, made in zip(manifest.source.files, manifest.output.files, strict=True):
        own = [_as_written(receipt, made.name) for receipt in by_file[base.name]]
        source = files.get(made.name)
        present = {tensor.name for tensor in source.tensors} if source is not None else set()
        stored = []
        for receipt in own:
            name = receipt.step.tensor.name
            other = "" if source is None or name in present else source.metadata.get(name, "")
            if other not in present:
                stored.append(receipt)
            elif digests.get(other) != receipt.digest:
                found.append(
                    Difference(made.name, name, f'it is stored as "{other}", whose bytes are others')
                )
        if base.header_digest != made.header_digest:
            place = {t.name: i for i, t in enumerate(aligned([r.step.tensor for r in stored]))}
            stored.sort(key=lambda receipt: place[receipt.step.tensor.name])
        receipts += stored
    return replace(with_output_files(manifest), receipts=tuple(receipts)), found


def _as_written(receipt: Receipt, file: str) -> Receipt:
    """Return a receipt whose tensor is the output's."""
    tensor, dtype = receipt.step.tensor, receipt.step.out_dtype
    if dtype is not None:
        tensor = replace(tensor, dtype=dtype, nbytes=tensor.elements * FLOAT_DTYPES[dtype])
    return replace(receipt, step=replace(receipt.step, tensor=replace(tensor, file=file), out_dtype=None))

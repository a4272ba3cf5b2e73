"""PyTorch checkpoints: what torch.save writes, as a ZIP archive or in the legacy format.

The structure is read without torch and without running anything (`pickle.py`); what it allows is a part of
what torch.load(weights_only=True) does. Tensors are read from the storages where they lie, and written back
there (`storages.py`).
"""

from __future__ import annotations

from pathlib import Path

from noisytune_cli.checkpoint.formats._file import open_input
from noisytune_cli.checkpoint.formats._signatures import HEAD, NUMPY_ARCHIVE, is_tar
from noisytune_cli.checkpoint.formats._signatures import recognise as recognise_other
from noisytune_cli.checkpoint.formats.torch import zip as _zip
from noisytune_cli.checkpoint.formats.torch.archive import Archive, read_legacy, read_zip
from noisytune_cli.checkpoint.formats.torch.globals import StoredTensor
from noisytune_cli.checkpoint.formats.torch.state_dict import declared_by, sort_content
from noisytune_cli.checkpoint.formats.torch.storages import StoredSource
from noisytune_cli.checkpoint.formats.torch.values import PickleFault
from noisytune_cli.errors import InputInvalid
from noisytune_cli.reading import Reach

#: What a file's name ends in.
SUFFIXES = (".bin", ".pt", ".pth", ".th", ".ckpt")

_PICKLE = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))

_FETCH = "The file is damaged or wrongly written: fetch it again, or save it anew with torch.save"


def recognise(head: bytes) -> bool:
    """Tell whether a file that begins with `head` is a ZIP archive, a pickle, or torch's tar of old."""
    return head.startswith((_zip.MAGIC, *_PICKLE)) or is_tar(head)


class TorchSource(StoredSource):
    """One open PyTorch checkpoint (see `formats.Source`)."""

    def _find(self) -> tuple[Archive, list[tuple[str, StoredTensor]]]:
        archive = self._read_archive()
        content = sort_content(archive.root, StoredTensor)
        self.beside = content.beside
        self.warnings = content.warnings(self.name)
        self.declared = declared_by(archive.root, content.weights)
        self.paths = {weight.name: weight.path for weight in content.weights if weight.path}
        return archive, [(weight.name, weight.tensor) for weight in content.weights]

    def _read_archive(self) -> Archive:
        head = self._bytes(0, min(self.size, HEAD))
        known = recognise_other(head)
        if head.startswith(_zip.MAGIC) and (known is None or known[0] != NUMPY_ARCHIVE):
            return read_zip(self._bytes, self.size)
        if head.startswith(_PICKLE):
            return read_legacy(self._bytes, self.size)
        why, next_step = (
            (f"it is {known[0]}", known[1]) if known else ("it is no file of torch.save's", _FETCH)
        )
        raise PickleFault("it is empty" if self.size == 0 else why, next_step)

    def _invalid(self, fault: PickleFault, tensor: str | None = None) -> InputInvalid:
        return InputInvalid(
            "not a valid PyTorch checkpoint",
            path=self.path,
            tensor=tensor,
            why=fault.why,
            next_step=fault.next_step or _FETCH,
        )


def open_source(path: Path, name: str, mmap: bool, reach: Reach | None = None) -> TorchSource:
    """Open the PyTorch checkpoint at `path` and read its structure; no tensor data is read.

    `name` is the file's name relative to the checkpoint, for the TensorSpecs. Raises InputInvalid for
    whatever is no PyTorch checkpoint or not a safe one, InputUnreadable if it is missing or cannot be read.
    """
    return open_input(path, lambda fd: TorchSource(fd, path, name, mmap), reach)

"""What a verb found or did, as Python shows it: one line, and on demand a dict or a data frame."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from noisytune_cli.errors import lacking
from noisytune_cli.manifest.write import to_json
from noisytune_cli.records import Manifest


class Result(ABC):
    """The base of what the file functions return; a dataclass with `repr=False`."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything in it as dicts, lists, texts and numbers; a manifest as its JSON has it."""
        found: dict[str, Any] = _plain(self)
        return found

    def to_frame(self) -> Any:
        """Return its rows as a pandas.DataFrame, a tensor each (of `verify` what does not match).

        PackageMissing without pandas.
        """
        try:
            import pandas  # type: ignore[import-untyped]
        except ModuleNotFoundError as error:
            raise lacking(error) or error from None
        return pandas.DataFrame([_plain(row) for row in self._rows()])

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._told()}>"

    @abstractmethod
    def _rows(self) -> Sequence[Any]:
        """Return what the frame has a row for."""

    @abstractmethod
    def _told(self) -> str:
        """Return what the line says."""


def _plain(value: Any) -> Any:
    if isinstance(value, Manifest):
        return to_json(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value

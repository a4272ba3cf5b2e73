"""Frozen records, built a hundred thousand at a time.

A frozen dataclass sets each field through `object.__setattr__`, which takes most of the time of reading a
large manifest. A twin has the same slots and is not frozen: it is filled, and becomes the record by taking
on its class, as frozen as any other from then on.
"""

from __future__ import annotations

import dataclasses
from typing import Any


def twin(record: type[Any]) -> Any:
    """Return a class that is built from all fields of `record` (with slots) and can take on its class."""
    names = [field.name for field in dataclasses.fields(record)]
    # Not by `dataclass`, which gives a frozen base no other heirs. Slots have to be added at the same level.
    made: dict[str, Any] = {}
    body = "".join(f"\n    self.{name} = {name}" for name in names)
    exec(f"def __init__(self, {', '.join(names)}):{body}", made)
    made |= {"__slots__": record.__slots__}
    # Both, or neither would be the quick one.
    made |= {"__setattr__": object.__setattr__, "__delattr__": object.__delattr__}
    return type(f"{record.__name__}Twin", record.__bases__, made)

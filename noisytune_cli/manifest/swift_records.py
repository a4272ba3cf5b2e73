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
    return dataclasses.make_dataclass(f"{record.__name__}Twin", names, slots=True, eq=False, repr=False)

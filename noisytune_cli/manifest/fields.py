"""The fields of a manifest's objects, each taken out by its type; what is wrong names the field."""

from __future__ import annotations

import functools
import math
import re
import struct
from collections.abc import Sequence
from typing import Any

from noisytune_cli.dtypes import LARGEST
from noisytune_cli.records import MAX_SEED

_DIGEST = re.compile(r"blake3:[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SEED = re.compile(r"0|[1-9][0-9]{0,19}")
_SURROGATE = re.compile("[\ud800-\udfff]")

_FLOAT32 = struct.Struct("<f")
_INFINITE = (math.inf, -math.inf)

_LONGEST_NAME = 4096  # bytes of a path, PATH_MAX


class ManifestFault(Exception):
    """What is wrong with a manifest, and what its user can do about it; None is for its reader to say."""

    def __init__(self, why: str, *, next_step: str | None = None) -> None:
        super().__init__(why)
        self.why, self.next_step = why, next_step


def check_string(value: Any, where: str) -> str:
    """Return `value` if it is a string that UTF-8 can spell."""
    if not isinstance(value, str):
        raise ManifestFault(f"{where} is not a string")
    if not value.isascii() and _SURROGATE.search(value):
        raise ManifestFault(f"{where} has half a surrogate pair")
    return value


def check_name(value: Any, where: str) -> str:
    """Return `value` if it names a file inside the folder it is relative to, whatever lies there."""
    name = check_string(value, where)
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ManifestFault(f'{where} is "{name[:100]}", which is no plain name inside the folder')
    if len(name.encode()) > _LONGEST_NAME:
        raise ManifestFault(f"{where} is longer than any file's name")
    return name


def check_digest(value: Any, where: str) -> str:
    """Return `value` if it is a digest `blake3:HEX`."""
    digest = check_string(value, where)
    if not _DIGEST.fullmatch(digest):
        raise ManifestFault(f"{where} is not blake3: and 64 hexadecimal digits")
    return digest


def is_float32(value: float) -> bool:
    """Tell whether float32 holds a number exactly."""
    try:
        return bool(_FLOAT32.unpack(_FLOAT32.pack(value))[0] == value)
    except OverflowError:
        return False


@functools.cache
def _sets(required: tuple[str, ...], optional: tuple[str, ...]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the keys that an object must have, and those that it may have."""
    return frozenset(required), frozenset((*required, *optional))


class Fields:
    """One object of the manifest, which has `required` keys and may have `optional` ones, and no others."""

    __slots__ = ("_value", "_where")

    def __init__(
        self, value: Any, where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()
    ) -> None:
        if not isinstance(value, dict):
            raise ManifestFault(f"{where} is not an object")
        needed, known = _sets(required, optional)
        if value.keys() != needed and not needed <= value.keys() <= known:
            for key in required:
                if key not in value:
                    raise ManifestFault(f"{where}.{key} is missing")
            unknown = next(key for key in value if key not in known)
            raise ManifestFault(f'{where} has an unknown key "{unknown[:100]}"')
        self._value, self._where = value, where

    def has(self, key: str) -> bool:
        """Tell whether an optional key is there."""
        return key in self._value

    def equals(self, key: str, value: str | float | None) -> bool:
        """Tell whether a field has this value."""
        found = self._value[key]
        return not isinstance(found, bool) and bool(found == value)

    def string(self, key: str) -> str:
        """Return a string."""
        value = self._value[key]
        if type(value) is str and value.isascii():
            return value  # most are, and a large manifest has a million
        return check_string(self._value[key], f"{self._where}.{key}")

    def optional_string(self, key: str) -> str | None:
        """Return a string, or None for null."""
        return None if self._value[key] is None else self.string(key)

    def strings(self, key: str) -> tuple[str, ...]:
        """Return a list of strings."""
        return tuple(check_string(one, f"{self._where}.{key}") for one in self.list(key))

    def flag(self, key: str) -> bool:
        """Return true or false."""
        value = self._value[key]
        if type(value) is not bool:
            raise self.fault(key, "is neither true nor false")
        return value

    def name(self, key: str) -> str:
        """Return a file's name, relative to the checkpoint."""
        return check_name(self._value[key], f"{self._where}.{key}")

    def choice(self, key: str, choices: Sequence[str]) -> str:
        """Return one of `choices`."""
        value = self.string(key)
        if value not in choices:
            raise self.fault(key, f'is "{value[:100]}", not one of: {", ".join(choices)}')
        return value

    def optional_choice(self, key: str, choices: Sequence[str]) -> str | None:
        """Return one of `choices`, or None for null."""
        return None if self._value[key] is None else self.choice(key, choices)

    def digest(self, key: str) -> str:
        """Return a digest `blake3:HEX`."""
        value = self._value[key]
        if type(value) is str and _DIGEST.fullmatch(value):
            return value
        return check_digest(self._value[key], f"{self._where}.{key}")

    def commit(self, key: str) -> str | None:
        """Return a full commit, or None."""
        if self._value[key] is None:
            return None
        value = self.string(key)
        if not _COMMIT.fullmatch(value):
            raise self.fault(key, "is not a commit of 40 hexadecimal digits")
        return value

    def seed(self, key: str) -> int:
        """Return a u64 written as a string."""
        value = self.string(key)
        if not _SEED.fullmatch(value) or int(value) > MAX_SEED:
            raise self.fault(key, "is not a whole number from 0 to 2^64-1 in a string")
        return int(value)

    def integer(self, key: str) -> int:
        """Return an integer >= 0."""
        value = self._value[key]
        if type(value) is not int or value < 0:
            raise self.fault(key, "is not an integer >= 0")
        return value

    def count(self, key: str, limit: int) -> int:
        """Return an integer from 0 to `limit`."""
        value = self._value[key]
        if type(value) is int and 0 <= value <= limit:
            return value
        value = self.integer(key)
        if value > limit:
            raise self.fault(key, f"is more than {limit:,}")
        return value

    def list(self, key: str) -> list[Any]:
        """Return a list."""
        value = self._value[key]
        if not isinstance(value, list):
            raise self.fault(key, "is not a list")
        return value

    def number(self, key: str) -> float | None:
        """Return a finite float64, or None for null."""
        value = self._value[key]
        if value is None:
            return None
        if type(value) not in (int, float):
            raise self.fault(key, "is not a number")
        if value in _INFINITE:
            raise self.fault(key, "is too large for a number")
        return float(value)

    def holds(self, key: str, value: float | None) -> bool:
        """Tell whether a field has this number, or null for None; raises for what is neither."""
        found = self._value[key]
        return found == value if type(found) is float else self.number(key) == value

    def strength(self, key: str) -> float:
        """Return λ or σ: a finite number."""
        value = self._value[key]
        if type(value) is float and 0.0 < value < math.inf:
            return value
        value = self.number(key)
        if value is None:
            raise self.fault(key, "is not a number")
        if value == 0 and math.copysign(1.0, value) < 0:
            raise self.fault(key, "is a zero with a sign")
        return value

    def float32(self, key: str, *, signed: bool = False) -> float | None:
        """Return a number, >= 0 unless `signed`, that float32 holds exactly, or None for null."""
        value = self._value[key]
        # As most are; what is larger cannot be packed.
        if type(value) is float and 0.0 < value <= LARGEST["F32"] and is_float32(value):
            return value
        value = self.number(key)
        if value is None:
            return None
        if not signed and (value < 0 or math.copysign(1.0, value) < 0):
            raise self.fault(key, "is negative")
        if not is_float32(value):
            raise self.fault(key, "is not a float32 value")
        return value

    def fault(self, key: str, what: str) -> ManifestFault:
        """Return the fault that `key` `what` (is …)."""
        return ManifestFault(f"{self._where}.{key} {what}")

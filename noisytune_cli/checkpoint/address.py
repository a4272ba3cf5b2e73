"""Addresses in an object store: `s3://`, `gs://` and `az://`, a bucket and a key in it.

A key is taken as it is written. Credentials and endpoints are in the environment, never in an address: one
with a query or a user is refused, and what would be secret in it is not repeated.
"""

from __future__ import annotations

import re
from pathlib import Path

from noisytune_cli.errors import UsageError

#: The folder in an output, or beside it, for what is of its making, and gone when it is complete.
UNFINISHED = ".noisytune"

_ADDRESS = re.compile(r"(?P<scheme>s3|gs|az)://(?P<bucket>[^/]*)(?P<key>.*)", re.DOTALL)


class Address(str):
    """What lies, or will lie, in a bucket: SCHEME://BUCKET/KEY, without a slash at its end.

    It is a text, so that it is printed and recorded as it is, and is no path: nothing here can open it.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Address:
        """Read an address; UsageError for one that no object can have, or that holds more than one."""
        found = _ADDRESS.fullmatch(text)
        assert found is not None, "is_address was not asked"
        scheme, bucket, key = found["scheme"], found["bucket"], found["key"].rstrip("/")
        plain = f"{scheme}://{bucket.rpartition('@')[2]}{key.split('?')[0]}"
        if "@" in bucket or "?" in bucket + key:
            raise UsageError(
                "the address has more in it than a bucket and a key",
                path=plain.split("?")[0],
                why="a user, a password or a query is no part of it",
                next_step="Set what the store needs by its own variables, such as AWS_ACCESS_KEY_ID",
            )
        parts = key[1:].split("/") if key else []
        if not bucket or not text.isprintable() or any(part in ("", ".", "..") for part in parts):
            raise UsageError(
                "no object has such an address",
                path=plain,
                why="a bucket is missing, or a part of the key is empty, '.' or '..'",
                next_step="Give SCHEME://BUCKET/KEY",
            )
        return super().__new__(cls, plain)

    @property
    def store(self) -> str:
        """The bucket's own address."""
        return "/".join(self.split("/")[:3])

    @property
    def key(self) -> str:
        """Where in the bucket it is, "" for the bucket itself."""
        return self[len(self.store) + 1 :]

    @property
    def name(self) -> str:
        """The last part of the key, the bucket's name for a bucket."""
        return self.rpartition("/")[2]

    @property
    def parent(self) -> Address:
        """What it lies in; a bucket lies in itself."""
        return super().__new__(type(self), self.rpartition("/")[0]) if self.key else self

    def above(self, levels: int) -> Address:
        """Return what it lies in, so many levels up."""
        return self if not levels else self.parent.above(levels - 1)

    @property
    def parents(self) -> tuple[Address, ...]:
        """All that it lies in, the nearest first."""
        places = [self]
        while places[-1].key:
            places.append(places[-1].parent)
        return tuple(places[1:])

    def __truediv__(self, name: str) -> Address:
        return super().__new__(type(self), f"{self}/{name}")  # what a listing names need not be typed


#: Where an output goes or lies: here, or in an object store.
Place = Path | Address


#: How a text begins that is meant as an address; a folder here of such a name is ./NAME.
_SCHEME = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/")


def as_place(text: str) -> Place:
    """Return where a text leads that is an address or a path."""
    return Address(text) if is_address(text) else Path(text)


def has_scheme(text: str) -> bool:
    """Tell whether a text begins as addresses do, of whatever kind (S3://, https://, s3:/, file:///)."""
    return _SCHEME.match(text) is not None


def is_address(text: str) -> bool:
    """Tell whether a text is an address in an object store; such a one is no path and no hub id."""
    return text.startswith(("s3://", "gs://", "az://"))

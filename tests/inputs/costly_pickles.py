"""PyTorch checkpoints of which a few opcodes ask for far more work, or memory, than there are bytes.

They join the table of `malformed_pickles.py`; torch itself is not asked about them.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator

from malformed import Case
from pickles import Writer, archive, legacy, one

_AGAIN = "again and again"


def hash_alike(count: int) -> list[tuple[int, int]]:
    """Pairs of numbers whose tuples have one hash in CPython: its xxHash has no seed."""
    return list(itertools.islice(_alike(), count))


def _alike() -> Iterator[tuple[int, int]]:
    first, second, start, word = 11400714785074694791, 14029467366897019727, 2870177450012600261, 1 << 64
    back = pow(second, -1, word)
    for a in itertools.count():
        lane = (start + a * second) % word
        lane = (lane << 31 | lane >> 33) * first % word
        b = -lane * back % word
        if b < (1 << 61) - 1:  # larger numbers have other hashes
            yield a, b


def _put(number: int) -> bytes:
    return b"r" + struct.pack("<L", number)


def _get(number: int) -> bytes:
    return b"j" + struct.pack("<L", number)


def _text(length: int) -> bytes:
    return b"X" + struct.pack("<L", length) + b"x" * length


def _number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


#: Two texts that are equal, and not the same.
_TWINS = _text(2 << 20) + _put(0) + _text(2 << 20) + _put(1)


def _of(*opcodes: bytes) -> bytes:
    return archive(b"\x80\x02" + b"".join(opcodes) + b".")


def _called(module: str, name: str, arguments: bytes, times: int) -> bytes:
    """The results of a call with the same arguments, so often."""
    function = f"c{module}\n{name}\n".encode()
    return _of(function, _put(0), arguments, _put(1), b"](", (_get(0) + _get(1) + b"R") * times, b"e")


def _items(count: int, end: bytes = b"") -> bytes:
    return b"".join(_number(i) + b"N" + end for i in range(count))


def _keys_alike() -> bytes:
    return _of(b"}(", *(_number(a) + _number(b) + b"\x86N" for a, b in hash_alike(30_000)), b"u")


def _pairs_alike() -> bytes:
    pairs = b"".join(_number(a) + _number(b) + b"\x86N\x86" for a, b in hash_alike(30_000))
    return _called("collections", "OrderedDict", b"](" + pairs + b"e\x85", 1)


def _through_itself() -> bytes:
    """A call that calls the same function, and that again, 100,000 deep."""
    names = b"ctorch._tensor\n_rebuild_from_type_v2\n" + _put(0) + b"ctorch\nTensor\n" + _put(1)
    deep = 100_000
    return _of(names, _get(0), (b"(" + _get(0) + _get(1)) * deep, b")", b"Nt" * deep, b"R")


def _storages_alike() -> bytes:
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\n%bX\3\0\0\0cpuK\4tQ"
    return _of(_TWINS, b"](", (storage % _get(0) + storage % _get(1)) * 30_000, b"e")


def _listed_alike() -> bytes:
    good = legacy(one(legacy=True))
    listed = b"\x80\x02" + _TWINS + b"](" + (_get(0) + _get(1)) * 50_000 + b"e."
    return good[: good.rindex(b"\x80\x02")] + listed


def _one_key_everywhere() -> bytes:
    """A dictionary whose only key has a million letters, in 10,000 places."""
    places = b"".join(b"U\4%04d" % i + _get(0) for i in range(10_000))
    return _of(b"}" + _text(1 << 20) + b"}s" + _put(0), b"}(", places, b"u")


def _one_path_everywhere() -> bytes:
    """10,000 tensors below a key of a million letters, which is a part of all their names."""
    tensor = bytes(Writer().tensor().data[2:]) + _put(0)
    names = b"".join(b"U\4%04d" % i + _get(0) for i in range(10_000))
    return _of(tensor, b"}(U\x040000", _get(0), _text(1 << 20), b"}(", names, b"u", b"u")


def _case(name: str, build: Callable[[], bytes], *words: str) -> Case:
    return Case(name, build, words or (_AGAIN,), None, None, ".pt")


COSTLY = (
    _case(
        "a text of 1 MB encoded 1,000 times",
        lambda: _called("_codecs", "encode", _text(1 << 20) + b"X\6\0\0\0latin1\x86", 1000),
    ),
    _case(
        "one list made a dictionary 5,000 times",
        lambda: _called("collections", "OrderedDict", b"](" + _items(20_000, b"\x86") + b"e\x85", 5000),
    ),
    _case(
        "one dictionary copied 5,000 times",
        lambda: _called("collections", "Counter", b"}(" + _items(20_000) + b"u\x85", 5000),
    ),
    _case(
        "one call of 100,000 arguments 5,000 times",
        lambda: _called("torch", "device", b"(" + b"N" * 100_000 + b"t", 5000),
    ),
    _case(
        "a shape of 64 dimensions 100,000 times",
        lambda: _called("torch", "Size", b"(" + b"K\1" * 64 + b"t\x85", 100_000),
    ),
    _case(
        "a tuple of 100,000 as a key 50,000 times",
        lambda: _of(b"(" + b"K\1" * 100_000 + b"t", _put(0), b"}(", (_get(0) + b"N") * 50_000, b"u"),
    ),
    _case(
        "two equal keys of 2 MB in turn",
        lambda: _of(_TWINS, b"}(", (_get(0) + b"N" + _get(1) + b"N") * 50_000, b"u"),
    ),
    _case(
        "two equal keys of 2 MB in pairs",
        lambda: _of(
            _TWINS,
            b"ccollections\nOrderedDict\n](",
            (_get(0) + b"N\x86" + _get(1) + b"N\x86") * 50_000,
            b"e\x85R",
        ),
    ),
    _case("two equal keys of storages in turn", _storages_alike),
    _case("two equal keys in a legacy list of storages", _listed_alike, "list of storages"),
    _case("30,000 keys that hash alike", _keys_alike),
    _case("30,000 pairs that hash alike", _pairs_alike, "wrong arguments"),
    _case("a call through itself", _through_itself, "tensor subclass"),
    _case("a key of 1 MB in 10,000 places", _one_key_everywhere, "names are too long"),
    _case("a key of 1 MB in 10,000 names", _one_path_everywhere, "names are too long"),
)

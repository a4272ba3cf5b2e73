"""What a pickle's values are here, and a budget for what is done with them.

An opcode that makes a value takes as many bytes of the file as it makes, but a call or a dictionary's key can
be given the same large value from the memo a million times. So whatever looks into a value is paid for by
what there is to see. A budget of as many bytes as a pickle may have is enough, because what torch.save writes
makes most of its values to be looked at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_SCALARS = (str, int, float, bool, bytes, type(None))
_MAX_KEY = 1 << 61  # larger integers hash alike, at the writer's choice

#: What a container's item costs: about as much as it takes in a dictionary that a call makes of it.
_ITEM = 32

#: From a call's argument through a pair and a tuple as its key to a string: nothing looks further.
_DEPTH = 3


class PickleFault(ValueError):
    """Why a pickle is refused; `next_step` where there is a better one than fetching it again."""

    def __init__(self, why: str, next_step: str | None = None) -> None:
        super().__init__(why)
        self.why, self.next_step = why, next_step


class NoStateDict(PickleFault):
    """Why a pickle that can be read holds no weights under names."""


@dataclass(frozen=True, eq=False, slots=True)
class Function:
    """What a pickle may call; it takes plain data and raises PickleFault or TypeError for the wrong kind."""

    name: str
    call: Callable[..., object]


@dataclass(frozen=True, eq=False, slots=True)
class Opaque:
    """A value that is carried along and never looked into."""

    kind: str


@dataclass(frozen=True, eq=False, slots=True)
class Kind:
    """A class of which a pickle may make objects, none of whose code runs."""

    name: str


@dataclass(eq=False, slots=True)
class Made:
    """An object of a kind, as the pickle describes it: `state` is what its class would have been given."""

    kind: str
    state: Any = None


#: What a dictionary's key may be: scalars, and objects, each a key of its own.
_KEYS = (*_SCALARS, Made)


def check_key(key: object) -> None:
    """Raise PickleFault unless `key` is a scalar or a flat tuple of them: hashing others may never end."""
    parts = key if type(key) is tuple else (key,)
    for part in parts:
        if type(part) not in _KEYS or (type(part) is int and abs(part) >= _MAX_KEY):
            raise PickleFault("a dictionary in its pickle has a key that is no string or number")


class Budget:
    """So many bytes, from which is paid until none are left."""

    def __init__(self, most: int) -> None:
        self._left = most

    def pay(self, cost: int) -> None:
        """Take `cost` away; raises PickleFault where not so much is left."""
        self._left -= cost
        if self._left < 0:
            raise PickleFault("its pickle has the same values worked on again and again")

    def pay_for(self, value: Any, depth: int = _DEPTH) -> None:
        """Pay for looking into `value`, before anything does."""
        kind = type(value)
        if kind is str or kind is bytes:
            self.pay(len(value))
        elif kind is dict:
            self.pay(_ITEM * len(value))
        elif kind is list or kind is tuple:
            self.pay(_ITEM * len(value))
            if depth:
                for item in value:
                    self.pay_for(item, depth - 1)

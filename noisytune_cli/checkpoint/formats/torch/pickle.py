"""An unpickler that calls nothing: opcodes in, plain data out.

A pickle is a program for a stack machine, and the machine that comes with Python runs whatever it names.
This one knows the opcodes that torch.load(weights_only=True) knows, and for callers that ask for them the few
that protocol 4 has for the same. A global is looked up in the caller's table, never imported; a call is made
only to a `Function` of that table; an object is made only of a `Kind`, and is its state and no more; all else
is containers and scalars. Work and memory are bounded by the number of opcodes and, where one of them looks
into a value of any size, by a budget (`values.py`): a hostile file is refused before it can exhaust either.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from noisytune_cli.checkpoint.formats.torch.values import (
    Budget,
    Function,
    Kind,
    Made,
    Opaque,
    PickleFault,
    check_key,
)

#: The longest pickle that is read, in bytes, and the most opcodes: 30,000 tensors have about as many.
MAX_BYTES = 32 << 20
MAX_OPCODES = 1_000_000
BYTES_FOR_OPCODE = MAX_BYTES // MAX_OPCODES

#: What a call costs for each argument.
_ARGUMENT = 8

_SHORT, _INT, _UINT, _DOUBLE = (struct.Struct(f) for f in ("<H", "<i", "<I", ">d"))

FindGlobal = Callable[[str, str], object]
PersistentLoad = Callable[[object], object]


def unpickle(
    data: bytes,
    start: int,
    find_global: FindGlobal,
    persistent_load: PersistentLoad,
    *,
    protocol: int = 2,
    most: int = MAX_OPCODES,
) -> tuple[object, int]:
    """Return the value of the pickle that begins at `start` of `data`, and where it ends.

    `protocol` is the highest whose opcodes it may have, 2 or 4, and `most` the number of them; the budget for
    looking into values grows with it.

    `find_global` gets a module and a name, `persistent_load` a persistent id; both raise PickleFault for
    what they do not know, as this does for whatever is malformed.
    """
    machine = _Machine(data, start, find_global, persistent_load, Budget(most * BYTES_FOR_OPCODE))
    try:
        return machine.run(_OPCODES if protocol == 2 else _OPCODES_4, most), machine.at
    except (IndexError, KeyError, TypeError, UnicodeDecodeError, struct.error) as error:
        if machine.at >= len(data) >= MAX_BYTES:
            raise PickleFault(f"its pickle has more than {MAX_BYTES:,} bytes") from error
        raise PickleFault(f"its pickle is damaged or cut off near byte {machine.at:,}") from error


class _Machine:
    """The stack, the stacks set aside by marks, and the memo."""

    def __init__(
        self,
        data: bytes,
        start: int,
        find_global: FindGlobal,
        persistent_load: PersistentLoad,
        budget: Budget,
    ) -> None:
        self.at = start
        self._budget = budget
        self._data, self._find_global, self._persistent_load = data, find_global, persistent_load
        self._stack: list[Any] = []
        self._set_aside: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, opcodes: Mapping[int, Callable[[_Machine], None]], most: int) -> object:
        """Run up to STOP and return what is on top of the stack."""
        data = self._data
        for _ in range(most):
            opcode = data[self.at]
            self.at += 1
            if opcode == _STOP:
                return self._stack.pop()
            handler = opcodes.get(opcode)
            if handler is None:
                raise PickleFault(
                    f"its pickle has opcode {opcode:#04x}, which torch.save does not write by default",
                    "Load it where it was made, and save its state dict with torch.save's default protocol",
                )
            handler(self)
        raise PickleFault(f"its pickle has more than {most:,} opcodes")

    def _take(self, length: int) -> bytes:
        chunk = self._data[self.at : self.at + length]
        if len(chunk) < length:
            raise IndexError
        self.at += length
        return chunk

    def _line(self) -> str:
        end = self._data.index(b"\n", self.at) if b"\n" in self._data[self.at : self.at + 1000] else -1
        if end < 0:
            raise IndexError
        return self._take(end + 1 - self.at)[:-1].decode("utf-8")

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._set_aside.pop()
        return items

    def _protocol(self) -> None:
        self._take(1)

    def _frame(self) -> None:
        self._take(8)

    def _global(self) -> None:
        module = self._line()
        self._stack.append(self._find_global(module, self._line()))

    def _reduce(self) -> None:
        arguments = self._stack.pop()
        function = self._stack[-1]
        if not isinstance(function, Function) or type(arguments) is not tuple:
            raise PickleFault("its pickle calls something that is no function")
        self._budget.pay(_ARGUMENT * len(arguments))
        for argument in arguments:
            self._budget.pay_for(argument)
        try:
            self._stack[-1] = function.call(*arguments)
        except TypeError as error:
            raise PickleFault(f"its pickle calls {function.name} with the wrong arguments") from error

    def _stack_global(self) -> None:
        name = self._stack.pop()
        module = self._stack.pop()
        if type(module) is not str or type(name) is not str:
            raise TypeError
        self._stack.append(self._find_global(module, name))

    def _new(self) -> None:
        arguments = self._stack.pop()
        kind = self._stack.pop()
        if not isinstance(kind, Kind) or arguments != ():
            raise PickleFault("its pickle makes an object of something that is no class")
        self._stack.append(Made(kind.name))

    def _build(self) -> None:
        # torch keeps a state dict's `_metadata` so; other objects have no state that could be set.
        state = self._stack.pop()
        if type(self._stack[-1]) is Made:
            self._stack[-1].state = state
            return
        if type(self._stack[-1]) is not dict:
            raise PickleFault("its pickle sets the state of something other than an OrderedDict")

    def _persistent(self) -> None:
        identity = self._stack.pop()
        self._budget.pay_for(identity)
        self._stack.append(self._persistent_load(identity))

    def _append(self) -> None:
        item = self._stack.pop()
        self._list().append(item)

    def _appends(self) -> None:
        items = self._pop_mark()
        self._list().extend(items)

    def _list(self) -> list[Any]:
        target = self._stack[-1]
        if type(target) is not list:
            raise PickleFault("its pickle appends to something other than a list")
        return target

    def _setitem(self) -> None:
        value = self._stack.pop()
        key = self._stack.pop()
        self._set(key, value)

    def _setitems(self) -> None:
        items = self._pop_mark()
        for i in range(0, len(items), 2):
            self._set(items[i], items[i + 1])

    def _set(self, key: Any, value: Any) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            raise PickleFault("its pickle sets items of something other than a dictionary")
        self._budget.pay_for(key)
        if type(key) is tuple:
            # Tuples of numbers can be chosen so that all hash alike, and each is compared with all before it.
            self._budget.pay(len(target))
        check_key(key)
        target[key] = value

    def _mark(self) -> None:
        self._set_aside.append(self._stack)
        self._stack = []

    def _tuple(self) -> None:
        items = self._pop_mark()
        self._stack.append(tuple(items))

    def _tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _unicode(self) -> None:
        start = self.at + 4
        (length,) = _UINT.unpack_from(self._data, self.at)
        text = self._data[start : start + length]
        if len(text) < length:
            raise IndexError
        self.at = start + length
        self._stack.append(text.decode("utf-8", "surrogatepass"))

    def _short_unicode(self) -> None:
        self._stack.append(self._take(self._take(1)[0]).decode("utf-8", "surrogatepass"))

    def _string(self) -> None:
        self._stack.append(self._take(self._take(1)[0]).decode("utf-8"))

    def _long(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._take(1)[0]), "little", signed=True))

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, length: int) -> None:
        self._stack.append(self._memo[int.from_bytes(self._take(length), "little")])

    def _put(self, length: int) -> None:
        self._memo[int.from_bytes(self._take(length), "little")] = self._stack[-1]

    def _push(self, value: object) -> None:
        self._stack.append(value)


_STOP = ord(".")
_SET = Opaque("set")

#: Every opcode but STOP, named as in the standard library's pickletools.
_OPCODES: dict[int, Callable[[_Machine], None]] = {
    0x80: _Machine._protocol,  # PROTO
    ord("c"): _Machine._global,  # GLOBAL
    ord("R"): _Machine._reduce,  # REDUCE
    ord("b"): _Machine._build,  # BUILD
    ord("Q"): _Machine._persistent,  # BINPERSID
    ord("a"): _Machine._append,  # APPEND
    ord("e"): _Machine._appends,  # APPENDS
    ord("s"): _Machine._setitem,  # SETITEM
    ord("u"): _Machine._setitems,  # SETITEMS
    ord("("): _Machine._mark,  # MARK
    ord("t"): _Machine._tuple,  # TUPLE
    0x85: lambda m: m._tuple_of(1),  # TUPLE1
    0x86: lambda m: m._tuple_of(2),  # TUPLE2
    0x87: lambda m: m._tuple_of(3),  # TUPLE3
    ord("N"): lambda m: m._push(None),  # NONE
    0x88: lambda m: m._push(True),  # NEWTRUE
    0x89: lambda m: m._push(False),  # NEWFALSE
    ord(")"): lambda m: m._push(()),  # EMPTY_TUPLE
    ord("]"): lambda m: m._push([]),  # EMPTY_LIST
    ord("}"): lambda m: m._push({}),  # EMPTY_DICT
    0x8F: lambda m: m._push(_SET),  # EMPTY_SET
    ord("J"): lambda m: m._push(_INT.unpack(m._take(4))[0]),  # BININT
    ord("K"): lambda m: m._push(m._take(1)[0]),  # BININT1
    ord("M"): lambda m: m._push(_SHORT.unpack(m._take(2))[0]),  # BININT2
    ord("G"): lambda m: m._push(_DOUBLE.unpack(m._take(8))[0]),  # BINFLOAT
    ord("X"): _Machine._unicode,  # BINUNICODE
    ord("U"): _Machine._string,  # SHORT_BINSTRING
    0x8A: _Machine._long,  # LONG1
    ord("h"): lambda m: m._get(1),  # BINGET
    ord("j"): lambda m: m._get(4),  # LONG_BINGET
    ord("q"): lambda m: m._put(1),  # BINPUT
    ord("r"): lambda m: m._put(4),  # LONG_BINPUT
}

#: And those of protocol 4, which Python's own pickle module writes.
_OPCODES_4: dict[int, Callable[[_Machine], None]] = {
    **_OPCODES,
    0x81: _Machine._new,  # NEWOBJ
    0x8C: _Machine._short_unicode,  # SHORT_BINUNICODE
    0x93: _Machine._stack_global,  # STACK_GLOBAL
    0x94: _Machine._memoize,  # MEMOIZE
    0x95: _Machine._frame,  # FRAME
}

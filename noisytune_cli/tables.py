"""Tables of calls: a compiled loop goes through many runs of values without Python between one and the next.

To begin a call from Python takes as long as to add noise to some ten thousand values, and only one thread can
do it at a time; a model has hundreds of tensors that are smaller. So the arguments of all calls are written
into a table, and each thread makes one call: of a driver, which takes the next row as long as there is one.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from noisytune_cli.compiled import Loop, compile_module

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Rows that a thread does before it asks whether to go on.
_AT_A_TIME = 16

_DRIVER = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_int64)


class Table:
    """The calls of one loop, for several threads to take in turn."""

    def __init__(
        self,
        loop: Loop,
        columns: Sequence[NDArray[np.int64] | None],
        results: NDArray[Any],
        own: Callable[[], list[int]] = list,
        keeps: object = None,
    ) -> None:
        """Take a column, int64 [n], for each of the loop's arguments, and the `results` they write to.

        A uint64 or float32 argument is its bits. In place of a column that is None comes what `own` returns,
        in order, in the thread that makes a call. `keeps` holds what the addresses lead to, so that it is not
        freed while a thread is at it.
        """
        kinds = "".join("-" if column is None else "+" for column in columns)
        given = [column for column in columns if column is not None]
        self._rows = np.empty((len(given[0]), len(given)), np.int64)
        for at, column in enumerate(given):
            self._rows[:, at] = column
        self.results, self._keeps = results, keeps
        self._next = np.zeros(1, np.int64)
        self._loop, self._own = loop, own
        self._drive = _DRIVER(
            compile_module(f"driver/{loop.signature}/{kinds}", lambda: _driver(loop.signature, kinds))
        )

    def __len__(self) -> int:
        """Return how many calls there are."""
        return len(self._rows)

    def work(self) -> None:
        """Make calls until none is left to take."""
        own = np.array(self._own(), np.int64)
        addresses = [self._loop.address, *(a.ctypes.data for a in (self._rows, self._next, own))]
        while self._next[0] < len(self):
            if self._drive(*addresses, len(self), _AT_A_TIME) != 0:
                raise RuntimeError("a compiled loop ended with an error")

    def stop(self) -> None:
        """Leave the calls that no thread has taken."""
        self._next[0] = len(self)


def work_through(tables: Sequence[Table], threads: int) -> None:
    """Make all calls of some tables in this thread and up to `threads` - 1 others.

    The first error is raised once all are at rest, an interrupt too, however many follow. Where the system
    has no room for a thread, fewer do it.
    """
    errors: list[BaseException] = []
    at_work = 0
    change = threading.Condition()

    def stop() -> None:
        for table in tables:
            table.stop()

    def work() -> None:
        for table in tables:
            table.work()

    def help_out() -> None:
        nonlocal at_work
        with change:
            at_work += 1
        try:
            work()
        except BaseException as error:
            errors.append(error)
            stop()
        finally:
            with change:
                at_work -= 1
                change.notify_all()

    # An interrupt can come at any moment, also in what is done about the one before it: so stop and wait are
    # repeated, until all threads are known to be at rest.
    begun = at_rest = False
    while not at_rest:
        try:
            if begun:
                stop()
            else:
                begun = True
                with contextlib.suppress(RuntimeError):
                    for _ in range(1, min(threads, sum(map(len, tables)))):
                        threading.Thread(target=help_out, name="table").start()
                work()
            # Not join: when that is interrupted, some versions of Python take the thread for ended. One that
            # has not begun by now finds nothing to do.
            with change:
                change.wait_for(lambda: at_work == 0)
            at_rest = True
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _driver(signature: str, own: str) -> str:
    """Return the LLVM IR of i64 (loop, rows, next, own arguments, count of rows, how many to do).

    `own` has a letter for each argument of the signature: "-" is taken from the own ones, "+" from the row.
    It returns 0, or 1 where the loop ended with an error.
    """
    from llvmlite import ir

    i32, i64, byte = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
    kinds = {"p": byte, "i": i64, "u": i64, "f": ir.FloatType(), "d": ir.DoubleType()}
    module = ir.Module()
    called = ir.FunctionType(i32, [byte, byte, *(kinds[letter] for letter in signature)])
    kind = ir.FunctionType(i64, [byte, i64.as_pointer(), i64.as_pointer(), i64.as_pointer(), i64, i64])
    function = ir.Function(module, kind, "driver")
    loop, rows, following, mine, count, most = function.args
    before, head, body, call, after, end = (
        function.append_basic_block(name) for name in ("before", "head", "body", "call", "after", "end")
    )
    b = ir.IRBuilder(before)
    callee = b.bitcast(loop, called.as_pointer())
    slots = [b.bitcast(b.alloca(i64), byte) for _ in range(2)]  # for a result and an error, as Numba has them
    b.branch(head)
    b.position_at_end(head)
    done = b.phi(i64)
    done.add_incoming(ir.Constant(i64, 0), before)
    b.cbranch(b.icmp_signed("<", done, most), body, end)
    b.position_at_end(body)
    row = b.atomic_rmw("add", following, ir.Constant(i64, 1), "monotonic")
    b.cbranch(b.icmp_signed("<", row, count), call, end)
    b.position_at_end(call)
    width = own.count("+")
    places = {"+": b.gep(rows, [b.mul(row, ir.Constant(i64, width))]), "-": mine}
    taken = {"+": 0, "-": 0}
    arguments = []
    for letter, whose in zip(signature, own, strict=True):
        place = b.gep(places[whose], [ir.Constant(i64, taken[whose])])
        arguments.append(b.load(b.bitcast(place, kinds[letter].as_pointer())))
        taken[whose] += 1
    failed = b.icmp_signed("!=", b.call(callee, [*slots, *arguments]), ir.Constant(i32, 0))
    b.cbranch(failed, end, after)
    b.position_at_end(after)
    done.add_incoming(b.add(done, ir.Constant(i64, 1)), after)
    b.branch(head)
    b.position_at_end(end)
    status = b.phi(i64)
    for block, value in ((head, 0), (body, 0), (call, 1)):
        status.add_incoming(ir.Constant(i64, value), block)
    b.ret(status)
    return str(module)

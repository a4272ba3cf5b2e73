"""What is computed is not learned: values that a formula gives, which no training would leave so.

A mask has zeros and one other value. A table of sinusoids, a progression of frequencies or timesteps obeys
x[n+1] + x[n-1] = c · x[n] along its positions, whatever its base, phase or layout; a schedule of noise levels
is monotone and smooth to its last element; a window and a filter read the same backwards; a bank of filters
has zeros but for one bump in each, one further on than the other; a lattice has each combination of a few
values once; what was normalised has rows or columns of length one, or at right angles to each other; what
was counted is whole. Values that an optimizer moved do none of this: so a look at a few values rejects
nearly every tensor, and of a table some rows at its beginning, middle and end will do.

Of names that only weights have (`weight`, `bias`, `q_proj`…) `weight` alone is asked, and for tables of
sinusoids alone, as embeddings may hold them; a norm at its initial values is no mask. So are those of one
letter, for zeros and ones, as which flows keep masks and permutations. Convolutions may compute: those of a
real and an imaginary part (a Fourier transform's) are asked for everything, those to one channel for the
numbers 0, 1, 2…, of which they take the mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.plan.evidence.structure import PairKind, split_name
from noisytune_cli.records import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Gives `count` values from element `first` as float64.
Values = Callable[[int, int], "NDArray[Any]"]

#: Half the distance of neighbouring values near 1.
_ROUNDING = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}

#: Positions and frequencies are multiplied in float32 before they are stored.
_ANGLE = 2.0**-23

#: The fewest values, or rows of a table, that can show a formula; and what no formula gives.
_FEWEST, _LARGEST_VALUE = 8, 1e30

#: How many values are looked at first, and in one piece after that.
_FIRST, _AT_ONCE = 64, 1 << 18

#: The most of a vector that is looked at, and of what has to be looked at whole.
_LONGEST, _LARGEST = 1 << 20, 1 << 26

#: The longest column that is looked at value by value.
_TALLEST = 1024

#: Rows of a table that are looked at in one place.
_ROWS = 48

#: Channels of a table that has these first, and the most columns of a lattice and powers of a progression.
_CHANNELS, _AXES = 64, 16

#: The most rows of a line of a grid.
_LONGEST_LINE = 4096

#: How many roundings a computed value may be off, in sums of three.
_SLACK = 3

#: In how many bits whole numbers have to lack a fraction that would show.
_NO_CHANCE = 12

#: By how much of it the length of (cosine, sine) may differ: both may have been rounded to BF16.
_SAME_LENGTH = 0.01

_MASK = "zeros and one other value: a mask"
_WAVE = "a table of sinusoids, or a progression"
_SCHEDULE = "a schedule: monotone and smooth"
_EVEN = "a window or a filter, the same backwards"
_BANK = "a bank of filters, each a bump among zeros"
_NUMBERS = "the numbers 0, 1, 2…"
_WHOLE = "whole numbers"
_UNIT = "its rows or columns have length one"
_ANGLED = "its rows are at right angles to each other"
_LATTICE = "a lattice: each combination of a few values once"
_POWERS = "the powers of a progression"
_STATISTICS = "a mean and its spread, nowhere out of order"
_RANGE = "the least and the most of something, nowhere out of order"
_ANGLES = "cosines and sines of the same angles"


def is_plain(tensor: TensorSpec) -> bool:
    """Say whether a name is one that only weights have, and not what a Fourier transform may be called."""
    module, last = split_name(tensor.name)
    if last == "weight" and len(tensor.shape) == 3 and _COMPLEX.search(module):
        return False
    return PLAIN.fullmatch(last) is not None or _LETTER.fullmatch(last) is not None


def may_be(tensor: TensorSpec) -> bool:
    """Say whether a name leaves it to the values to tell whether they were computed.

    Of those that only weights have, it is the tables of positions, which may be sinusoids, the weights that
    may be numbers to take a mean of, and letters.
    """
    if tensor.dtype not in FLOAT_DTYPES or tensor.elements < _FEWEST:
        return False
    module, last = split_name(tensor.name)
    if is_plain(tensor):
        may_hold = _takes_mean(tensor.shape) or (len(tensor.shape) > 1 and _POSITIONS.search(module))
        return _is_letter(last) or (last == "weight" and bool(may_hold))
    return True


def _takes_mean(shape: tuple[int, ...]) -> bool:
    """Say whether a convolution has the shape of one that takes the mean of 0, 1, 2… (YOLO's DFL)."""
    return len(shape) == 4 and shape[0] == 1 and shape[2:] == (1, 1)


def look(tensor: TensorSpec, values: Values, *, plain: bool) -> str | None:
    """Return what of a tensor's values says that they were computed, or None; `plain` names are weights'."""
    shape = tuple(n for n in tensor.shape if n != 1)
    count = tensor.elements
    if tensor.dtype not in FLOAT_DTYPES or count < _FEWEST:
        return None
    if plain and _is_letter(split_name(tensor.name)[1]):
        return _MASK if _switches(shape, count, values) else None
    if plain and len(shape) < 2:
        return _NUMBERS if _takes_mean(tensor.shape) and _counts(values(0, min(_FIRST, count))) else None
    import numpy as np

    with np.errstate(all="ignore"):  # what overflows compares as unlike
        return _look(shape, count, values, _ROUNDING[tensor.dtype], plain=plain)


def _look(shape: tuple[int, ...], count: int, values: Values, rounding: float, *, plain: bool) -> str | None:
    """Return what says that `count` values of a shape without ones were computed."""
    import numpy as np

    first = values(0, min(_FIRST, count))
    if not np.isfinite(first).all():
        return None
    if plain:
        # The sines and cosines of position 0, or a row of padding.
        if not first.any() and not values(count // 2, min(_FIRST, count - count // 2)).any():
            return None  # most likely all of it is 0, and what is constant is copied, whatever it is
        start = np.abs(first[: shape[-1]])
        starts = np.minimum(start, np.abs(start - 1)) <= 1e-6
        is_table = starts.all() and (
            _is_wave(shape, values, rounding) or _is_short_table(shape, values, rounding)
        )
        return _WAVE if is_table else None
    if len(set(np.abs(first).tolist()) - {0.0}) <= 1 and _is_mask(count, values):
        return _MASK
    if np.abs(first).max() > _LARGEST_VALUE:
        return None
    if _are_whole(count, values):
        return _WHOLE
    if len(shape) == 1:
        return _look_at_vector(values(0, count), rounding) if count <= _LONGEST else None
    if _is_wave(shape, values, rounding):
        return _WAVE
    if _is_even(shape, values, rounding):
        return _EVEN
    if first.min() >= 0 and not first.all() and _is_bank(shape, values, rounding):
        return _BANK
    if _has_unit_vectors(shape, values, rounding):
        return _UNIT
    if _is_lattice(shape, first, values):
        return _LATTICE
    if _are_powers(shape, values, rounding):
        return _POWERS
    return _ANGLED if _are_at_right_angles(shape, values, rounding) else None


def may_be_asked(tensor: TensorSpec) -> bool:
    """Say whether the values of a tensor are looked at, whatever its name leaves to them."""
    last = split_name(tensor.name)[1]
    return last == "weight" or _is_letter(last) or not is_plain(tensor)


def _is_letter(last: str) -> bool:
    return len(last) == 1 and PLAIN.fullmatch(last) is None


def _switches(shape: tuple[int, ...], count: int, values: Values) -> bool:
    """Say whether there are zeros and ones, of either sign, which are no identity: that is learned from."""
    import numpy as np

    if not set(np.abs(values(0, min(_FIRST, count))).tolist()) <= {0.0, 1.0} or not _is_mask(count, values):
        return False
    square = len(shape) == 2 and shape[0] == shape[1]
    return not (square and np.array_equal(values(0, count), np.eye(shape[0]).ravel()))


def _counts(values: NDArray[Any]) -> bool:
    return all(value == i for i, value in enumerate(values.tolist()))


def look_at_pair(what: PairKind, first: Values, second: Values, count: int) -> str | None:
    """Return what of two tensors' values says that they are what they are called, or None."""
    if what == "angle":
        return _ANGLES if _are_of_one_angle(first, second, count) else None
    if what == "spread":
        return _STATISTICS if _is_above(second, None, count) else None
    return _RANGE if _is_above(second, first, count) else None


def _is_above(high: Values, low: Values | None, count: int) -> bool:
    """Say whether no value of `high` is below that of `low`, or below zero; they are not all zero."""
    import numpy as np

    some = False
    for at in range(0, count, _AT_ONCE):
        n = min(_AT_ONCE, count - at)
        difference = high(at, n) if low is None else high(at, n) - low(at, n)
        if not (difference >= 0).all():
            return False
        some |= bool(np.any(difference))
    return some


def _are_of_one_angle(cosines: Values, sines: Values, count: int) -> bool:
    """Say whether the squares of two tensors' values add up to the same everywhere, and not for being flat.

    So do cosines and sines of the same angles, whatever these are, and were both multiplied.
    """
    import numpy as np

    if count < _FEWEST:
        return False
    n = min(count, _AT_ONCE)
    places = dict.fromkeys((0, (count - n) // 2, count - n))
    x, y = (np.concatenate([values(at, n) for at in places]) for values in (cosines, sines))
    with np.errstate(all="ignore"):
        lengths = np.hypot(x, y)
        is_same = lengths.max() - lengths.min() <= _SAME_LENGTH * lengths.max()
    return bool(is_same and np.ptp(x) > 0 and lengths.max() <= _LARGEST_VALUE)


def is_constant(values: Values, count: int) -> bool:
    """Say whether all values are equal."""
    first = values(0, 1)
    return all(
        bool((values(at, min(_AT_ONCE, count - at)) == first).all()) for at in range(0, count, _AT_ONCE)
    )


def _is_mask(count: int, values: Values) -> bool:
    """Say whether there are zeros and one other value, or that with either sign; each more than once."""
    if count > _LARGEST:
        return False
    seen: dict[float, int] = {}
    for at in range(0, count, _AT_ONCE):
        rest = values(at, min(_AT_ONCE, count - at))
        while len(rest):
            value = float(rest[0])
            others = rest[rest != value]
            seen[value] = seen.get(value, 0) + len(rest) - len(others)
            if len(others) == len(rest) or len({abs(known) for known in seen} - {0.0}) > 1:
                return False  # a NaN is no value, and a second one no mask's
            rest = others
    return len(seen) > 1 and min(seen.values()) > 1


def _are_whole(count: int, values: Values) -> bool:
    """Say whether all values are whole numbers of several sizes, where the fractions of others would show.

    What was rounded to BF16 once has no fractions from 128 on: values count as having 8 bits, or as many as
    one of them uses.
    """
    import numpy as np

    first = values(0, min(_FIRST, count))
    if count > _LARGEST or (first != np.rint(first)).any():
        return False
    least, most, room = math.inf, 0.0, 0.0
    for at in range(0, count, _AT_ONCE):
        x = np.abs(values(at, min(_AT_ONCE, count - at)))
        if not (x < 2.0**53).all() or (x != np.rint(x)).any():
            return False
        x = x[x > 0]
        least, most = min(least, x.min(initial=least)), max(most, x.max(initial=most))
        places, ends = (np.log2(n).astype(int) for n in (x, x.astype(np.int64) & -x.astype(np.int64)))
        bits = max(8, (places - ends).max(initial=0) + 1)
        room = max(room, np.maximum(0, bits - 1 - places).sum())
    return least < most and bool(room >= _NO_CHANCE)


def _look_at_vector(x: NDArray[Any], rounding: float) -> str | None:
    import numpy as np

    if not np.isfinite(x).all():
        return None
    if len(x) < _FEWEST or np.ptp(x) == 0:
        return None
    if _obeys(x[:, None], rounding) or (rounding < 1e-6 and _obeys_from_a_level(x, rounding)):
        return _WAVE
    if _is_schedule(x, rounding):
        return _SCHEDULE
    if _reads_backwards(x[None], rounding):
        return _EVEN
    # In half precision one length near 1 is chance.
    return _UNIT if rounding < 1e-6 and abs(math.fsum(x * x) - 1) < 1e-5 else None


def _is_wave(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether [n, …] obeys the recurrence from row to row, or [n] · … along its last dimension."""
    rows, width = shape[0], math.prod(shape[1:])
    if width <= _AT_ONCE // _FEWEST and (
        _is_wave_down(rows, width, values, rounding) or _is_grid(rows, width, values, rounding)
    ):
        return True
    return _is_wave_along(shape, values, rounding) or _is_wave_across(shape, values, rounding)


def _is_short_table(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether a few rows are sines and cosines of the same angles, in turn or one half and the other."""
    import numpy as np

    rows, width = shape[0], shape[-1]
    if len(shape) != 2 or not 2 <= rows < _FEWEST or width % 4 or not _FEWEST <= width <= _AT_ONCE // _FEWEST:
        return False
    table = values(0, rows * width).reshape(rows, width)
    pairs = ((table[:, ::2], table[:, 1::2]), (table[:, : width // 2], table[:, width // 2 :]))
    off = (np.abs(np.hypot(*pair) - 1).max() for pair in pairs)
    return bool(min(off) <= _SLACK * rounding and np.ptp(table, axis=0).any())


def _is_wave_down(rows: int, width: int, values: Values, rounding: float, fewest: int = 2) -> bool:
    """Say whether the recurrence holds from row to row, at the beginning, the middle and the end."""
    # Padding may have put zeros in the place of one of the first rows.
    begin = 3 if rows >= 16 else 0
    if not _may_obey(rows, width, values, rounding, begin):
        return False
    most = max(_FEWEST, min(_ROWS, rows - begin, _AT_ONCE // width))
    places = dict.fromkeys((begin, max(begin, (rows - most) // 2), rows - most))
    return all(
        _obeys(values(at * width, most * width).reshape(most, width), rounding, at + most, fewest)
        for at in places
    )


def _is_wave_along(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether each vector along the last dimension obeys the recurrence."""
    length = shape[-1]
    if not _FEWEST <= length <= _AT_ONCE:
        return False
    if _slack_of(values(0, min(length, _FIRST))[:, None], rounding, length) is None:
        return False
    others = math.prod(shape[:-1])
    at_once = max(1, min(others, _ROWS, _AT_ONCE // length))
    return all(
        _obeys(values(at * length, at_once * length).reshape(at_once, length).T, rounding, length)
        for at in dict.fromkeys((0, (others - at_once) // 2, others - at_once))
    )


def _is_wave_across(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether [channels, height, width] is a grid of positions, by some of its channels."""
    import numpy as np

    if len(shape) < 3:
        return False
    channels, rows = math.prod(shape[:-2]), math.prod(shape[-2:])
    if rows < 2 * _FEWEST or rows > _AT_ONCE // _FEWEST:
        return False
    if _slack_of(values(0, _FEWEST)[:, None], rounding, _FEWEST) is None:
        return False
    some = np.linspace(0, channels - 1, min(channels, _CHANNELS, _AT_ONCE // rows)).astype(int)
    table = np.stack([values(channel * rows, rows) for channel in some.tolist()], 1)
    at = table.reshape(-1)
    return _is_grid(rows, len(some), lambda first, count: at[first : first + count], rounding)


def _is_grid(rows: int, width: int, values: Values, rounding: float) -> bool:
    """Say whether the rows are those of a grid of positions, a class token's before them or not."""
    return any(
        _may_obey(rows, width, values, rounding, extra)
        and _are_lines(rows - extra, width, _from(values, extra * width), rounding)
        for extra in (0, 1)
    )


def _are_lines(rows: int, width: int, values: Values, rounding: float) -> bool:
    """Say whether rows are lines of a grid that obey the recurrence, as do the rows that begin the lines.

    These may be a grid again, as where there are frames.
    """
    line = _line(rows, width, values, rounding)
    if line is None or rows % line:
        return False
    lines, most = rows // line, max(_FEWEST, min(_ROWS, line, _AT_ONCE // width))
    for at in dict.fromkeys((0, lines // 2, lines - 1)):
        for begin in dict.fromkeys((at * line, at * line + line - most)):
            if not _obeys(values(begin * width, most * width).reshape(most, width), rounding, line, 1):
                return False
    starts = _every(line, width, values)
    # Of coordinates one column moves along each axis.
    return _is_wave_down(lines, width, starts, rounding, 1) or _are_lines(lines, width, starts, rounding)


def _line(rows: int, width: int, values: Values, rounding: float) -> int | None:
    """Return how many rows a grid's line has: what moves from the first row on is there again after it."""
    import numpy as np

    if rows < 2 * _FEWEST:
        return None
    first = values(0, _FEWEST * width).reshape(_FEWEST, width)
    slack = _SLACK * rounding * np.abs(first).max() + _ANGLE * _LONGEST_LINE
    moving = np.ptp(first, axis=0) > 8 * slack
    if not moving.any():
        return None
    at_once = max(1, _AT_ONCE // width)
    for at in range(_FEWEST, min(rows, _LONGEST_LINE), at_once):
        n = min(at_once, rows - at)
        some = values(at * width, n * width).reshape(n, width)
        again = (np.abs(some - first[0])[:, moving] <= slack).all(1)
        if again.any():
            return at + int(again.argmax())
    return None


def _from(values: Values, start: int) -> Values:
    return lambda first, count: values(start + first, count)


def _every(step: int, width: int, values: Values) -> Values:
    """Return the values of every `step`-th row: parts of one row, or whole rows."""

    def read(first: int, count: int) -> NDArray[Any]:
        import numpy as np

        row, column = divmod(first, width)
        if column + count <= width:
            return values(row * step * width + column, count)
        return np.concatenate([values((row + i) * step * width, width) for i in range(count // width)])

    return read


def _may_obey(rows: int, width: int, values: Values, rounding: float, begin: int) -> bool:
    """Say whether a few rows from `begin` on obey the recurrence where they begin."""
    import numpy as np

    if rows < begin + _FEWEST:
        return False
    some = np.stack([values((begin + i) * width, min(width, _FIRST)) for i in range(_FEWEST)])
    return _slack_of(some, rounding, begin + _FEWEST) is not None


def _obeys(rows: NDArray[Any], rounding: float, positions: int = 0, fewest: int = 2) -> bool:
    """Say whether each column obeys the recurrence, and `fewest` of them not because they are flat.

    A column that moves too little to be told from its roundings proves nothing either way.
    """
    import numpy as np

    slack = _slack_of(rows, rounding, positions)
    if slack is None:
        return False
    moved = np.abs(np.diff(rows, axis=0)).max(0) > 8 * slack
    return bool(moved.sum() >= min(fewest, rows.shape[1]))


def _slack_of(rows: NDArray[Any], rounding: float, positions: int) -> NDArray[Any] | None:
    """Return how much roundings may hide of each column, None where x[n+1] + x[n-1] is not c · x[n] in all.

    c is 2 for an arithmetic progression, r + 1/r for a geometric one, 2 cos f for a sinusoid, whose angle is
    rounded too, the more the larger its position.
    """
    import numpy as np

    if len(rows) < _FEWEST or not np.isfinite(rows).all():
        return None
    middle, ends = rows[1:-1], rows[2:] + rows[:-2]
    squares = (middle * middle).sum(0)
    c = (middle * ends).sum(0) / np.where(squares > 0, squares, 1)
    size = np.abs(rows[2:]) + np.abs(rows[:-2]) + np.abs(c * middle)
    angle = _ANGLE * positions * np.abs(rows).max(0)
    slack = _SLACK * (rounding * size + angle)
    found: NDArray[Any] = slack.max(0)
    return found if (np.abs(ends - c * middle) <= slack).all() else None


def _obeys_from_a_level(x: NDArray[Any], rounding: float) -> bool:
    """Say whether a vector's steps obey the recurrence: squares, or a progression above a constant."""
    import numpy as np

    steps = np.diff(x)
    if len(steps) < _FEWEST:
        return False
    middle, ends = steps[1:-1], steps[2:] + steps[:-2]
    c = (middle * ends).sum() / (middle * middle).sum() if middle.any() else 0.0
    slack = 2 * _SLACK * rounding * (2 + abs(c)) * np.abs(x).max()
    return bool((np.abs(ends - c * middle) <= slack).all() and np.abs(np.diff(steps)).max() > 8 * slack)


def _is_schedule(x: NDArray[Any], rounding: float) -> bool:
    """Say whether a vector is monotone and, but at its ends and a few kinks, smooth: third differences.

    Training a few per cent of a step away from where it began is enough to end that.
    """
    import numpy as np

    steps = np.diff(x)
    if len(x) < 16 or not ((steps >= 0).all() or (steps <= 0).all()):
        return False
    size = np.abs(x)
    slack = 4 * rounding * np.maximum(size[3:], size[:-3])
    smooth = np.abs(np.diff(steps, 2)) <= 0.1 * np.abs(steps[1:-1]) + slack
    # Where most values round to few, any order of them is smooth.
    return bool(smooth.mean() >= 0.75) and len(np.unique(x)) >= max(8, len(x) // 32)


def _is_even(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether each kernel, over the last one or two dimensions, reads the same backwards."""
    import numpy as np

    length = math.prod(shape[-2:]) if shape[-2] == shape[-1] else shape[-1]
    others = math.prod(shape) // length
    if not _FEWEST <= length <= _AT_ONCE:
        return False
    begin, end = values(0, _FEWEST), values(length - _FEWEST, _FEWEST)[::-1]
    near = (1e-3 + 8 * rounding) * max(np.abs(begin).max(), np.abs(end).max())
    if not any(
        (np.abs(begin[skipped:] - sign * end[: _FEWEST - skipped]) <= near).all()
        for skipped in (0, 1)
        for sign in (1, -1)
    ):
        return False
    at_once = max(1, min(others, _AT_ONCE // length))
    return all(
        _reads_backwards(values(at * length, at_once * length).reshape(at_once, length), rounding)
        for at in dict.fromkeys((0, (others - at_once) // 2, others - at_once))
    )


def _reads_backwards(rows: NDArray[Any], rounding: float) -> bool:
    """Say whether each row is the same backwards, or its negative; its first value may be left out.

    Flat rows prove nothing, and most have to prove something.
    """
    import numpy as np

    slack = 2 * _SLACK * rounding * np.abs(rows).max()
    if rows.shape[1] < _FEWEST or not (np.ptp(rows, axis=1) > 32 * slack).mean() > 0.5:
        return False
    even = np.zeros(len(rows), bool)
    for part in (rows, rows[:, 1:]):
        for sign in (1, -1):
            if part.shape[1] >= _FEWEST:
                even |= (np.abs(part - sign * part[:, ::-1]) <= slack).all(1)
    return bool(even.all())


def _is_lattice(shape: tuple[int, ...], first: NDArray[Any], values: Values) -> bool:
    """Say whether the rows of a matrix are all combinations of its columns' values, each once."""
    import numpy as np

    count = math.prod(shape)
    rows, width = shape[0], shape[-1]
    few = 4 * len(set(first.tolist())) <= 3 * len(first)
    if len(shape) != 2 or not (few and 1 < width <= _AXES and rows >= 2 * _FEWEST) or count > _LONGEST:
        return False
    table = values(0, count).reshape(shape)
    place, combinations = np.zeros(rows, int), 1
    for column in table.T:
        known, at = np.unique(column, return_inverse=True)
        combinations *= len(known)
        if combinations > rows:
            return False
        place = place * len(known) + at
    return combinations == rows == len(np.unique(place))


def _are_powers(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether the rows, or columns, of a matrix are 1, x, x²… of a progression x, times a constant."""
    import numpy as np

    if len(shape) != 2 or not 2 <= min(shape) <= _AXES or not _FEWEST <= max(shape) <= _LONGEST // _AXES:
        return False
    if values(0, 1)[0] != values(1 if shape[0] < shape[1] else shape[1], 1)[0]:
        return False
    table = values(0, math.prod(shape)).reshape(shape)
    rows = table if shape[0] < shape[1] else table.T
    if not rows[0].any() or np.ptp(rows[0]) or not _obeys(rows[1][:, None], rounding):
        return False
    x = rows[1] / rows[0, 0]
    slack = 4 * _SLACK * rounding * len(rows) * np.abs(rows).max()
    return bool((np.abs(rows[1:] - rows[:-1] * x) <= slack).all() and np.ptp(rows[-1]) > 8 * slack)


def _are_at_right_angles(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether the rows of a matrix, or of each of a stack, are orthogonal, whatever their lengths.

    Of one with more rows than columns that holds for blocks of them. Rows in which most values are zero prove
    nothing: what has been masked has such rows.
    """
    import numpy as np

    rows, width = shape[-2:]
    some = min(rows, width, _ROWS)
    if some < 4 or width > _AT_ONCE // _ROWS:
        return False
    slack = 1e-5 + 8 * rounding / math.sqrt(width)

    def are_orthogonal(begin: int, count: int) -> bool:
        x = values(begin * width, count * width).reshape(count, width)
        lengths = np.sqrt((x * x).sum(1))
        if not lengths.all() or 2 * np.count_nonzero(x) < x.size:
            return False
        products = (x @ x.T) / np.outer(lengths, lengths)
        return bool((np.abs(products - np.eye(count)) <= slack).all())

    last = math.prod(shape[:-2]) * rows - (rows - width * (rows // width) if rows > width else 0) - some
    return are_orthogonal(0, 2) and are_orthogonal(0, some) and are_orthogonal(last, some)


def _is_bank(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether each row, or each column, of a matrix is zero but for one bump, further on in each."""
    import numpy as np

    count = math.prod(shape)
    if len(shape) != 2 or count > _LONGEST:
        return False
    table = values(0, count).reshape(shape)
    if not (np.isfinite(table).all() and (table >= 0).all()) or 2 * np.count_nonzero(table) > count:
        return False
    return any(_are_bumps(lines, rounding) for lines in (table, table.T))


def _are_bumps(lines: NDArray[Any], rounding: float) -> bool:
    """Say whether lines that are not zero, eight at least, rise once and fall once, tops in order."""
    import numpy as np

    lines = lines[lines.any(1)]
    if len(lines) < _FEWEST or lines.shape[1] < _FEWEST:
        return False
    tops = lines.argmax(1)
    if (np.diff(tops) < 0).any() or len(np.unique(tops)) < _FEWEST // 2:
        return False
    some = lines > 0
    ends = np.diff(some, axis=1, prepend=False, append=False).sum(1)
    steps = np.diff(lines, axis=1)
    slack = _SLACK * rounding * lines.max(1, keepdims=True)
    before = np.arange(steps.shape[1]) < tops[:, None]
    return bool((ends == 2).all() and np.where(before, steps >= -slack, steps <= slack).all())


def _has_unit_vectors(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether all rows, or all columns, have length one: eight at least, of five values at least."""
    import numpy as np

    length = shape[-1]
    others = math.prod(shape) // length
    slack = 4 * rounding + 1e-5
    if math.prod(shape) > _LARGEST:
        return False

    def are_unit(squares: NDArray[Any]) -> bool:
        return bool((np.abs(squares - 1) <= slack).all())

    at_once = max(1, _AT_ONCE // length)
    may_be = others >= 8 and 5 <= length <= _AT_ONCE  # four may be a rotation's, which is learned
    may_be = may_be and (values(0, min(length, _FIRST)) ** 2).sum() <= 1 + slack
    may_be = may_be and are_unit((values(0, length) ** 2).sum())
    if may_be and all(
        are_unit((values(at * length, n * length).reshape(n, length) ** 2).sum(1))
        for at in range(0, others, at_once)
        for n in [min(at_once, others - at)]
    ):
        return True
    if len(shape) != 2 or length < 8 or not 5 <= others <= _TALLEST or length > _AT_ONCE:
        return False
    # One column first, value by value: nearly always its length is another.
    if not are_unit(np.array(sum(float(values(at * length, 1)[0]) ** 2 for at in range(others)))):
        return False
    squares = np.zeros(length)
    for at in range(0, others, at_once):
        n = min(at_once, others - at)
        squares += (values(at * length, n * length).reshape(n, length) ** 2).sum(0)
    return are_unit(squares)


#: What modules are called that hold a table of positions.
_POSITIONS = re.compile(r"(?<![a-z])(pos|positions?|positional|wpe)(?![a-z])[^./]*[./]$", re.IGNORECASE)

#: What the two parts of a complex convolution are called, learned or a Fourier transform's.
_COMPLEX = re.compile(r"(?<![A-Za-z])(real|imag)[./]$")

#: What weights are called in formulas: by a letter, as W and b by what they belong to (`W_dec`), too.
_LETTER = re.compile(r"[A-Zbguvw]|[Wb]_[A-Za-z]\w{0,15}")

#: The last part of names that only weights have.
PLAIN = re.compile(
    r"weight(_[gv]|_[ih]h_l\d+(_reverse)?)?|bias(_[kv]|_[ih]h_l\d+(_reverse)?)?|original[01]|gamma|beta"
    r"|in_proj_(weight|bias)|\w*_proj(_bias)?|A_log|D|dt_bias|logit_scale|sinks|(cls|mask|dist)_token"
    r"|class_embedding|relative_position_bias_table|lora_(A|B|embedding_[AB])|lambda_[12]"
)

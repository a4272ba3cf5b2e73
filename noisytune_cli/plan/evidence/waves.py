"""What obeys x[n+1] + x[n-1] = c · x[n] along its positions: sinusoids and progressions, in tables and grids.

Neither base nor phase nor layout of a table makes a difference (`_slack_of`), and of a long one some rows at
its beginning, middle and end will do.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from noisytune_cli.plan.evidence.values import AT_ONCE, FEWEST, FIRST, ROWS, SLACK, Values

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Positions and frequencies are multiplied in float32 before they are stored.
_ANGLE = 2.0**-23

#: Channels of a table that has these first.
_CHANNELS = 64

#: The most rows of a line of a grid.
_LONGEST_LINE = 4096


def is_wave(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether [n, …] obeys the recurrence from row to row, or [n] · … along its last dimension."""
    rows, width = shape[0], math.prod(shape[1:])
    if width <= AT_ONCE // FEWEST and (
        _is_wave_down(rows, width, values, rounding) or _is_grid(rows, width, values, rounding)
    ):
        return True
    return _is_wave_along(shape, values, rounding) or _is_wave_across(shape, values, rounding)


def is_short_table(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether a few rows are sines and cosines of the same angles, in turn or one half and the other."""
    import numpy as np

    rows, width = shape[0], shape[-1]
    if len(shape) != 2 or not 2 <= rows < FEWEST or width % 4 or not FEWEST <= width <= AT_ONCE // FEWEST:
        return False
    table = values(0, rows * width).reshape(rows, width)
    pairs = ((table[:, ::2], table[:, 1::2]), (table[:, : width // 2], table[:, width // 2 :]))
    off = (np.abs(np.hypot(*pair) - 1).max() for pair in pairs)
    return bool(min(off) <= SLACK * rounding and np.ptp(table, axis=0).any())


def _is_wave_down(rows: int, width: int, values: Values, rounding: float, fewest: int = 2) -> bool:
    """Say whether the recurrence holds from row to row, at the beginning, the middle and the end."""
    # Padding may have put zeros in the place of one of the first rows.
    begin = 3 if rows >= 16 else 0
    if not _may_obey(rows, width, values, rounding, begin):
        return False
    most = max(FEWEST, min(ROWS, rows - begin, AT_ONCE // width))
    places = dict.fromkeys((begin, max(begin, (rows - most) // 2), rows - most))
    return all(
        obeys(values(at * width, most * width).reshape(most, width), rounding, at + most, fewest)
        for at in places
    )


def _is_wave_along(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether each vector along the last dimension obeys the recurrence."""
    length = shape[-1]
    if not FEWEST <= length <= AT_ONCE:
        return False
    if _slack_of(values(0, min(length, FIRST))[:, None], rounding, length) is None:
        return False
    others = math.prod(shape[:-1])
    at_once = max(1, min(others, ROWS, AT_ONCE // length))
    return all(
        obeys(values(at * length, at_once * length).reshape(at_once, length).T, rounding, length)
        for at in dict.fromkeys((0, (others - at_once) // 2, others - at_once))
    )


def _is_wave_across(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether [channels, height, width] is a grid of positions, by some of its channels."""
    import numpy as np

    if len(shape) < 3:
        return False
    channels, rows = math.prod(shape[:-2]), math.prod(shape[-2:])
    if rows < 2 * FEWEST or rows > AT_ONCE // FEWEST:
        return False
    if _slack_of(values(0, FEWEST)[:, None], rounding, FEWEST) is None:
        return False
    some = np.linspace(0, channels - 1, min(channels, _CHANNELS, AT_ONCE // rows)).astype(int)
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
    lines, most = rows // line, max(FEWEST, min(ROWS, line, AT_ONCE // width))
    for at in dict.fromkeys((0, lines // 2, lines - 1)):
        for begin in dict.fromkeys((at * line, at * line + line - most)):
            if not obeys(values(begin * width, most * width).reshape(most, width), rounding, line, 1):
                return False
    starts = _every(line, width, values)
    # Of coordinates one column moves along each axis.
    return _is_wave_down(lines, width, starts, rounding, 1) or _are_lines(lines, width, starts, rounding)


def _line(rows: int, width: int, values: Values, rounding: float) -> int | None:
    """Return how many rows a grid's line has: what moves from the first row on is there again after it."""
    import numpy as np

    if rows < 2 * FEWEST:
        return None
    first = values(0, FEWEST * width).reshape(FEWEST, width)
    slack = SLACK * rounding * np.abs(first).max() + _ANGLE * _LONGEST_LINE
    moving = np.ptp(first, axis=0) > 8 * slack
    if not moving.any():
        return None
    at_once = max(1, AT_ONCE // width)
    for at in range(FEWEST, min(rows, _LONGEST_LINE), at_once):
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

    if rows < begin + FEWEST:
        return False
    some = np.stack([values((begin + i) * width, min(width, FIRST)) for i in range(FEWEST)])
    return _slack_of(some, rounding, begin + FEWEST) is not None


def obeys(rows: NDArray[Any], rounding: float, positions: int = 0, fewest: int = 2) -> bool:
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

    if len(rows) < FEWEST or not np.isfinite(rows).all():
        return None
    middle, ends = rows[1:-1], rows[2:] + rows[:-2]
    squares = (middle * middle).sum(0)
    c = (middle * ends).sum(0) / np.where(squares > 0, squares, 1)
    size = np.abs(rows[2:]) + np.abs(rows[:-2]) + np.abs(c * middle)
    angle = _ANGLE * positions * np.abs(rows).max(0)
    slack = SLACK * (rounding * size + angle)
    found: NDArray[Any] = slack.max(0)
    return found if (np.abs(ends - c * middle) <= slack).all() else None


def obeys_from_a_level(x: NDArray[Any], rounding: float) -> bool:
    """Say whether a vector's steps obey the recurrence: squares, or a progression above a constant."""
    import numpy as np

    steps = np.diff(x)
    if len(steps) < FEWEST:
        return False
    middle, ends = steps[1:-1], steps[2:] + steps[:-2]
    c = (middle * ends).sum() / (middle * middle).sum() if middle.any() else 0.0
    slack = 2 * SLACK * rounding * (2 + abs(c)) * np.abs(x).max()
    return bool((np.abs(ends - c * middle) <= slack).all() and np.abs(np.diff(steps)).max() > 8 * slack)

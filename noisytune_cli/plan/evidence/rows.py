"""What rows of a table are in themselves and to one another, where a formula gave them.

A window and a filter read the same backwards; a bank of filters has zeros but for one bump in each, one
further on than the other; a lattice has each combination of a few values once; what was normalised has rows
or columns of length one, or at right angles to each other, or are shares that add up to one; what relates
things to each other (distances, covariances, a graph) is the same across its diagonal; a progression is
followed by its powers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from noisytune_cli.plan.evidence.values import (
    AT_ONCE,
    AXES,
    FEWEST,
    FIRST,
    LARGEST,
    LONGEST,
    ROWS,
    SLACK,
    Values,
)
from noisytune_cli.plan.evidence.waves import obeys

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: The longest column that is looked at value by value.
_TALLEST = 1024

#: The smallest square, or part of one, that is held against itself across its diagonal.
_SMALLEST_SQUARE = 5

#: By how much of the largest value what was inverted may differ across the diagonal.
_SAME_ACROSS = 1e-4


def is_even(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether each kernel, over the last one or two dimensions, reads the same backwards."""
    import numpy as np

    length = math.prod(shape[-2:]) if shape[-2] == shape[-1] else shape[-1]
    others = math.prod(shape) // length
    if not FEWEST <= length <= AT_ONCE:
        return False
    begin, end = values(0, FEWEST), values(length - FEWEST, FEWEST)[::-1]
    near = (1e-3 + 8 * rounding) * max(np.abs(begin).max(), np.abs(end).max())
    if not any(
        (np.abs(begin[skipped:] - sign * end[: FEWEST - skipped]) <= near).all()
        for skipped in (0, 1)
        for sign in (1, -1)
    ):
        return False
    at_once = max(1, min(others, AT_ONCE // length))
    return all(
        reads_backwards(values(at * length, at_once * length).reshape(at_once, length), rounding)
        for at in dict.fromkeys((0, (others - at_once) // 2, others - at_once))
    )


def reads_backwards(rows: NDArray[Any], rounding: float) -> bool:
    """Say whether each row is the same backwards, or its negative; its first value may be left out.

    Flat rows prove nothing, and most have to prove something.
    """
    import numpy as np

    slack = 2 * SLACK * rounding * np.abs(rows).max()
    if rows.shape[1] < FEWEST or not (np.ptp(rows, axis=1) > 32 * slack).mean() > 0.5:
        return False
    even = np.zeros(len(rows), bool)
    for part in (rows, rows[:, 1:]):
        for sign in (1, -1):
            if part.shape[1] >= FEWEST:
                even |= (np.abs(part - sign * part[:, ::-1]) <= slack).all(1)
    return bool(even.all())


def is_lattice(shape: tuple[int, ...], first: NDArray[Any], values: Values) -> bool:
    """Say whether the rows of a matrix are all combinations of its columns' values, each once."""
    import numpy as np

    count = math.prod(shape)
    rows, width = shape[0], shape[-1]
    few = 4 * len(set(first.tolist())) <= 3 * len(first)
    if len(shape) != 2 or not (few and 1 < width <= AXES and rows >= 2 * FEWEST) or count > LONGEST:
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


def are_powers(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether the rows, or columns, of a matrix are 1, x, x²… of a progression x, times a constant."""
    import numpy as np

    if len(shape) != 2 or not 2 <= min(shape) <= AXES or not FEWEST <= max(shape) <= LONGEST // AXES:
        return False
    if values(0, 1)[0] != values(1 if shape[0] < shape[1] else shape[1], 1)[0]:
        return False
    table = values(0, math.prod(shape)).reshape(shape)
    rows = table if shape[0] < shape[1] else table.T
    if not rows[0].any() or np.ptp(rows[0]) or not obeys(rows[1][:, None], rounding):
        return False
    x = rows[1] / rows[0, 0]
    slack = 4 * SLACK * rounding * len(rows) * np.abs(rows).max()
    return bool((np.abs(rows[1:] - rows[:-1] * x) <= slack).all() and np.ptp(rows[-1]) > 8 * slack)


def are_at_right_angles(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether the rows of a matrix, or of each of a stack, are orthogonal, whatever their lengths.

    Of one with more rows than columns that holds for blocks of them. Rows in which most values are zero prove
    nothing: what has been masked has such rows.
    """
    import numpy as np

    rows, width = shape[-2:]
    some = min(rows, width, ROWS)
    if some < 4 or width > AT_ONCE // ROWS:
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


def is_bank(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether each row, or each column, of a matrix is zero but for one bump, further on in each."""
    import numpy as np

    count = math.prod(shape)
    if len(shape) != 2 or count > LONGEST:
        return False
    table = values(0, count).reshape(shape)
    if not (np.isfinite(table).all() and (table >= 0).all()) or 2 * np.count_nonzero(table) > count:
        return False
    return any(_are_bumps(lines, rounding) for lines in (table, table.T))


def _are_bumps(lines: NDArray[Any], rounding: float) -> bool:
    """Say whether lines that are not zero, eight at least, rise once and fall once, tops in order."""
    import numpy as np

    lines = lines[lines.any(1)]
    if len(lines) < FEWEST or lines.shape[1] < FEWEST:
        return False
    tops = lines.argmax(1)
    if (np.diff(tops) < 0).any() or len(np.unique(tops)) < FEWEST // 2:
        return False
    some = lines > 0
    ends = np.diff(some, axis=1, prepend=False, append=False).sum(1)
    steps = np.diff(lines, axis=1)
    slack = SLACK * rounding * lines.max(1, keepdims=True)
    before = np.arange(steps.shape[1]) < tops[:, None]
    return bool((ends == 2).all() and np.where(before, steps >= -slack, steps <= slack).all())


def has_unit_vectors(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether all rows, or all columns, have length one: eight at least, of five values at least."""
    import numpy as np

    length = shape[-1]
    others = math.prod(shape) // length
    slack = 4 * rounding + 1e-5
    if math.prod(shape) > LARGEST:
        return False

    def are_unit(squares: NDArray[Any]) -> bool:
        return bool((np.abs(squares - 1) <= slack).all())

    at_once = max(1, AT_ONCE // length)
    may_be = others >= 8 and 5 <= length <= AT_ONCE  # four may be a rotation's, which is learned
    may_be = may_be and (values(0, min(length, FIRST)) ** 2).sum() <= 1 + slack
    may_be = may_be and are_unit((values(0, length) ** 2).sum())
    if may_be and all(
        are_unit((values(at * length, n * length).reshape(n, length) ** 2).sum(1))
        for at in range(0, others, at_once)
        for n in [min(at_once, others - at)]
    ):
        return True
    if len(shape) != 2 or length < 8 or not 5 <= others <= _TALLEST or length > AT_ONCE:
        return False
    # One column first, value by value: nearly always its length is another.
    if not are_unit(np.array(sum(float(values(at * length, 1)[0]) ** 2 for at in range(others)))):
        return False
    squares = np.zeros(length)
    for at in range(0, others, at_once):
        n = min(at_once, others - at)
        squares += (values(at * length, n * length).reshape(n, length) ** 2).sum(0)
    return are_unit(squares)


def are_symmetric(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether a square matrix, or each of a stack, is the same across its diagonal, and not for zeros.

    Of a large one the beginning and the end of its diagonal are looked at.
    """
    import numpy as np

    n = shape[-1]
    size, last = min(n, LONGEST // n), math.prod(shape[:-2]) - 1
    if shape[-2] != n or size < _SMALLEST_SQUARE:
        return False
    slack = _SAME_ACROSS + SLACK * rounding
    # A few values first: those of nearly every matrix differ at once.
    row = values(0, min(n, FEWEST + 1))
    near = slack * np.abs(row).max()
    if any(abs(float(row[i]) - float(values(i * n, 1)[0])) > near for i in range(1, len(row))):
        return False

    def is_symmetric(matrix: int, begin: int) -> bool:
        part = values((matrix * n + begin) * n, size * n).reshape(size, n)[:, begin : begin + size]
        above, below = (side[np.triu_indices(size, 1)] for side in (part, part.T))
        same = (np.abs(above - below) <= slack * np.abs(part).max()).all()
        return bool(same and len(np.unique(above[above != 0])) >= FEWEST)

    places = dict.fromkeys((matrix, begin) for matrix in (0, last // 2, last) for begin in (0, n - size))
    return all(is_symmetric(*place) for place in places)


def are_shares(shape: tuple[int, ...], values: Values, rounding: float) -> bool:
    """Say whether nothing is below zero and each row, or each column, adds up to one: eight at least.

    One may be zero, as of a node of a graph without neighbours.
    """
    import numpy as np

    height, width = shape[-2:]
    count, size = math.prod(shape), height * width
    at_once = max(1, min(count, LONGEST) // size)
    if size > LONGEST:
        return False

    def are_of_one(tables: NDArray[Any]) -> bool:
        sums = tables.sum(2)
        sums = sums[sums > 0]
        add_up = len(sums) >= FEWEST and (np.abs(sums - 1) <= 1e-5 + 2 * rounding).all()
        return bool(add_up and (tables >= 0).all() and np.ptp(tables) > 0)

    places = dict.fromkeys((0, count // size - at_once))
    parts = [values(at * size, at_once * size).reshape(at_once, height, width) for at in places]
    return any(all(map(are_of_one, some)) for some in (parts, [part.swapaxes(1, 2) for part in parts]))

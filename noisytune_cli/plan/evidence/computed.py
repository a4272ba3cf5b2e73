"""What is computed is not learned: values that a formula gives, which no training would leave so.

A mask has zeros and one other value; what was counted is whole. A table of sinusoids, a progression of
frequencies or timesteps obeys a recurrence along its positions (`waves`); a schedule of noise levels is
monotone and smooth to its last element; windows, filters, lattices and what was normalised are told by their
rows (`rows`). Values that an optimizer moved do none of this: so a look at a few values rejects nearly every
tensor.

Of names that only weights have (`weight`, `bias`, `q_proj`…) `weight` alone is asked, and for tables of
sinusoids alone, as embeddings may hold them; a norm at its initial values is no mask. So are those of one
letter, for zeros and ones, as which flows keep masks and permutations. Convolutions may compute: those of a
real and an imaginary part (a Fourier transform's) are asked for everything, those to one channel for the
numbers 0, 1, 2…, of which they take the mean.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.plan.evidence.rows import (
    are_at_right_angles,
    are_powers,
    are_shares,
    are_symmetric,
    has_unit_vectors,
    is_bank,
    is_even,
    is_lattice,
    reads_backwards,
)
from noisytune_cli.plan.evidence.structure import PairKind, split_name
from noisytune_cli.plan.evidence.values import AT_ONCE, FEWEST, FIRST, LARGEST, LONGEST, Values
from noisytune_cli.plan.evidence.waves import is_short_table, is_wave, obeys, obeys_from_a_level
from noisytune_cli.records import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Half the distance of neighbouring values near 1.
_ROUNDING = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}

#: What no formula gives.
_LARGEST_VALUE = 1e30

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
_SHARES = "shares: none below zero, and they add up to one"
_SYMMETRIC = "the same across its diagonal"
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
    if tensor.dtype not in FLOAT_DTYPES or tensor.elements < FEWEST:
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
    if tensor.dtype not in FLOAT_DTYPES or count < FEWEST:
        return None
    if plain and _is_letter(split_name(tensor.name)[1]):
        return _MASK if _switches(shape, count, values) else None
    if plain and len(shape) < 2:
        return _NUMBERS if _takes_mean(tensor.shape) and _counts(values(0, min(FIRST, count))) else None
    import numpy as np

    with np.errstate(all="ignore"):  # what overflows compares as unlike
        return _look(shape, count, values, _ROUNDING[tensor.dtype], plain=plain)


def _look(shape: tuple[int, ...], count: int, values: Values, rounding: float, *, plain: bool) -> str | None:
    """Return what says that `count` values of a shape without ones were computed."""
    import numpy as np

    first = values(0, min(FIRST, count))
    if not np.isfinite(first).all():
        return None
    if plain:
        # The sines and cosines of position 0, or a row of padding.
        if not first.any() and not values(count // 2, min(FIRST, count - count // 2)).any():
            return None  # most likely all of it is 0, and what is constant is copied, whatever it is
        start = np.abs(first[: shape[-1]])
        starts = np.minimum(start, np.abs(start - 1)) <= 1e-6
        is_table = starts.all() and (
            is_wave(shape, values, rounding) or is_short_table(shape, values, rounding)
        )
        return _WAVE if is_table else None
    if len(set(np.abs(first).tolist()) - {0.0}) <= 1 and _is_mask(count, values):
        return _MASK
    if np.abs(first).max() > _LARGEST_VALUE:
        return None
    if _are_whole(count, values):
        return _WHOLE
    if len(shape) == 1:
        return _look_at_vector(values(0, count), rounding) if count <= LONGEST else None
    if is_wave(shape, values, rounding):
        return _WAVE
    if is_even(shape, values, rounding):
        return _EVEN
    if first.min() >= 0 and not first.all() and is_bank(shape, values, rounding):
        return _BANK
    if first.min() >= 0 and are_shares(shape, values, rounding):
        return _SHARES
    if has_unit_vectors(shape, values, rounding):
        return _UNIT
    if are_symmetric(shape, values, rounding):
        return _SYMMETRIC
    if is_lattice(shape, first, values):
        return _LATTICE
    if are_powers(shape, values, rounding):
        return _POWERS
    return _ANGLED if are_at_right_angles(shape, values, rounding) else None


def may_be_asked(tensor: TensorSpec) -> bool:
    """Say whether the values of a tensor are looked at, whatever its name leaves to them."""
    last = split_name(tensor.name)[1]
    return last == "weight" or _is_letter(last) or not is_plain(tensor)


def _is_letter(last: str) -> bool:
    return len(last) == 1 and PLAIN.fullmatch(last) is None


def _switches(shape: tuple[int, ...], count: int, values: Values) -> bool:
    """Say whether there are zeros and ones, of either sign, which are no identity: that is learned from."""
    import numpy as np

    if not set(np.abs(values(0, min(FIRST, count))).tolist()) <= {0.0, 1.0} or not _is_mask(count, values):
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
    for at in range(0, count, AT_ONCE):
        n = min(AT_ONCE, count - at)
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

    if count < FEWEST:
        return False
    n = min(count, AT_ONCE)
    places = dict.fromkeys((0, (count - n) // 2, count - n))
    x, y = (np.concatenate([values(at, n) for at in places]) for values in (cosines, sines))
    with np.errstate(all="ignore"):
        lengths = np.hypot(x, y)
        is_same = lengths.max() - lengths.min() <= _SAME_LENGTH * lengths.max()
    return bool(is_same and np.ptp(x) > 0 and lengths.max() <= _LARGEST_VALUE)


def is_constant(values: Values, count: int) -> bool:
    """Say whether all values are equal."""
    first = values(0, 1)
    return all(bool((values(at, min(AT_ONCE, count - at)) == first).all()) for at in range(0, count, AT_ONCE))


def _is_mask(count: int, values: Values) -> bool:
    """Say whether there are zeros and one other value, or that with either sign; each more than once."""
    if count > LARGEST:
        return False
    seen: dict[float, int] = {}
    for at in range(0, count, AT_ONCE):
        rest = values(at, min(AT_ONCE, count - at))
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

    first = values(0, min(FIRST, count))
    if count > LARGEST or (first != np.rint(first)).any():
        return False
    least, most, room = math.inf, 0.0, 0.0
    for at in range(0, count, AT_ONCE):
        x = np.abs(values(at, min(AT_ONCE, count - at)))
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
    if len(x) < FEWEST or np.ptp(x) == 0:
        return None
    if obeys(x[:, None], rounding) or (rounding < 1e-6 and obeys_from_a_level(x, rounding)):
        return _WAVE
    if _is_schedule(x, rounding):
        return _SCHEDULE
    if reads_backwards(x[None], rounding):
        return _EVEN
    if rounding > 1e-6:
        return None  # in half precision one length, or one sum, near 1 is chance
    if x.min() >= 0 and abs(math.fsum(x) - 1) < 1e-5:
        return _SHARES
    return _UNIT if abs(math.fsum(x * x) - 1) < 1e-5 else None


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

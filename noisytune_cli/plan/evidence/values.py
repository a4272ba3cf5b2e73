"""Values of a tensor that are asked for by what looks for formulas in them, and how many of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Gives `count` values from element `first` as float64.
Values = Callable[[int, int], "NDArray[Any]"]

#: The fewest values, or rows of a table, that can show a formula.
FEWEST = 8

#: How many values are looked at first, and in one piece after that.
FIRST, AT_ONCE = 64, 1 << 18

#: The most of a vector that is looked at, and of what has to be looked at whole.
LONGEST, LARGEST = 1 << 20, 1 << 26

#: Rows of a table that are looked at in one place.
ROWS = 48

#: The most columns of a lattice and powers of a progression.
AXES = 16

#: How many roundings a computed value may be off, in sums of three.
SLACK = 3

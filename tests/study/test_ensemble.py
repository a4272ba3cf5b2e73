"""The majority vote over runs that are there already."""

from __future__ import annotations

from noisytune_cli.study.report import ensemble


def test_the_majority_decides_on_each_row() -> None:
    assert ensemble.vote([[0, 1, 2, 1], [0, 1, 1, 2], [1, 1, 1, 0]], regression=False) == [0, 1, 1, 1]


def test_the_first_member_decides_where_votes_are_equal() -> None:
    assert ensemble.vote([[1, 0], [0, 1]], regression=False) == [1, 0]
    assert ensemble.vote([[2], [1], [0], [0], [1]], regression=False) == [1]


def test_numbers_are_averaged() -> None:
    assert ensemble.vote([[1.0, 4.0], [2.0, 0.5]], regression=True) == [1.5, 2.25]


def test_each_member_is_left_out_once() -> None:
    assert ensemble.leave_one_out([[1], [2], [3]]) == [[[2], [3]], [[1], [3]], [[1], [2]]]

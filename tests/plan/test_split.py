"""--split: what the user's divisions mean, and which are refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from noisytune_cli.cli.parse import parse_split
from noisytune_cli.errors import UsageError
from noisytune_cli.plan.plan import make_plan
from noisytune_cli.records import NoiseSpec, Part, Plan, TensorSpec


def spec(name: str, *shape: int, dtype: str = "F32") -> TensorSpec:
    return TensorSpec(name, dtype, shape, "f", 0, 4 * int(np.prod(shape)))


def plan(*splits: str, tensors: tuple[TensorSpec, ...], **options: object) -> Plan:
    noise = NoiseSpec(granularity="matrix", splits=tuple(map(parse_split, splits)))
    return make_plan(tensors, noise, **options)  # type: ignore[arg-type]


def parts(division: str, *shape: int) -> tuple[Part, ...]:
    return plan(f"w={division}", tensors=(spec("w", *shape),)).steps[0].parts


def owners(found: tuple[Part, ...], shape: tuple[int, ...]) -> list[int]:
    """The part that each element belongs to."""
    owner = np.full(int(np.prod(shape)), -1)
    for index, part in enumerate(found):
        for run in range(part.repeat):
            owner[part.first + run * part.stride :][: part.length] = index
    return owner.tolist()


@pytest.mark.parametrize(
    ("division", "shape", "expected"),
    [
        ("0:3,1", (4, 2), [0, 0, 0, 0, 0, 0, 1, 1]),
        ("0:/2", (4, 2), [0, 0, 0, 0, 1, 1, 1, 1]),
        ("1:/2", (2, 4), [0, 0, 1, 1, 0, 0, 1, 1]),
        ("-1:1,3", (2, 4), [0, 1, 1, 1, 0, 1, 1, 1]),
        ("0:1,1*2", (4, 2), [0, 0, 1, 1, 0, 0, 1, 1]),
        ("-1:1,1*2", (2, 4), [0, 1, 0, 1, 0, 1, 0, 1]),
        ("0:2,1*2", (6,), [0, 0, 1, 0, 0, 1]),
        ("0:/2;1:/2", (2, 2, 2), [0, 0, 1, 1, 2, 2, 3, 3]),
        ("0:/2;2:/2", (2, 2, 2), [0, 1, 0, 1, 2, 3, 2, 3]),
        ("0:/2;-1:1,1*2", (2, 1, 4), [0, 1, 0, 1, 2, 3, 2, 3]),
        ("1:/2", (2, 2, 2), [0, 0, 1, 1, 0, 0, 1, 1]),
    ],
)
def test_a_division_cuts_its_dimensions(division: str, shape: tuple[int, ...], expected: list[int]) -> None:
    found = parts(division, *shape)
    assert owners(found, shape) == expected
    assert all(np.prod(part.shape) == part.elements == expected.count(i) for i, part in enumerate(found))


def test_parts_are_called_by_their_numbers() -> None:
    assert [part.name for part in parts("0:/3", 6, 2)] == ["0", "1", "2"]
    names = [part.name for part in parts("0:/2;1:/2", 2, 4, 3)]
    assert names == [f"{i}.{j}" for i, j in itertools.product(range(2), repeat=2)]


def test_one_part_is_the_whole_whatever_is_known_of_the_model() -> None:
    tensors = (spec("h.0.attn.c_attn.weight", 4, 12),)
    assert len(plan(tensors=tensors).steps[0].parts) == 3
    assert plan("*.c_attn.weight=0:/1", tensors=tensors).steps[0].parts == ()


def test_a_split_beats_the_family_and_the_last_one_counts() -> None:
    tensors = (spec("h.0.attn.c_attn.weight", 4, 12),)
    (step,) = plan("*=0:/2", "*c_attn*=1:/4", tensors=tensors).steps
    assert [part.shape for part in step.parts] == [(4, 3)] * 4


def test_tensors_that_take_no_noise_need_not_fit() -> None:
    steps = plan("*=0:3,1", tensors=(spec("w", 4, 2), spec("ids", 5, dtype="I64"), spec("one", 1))).steps
    assert [len(step.parts) for step in steps] == [2, 0, 0]


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("w=0:3,2", ['tensor "w"', "[4, 2]", "dimension 0 is 4, and 3+2 is 5"]),
        ("w=0:1,1*3", ["(1+1) · 3 is 6"]),
        ("w=0:/3", ["is 4, which is not 3 equal parts"]),
        ("w=2:/2", ["it has no dimension 2"]),
        ("w=-3:/2", ["it has no dimension -3"]),
        ("w=1:/2;0:/2", ["0:/2 cuts what is not in one piece any more"]),
        ("nothing=0:/2", ["pattern matches nothing: nothing"]),
        ("w=0:0,4", ['"0:0,4" is not DIM:SIZES']),
        ("w=0:/0", ["is not DIM:SIZES"]),
        ("w=0:4*0", ["is not DIM:SIZES"]),
        ("w=0", ["is not DIM:SIZES"]),
        ("w=0:2,,2", ["is not DIM:SIZES"]),
        ("w=0:2;", ["is not DIM:SIZES"]),
        ("w=0:-1,5", ["is not DIM:SIZES"]),
        ("w=a:2,2", ["is not DIM:SIZES"]),
        ("@nokind=0:/2", ["no such kind"]),
    ],
)
def test_what_does_not_fit_is_a_usage_error_with_the_numbers(split: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as refused:
        plan(split, tensors=(spec("w", 4, 2),))
    assert all(word in refused.value.line() for word in words), refused.value.line()


@pytest.mark.parametrize("text", ["w", "=0:/2", ""])
def test_a_split_is_a_pattern_and_a_division(text: str) -> None:
    with pytest.raises(UsageError, match="PATTERN=DIM:SIZES"):
        parse_split(text)


def test_a_split_needs_granularity_matrix() -> None:
    with pytest.raises(UsageError, match="Add --granularity=matrix"):
        make_plan((spec("w", 4, 2),), NoiseSpec(splits=(("w", "0:/2"),)))


def test_the_number_of_parts_is_limited() -> None:
    with pytest.raises(UsageError, match="4,096 is the most"):
        parts("0:/5000", 5000, 2)
    with pytest.raises(UsageError, match="10,000 parts, and 4,096 is the most"):
        parts("0:/100;1:/100", 100, 100)
    many = tuple(spec(f"w{i}", 4096, 1) for i in range(64))
    with pytest.raises(UsageError, match="262,144 sub-matrices"):
        plan("*=0:/4096", tensors=many)


def test_names_of_a_tie_have_one_division() -> None:
    tied = [("w", "x")]
    steps = plan("x=0:/2", tensors=(spec("w", 4, 2), spec("x", 4, 2)), stored_as_one=tied).steps
    assert steps[0].parts == steps[1].parts != ()
    assert steps[0].stream == steps[1].stream

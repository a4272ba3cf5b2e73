"""Parts in tiles: gathered and noised element for element, whatever the layout, the tile and the dtype."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from noisytune_cli.engine import tiles
from noisytune_cli.manifest.consistency import cover_exactly
from noisytune_cli.noise import stream
from noisytune_cli.noise.devices import open_device
from noisytune_cli.plan.parts import cut, stack
from noisytune_cli.records import Part

LAYOUTS = {
    "columns": cut((6, 24), 1, [("q", 8), ("k", 8), ("v", 8)]),
    "by-head": cut((24, 6), 0, [("q", 2), ("k", 2), ("v", 4)], 3),
    "alternate": stack((3, 4, 10), cut((4, 10), 1, [("gate", 1), ("up", 1)], 5)),
    "stacked-rows": stack((3, 4, 10), cut((4, 10), 0, [("gate", 1), ("up", 3)])),
    "blocks": cut((7,), 0, [("a", 3), ("b", 4)]),
    "stack": stack((5, 3), ()),
}
DEVICE = open_device("cpu")
AMPLITUDES = [2.0**-n for n in range(-3, 12)]


def owner_of(parts: tuple[Part, ...]) -> np.ndarray:
    owner = np.full(sum(part.elements for part in parts), -1)
    for index, part in enumerate(parts):
        for run in range(part.repeat):
            owner[part.first + run * part.stride :][: part.length] = index
    return owner


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_cover_their_tensor_exactly(layout: str) -> None:
    parts = LAYOUTS[layout]
    count = sum(part.elements for part in parts)
    assert (owner_of(parts) >= 0).all()
    assert cover_exactly(parts, count)
    assert not cover_exactly(parts[1:], count)
    assert not cover_exactly(parts[:-1], count)
    assert not cover_exactly((*parts, parts[-1]), count)
    assert not cover_exactly(parts, count + 1)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("long", [1, 4096])
@pytest.mark.parametrize("dtype", oracle.FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_element_gets_the_noise_of_its_index_with_its_parts_amplitude(
    layout: str, dtype: str, long: int, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_LONG", long)
    parts = LAYOUTS[layout]
    owner = owner_of(parts)
    values = oracle.any_finite(np.random.default_rng(7), owner.size, dtype)
    c = stream.coefficients("uniform", 5, "x", 0, owner.size)
    for tile in (1, 2, 3, 5, 7, 64, owner.size):
        source, out = values.copy(), values.copy()
        target = source if in_place else out
        counts = np.zeros((len(parts), 2), int)
        size = values.itemsize
        places = tiles.Places(parts)
        for first in range(0, owner.size, tile):
            span = slice(first * size, (first + tile) * size)
            data, room = oracle.tile(source)[span], memoryview(target.view(np.uint8))[span]
            if in_place:
                data = room
            for part, blocks in places.in_tile(first, min(tile, owner.size - first)):
                mine = values[first : first + tile][owner[first : first + tile] == part]
                if not in_place:
                    assert bytes(tiles.gather(data, dtype, blocks)) == mine.tobytes()
                counts[part] += tiles.add_noise(
                    DEVICE,
                    data,
                    room,
                    dtype,
                    dtype,
                    blocks,
                    noise=stream.Noise.of("uniform", stream.stream_words(5, "x"), AMPLITUDES[part]),
                    first=first,
                )
        for part in range(len(parts)):
            own = owner == part
            expected, *tallied = stream.add_noise(values[own], dtype, c[own], np.float32(AMPLITUDES[part]))
            assert target[own].tobytes() == expected.tobytes()
            assert counts[part].tolist() == tallied


@pytest.mark.parametrize("out_dtype", ["BF16", "F64"])
def test_the_sum_is_rounded_to_another_dtype_where_asked(out_dtype: str) -> None:
    parts = LAYOUTS["columns"]
    owner = owner_of(parts)
    values = oracle.weights(np.random.default_rng(3), owner.size, "F32")
    c = stream.coefficients("gaussian", 5, "x", 0, owner.size)
    out = np.zeros(owner.size, {"BF16": np.uint16, "F64": np.float64}[out_dtype])
    for part, blocks in tiles.Places(parts).in_tile(0, owner.size):
        counts = tiles.add_noise(
            DEVICE,
            oracle.tile(values),
            memoryview(out.view(np.uint8)),
            "F32",
            out_dtype,
            blocks,
            noise=stream.Noise.of("gaussian", stream.stream_words(5, "x"), 0.0078125),
            first=0,
        )
        own = owner == part
        expected, *tallied = stream.add_noise(values[own], "F32", c[own], np.float32(0.0078125), out_dtype)
        assert out[own].tobytes() == expected.tobytes()
        assert list(counts) == tallied


def test_values_between_the_runs_need_not_be_finite() -> None:
    parts = LAYOUTS["alternate"]
    owner = owner_of(parts)
    values = np.linspace(-1, 1, owner.size, dtype=np.float32)
    values[owner == 1] = np.nan
    out = np.zeros_like(values)
    for part, blocks in tiles.Places(parts).in_tile(0, owner.size):
        if part == 0:
            unchanged, clamped = tiles.add_noise(
                DEVICE,
                oracle.tile(values),
                memoryview(out.view(np.uint8)),
                "F32",
                "F32",
                blocks,
                noise=stream.Noise.of("uniform", stream.stream_words(0, "x"), 0.5),
                first=0,
            )
            assert (unchanged, clamped) == (0, 0)
    c = stream.coefficients("uniform", 0, "x", 0, owner.size)
    own = owner == 0
    assert (out[own] == values[own] + c[own] * np.float32(0.5)).all()
    assert (out[~own] == 0).all()

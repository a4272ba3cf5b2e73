"""safetensors headers: what is refused and what is read, held against the package's own reader."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import CASES, HEADER, Case, crowd, frame

from noisytune_cli import dtypes
from noisytune_cli.checkpoint.formats.safetensors import SafetensorsSource, open_source
from noisytune_cli.checkpoint.formats.safetensors import header as _header
from noisytune_cli.errors import InputInvalid
from noisytune_cli.escape import escape

ROOT = Path(__file__).parents[2]
CHECKPOINTS = Path(os.environ.get("NOISYTUNE_DATA", ROOT / ".." / "shared" / "data")) / "checkpoints"

Specs = list[tuple[str, str, tuple[int, ...], bytes]]


def by_case(cases: tuple[Case, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def opened(path: Path, content: bytes, mmap: bool = False) -> SafetensorsSource:
    path.write_bytes(content)
    return open_source(path, "model.safetensors", mmap)


def contents(source: SafetensorsSource) -> Specs:
    """Name, dtype, shape and bytes of every tensor, by name."""
    return sorted(
        (t.name, t.dtype, t.shape, bytes(source.read(t, 0, memoryview(bytearray(t.nbytes)))))
        for t in source.tensors
    )


def official(content: bytes) -> Specs:
    """The same, as the safetensors package reads it."""
    return sorted(
        (name, info["dtype"], tuple(info["shape"]), bytes(info["data"]))
        for name, info in safetensors.deserialize(content)
    )


@pytest.mark.timeout(60)
@by_case(tuple(case for case in CASES if case.refused))
def test_malformed_files_are_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(InputInvalid) as caught:
        opened(tmp_path / f"bad{case.suffix}", case.build())
    line = str(caught.value)
    assert [word for word in case.words if word not in line] == []
    assert caught.value.tensor == case.tensor
    assert "bad.safetensors" in line
    assert line.isprintable()
    assert len(line) < 1500


@by_case(tuple(case for case in CASES if not case.refused))
@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mmap"])
def test_odd_files_are_read_as_the_package_reads_them(case: Case, mmap: bool, tmp_path: Path) -> None:
    content = case.build()
    source = opened(tmp_path / "odd.safetensors", content, mmap)
    assert contents(source) == official(content)
    source.close()


@by_case(tuple(case for case in CASES if case.refused and case.lax is not None))
def test_the_package_refuses_them_too_unless_marked(case: Case) -> None:
    try:
        safetensors.deserialize(case.build())
    except safetensors.SafetensorError:
        accepted = False
    else:
        accepted = True
    assert accepted == case.lax


@pytest.mark.parametrize("path", sorted(CHECKPOINTS.glob("*/*.safetensors")), ids=lambda p: p.parent.name)
def test_real_checkpoints_are_read_as_the_package_reads_them(path: Path) -> None:
    source = open_source(path, path.name, False)
    assert contents(source) == official(path.read_bytes())
    assert source.tensors
    source.close()


@pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason="needs the real checkpoints (NOISYTUNE_DATA)")
def test_metadata_null_of_a_real_file_means_none() -> None:
    source = open_source(CHECKPOINTS / "mlx-kan" / "model.safetensors", "model.safetensors", False)
    assert source.metadata == {}
    assert b'"__metadata__":null' in source.header
    source.close()


@by_case(tuple(case for case in CASES if case.name.startswith("a name") and not case.refused))
def test_hostile_names_are_escaped_in_error_lines(case: Case, tmp_path: Path) -> None:
    with pytest.raises(InputInvalid) as caught:
        opened(tmp_path / "f", case.build().replace(b"F32", b"F23"))
    (name,) = (tensor[0] for tensor in official(case.build()))
    assert caught.value.tensor == name
    assert f'tensor "{escape(name)}": its dtype is "F23"' in str(caught.value)
    assert str(caught.value).isprintable()


def test_metadata_are_kept_in_order(tmp_path: Path) -> None:
    source = opened(tmp_path / "f", frame('{"__metadata__":{"b":"{é}","a":""},' + HEADER[1:]))
    assert list(source.metadata.items()) == [("b", "{é}"), ("a", "")]


def test_tensors_are_in_the_order_of_their_data_with_absolute_offsets(tmp_path: Path) -> None:
    header = (
        '{"late":{"dtype":"U8","shape":[8],"data_offsets":[8,16]},'
        '"z":{"dtype":"U8","shape":[0],"data_offsets":[8,8]},'
        '"y":{"dtype":"U8","shape":[0],"data_offsets":[8,8]},'
        '"early":{"dtype":"I64","shape":[],"data_offsets":[0,8]}}'
    )
    source = opened(tmp_path / "f", frame(header))
    start = 8 + len(header)
    assert [t.name for t in source.tensors] == ["early", "z", "y", "late"]
    assert [t.offset - start for t in source.tensors] == [0, 8, 8, 8]
    assert {t.file for t in source.tensors} == {"model.safetensors"}


def test_no_tensors_is_warned_of(tmp_path: Path) -> None:
    assert opened(tmp_path / "full", frame(HEADER)).warnings == ()
    assert opened(tmp_path / "empty", frame("{}", b"")).warnings == ("model.safetensors holds no tensors",)


def test_every_dtype_of_the_package_is_known_with_its_size(tmp_path: Path) -> None:
    for dtype, bits in dtypes._BITS.items():
        header = f'{{"a":{{"dtype":"{dtype}","shape":[8],"data_offsets":[0,{bits}]}}}}'
        content = frame(header, bytes(bits))
        assert contents(opened(tmp_path / "f", content)) == official(content)
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(frame(HEADER.replace("F32", "F128")))
    listed = str(caught.value).split("expected one of ")[1].split(" at line")[0]
    assert {name.strip("` ") for name in listed.split(",")} == set(dtypes._BITS)


def test_the_cap_counts_entries_not_braces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_header, "MAX_ENTRIES", 3)
    metadata = '"__metadata__":{"{{{{":"{{\\"{{{\\\\"}'
    entries = [f'"{{{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(3)]
    at_the_cap = frame("{" + ",".join([metadata, *entries[:2]]) + "}", b"")
    assert len(opened(tmp_path / "at", at_the_cap).tensors) == 2
    over_the_cap = frame("{" + ",".join([metadata, *entries]) + "}", b"")
    with pytest.raises(InputInvalid, match="more than 3 entries"):
        opened(tmp_path / "over", over_the_cap)


def test_metadata_count_towards_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_header, "MAX_ENTRIES", 3)
    with pytest.raises(InputInvalid, match="more than 3 entries"):
        opened(tmp_path / "f", frame('{"__metadata__":{"a":"","b":"","c":"","d":""}}', b""))


_REFUSE_IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from noisytune_cli.errors import InputInvalid
from noisytune_cli.checkpoint.formats.safetensors import open_source

resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), -1))
try:
    open_source(Path(sys.argv[1]), "f", False)
except InputInvalid:
    sys.exit(3)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("content", ["crowd", "one long string", "escapes without end", "brackets"])
def test_hostile_headers_are_refused_in_little_memory(content: str, tmp_path: Path) -> None:
    million = 1_000_000
    path = tmp_path / "f"
    path.write_bytes(
        {
            "crowd": lambda: crowd(250_000),
            "one long string": lambda: frame('{"' + "a" * 15 * million + "{" * 300_000),
            "escapes without end": lambda: frame('{"' + '\\"' * 7 * million + "{" * 300_000),
            "brackets": lambda: frame('{"a":{"x":[' + "[]," * 5 * million + "[]]}}"),
        }[content]()
    )
    child = subprocess.run(
        [sys.executable, "-c", _REFUSE_IN_LITTLE_MEMORY, str(path), str(256 << 20)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (child.returncode, child.stderr) == (3, "")


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda name: name != "__metadata__"
)
ARRAYS = st.tuples(
    st.sampled_from(["f8", "f4", "f2", "i8", "i4", "u2", "i1", "u1", "?", "c8"]),
    st.lists(st.integers(0, 3), max_size=4),
).map(lambda drawn: np.zeros(drawn[1], drawn[0]))


@settings(deadline=None)
@given(st.dictionaries(NAMES, ARRAYS, max_size=6), st.dictionaries(st.text(max_size=5), st.text(max_size=9)))
def test_what_the_package_writes_is_read_as_written(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    content = safetensors.numpy.save(arrays, metadata or None)  # see the case "saved with empty metadata"
    source = opened(tmp_path_factory.getbasetemp() / "written.safetensors", content)
    assert contents(source) == official(content)
    assert source.metadata == metadata
    source.close()


@settings(deadline=None)
@given(st.sampled_from([case for case in CASES if not case.refused]), st.data())
def test_damaged_headers_are_refused_or_read_as_the_package_reads_them(
    tmp_path_factory: pytest.TempPathFactory, case: Case, data: st.DataObject
) -> None:
    content = bytearray(case.build())
    length = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(8 + length, len(content)) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    try:
        source = opened(tmp_path_factory.getbasetemp() / "damaged.safetensors", content)
    except InputInvalid:
        return
    assert contents(source) == official(bytes(content))
    source.close()

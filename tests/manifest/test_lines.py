"""The usual lines of a manifest say the same by their form as through the strict reading."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import malformed_manifests
import pytest
from checkpoints import numbers, save, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed_manifests import FIELDS, PARTS

from noisytune_cli.commands.average import average
from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.errors import InputInvalid
from noisytune_cli.manifest import average as averages
from noisytune_cli.manifest import read
from noisytune_cli.manifest import write as manifest
from noisytune_cli.manifest.average import read_any_manifest
from noisytune_cli.manifest.fields import ManifestFault
from noisytune_cli.manifest.lines import Lines
from noisytune_cli.manifest.read import parse
from noisytune_cli.reading import JsonFault, JsonLimits
from noisytune_cli.records import Conversion, NoiseSpec

#: What a line is made of: strings, numbers, words.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.e+-]*|null')

_TEXTS = st.one_of(
    st.sampled_from(
        [
            *(
                b"0",
                b"-0",
                b"1",
                b"-1",
                b"2",
                b"30",
                b"31",
                b"04",
                b"1.0",
                b"0.0",
                b"-0.0",
                b"00.5",
                b".5",
                b"5.",
            ),
            *(
                b"1e999",
                b"1e-400",
                b"1e5",
                b"1E-1",
                b"0.150",
                b"1.5e-1",
                b"0.1",
                b"NaN",
                b"null",
                b"true",
                b"{}",
            ),
            *(b"9223372036854775807", b"9223372036854775808", b"9" * 20, b"9" * 21, b"0." + b"1" * 30, b"[]"),
            *(
                b'""',
                b'"w"',
                b'"\\u0077"',
                b'"half"',
                b'"\\ud800"',
                b'"\\x"',
                b'"a\nb"',
                b'"\x7f"',
                b'"perturb"',
            ),
            *(b'"copy"', b'"constant"', b'"F32"', b'"I64"', b'"excluded"', b'"unrepresentable"', b'"low"'),
            b'"blake3:' + b"0" * 64 + b'"',
        ]
    ),
    st.floats(width=32).map(lambda value: json.dumps(value).encode()),
    st.text(max_size=4).map(lambda value: json.dumps(value).encode()),
)


def both(content: bytes) -> Any:
    """What a manifest says, or why it is refused; the same by lines and without."""
    with patch.object(Lines, "read", lambda *_: None):
        strict = _told(content)
    assert _told(content) == strict
    return strict


def _told(content: bytes) -> Any:
    try:
        return parse(content)
    except (JsonFault, ManifestFault) as fault:
        return fault.why


@pytest.mark.parametrize(("change", "words"), FIELDS, ids=[f"{i}-{w}" for i, (_, w) in enumerate(FIELDS)])
def test_a_field_that_lies(change: Callable[[Any], Any], words: str) -> None:
    document = json.loads(malformed_manifests.written())
    change(document)
    assert words.removesuffix(". Upgrade noisytune") in both(manifest.lay_out(document))


@pytest.mark.parametrize(("change", "words"), PARTS, ids=[f"{i}-{w}" for i, (_, w) in enumerate(PARTS)])
def test_parts_that_lie(change: Callable[[Any], Any], words: str) -> None:
    document = json.loads(malformed_manifests.parted())
    change(document)
    assert words in both(manifest.lay_out(document))


@pytest.mark.parametrize("original", [malformed_manifests.written, malformed_manifests.parted])
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_line_says_the_same_and_comes_back(original: Callable[[], bytes], data: st.DataObject) -> None:
    content = original()
    start = content.index(b'"tensors": [')
    tokens = list(_TOKEN.finditer(content, start, content.index(b'"copied": ')))
    for _ in range(data.draw(st.integers(1, 2))):
        token = data.draw(st.sampled_from(tokens))
        start, end = token.span()
        instead = data.draw(st.one_of(_TEXTS, st.sampled_from(tokens).map(lambda found: found[0])))
        content = content[:start] + instead + content[end:]
        tokens = [found for found in tokens if found.end() <= start]
        if not tokens:
            break
    found = both(content)
    if not isinstance(found, str):
        assert json.loads(manifest.encode(found)) == json.loads(content)
        assert parse(manifest.encode(found)) == found


@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
@pytest.mark.parametrize("conversion", [None, Conversion(dtype="F16")])
def test_what_is_written_is_read_by_its_form(
    distribution: str, conversion: Conversion | None, tmp_path: Path
) -> None:
    tensors = {"é\n𝕎": weights("F32", 4, 6), "b": weights("F64", 5), "constant": numbers("F32", 1, 1)}
    tensors["ids"] = numbers("F32", 3)
    source = str(save(tmp_path / "a.safetensors", tensors))
    noise = NoiseSpec(distribution=distribution, granularity="matrix", splits=(("*𝕎", "1:2,4"),))
    request = Request(source, noise, conversion=conversion)
    content = perturb(request, str(tmp_path / "b.safetensors")).manifest_path.read_bytes()
    with patch("noisytune_cli.manifest.tensors._Reader.read", side_effect=AssertionError):
        found = parse(content)
    assert any(receipt.parts for receipt in found.receipts)
    assert both(content) == found
    assert manifest.encode(found) == content
    with pytest.raises(AttributeError):
        found.receipts[0].digest = ""  # type: ignore[misc]


def test_of_an_average_too(tmp_path: Path) -> None:
    sources = []
    for place in range(3):
        tensors = {"é": weights("F32", 4, 6), "ids": weights("F32", 3), "s": numbers("F32", place)}
        sources.append(str(save(tmp_path / f"{place}.safetensors", tensors)))
    path = average(sources, str(tmp_path / "out.safetensors")).manifest_path
    with patch.object(averages._Reader, "read", side_effect=AssertionError):
        quick = read_any_manifest(path)
    with patch.object(averages._Reader, "read_line", lambda *_: None):
        assert read_any_manifest(path) == quick
    assert quick.is_original
    for token in _TOKEN.finditer(quick.content, quick.content.index(b'"tensors": [')):
        for instead in (b'"copy"', b"0", b'"\\ud800"', b'"blake3:' + b"0" * 64 + b'"', b'"I64"'):
            path.write_bytes(quick.content[: token.start()] + instead + quick.content[token.end() :])
            told = _average_told(path)
            with patch.object(averages._Reader, "read_line", lambda *_: None):
                assert _average_told(path) == told


def _average_told(path: Path) -> Any:
    try:
        return read_any_manifest(path)
    except InputInvalid as error:
        return error.line()


def test_only_so_much_is_read_in_another_form(monkeypatch: pytest.MonkeyPatch) -> None:
    content = malformed_manifests.written()
    monkeypatch.setattr(read, "LIMITS", JsonLimits(pieces=len(content)))
    parse(content)
    with pytest.raises(JsonFault, match="laid out in another way than noisytune's"):
        parse(json.dumps(json.loads(content), indent=2).encode())

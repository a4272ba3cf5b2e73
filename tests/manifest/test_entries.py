"""A manifest says the same all at once and as it is fetched, and any other line something else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import malformed_manifests
import pytest
from checkpoints import numbers, save, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed_manifests import FIELDS, PARTS

from noisytune_cli.commands.average import average
from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.errors import InputInvalid
from noisytune_cli.manifest import write as manifest
from noisytune_cli.manifest.average import RecordedAverage, read_any_manifest
from noisytune_cli.manifest.fields import ManifestFault
from noisytune_cli.manifest.read import parse
from noisytune_cli.noise.amplitudes import amplitudes
from noisytune_cli.reading import Document, JsonFault, JsonLimits
from noisytune_cli.records import Conversion, NoiseSpec, Term, mixed_strength

MIX = (Term(1, 0.01), Term(2, 0.02, -0.5))

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
    """What a manifest says, or why it is refused; the same all at once and as it is fetched."""
    whole = _told(content)
    pieces = (content[at : at + 100] for at in range(0, len(content), 100))
    assert _told(lambda: next(pieces, b"")) == whole
    return whole


def _told(content: bytes | Callable[[], bytes]) -> Any:
    try:
        return parse(content)
    except (JsonFault, ManifestFault) as fault:
        return fault.why


@pytest.mark.parametrize(("change", "words"), FIELDS, ids=[f"{i}-{w}" for i, (_, w) in enumerate(FIELDS)])
def test_a_field_that_lies(change: Callable[[Any], Any], words: str) -> None:
    document = json.loads(malformed_manifests.written())
    change(document)
    assert words.removesuffix(". Upgrade noisytune") in both(b"".join(manifest.lay_out(document.items())))


@pytest.mark.parametrize("version", ["0.1.1", "1.0", "99.0.0rc1"])
def test_what_a_newer_version_wrote_is_not_called_damaged(version: str) -> None:
    document = json.loads(malformed_manifests.written())
    document["tool"]["version"] = version
    content = b"".join(manifest.lay_out(document.items()))
    assert parse(content).tool_version == version  # what this one can read, it reads
    document["noise"]["colour"] = "pink"
    with pytest.raises(ManifestFault) as found:
        parse(b"".join(manifest.lay_out(document.items())))
    assert found.value.why.endswith(f"noisytune {version} wrote it, so it was written by a newer noisytune")
    assert found.value.next_step == "Upgrade noisytune"


@pytest.mark.parametrize(("change", "words"), PARTS, ids=[f"{i}-{w}" for i, (_, w) in enumerate(PARTS)])
def test_parts_that_lie(change: Callable[[Any], Any], words: str) -> None:
    document = json.loads(malformed_manifests.parted())
    change(document)
    assert words in both(b"".join(manifest.lay_out(document.items())))


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


#: Noise of every kind, whose manifests differ in what their entries have.
NOISE = [
    NoiseSpec(granularity="matrix", splits=(("*\U0001d54e", "1:2,4"),)),
    NoiseSpec(distribution="gaussian"),
    NoiseSpec(lam=-0.15, rules=(("b", 0.5),)),
    NoiseSpec(scope="global", kept=0.5),
    NoiseSpec(scope="absolute", lam=0.01, distribution="gaussian"),
    NoiseSpec(lam=mixed_strength(MIX), mix=MIX),
]


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("conversion", [None, Conversion(dtype="F16")])
def test_what_is_written_is_read(noise: NoiseSpec, conversion: Conversion | None, tmp_path: Path) -> None:
    tensors = {
        "é\n\U0001d54e": weights("F32", 4, 6),
        "b": weights("F64", 5),
        "constant": numbers("F32", 1, 1),
    }
    tensors["ids"] = numbers("F32", 3)
    source = str(save(tmp_path / "a.safetensors", tensors))
    request = Request(source, noise, conversion=conversion)
    path = perturb(request, str(tmp_path / "b.safetensors")).manifest_path
    content = path.read_bytes()
    found = both(content)
    assert manifest.encode(found) == content
    assert any(receipt.parts for receipt in found.receipts) == (noise.granularity == "matrix")
    recorded = read_any_manifest(path)
    assert recorded.is_original
    assert recorded.manifest == found
    with pytest.raises(AttributeError):
        found.receipts[0].digest = ""


def test_of_an_average_too(tmp_path: Path) -> None:
    sources = []
    for place in range(3):
        tensors = {"é": weights("F32", 4, 6), "ids": weights("F32", 3), "s": numbers("F32", place)}
        sources.append(str(save(tmp_path / f"{place}.safetensors", tensors)))
    path = average(sources, str(tmp_path / "out.safetensors")).manifest_path
    found = read_any_manifest(path)
    assert isinstance(found, RecordedAverage)
    assert found.is_original
    content = path.read_bytes()
    assert b"".join(found.pieces()) == content
    for token in _TOKEN.finditer(content, content.index(b'"tensors": [')):
        for instead in (b'"copy"', b"0", b'"\\ud800"', b'"blake3:' + b"0" * 64 + b'"', b'"I64"'):
            if instead != token[0]:
                path.write_bytes(content[: token.start()] + instead + content[token.end() :])
                try:
                    again = read_any_manifest(path)
                except InputInvalid:
                    continue
                assert isinstance(again, RecordedAverage)
                assert again.average != found.average


@pytest.mark.parametrize("before", range(4000, 4080, 7))
def test_a_piece_may_be_as_long_wherever_it_begins(before: int) -> None:
    for length, fits in ((4090, True), (4100, False)):
        text = json.dumps({"a": "x" * before, "b": "y" * length}).encode()
        pieces = (text[at : at + 64] for at in range(0, len(text), 64))
        document = Document(b"", JsonLimits(piece=4096), more=lambda pieces=pieces: next(pieces, b""))  # type: ignore[misc]
        document.member("a")
        document.value()
        document.member("b")
        if fits:
            assert document.value() == "y" * length
            document.end()
        else:
            with pytest.raises(JsonFault, match=r"a value of more than 4,096|Unterminated string"):
                document.value()


def test_values_are_in_proportion_to_the_text() -> None:
    content = malformed_manifests.written()
    assert both(content)
    document = json.loads(content)
    for tensor in document["tensors"][:2]:
        tensor["shape"] += [1] * 900_000
    compact = json.dumps(document, separators=(",", ":")).encode()
    assert "far too many values for its length" in both(compact)
    spaces = content.replace(b'": ', b'":' + b" " * 5000)  # megabytes in another layout
    assert both(spaces) == both(content)


def test_a_long_manifest_takes_the_memory_of_its_records(tmp_path: Path) -> None:
    """Written, read and compared in 60 MB beside what Python and NumPy take: it has 30."""
    code = f"""
import resource
from pathlib import Path
from dataclasses import replace
from noisytune_cli.manifest import read, write
from noisytune_cli.records import Receipt

path = Path({str(tmp_path / "noisytune.json")!r})
path.write_bytes({malformed_manifests.written()!r})
few = read.read_manifest(path).manifest
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
first = few.receipts[0]

def named(number):
    step = first.step
    name = "model.layers.12.mlp.experts.%06d.down_proj.weight" % number
    return replace(first, step=replace(step, stream=name, tensor=replace(step.tensor, name=name)))

many = replace(few, receipts=tuple(map(named, range(50_000))))
with open(path, "wb") as file:
    file.writelines(write.pieces(many))
del many
recorded = read.read_manifest(path)
assert recorded.is_original and len(recorded.manifest.receipts) == 50_000
print(path.stat().st_size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size, grown = map(int, ran.stdout.split())
    assert size > 25 << 20
    assert grown < 100 << 20


def test_a_long_manifest_of_any_noise_is_read() -> None:
    few = parse(malformed_manifests.written())
    noise = NoiseSpec(scope="absolute", lam=0.01, distribution="gaussian")
    (amplitude,) = amplitudes(noise, noise.lam, None)
    first = replace(few.receipts[0], lam=0.01, std=None, amplitude=amplitude, low=None, high=None)
    first = replace(first, noise_std=amplitude)
    receipts = tuple(
        replace(first, step=replace(first.step, tensor=replace(first.step.tensor, name=f"w{number}")))
        for number in range(20_000)
    )
    content = manifest.encode(replace(few, noise=noise, receipts=receipts))
    assert len(content) > 8 << 20
    assert len(parse(content).receipts) == 20_000

"""The manifest reader: what noisytune writes comes back as it was, and nothing else gets in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import malformed_manifests
import pytest
from checkpoints import save
from malformed_manifests import FIELDS, PARTS, TENSORS, TEXT

from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.errors import InputInvalid, InputUnreadable, Mismatch
from noisytune_cli.manifest import read as manifest_reader
from noisytune_cli.manifest import tensors as manifest_tensors
from noisytune_cli.manifest.read import parse, read_manifest
from noisytune_cli.manifest.write import encode
from noisytune_cli.records import NoiseSpec


@pytest.fixture
def written() -> bytes:
    """The manifest of a folder with two shards and some other files."""
    return malformed_manifests.written()


@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_what_is_written_comes_back(distribution: str, scope: Any, tmp_path: Path) -> None:
    noise = NoiseSpec(distribution=distribution, scope=scope, exclude=("big",) if scope == "global" else ())
    result = perturb(Request(str(save(tmp_path / "in", TENSORS)), noise), str(tmp_path / "out"))
    recorded = read_manifest(result.manifest_path)
    assert recorded.is_original
    recorded.require_original()
    assert recorded.manifest.noise == result.manifest.noise
    assert recorded.manifest.source == result.manifest.source
    assert encode(recorded.manifest) == encode(result.manifest)


def test_a_whole_folder_comes_back(written: bytes) -> None:
    manifest = parse(written)
    assert encode(manifest) == written
    assert [name for name, _ in manifest.copied] == ["model.safetensors.index.json", "sub/config.json"]
    assert {r.reason for r in manifest.receipts} == {
        *(None, "constant", "non-finite", "one-element", "empty"),
        *("not-float", "excluded", "unrepresentable"),
    }


def test_reformatted_is_read_but_not_original(written: bytes, tmp_path: Path) -> None:
    path = tmp_path / "noisytune.json"
    path.write_bytes(json.dumps(json.loads(written), indent=3).encode())
    recorded = read_manifest(path)
    assert encode(recorded.manifest) == written
    assert not recorded.is_original
    with pytest.raises(Mismatch, match="spelt in another way"):
        recorded.require_original()


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(InputUnreadable):
        read_manifest(tmp_path / "noisytune.json")


def test_too_large(written: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_reader, "MAX_BYTES", len(written) - 1)
    (tmp_path / "m").write_bytes(written)
    with pytest.raises(InputInvalid, match="larger than"):
        read_manifest(tmp_path / "m")


@pytest.mark.parametrize(("change", "words"), FIELDS, ids=[f"{i}-{w}" for i, (_, w) in enumerate(FIELDS)])
def test_a_field_that_lies(change: Callable[[Any], Any], words: str, written: bytes, tmp_path: Path) -> None:
    document = json.loads(written)
    change(document)
    refused(json.dumps(document).encode(), words, tmp_path)


@pytest.mark.parametrize(("change", "words"), PARTS, ids=[f"{i}-{w}" for i, (_, w) in enumerate(PARTS)])
def test_parts_that_lie(change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    document = json.loads(malformed_manifests.parted())
    change(document)
    refused(json.dumps(document).encode(), words, tmp_path)


def test_parts_come_back() -> None:
    manifest = parse(malformed_manifests.parted())
    assert encode(manifest) == malformed_manifests.parted()
    assert [[done.reason for done in receipt.parts] for receipt in manifest.receipts] == [
        [None, None],
        [None, "one-element", "constant", "one-element"],
        ["constant", "constant"],
        [],
    ]


def test_too_many_parts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_tensors, "MAX_LINES", 5)
    refused(malformed_manifests.parted(), "it has more than 5 tensors and parts", tmp_path)


@pytest.mark.parametrize(("change", "words"), TEXT, ids=[f"{i}-{w}" for i, (_, w) in enumerate(TEXT)])
def test_a_text_that_is_no_manifest(
    change: Callable[[bytes], bytes], words: str, written: bytes, tmp_path: Path
) -> None:
    refused(change(written), words, tmp_path)


def test_a_long_list_is_refused(written: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_reader, "MAX_LINES", 5)
    refused(written, "more than 5 entries", tmp_path)


def many_dimensions(document: Any) -> None:
    tensor = next(tensor for tensor in document["tensors"] if tensor["name"] == "columns")
    tensor["shape"] += [1] * 300_000
    part = tensor["parts"][0]
    tensor["parts"] = [part | {"name": str(place)} for place in range(3000)]


@pytest.mark.alone
@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"schema": "twice"}, 'the key "0" twice'),
        (many_dimensions, "do not lie one after the other"),
        (
            lambda document: document.update(
                copied=[{"name": "a/" * 2000 + str(n), "digest": "blake3:" + "0" * 64} for n in range(1900)],
                totals={},
            ),
            "totals.tensors is missing",
        ),
    ],
    ids=[
        "a key given again after 190,000 others",
        "parts of a shape of 300,000 dimensions",
        "folders 2,000 deep",
    ],
)
def test_refused_in_time_proportional_to_its_length(document: Any, words: str, tmp_path: Path) -> None:
    if callable(document):
        change, document = document, json.loads(malformed_manifests.parted())
        change(document)
        content = json.dumps(document).encode()
    else:
        content = b'{"schema": {' + b"".join(b'"%d":1,' % n for n in range(190_000)) + b'"0":1}}'
    started = time.process_time()
    refused(content, words, tmp_path)
    assert time.process_time() - started < 2


def refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "noisytune.json"
    path.write_bytes(content)
    with pytest.raises(InputInvalid) as caught:
        read_manifest(path)
    line = caught.value.line()
    assert words in line
    assert line.isprintable()

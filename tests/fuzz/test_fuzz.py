"""Fuzzing of the readers: a few seconds in every run, for FUZZ_SECONDS where that is set (`make fuzz`).

An input that breaks a property is written to FUZZ_FAILURES (the folder `fuzz-failures`), made as small as
hypothesis can, and the test fails; `FUZZ_REPLAY=FILE pytest tests/fuzz -k TARGET` runs one again.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed import DATA, HEADER
from malformed_indexes import INTACT
from malformed_manifests import parted, written
from pickles import Writer, archive, legacy, one

from fuzz import mutations, properties

_SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
_FAILURES = Path(os.environ.get("FUZZ_FAILURES", "fuzz-failures"))
_REPLAY = os.environ.get("FUZZ_REPLAY")

#: Examples of one batch: what an ordinary run tries.
_EXAMPLES = 100

_TENSORS = json.loads(HEADER) | {
    "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [16, 24]},
    "": {"dtype": "U8", "shape": [0], "data_offsets": [24, 24]},
    "__metadata__": {"format": "pt", "é": ""},
}
_CONFIG = {
    "model_type": "gpt2",
    "tie_word_embeddings": True,
    "text_config": {"model_type": "x", "quantization_config": {"quant_method": "gptq", "bits": 4}},
    "quantization": {"bits": 4, "group_size": 64},
    "auto_map": {"AutoModel": "modeling.Model"},
}
_MOVES = {
    "manifest": "noisytune.json",
    "names": ["precious", "sub"],
    "moved": [
        {"name": "precious", "inode": 12, "size": 15, "mtime": 0, "ctime": 0},
        {"name": "sub/er", "inode": 13, "size": 2**40, "mtime": 1, "ctime": 1},
    ],
}
_STATE = Writer().state_dict(a=Writer().tensor((1, 2), (1, 1)), b=Writer().tensor((2,), (1,), 2)).end()


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A safetensors file; its length mostly that of its header, whatever became of that."""
    text = draw(mutations.json_texts(_TENSORS))
    length = len(text) + draw(st.sampled_from([0] * 20 + [-1, 1, 8, 2**40]))
    data = DATA + bytes(8)
    data = data[: len(data) + draw(st.sampled_from([0] * 9 + [-1]))]
    return struct.pack("<Q", max(0, length)) + text + data


@st.composite
def torch_files(draw: st.DrawFn) -> bytes:
    """A PyTorch checkpoint, as ZIP or legacy, its pickle mutated and sometimes the bytes around it."""
    content = draw(mutations.pickles(draw(st.sampled_from([_STATE, one()]))))
    whole = draw(st.sampled_from([archive, legacy]))(content)
    return draw(mutations.stretched(whole)) if draw(st.integers(0, 2)) == 2 else whole


#: What is fuzzed: the property and the inputs.
TARGETS: dict[str, tuple[properties.Property, Callable[[], st.SearchStrategy[bytes]]]] = {
    "header": (properties.header, headers),
    "index": (
        properties.index,
        lambda: mutations.json_texts(json.loads(INTACT) | {"metadata": {"total_size": 48}}),
    ),
    "config": (properties.config, lambda: mutations.json_texts(_CONFIG)),
    "pickle": (properties.pickle, torch_files),
    "manifest": (properties.manifest, lambda: mutations.json_texts(json.loads(written()))),
    "moves": (properties.moves, lambda: mutations.json_texts(_MOVES)),
    "parts": (properties.manifest, lambda: mutations.json_texts(json.loads(parted()))),
}


@pytest.mark.alone
@pytest.mark.timeout(_SECONDS + 300)
@pytest.mark.parametrize("target", TARGETS)
def test_any_bytes_are_refused_or_read(target: str, tmp_path: Path) -> None:
    check, inputs = TARGETS[target]
    if _REPLAY is not None:
        properties.holds(check, Path(_REPLAY).read_bytes(), tmp_path)
        return
    accepted = tried = 0

    @settings(
        max_examples=_EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(inputs())
    def batch(content: bytes) -> None:
        nonlocal accepted, tried
        tried += 1
        try:
            accepted += properties.holds(check, content, tmp_path)
        except Exception as error:
            _FAILURES.mkdir(parents=True, exist_ok=True)
            failed = _FAILURES / f"{target}-{type(error).__name__}"
            failed.write_bytes(content)
            error.add_note(f"the input is in {failed}")
            raise

    end = time.monotonic() + _SECONDS / len(TARGETS)
    batch()
    while time.monotonic() < end:
        batch()
    print(f"{target}: {tried:,} inputs, {accepted:,} accepted")
    # A config that is none is another program's, and no reason to refuse the weights.
    assert 0 < accepted <= tried if target == "config" else 0 < accepted < tried

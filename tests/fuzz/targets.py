"""What is fuzzed: each reader's property, and valid documents with a few things wrong for it."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable
from typing import NamedTuple

from hypothesis import strategies as st
from malformed import DATA, HEADER
from malformed_indexes import INTACT
from malformed_manifests import parted, written
from pickles import Writer, archive, legacy, one

from fuzz import jobs, mutations, properties, quick
from noisytune_cli.plan.patterns import KINDS

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


_MIX = (
    {"seed": 17, "sigma": 0.001, "coefficient": 0.02},
    {"seed": "18446744073709551615", "sigma": -1e-3},
    {"seed": 0, "sigma": 0.5, "coefficient": -1},
)
_NAMES = ("a.weight", "layers.0.attn.q_proj.bias", "h.3.ln_1.weight", "x[0]", "", "\u202e", "é.bias")


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


@st.composite
def mixes(draw: st.DrawFn) -> bytes:
    """The lines of a mixture's file, one of them mutated."""
    lines = [json.dumps(line).encode() for line in _MIX]
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = draw(mutations.json_texts(_MIX[at]))
    return draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n"])).join(lines)


@st.composite
def patterns(draw: st.DrawFn) -> bytes:
    """A shell pattern or a kind, and names below it, one a line."""
    pieces = st.sampled_from(
        [*"*?[]!-.@^\\", "**", "[!a]", "[a-z]", "[]]", "[z-a]", *KINDS, "weight", "bias"]
    )
    text = "".join(draw(st.lists(st.one_of(pieces, st.text(max_size=3)), max_size=6)))
    names = draw(st.lists(st.one_of(st.sampled_from(_NAMES), st.text(max_size=9)), max_size=4))
    return "\n".join([text, *names]).encode("utf-8", "replace")


class Target(NamedTuple):
    """A property, the inputs that it is tried with, and what holds it to its time and memory."""

    check: properties.Property
    inputs: Callable[[], st.SearchStrategy[bytes]]
    bounds: properties.Bounds = properties.bounded


def _indexes() -> st.SearchStrategy[bytes]:
    return mutations.json_texts(json.loads(INTACT) | {"metadata": {"total_size": 48}})


def _manifests() -> st.SearchStrategy[bytes]:
    return mutations.json_texts(json.loads(written()))


def _metadata() -> st.SearchStrategy[bytes]:
    return mutations.pickles(properties.chunked_files()[".metadata"])


def _of_job(name: str) -> Callable[[], st.SearchStrategy[bytes]]:
    return lambda: mutations.json_texts(json.loads(jobs.made().files[name]))


_JOBS = (("plan", jobs.plan), ("steps", jobs.steps), ("sums", jobs.sums), ("receipt", jobs.receipt))

#: Readers of files, from opening to the last byte.
WHOLE = {
    "header": Target(properties.header, headers),
    "index": Target(properties.index, _indexes),
    "config": Target(properties.config, lambda: mutations.json_texts(_CONFIG)),
    "pickle": Target(properties.pickle, torch_files),
    "metadata": Target(properties.metadata, _metadata),
    "chunks": Target(
        properties.chunks, lambda: mutations.stretched(properties.chunked_files()[properties.CHUNKS])
    ),
    "manifest": Target(properties.manifest, _manifests),
    "parts": Target(properties.manifest, lambda: mutations.json_texts(json.loads(parted()))),
    "moves": Target(properties.moves, lambda: mutations.json_texts(_MOVES)),
    **{name: Target(check, _of_job(name)) for name, check in _JOBS},
}

#: The same readers, and those of small texts, without opening anything.
QUICK = {
    f"quick-{name}": Target(check, inputs, quick.bounded)
    for name, check, inputs in (
        ("header", quick.header, headers),
        ("index", quick.index, _indexes),
        ("config", quick.config, lambda: mutations.json_texts(_CONFIG)),
        ("json", quick.document, lambda: mutations.json_texts(_TENSORS)),
        ("zip", quick.records, torch_files),
        ("pickle", quick.archive, torch_files),
        ("metadata", quick.metadata, _metadata),
        ("manifest", quick.manifest, _manifests),
        ("mix", quick.mix, mixes),
        ("patterns", quick.patterns, patterns),
        *((name, functools.partial(check, place=quick.given), _of_job(name)) for name, check in _JOBS),
    )
}

TARGETS = WHOLE | QUICK

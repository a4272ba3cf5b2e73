"""Ties: two or more names in a checkpoint for one parameter, which must get one noise.

An alias in safetensors' `__metadata__` says so itself, and so do names that a pickle stores once. Otherwise
names are candidates if a model or the checkpoint declares them to be one, or architectures are known to tie
them, and dtype and shape agree; whether their bytes agree the values have to tell (`split_tie`). Equal bytes
of names that nobody ties mean nothing. What is known here are all pairs that transformers declares
(`_tied_weights_keys`), for files without a config.

`tie_word_embeddings: false` in the config parts the output layer from the input embedding, and nothing
else: an encoder's and a decoder's table under `shared` are one module in T5 and BART whatever it says
(T5 1.1 says false), and so are the two names of a prediction head's bias.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from noisytune_cli.checkpoint.composition import models_of
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.plan.patterns import compile_pattern
from noisytune_cli.records import FROZEN_COPIES, TensorSpec, Tie

#: Input embeddings, by the end of their names (transformers' `_tied_weights_keys`, the right-hand sides).
_EMBEDDINGS = (
    "embed_tokens.weight",
    "word_embeddings.weight",
    "shared.weight",
    "wte.weight",
    "tok_embeddings.weight",
    "tokens_embed.weight",
    "word_embedding.weight",
    "embed_in.weight",
    "embeddings.weight",
    "embedding.weight",
    "emb.weight",
    ".w.weight",
)

#: Output layers that are tied to them, by the end of their names (the left-hand sides).
_HEADS = (
    "lm_head.weight",
    "lm_head.decoder.weight",
    "lm_head.out_proj.weight",
    "predictions.decoder.weight",
    "cls.predictions.decoder.weight",
    "generator_lm_head.weight",
    "vocab_projector.weight",
    "proj_out.weight",
    "output_projection.weight",
    "embed_out.weight",
    "pred_layer.proj.weight",
    "lm_loss.weight",
    "mlm_score.decoder.weight",
    "mlm_head.decoder.weight",
    "head.decoder.weight",
    "head.weight",
    "decoder.weight",
    "output.weight",
    "text_decoder_postnet.lm_head.weight",
    "entity_predictions.decoder.weight",
)

#: How far above its embedding's module a head may sit: `model.language_model.embed_tokens`, `lm_head`.
_LEVELS = 3

#: One table for both sides of an encoder-decoder; any two of them are a pair, as `shared` may be left out.
_SHARED = "shared.weight"
_SIDES = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "text_encoder.embed_tokens.weight",
    "text_decoder.embed_tokens.weight",
    "encoder.word_embeddings.weight",
    "decoder.word_embeddings.weight",
)

#: A prediction head's bias, which is also that of its output layer: `X.bias` and `X.decoder.bias`.
_BIAS_ENDS = tuple(f"{head}.decoder.bias" for head in ("predictions", "head", "mlm_score"))

#: Other modules that stand under several names, and the one name that each is known by here: heads that all
#: layers of a detector share, a decoder's layers under an encoder's name, an encoder inside another model.
_ONE_MODULE = (
    (r"(?:model\.)?decoder\.(class|bbox)_embed", r"\1_embed"),
    (r"(?:model\.)?enc_score_head", "class_embed"),
    (r"(?:model\.)?enc_bbox_head|bbox_predictor", "bbox_embed"),
    (r"(class|bbox)_embed\.\d+", r"\1_embed.#"),
    (r"encoder\.language_model", "decoder"),
    (r"encoder\.text_model\.embed_tokens", "decoder.embed_tokens"),
    (r"(?:audio|video)_model\.text_model", "text_model"),
    (r"audio_video_encoder\.embedder\.(audio|video)_encoder", r"\1_model.\1_encoder"),
    (r"layers\.\d+\.shared_transf(?:ormer)?", "layers.#.shared_transf"),
    (r"encoder\.embed_patches\.proj", "patch_embed.proj"),
    (
        r"(?:en|de)coder\.relative_bias\.biases\.0\.relative_attention_bias",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    ),
    (r"prompt_encoder\.shared_embedding", "shared_image_embedding"),
    (r"backbone_model\.embed_tokens\.embed_audio_tokens", "depth_decoder.model.embed_tokens"),
    (r"ctc_head", "encoder.out"),
    (r"codec_head", "model.codec_embedding"),
    (r"lm_head\.additional_fc", "model.embed_tokens.additional_embedding"),
    (r"unembedding_projection", "model.embed_tokens.embedding_projection"),
)
#: What one of these has in its name, looked for before a pattern is.
_SEVERAL_NAMES = (
    *("class_embed", "bbox_", "score_head", "encoder.language_model", "text_model", "audio_encoder"),
    *("video_encoder", "shared_transf", "embed_patches", "relative_bias", "shared_embedding"),
    *("embed_audio_tokens", "ctc_head", "codec_head", "additional_fc", "unembedding_projection"),
)


_INPUT_SIDE = compile_pattern("@embeddings")

Evidence = Literal["alias", "storage", "equal-bytes"]


def find_ties(
    tensors: Sequence[TensorSpec],
    *,
    config: Mapping[str, Any] | None = None,
    configs: Mapping[str, Mapping[str, Any] | None] | None = None,
    metadata: Mapping[str, str] | None = None,
    stored_as_one: Iterable[Sequence[str]] = (),
    declared: Iterable[tuple[str, str]] = (),
) -> tuple[Tie, ...]:
    """Return the ties and candidates for one among `tensors`, in file order, none sharing a name.

    Of a composition each model is judged alone, by its own of `configs` (see `models_of`).
    `declared` are pairs that a model or the checkpoint declares. An alias may be of a name that is not
    stored: the parameter has that name too, and may get its noise. `stored_as_one` are groups of names that
    share a slot in the file. A chain of pairs is one tie. Its evidence is `equal-bytes` if a known pair is
    needed to join it, else `storage` or, of a mixture, `alias`.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    links: list[tuple[str, str, Evidence]] = [
        (group[0], name, "storage") for group in stored_as_one for name in group[1:]
    ]
    links += [(a, b, "alias") for a, b in (metadata or {}).items()]
    dropped_of = _dropped(by_name, metadata or {})
    links += [(a, b, "equal-bytes") for a, b in declared]
    for model in models_of(tensors, config, configs):
        names = {tensor.name: None for tensor in model.tensors}
        known = (*_known_pairs(names, heads=not _parted(model.config)), *_one_module(names))
        links += [(model.prefix + a, model.prefix + b, "equal-bytes") for a, b in known]
    group_of: dict[str, list[str]] = {}
    unsure: set[str] = set()
    aliased = set(dropped_of)
    for name in dropped_of:
        group_of[name] = [name]
    for a, b, evidence in links:
        if a == b or a not in by_name or b not in by_name or not _alike(by_name[a], by_name[b]):
            continue
        left, right = group_of.setdefault(a, [a]), group_of.setdefault(b, [b])
        if left is right:
            continue
        if evidence == "equal-bytes":
            unsure |= {a, b}
        elif evidence == "alias":
            aliased |= {a, b}
        small, large = sorted((left, right), key=len)
        large += small
        for name in small:
            group_of[name] = large
    place = {name: index for index, name in enumerate(by_name)}
    groups = {id(group): group for group in group_of.values()}.values()
    in_order = sorted((sorted(group, key=place.__getitem__) for group in groups), key=lambda g: place[g[0]])

    def evidence_for(names: Sequence[str]) -> Evidence:
        if not unsure.isdisjoint(names):
            return "equal-bytes"
        return "storage" if aliased.isdisjoint(names) else "alias"

    dropped = [tuple((d, name) for name in names for d in dropped_of.get(name, ())) for names in in_order]
    return tuple(_tie(n, evidence_for(n), d) for n, d in zip(in_order, dropped, strict=True))


def _dropped(stored: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> dict[str, list[str]]:
    """Return by stored name the names that the metadata says were stored as it.

    Metadata may say anything of a tensor, so a key is a name only where it ends like the tensor's.
    """
    dropped: dict[str, list[str]] = {}
    for name, kept in metadata.items():
        if name not in stored and kept in stored and stored[kept].dtype in FLOAT_DTYPES:
            end = kept.rpartition(".")[2]
            if name.endswith(f".{end}") and name != f".{end}":
                dropped.setdefault(kept, []).append(name)
    return dropped


def split_tie(tie: Tie, contents: Mapping[str, object]) -> tuple[Tie, ...]:
    """Return the ties that remain of a candidate once the bytes are known.

    `contents` gives for each name something equal exactly where the stored bytes are, such as a digest.
    A tie that the file or a storage vouches for stays as it is.
    """
    if tie.evidence != "equal-bytes":
        return (tie,)
    same: dict[object, list[str]] = {}
    for name in tie.names:
        same.setdefault(contents[name], []).append(name)
    ties = []
    for names in same.values():
        stored = set(names)
        dropped = tuple(pair for pair in tie.dropped if pair[1] in stored)
        if len(names) > 1 or dropped:
            ties.append(_tie(names, tie.evidence if len(names) > 1 else "alias", dropped))
    return tuple(ties)


def stream_of(names: Iterable[str]) -> str:
    """Return the name whose noise all names of one parameter get.

    It is the input embedding's (`shared` before the tables of an encoder or decoder), else the byte-wise
    smallest; byte-wise, because the order must not depend on a locale or a header's order. The
    name of DeepSpeed's copy is the last to be taken.
    """

    def rank(name: str) -> tuple[bool, bool, bool, bytes]:
        is_shared = name == _SHARED or name.endswith((f".{_SHARED}", f"/{_SHARED}"))
        order = name.encode("utf-8", "surrogatepass")
        return name.startswith(f"{FROZEN_COPIES}."), not _INPUT_SIDE.matches(name), not is_shared, order

    return min(names, key=rank)


def _tie(names: Sequence[str], evidence: Evidence, dropped: tuple[tuple[str, str], ...]) -> Tie:
    return Tie(stream_of((*names, *(name for name, _ in dropped))), tuple(names), evidence, dropped)


def _alike(a: TensorSpec, b: TensorSpec) -> bool:
    """Tell whether two names can be one parameter that gets noise."""
    return a.dtype == b.dtype and a.shape == b.shape and a.dtype in FLOAT_DTYPES


def _parted(config: Mapping[str, Any] | None) -> bool:
    """Tell whether the config says, at the top or for the text model, that the output layer is not tied.

    Where the two disagree it says nothing: releases of transformers read one or the other, and noise that
    equal tensors share breaks neither.
    """
    config = config or {}
    text = config.get("text_config")
    said = [config.get("tie_word_embeddings")]
    if isinstance(text, Mapping):
        said.append(text.get("tie_word_embeddings"))
    return False in said and True not in said


def _known_pairs(names: Mapping[str, object], *, heads: bool) -> Iterator[tuple[str, str]]:
    """Yield the pairs among `names` that architectures tie, whatever wrapper's prefix they share."""
    for name in names:
        if name.endswith(_EMBEDDINGS):
            yield from _table_pairs(name, names)
            if heads:
                yield from _head_pairs(name, names)
        elif name.endswith(_BIAS_ENDS):
            yield name, name.removesuffix("decoder.bias") + "bias"


def _head_pairs(embedding: str, names: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield `embedding` with each output layer that stands beside it or up to `_LEVELS` modules above."""
    modules = embedding.split(".")[:-2]
    for level in range(min(_LEVELS, len(modules)) + 1):
        prefix = "".join(f"{module}." for module in modules[: len(modules) - level])
        for head in _HEADS:
            if prefix + head in names:
                yield prefix + head, embedding


def _table_pairs(embedding: str, names: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield `embedding` with the other tables that it is one module with."""
    for end in (_SHARED, "word_embeddings.weight", *_SIDES):
        prefix = embedding.removesuffix(end)
        if prefix == embedding or (prefix and not prefix.endswith(".")):
            continue
        for other in _SIDES:
            if other != end and prefix + other in names:
                yield prefix + other, embedding


def _one_module(names: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of names under which one module is known to stand."""
    first: dict[str, str] = {}
    for name in names:
        if any(piece in name for piece in _SEVERAL_NAMES):
            known = name
            for pattern, one in _ONE_MODULE:
                known = re.sub(rf"(?<![^.]){pattern}(?![^.])", one, known, count=1)
            other = first.setdefault(known, known if known in names else name)
            if other != name:
                yield other, name

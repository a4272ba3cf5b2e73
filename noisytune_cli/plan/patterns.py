"""Patterns that choose tensors by name: shell patterns, and kinds such as `@norm`.

A shell pattern has the semantics of `fnmatch.fnmatchcase` on the whole tensor name: case-sensitive, and
`*` crosses dots. A kind is a set of parameters that the common architectures name in different ways. It is
told by name alone, but for norms, of which shapes tell too; kinds may overlap (`attn.q_proj.bias` is in
`@attention` and `@bias`), and a buffer is in none. What begins with `@` is a kind; for a tensor whose name
does so, write `[@]`.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from noisytune_cli.errors import UsageError

# A name may have millions of characters, and each of these takes time in proportion: a component is looked
# through once (`(?=\w*x)\w*+`, where `\w*x\w*` would begin again at each x), and `.` is a line break too.

#: A component that is a normalisation layer: LayerNorm, input_layernorm, q_norm, norm1, ln_f, bn2, conv1_BN.
_NORM_LAYER = r"(?:(?=\w*(?i:norm)(?!al))\w*+|ln\w*+|\w*(?i:bn)\d*+)"

#: What may stand before a component: other components, and the folder of a model among several (FOLDER/KEY).
_BEFORE = r"(?:.*[./])?"

#: What may hang below one; frameworks that name tensors by paths join these with slashes.
_BELOW = r"(?:[./].*)?"

#: Wrappers that stand before a model's own names.
_WRAPPERS = (
    r"(?:(?:module|_orig_mod|base_model|model|_(?:fsdp|checkpoint)_wrapped_module|_forward_module)\.)*"
)

#: Token, position and token-type tables; no patch projections and no class or mask tokens.
_EMBEDDINGS = rf"""
    {_BEFORE}
    (?: # token, position and token-type tables by their own name, whatever hangs below (adapters included)
        (?: (?:word|token|tok|char|pos|position|positional|token_type|type|segment|entity|rel|user|item)
            _emb(?:eddings?)?
          | embedding_bags | embedding_dict | (?=\w*embed_tokens)\w*+ | embed_positions | tokens_embed
          | positions_embed | wte | wpe | embed_in | pos_embed ) {_BELOW}
      | # names that are also a module's prefix: only the table itself, or one of a list (Mamba, RWKV, Gemma,
        # XTTS, torch, ESPnet, audiocraft, DLRM, DiT)
        (?: (?:(?:text|mel)_)?embeddings? | emb(?:ed)? | embedder | embedding_(?:layer|table)
          | (?:embeddings | emb(?:ed|_l)?)\.\d++ ) [./]weight
      | # T5's, adapters included; elsewhere layers that are shared
        shared (?: [./] (?: weight | embedding | (?:lora|base_layer|modules_to_save|original_module).* ) )?
    )
"""

#: Everything after the last layer that makes predictions: language-model, classification and task heads.
_HEAD = rf"""
    {_BEFORE}
    (?: # output layers by their own name, at any depth
        (?:\w*lm_head | lm_loss | (?:pre_)?classifier | score | qa_outputs | embed_out
          | (?:classification|segmentation|text|mel)_head
          | output_projection | vocab_(?:transform|layer_norm|projector) | (?:mlm|mim|mc)_head
          | (?:generator|discriminator)_predictions | lm_predictions | seq_relationship | multiple_choice_head
          | class_labels_classifier | bbox_predictor | cls_score | bbox_pred | (?:class|bbox)_embed | conv_seg
          | ctc_lo ) {_BELOW}
      | # BERT and ALBERT: cls.predictions.*, predictions.*
        predictions\.(?:bias|dense|decoder|transform|LayerNorm){_BELOW}
    )
  | # names that mean something else deeper down: Whisper, timm, torchvision, RWKV, Llama as released
    (?:.*/)? {_WRAPPERS} (?:proj_out|head|heads|fc|output)(?:\..*)?
  | # what is in no numbered layer: Megatron, ChatGLM
    (?:.*/)? (?:[A-Za-z_]\w*\.)* output_layer(?:\..*)?
"""

#: What a normalisation layer holds itself, one of several in a list too; a projection inside an adaptive norm
#: is none.
_NORM = rf"""
    {_BEFORE} {_NORM_LAYER} (?: \.\d++ | (?<=norms)\.\w++ )? (?:[./]\w++)?
"""

#: Additive vectors, whatever they belong to.
_BIAS = rf"""
    {_BEFORE}
    (?: \w*bias | bias_[ih]h_l\d+(?:_reverse)? | LayerNorm[./]beta )
"""

#: A component that is an attention module, and one that is a feed-forward block whatever is around it.
_ATTENTION_LAYER = r"(?=\w*(?i:attn|attention))\w*+"
_BLOCK = r"(?:mlp|ffn|ff|feed_?forward\w*+)"

#: Attention modules with their output projections, without their norms. A Mamba mixer is none, nor are the
#: other layers of a list that is called so: `attentions.0.transformer_blocks.0.ff` in diffusers.
_ATTENTION = rf"""
    (?! (?> (?:.*?[./])?? {_ATTENTION_LAYER} [./] ) (?:.*[./])? {_BLOCK} [./] )
    {_BEFORE}
    (?: (?: {_ATTENTION_LAYER} | (?=(?:\w*_)?att(?![^\W_]))\w*+ | mha ) {_BELOW}
      | # hybrids whose blocks are all called `mixer`: attention is told by its projections
        (?:[qkvo]_proj|qkv_proj|query_key_value|c_attn) {_BELOW}
    )
"""

#: Feed-forward blocks and experts with their routers, without their norms.
_MLP = rf"""
    {_BEFORE}
    (?: (?=\w*(?:mlp|ffn))\w*+ | feed_?forward\w*+ | ff | intermediate | DenseReluDense | block_sparse_moe
      | moe | (?:shared_)?experts? | (?:gate|up|down|gate_up)_proj(?:_bias)?
      | layers?\.\d+\.(?:fc[12]|linear[12]) | (?:layer|blocks)\.\d+\.output\.dense
    ) {_BELOW}
"""

#: Kind -> (what belongs to it, what does not though it matches).
_KIND_SOURCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "@embeddings": (_EMBEDDINGS, (_NORM,)),
    "@head": (_HEAD, ()),
    "@norm": (_NORM, ()),
    "@bias": (_BIAS, ()),
    "@attention": (_ATTENTION, (_NORM,)),
    "@mlp": (_MLP, (_NORM, _ATTENTION)),
}

#: The kinds a user may name.
KINDS = tuple(_KIND_SOURCES)

_NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")

#: What stands for other characters in a shell pattern: `*`, `?`, and `[…]` (a lone `[` is itself).
_WILDCARD = re.compile(r"[*?]|\[!?\]?[^\]]*\]")

_SUGGEST_FROM = 5_000  # names looked at for a suggestion: difflib takes some 20 µs for each


class Pattern(NamedTuple):
    """A compiled pattern: `regex` matches the whole name and none of `but` does."""

    text: str
    regex: re.Pattern[str]
    but: tuple[re.Pattern[str], ...] = ()

    @property
    def is_kind(self) -> bool:
        """Whether this is a kind, to which no buffer belongs."""
        return is_kind(self.text)

    def matches(self, name: str) -> bool:
        """Tell whether the whole `name` matches."""
        return bool(self.regex.fullmatch(name)) and not any(other.fullmatch(name) for other in self.but)


def is_kind(text: str) -> bool:
    """Tell whether a pattern is a kind."""
    return text.startswith("@")


def compile_pattern(text: str) -> Pattern:
    """Compile a shell pattern or a kind; raise UsageError for an empty pattern or an unknown kind."""
    if text in _KIND_SOURCES:
        source, but = _KIND_SOURCES[text]
        return Pattern(text, _compile(source), tuple(_compile(other) for other in but))
    if is_kind(text) or not text:
        near = difflib.get_close_matches(text, KINDS, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}? " if near else ""
        if "," in text:
            hint = "An option takes one: repeat --include or --exclude. "
        raise UsageError(
            f"no such kind: {text}" if text else "empty pattern",
            why=f"the kinds are {', '.join(KINDS)}" if text else "it would match no tensor",
            next_step=f"{hint}Name a kind, or write a shell pattern on the tensor's name such as '*.bias'",
        )
    return Pattern(text, re.compile(fnmatch.translate(text)))


def _compile(source: str) -> re.Pattern[str]:
    return re.compile(source, re.VERBOSE | re.DOTALL)


def _norms_by_shape(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Return the weights and biases that are vectors of one length: a norm's, whatever its module is called.

    In a sequence of layers it has a number (`downsample.1`), and all other layers have matrices.
    """
    norms: set[str] = set()
    for name, shape in shapes.items():
        if len(shape) == 1 and name.endswith((".weight", "/weight")):
            bias = f"{name.removesuffix('weight')}bias"
            if shapes.get(bias) == shape:
                norms |= {name, bias}
    return norms


def _layers(tables: Collection[str], names: Collection[str]) -> set[str]:
    """Return what of `tables` is none: a weight with a bias beside it among `names`, and the bias."""
    known = set(names)
    biases = {name: f"{name.removesuffix('weight')}bias" for name in tables if name.endswith("weight")}
    return {each for pair in biases.items() if pair[1] in known for each in pair}


def match_names(
    texts: Sequence[str],
    names: Sequence[str],
    buffers: Collection[str] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> list[frozenset[str]]:
    """Return for each pattern the names it matches, where kinds leave `buffers` out.

    `shapes` are those of the tensors, by name, where they are known.
    """
    found: dict[str, frozenset[str]] = {}
    alike: dict[str, list[str]] = {}
    norms: set[str] = set()
    if any(map(is_kind, texts)):
        norms = _norms_by_shape(shapes or {}).difference(buffers)
        # Kinds look past numbers, so one name of each `layers.*.mlp.up_proj.weight` decides for all layers.
        for name in names:
            if name not in buffers:
                alike.setdefault(_NUMBER.sub("0", name), []).append(name)
    for text in dict.fromkeys(texts):
        pattern = compile_pattern(text)
        if pattern.is_kind:
            members = frozenset(name for one, same in alike.items() if pattern.matches(one) for name in same)
            if text == "@norm":
                members = members.union(norms)
            elif text == "@embeddings":
                members = members.difference(norms, _layers(members, names))
            elif _NORM in _KIND_SOURCES[text][1]:
                members = members.difference(norms)
            found[text] = members
        else:
            candidates = _candidates(text, names)
            decided = not _WILDCARD.search(text.strip("*"))  # `*x*`: the candidates are the matches
            found[text] = frozenset(candidates if decided else filter(pattern.regex.fullmatch, candidates))
    return [found[text] for text in texts]


def check_matched(texts: Sequence[str], matched: Sequence[Collection[str]], names: Sequence[str]) -> None:
    """Raise UsageError for a pattern that matches none of `names`: most likely it is misspelt."""
    for text, found in zip(texts, matched, strict=True):
        if not found:
            raise UsageError(
                f"pattern matches nothing: {text}",
                why=f"none of the checkpoint's {len(names)} tensors has such a name",
                next_step="An option takes one pattern: for several, repeat --include or --exclude"
                if "," in text
                else _suggest(compile_pattern(text), names),
            )


def _candidates(text: str, names: Sequence[str]) -> Sequence[str]:
    """Drop the names that lack the literal start, end or middle of `text`: a tenth of a regex's time."""
    runs = _WILDCARD.split(text)
    if len(runs) == 1:
        return [text] if text in names else []
    head, tail, longest = runs[0], runs[-1], max(runs, key=len)
    # `in` is an operator and three times as fast as a method call, so it thins them out first.
    if longest:
        names = [name for name in names if longest in name]
    if head:
        names = [name for name in names if name.startswith(head)]
    return [name for name in names if name.endswith(tail)] if tail else names


def _suggest(pattern: Pattern, names: Sequence[str]) -> str:
    """Say what the user can do about a pattern that matches nothing, with near names where there are any."""
    if pattern.is_kind:
        return (
            "Leave it out (where a preset brings it, give what else that sets), or list the names with: "
            "noisytune inspect SOURCE --headers-only"
        )
    blind = re.compile(pattern.regex.pattern, re.IGNORECASE)
    for name in names:
        if blind.fullmatch(name):
            return f"Patterns are case-sensitive; perhaps {name} is meant"
    bare = pattern.text.strip("*")
    wanted, looked_at = bare.count(".") + 1, names[:_SUGGEST_FROM]
    tails = {".".join(name.split(".")[-wanted:]): name for name in reversed(looked_at)}
    near = difflib.get_close_matches(bare, list(tails), n=3, cutoff=0.6)
    if near:
        return f"Perhaps {' or '.join(tails[tail] for tail in near)} is meant"
    return (
        "Patterns match the whole name (write '*query*'); list the names with: "
        "noisytune inspect SOURCE --headers-only"
    )

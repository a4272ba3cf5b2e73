"""The model card of an output (--card): README.md, made anew so that it claims nothing of the base's.

A card's front matter names a base model and scores (`model-index`). Both are another model's once there is
noise, so they are taken out entry by entry, and every other line stays as it was typed. What comes of a card
follows from the source's and from the manifest alone: `replay` makes the same bytes again, whatever versions
of libraries are there. So nothing is dumped by one, and the words below are frozen as the noise is.

huggingface_hub says what front matter says, as it would of a card on the hub. Somebody else wrote it: its
length is bounded, and it may not refer to itself, which could unfold without end.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any

from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.checkpoint.formats._file import common_mode
from noisytune_cli.checkpoint.ids import is_repo_id
from noisytune_cli.commands.differences import Difference
from noisytune_cli.errors import InputInvalid, NoisytuneError, UsageError
from noisytune_cli.manifest.average import AverageManifest
from noisytune_cli.manifest.write import CARD, MANIFEST, why_not_together
from noisytune_cli.output.publish import Publication, write_file
from noisytune_cli.reading import read_small
from noisytune_cli.records import Manifest, SourceRecord

#: The largest card, and the longest and deepest front matter without its scores: YAML is read in Python.
_MAX_BYTES, _MAX_HEAD, _MAX_DEPTH, _MAX_ENTRIES = 16 << 20, 64 << 10, 100, 1000

#: Scores in files of their own, which the hub shows as a card's.
_SCORES_FOLDER = ".eval_results/"

#: As the hub finds front matter, and the entries of its mapping.
_FRONT = re.compile(r"\s*---(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|\Z)", re.DOTALL)
_ENTRY = re.compile(r"""^(?P<quote>["']?)(?P<key>[A-Za-z_][\w.-]*)(?P=quote)[ \t]*:(?=\s|$)""", re.MULTILINE)

_SCORES, _BASE, _RELATION, _TAGS = "model-index", "base_model", "base_model_relation", "tags"

#: What YAML reads as the string that it is, and the words that look so and are none.
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(?:[./][A-Za-z0-9_-]+)*")
_NO_STRINGS = frozenset(("true", "false", "yes", "no", "on", "off", "null", "y", "n"))

#: How deep a character of YAML leads in, or out again.
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}

#: The depth of the entries of front matter, which lie in a stream, a document and a mapping.
_AT_TOP = 3

#: What is not shown as it is: controls, line breaks, and what turns the direction of text.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")

#: What is wrong with a base or a manifest that give another card.
OTHER_CARD = "the base gives another card than recorded"

#: How many members of an average are named.
_MAX_NAMED = 100


@dataclass(frozen=True)
class Card:
    """A source's model card, taken apart: the entries of its front matter as (key, text), and what follows.

    `source` is its name, None where there is none; `left_out` are the files that the output lacks for it,
    with the reason; `relation` is what the source is to a base that the card names.
    """

    source: str | None
    mode: int
    left_out: tuple[tuple[str, str], ...]
    relation: str
    entries: tuple[tuple[str, str], ...] = ()
    tags: tuple[str, ...] = ()
    body: str = ""
    newline: str = "\n"

    @property
    def own(self) -> frozenset[str]:
        """What of the source's other files is not copied."""
        return frozenset((CARD, *(name for name, _ in self.left_out)))

    def of_noise(self, manifest: Manifest) -> bytes:
        """Return the card of what a manifest of noise describes."""
        noise = manifest.noise
        facts = [
            ("weights", _named(manifest.source)),
            ("noise", f"{noise.distribution}, {noise.scaling}"),
            (noise.symbol, f"{noise.lam:g}"),
            *((f"{noise.symbol} for {pattern}", f"{strength:g}") for pattern, strength in noise.rules),
            ("seed", noise.seeds),
            *([("weights kept", f"{noise.kept:g}")] if noise.kept != 1.0 else []),
        ]
        base = "" if _on_hub([manifest.source]) else " --base BASE"
        told = [
            "## Weight noise",
            "These weights have noise on them, added once by noisytune (NoisyTune, arXiv 2202.12024):",
            *_block(f"{name}: {value}" for name, value in facts),
            "They are made again, bit for bit, by",
            *_block([f"noisytune replay {MANIFEST}{base} -o OUT"]),
        ]
        return self._render([manifest.source], "finetune", told)

    def of_average(self, manifest: AverageManifest) -> bytes:
        """Return the card of the mean that a manifest describes."""
        members = [f"{coefficient:g} x {_named(source)}" for coefficient, source in manifest.members]
        more = len(members) - _MAX_NAMED
        told = [
            "## Averaged weights",
            "These weights are the mean of several checkpoints', made by noisytune:",
            *_block([*members[:_MAX_NAMED], *([f"and {more} more"] if more > 0 else [])]),
        ]
        return self._render([source for _, source in manifest.members], "merge", told)

    def _render(self, sources: Sequence[SourceRecord], relation: str, told: Sequence[str]) -> bytes:
        bases = _on_hub(sources)
        dropped = {_SCORES, _TAGS, *((_BASE, _RELATION) if bases else ())}
        kept = [(key, text) for key, text in self.entries if key not in dropped]
        lines = "".join(text if text.endswith("\n") else f"{text}\n" for _, text in kept)
        keys = {key for key, _ in kept}
        if len(bases) == 1:
            lines += f"{_BASE}: {_scalar(bases[0])}\n"
        elif bases:
            lines += f"{_BASE}:\n" + "".join(f"- {_scalar(base)}\n" for base in bases)
        if bases or (_BASE in keys and _RELATION not in keys):
            lines += f"{_RELATION}: {relation if bases else self.relation}\n"
        lines += f"{_TAGS}:\n" + "".join(
            f"- {_scalar(tag)}\n" for tag in dict.fromkeys((*self.tags, "noisytune"))
        )
        if self.body.strip():
            told = [*told, "What follows is the card of the weights before that: scores in it are theirs."]
        head = f"---\n{lines}---\n\n" + "\n\n".join(told) + "\n\n"
        return (head.replace("\n", self.newline) + self.body.lstrip("\r\n")).encode()


def read_card(source: Checkpoint) -> Card:
    """Take the source's model card apart; a folder without one gets a card all the same.

    Raises UsageError where the output is no folder, InputInvalid where the front matter cannot be rewritten.
    """
    if source.single_file:
        raise UsageError(
            "--card cannot be used",
            path=source.path,
            why=f"a model card is {CARD} in a folder, and SOURCE is a file",
            next_step="Leave --card out, or give the folder",
        )
    relation = "finetune" if source.adapter is None else "adapter"
    left_out = tuple((name, "scores of the source (--card)") for name in _scores_of(source))
    if CARD not in source.others:
        if why := why_not_together([*source.weight_files, *source.others, CARD]):
            raise _cannot(source, f"the output would have {why}")
        mode = common_mode(file.mode for file in source.sources)
        return Card(None, mode, left_out, relation)
    try:
        text = read_small(source.root / CARD, _MAX_BYTES, source.reach).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _cannot(source, f"byte {error.start:,} is not UTF-8") from error
    front = _FRONT.match(text)
    head = "" if front is None else front[1].replace("\r\n", "\n").replace("\r", "\n")
    try:
        entries = _take_apart(head)
        tags = _check(entries)
    except ValueError as error:
        raise _cannot(source, str(error)) from error
    newline = "\r\n" if "\r\n" in (text[:_MAX_HEAD] if front is None else front[0]) else "\n"
    body = text if front is None else text[front.end() :]
    mode = source.mode_beside(CARD)
    return Card(CARD, mode, left_out, relation, tuple(entries), tuple(tags), body, newline)


def write_card(
    card: Card, content: bytes, publications: Sequence[Publication]
) -> tuple[tuple[str, str | None, str], ...]:
    """Write what became of a card; return what a manifest says of it."""
    return ((CARD, card.source, write_file(content, CARD, publications, card.mode)),)


def compare_card(manifest: Manifest, base: Checkpoint) -> list[Difference]:
    """Say where the base and the noise give another card than the manifest records."""
    if not manifest.rewritten:
        return []
    try:
        card = read_card(base)
    except NoisytuneError as error:
        return [Difference(CARD, None, f"the base: {error.why}")]
    made = write_card(card, card.of_noise(manifest), [])
    return [] if made == manifest.rewritten else [Difference(CARD, None, OTHER_CARD)]


def claims_of(source: Checkpoint) -> list[str]:
    """Warn of what a card that is copied as it is claims of the output."""
    claimed = ["scores (model-index)", "a base model (base_model)"]
    keys = _keys_of(source) if CARD in source.others else set()
    claimed = [words for key, words in zip((_SCORES, _BASE), claimed, strict=True) if key in keys]
    claimed += [f"scores ({_SCORES_FOLDER})"] if _scores_of(source) else []
    if not claimed:
        return []
    return [
        f"the model card is copied as it is: it claims {' and '.join(claimed)} for the output as for the "
        "source; --card writes one for the output"
    ]


def _scores_of(source: Checkpoint) -> list[str]:
    return [name for name in source.others if name.startswith(_SCORES_FOLDER)]


def _keys_of(source: Checkpoint) -> set[str]:
    """Return what the front matter of a card has entries for."""
    fd = source.open_beside(source.root / CARD)
    try:
        text = os.pread(fd, _MAX_BYTES, 0).decode("utf-8-sig", "replace")
    finally:
        os.close(fd)
    front = _FRONT.match(text)
    return (
        set()
        if front is None
        else {found["key"] for found in islice(_ENTRY.finditer(front[1]), _MAX_ENTRIES)}
    )


def _take_apart(head: str) -> list[tuple[str, str]]:
    """Return the entries of front matter with their texts; what comes before the first has the key "".

    ValueError where they are too many.
    """
    found = list(islice(_ENTRY.finditer(head), _MAX_ENTRIES + 1))
    if len(found) > _MAX_ENTRIES:
        raise ValueError(f"its front matter has more than {_MAX_ENTRIES:,} entries")
    starts = [entry.start() for entry in found] + [len(head)]
    entries = [
        (entry["key"], head[start:end]) for entry, (start, end) in zip(found, pairwise(starts), strict=True)
    ]
    before = head[: starts[0]]
    return ([("", before)] if before.strip() else []) + entries


def _check(entries: Sequence[tuple[str, str]]) -> list[str]:
    """Return the tags in front matter; ValueError where it is not a mapping of these entries."""
    import yaml
    from huggingface_hub import ModelCard

    head = "".join(text for key, text in entries if key != _SCORES)
    keys = [key for key, _ in entries if key not in ("", _SCORES)]
    if len(head) > _MAX_HEAD:
        raise ValueError(f"its front matter is longer than {_MAX_HEAD:,} characters")
    if max(accumulate(_STEPS[c] for c in head if c in _STEPS), default=0) > _MAX_DEPTH:
        raise ValueError("its front matter is nested too deep")
    if not head.strip():
        return []
    try:
        if list(_keys_at_top(yaml.parse(head, Loader=yaml.SafeLoader))) != keys:
            raise ValueError("its front matter is no list of entries, each at the beginning of a line")
        tags = ModelCard(f"---\n{head}\n---\n").data.get(_TAGS, [])
    except yaml.YAMLError as error:
        why = str(getattr(error, "problem", None) or "it has a character that YAML has not")
        raise ValueError(f"its front matter is no YAML: {why}") from error
    except RecursionError as error:
        raise ValueError("its front matter is nested too deep") from error
    except (TypeError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(f"its front matter is none of a model card: {error}") from error
    if not all(isinstance(tag, str) for tag in tags):
        raise ValueError("its tags are no texts")
    return list(tags)


def _keys_at_top(events: Iterable[Any]) -> Iterator[str | None]:
    """Yield the keys of the outermost mapping; ValueError where a node is used twice, which could unfold."""
    depth = count = 0
    for event in events:
        kind = type(event).__name__
        if kind == "AliasEvent":
            raise ValueError("its front matter refers to itself (*…)")
        depth -= kind.endswith("EndEvent")
        if depth == _AT_TOP and (kind == "ScalarEvent" or kind.endswith("StartEvent")):
            if count % 2 == 0:
                yield getattr(event, "value", None)
            count += 1
        depth += kind.endswith("StartEvent")


def _cannot(source: Checkpoint, why: str) -> InputInvalid:
    return InputInvalid(
        "cannot rewrite the model card",
        path=source.root / CARD,
        why=why,
        next_step="Mend the card, or leave --card out, which copies it as it is",
    )


def _on_hub(sources: Sequence[SourceRecord]) -> list[str]:
    """Return the ids of those that are on the hub."""
    ids = [one.id for one in sources if one.revision is not None and is_repo_id(one.id)]
    return list(dict.fromkeys(ids))


def _named(source: SourceRecord) -> str:
    return source.id + (f" at commit {source.revision}" if source.revision else "")


def _block(lines: Iterable[str]) -> list[str]:
    """Return lines that Markdown shows as they are."""
    shown = (_HIDDEN.sub(lambda c: json.dumps(c[0])[1:-1], line) for line in lines)
    return ["\n".join(f"    {line}" for line in shown)]


def _scalar(text: str) -> str:
    """Write a text so that YAML reads it as that text."""
    is_plain = _PLAIN.fullmatch(text) and text.lower() not in _NO_STRINGS
    return text if is_plain else json.dumps(text)

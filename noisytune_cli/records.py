"""The frozen records that flow through noisytune. Read this first.

A checkpoint is a set of weight files; a weight file is a header and a run of tensors (`TensorSpec`), some of
which hold several matrices (`Part`). What the user asks for is a `NoiseSpec`. From both, and before any
weight is read, comes a `Plan`: one `Step` for each tensor, an action and a reason. From a step and the std of
a matrix comes an `Outcome`, its amplitude or why it has none; carrying the step out leaves a `Receipt`; the
receipts, in file order, are the `Manifest`. Records are plain data: no record reads, writes
or prints.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Literal

from noisytune_cli.dtypes import FLOAT_DTYPES

#: "shrink" is what noise with `kept` below 1 does to a matrix that takes no noise.
Action = Literal["perturb", "shrink", "copy"]
Distribution = str
Scope = Literal["matrix", "global", "absolute"]
Granularity = Literal["tensor", "matrix"]

#: Why a tensor is copied byte for byte (design: "Not perturbed").
Reason = Literal[
    "not-float",
    "empty",
    "one-element",
    "constant",
    "non-finite",
    "buffer",
    "excluded",
    "lambda-zero",
    "unrepresentable",
]

#: Of these reasons, those for which a parameter gets no noise, and is shrunk all the same.
SHRUNK = frozenset({"one-element", "constant", "unrepresentable", "lambda-zero"})

#: What decided whether a tensor is a buffer or a parameter, the strongest first (`plan/evidence/told.py`).
ToldBy = Literal["checkpoint", "model", "structure", "values", "names"]

#: The most parts that one tensor is divided into: its entry in a manifest has to stay readable in one piece.
MAX_PARTS = 4096

#: The largest seed of noise: a stream's key has 64 bits of it.
MAX_SEED = 2**64 - 1

#: The most noises that one mixture adds up.
MAX_TERMS = 20_000


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One stored tensor, as its file's header describes it.

    `dtype` is spelt as safetensors spells it (`F32`, `BF16`, `I64`…); `file` is the weight file's name
    relative to the checkpoint, with `/`; `offset` is the first byte counted from the start of that file.
    `path` is the way to it through the containers of its file, where these say more than the name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    path: str = field(default="", compare=False)

    @property
    def elements(self) -> int:
        """The number of elements (1 for shape [])."""
        return math.prod(self.shape)

    @property
    def shown(self) -> str:
        """What people are told that it is called."""
        return self.path or self.name


#: Under what DeepSpeed keeps second copies of frozen weights, which have their weights' noise.
FROZEN_COPIES = "frozen_param_fragments"


@dataclass(frozen=True, slots=True)
class Declared:
    """What a weight file itself says of its tensors, by name: buffers, parameters, and which are one.

    `lightning` says that PyTorch Lightning wrote it, whose modules have losses and metrics inside.
    """

    buffers: frozenset[str] = frozenset()
    parameters: frozenset[str] = frozenset()
    pairs: tuple[tuple[str, str], ...] = ()
    lightning: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """One of the matrices that a tensor holds: its name there (`k`, `expert.3.gate`), and where it lies.

    It is `repeat` runs of `length` elements, the first from element `first` of the tensor (row-major), each
    `stride` elements after the one before. `shape` is the matrix's own.
    """

    name: str
    shape: tuple[int, ...]
    first: int
    length: int
    stride: int
    repeat: int

    @property
    def elements(self) -> int:
        """The number of elements."""
        return self.length * self.repeat


def whole(tensor: TensorSpec) -> Part:
    """Return a tensor as the only matrix that it holds."""
    return Part("", tensor.shape, 0, tensor.elements, tensor.elements, 1)


@dataclass(frozen=True, slots=True)
class Term:
    """One noise of a mixture: its seed, its strength (λ or σ, as the scope has it), and its coefficient."""

    seed: int
    strength: float
    coefficient: float = 1.0


def mixed_strength(mix: Sequence[Term]) -> float:
    """Return √Σ(coefficient · strength)², that of the sum of independent noises."""
    return math.hypot(*(term.coefficient * term.strength for term in mix))


@dataclass(frozen=True, slots=True)
class NoiseSpec:
    """What noise the user asks for.

    `lam` is its strength: λ, the full width of the uniform noise in units of std(W), or in scope `absolute`
    σ, the noise's own std; of `rules` too. Below 0 it is the negative noise. `kept` is the share of the
    weights that is kept. `mix` are noises to be added up in place of that of `seed`; `lam` is then
    their `mixed_strength`. `splits` (pattern, division) are the user's own divisions of tensors; a
    manifest has the parts that came of them instead.
    """

    lam: float = 0.15
    seed: int = 0
    distribution: Distribution = "uniform"
    scope: Scope = "matrix"
    granularity: Granularity = "tensor"
    rules: tuple[tuple[str, float], ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    splits: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    kept: float = 1.0
    mix: tuple[Term, ...] = ()

    @property
    def needs_std(self) -> bool:
        """Whether the noise is scaled with the values' std."""
        return self.scope != "absolute"

    @property
    def symbol(self) -> str:
        """What its strengths are called."""
        return "λ" if self.needs_std else "σ"

    @property
    def scaling(self) -> str:
        """What its strengths are multiples of, in words."""
        if not self.needs_std:
            return "of one std for all tensors"
        whose = "one std for all tensors" if self.scope == "global" else f"each {self.granularity}'s std"
        return f"scaled with {whose}"

    @property
    def seeds(self) -> str:
        """Its seed, or how many a mixture has."""
        return f"{len(self.mix)} in a mixture" if self.mix else str(self.seed)


@dataclass(frozen=True, slots=True)
class Conversion:
    """In what the output's weights differ from the source's beside the noise; None where they do not.

    `dtype` is that of all parameters, one of FLOAT_DTYPES; `format` that of the files; `dequantized` the
    dtype that quantised weights were turned into before anything else.
    """

    dtype: str | None = None
    format: Literal["safetensors"] | None = None
    dequantized: Literal["BF16"] | None = None


@dataclass(frozen=True, slots=True)
class Combination:
    """One output: its λ and seed, and where it goes (None where nothing is to be written)."""

    lam: float
    seed: int
    out: str | None


@dataclass(frozen=True, slots=True)
class Step:
    """What will happen to one tensor, decided from headers alone.

    `stream` names the noise stream (the tensor's own name, or that of the tie it belongs to). `lam` is the
    strength (λ or σ), 0 for a copy. `unsure` says what only the values can tell of a tensor that is to be
    perturbed (`constant`, `non-finite`; `computed` where its name or its siblings leave that to them).
    `told_by` says what decided whether it is a buffer, None where an earlier record does not say; a `doubt`
    is a name of a buffer's kind that nothing stronger tells. `out_dtype` is the dtype it is written in, None
    where that is its own. `parts` are its matrices if they are to have a std each, two at least; `undivided`
    says why a tensor that looks like several matrices is taken as one.
    """

    tensor: TensorSpec
    action: Action
    reason: Reason | None
    lam: float
    stream: str
    unsure: tuple[str, ...] = ()
    told_by: ToldBy | None = None
    out_dtype: str | None = None
    parts: tuple[Part, ...] = ()
    undivided: str | None = None
    doubt: bool = False

    @property
    def matrices(self) -> tuple[Part, ...]:
        """The matrices that have a std each: the parts, or the whole tensor as its only one."""
        return self.parts or (whole(self.tensor),)


@dataclass(frozen=True, slots=True)
class Tie:
    """Two or more names of one parameter, of which `stream` is one; `names` are those stored, in file order.

    `dropped` are (name, stored name) of those that the file only mentions, as safetensors' `save_model` does.
    `evidence` is `alias` (the file says so), `storage` (one storage in a pickle) or `equal-bytes` (a known
    pair that is a tie only if the bytes agree, which the values have to tell).
    """

    stream: str
    names: tuple[str, ...]
    evidence: Literal["alias", "storage", "equal-bytes"]
    dropped: tuple[tuple[str, str], ...] = ()

    @property
    def all_names(self) -> tuple[str, ...]:
        """Every name of the parameter."""
        return (*self.names, *(name for name, _ in self.dropped))


@dataclass(frozen=True, slots=True)
class Plan:
    """One step for every tensor, in file order, with the noise and the ties they came from."""

    noise: NoiseSpec
    steps: tuple[Step, ...]
    ties: tuple[Tie, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What comes of one matrix: an amplitude, or the reason why it stays as it is, or is only shrunk.

    `std` and `amplitude` are float32 values held in Python floats, but for a mixture, whose amplitude is the
    float64 of its sum; `low`/`high` bound the uniform noise, `noise_std` is the std of Gaussian noise.
    `unchanged` counts elements that rounding left as they would be without noise, `clamped` those held back
    at the dtype's largest finite value.
    """

    action: Action
    reason: Reason | None
    lam: float
    std: float | None
    amplitude: float | None
    low: float | None
    high: float | None
    noise_std: float | None
    unchanged: int
    clamped: int


_Number = float | None
#: The fields of an outcome, with which a receipt begins.
outcome_fields: Callable[
    [Outcome],
    tuple[Action, Reason | None, float, _Number, _Number, _Number, _Number, _Number, int, int],
] = attrgetter(*Outcome.__slots__)


@dataclass(frozen=True, slots=True)
class PartReceipt(Outcome):
    """What was done to one part of a tensor."""

    part: Part


@dataclass(frozen=True, slots=True)
class Receipt(Outcome):
    """What was done to one tensor.

    Digests are `blake3:HEX` over the stored bytes; empty where the noise was added in memory. A tensor whose
    `parts` had a std each is perturbed if any of them is; std, amplitude and range are then theirs and None
    here, the counts are sums. `faint` of the source's values are 0, or next to it beside their std, if a good
    part is; no manifest has it.
    """

    step: Step
    source_digest: str
    digest: str
    parts: tuple[PartReceipt, ...] = ()
    faint: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A weight file: name relative to the checkpoint, size in bytes, digest of everything but tensor data."""

    name: str
    size: int
    header_digest: str


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """Where the weights came from: a plain name or hub id (never a path of this machine), and its commit."""

    id: str
    revision: str | None
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, slots=True)
class OutputRecord:
    """The output's weight files where they are not like the source's: one for each of these, in order.

    `rewritten` are the small files that had to follow (index, config): name, the source's name, digest.
    """

    conversion: Conversion
    files: tuple[FileRecord, ...]
    rewritten: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True, slots=True, repr=False)
class Manifest:
    """All that is needed to check the output, or to rebuild it from the source (`docs/manifest.md`).

    `rewritten` is the model card, where it was written anew: name, the source's name or None where the source
    has none, digest. It shows as a line, and as a small table in a notebook.
    """

    tool_name: str
    tool_version: str
    source: SourceRecord
    noise: NoiseSpec
    receipts: tuple[Receipt, ...]
    copied: tuple[tuple[str, str], ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    output: OutputRecord | None = None
    rewritten: tuple[tuple[str, str | None, str], ...] = ()
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def conversion(self) -> Conversion | None:
        """In what the output's weights differ from the source's beside the noise; None where they do not."""
        return None if self.output is None else self.output.conversion

    @property
    def output_files(self) -> tuple[FileRecord, ...]:
        """The output's weight files: names and sizes are the source's unless they were converted."""
        return self.source.files if self.output is None else self.output.files

    @property
    def followed(self) -> tuple[tuple[str, str, str], ...]:
        """The small files that had to follow the weights: name, the source's name, digest."""
        return () if self.output is None else self.output.rewritten

    @property
    def others(self) -> dict[str, str]:
        """The digests of the output's files that are no weights, by name; its manifest is none of them."""
        anew = (*self.rewritten, *self.followed)
        return {**dict(self.copied), **{name: digest for name, _, digest in anew}}

    def __repr__(self) -> str:
        told = ", ".join(f"{name} {value}" for name, value in self._told())
        return f"<Manifest of {self.source.id!r}: {told}>"

    def _repr_html_(self) -> str:
        from html import escape  # only notebooks ask

        rows = "".join(f"<tr><th>{name}</th><td>{escape(value)}</td></tr>" for name, value in self._told())
        return f"<table><caption>{escape(self.source.id)}</caption>{rows}</table>"

    def _told(self) -> list[tuple[str, str]]:
        """Return what tells most: the noise, and what became of how many tensors."""
        counts = Counter(receipt.reason or "perturbed" for receipt in self.receipts)
        noise = self.noise
        return [
            ("tensors", str(len(self.receipts))),
            *((str(what), str(count)) for what, count in counts.most_common()),
            (noise.symbol, f"{noise.lam:g}"),
            ("seed", noise.seeds),
            ("noise", f"{noise.distribution} {noise.scaling}"),
        ]


def with_output_files(manifest: Manifest) -> Manifest:
    """Return the manifest with the output's weight files in the place of the base's."""
    return replace(manifest, source=replace(manifest.source, files=manifest.output_files))


def copied(reason: Reason | None, std: float | None = None) -> Outcome:
    """Return the outcome of a matrix that stays as it is, for a reason that its std may show."""
    return Outcome("copy", reason, 0.0, std, None, None, None, None, 0, 0)


def summed(step: Step, parts: tuple[PartReceipt, ...], source_digest: str, digest: str) -> Receipt:
    """Return the receipt of a tensor from those of its parts; it is perturbed if any of them is.

    The reason for a tensor that is copied is that of its first part, unless another part is not finite.
    """
    perturbed = any(part.action == "perturb" for part in parts)
    reasons = [part.reason for part in parts]
    actions = {part.action for part in parts}
    whole = replace(
        copied(None if perturbed else "non-finite" if "non-finite" in reasons else reasons[0]),
        action="perturb" if perturbed else "shrink" if "shrink" in actions else "copy",
        lam=step.lam if perturbed else 0.0,
        unchanged=sum(part.unchanged for part in parts),
        clamped=sum(part.clamped for part in parts),
    )
    return Receipt(*outcome_fields(whole), step, source_digest, digest, parts)


def out_dtype_of(tensor: TensorSpec, reason: Reason | None, conversion: Conversion) -> str | None:
    """Return the dtype that a tensor is to be written in, or None where it keeps its own, as buffers do."""
    if tensor.dtype not in FLOAT_DTYPES or reason == "buffer" or conversion.dtype == tensor.dtype:
        return None
    return conversion.dtype

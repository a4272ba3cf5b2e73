"""Structure: tensors of one module that only exist together, and what each is then.

`weight_orig` stands beside a mask where a weight was pruned and beside `weight_u` where its spectral norm is
held; running means have variances, a queue has a pointer to its end. Names are taken apart into words, so a
pair is known whatever else it is called: `moving_avg` and `moving_var`. Frameworks that join modules with `/`
are read alike. Where a pair alone is not enough (a mean and a std may be learned, and so may what is called
after a cosine and a sine) the values have to bear it out: these are `UnsurePair`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.records import TensorSpec

Kind = Literal["buffer", "parameter"]

#: What a pair may be: a mean and its spread, the least and the most, cosines and sines.
PairKind = Literal["spread", "range", "angle"]

#: What the spread beside a mean is called.
_SPREADS = (
    *("var", "variance", "std", "stddev", "stdev", "vars", "variances", "stds"),
    *("invstd", "inv_std", "istd", "rstd", "mean_sq", "mean_square", "mean_squared", "M2"),
)
_SQUARED = re.compile(r"_(sq|squares?|squared)$")
_MEANS = ("mean", "means", "average", "avg")
_MEAN, _SPREAD = frozenset(_MEANS), frozenset(_SPREADS)
_COSINE, _SINES = frozenset(("cos",)), ("sin",)
_SUM, _SQUARES = frozenset(("sum",)), ("sum_squared", "sum_squares", "sum_sq")
_SCALE, _ZEROS = frozenset(("scale", "scales")), ("zero_point", "zero_points")

#: The words of one of a pair, what stands in their place in the other's name, and what they are then.
_PAIRS: tuple[tuple[frozenset[str], tuple[str, ...], PairKind], ...] = (
    (_MEAN, _SPREADS, "spread"),
    (_SUM, _SQUARES, "spread"),
    (frozenset(("min",)), ("max",), "range"),
    (frozenset(("low",)), ("high",), "range"),
    (frozenset(("lower",)), ("upper",), "range"),
    (frozenset(("lb",)), ("ub",), "range"),
    (frozenset(("q01",)), ("q99",), "range"),
    (_COSINE, _SINES, "angle"),
)

#: What is learned of a pair: bounds of the logarithm of a spread (`max_logvar`), that a spread stays in.
_BOUNDED = re.compile(r"(?<![^_])log_?(var|std|sigma|scale)")

#: What says of a mean that it was accumulated; Paddle says it by an underscore before the name.
_ACCUMULATED = frozenset(("running", "moving", "ema", "pop", "global"))

#: What layers call their parameters.
_LAYERS = frozenset(("weight", "bias"))

#: How the names of an average's counts of clusters end.
_COUNTS = re.compile(r"(.*)(?:cluster_size|(?<=ema_)count)")

#: What SincNet learns of its filters.
_EDGES = frozenset(("low_hz_", "band_hz_"))

_POINTERS = frozenset(("ptr", "pointer", "cursor"))

#: More queues than this no trainer keeps in one module.
_MOST_QUEUES = 16

#: Longer names have no siblings.
_LONGEST = 100

#: Words of a method's name that are told apart.
_MOST_WORDS = 4

_WORD = re.compile(r"[^_-]+")


class UnsurePair(NamedTuple):
    """Two tensors that are buffers if their values bear it out (see `computed.look_at_pair`)."""

    names: tuple[str, str]
    what: PairKind

    def under(self, prefix: str) -> UnsurePair:
        """Return the pair under names with a prefix."""
        a, b = self.names
        return UnsurePair((prefix + a, prefix + b), self.what)


class Siblings(NamedTuple):
    """What structure tells: the kind of each name and why, and what the values have to bear out."""

    kinds: Mapping[str, tuple[Kind, str]]
    unsure: tuple[UnsurePair, ...]


def split_name(name: str) -> tuple[str, str]:
    """Return a tensor's module, with the dot or slash that ends it, and its own last part."""
    at = max(name.rfind("."), name.rfind("/")) + 1
    return name[:at], name[at:]


def look(tensors: Sequence[TensorSpec]) -> Siblings:
    """Return what the tensors' siblings tell of them."""
    by_name = {tensor.name: tensor for tensor in tensors}
    modules: dict[str, dict[str, TensorSpec]] = {}
    for tensor in tensors:
        module, last = split_name(tensor.name)
        if len(last) <= _LONGEST:
            modules.setdefault(module, {})[last] = tensor
    kinds: dict[str, tuple[Kind, str]] = {}
    unsure: list[UnsurePair] = []
    for module, siblings in modules.items():
        if siblings.keys() <= _LAYERS:
            continue  # a layer, as nearly all are
        queues, codebooks = tuple(_queues(siblings)), _codebooks(siblings)
        for last, tensor in siblings.items():
            if tensor.dtype not in FLOAT_DTYPES or last in _LAYERS:
                continue
            for kind, why in _beside(module, last, tensor, siblings, by_name):
                kinds.setdefault(tensor.name, (kind, why))
            if tensor.elements > 1 and f"_{last}".endswith(queues):
                kinds.setdefault(tensor.name, ("buffer", "a queue with a pointer to its end"))
            if last in codebooks:
                kinds.setdefault(tensor.name, ("buffer", "an EMA codebook, what it counts or sums up"))
        unsure += _pairs(module, siblings, modules)
    for name, why in _shared_projections(modules):
        kinds.setdefault(name, ("buffer", why))
    return Siblings(kinds, tuple(unsure))


def _beside(
    module: str,
    last: str,
    tensor: TensorSpec,
    siblings: Mapping[str, TensorSpec],
    by_name: Mapping[str, TensorSpec],
) -> Iterator[tuple[Kind, str]]:
    """Yield what a tensor's own siblings say of it."""

    def twin(name: str) -> bool:
        other = siblings.get(name)
        return other is not None and other.shape == tensor.shape

    base, _, end = last.rpartition("_")
    held = base and any(f"{base}_{kept}" in siblings for kept in ("orig", "bar"))
    if held and end == "mask":
        yield "buffer", "a pruning mask"
    elif end in ("u", "v") and (held or _in_parametrization(module, by_name)) and f"{base}_u" in siblings:
        yield "buffer", "power iteration of a spectral norm"
    elif end in ("g", "v") and base and {f"{base}_g", f"{base}_v"} <= siblings.keys():
        yield "parameter", "weight norm"
    elif last in _EDGES and siblings.keys() >= _EDGES:
        yield "parameter", "a filter's edge or width (SincNet)"
    elif last == "original" and ".parametrizations." in f".{module}":
        yield "parameter", "what a parametrization is given"
    elif end in ("epsilon", "eps") and twin(f"{base}_mu"):
        yield "buffer", "the last noise of a noisy layer"
    for zero in _replaced(last, _SCALE, _ZEROS):
        if twin(zero) and siblings[zero].dtype not in FLOAT_DTYPES:  # what is learned has one of floats
            yield "buffer", "a scale of quantisation"
    begin = last.removeprefix("initial_")
    learned = siblings.get(begin) or by_name.get(f"{module}{begin}.weight")
    if begin != last and learned is not None and learned.shape == tensor.shape:
        yield "buffer", "what a weight began as"
    if any(_accumulated(last) and twin(other) for other in _partners(last)):
        yield "buffer", "running statistics"
    schedule = siblings.get("betas")
    if schedule is not None and "alphas_cumprod" in siblings and tensor.shape == schedule.shape:
        yield "buffer", "a table of a noise schedule"


def _in_parametrization(module: str, by_name: Mapping[str, TensorSpec]) -> bool:
    """Say whether a module is one of torch's parametrizations, which keep the tensor they change."""
    parent = module.rstrip("./").rpartition(".")[0]
    return ".parametrizations." in f".{module}" and f"{parent}.original" in by_name


def _queues(siblings: Mapping[str, TensorSpec]) -> set[str]:
    """Return how the names end to which an integer of the module is the pointer."""
    found = set()
    for last, tensor in siblings.items():
        if tensor.elements == 1 and tensor.dtype not in FLOAT_DTYPES:
            words = _WORD.findall(last)
            rest = [word for word in words if word not in _POINTERS]
            if rest and len(rest) < len(words):
                found.add(f"_{'_'.join(rest)}")
    return set() if len(found) > _MOST_QUEUES else found


def _codebooks(siblings: Mapping[str, TensorSpec]) -> set[str]:
    """Return the names of an average's counts of clusters, of its sums, and of the table made of these."""
    found: set[str] = set()
    for last, counts in siblings.items():
        ends = _COUNTS.fullmatch(last)
        if ends is None or counts.elements < 2 or _ACCUMULATED.isdisjoint(_WORD.findall(ends[1])):
            continue
        stem = ends[1]
        own = [n for n, held in siblings.items() if n.startswith(stem) and _has_rows(held.shape, counts)]
        tables = {siblings[name].shape for name in own if siblings[name].elements > counts.elements}
        found |= {*own, *(name for name, held in siblings.items() if held.shape in tables)}
    return found


def _has_rows(shape: tuple[int, ...], counts: TensorSpec) -> bool:
    """Say whether a tensor has a value, a row or a column for each of the clusters that are counted."""
    return counts.elements in shape or shape[: len(counts.shape)] == counts.shape


@functools.lru_cache(1 << 12)
def _replaced(last: str, words: frozenset[str], by: tuple[str, ...]) -> list[str]:
    """Return the name with the first of `words` in it replaced by each of `by`."""
    for word in _WORD.finditer(last):
        if word[0] in words:
            return [last[: word.start()] + other + last[word.end() :] for other in by]
    return []


def _partners(last: str) -> list[str]:
    """Return what the mean to a spread, or the spread to a mean, may be called."""
    if _SQUARED.search(last):
        return [_SQUARED.sub("", last)]
    beside = _replaced(last, _MEAN, _SPREADS) or _replaced(last, _SPREAD, _MEANS)
    return beside or _replaced(last, _SUM, _SQUARES)


def _accumulated(last: str) -> bool:
    return last.startswith("_") or not _ACCUMULATED.isdisjoint(_WORD.findall(last))


def _pairs(
    module: str, siblings: Mapping[str, TensorSpec], modules: Mapping[str, Mapping[str, TensorSpec]]
) -> Iterator[UnsurePair]:
    """Yield what may be a pair: two of one shape, beside each other or in twin modules."""
    for last, tensor in siblings.items():
        if last in _LAYERS or tensor.dtype not in FLOAT_DTYPES or _BOUNDED.search(last):
            continue
        for words, by, what in _PAIRS:
            for other in _replaced(last, words, by):
                if (found := siblings.get(other)) is not None and _alike(tensor, found):
                    yield UnsurePair((tensor.name, found.name), what)
    # Haiku: batch_norm/~/mean_ema/average beside batch_norm/~/var_ema/average. A head's matrix has another
    # shape than its bias.
    if len({tensor.shape for tensor in siblings.values() if tensor.dtype in FLOAT_DTYPES}) > 1:
        return
    above, own = split_name(module[:-1])
    for other in _replaced(own, _MEAN, _SPREADS):
        for last, found in modules.get(f"{above}{other}{module[-1:]}", {}).items():
            mean = siblings.get(last)
            if mean is None or last in _LAYERS or mean.dtype not in FLOAT_DTYPES:
                continue
            if _alike(mean, found):
                yield UnsurePair((mean.name, found.name), "spread")


def _alike(a: TensorSpec, b: TensorSpec) -> bool:
    return a.shape == b.shape and b.dtype in FLOAT_DTYPES


def _shared_projections(modules: Mapping[str, Mapping[str, TensorSpec]]) -> Iterator[tuple[str, str]]:
    """Yield `P_A` and `P_B` that stand once above layers that have other tensors of P's, such as `P_lambda`.

    Layers that share two projections learn what scales them (VeRA, RandLoRA); were these learned, each
    layer would have its own. Layers that have `W_q` and `W_k` have their own: there a letter is a matrix.
    """
    homes: dict[str, dict[str, list[str]]] = {}
    for module, siblings in modules.items():
        for last in siblings.keys() - _LAYERS:
            for word in list(re.finditer("_", last))[:_MOST_WORDS]:
                of_method = homes.setdefault(last[: word.start()], {})
                of_method.setdefault(module, []).append(last[word.end() :])
    for method, of_method in homes.items():
        tops = [module for module, ends in of_method.items() if "A" in ends] if method else []
        if len(tops) != 1 or "B" not in of_method[tops[0]]:
            continue
        (top,) = tops
        below = [ends for module, ends in of_method.items() if module != top and module.startswith(top)]
        if below and all(len(end) > 1 for ends in below for end in ends):
            for end in ("A", "B"):
                yield modules[top][f"{method}_{end}"].name, "a projection that all layers share"

"""Structure: tensors of one module that only exist together, and what each is then.

`weight_orig` stands beside a mask where a weight was pruned and beside `weight_u` where its spectral norm is
held; running means have variances, cosines have sines, a queue has a pointer to its end. Names are taken
apart into words, so a pair is known whatever else it is called: `freqs_cos` and `freqs_sin`, `cos_cached` and
`sin_cached`. Frameworks that join modules with `/` are read alike. Where a pair alone is not enough (a mean
and a std may be learned) the values have to bear it out: these are `OrderedPair`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.records import TensorSpec

Kind = Literal["buffer", "parameter"]

#: What the spread beside a mean is called.
_SPREADS = ("var", "variance", "std", "stddev", "stdev", "invstd", "vars", "variances", "stds")
_MEANS = ("mean", "means", "average", "avg")
_MEAN, _SPREAD = frozenset(_MEANS), frozenset(_SPREADS)
_COSINE, _SINE = frozenset(("cos",)), frozenset(("sin",))
_SCALE, _ZEROS = frozenset(("scale", "scales")), ("zero_point", "zero_points")
_LEAST = (frozenset(("min",)), ("max",)), (frozenset(("low",)), ("high",))

#: What says of a mean that it was accumulated; Paddle says it by an underscore before the name.
_ACCUMULATED = frozenset(("running", "moving", "ema", "pop", "global"))

#: What layers call their parameters.
_LAYERS = frozenset(("weight", "bias"))

_POINTERS = frozenset(("ptr", "pointer", "cursor"))

#: More queues than this no trainer keeps in one module.
_MOST_QUEUES = 16

#: Longer names have no siblings.
_LONGEST = 100

#: Words of a method's name that are told apart.
_MOST_WORDS = 4

_WORD = re.compile(r"[^_-]+")


class OrderedPair(NamedTuple):
    """Two tensors that are statistics if `high` is nowhere below `low` (or, without one, below zero)."""

    names: tuple[str, str]
    high: str
    low: str | None

    def under(self, prefix: str) -> OrderedPair:
        """Return the pair under names with a prefix."""
        a, b = self.names
        return OrderedPair((prefix + a, prefix + b), prefix + self.high, self.low and prefix + self.low)


class Siblings(NamedTuple):
    """What structure tells: the kind of each name and why, and what the values have to bear out."""

    kinds: Mapping[str, tuple[Kind, str]]
    unsure: tuple[OrderedPair, ...]


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
    unsure: list[OrderedPair] = []
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
            if any(last.startswith(stem) and n in tensor.shape for stem, n in codebooks):
                kinds.setdefault(tensor.name, ("buffer", "what an EMA codebook counts and sums up"))
        for (low, high), is_range in _pairs(module, siblings, modules):
            unsure.append(OrderedPair((low, high), high, low if is_range else None))
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
    elif last == "original" and ".parametrizations." in f".{module}":
        yield "parameter", "what a parametrization is given"
    elif end in ("epsilon", "eps") and twin(f"{base}_mu") and twin(f"{base}_sigma"):
        yield "buffer", "the last noise of a noisy layer"
    for replaced in _replaced(last, _COSINE, ("sin",)) or _replaced(last, _SINE, ("cos",)):
        # Of a name that goes on (`cos_amplitudes`) the values have to tell.
        if last.endswith(("cos", "sin")) and twin(replaced):
            yield "buffer", "a table of cosines and sines"
    for zero in _replaced(last, _SCALE, _ZEROS):
        if twin(zero) and siblings[zero].dtype not in FLOAT_DTYPES:  # what is learned has one of floats
            yield "buffer", "a scale of quantisation"
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


def _codebooks(siblings: Mapping[str, TensorSpec]) -> list[tuple[str, int]]:
    """Return how the names begin beside the sizes of an average's clusters, and how many these are."""
    stems = ((last.removesuffix("cluster_size"), tensor) for last, tensor in siblings.items())
    return [
        (stem, tensor.elements)
        for stem, tensor in stems
        if tensor.name.endswith("cluster_size") and not _ACCUMULATED.isdisjoint(_WORD.findall(stem))
    ]


@functools.lru_cache(1 << 12)
def _replaced(last: str, words: frozenset[str], by: tuple[str, ...]) -> list[str]:
    """Return the name with the first of `words` in it replaced by each of `by`."""
    for word in _WORD.finditer(last):
        if word[0] in words:
            return [last[: word.start()] + other + last[word.end() :] for other in by]
    return []


def _partners(last: str) -> list[str]:
    """Return what the mean to a spread, or the spread to a mean, may be called."""
    return _replaced(last, _MEAN, _SPREADS) or _replaced(last, _SPREAD, _MEANS)


def _accumulated(last: str) -> bool:
    return last.startswith("_") or not _ACCUMULATED.isdisjoint(_WORD.findall(last))


def _pairs(
    module: str, siblings: Mapping[str, TensorSpec], modules: Mapping[str, Mapping[str, TensorSpec]]
) -> Iterator[tuple[tuple[str, str], bool]]:
    """Yield (mean, spread) and, marked, (least, most) of one shape, beside each other or in twin modules."""
    for last, tensor in siblings.items():
        if last in _LAYERS or tensor.dtype not in FLOAT_DTYPES:
            continue
        for names, by in ((_MEAN, _SPREADS), *_LEAST):
            for other in _replaced(last, names, by):
                if (found := siblings.get(other)) is not None and _alike(tensor, found):
                    yield (tensor.name, found.name), names is not _MEAN
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
                yield (mean.name, found.name), False


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

"""detect: is the noise of a seed in a checkpoint? Names, seed and weights are enough; no base is needed.

Noise is a function of seed, name and index, so it can be drawn again and correlated with the weights. Of a
tensor of n values with x' = (x - mean) / std and c the noise of unit amplitude about its own mean,

    z = Σ x'c / √Σc²          Σc² ≈ n/12 (uniform), n (Gaussian)

is a standard normal number where the noise is not there, whatever the weights are, and λ √(n/12) on average
where it is. The weights w = √n are then the best to pool it with:

    z = Σ wz / √Σw²           λ = √12 Σ wz / Σw²

With the base d = x - base takes the place of x, and w = √n · std(base) / std(d). λ is in units of the std
before the noise, which without a base is that of the tensor less the noise found: hence 1 - z²/N.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from noisytune_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from noisytune_cli.checkpoint.formats import check_read
from noisytune_cli.checkpoint.quantized import refuse_quantized_models
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.engine.correlation import Correlation, Draw, Suspect, correlate
from noisytune_cli.engine.threads import Progress
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.manifest.locate import manifest_of
from noisytune_cli.manifest.read import RecordedManifest, read_manifest
from noisytune_cli.noise import distributions
from noisytune_cli.noise.devices import open_device
from noisytune_cli.plan.evidence.told import tell_checkpoint
from noisytune_cli.plan.plans import plan_checkpoint
from noisytune_cli.plan.renames import Renaming, Rules, likely_renamings, pair_up
from noisytune_cli.plan.settle import look_at_values, settle_ties
from noisytune_cli.records import NoiseSpec, Step, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: The answer is yes where chance alone would give such a z in one search of a million.
THRESHOLD = 1e-6

#: Half the width of an interval of 95 % in standard errors.
_INTERVAL = 1.959963984540054

_SQRT_12 = math.sqrt(12.0)


@dataclass(frozen=True, slots=True)
class TensorScore:
    """What one tensor says of a seed's noise."""

    name: str
    stream: str
    elements: int
    z: float
    lam: float


@dataclass(frozen=True, slots=True)
class SeedScore:
    """What all tensors say of a seed's noise.

    `distribution` and `renaming` (how names were turned into those of the noise) are those that fit best.
    `lam` lies between `low` and `high` in 95 of 100 cases; `log10_p` is that of p, the chance of such a z
    anywhere in the search where there is no noise. `tensors` are those of a seed that was found.
    """

    seed: int
    found: bool
    distribution: str
    renaming: str
    lam: float
    low: float
    high: float
    z: float
    log10_p: float
    tensors: tuple[TensorScore, ...] = ()

    @property
    def p(self) -> float:
        """The chance, 0.0 where float64 has no number so small."""
        return math.pow(10.0, self.log10_p)


@dataclass(frozen=True, slots=True)
class Detection:
    """The answer: a score for each seed; `tests` counts the noises that were tried."""

    suspect: str
    revision: str | None
    base: str | None
    tensors: int
    elements: int
    tests: int
    seeds: tuple[SeedScore, ...]
    warnings: tuple[str, ...] = ()

    @property
    def found(self) -> bool:
        """Whether the noise of any seed is there."""
        return any(seed.found for seed in self.seeds)

    @property
    def weakest(self) -> float | None:
        """The λ from which noise is rather found than not; None where nothing could be compared."""
        error = min((seed.high - seed.low) / (2 * _INTERVAL) for seed in self.seeds)
        enough = -NormalDist().inv_cdf(THRESHOLD / self.tests / 2)
        return enough * error or None


def detect(
    suspect: str,
    *,
    seeds: Sequence[int] = (),
    base: str | None = None,
    manifest: str | None = None,
    distribution: str | None = None,
    maps: Sequence[tuple[str, str]] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    weights: str | None = None,
    components: Sequence[str] = (),
    revision: str | None = None,
    mmap: bool = False,
    threads: int = 1,
    follow_links: bool = False,
    progress: Progress = lambda nbytes: nullcontext(lambda done: None),
) -> Detection:
    """Look for the noise of `seeds`, or of a manifest's, in `suspect`.

    Names are those of the manifest, else of the base, else the suspect's own; where these find nothing,
    prefixes are tried. `maps` are the user's rules from the suspect's names to those of the noise. Without a
    `distribution` all are tried. Raises UsageError where there is no seed, InputInvalid where there is no
    tensor to look at.
    """
    recorded = None if manifest is None else read_manifest(manifest_of(manifest))
    seeds = seeds_of(seeds, recorded)
    kinds = distributions_of(distribution, recorded)
    with ExitStack() as opened:
        checkpoint = opened.enter_context(
            open_checkpoint(
                suspect,
                weights=weights,
                components=components,
                revision=revision,
                mmap=mmap,
                follow_links=follow_links,
            )
        )
        original = None
        if base is not None:
            original = opened.enter_context(
                open_checkpoint(base, components=components, mmap=mmap, follow_links=follow_links)
            )
        streams, suspects, warnings = _arrange(
            checkpoint, original, recorded, Rules(maps) if maps else None, include, exclude
        )
        streams, suspects = each_once(streams, suspects)
        if not suspects:
            raise InputInvalid(
                "nothing to look at",
                path=suspect,
                why="no tensor of it has the name and shape of one that gets noise",
                next_step="Check --manifest, --base and the filters, or say with --map what names were",
            )
        scores, tests = find_seeds(
            suspects,
            streams,
            seeds,
            kinds,
            renames=recorded is None,
            config=checkpoint.config,
            threads=threads,
            progress=progress,
        )
        check_read((*checkpoint.sources, *(original.sources if original is not None else ())))
        return Detection(
            suspect=checkpoint.id,
            revision=checkpoint.revision,
            base=None if original is None else original.id,
            tensors=len(suspects),
            elements=sum(found.tensor.elements for found in suspects),
            tests=tests,
            seeds=scores,
            warnings=(*checkpoint.warnings, *warnings),
        )


def find_seeds(
    suspects: Sequence[Suspect],
    streams: Sequence[str],
    seeds: Sequence[int],
    kinds: Sequence[str],
    *,
    renames: bool,
    config: Mapping[str, Any] | None,
    threads: int,
    progress: Progress,
) -> tuple[tuple[SeedScore, ...], int]:
    """Look for the noise of each seed, of these distributions, in tensors whose noise has these streams.

    With `renames`, where nothing is found prefixes of the names are tried, as a model of `config` has them.
    Return the score of each seed and how many noises were tried.
    """
    search = _Search(suspects, threads, progress)
    attempts = search.run(streams, kinds, seeds, [Renaming()])
    if renames and not any(_is_significant(a.z, len(attempts)) for a in attempts):
        model_type = (config or {}).get("model_type")
        renamings = likely_renamings(streams, model_type if isinstance(model_type, str) else None)
        attempts += search.run(streams, kinds, seeds, renamings)
    tests = len(attempts)
    best = [_best([a for a in attempts if a.draw.seed == seed], tests) for seed in seeds]
    return tuple(attempt.score(tests, suspects) for attempt in best), tests


def each_once(streams: Sequence[str], suspects: Sequence[Suspect]) -> tuple[list[str], list[Suspect]]:
    """Return the streams, each once, and a tensor for each: that of its own name, else the first.

    Tied names are one parameter: its z would count for as many as it has names, as if they were independent.
    """
    chosen: dict[str, Suspect] = {}
    for stream, suspect in zip(streams, suspects, strict=True):
        if stream not in chosen or suspect.tensor.name == stream:
            chosen[stream] = suspect
    return list(chosen), list(chosen.values())


def seeds_of(seeds: Sequence[int], recorded: RecordedManifest | None) -> list[int]:
    """Return the seeds to look for, each once: those given, else a manifest's; UsageError for none."""
    if not seeds and recorded is None:
        raise UsageError(
            "--seed is missing",
            why="there is noise of 2^64 seeds, and each has to be tried",
            next_step="Give --seed, such as 7 or 0-99, or --manifest=FILE, which knows its own",
        )
    if not seeds and recorded is not None:
        noise = recorded.manifest.noise
        seeds = [term.seed for term in noise.mix] or [noise.seed]
    return list(dict.fromkeys(seeds))


def distributions_of(wanted: str | None, recorded: RecordedManifest | None) -> tuple[str, ...]:
    """Return the distributions to look for: the one given, else a manifest's, else all."""
    if wanted is None:
        return distributions.names() if recorded is None else (recorded.manifest.noise.distribution,)
    if wanted not in distributions.names():
        raise UsageError(
            f"--noise={wanted}",
            why="there is no such distribution",
            next_step=f"Use one of: {', '.join(distributions.names())}",
        )
    return (wanted,)


def _arrange(
    checkpoint: Checkpoint,
    original: Checkpoint | None,
    recorded: RecordedManifest | None,
    rules: Rules | None,
    include: Sequence[str],
    exclude: Sequence[str],
) -> tuple[list[str], list[Suspect], list[str]]:
    """Return the streams, the tensors to look for them in, and what the user should know."""
    files = {file.name: file for file in checkpoint.sources}
    warnings = []
    try:
        refuse_quantized_models(checkpoint.models, metadata=checkpoint.metadata, path=checkpoint.id)
    except InputInvalid as error:
        warnings.append(f"only what is stored as floats is looked at: {error.why}")
    floats = [tensor for tensor in checkpoint.tensors if tensor.dtype in FLOAT_DTYPES]
    if original is None and recorded is None:
        streams = planned_streams(checkpoint, include, exclude)
        mapped = rules.apply(streams) if rules else {}
        chosen = [tensor for tensor in floats if tensor.name in streams]
        names = [mapped.get(tensor.name, streams[tensor.name]) for tensor in chosen]
        return names, [Suspect(tensor, files[tensor.file]) for tensor in chosen], warnings
    noised: dict[str, tuple[TensorSpec, str]] = {}
    bases = {}
    if original is not None:
        homes = {file.name: file for file in original.sources}
        streams = planned_streams(original, include, exclude)
        bases = {tensor.name: (tensor, homes[tensor.file]) for tensor in original.tensors}
        noised = {name: (bases[name][0], stream) for name, stream in streams.items()}
    if recorded is not None:
        steps = perturbed_steps(recorded)
        noised = {step.tensor.name: (step.tensor, step.stream) for step in steps}
    pairing = pair_up(floats, [tensor for tensor, _ in noised.values()], rules)
    if pairing.renaming != Renaming():
        warnings.append(f"names of the noise are those of the checkpoint {pairing.renaming}")
    names, suspects = [], []
    for pair in pairing.pairs:
        before = bases.get(pair.b.name)
        if pair.a.shape == pair.b.shape and (original is None or _is_like(before, pair.a)):
            names.append(noised[pair.b.name][1])
            suspects.append(Suspect(pair.a, files[pair.a.file], before))
    return names, suspects, warnings


def _is_like(before: tuple[TensorSpec, Any] | None, tensor: TensorSpec) -> bool:
    """Tell whether a tensor of the base is there, and can be subtracted from this one."""
    return before is not None and before[0].shape == tensor.shape and before[0].dtype in FLOAT_DTYPES


def perturbed_steps(recorded: RecordedManifest) -> list[Step]:
    """Return the steps of the tensors that a manifest says have noise."""
    return [receipt.step for receipt in recorded.manifest.receipts if receipt.action == "perturb"]


def planned_streams(
    checkpoint: Checkpoint, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, str]:
    """Return the stream of each tensor that perturb would add noise to."""
    noise = NoiseSpec(include=tuple(include), exclude=tuple(exclude))
    files = {file.name: file for file in checkpoint.sources}
    told = tell_checkpoint(checkpoint, "auto")
    told = look_at_values(plan_checkpoint(checkpoint, noise, told), told, files)
    (plan,) = settle_ties([plan_checkpoint(checkpoint, noise, told)], files)
    return {step.tensor.name: step.stream for step in plan.steps if step.action == "perturb"}


@dataclass(frozen=True)
class _Attempt:
    """A noise that was looked for: how far each tensor goes with it, and pooled.

    `z` is pooled, `each` is [tensors], and `weights` are what it was pooled with; `known` says that the
    scale is the base's.
    """

    draw: Draw
    renaming: Renaming
    each: NDArray[np.float64]
    weights: NDArray[np.float64]
    elements: int
    known: bool

    @property
    def z(self) -> float:
        """Return the pooled z, 0 where no tensor could be used."""
        power = float(np.square(self.weights).sum())
        return float((self.weights * self.each).sum()) / math.sqrt(power) if power else 0.0

    def score(self, tests: int, suspects: Sequence[Suspect]) -> SeedScore:
        """Return the score where so many noises were tried."""
        power, z = float(np.square(self.weights).sum()), self.z
        lam = error = 0.0
        if power:
            explained = min(z * z / self.elements, 1.0)
            left = math.sqrt(1.0 - explained)
            lam, error = _SQRT_12 * z / math.sqrt(power), _SQRT_12 / math.sqrt(power)
            if self.known:
                error *= left
            elif left:
                lam /= left
        found = _is_significant(z, tests)
        return SeedScore(
            seed=self.draw.seed,
            found=found,
            distribution=self.draw.distribution,
            renaming=str(self.renaming),
            lam=lam,
            low=lam - _INTERVAL * error,
            high=lam + _INTERVAL * error,
            z=z,
            log10_p=_log10_p(z, tests),
            tensors=tuple(self._tensors(suspects)) if found else (),
        )

    def _tensors(self, suspects: Sequence[Suspect]) -> Iterable[TensorScore]:
        for index, suspect in enumerate(suspects):
            z, weight = float(self.each[index]), float(self.weights[index])
            if weight:
                tensor = suspect.tensor
                yield TensorScore(
                    tensor.name, self.draw.streams[index], tensor.elements, z, _SQRT_12 * z / weight
                )


class _Search:
    """The tensors, to be looked through for noises."""

    def __init__(self, suspects: Sequence[Suspect], threads: int, progress: Progress) -> None:
        self._suspects, self._threads, self._progress = suspects, threads, progress
        self._tried: set[tuple[str, ...]] = set()

    def run(
        self,
        streams: Sequence[str],
        kinds: Sequence[str],
        seeds: Sequence[int],
        renamings: Sequence[Renaming],
    ) -> list[_Attempt]:
        """Look for the noise of each distribution, seed and renaming; names that were tried are left out."""
        wanted: list[tuple[Renaming, Draw]] = []
        for renaming in renamings:
            names = tuple(map(renaming.apply, streams))
            if names not in self._tried:
                self._tried.add(names)
                wanted += [(renaming, Draw(kind, seed, names)) for kind in kinds for seed in seeds]
        if not wanted:
            return []
        tensors = [suspect.tensor for suspect in self._suspects]
        tensors += [suspect.base[0] for suspect in self._suspects if suspect.base is not None]
        with self._progress(sum(tensor.nbytes for tensor in tensors)) as report:
            found = correlate(
                self._suspects,
                [draw for _, draw in wanted],
                open_device("cpu"),
                threads=self._threads,
                progress=report,
            )
        return [self._attempt(found, index, *one) for index, one in enumerate(wanted)]

    def _attempt(self, found: Sequence[Correlation], index: int, renaming: Renaming, draw: Draw) -> _Attempt:
        """Return what one noise has in common with all tensors; a constant or broken one has no weight."""
        # The noise's std is λ std / √12 whatever the distribution, so √12 a times that of c is 1.
        unit = _SQRT_12 * float(distributions.load(draw.distribution).amplitude(1.0, 1.0))
        each, weights = np.zeros(len(found)), np.zeros(len(found))
        elements = 0
        for at, one in enumerate(found):
            dot, squares = float(one.dots[index]), float(one.squares[index])
            if math.isfinite(one.std * one.scale * dot) and one.std * one.scale * squares > 0:
                each[at] = dot / (one.std * math.sqrt(squares))
                weights[at] = unit * math.sqrt(squares) * one.scale / one.std
                elements += one.elements
        return _Attempt(draw, renaming, each, weights, elements, self._suspects[0].base is not None)


def _best(attempts: Sequence[_Attempt], tests: int) -> _Attempt:
    """Return the attempt with the largest z; where none says yes, of those with the names as they are."""
    best = max(attempts, key=lambda attempt: abs(attempt.z))
    if _is_significant(best.z, tests):
        return best
    plain = [attempt for attempt in attempts if attempt.renaming == Renaming()]
    return max(plain, key=lambda attempt: abs(attempt.z))


def _is_significant(z: float, tests: int) -> bool:
    return _log10_p(z, tests) < math.log10(THRESHOLD)


def _log10_p(z: float, tests: int) -> float:
    """Return log10 of the chance that any of `tests` standard normal numbers is as far from 0 as z."""
    x = abs(z) / math.sqrt(2.0)
    if x < 20.0:
        p = math.erfc(x)
        one = math.log10(p)
    else:  # erfc(x) = exp(-x²) / (x √π) to a part in 800
        one = -(x * x + math.log(x * math.sqrt(math.pi))) / math.log(10.0)
    return min(0.0, one + math.log10(tests))

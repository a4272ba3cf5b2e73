"""Which runs a study consists of: method × λ × noise × scope × share × seed, each with a stable key.

Every method gets the same seeds and the same rows, so that runs can be compared in pairs. Seeds are the
outermost loop: whatever time a study is given, what is finished can be compared. A run's key is a digest of
what tells it from the others in its study; what all of them share is the study's settings.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from noisytune_cli.errors import UsageError
from noisytune_cli.study.combination import FLAGS, combine, drawn_seeds, draws
from noisytune_cli.study.methods import Value
from noisytune_cli.study.settings import Recipe


@dataclass(frozen=True)
class Run:
    """One finetuning: `lam`, `noise` and `scope` are noisytune's, and None where it takes no part.

    `options` holds every option of the methods in force, by full name. `seed` numbers the pair; the other
    seeds are what is drawn with. `share` is that of the training rows.
    """

    key: str
    method: str
    lam: float | None
    noise: str | None
    scope: str | None
    options: Mapping[str, Value]
    share: float
    seed: int
    init_seed: int
    order_seed: int
    noise_seed: int

    def record(self) -> dict[str, Any]:
        """Return the run as the study's files hold it, λ under its own name."""
        fields = asdict(self)
        return {("lambda" if name == "lam" else name): value for name, value in fields.items()}


@dataclass(frozen=True)
class Seeds:
    """The pairs' numbers, and the seeds that are the same for all of them where they are given."""

    pairs: Sequence[int]
    init: int | None = None
    order: int | None = None
    noise: int | None = None


def plan_runs(
    methods: Iterable[str],
    *,
    lambdas: Sequence[float],
    noises: Sequence[str],
    scopes: Sequence[str],
    shares: Sequence[float],
    seeds: Seeds,
    settings: Mapping[str, Value],
) -> list[Run]:
    """Return the runs in the order in which they are carried out, each once.

    `settings` are methods' options by full name. UsageError for methods that do not go together or an
    option out of range, before anything is trained.
    """
    kinds = []
    for method in methods:
        grid: list[dict[str, Value]] = [{}]
        if "noisytune" in method.split("+"):
            grid = [
                {"noisytune.lambda": lam, "noisytune.noise": noise, "noisytune.scope": scope}
                for noise in noises
                for scope in scopes
                for lam in lambdas
            ]
        kinds += [combine(method, {**settings, **own}) for own in grid]
    runs: dict[str, Run] = {}
    for seed in seeds.pairs:
        for share in shares:
            for kind in kinds:
                run = _run(kind.name, kind.options, share, seed, seeds)
                runs.setdefault(run.key, run)
    return list(runs.values())


def _run(method: str, options: Mapping[str, Value], share: float, seed: int, seeds: Seeds) -> Run:
    """Return a run with its key."""
    lam = options.get("noisytune.lambda")
    noise, scope = (options.get(f"noisytune.{name}") for name in ("noise", "scope"))
    own = {k: v for k, v in options.items() if k not in FLAGS}
    told = {
        "method": method,
        "lam": None if lam is None else float(lam),
        "noise": None if noise is None else str(noise),
        "scope": None if scope is None else str(scope),
        "options": dict(sorted(own.items())),
        "share": share,
        "seed": seed,
        "init_seed": seed if seeds.init is None else seeds.init,
        "order_seed": seed if seeds.order is None else seeds.order,
        "noise_seed": seed if seeds.noise is None else seeds.noise,
    }
    digest = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()
    return Run(key=f"{method}-{seed}-{digest}", **told)  # type: ignore[arg-type]


def drawn_from(run: Mapping[str, Any], *, regression: bool, fresh: bool) -> str:
    """Return what a run's numbers follow from, as text: runs of one study in which it is the same are one.

    `run` is a record; `fresh` says whether anything is drawn from the seed of initialisation.
    """
    seeds = drawn_seeds(fresh=fresh, noise=draws(run["method"], regression=regression))
    wanted = ("method", "lambda", "noise", "scope", "options", "share", *seeds)
    return json.dumps({name: run[name] for name in wanted}, sort_keys=True)


@dataclass(frozen=True)
class Split:
    """Places in the file of training rows: those trained on, and those that λ is chosen on."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]

    def share(self, share: float) -> tuple[int, ...]:
        """Return the first `share` of the rows trained on: a smaller share lies within every larger one."""
        return self.train[: max(1, round(share * len(self.train)))]

    def steps(self, share: float, recipe: Recipe) -> int:
        """Return how many optimizer steps a run on a share of the rows takes."""
        return recipe.epochs * math.ceil(len(self.share(share)) / recipe.batch_size)


def split_rows(rows: int, *, train_rows: int | None, held_out: int | None, seed: int) -> Split:
    """Return a split of the file's rows, drawn with `seed`; the same for all runs of a study.

    `held_out` rows are taken first (None: 500, or a fifth of the rows where that is less), then
    `train_rows` (None: all that are left). UsageError where there are not so many.
    """
    wanted = min(500, rows // 5) if held_out is None else held_out
    left = rows - wanted
    taken = left if train_rows is None else train_rows
    if taken > left or left < 1:
        raise UsageError(
            f"--train-rows {taken} with --held-out {wanted}",
            why=f"the training file has {rows} rows",
            next_step="Ask for fewer of them",
        )
    order = [int(place) for place in np.random.Generator(np.random.PCG64(seed)).permutation(rows)]
    return Split(train=tuple(order[wanted : wanted + taken]), held_out=tuple(order[:wanted]))

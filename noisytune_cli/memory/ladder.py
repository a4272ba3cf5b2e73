"""A ladder of noise: how a model's score falls as σ grows, over several seeds.

Noise lowers what a model can do; where it raises a score, the model may have been holding back (Tice et al.,
"Noise injection reveals hidden capabilities of sandbagging language models", arXiv 2412.01784).
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from noisytune_cli.errors import UsageError
from noisytune_cli.memory.population import Population
from noisytune_cli.plan.arguments import make_spec, reusable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

#: Okabe and Ito's blue, and a grey for what is not noised.
_BLUE, _GREY = "#0072B2", "#8c8c8c"


class Ladder(list[dict[str, Any]]):
    """Scores by strength and seed, a record each, the unperturbed model's first: `pandas.DataFrame(ladder)`.

    A record has the strength (`sigma`, or `lam`), `seed` (None without noise), and `score`, or what
    `evaluate` named.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = (), strength: str = "sigma") -> None:
        """Take the records, whose strengths have this name."""
        super().__init__(rows)
        self.strength = strength

    def figure(self, score: str | None = None, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw a score (the first, unless it is named) against the strength, and save it to `path` if given.

        A line joins the means over seeds, the band is from the lowest to the highest, a dot one seed.
        UsageError where matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UsageError(
                "no figure of the ladder",
                why="matplotlib is not installed",
                next_step="Install it (pip install matplotlib), or draw from the records",
            ) from error
        names = [key for key in (self[0] if self else {}) if key not in (self.strength, "seed")]
        if not self or (score is not None and score not in names):
            raise UsageError(
                f"figure of {score!r}",
                why=f"the ladder has {', '.join(names) or 'no record'}",
                next_step="Name one of its scores",
            )
        score = score or names[0]
        by_strength: dict[float, list[float]] = {}
        for row in self:
            by_strength.setdefault(row[self.strength], []).append(float(row[score]))
        places = sorted(by_strength)
        figure = Figure(figsize=(4.6, 3.2), layout="constrained")
        axes = figure.subplots()
        lows, highs = ([pick(by_strength[place]) for place in places] for pick in (min, max))
        axes.fill_between(places, lows, highs, color=_BLUE, alpha=0.2, linewidth=0)
        means = [statistics.fmean(by_strength[place]) for place in places]
        axes.plot(places, means, color=_BLUE, marker="o", markersize=4)
        dots = [(place, value) for place in places for value in by_strength[place]]
        axes.plot(*zip(*dots, strict=True), ".", color=_BLUE, alpha=0.4, markersize=4)
        axes.axhline(float(self[0][score]), color=_GREY, linewidth=0.8, zorder=0)
        axes.set_xlabel("σ" if self.strength == "sigma" else "λ")
        axes.set_ylabel(score)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def ladder(
    model: nn.Module | Mapping[str, Tensor],
    evaluate: Callable[[Any], Any],
    *,
    sigma: Iterable[float] | None = None,
    lam: Iterable[float] | None = None,
    seeds: Iterable[int] = range(5),
    **options: Any,
) -> Ladder:
    """Score a model without noise, and with the noise of each strength and seed; return the table.

    `evaluate(model)` returns a number, or a dictionary of several. The strengths are `sigma` or `lam`; one of
    0 is the unperturbed model, which is scored once, and first. `options` are `Population`'s and its `set`'s.
    Afterwards the model has its own bits again, after an exception too; its buffers and its mode (train or
    eval) are the caller's.
    """
    if (sigma is None) == (lam is None):
        raise UsageError(
            "ladder: sigma= or lam=",
            why="one of them, a list, says how strong the noise is",
            next_step="Give for example sigma=[0.001, 0.002]",
        )
    strength = "lam" if sigma is None else "sigma"
    given = lam if sigma is None else sigma
    strengths, every = _listed(strength, given), _listed("seeds", seeds)
    noises = [(value, seed) for value in strengths for seed in (every if value else ())]
    which = {key: options.pop(key) for key in _OF_THE_POPULATION & options.keys()}
    options = reusable(options)
    table = Ladder(strength=strength)
    with Population(model, **which) as population:
        # An evaluation may take hours: what is wrong with any of the noises is said before the first.
        for value, seed in noises[:1]:
            population.set(**{strength: value}, seed=seed, **options)
            population.restore()
        for value, seed in noises:
            make_spec(**{strength: value}, seed=seed, **options)
        table.append({strength: 0.0, "seed": None, **_scores(evaluate(model))})
        for value, seed in noises:
            population.set(**{strength: value}, seed=seed, **options)
            table.append({strength: float(value), "seed": int(seed), **_scores(evaluate(model))})
    return table


#: The options that say which parameters get noise, and not which noise.
_OF_THE_POPULATION = frozenset(
    ("host", "include", "exclude", "names", "frozen", "fresh", "fresh_names", "config", "threads")
)


def _listed(option: str, given: Any) -> list[Any]:
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise UsageError(
            f"{option}={given!r}", why="it is no list of numbers", next_step=f"Give {option}=[…], a list"
        )
    return list(dict.fromkeys(given))


def _scores(found: Any) -> dict[str, Any]:
    """Return the scores of one evaluation; UsageError for none, as of a function that forgot its return."""
    if found is None:
        raise UsageError(
            "evaluate",
            why="it returned None",
            next_step="Let it return a number, or a dictionary of several",
        )
    return dict(found) if isinstance(found, Mapping) else {"score": found}

"""From results to report.md: what came out, what that does and does not show, and how it was run.

Findings come first, each with its interval, its p-value and the words that these allow. What a study was not
asked for is listed at the end, so that nobody takes an absent figure for an absent effect. What lies beside
the scores (change of the parameters, probe, cost, settings) is in `appendix`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from noisytune_cli.study.report import appendix, wording
from noisytune_cli.study.report.markdown import bullets, image, table, text
from noisytune_cli.study.report.plots import PLOTS
from noisytune_cli.study.report.results import Entry, Results, choice_counted, whole
from noisytune_cli.study.report.wording import NO_EVIDENCE


def render(results: Results, drawn: Collection[str]) -> str:
    """Return the report in Markdown; `drawn` names the figures that lie in `figures/`."""
    study = results["study"]
    figures = {name: f"figures/{name}.png" for name in drawn}
    parts = [
        [f"# {text(study['model']['id'])} on {text(study['task'])}"],
        _missing(results),
        _findings(results),
        [f"**{told}.**" for told in caveats(results, text)],
        _methods(results, figures),
        _lambdas(results, figures),
        _noises(results, figures),
        _combinations(results, figures),
        _shares(results, figures),
        appendix.drift(results, figures.get("drift")),
        appendix.probe(results),
        appendix.cost(results),
        appendix.settings(results),
        _absent(results, drawn),
    ]
    return "\n\n".join("\n\n".join(part) for part in parts if part) + "\n"


def _missing(results: Results) -> list[str]:
    if not results["missing"]:
        return []

    def condition(entry: Entry) -> str:
        lam = "" if entry["lambda"] is None else f", λ {wording.strength(entry['lambda'])}"
        share = "" if entry["share"] == 1.0 else f", {100 * entry['share']:g} % of the rows"
        return f"{text(entry['name'])}{lam}{share}: seed {', '.join(map(str, entry['seeds']))}"

    return [
        f"**This study is not finished: {results['finished']} of {results['planned']} runs are done.** "
        "What follows is about those. Missing:",
        bullets(map(condition, results["missing"])),
    ]


def _findings(results: Results) -> list[str]:
    """Return what the report comes to: the findings on noise, all evidence, and how little few seeds show."""
    families = [whole(results, "comparisons"), whole(results, "combinations")]
    compared = [comparison for family in families for comparison in family]
    if not compared:
        return []
    told = [c for c in compared if c["lambda"] is not None or c["verdict"] != NO_EVIDENCE]
    rest = len(compared) - len(told)
    lines = [wording.finding({**c, **{k: text(c[k]) for k in ("name", "against")}}) for c in told]
    if rest:
        lines.append(f"{wording.count(rest, 'other comparison')}: {NO_EVIDENCE}.")
    metric = wording.METRICS[results["study"]["primary"]]
    notes = [
        f"Differences are of the {metric} × 100 on the dev rows, means over paired seeds with their 95 % "
        f"interval. {_choice(results)}"
    ]
    for family, of in zip(families, ("with plain", "of noise added to other methods"), strict=True):
        if weak := wording.power(family):
            notes.append(f"**Comparisons {of}: {weak}**")
    return [bullets(lines), *notes]


def _choice(results: Results) -> str:
    """Return where λ was chosen, and whether p counts in what luck has chosen."""
    found = [choice_counted(results, e) for e in (*results["comparisons"], *results["combinations"])]
    return wording.choice(results["lambda_chosen_on"], [counted for counted in found if counted is not None])


def caveats(results: Results, shown: Callable[[str], str]) -> list[str]:
    """Return what takes from the scores' worth: nothing learnt, noise or rows there before, diverged runs.

    `shown` makes a name safe where it is to be read.
    """
    named = ({**entry, "name": shown(entry["name"])} for entry in results["conditions"] if entry["diverged"])
    study = results["study"]
    told = [*unlearnt(results), *wording.earlier(study), *wording.other_order(study, shown)]
    told += wording.repeated(study)
    return [*told, *map(wording.diverged, named)]


def unlearnt(results: Results) -> list[str]:
    """Return for each share of the rows where plain has learnt nothing what that means."""
    study = results["study"]
    several = len({entry["share"] for entry in results["conditions"]}) > 1
    return [
        (f"with {entry['train_rows']:,} rows " if several else "")
        + wording.unlearnt(study["primary"], entry["dev"][study["primary"]], study["constant_score"])
        for entry in sorted(results["conditions"], key=lambda entry: entry["train_rows"])
        if entry["method"] == "plain" and entry["above_constant"] is False
    ]


def _methods(results: Results, figures: Mapping[str, str]) -> list[str]:
    reported = [entry for entry in whole(results) if entry["reported"]]
    if not reported:
        return ["No run is finished."]
    compared = whole(results, "comparisons")
    lines = ["## Methods", _score_table(results, reported), *_ensembles(results)]
    lines += _figure(figures, "methods", "Scores, and paired differences from plain", reported)
    if compared:
        lines.append(
            "Pairs share the seeds of initialisation, data order and noise. `p` is that of the two-sided "
            "sign-flip permutation test over the pairs; `p (Holm)` is adjusted for the "
            f"{wording.count(compared[0]['comparisons'], 'comparison')} with plain. Evidence is an adjusted "
            "p below 0.05. Intervals are percentile bootstrap intervals of the mean, which few seeds make "
            "too narrow: of five normal differences they hold the true mean 83 times in 100, not 95. Both "
            "are about other seeds on these very rows, not about other rows."
        )
    if apart := [entry for entry in compared if entry["left_out"]]:
        uneven = (
            f"{text(entry['name'])} over {wording.count(len(entry['values']), 'seed')}, "
            f"{entry['left_out']} left out"
            for entry in apart
        )
        lines.append(f"Compared over the seeds that plain has too: {'; '.join(uneven)}.")
    return lines


def _score_table(results: Results, reported: Sequence[Entry], *, rows_too: bool = False) -> str:
    """Return scores and comparisons with plain, a condition a row."""
    primary = results["study"]["primary"]
    others = [metric for metric in reported[0]["dev"] if metric != primary]
    compared = {(c["name"], c["share"]): c for c in results["comparisons"]}
    rows = [
        [
            *([f"{entry['train_rows']:,}"] if rows_too else []),
            text(entry["name"]),
            wording.strength(entry["lambda"]),
            str(len(entry["seeds"])),
            *(wording.spread(entry["dev"][metric]) for metric in (primary, *others)),
            *_comparison_cells(compared.get((entry["name"], entry["share"]))),
        ]
        for entry in reported
    ]
    header = ["method", "λ", "seeds", *(wording.METRICS[metric] for metric in (primary, *others))]
    if rows_too:
        header.insert(0, "training rows")
    return table([*header, "difference from plain", "higher in", "p", "p (Holm)", "verdict"], rows)


def _comparison_cells(comparison: Entry | None) -> list[str]:
    if comparison is None:
        return [""] * 5
    return [
        wording.difference(comparison),
        f"{comparison['higher']} of {len(comparison['values'])}",
        wording.probability(comparison["p"]),
        wording.probability(comparison["p_holm"]),
        comparison["verdict"],
    ]


def _ensembles(results: Results) -> list[str]:
    primary = results["study"]["primary"]
    how = "the mean" if results["study"]["regression"] else "the majority vote"
    return [
        f"The ensemble of {entry['members']} plain runs ({how} of their predictions) scores "
        f"**{wording.score(entry['dev'][primary])}**, and {wording.score(min(entry['leave_one_out']))} to "
        f"{wording.score(max(entry['leave_one_out']))} with one of them left out. It is one number, so it "
        "has no p-value."
        for entry in whole(results, "ensembles")
    ]


def _lambdas(results: Results, figures: Mapping[str, str]) -> list[str]:
    primary = results["study"]["primary"]
    searched = [entry for entry in whole(results) if entry["lambda_chosen_on"] != "given"]
    if not searched:
        return []
    rows = [
        [
            text(entry["name"]),
            wording.strength(entry["lambda"]) + " (chosen)" * (entry in searched and entry["reported"]),
            str(len(entry["seeds"])),
            wording.spread(entry["held_out"][primary]) if entry["held_out"] else "",
            wording.spread(entry["dev"][primary]),
        ]
        for entry in [*(e for e in whole(results) if e["method"] == "plain"), *searched]
    ]
    metric = wording.METRICS[primary]
    return [
        "## λ",
        f"{_choice(results)} Of equal ones the smallest is taken.",
        table(["method", "λ", "seeds", f"{metric}, held out", f"{metric}, dev"], rows),
        *_figure(figures, "lambda", "λ against score; λ 0 is plain", searched),
    ]


def _noises(results: Results, figures: Mapping[str, str]) -> list[str]:
    if "noise" not in figures:
        return []
    entries = [entry for entry in whole(results) if entry["reported"] and entry["method"] == "noisytune"]
    caption = "Kinds and scopes of noise, each at its λ, and paired differences from plain"
    return ["## Kinds and scopes of noise", *_figure(figures, "noise", caption, entries)]


def _combinations(results: Results, figures: Mapping[str, str]) -> list[str]:
    added = whole(results, "combinations")
    if not added:
        return []
    rows = [
        [text(c["against"]), text(c["name"]), wording.strength(c["lambda"]), *_comparison_cells(c)]
        for c in added
    ]
    header = ["method", "with noise", "λ", "difference", "higher in", "p", "p (Holm)", "verdict"]
    return [
        "## Noise added to other methods",
        "Each method with noise beside the same method without, `p (Holm)` adjusted for the "
        f"{wording.count(added[0]['comparisons'], 'comparison')} of this table.",
        table(header, rows),
        *_figure(figures, "combinations", "Methods with and without noise, and what the noise adds", added),
    ]


def _shares(results: Results, figures: Mapping[str, str]) -> list[str]:
    if "share" not in figures:
        return []
    smaller = {e["name"] for e in results["conditions"] if e not in whole(results)}
    entries = [e for e in results["conditions"] if e["reported"] and e["name"] in smaller]
    entries.sort(key=lambda entry: entry["train_rows"])
    return [
        "## Share of the training data",
        "`p (Holm)` is adjusted for the comparisons at the same share.",
        _score_table(results, entries, rows_too=True),
        *_figure(figures, "share", "Training rows against score", entries),
    ]


def _absent(results: Results, drawn: Collection[str]) -> list[str]:
    absent = [needs for name, (_, needs) in PLOTS.items() if name not in drawn]
    if not any(entry["probe"] for entry in results["conditions"]):
        absent.append("probe of representational collapse: --probe")
    if not absent:
        return []
    return ["## Not in this study", "No finished runs show these; each names what would.", bullets(absent)]


def _figure(figures: Mapping[str, str], name: str, caption: str, entries: Iterable[Entry]) -> list[str]:
    """Return a figure with its caption and the number of seeds that its entries have."""
    if name not in figures:
        return []
    numbers = sorted({len(entry["seeds"]) for entry in entries})
    seeds = " to ".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))
    return [image(figures[name], f"{caption} (n = {seeds} seeds; bars: 95 % bootstrap intervals)")]

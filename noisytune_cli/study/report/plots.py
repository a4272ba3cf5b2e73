"""What each figure of a study shows: one function each, from results to axes; None without data for it.

Scores are times 100. A large mark is a mean over seeds, a bar its 95 % bootstrap interval, a small dot one
seed. The colours are Okabe and Ito's, which all common kinds of colour vision tell apart; marks differ too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from noisytune_cli.escape import escape
from noisytune_cli.study.report import wording
from noisytune_cli.study.report.results import Entry, Results, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito (2008): black is plain's.
_BLACK, _COLOURS = "#000000", ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKS = ("s", "^", "D", "v", "P", "X")
_GREY = "#8c8c8c"

#: Inches: a figure as wide as a page's text, and one as wide as a column.
_PAGE, _COLUMN, _ROW = 7.0, 4.6, 0.27


def methods(results: Results) -> Figure | None:
    """Draw every method's scores, and beside them the paired differences from plain."""
    entries = [entry for entry in whole(results) if entry["reported"]]
    compared = whole(results, "comparisons")
    if not compared:
        return None
    return _rows(results, entries, compared, whole(results, "ensembles"))


def lambdas(results: Results) -> Figure | None:
    """Draw the score against λ, on the dev and the held-out rows (the NoisyTune paper's figure 6)."""
    primary = results["study"]["primary"]
    entries = [entry for entry in whole(results) if entry["lambda_chosen_on"] != "given"]
    if not entries:
        return None
    lines: dict[str, list[Entry]] = {}
    for entry in entries:
        lines.setdefault(entry["name"], []).append(entry)
    figure, axes = _single(results)
    for plain in (entry for entry in whole(results) if entry["method"] == "plain"):
        _line(axes, [0.0], [plain["dev"][primary]], _BLACK, "o", "plain")
        axes.axhline(100 * plain["dev"][primary]["mean"], color=_GREY, linewidth=0.8, zorder=0)
    for (name, colour, mark), shift in zip(_styles(lines), _shifts(len(lines)), strict=True):
        line = lines[name]
        places = [entry["lambda"] + shift * max(e["lambda"] for e in entries) for entry in line]
        if all(entry["held_out"] for entry in line):
            means = [100 * entry["held_out"][primary]["mean"] for entry in line]
            axes.plot(places, means, "--", color=colour, alpha=0.6)
        _line(axes, places, [entry["dev"][primary] for entry in line], colour, mark, _label(name))
        for place, entry in zip(places, line, strict=True):
            if entry["reported"]:
                at = (place, 100 * entry["dev"][primary]["mean"])
                axes.plot(*at, "o", markersize=13, markerfacecolor="none", markeredgecolor=colour)
    if any(entry["held_out"] for entry in entries):
        axes.plot([], [], "--", color=_GREY, label="mean on the held-out rows")
    axes.set_xticks(sorted({0.0, *(entry["lambda"] for entry in entries)}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("λ (width of the noise in units of std; ringed: chosen)")
    _legend(figure, axes)
    return figure


def noises(results: Results) -> Figure | None:
    """Draw plain beside each kind and scope of noise (figure 2)."""
    entries = [e for e in whole(results) if e["reported"] and e["method"] in ("plain", "noisytune")]
    if len({(entry["noise"], entry["scope"]) for entry in entries if entry["noise"]}) < 2:
        return None
    names = {entry["name"] for entry in entries}
    return _rows(results, entries, [c for c in whole(results, "comparisons") if c["name"] in names], [])


def combinations(results: Results) -> Figure | None:
    """Draw each method with and without noise, and what the noise adds (figure 3)."""
    primary = results["study"]["primary"]
    scores = {entry["name"]: entry["dev"][primary] for entry in whole(results) if entry["reported"]}
    noisy = {entry["name"] for entry in whole(results) if entry["method"] == "noisytune"}
    added = whole(results, "combinations")
    if not added:
        return None
    compared = [*(c for c in whole(results, "comparisons") if c["name"] in noisy), *added]
    several = len({comparison["against"] for comparison in compared}) < len(compared)
    figure, left, right = _double(results, len(compared))
    for row, comparison in enumerate(compared):
        for name, shift, colour, mark in (
            (comparison["against"], -0.14, _BLACK, "o"),
            (comparison["name"], 0.14, _COLOURS[0], "s"),
        ):
            _bar(left, scores[name], row + shift, colour, mark)
        _bar(right, comparison, row, _COLOURS[0], "s", seeds=True)
    labels = [
        f"{_label(c['name'])}\nagainst {_label(c['against'])}" if several else _label(c["against"])
        for c in compared
    ]
    _name_rows(left, labels)
    right.set_xlabel("difference with noise")
    left.plot([], [], "o", color=_BLACK, label="without noise")
    left.plot([], [], "s", color=_COLOURS[0], label="with noise")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def shares(results: Results) -> Figure | None:
    """Draw the score against the number of training rows (figure 4)."""
    primary = results["study"]["primary"]
    lines: dict[str, list[Entry]] = {}
    for entry in sorted(results["conditions"], key=lambda entry: entry["train_rows"]):
        if entry["reported"]:
            lines.setdefault(entry["name"], []).append(entry)
    lines = {name: line for name, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    figure, axes = _single(results)
    largest = max(entry["train_rows"] for line in lines.values() for entry in line)
    for (name, colour, mark), shift in zip(_styles(lines), _shifts(len(lines)), strict=True):
        places = [entry["train_rows"] + shift * largest for entry in lines[name]]
        _line(axes, places, [entry["dev"][primary] for entry in lines[name]], colour, mark, _label(name))
    axes.set_xticks(sorted({entry["train_rows"] for line in lines.values() for entry in line}))
    axes.set_xlabel("training rows")
    _legend(figure, axes)
    return figure


def drift(results: Results) -> Figure | None:
    """Draw the relative L1 change of each kind of parameter with and without noise (figure 5), both ways."""
    measured = [entry for entry in whole(results) if entry["reported"] and entry["drift"]]
    noise = [entry for entry in measured if entry["method"] in ("plain", "noisytune")]
    found = noise if len(noise) > 1 else measured
    if not found:
        return None
    entries = found[: len(_COLOURS)]
    kinds = list(dict.fromkeys(kind for entry in entries for kind in entry["drift"]))
    bars = "lines: std over seeds" + "; the report has all methods" * (len(found) > len(entries))
    figure, left, right = _double(results, len(kinds) * (1 + len(entries)) / 2, bars)
    panels = (
        (left, "norm_change", "|‖w₁‖₁ − ‖w₀‖₁| / ‖w₀‖₁ (%)", "change of the norm"),
        (right, "change_norm", "‖w₁ − w₀‖₁ / ‖w₀‖₁ (%)", "norm of the change"),
    )
    height = 0.8 / len(entries)
    for axes, measure, unit, title in panels:
        for place, (name, colour, _) in enumerate(_styles(entry["name"] for entry in entries)):
            own = {row: entries[place]["drift"].get(kind) for row, kind in enumerate(kinds)}
            samples = [changes[measure] for changes in own.values() if changes]
            shift = (place - (len(entries) - 1) / 2) * height
            at = [row + shift for row, changes in own.items() if changes]
            means = [100 * sample["mean"] for sample in samples]
            errors = [100 * (sample["std"] or 0.0) for sample in samples]
            axes.barh(at, means, height, xerr=errors, color=colour, label=_label(name), error_kw=_ERROR)
        axes.set_xlabel(unit)
        axes.set_title(title)
        axes.set_xlim(left=0)
    _name_rows(left, kinds)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def over_tasks(summary: Results) -> Figure | None:
    """Draw each method's paired differences from plain on every task, and its mean over them."""
    from matplotlib.figure import Figure

    methods = summary["methods"]
    if not methods:
        return None
    rows = [entry for method in methods for entry in (*method["tasks"], method)]
    figure = Figure(figsize=(_PAGE, 1.1 + _ROW * max(len(rows), 3)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=_GREY, linewidth=0.8, zorder=0)
    for row, entry in enumerate(rows):
        colour, mark = (_COLOURS[0], "s") if "task" in entry else (_BLACK, "D")
        _bar(axes, entry, row, colour, mark, seeds=True)
    several = len(methods) > 1

    def label(entry: Entry, method: Entry) -> str:
        own = f"{method['name']}, " if several else ""
        return _label(f"{own}{entry.get('task', 'mean over tasks')} (n = {len(entry['values'])})")

    _name_rows(axes, [label(entry, method) for method in methods for entry in (*method["tasks"], method)])
    axes.set_xlabel("paired difference from plain, score × 100")
    figure.supxlabel(f"{_label(summary['model']['id'])}; {_INTERVALS}", fontsize=7, color="#555555")
    return figure


#: Every figure by its file's name, with what a study needs to have it, in the order of the report.
PLOTS = {
    "methods": (methods, "methods beside plain: plain and another --method"),
    "lambda": (lambdas, "λ against score: several --lambda"),
    "noise": (noises, "kinds and scopes of noise: several --noise or --scope"),
    "combinations": (combinations, "noise combined with other methods: --method mixout,noisytune+mixout"),
    "share": (shares, "share of the training data: several --share"),
    "drift": (drift, "relative L1 change of each kind of parameter: full finetuning"),
}

_INTERVALS = "bars: 95 % bootstrap intervals"
_ERROR = {"ecolor": _GREY, "elinewidth": 0.8}


def _rows(
    results: Results, entries: Sequence[Entry], compared: Iterable[Entry], ensembles: Iterable[Entry]
) -> Figure:
    """Draw a row for each condition: scores on the left, differences from plain on the right."""
    primary = results["study"]["primary"]
    together = list(ensembles)
    figure, left, right = _double(results, len(entries) + len(together))
    differences = {comparison["name"]: comparison for comparison in compared}
    for row, entry in enumerate(entries):
        colour = (
            _BLACK if entry["method"] == "plain" else _COLOURS[0 if "noisytune" in entry["method"] else 1]
        )
        mark = "o" if entry["method"] == "plain" else "s" if "noisytune" in entry["method"] else "^"
        _bar(left, entry["dev"][primary], row, colour, mark, seeds=True)
        if entry["name"] in differences:
            _bar(right, differences[entry["name"]], row, colour, mark, seeds=True)
    names = [
        entry["name"] + ("" if entry["lambda"] is None else f", λ {wording.strength(entry['lambda'])}")
        for entry in entries
    ]
    for row, entry in enumerate(together, start=len(entries)):
        left.plot(100 * entry["dev"][primary], row, "D", color=_BLACK, markerfacecolor="none")
        names.append(f"vote of {entry['members']} plain")
    _name_rows(left, map(_label, names))
    right.set_xlabel("paired difference from plain")
    return figure


def _bar(axes: Axes, sample: Entry, row: float, colour: str, mark: str, *, seeds: bool = False) -> None:
    """Draw a mean with its interval in a row, and on request the single seeds."""
    if seeds:
        values = [100 * value for value in sample["values"]]
        axes.plot(values, [row] * len(values), ".", color=colour, alpha=0.35, markersize=4, zorder=1)
    if sample["interval"]:
        low, high = (100 * bound for bound in sample["interval"])
        axes.hlines(row, low, high, color=colour, linewidth=1.6)
    axes.plot(100 * sample["mean"], row, mark, color=colour, markersize=5)


def _line(
    axes: Axes, places: Sequence[float], samples: Sequence[Entry], colour: str, mark: str, label: str
) -> None:
    """Draw means with their intervals along the x axis."""
    axes.plot(places, [100 * s["mean"] for s in samples], f"{mark}-", color=colour, label=label)
    for place, sample in zip(places, samples, strict=True):
        if sample["interval"]:
            low, high = (100 * bound for bound in sample["interval"])
            axes.vlines(place, low, high, color=colour, linewidth=1.2)


def _shifts(lines: int) -> list[float]:
    """Return how far each line is moved aside, so that no interval hides another: shares of the axis."""
    return [0.012 * (place - (lines - 1) / 2) for place in range(lines)]


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)


def _single(results: Results) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_COLUMN, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel(_score_axis(results))
    _caption(figure, results, _INTERVALS)
    return figure, axes


def _double(results: Results, rows: float, bars: str = _INTERVALS) -> tuple[Figure, Axes, Axes]:
    """Return a figure of two axes that share their rows, the first row on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_PAGE, 1.25 + _ROW * max(rows, 3)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set_xlabel(_score_axis(results))
    right.axvline(0, color=_GREY, linewidth=0.8, zorder=0)
    _caption(figure, results, bars)
    return figure, left, right


def _name_rows(axes: Axes, names: Iterable[str]) -> None:
    labels = list(names)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)


def _caption(figure: Figure, results: Results, bars: str) -> None:
    """Say under a figure what it is of, and over how many seeds."""
    numbers = sorted({len(entry["seeds"]) for entry in results["conditions"]})
    seeds = "–".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))
    study = results["study"]
    of = f"{_label(study['model']['id'])} on {_label(study['task'])}"
    figure.supxlabel(f"{of}; n = {seeds} seeds; {bars}", fontsize=7, color="#555555")


def _score_axis(results: Results) -> str:
    name = wording.METRICS[results["study"]["primary"]]
    return f"{name[0].upper()}{name[1:]} × 100, dev"


def _label(name: str) -> str:
    return escape(name, 60)


def _styles(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """Return a colour and a mark for each name, no two of 36 the same: black for plain."""
    styles = []
    others = 0
    for name in names:
        if name == "plain":
            styles.append((name, _BLACK, "o"))
        else:
            turn, place = divmod(others, len(_COLOURS))
            styles.append((name, _COLOURS[place], _MARKS[(place + turn) % len(_MARKS)]))
            others += 1
    return styles

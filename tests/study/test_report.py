"""The report's words: what it claims, what it does not, and what it says is missing."""

from __future__ import annotations

import itertools
from typing import Any

from noisytune_cli.study.report import plots, results
from noisytune_cli.study.report.report import render

from .records import run, runs, study

PLAIN = [0.40, 0.42, 0.39, 0.41, 0.43]


def report(made: list[dict[str, Any]], finished: list[dict[str, Any]] | None = None, **others: Any) -> str:
    """Return the report of the runs that are finished (all of those made), with the figures they give."""
    summary = results.summarise(study(made, **others), made if finished is None else finished)
    return render(summary, [name for name, (plot, _) in plots.PLOTS.items() if plot(summary) is not None])


def raised(method: str, by: list[float], **others: Any) -> list[dict[str, Any]]:
    return runs(method, [a + b for a, b in zip(PLAIN, by, strict=True)], **others)


def test_five_seeds_are_no_evidence_and_the_report_says_why() -> None:
    text = report([*runs("plain", PLAIN), *raised("noisytune", [0.01, 0.02, 0.03, 0.02, 0.01])])
    assert "noisytune (λ 0.15) against plain: +1.80 [" in text
    assert "higher in 5 of them, p = 0.0625 (0.0625 adjusted): no evidence of a difference; if " in text
    assert "a mean difference below +0.76 or above +2.84 is excluded at 95 %, and 0 with it." in text
    assert "5 paired seeds cannot give a two-sided p below 0.0625" in text
    assert "It takes 6 seeds." in text
    assert "evidence that" not in text


def test_evidence_is_told_where_there_is_some() -> None:
    made = [*runs("plain", [*PLAIN, 0.4]), *runs("r3f", [*(score + 0.1 for score in PLAIN), 0.6])]
    text = report(made)
    assert "r3f against plain: +11.67 [" in text
    assert "evidence that it is better" in text
    assert "no evidence of a difference" not in text
    assert "cannot give" not in text


def test_the_number_of_comparisons_is_told() -> None:
    made = [*runs("plain", PLAIN), *raised("r3f", [0.01] * 5), *raised("mixout", [0.02] * 5)]
    text = report(made)
    assert "adjusted for the 2 comparisons with plain" in text
    assert "which 2 comparisons adjust to 0.125" in text
    assert "It takes 7 seeds." in text
    assert "- 2 other comparisons: no evidence of a difference." in text


def test_what_few_seeds_cannot_show_is_said_of_comparisons_adjusted_together() -> None:
    plain = [*PLAIN, 0.4]
    by = {"mixout": 0.01, "noisytune": 0.02, "noisytune+mixout": 0.05}
    made = [runs(method, [a + more for a in plain]) for method, more in by.items()]
    text = report([*runs("plain", plain), *itertools.chain(*made)])
    assert "noisytune+mixout (λ 0.15) against mixout: +4.00 [" in text
    assert "p = 0.0312 (0.0312 adjusted): evidence that it is better." in text
    # Three comparisons with plain take seven seeds; the one of noise added to mixout has shown something.
    assert "Comparisons with plain: 6 paired seeds cannot give" in text
    assert "Comparisons of noise" not in text


def test_the_table_has_mean_and_std() -> None:
    text = report([*runs("plain", PLAIN), *raised("noisytune", [0.0] * 5)])
    assert "| plain |  | 5 | 41.00 ± 1.58 | 75.00 ± 0.00 |" in text


def test_where_lambda_was_chosen_is_told() -> None:
    made = [
        *runs("plain", PLAIN),
        *raised("noisytune", [0.01] * 5, lam=0.1, held_out=0.3),
        *raised("noisytune", [0.02] * 5, lam=0.2, held_out=0.2),
    ]
    text = report(made)
    assert "chosen by the mean score on a held-out part of the training rows" in text
    assert "| noisytune | 0.1 (chosen) | 5 | 30.00 ± 0.00 | 42.00 ± 1.58 |" in text
    assert "| noisytune | 0.2 | 5 | 20.00 ± 0.00 | 43.00 ± 1.58 |" in text
    assert "somewhat too good. p counts that in: λ is chosen anew in each of the test's flips. Of" in text
    text = report([*made, run("plain", 5, 0.4), run("noisytune", 5, 0.4, lam=0.1)])
    assert "p counts that in only where all λ have the seeds that are compared" in text
    for record in made:
        record["held_out"] = None
    text = report(made)
    assert "chosen on the very rows that the scores are reported on" in text
    assert "| noisytune | 0.2 (chosen) | 5 |  | 43.00 ± 1.58 |" in text


def test_what_was_not_asked_for_is_listed_and_no_absent_figure_is_shown() -> None:
    made = [*runs("plain", PLAIN), *raised("noisytune", [0.0] * 5)]
    text = report(made)
    assert "](figures/methods.png)" in text
    assert text.count("](figures/") == 1
    absent = text.partition("## Not in this study")[2]
    for needed in (
        "several --lambda",
        "--noise or --scope",
        "noisytune+mixout",
        "several --share",
        "--probe",
    ):
        assert needed in absent
    assert "methods beside plain" not in absent


def test_an_unfinished_study_says_so_and_reports_what_is_there() -> None:
    made = [*runs("plain", PLAIN), *raised("noisytune", [0.01] * 5)]
    text = report(made, finished=[*made[:5], *made[5:8]])
    assert "**This study is not finished: 8 of 10 runs are done.**" in text
    assert "- noisytune, λ 0.15: seed 3, 4" in text
    assert "over 3 paired seeds" in text
    assert "Compared over the seeds that plain has too: noisytune over 3 seeds, 2 left out." in text


def test_a_study_without_runs_has_a_report() -> None:
    text = report([run()], finished=[])
    assert "0 of 1 runs are done" in text
    assert "No run is finished." in text


def test_the_cost_of_every_method_and_of_the_ensemble_is_shown() -> None:
    made = [*runs("plain", PLAIN), *raised("r3f", [0.0] * 5, forwards=630, seconds=90.0)]
    text = report(made)
    assert "| r3f | 315 | 630 | 90.0 | ×1.00 | ×2.00 | ×1.50 |" in text
    assert "| ensemble of 5 plain runs | 1,575 | 1,575 | 300.0 | ×5.00 | ×5.00 | ×5.00 |" in text
    assert "ensemble of 5 plain runs (the majority vote of their predictions) scores **" in text


def test_drift_and_probe_have_tables() -> None:
    change = {"norm_change": 0.004, "change_norm": 0.02}
    made = [
        run(seed=seed, drift={"mlp": change}, probe={"task": "rte", "accuracy": 0.6}) for seed in range(2)
    ]
    # Where noise made biases of 0 something else, their change is relative to something.
    made.append(run("noisytune", scope="global", drift={"bias": change, "mlp": change}))
    text = report(made)
    norm, moved = text.partition("The L1 norm of the change")[::2]
    assert "| plain | 0.400 |  |" in norm
    assert "| noisytune | 2.000 | 2.000 |" in moved
    assert "learns rte from it" in text
    assert "| plain | 2 | 60.00 ± 0.00 |" in text


def test_shares_and_combinations_have_tables() -> None:
    made = [
        *runs("plain", PLAIN),
        *raised("mixout", [0.01] * 5),
        *raised("noisytune+mixout", [0.03] * 5),
        *raised("noisytune", [0.01] * 5),
        *raised("plain", [-0.2] * 5, share=0.2),
        *raised("noisytune", [-0.1] * 5, share=0.2),
    ]
    text = report(made)
    assert "| mixout | noisytune+mixout | 0.15 | +2.00 [+2.00, +2.00] | 5 of 5 |" in text
    shares = text.partition("## Share of the training data")[2].partition("##")[0]
    assert "| 200 | noisytune | 0.15 | 5 | 31.00 ± 1.58 |" in shares
    assert "| 1,000 | plain |" in shares
    assert "mixout" not in shares


def test_names_from_files_are_no_markup() -> None:
    model = {"id": "a|b<img src=x>\x1b[31m", "revision": None, "parameters": 1}
    text = report([run()], model=model, task="*x*")
    assert text.startswith("# a\\|b\\<img src=x\\>\\\\x1b\\[31m on \\*x\\*\n")
    assert "\x1b" not in text

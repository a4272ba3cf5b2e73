"""Several tasks together: the mean over them, what is flipped, and what is adjusted for what."""

from __future__ import annotations

import json
from itertools import product
from operator import mul
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from scipy import stats

from noisytune_cli.study.report.results import summarise
from noisytune_cli.study.report.tasks import render_tasks, summarise_tasks
from noisytune_cli.study.report.write import write_tasks

from .records import runs, study

PLAIN = [0.40, 0.42, 0.39, 0.41, 0.43, 0.40, 0.44, 0.38]

#: Differences by task and seed.
COLA = [0.02, -0.01, 0.03, 0.01, 0.02, 0.01]
RTE = [0.01, 0.02, -0.02, 0.00, 0.01, 0.03, 0.09, 0.09]


def results(task: str, constant_score: float | None = None, **differences: list[float]) -> dict[str, Any]:
    """Return the results of a study in which methods differ from plain by so much."""
    made = runs("plain", PLAIN)
    for method, some in differences.items():
        made += runs(method, [plain + by for plain, by in zip(PLAIN, some, strict=False)])
    about = {"task": task} | ({} if constant_score is None else {"constant_score": constant_score})
    return summarise(study(made, **about), made)


def test_a_seed_s_difference_is_its_mean_over_tasks() -> None:
    summary = summarise_tasks([results("cola", noisytune=COLA), results("rte", noisytune=RTE)])
    (method,) = summary["methods"]
    differences = [(a + b) / 2 for a, b in zip(COLA, RTE, strict=False)]  # those of six seeds
    assert method["values"] == pytest.approx(differences)
    assert method["mean"] == pytest.approx(fmean(differences))
    assert method["seeds"] == [[seed] * 3 for seed in range(6)]
    assert [len(cell["values"]) for cell in method["tasks"]] == [6, 8]
    # Seeds are flipped, each on all tasks at once.
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((1, -1), repeat=6)
    ]
    assert method["p"] == pytest.approx(fmean(total >= abs(sum(differences)) - 1e-12 for total in sums))
    known = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert method["excluded_beyond"] == pytest.approx([known.low, known.high])
    known = stats.ttest_1samp([fmean(COLA), fmean(RTE[:6])], 0.0).confidence_interval(0.95)
    assert method["other_tasks"] == pytest.approx([known.low, known.high])
    assert [(task["task"], task["plain"]["mean"]) for task in summary["tasks"]] == [
        ("cola", pytest.approx(fmean(PLAIN))),
        ("rte", pytest.approx(fmean(PLAIN))),
    ]


def test_tasks_that_cancel_leave_no_difference() -> None:
    plain = [(55, 49), (57, 40), (30, 10), (50, 41), (41, 53), (33, 46)]
    summary = summarise_tasks(
        [
            summarise(study(made, task=task), made)
            for task, by in (("cola", 1), ("rte", -1))
            for made in [
                runs("plain", [rows[by < 0] / 60 for rows in plain])
                + runs("noisytune", [(rows[by < 0] + by) / 60 for rows in plain])
            ]
        ]
    )
    (method,) = summary["methods"]
    assert method["values"] == [0.0] * 6
    assert (method["mean"], method["higher"], method["p"]) == (0.0, 0, 1.0)
    assert method["excluded_beyond"] is None


def test_each_task_chooses_its_lambda_anew_in_a_flip() -> None:
    # By task, λ and seed: the difference on the dev rows and the score on the held-out ones.
    tried = {
        "cola": {
            0.1: ([0.01, 0.02, -0.03, 0.01, 0.02], [0.31, 0.35, 0.30, 0.34, 0.36]),
            0.2: ([0.03, 0.01, 0.02, 0.04, -0.01], [0.36, 0.33, 0.35, 0.37, 0.32]),
        },
        # Its last seed is not compared, and so not flipped, but has chosen.
        "rte": {
            0.1: ([0.02, 0.02, 0.01, 0.03, 0.01, 0.05], [0.40, 0.44, 0.41, 0.43, 0.45, 0.48]),
            0.2: ([0.01, -0.02, 0.02, 0.01, 0.02, 0.01], [0.41, 0.42, 0.40, 0.44, 0.45, 0.43]),
        },
    }
    studies = []
    for task, lambdas in tried.items():
        made = runs("plain", PLAIN[: len(lambdas[0.1][0])])
        for lam, (by, held_out) in lambdas.items():
            for record, score in zip(runs("noisytune", PLAIN, lam=lam), held_out, strict=False):
                record["dev"]["matthews"] += by[record["seed"]]
                record["held_out"]["matthews"] = score
                made.append(record)
        studies.append(summarise(study(made, task=task), made))
    summary = summarise_tasks(studies)
    (method,) = summary["methods"]
    assert [cell["lambda"] for cell in method["tasks"]] == [0.2, 0.1]
    assert "p counts that in: λ is chosen anew" in render_tasks(summary, [])

    def mean(signs: tuple[int, ...]) -> float:
        total = 0.0
        for lambdas in tried.values():
            sums = {lam: sum(map(mul, (*signs, 1), held_out)) for lam, (_, held_out) in lambdas.items()}
            chosen = min(lam for lam in sums if sums[lam] > max(sums.values()) - 1e-9)
            total += sum(map(mul, signs, lambdas[chosen][0])) / 10
        return total

    assert method["mean"] == pytest.approx(mean((1,) * 5))
    flipped = [mean(signs) for signs in product((1, -1), repeat=5)]
    assert method["p"] == pytest.approx(2 * fmean(value >= flipped[0] - 1e-9 for value in flipped))


def test_single_tasks_are_adjusted_among_all_of_the_table_and_means_among_the_means() -> None:
    up = [0.02, 0.01, 0.03, 0.01, 0.02, 0.01, 0.04, 0.02]
    summary = summarise_tasks(
        [results("cola", noisytune=up, r3f=COLA), results("rte", noisytune=up, r3f=RTE[:6])]
    )
    noisy, r3f = summary["methods"]
    assert [cell["p"] for cell in noisy["tasks"]] == [2 / 256] * 2
    assert [cell["p_holm"] for cell in noisy["tasks"]] == [4 * 2 / 256] * 2
    assert [cell["verdict"] for cell in noisy["tasks"]] == ["evidence that it is better"] * 2
    assert [cell["verdict"] for cell in r3f["tasks"]] == ["no evidence of a difference"] * 2
    assert noisy["p_holm"] == 2 * noisy["p"]


def test_what_a_task_lacks_is_not_averaged() -> None:
    summary = summarise_tasks([results("cola", noisytune=COLA, r3f=COLA), results("rte", noisytune=RTE)])
    assert [method["name"] for method in summary["methods"]] == ["noisytune"]
    nothing = summarise_tasks([results("cola", r3f=COLA), results("rte", noisytune=RTE)])
    assert nothing["methods"] == []
    assert "No method has a seed that it and plain have on every task." in render_tasks(nothing, [])


def test_a_method_is_one_whatever_else_a_study_has() -> None:
    made = [*runs("plain", PLAIN), *runs("noisytune", [score + 0.01 for score in PLAIN])]
    grown = [*made, *runs("noisytune", PLAIN, noise="gaussian")]
    summary = summarise_tasks([summarise(study(made), made), summarise(study(grown), grown)])
    (method,) = summary["methods"]
    assert method["name"] == "noisytune (uniform)"
    assert method["mean"] == pytest.approx(0.01)


def test_the_summary_is_written_with_its_figure(tmp_path: Path) -> None:
    studies = [results("cola", noisytune=COLA), results("rte", noisytune=RTE)]
    summary = write_tasks(tmp_path, studies)
    assert json.loads((tmp_path / "tasks.json").read_text()) == summary
    text = (tmp_path / "tasks.md").read_text()
    assert "- noisytune against plain: +1.08 [" in text
    assert "over 2 tasks and 6 paired seeds, higher in " in text
    assert "evidence that it is better." in text
    assert "| method | cola (Matthews correlation) | rte (Matthews correlation) | mean difference |" in text
    assert "(n 6, λ 0.15) | " in text
    assert "![Paired differences from plain" in text
    assert (tmp_path / "figures/tasks.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_that_is_not_finished_says_so() -> None:
    made = [*runs("plain", PLAIN), *runs("noisytune", PLAIN)]
    part = summarise({**study(made), "task": "rte"}, [*made[:4], *made[8:12]])
    text = render_tasks(summarise_tasks([results("cola", noisytune=COLA), part]), [])
    assert "**Not finished: rte: 8 of 16 runs.**" in text
    assert "was chosen" not in text


def test_a_choice_that_p_does_not_count_in_is_told() -> None:
    lambdas = [runs("noisytune", PLAIN[:seeds], lam=lam) for lam, seeds in ((0.1, 7), (0.2, 6))]
    made = [*runs("plain", PLAIN), *lambdas[0], *lambdas[1]]
    summary = summarise_tasks([results("cola", noisytune=COLA), summarise(study(made, task="rte"), made)])
    assert [cell["choice_counted"] for cell in summary["methods"][0]["tasks"]] == [None, False]
    assert "p counts that in only where all λ have the seeds" in render_tasks(summary, [])


def test_a_task_on_which_nothing_is_learnt_is_named() -> None:
    learnt, not_learnt = results("cola", noisytune=COLA), results("wnli", noisytune=RTE, constant_score=0.45)
    summary = summarise_tasks([learnt, not_learnt])
    assert [(task["constant_score"], task["above_constant"]) for task in summary["tasks"]] == [
        (None, None),
        (0.45, False),
    ]
    text = render_tasks(summary, [])
    assert "**wnli: plain's Matthews correlation, 40.88 ± 2.03, is not above that of one" in text
    assert "is not above" not in render_tasks(summarise_tasks([learnt]), [])

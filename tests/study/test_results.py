"""What runs come to together, with scores that are known."""

from __future__ import annotations

import json
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from noisytune_cli.study.report import results, statistics
from noisytune_cli.study.report.report import render, unlearnt

from .records import LABELS, run, runs, study

UP = [0.02, 0.01, 0.04, 0.03, 0.05, 0.06]


def summarise(made: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
    return results.summarise(study(made, **others), made)


def beside_plain(differences: list[float], method: str = "r3f") -> list[dict[str, Any]]:
    plain = [0.40, 0.42, 0.39, 0.41, 0.43, 0.40, 0.44, 0.38][: len(differences)]
    return [*runs("plain", plain), *runs(method, [a + b for a, b in zip(plain, differences, strict=True)])]


def test_a_comparison_is_of_paired_differences() -> None:
    (comparison,) = summarise(beside_plain(UP))["comparisons"]
    assert comparison["values"] == pytest.approx(UP)
    assert comparison["mean"] == pytest.approx(0.035)
    assert comparison["std"] == pytest.approx(0.0187082869)
    assert comparison["interval"][0] > 0
    assert comparison["higher"] == 6
    assert comparison["p"] == comparison["p_holm"] == comparison["smallest_p"] == 2 / 64
    assert comparison["comparisons"] == 1
    assert (comparison["name"], comparison["against"], comparison["left_out"]) == ("r3f", "plain", 0)
    assert comparison["verdict"] == results.BETTER


def test_the_other_direction_is_evidence_too() -> None:
    (comparison,) = summarise(beside_plain([-value for value in UP]))["comparisons"]
    assert (comparison["verdict"], comparison["higher"]) == (results.WORSE, 0)


@pytest.mark.parametrize(
    "differences",
    [
        UP[:5],  # all of one sign, and yet five pairs cannot show it
        [0.02, -0.03, 0.01, -0.01, 0.02, 0.03],
        [0.0] * 6,
        [0.3],
    ],
)
def test_no_evidence_is_said_where_there_is_none(differences: list[float]) -> None:
    (comparison,) = summarise(beside_plain(differences))["comparisons"]
    assert comparison["verdict"] == "no evidence of a difference"


def test_several_comparisons_take_the_evidence_away() -> None:
    made = beside_plain(UP)
    made += [{**record, "method": "mixout", "key": f"mixout{record['seed']}"} for record in made[6:]]
    found = summarise(made)["comparisons"]
    assert [c["p"] for c in found] == [2 / 64, 2 / 64]
    assert [c["p_holm"] for c in found] == [4 / 64, 4 / 64]
    assert [c["comparisons"] for c in found] == [2, 2]
    assert {c["verdict"] for c in found} == {results.NO_EVIDENCE}


def test_only_seeds_that_both_have_are_compared() -> None:
    made = beside_plain(UP)
    del made[0], made[-1]
    (comparison,) = summarise(made)["comparisons"]
    assert comparison["seeds"] == [[1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4]]
    assert comparison["left_out"] == 2
    assert comparison["values"] == pytest.approx(UP[1:5])


def fixed(made: list[dict[str, Any]], init: int = 0) -> list[dict[str, Any]]:
    """Return runs as `--init-seed` and `--order-seed` plan them, with seeds of noise of their own."""
    return [{**record, "init_seed": init, "order_seed": init} for record in made]


@pytest.mark.parametrize("method", ["recadam", "noisytune"])
def test_pairs_that_share_a_run_are_one(method: str) -> None:
    # Six times one plain run, and of recadam one, too: however they differ, that is one difference.
    made = fixed([*runs("plain", [0.80] * 6), *runs(method, [0.80 + by for by in UP])])
    summary = summarise(made)
    (comparison,) = summary["comparisons"]
    assert comparison["values"] == [pytest.approx(0.035)]
    assert (comparison["seeds"], comparison["pairs"], comparison["left_out"]) == ([[0, 0, 0]], 6, 0)
    assert (comparison["p"], comparison["smallest_p"], comparison["interval"]) == (1.0, 1.0, None)
    assert comparison["verdict"] == results.NO_EVIDENCE
    plain, other = summary["conditions"]
    assert (plain["runs"], plain["seeds"], plain["dev"]["matthews"]["std"]) == (6, [[0, 0, 0]], None)
    assert (other["runs"], len(other["seeds"])) == (6, 6 if method == "noisytune" else 1)
    assert summary["ensembles"] == []
    report = render(summary, [])
    assert "evidence that" not in report
    assert "It takes 6 seeds of initialisation or data order: pairs that share a run are one." in report
    assert results.foresee(made) == (1, 1, True)
    assert "12 of 12, 12 min 0 s in all" in report


def test_noise_added_to_what_draws_noise_itself_shares_no_run() -> None:
    def added(method: str, **others: Any) -> dict[str, Any]:
        made = [*runs(method, [0.80] * 6), *runs(f"noisytune+{method}", [0.80 + by for by in UP])]
        (comparison,) = summarise(fixed(made), **others)["combinations"]
        assert comparison["pairs"] == 6
        return comparison

    assert len(added("mixout")["values"]) == len(added("r3f")["values"]) == 6
    assert len(added("swa")["values"]) == 1
    assert len(added("r3f", regression=True)["values"]) == 1  # where it has no noise


def test_where_nothing_is_initialised_other_seeds_of_it_are_the_same_run() -> None:
    made = [*runs("plain", [0.80] * 6), *runs("noisytune", [0.80 + by for by in UP])]
    made = [{**record, "order_seed": 0} for record in made]
    (comparison,) = summarise(made)["comparisons"]
    assert len(comparison["values"]) == 6
    (comparison,) = summarise([{**record, "fresh": False} for record in made])["comparisons"]
    assert comparison["values"] == [pytest.approx(0.035)]
    # With orders of their own they are apart.
    (comparison,) = summarise([{**record, "fresh": False} for record in beside_plain(UP)])["comparisons"]
    assert len(comparison["values"]) == 6


def test_each_run_that_pairs_share_gives_a_difference() -> None:
    made = [run("plain", 0, 0.5), run("noisytune", 0, 0.75)]
    made += fixed([*runs("plain", [0.5, 0.5]), *runs("noisytune", [0.625, 0.5])], init=1)
    for record in made[2:]:
        record["key"] += " fixed"
    (comparison,) = summarise(made)["comparisons"]
    assert comparison["seeds"] == [[0, 0, 0], [1, 1, 0]]
    assert comparison["values"] == [0.25, 0.0625]
    assert comparison["pairs"] == 3
    assert [ensemble["members"] for ensemble in summarise(made)["ensembles"]] == [2]
    assert results.foresee(made) == (2, 1, True)
    assert results.foresee(beside_plain(UP)) == (6, 1, False)


def test_methods_without_a_seed_in_common_are_not_compared() -> None:
    assert summarise([run("plain", 0), run("r3f", 1)])["comparisons"] == []


def test_each_share_is_compared_with_its_own_plain() -> None:
    made = [
        *runs("plain", [0.4, 0.5]),
        *runs("noisytune", [0.5, 0.6]),
        *runs("plain", [0.2, 0.3], share=0.2),
        *runs("noisytune", [0.1, 0.2], share=0.2),
        *runs("r3f", [0.3, 0.4], share=0.4),
    ]
    found = summarise(made)["comparisons"]
    assert [(c["share"], round(c["mean"], 9), c["comparisons"]) for c in found] == [
        (1.0, 0.1, 1),
        (0.2, -0.1, 1),
    ]


def test_noise_is_compared_with_what_it_is_added_to() -> None:
    options = {"mixout.p": 0.7}
    made = [
        *runs("plain", [0.4, 0.4]),
        *runs("mixout", [0.5, 0.6], options=options),
        *runs("noisytune+mixout", [0.52, 0.66], options=options),
        *runs("noisytune", [0.41, 0.42]),
        *runs("noisytune+r3f", [0.3, 0.3]),
    ]
    (added,) = summarise(made)["combinations"]
    assert (added["name"], added["against"]) == ("noisytune+mixout", "mixout")
    assert added["values"] == pytest.approx([0.02, 0.06])


def test_the_score_is_reported_at_the_lambda_that_was_chosen_elsewhere() -> None:
    made = [
        *runs("plain", [0.4, 0.4]),
        *runs("noisytune", [0.9, 0.9], lam=0.1, held_out=0.1),
        *runs("noisytune", [0.5, 0.5], lam=0.2, held_out=0.2),
    ]
    found = summarise(made)
    assert [(c["lambda"], c["reported"]) for c in found["conditions"]] == [
        (None, True),
        (0.1, False),
        (0.2, True),
    ]
    (comparison,) = found["comparisons"]
    assert comparison["lambda"] == 0.2
    assert comparison["mean"] == pytest.approx(0.1)
    assert found["lambda_chosen_on"] == "held_out"


def test_p_counts_in_that_luck_chose_lambda() -> None:
    scores = {0.1: [0.43, 0.40, 0.44, 0.44, 0.42, 0.42], 0.2: [0.43, 0.42, 0.43, 0.42, 0.41, 0.40]}
    held_out = {0.1: [0.33, 0.34, 0.36, 0.31, 0.32, 0.30], 0.2: [0.31, 0.35, 0.35, 0.31, 0.37, 0.35]}
    made = runs("plain", [0.4] * 6)
    for lam in scores:
        for seed, (dev, chosen) in enumerate(zip(scores[lam], held_out[lam], strict=True)):
            made.append(run("noisytune", seed, dev, lam=lam, held_out=chosen))
    (comparison,) = summarise(made)["comparisons"]
    differences = [[dev - 0.4 for dev in of_seed] for of_seed in zip(*scores.values(), strict=True)]
    choosing = [list(of_seed) for of_seed in zip(*held_out.values(), strict=True)]
    assert comparison["lambda"] == 0.2
    assert comparison["search"]["lambdas"] == [0.1, 0.2]
    assert comparison["search"]["differences"] == pytest.approx(np.array(differences))
    assert comparison["search"]["scores"] == choosing
    assert comparison["p"] == statistics.searched_p([statistics.Search(differences, choosing)])
    assert comparison["p"] > statistics.permutation_p(comparison["values"])
    # One λ of which a seed more is there than of the other: what luck chose cannot be told.
    (comparison,) = summarise([*made, run("plain", 6, 0.4), run("noisytune", 6, 0.4, lam=0.2)])["comparisons"]
    assert comparison["search"] is None
    assert comparison["p"] == statistics.permutation_p(comparison["values"])
    (comparison,) = summarise(made[:12])["comparisons"]  # a single λ
    assert comparison["search"] is None


def test_a_choice_on_the_reported_rows_is_told() -> None:
    made = [
        *runs("noisytune", [0.4], lam=0.1, held_out=None),
        *runs("noisytune", [0.5], lam=0.2, held_out=None),
    ]
    assert summarise(made)["lambda_chosen_on"] == "dev"
    assert summarise(made[:1])["lambda_chosen_on"] == "given"


def test_the_ensemble_is_the_vote_of_the_plain_runs() -> None:
    votes = [LABELS, LABELS, [1 - label for label in LABELS]]
    made = [run("plain", seed, predictions=vote) for seed, vote in enumerate(votes)]
    (ensemble,) = summarise(made)["ensembles"]
    assert ensemble["members"] == 3
    assert ensemble["dev"] == {"matthews": 1.0, "accuracy": 1.0}
    # Without the first, or the second: one vote each way, and the first of those left decides.
    assert ensemble["leave_one_out"] == [1.0, 1.0, 1.0]
    assert ensemble["cost"]["member_steps"] == 945
    assert ensemble["cost"]["relative"] == {"member_steps": 3.0, "forwards": 3.0, "seconds": 3.0}


def test_without_labels_there_is_no_vote() -> None:
    made = runs("plain", [0.4, 0.5])
    about = study(made)
    del about["dev_labels"]
    found = results.summarise(about, made)
    assert found["ensembles"] == []
    assert found["conditions"] == summarise(made)["conditions"]


def test_the_ensemble_of_numbers_is_their_mean() -> None:
    labels = [0.0, 1.0, 2.0, 5.0]
    predictions = [[0.0, 1.5, 2.0, 4.0], [0.0, 0.5, 2.0, 6.0]]
    made = [run("plain", seed, predictions=p, metric="pearson") for seed, p in enumerate(predictions)]
    for record in made:
        record["dev"] = {"pearson": 0.9}
    (ensemble,) = results.summarise(study(made, labels, primary="pearson", regression=True), made)[
        "ensembles"
    ]
    assert ensemble["dev"]["pearson"] == pytest.approx(1.0)


def test_cost_is_relative_to_plain() -> None:
    made = [
        *runs("plain", [0.4, 0.4], seconds=50.0),
        *runs("deni", [0.5, 0.5], member_steps=1165, forwards=1165, seconds=200.0),
    ]
    plain, deni = (condition["cost"] for condition in summarise(made)["conditions"])
    assert plain["relative"] == {"member_steps": 1.0, "forwards": 1.0, "seconds": 1.0}
    assert deni["relative"]["member_steps"] == pytest.approx(1165 / 315)
    assert deni["relative"]["seconds"] == 4.0
    (alone,) = summarise(runs("deni", [0.5]))["conditions"]
    assert alone["cost"]["relative"] is None


def test_drift_and_probes_are_averaged_over_seeds() -> None:
    made = [
        run(
            seed=seed,
            drift={"norm": {"norm_change": change, "change_norm": 2 * change}},
            probe={"task": "rte", "accuracy": 0.5 + change},
        )
        for seed, change in enumerate([0.1, 0.3])
    ]
    (condition,) = summarise(made)["conditions"]
    assert condition["drift"]["norm"]["norm_change"]["mean"] == pytest.approx(0.2)
    assert condition["drift"]["norm"]["change_norm"]["mean"] == pytest.approx(0.4)
    assert condition["probe"]["task"] == "rte"
    assert condition["probe"]["accuracy"]["mean"] == pytest.approx(0.7)


def test_what_is_planned_and_not_finished_is_named() -> None:
    made = [*beside_plain(UP), *runs("noisytune", [0.5, 0.5], share=0.2)]
    found = results.summarise(study(made), [record for record in made if record["seed"] < 1])
    assert (found["finished"], found["planned"]) == (3, 14)
    assert {"name": "plain", "lambda": None, "share": 1.0, "seeds": [1, 2, 3, 4, 5]} in found["missing"]
    assert {"name": "noisytune", "lambda": 0.15, "share": 0.2, "seeds": [1]} in found["missing"]


def test_a_study_without_runs_has_results_all_the_same() -> None:
    found = results.summarise(study(beside_plain(UP)), [])
    assert (found["finished"], found["conditions"], found["comparisons"]) == (0, [], [])
    assert len(found["missing"]) == 2


def test_results_are_the_same_bytes_and_their_floats_round_trip() -> None:
    made = [*beside_plain(UP), *runs("noisytune", [0.1 + 0.2], lam=0.15)]
    text = results.encode(summarise(made))
    assert text == results.encode(summarise(list(reversed(made))) | {"study": summarise(made)["study"]})
    assert text.isascii()
    assert json.loads(text) == json.loads(json.dumps(summarise(made)))
    assert json.loads(text)["conditions"][1]["dev"]["matthews"]["values"] == [0.1 + 0.2]
    assert json.loads(text)["schema"] == results.SCHEMA == 1


def test_runs_that_diverged_and_rows_that_were_seen_are_told() -> None:
    made = [*beside_plain(UP), run("mixout", 0, 0.2, loss=None), run("mixout", 1, 0.2)]
    model = {"id": "minilm", "revision": None, "parameters": 1, "earlier": "the source was noised before"}
    found = summarise(made, repeated={"dev": 1, "held_out": 2}, model=model)
    assert [c["diverged"] for c in found["conditions"]] == [0, 1, 0]
    report = render(found, [])
    assert (
        "**mixout: 1 of 2 runs diverged (no finite loss at the end), and are scored none the less.**"
        in report
    )
    assert "**1 dev row has the text of a row that is trained on: " in report
    assert (
        "**2 held-out rows have the text of a row that is trained on: a λ that is chosen on them " in report
    )
    assert "held-out row" not in render(summarise(made, repeated={"dev": 1, "held_out": 0}), [])
    assert "**the source was noised before, as a manifest beside its weights tells: " in report


def test_a_run_that_was_not_carried_out_counts_as_none() -> None:
    made = runs("plain", [0.4, 0.4])
    made[1]["same_as"] = made[0]["key"]
    (plain,) = summarise(made)["conditions"]
    assert (plain["runs"], plain["cost"]["seconds"]) == (1, 60.0)


@pytest.mark.parametrize(
    ("scores", "above"),
    [
        ([0.6], True),
        ([0.5], False),
        ([0.5, 0.5], False),
        ([0.7, 0.9], True),  # whose interval, of two, is wider than all scores
        ([0.6, 0.61, 0.6, 0.62, 0.61, 0.6, 0.45], True),  # one run failed
        ([0.6, 0.4, 0.55, 0.5], False),
    ],
)
def test_where_plain_is_not_above_one_answer_to_every_row_it_is_said(
    scores: list[float], above: bool
) -> None:
    made = runs("plain", scores)
    about = {"constant_score": 0.5}
    found = summarise(made, **about)
    assert [entry["above_constant"] for entry in found["conditions"]] == [above]
    assert found["study"]["constant_score"] == 0.5
    told = unlearnt(found)
    how = "is not clearly above" if fmean(scores) > 0.5 else "is not above"
    assert [how in line for line in told] == [True] * (not above)
    both = summarise([*made, *runs("plain", [0.5], share=0.2)], **about)
    assert unlearnt(both)[0] == (
        "with 200 rows plain's Matthews correlation, 50.00, is not above that of one answer to every "
        "row, 50.00: where nothing is learnt, no difference is no evidence"
    )
    # A study of an earlier version does not know.
    assert summarise(made)["conditions"][0]["above_constant"] is None

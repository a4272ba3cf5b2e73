"""Runs put together into conditions and families, and the choice of λ."""

from __future__ import annotations

from noisytune_cli.study.report.conditions import (
    ConditionKind,
    common_pairs,
    families,
    gather,
    kind_of,
    name_kinds,
)

from .records import run, runs


def noisy(lam: float, dev: list[float], held_out: list[float | None]) -> list[dict[str, object]]:
    return [
        run("noisytune", seed, score, held_out=chosen, lam=lam)
        for seed, (score, chosen) in enumerate(zip(dev, held_out, strict=True))
    ]


def test_runs_that_differ_in_seeds_alone_are_a_condition() -> None:
    made = [
        *runs("noisytune", [0.4, 0.6]),
        *runs("plain", [0.1, 0.2, 0.3]),
        *runs("plain", [0.05], share=0.2),
    ]
    conditions = gather(reversed(made))
    assert [(c.kind.method, c.share, len(c.runs)) for c in conditions] == [
        ("plain", 1.0, 3),
        ("noisytune", 1.0, 2),
        ("plain", 0.2, 1),
    ]
    assert conditions[0].scores("dev", "matthews", conditions[0].runs) == [0.1, 0.2, 0.3]
    assert common_pairs(conditions[:2]) == [(0, 0, 0), (1, 1, 1)]


def test_runs_with_the_same_number_and_other_seeds_are_no_pair() -> None:
    one, other = gather([run("plain", 1), run("noisytune", 1, order_seed=7)])
    assert common_pairs([one, other]) == []


def test_lambda_is_chosen_on_the_held_out_rows() -> None:
    made = [*noisy(0.1, [0.9, 0.9], [0.2, 0.3]), *noisy(0.2, [0.1, 0.1], [0.4, 0.2])]
    (family,) = families(gather(made), "matthews")
    assert family.chosen.lam == 0.2
    assert family.chosen_on == "held_out"


def test_of_equal_lambdas_the_smaller_is_chosen() -> None:
    made = [*noisy(0.3, [0.9], [0.25]), *noisy(0.1, [0.1], [0.25]), *noisy(0.2, [0.5], [0.125])]
    (family,) = families(gather(made), "matthews")
    assert family.chosen.lam == 0.1


def test_lambdas_whose_rows_are_as_many_are_equal_whatever_the_rounding() -> None:
    made = [*noisy(0.05, [0.5] * 2, [40 / 60, 47 / 60]), *noisy(0.3, [0.5] * 2, [41 / 60, 46 / 60])]
    (family,) = families(gather(made), "matthews")
    assert family.chosen.lam == 0.05


def test_lambda_is_chosen_over_the_seeds_that_all_have() -> None:
    # Over all of its own seeds 0.1 is better; over the one in common, 0.2.
    made = [*noisy(0.1, [0.5] * 3, [0.1, 0.9, 0.9]), *noisy(0.2, [0.5], [0.2])]
    (family,) = families(gather(made), "matthews")
    assert family.chosen.lam == 0.2


def test_lambdas_without_a_seed_in_common_are_compared_over_their_own() -> None:
    made = [run("noisytune", 0, held_out=0.1, lam=0.1), run("noisytune", 1, held_out=0.2, lam=0.2)]
    (family,) = families(gather(made), "matthews")
    assert family.chosen.lam == 0.2


def test_without_held_out_rows_lambda_is_chosen_on_dev_and_that_is_told() -> None:
    made = [*noisy(0.1, [0.4, 0.5], [None, None]), *noisy(0.2, [0.3, 0.3], [None, None])]
    (family,) = families(gather(made), "matthews")
    assert (family.chosen.lam, family.chosen_on) == (0.1, "dev")


def test_a_single_lambda_is_given() -> None:
    (family,) = families(gather(runs("noisytune", [0.4])), "matthews")
    assert family.chosen_on == "given"


def test_each_share_and_each_kind_of_noise_has_its_own_lambda() -> None:
    made = [
        run("noisytune", 0, held_out=held_out, lam=lam, share=share, noise=noise)
        for share, noise, lam, held_out in [
            (1.0, "uniform", 0.1, 0.3),
            (1.0, "uniform", 0.2, 0.4),
            (1.0, "gaussian", 0.1, 0.5),
            (1.0, "gaussian", 0.2, 0.4),
            (0.2, "uniform", 0.1, 0.9),
            (0.2, "uniform", 0.2, 0.4),
        ]
    ]
    chosen = {(f.chosen.share, f.chosen.kind.noise): f.chosen.lam for f in families(gather(made), "matthews")}
    assert chosen == {(1.0, "uniform"): 0.2, (1.0, "gaussian"): 0.1, (0.2, "uniform"): 0.1}


def test_names_tell_what_differs_and_nothing_else() -> None:
    kinds = [
        kind_of(record)
        for record in (
            run("plain"),
            run("noisytune"),
            run("noisytune", noise="gaussian"),
            run("r3f", options={"r3f.lambda": 0.7, "r3f.sigma": 1e-5}),
            run("mixout", options={"mixout.p": 0.7, "mixout.mask": "input"}),
            run("mixout", options={"mixout.p": 0.9, "mixout.mask": "input"}),
        )
    ]
    assert list(name_kinds(kinds).values()) == [
        "plain",
        "noisytune (uniform)",
        "noisytune (gaussian)",
        "r3f",
        "mixout (p 0.7)",
        "mixout (p 0.9)",
    ]


def test_what_noise_is_added_to_is_the_rest_of_the_method() -> None:
    options = {"mixout.p": 0.7, "noisytune.fresh": False}
    both = kind_of(run("noisytune+mixout", options=options))
    assert both.noisy
    assert both.without_noise() == ConditionKind("mixout", None, None, (("mixout.p", 0.7),))
    assert kind_of(run("noisytune")).without_noise() == kind_of(run("plain"))

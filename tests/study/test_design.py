"""Which runs a study consists of, their keys, and which rows they see."""

from __future__ import annotations

from typing import Any

import pytest

from noisytune_cli.errors import UsageError
from noisytune_cli.study.design import Run, Seeds, drawn_from, plan_runs, split_rows

ZERO = Seeds([0])


def plan(*methods: str, seeds: Seeds = ZERO, **changed: Any) -> list[Run]:
    options: dict[str, Any] = {
        "lambdas": [0.15],
        "noises": ["uniform"],
        "scopes": ["matrix"],
        "shares": [1.0],
        "settings": {},
    }
    return plan_runs(methods, seeds=seeds, **{**options, **changed})


def test_only_noisytune_has_lambda_noise_and_scope() -> None:
    runs = plan("plain", "noisytune", "noisytune+mixout", lambdas=[0.1, 0.2], scopes=["matrix", "global"])
    assert [(r.method, r.lam, r.noise, r.scope) for r in runs] == [
        ("plain", None, None, None),
        *[("noisytune", lam, "uniform", scope) for scope in ("matrix", "global") for lam in (0.1, 0.2)],
        *[
            ("noisytune+mixout", lam, "uniform", scope)
            for scope in ("matrix", "global")
            for lam in (0.1, 0.2)
        ],
    ]
    assert "mixout.p" in runs[-1].options
    assert "lambda" in runs[0].record()
    assert "lam" not in runs[0].record()


def test_seeds_are_the_outermost_loop_so_that_pairs_are_finished_first() -> None:
    runs = plan("plain", "noisytune", seeds=Seeds([3, 5]), shares=[0.5, 1.0])
    assert [(r.seed, r.share, r.method) for r in runs] == [
        (seed, share, method) for seed in (3, 5) for share in (0.5, 1.0) for method in ("plain", "noisytune")
    ]


def test_a_seed_that_is_given_is_the_same_for_all_pairs() -> None:
    for run in plan("plain", seeds=Seeds([1, 2], init=7, order=8, noise=9)):
        assert (run.init_seed, run.order_seed, run.noise_seed) == (7, 8, 9)
    assert [r.order_seed for r in plan("plain", seeds=Seeds([1, 2], init=7))] == [1, 2]


def test_keys_tell_runs_apart_and_do_not_change() -> None:
    def key(**changed: Any) -> str:
        (run,) = plan("noisytune+mixout", **changed)
        return run.key

    keys = {
        key(),
        key(lambdas=[0.1]),
        key(noises=["gaussian"]),
        key(scopes=["global"]),
        key(shares=[0.5]),
        key(seeds=Seeds([1])),
        key(seeds=Seeds([0], noise=1)),
        key(settings={"mixout.p": 0.8}),
    }
    assert len(keys) == 8
    assert key(settings={"r3f.lambda": 0.7}) == key()  # another method's
    assert plan("plain")[0].key == "plain-0-965b09e0b30286cf"


def test_runs_that_differ_in_seeds_that_they_do_not_draw_from_are_one() -> None:
    def kinds(regression: bool, fresh: bool) -> list[int]:
        """Return how many runs there are of each method, of two seeds each of head and of noise."""
        seeds = [Seeds([0, 1], init=init, order=0) for init in (0, 1)]
        found: dict[str, set[str]] = {}
        for run in (run for one in seeds for run in plan("plain", "noisytune", "r4f", "swa", seeds=one)):
            told = drawn_from(run.record(), regression=regression, fresh=fresh)
            found.setdefault(run.method, set()).add(told)
        return [len(found[method]) for method in ("plain", "noisytune", "r4f", "swa")]

    assert kinds(regression=False, fresh=True) == [2, 4, 4, 2]
    assert kinds(regression=True, fresh=True) == [2, 4, 2, 2]
    assert kinds(regression=False, fresh=False) == [1, 2, 2, 1]


def test_a_run_that_is_asked_for_twice_is_one() -> None:
    assert len(plan("noisytune+mixout", "mixout+noisytune", "plain", "plain")) == 2


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="no such method"):
        plan("plain", "magic")
    with pytest.raises(UsageError, match="do not go together"):
        plan("plain+mixout")
    with pytest.raises(UsageError, match=r"mixout\.p"):
        plan("mixout", settings={"mixout.p": 2.0})


def test_rows_trained_on_and_held_out_never_overlap() -> None:
    split = split_rows(100, train_rows=None, held_out=None, seed=0)
    assert len(split.held_out) == 20
    assert sorted((*split.train, *split.held_out)) == list(range(100))
    assert split == split_rows(100, train_rows=None, held_out=None, seed=0)
    assert split != split_rows(100, train_rows=None, held_out=None, seed=1)
    assert len(split_rows(10_000, train_rows=None, held_out=None, seed=0).held_out) == 500


def test_fewer_rows_and_smaller_shares_lie_within_more() -> None:
    split = split_rows(100, train_rows=50, held_out=10, seed=0)
    more = split_rows(100, train_rows=90, held_out=10, seed=0)
    assert more.held_out == split.held_out
    assert more.train[:50] == split.train == split.share(1.0)
    assert split.share(0.2) == split.train[:10] == split.share(0.4)[:10]
    assert len(split.share(0.0)) == 1
    assert split_rows(100, train_rows=None, held_out=0, seed=0).held_out == ()


@pytest.mark.parametrize(("train_rows", "held_out"), [(95, 10), (None, 100), (1, 101)])
def test_more_rows_than_there_are_are_refused(train_rows: int | None, held_out: int) -> None:
    with pytest.raises(UsageError, match="the training file has 100 rows"):
        split_rows(100, train_rows=train_rows, held_out=held_out, seed=0)

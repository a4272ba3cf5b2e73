"""Which tensor is which of another checkpoint."""

from __future__ import annotations

import pytest

from noisytune_cli.errors import UsageError
from noisytune_cli.plan.renames import Renaming, Rules, likely_renamings, pair_up
from noisytune_cli.records import TensorSpec


def specs(**shapes: tuple[int, ...]) -> list[TensorSpec]:
    return [named(name.replace("__", "."), *shape) for name, shape in shapes.items()]


def named(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, "F32", shape, "model.safetensors", 0, 4)


def pairs(a: list[TensorSpec], b: list[TensorSpec], *rules: tuple[str, str]) -> dict[str, str]:
    return {p.a.name: p.b.name for p in pair_up(a, b, Rules(rules) if rules else None).pairs}


def test_equal_names_are_pairs_in_the_order_of_the_first() -> None:
    found = pair_up(specs(x=(2,), y=(3,), z=(4,)), specs(y=(3,), w=(1,), x=(9,)))
    assert [(p.a.name, p.b.shape) for p in found.pairs] == [("x", (9,)), ("y", (3,))]
    assert [t.name for t in found.only_a] == ["z"]
    assert [t.name for t in found.only_b] == ["w"]
    assert found.renaming == Renaming()


def test_a_prefix_is_found_on_either_side() -> None:
    plain = specs(layer__0__weight=(2, 2), layer__1__weight=(2, 2), head__weight=(3,))
    wrapped = specs(
        bert__layer__0__weight=(2, 2), bert__layer__1__weight=(2, 2), head__weight=(3,), bert__more=(1,)
    )
    added = pair_up(plain, wrapped)
    assert added.renaming == Renaming(add="bert.")
    assert {p.a.name: p.b.name for p in added.pairs} == {
        "layer.0.weight": "bert.layer.0.weight",
        "layer.1.weight": "bert.layer.1.weight",
        "head.weight": "head.weight",
    }
    assert [t.name for t in added.only_b] == ["bert.more"]
    assert pair_up(wrapped, plain).renaming == Renaming(strip="bert.")
    assert str(added.renaming) == "with bert. before"


def test_a_prefix_counts_only_where_shapes_agree() -> None:
    found = pair_up(specs(a__x=(2,), a__y=(3,)), specs(x=(2,), y=(4,)))
    assert [(p.a.name, p.b.name) for p in found.pairs] == [("a.x", "x")]
    assert [t.name for t in found.only_b] == ["y"]
    assert pair_up(specs(a__x=(2,)), specs(x=(3,))).renaming == Renaming()


def test_rules_put_the_text_of_each_star_where_the_name_has_one() -> None:
    a, b = (
        specs(h__0__attn__w=(1,), h__1__attn__w=(1,)),
        specs(layers__0__att__w=(1,), layers__1__att__w=(1,)),
    )
    assert pairs(a, b, ("h.*.attn.*", "layers.*.att.*")) == {
        "h.0.attn.w": "layers.0.att.w",
        "h.1.attn.w": "layers.1.att.w",
    }


def test_the_last_rule_that_fits_counts_and_a_rule_beats_the_name() -> None:
    a, b = specs(x=(1,), y=(1,)), specs(x=(1,), y=(1,), z=(1,))
    assert pairs(a, b, ("x", "y"), ("x", "z")) == {"x": "z", "y": "y"}


@pytest.mark.parametrize("rule", [("h.*", "x"), ("h", "x.*"), ("*.*", "*")])
def test_stars_must_be_as_many(rule: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="as many"):
        Rules([rule])


def test_rules_that_fit_nothing_or_make_two_names_one_are_refused() -> None:
    with pytest.raises(UsageError, match=r"pattern matches nothing: z\*"):
        Rules([("z*", "y*")]).apply(["x"])
    with pytest.raises(UsageError, match="two tensors become x"):
        Rules([("a.*", "*"), ("b.*", "*")]).apply(["a.x", "b.x"])


def test_a_long_name_is_looked_through_once() -> None:
    # With backtracking, or a prefix for each of its dots, this would not end.
    with pytest.raises(UsageError, match="matches nothing"):
        Rules([("*a*a*a*a*b", "*1*2*3*4*5")]).apply(["a" * 100_000])
    assert pair_up([named("." * 100_000, 1)], [named("." * 99_999, 1)]).renaming == Renaming(strip=".")
    assert len(likely_renamings(["." * 100_000])) < 20


def test_likely_renamings_are_prefixes_that_most_have_and_wrappers() -> None:
    names = ["model.bert.layer.0.w", "model.bert.layer.1.w", "model.bert.pooler.w", "classifier.w"]
    found = likely_renamings(names, "roberta")
    assert found[:2] == [Renaming(strip="model."), Renaming(strip="model.bert.")]
    assert Renaming(add="module.") in found
    assert Renaming(add="roberta.") in found
    assert [Renaming(add="m.").apply(name) for name in ("m.x", "x")] == ["m.x", "m.x"]

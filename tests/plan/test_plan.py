import math
from dataclasses import replace
from typing import Any

import pytest

from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.plan.plan import (
    check_noise,
    check_not_empty,
    check_outcomes,
    confirm_ties,
    make_plan,
    no_matrices,
)
from noisytune_cli.records import NoiseSpec, Plan, Step, TensorSpec, Tie

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def spec(name: str, shape: tuple[int, ...] = (8, 8), dtype: str = "F32") -> TensorSpec:
    return TensorSpec(name, dtype, shape, "model.safetensors", 0, 0)


MODEL = [
    spec(HEAD),
    spec("h.0.attn.bias", (1, 1, 8, 8)),
    spec("h.0.attn.c_attn.weight"),
    spec("h.0.ln_1.weight", (8,)),
    spec("ids", (8,), "I64"),
    spec("logit_scale", ()),
    spec(EMBEDDING),
    spec("none", (0, 8)),
    spec("half", dtype="BF16"),
]


def plan(**noise: Any) -> Plan:
    return make_plan(MODEL, NoiseSpec(**noise))


def step(plan: Plan, name: str) -> Step:
    return next(step for step in plan.steps if step.tensor.name == name)


def reasons(plan: Plan) -> dict[str, str]:
    return {step.tensor.name: step.reason or step.action for step in plan.steps}


def confirm(plan: Plan) -> Plan:
    return confirm_ties(plan, plan.ties)


def test_what_is_no_matrix_is_warned_of() -> None:
    flat = spec("layers.0._fsdp_wrapped_module._flat_param", (400,))
    tensors = [flat, spec("my_flat_params", (9,)), spec("spectral.weights1", dtype="C64"), spec("a.weight")]
    of_flat, of_complex = no_matrices(make_plan(tensors, NoiseSpec()))
    assert of_flat.startswith("layers.0._fsdp_wrapped_module._flat_param: all parameters of a module")
    assert of_complex == "spectral.weights1: complex numbers, which get no noise"
    assert no_matrices(make_plan(tensors, NoiseSpec(include=("a.*",)))) == []


def test_every_tensor_has_a_step_in_file_order_with_its_reason() -> None:
    made = plan()
    assert [step.tensor for step in made.steps] == MODEL
    assert reasons(made) == {
        HEAD: "perturb",
        "h.0.attn.bias": "buffer",
        "h.0.attn.c_attn.weight": "perturb",
        "h.0.ln_1.weight": "perturb",
        "ids": "not-float",
        "logit_scale": "one-element",
        EMBEDDING: "perturb",
        "none": "empty",
        "half": "perturb",
    }
    assert {step.lam for step in made.steps if step.action == "perturb"} == {0.15}
    assert {step.lam for step in made.steps if step.action == "copy"} == {0.0}


def test_what_only_the_values_can_tell_is_marked() -> None:
    made = plan()
    assert step(made, "half").unsure == ("constant", "non-finite", "computed")
    assert step(made, HEAD).unsure == ("constant", "non-finite", "tied")
    assert step(made, "ids").unsure == ()


def test_scope_global_perturbs_constants_and_one_element_tensors() -> None:
    made = plan(scope="global")
    assert reasons(made)["logit_scale"] == "perturb"
    assert reasons(made)["none"] == "empty"
    assert step(made, "logit_scale").unsure == ("non-finite",)


def test_only_included_tensors_are_perturbed_and_exclude_beats_include() -> None:
    made = plan(include=("h.*",), exclude=("@norm",))
    assert reasons(made)["h.0.attn.c_attn.weight"] == "perturb"
    assert reasons(made)["h.0.ln_1.weight"] == "excluded"
    assert reasons(made)["half"] == "excluded"


def test_include_overrides_the_buffer_rules_never_the_safety_rules() -> None:
    made = reasons(plan(include=("*",)))
    assert made["h.0.attn.bias"] == "perturb"
    assert (made["ids"], made["logit_scale"], made["none"]) == ("not-float", "one-element", "empty")


def test_a_buffer_stays_one_when_excluded_or_included_by_kind() -> None:
    assert reasons(plan(include=("*",), exclude=("*.bias",)))["h.0.attn.bias"] == "buffer"
    assert reasons(plan(include=("@attention",)))["h.0.attn.bias"] == "buffer"


def test_safety_rules_come_before_filters_and_filters_before_lambda() -> None:
    made = reasons(plan(exclude=("ids", "half"), lam=0.0))
    assert (made["ids"], made["half"], made[HEAD]) == ("not-float", "excluded", "lambda-zero")


def test_the_last_matching_rule_gives_lambda() -> None:
    made = plan(rules=(("h.*", 0.3), ("@norm", 0.0), ("*c_attn*", 0.2), ("h.0.attn*", 0.1)))
    assert step(made, "h.0.attn.c_attn.weight").lam == 0.1
    assert step(made, "h.0.ln_1.weight").reason == "lambda-zero"
    assert step(made, "half").lam == 0.15


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_a_usage_error(option: str) -> None:
    with pytest.raises(UsageError, match=r"matches nothing: half\.\*"):
        plan(**{option: ("half.*",)})


def test_a_rule_that_matches_nothing_or_no_kind_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="matches nothing: @mlp"):
        plan(rules=(("@mlp", 0.1),))
    with pytest.raises(UsageError, match="no such kind"):
        plan(rules=(("@nrom", 0.1),))


@pytest.mark.parametrize(
    "noise",
    [
        NoiseSpec(lam=math.nan),
        NoiseSpec(lam=math.inf),
        NoiseSpec(kept=1.5),
        NoiseSpec(kept=-0.5),
        NoiseSpec(kept=math.nan),
        NoiseSpec(rules=(("*", 0.1), ("*", math.inf))),
        NoiseSpec(seed=-1),
        NoiseSpec(seed=2**64),
    ],
)
def test_a_bad_lambda_or_seed_is_a_usage_error(noise: NoiseSpec) -> None:
    with pytest.raises(UsageError):
        check_noise(noise)
    with pytest.raises(UsageError):
        make_plan(MODEL, noise)


def test_the_limits_of_lambda_and_seed_are_allowed() -> None:
    check_noise(NoiseSpec(lam=0.0, seed=0))
    check_noise(NoiseSpec(lam=1e300, seed=2**64 - 1, rules=(("x", 0.0),)))


def test_a_candidate_has_its_own_stream_until_it_is_confirmed() -> None:
    made = plan()
    assert made.ties == (Tie(EMBEDDING, (HEAD, EMBEDDING), "equal-bytes"),)
    assert step(made, HEAD).stream == HEAD
    confirmed = confirm(made)
    assert step(confirmed, HEAD).stream == step(confirmed, EMBEDDING).stream == EMBEDDING
    assert step(confirmed, HEAD).unsure == ("constant", "non-finite")
    assert confirmed.ties == made.ties


def test_a_candidate_that_the_values_deny_leaves_two_tensors() -> None:
    denied = confirm_ties(plan(exclude=("@embeddings",)), ())
    assert denied.ties == ()
    assert step(denied, HEAD).stream == HEAD
    assert step(denied, HEAD).action == "perturb"
    assert step(denied, HEAD).unsure == ("constant", "non-finite")
    assert step(denied, EMBEDDING).reason == "excluded"


def test_confirming_changes_no_other_step() -> None:
    made = plan(include=("*",))
    for before, after in zip(made.steps, confirm(made).steps, strict=True):
        assert before == after or before.tensor.name in (HEAD, EMBEDDING)


def test_excluding_one_name_of_a_tie_excludes_all() -> None:
    for pattern in ("@embeddings", "@head"):
        made = reasons(confirm(plan(exclude=(pattern,))))
        assert (made[HEAD], made[EMBEDDING]) == ("excluded", "excluded")


def test_including_one_name_of_a_tie_includes_all() -> None:
    before = plan(include=(HEAD,))
    assert (reasons(before)[EMBEDDING], step(before, EMBEDDING).unsure) == ("excluded", ("tied",))
    made = reasons(confirm(before))
    assert (made[HEAD], made[EMBEDDING], made["half"]) == ("perturb", "perturb", "excluded")


def test_the_last_rule_for_any_name_of_a_tie_gives_its_lambda() -> None:
    made = confirm(plan(rules=((EMBEDDING, 0.3), (HEAD, 0.2))))
    assert (step(made, HEAD).lam, step(made, EMBEDDING).lam) == (0.2, 0.2)
    made = confirm(plan(rules=((HEAD, 0.0),)))
    assert step(made, EMBEDDING).reason == "lambda-zero"


def test_an_alias_is_decided_at_once_and_survives_the_values() -> None:
    tensors = [*MODEL, spec("a.in"), spec("b.out")]
    noise = NoiseSpec(exclude=("b.out",))
    made = make_plan(tensors, noise, metadata={"b.out": "a.in", "format": "pt"})
    assert [step(made, name).reason for name in ("a.in", "b.out")] == ["excluded", "excluded"]
    assert step(made, "b.out").stream == "a.in"
    assert Tie("a.in", ("a.in", "b.out"), "alias") in confirm_ties(made, ()).ties
    assert step(confirm_ties(made, ()), "b.out") == step(made, "b.out")


def test_a_candidate_with_three_names_can_be_confirmed_in_part() -> None:
    names = ["decoder.embed_tokens.weight", HEAD, "shared.weight"]
    made = make_plan([spec(name) for name in names], NoiseSpec())
    part = Tie("shared.weight", (names[0], names[2]), "equal-bytes")
    streams = [step.stream for step in confirm_ties(made, [part]).steps]
    assert streams == ["shared.weight", HEAD, "shared.weight"]


def test_a_config_that_parts_the_head_leaves_no_candidate() -> None:
    made = make_plan(MODEL, NoiseSpec(), config={"tie_word_embeddings": False})
    assert made.ties == ()
    assert "tied" not in step(made, HEAD).unsure


def test_parameters_that_look_like_buffers_are_perturbed() -> None:
    names = ["mixer.A_log", "mixer.D", "mixer.dt_bias", "self_attn.sinks", "attention.self.query.bias"]
    made = make_plan([spec(name, (64,)) for name in names], NoiseSpec())
    assert set(reasons(made).values()) == {"perturb"}


def test_a_plan_that_perturbs_something_is_not_empty() -> None:
    check_not_empty(plan())


def test_filters_that_leave_nothing_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match="5 excluded"):
        check_not_empty(plan(include=("ids",)))
    with pytest.raises(UsageError, match="nothing would be perturbed"):
        check_not_empty(plan(exclude=("*",)))


@pytest.mark.parametrize("tensors", [[], [spec("ids", (8,), "I64"), spec("logit_scale", ())]])
def test_input_that_can_take_no_noise_is_invalid(tensors: list[TensorSpec]) -> None:
    with pytest.raises(InputInvalid, match=r"nothing to perturb: model\.safetensors: "):
        check_not_empty(make_plan(tensors, NoiseSpec()), path="model.safetensors")


def test_lambda_zero_is_no_error() -> None:
    check_not_empty(plan(lam=0.0))
    check_not_empty(plan(rules=(("*", 0.0),)))
    check_not_empty(plan(exclude=("*",), lam=0.0))
    check_not_empty(make_plan([], NoiseSpec(lam=0.0)))


def test_outcomes_known_from_the_values_are_asked_too() -> None:
    check_outcomes(NoiseSpec(), [("copy", "constant"), ("perturb", None)])
    with pytest.raises(InputInvalid, match="2 constant, 1 non-finite"):
        check_outcomes(NoiseSpec(), [("copy", "constant"), ("copy", "non-finite"), ("copy", "constant")])
    with pytest.raises(UsageError):
        check_outcomes(NoiseSpec(), [("copy", "constant"), ("copy", "excluded")])


def test_a_norm_by_its_shapes_is_one_by_its_path_and_in_a_tie_too() -> None:
    named = [spec("text_model.mlp.1.weight", (8,)), spec("text_model.mlp.1.bias", (8,))]
    with_path = [replace(tensor, path=f"gan.{tensor.name}") for tensor in named]
    layer = spec("text_model.mlp.0.weight")
    made = make_plan([*with_path, layer], NoiseSpec(include=("@mlp",)))
    assert list(reasons(made).values()) == ["excluded", "excluded", "perturb"]
    twice = [replace(tensor, name=f"audio_model.{tensor.name}") for tensor in named]
    made = make_plan([*named, *twice, layer], NoiseSpec(exclude=("@norm",)))
    assert len(made.ties) == 2
    assert list(reasons(confirm(made)).values()) == [*["excluded"] * 4, "perturb"]

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save, save_sharded, weights

import noisytune_cli
from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.plan.plan import make_plan
from noisytune_cli.plan.ties import find_ties, split_tie, stream_of
from noisytune_cli.records import NoiseSpec, Scope, TensorSpec, Tie


def spec(name: str, shape: tuple[int, ...] = (100, 8), dtype: str = "F32") -> TensorSpec:
    return TensorSpec(name, dtype, shape, "model.safetensors", 0, 0)


def ties(*names: str, **options: Any) -> list[tuple[str, ...]]:
    """The names of the ties among `names`, each with its stream first."""
    return [
        (tie.stream, *(name for name in tie.names if name != tie.stream))
        for tie in find_ties([spec(name) for name in names], **options)
    ]


PAIRS = [
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("model.language_model.embed_tokens.weight", "lm_head.weight"),
    ("model.model.language_model.embed_tokens.weight", "model.lm_head.weight"),
    ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ("module.transformer.wte.weight", "module.lm_head.weight"),
    ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
    ("albert.embeddings.word_embeddings.weight", "predictions.decoder.weight"),
    ("distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"),
    ("electra.embeddings.word_embeddings.weight", "generator_lm_head.weight"),
    ("model.decoder.embed_tokens.weight", "proj_out.weight"),
    ("gpt_neox.embed_in.weight", "embed_out.weight"),
    ("backbone.embeddings.weight", "lm_head.weight"),
    ("shared.weight", "encoder.embed_tokens.weight"),
    ("model.shared.weight", "model.decoder.embed_tokens.weight"),
    ("model.shared.weight", "lm_head.weight"),
    ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    ("lm_head.bias", "lm_head.decoder.bias"),
]


@pytest.mark.parametrize(("stream", "other"), PAIRS)
def test_a_known_pair_is_a_candidate_with_the_input_side_as_stream(stream: str, other: str) -> None:
    for names in [(stream, other), (other, stream)]:
        assert find_ties([spec(name) for name in names]) == (Tie(stream, names, "equal-bytes"),)


@pytest.mark.parametrize(
    "names",
    [
        ("model.embed_tokens.weight", "other.lm_head.weight"),
        ("text.model.embed_tokens.weight", "vision.lm_head.weight"),
        ("a.b.c.d.embed_tokens.weight", "lm_head.weight"),
        ("my_shared.weight", "encoder.embed_tokens.weight"),
        ("model.embed_tokens.weight", "my_lm_head.weight"),
        ("layers.0.q_proj.weight", "layers.1.q_proj.weight"),
        ("unet.predictions.decoder.bias", "cls.predictions.bias"),
    ],
)
def test_what_no_architecture_ties_is_no_candidate(names: tuple[str, str]) -> None:
    assert ties(*names) == []


def test_a_pair_must_agree_in_dtype_and_shape_and_be_float() -> None:
    embedding = spec("model.embed_tokens.weight")
    assert find_ties([embedding, spec("lm_head.weight", (101, 8))]) == ()
    assert find_ties([embedding, spec("lm_head.weight", dtype="BF16")]) == ()
    pair = [spec(name, dtype="U32") for name in ("model.embed_tokens.weight", "lm_head.weight")]
    assert find_ties(pair) == ()


def test_a_chain_is_one_tie_in_file_order() -> None:
    names = (
        "decoder.embed_tokens.weight",
        "encoder.embed_tokens.weight",
        "layer.weight",
        "lm_head.weight",
        "shared.weight",
    )
    tied = (*names[:2], *names[3:])
    assert find_ties([spec(name) for name in names]) == (Tie("shared.weight", tied, "equal-bytes"),)


def test_the_tables_of_both_sides_are_a_pair_where_shared_was_left_out() -> None:
    both = ("model.decoder.embed_tokens.weight", "model.encoder.embed_tokens.weight")
    assert ties(*both) == [both]


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, True),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": None}, True),
        ({"tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({"text_config": {"tie_word_embeddings": False}, "tie_word_embeddings": True}, True),
        ({"text_config": "odd"}, True),
    ],
)
def test_the_config_can_part_head_and_embedding(config: dict[str, Any], tied: bool) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    assert ties(*names, config=config) == ([names] if tied else [])


def test_the_config_does_not_part_what_is_one_module() -> None:
    config = {"tie_word_embeddings": False}
    names = ("shared.weight", "encoder.embed_tokens.weight", "lm_head.weight")
    assert ties(*names, config=config) == [names[:2]]
    bias = ("cls.predictions.bias", "cls.predictions.decoder.bias")
    assert ties(*bias, config=config) == [bias]


def test_an_alias_of_two_stored_names_is_a_tie_without_asking_the_values() -> None:
    tensors = [spec("head.out"), spec("body.in")]
    metadata = {"head.out": "body.in", "format": "pt"}
    assert find_ties(tensors, metadata=metadata) == (Tie("body.in", ("head.out", "body.in"), "alias"),)


def test_an_alias_of_itself_or_of_another_shape_is_nothing() -> None:
    assert find_ties([spec("kept")], metadata={"kept": "kept"}) == ()
    assert find_ties([spec("a"), spec("b", (2, 2))], metadata={"a": "b"}) == ()


def test_a_name_that_only_an_alias_mentions_is_one_of_the_parameters() -> None:
    kept, dropped = "lm_head.weight", "model.embed_tokens.weight"
    (tie,) = find_ties([spec(kept)], metadata={dropped: kept, "format": "pt"})
    assert tie == Tie(dropped, (kept,), "alias", ((dropped, kept),))
    assert tie.all_names == (kept, dropped)
    # Metadata may say anything of a tensor.
    assert find_ties([spec(kept)], metadata={"largest": kept, "largest.bias": kept, ".weight": kept}) == ()
    assert find_ties([spec(kept, dtype="I64")], metadata={dropped: kept}) == ()


def test_a_dropped_name_follows_the_stored_one_where_bytes_part_a_candidate() -> None:
    head, table, dropped = "lm_head.weight", "model.embed_tokens.weight", "model.wte.weight"
    (tie,) = find_ties([spec(head), spec(table)], metadata={dropped: head})
    assert (tie.names, tie.evidence) == ((head, table), "equal-bytes")
    assert split_tie(tie, {head: 1, table: 1}) == (tie,)
    assert split_tie(tie, {head: 1, table: 2}) == (Tie(dropped, (head,), "alias", ((dropped, head),)),)


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_a_model_gets_one_noise_whichever_of_its_tied_names_is_stored(scope: Scope, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    embedding = torch.nn.Embedding(20, 4)
    model = torch.nn.ModuleDict(
        {
            "model": torch.nn.ModuleDict({"embed_tokens": embedding, "layer": torch.nn.Linear(4, 4)}),
            "lm_head": torch.nn.Linear(4, 20, bias=False),
        }
    )
    model["lm_head"].weight = embedding.weight
    safetensors_torch.save_model(model, tmp_path / "a.safetensors")
    assert "lm_head.weight" in (stored := safetensors_torch.load_file(tmp_path / "a.safetensors"))
    assert "model.embed_tokens.weight" not in stored
    torch.save(model.state_dict(), tmp_path / "a.bin")
    noise = NoiseSpec(scope=scope, rules=(("@embeddings", 0.4),))
    for name in ("a.safetensors", "a.bin"):
        perturb(Request(str(tmp_path / name), noise), str(tmp_path / f"noisy-{name}"))
    noised = torch.load(tmp_path / "noisy-a.bin", weights_only=True)
    noisytune_cli.perturb_(model, scope=scope, rules={"@embeddings": 0.4})
    for name, tensor in safetensors_torch.load_file(tmp_path / "noisy-a.safetensors").items():
        assert torch.equal(tensor, noised[name]), name
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert not torch.equal(noised["lm_head.weight"], stored["lm_head.weight"])
    assert verify(str(tmp_path / "noisy-a.safetensors"), base=str(tmp_path / "a.safetensors")).ok
    manifest = tmp_path / "noisy-a.safetensors.noisytune.json"
    replay(str(manifest), str(tmp_path / "again.safetensors"), base=str(tmp_path / "a.safetensors"))
    written = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("noisy-a", "again")]
    assert written[0] == written[1]


@pytest.mark.parametrize("place", ["index", "the tensor's shard", "another shard"])
def test_shards_and_one_file_get_one_noise_wherever_an_alias_stands(place: str, tmp_path: Path) -> None:
    alias = {"model.embed_tokens.weight": "lm_head.weight"}
    head, rest = {"lm_head.weight": weights("F32", 20, 4)}, {"norm.weight": weights("F32", 9)}
    save(tmp_path / "one.safetensors", {**head, **rest}, {"format": "pt", **alias})
    shards = save_sharded(tmp_path / "shards", head, rest)
    if place == "index":
        index = shards / "model.safetensors.index.json"
        index.write_text(
            json.dumps({**json.loads(index.read_text()), "metadata": {"total_size": 356, **alias}})
        )
    else:
        name = "model-00001-of-00002" if place == "the tensor's shard" else "model-00002-of-00002"
        tensors = head if place == "the tensor's shard" else rest
        save(shards / f"{name}.safetensors", tensors, {"format": "pt", **alias})
    noise = NoiseSpec(rules=(("@embeddings", 0.4),))
    alone = perturb(Request(str(tmp_path / "one.safetensors"), noise), str(tmp_path / "noisy.safetensors"))
    apart = perturb(Request(str(shards), noise), str(tmp_path / "noisy"))
    digests = [{r.step.tensor.name: r.digest for r in done.manifest.receipts} for done in (alone, apart)]
    assert digests[0] == digests[1]
    assert verify(str(tmp_path / "noisy"), base=str(shards)).ok
    replay(str(tmp_path / "noisy"), str(tmp_path / "again"), base=str(shards))
    assert verify(str(tmp_path / "again")).ok


def test_a_tie_of_many_names_takes_no_longer_than_as_many_tensors() -> None:
    # Every name asked about for every tensor would be 900 million questions.
    names = [f"layer.{i}.weight" for i in range(30_000)]
    metadata = dict.fromkeys(names[1:], names[0])
    plan = make_plan([spec(name) for name in names], NoiseSpec(exclude=("layer.7.*",)), metadata=metadata)
    assert {step.reason for step in plan.steps} == {"excluded"}


def test_an_alias_holds_even_where_the_config_parts_the_pair() -> None:
    names = ("lm_head.weight", "model.embed_tokens.weight")
    (tie,) = find_ties(
        [spec(name) for name in names],
        metadata={names[0]: names[1]},
        config={"tie_word_embeddings": False},
    )
    assert (tie.evidence, tie.stream) == ("alias", names[1])


def test_an_alias_makes_a_known_pair_certain_but_not_its_longer_chain() -> None:
    names = ("encoder.embed_tokens.weight", "shared.weight")
    metadata = {names[0]: names[1]}
    assert find_ties([spec(name) for name in names], metadata=metadata)[0].evidence == "alias"
    chain = find_ties([spec(name) for name in (*names, "lm_head.weight")], metadata=metadata)
    assert chain == (Tie("shared.weight", (*names, "lm_head.weight"), "equal-bytes"),)


def test_a_long_chain_of_aliases_is_one_tie() -> None:
    names = [f"t{index:05}" for index in range(20_000)]
    metadata = dict(zip(names[1:], names, strict=False))
    (tie,) = find_ties([spec(name) for name in names], metadata=dict(reversed(metadata.items())))
    assert tie == Tie(names[0], tuple(names), "alias")


def test_only_names_with_equal_bytes_stay_tied() -> None:
    names = ("decoder.embed_tokens.weight", "lm_head.weight", "shared.weight")
    tie = Tie("shared.weight", names, "equal-bytes")
    same = dict.fromkeys(names, "x")
    assert split_tie(tie, same) == (tie,)
    assert split_tie(tie, same | {"lm_head.weight": "y"}) == (
        Tie("shared.weight", ("decoder.embed_tokens.weight", "shared.weight"), "equal-bytes"),
    )
    assert split_tie(tie, same | {"shared.weight": "y"}) == (
        Tie("decoder.embed_tokens.weight", names[:2], "equal-bytes"),
    )
    assert split_tie(tie, {name: name for name in names}) == ()


def test_a_tie_that_the_file_vouches_for_is_not_split() -> None:
    tie = Tie("a", ("a", "b"), "storage")
    assert split_tie(tie, {"a": 1, "b": 2}) == (tie,)


def test_the_stream_is_byte_wise_smallest_where_no_name_is_an_input_embedding() -> None:
    assert stream_of(["b", "é", "a.z", "Z"]) == "Z"
    assert stream_of(["a.out", "wte.weight"]) == "wte.weight"

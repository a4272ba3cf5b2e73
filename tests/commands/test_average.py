"""average: the mean of checkpoints, and everything that perturb promises too."""

from __future__ import annotations

import json
import math
import os
import resource
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from importlib.resources import files
from operator import mul
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import oracle
import pytest
import torch
from checkpoints import FLOATS, STORED, Tensor, Tensors, floats, numbers, save, save_sharded, split, weights
from chunked import save_chunked
from typer.testing import CliRunner

from noisytune_cli.checkpoint.checkpoint import open_checkpoint
from noisytune_cli.cli.app import app
from noisytune_cli.commands import average as command
from noisytune_cli.commands.average import average
from noisytune_cli.commands.one_model import check_same_buffers
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.dtypes import LARGEST
from noisytune_cli.errors import InputInvalid, Mismatch, OutputUnsafe, ResourceExhausted, UsageError
from noisytune_cli.manifest.average import manifest_bytes, read_any_manifest
from noisytune_cli.noise.devices.cpu import Cpu

SCHEMA = json.loads(files("noisytune_cli.manifest").joinpath("average.schema.json").read_text())

#: More than one tile of 1 MiB in every dtype.
_LARGE = 600_000


def member(seed: int, *shape: int) -> Tensors:
    return {
        **{dtype: weights(dtype, *shape, seed=seed) for dtype in FLOATS},
        "scalar": numbers("F32", seed + 0.5),
        "empty": Tensor("F32", np.zeros((0, 3), np.float32)),
        "count": Tensor("I64", np.arange(3)),
    }


def means(members: Sequence[Tensor], coefficients: Sequence[float]) -> list[Fraction]:
    """The exact means, element by element."""
    shares = [Fraction(c) / sum(map(Fraction, coefficients)) for c in coefficients]
    columns = zip(*(map(Fraction, floats(tensor)) for tensor in members), strict=True)
    return [sum(map(mul, shares, column), Fraction()) for column in columns]


def any_finite(dtype: str, count: int, rng: np.random.Generator) -> Tensor:
    """Numbers of all magnitudes, subnormal and largest ones too."""
    stored, bits, infinity = oracle.STORED[dtype]
    drawn = rng.integers(0, 1 << (8 * bits.itemsize), count, np.uint64).astype(bits)
    drawn[drawn & infinity == infinity] = infinity - 1
    return Tensor(dtype, drawn.view(stored))


#: name -> a tensor of some dtype; the values of several, drawn one after the other, are averaged.
DRAWN: dict[str, Callable[[str, np.random.Generator], Tensor]] = {
    "weights": lambda dtype, rng: weights(dtype, 200, seed=int(rng.integers(1 << 32))),
    "ties": lambda dtype, rng: numbers(dtype, *(rng.integers(-9, 10, 200) / 8).tolist()),
    "any": lambda dtype, rng: any_finite(dtype, 200, rng),
    "largest": lambda dtype, rng: numbers(dtype, *[LARGEST[dtype]] * 3, *[-LARGEST[dtype]] * 3),
    "cancel": lambda dtype, rng: numbers(
        dtype, *rng.choice([1.0, -1.0, 1e-4, 2.0**-24, 60000.0], 200).tolist()
    ),
}


@pytest.mark.parametrize(
    "coefficients",
    [
        *((1.0,) * n for n in (2, 3, 4, 7)),
        (2.0, 1.0, 1.0),
        (0.5, 0.3, 0.2),
        (0.1, 3.0, 1e-17, 0.7),
        (1e300, 3e299, 1e-300),
        (5e-324, 1e-323),
    ],
)
def test_every_value_is_the_nearest_to_the_mean_whatever_the_order(
    coefficients: tuple[float, ...], tmp_path: Path
) -> None:
    rng = np.random.default_rng(len(coefficients))
    members = [
        {f"{dtype} {name}": draw(dtype, rng) for dtype in FLOATS for name, draw in DRAWN.items()}
        for _ in coefficients
    ]
    paths = [str(save(tmp_path / f"{i}.safetensors", tensors)) for i, tensors in enumerate(members)]
    average(paths, str(tmp_path / "out.safetensors"), coefficients=coefficients)
    _, found = split((tmp_path / "out.safetensors").read_bytes())
    for name, data in found.items():
        dtype = name.split()[0]
        values = floats(Tensor(dtype, np.frombuffer(data, STORED[dtype])))
        exact = means([tensors[name] for tensors in members], coefficients)
        assert values == [oracle.nearest(mean, dtype) for mean in exact], name
    order = rng.permutation(len(paths))
    average(
        [paths[i] for i in order],
        str(tmp_path / "again.safetensors"),
        coefficients=[coefficients[i] for i in order],
    )
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()


@pytest.mark.parametrize("coefficients", [(), (1, 1, 1), (0.7, 0.1, 0.3)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_all_agree_on_stays_to_the_bit(
    dtype: str, coefficients: tuple[float, ...], tmp_path: Path
) -> None:
    stored, bits, infinity = oracle.STORED[dtype]
    sign = (infinity << 1) & ~infinity & ((1 << 8 * bits.itemsize) - 1)
    agreed = [sign, 0, infinity, infinity + 1, infinity + sign, infinity - 1, 1, sign + 1]
    members = [Tensor(dtype, np.array([*agreed, *own], bits).view(stored)) for own in ([sign], [0], [sign])]
    paths = [str(save(tmp_path / f"{i}.safetensors", {"w": tensor})) for i, tensor in enumerate(members)]
    average(paths, str(tmp_path / "out.safetensors"), coefficients=coefficients)
    _, found = split((tmp_path / "out.safetensors").read_bytes())
    assert np.frombuffer(found["w"], bits).tolist() == [*agreed, 0]


def test_tiles_and_other_tensors_are_averaged_apart(tmp_path: Path) -> None:
    members = [member(seed, _LARGE) for seed in (1, 2, 3)]
    paths = [save(tmp_path / f"{i}.safetensors", tensors) for i, tensors in enumerate(members)]
    average([str(path) for path in paths], str(tmp_path / "out.safetensors"))
    _, found = split((tmp_path / "out.safetensors").read_bytes())
    for name in (*FLOATS, "scalar"):
        tensors = [m[name] for m in members]
        exact = means([Tensor(t.dtype, t.values.ravel()[::997]) for t in tensors], (1.0, 1.0, 1.0))
        values = floats(Tensor(tensors[0].dtype, np.frombuffer(found[name], STORED[tensors[0].dtype])[::997]))
        assert values == [oracle.nearest(mean, tensors[0].dtype) for mean in exact], name
    assert found["count"] == members[0]["count"].data
    assert found["empty"] == b""


def test_threads_and_mapping_change_nothing(tmp_path: Path) -> None:
    paths = [str(save(tmp_path / f"{i}.safetensors", member(i, 800, 901))) for i in range(3)]
    ways: list[dict[str, Any]] = [{"threads": 1}, {"threads": 5}, {"mmap": True}]
    outputs = []
    for i, options in enumerate(ways):
        average(paths, f"{tmp_path}/out{i}/", **options)
        folder = tmp_path / f"out{i}"
        outputs.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert outputs[0] == outputs[1] == outputs[2]


def test_the_average_of_a_checkpoint_with_itself_is_itself(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", member(4, 50, 3), {"format": "pt"})
    average([str(path)] * 3, str(tmp_path / "out.safetensors"))
    assert (tmp_path / "out.safetensors").read_bytes() == path.read_bytes()


def test_members_may_be_stored_in_different_ways(tmp_path: Path) -> None:
    a, b = {"w": weights("F32", 5, 4, seed=1)}, {"v": weights("BF16", 6, seed=2)}
    save_sharded(tmp_path / "sharded", a, b)
    (tmp_path / "sharded" / "config.json").write_text("{}")
    state = {
        "v": torch.from_numpy(b["v"].values.view(np.int16)).view(torch.bfloat16),
        "w": torch.from_numpy(a["w"].values),
    }
    (tmp_path / "pickled").mkdir()
    torch.save({"state_dict": state}, tmp_path / "pickled" / "pytorch_model.bin")
    result = average([str(tmp_path / "sharded"), str(tmp_path / "pickled")], str(tmp_path / "out"))
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "sharded" / name).read_bytes()
    assert verify(str(tmp_path / "out")).ok
    average([str(tmp_path / "pickled"), str(tmp_path / "sharded")], str(tmp_path / "back"))
    loaded = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)["state_dict"]
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert [source.id for _, source in result.manifest.members] == ["sharded", "pickled"]


def test_tied_names_stay_tied_in_a_pickle(tmp_path: Path) -> None:
    for i in range(2):
        w = torch.full((3, 2), float(i))
        torch.save({"embed": w, "head": w}, tmp_path / f"{i}.bin")
    average([str(tmp_path / "0.bin"), str(tmp_path / "1.bin")], str(tmp_path / "out.bin"))
    loaded = torch.load(tmp_path / "out.bin", weights_only=True)
    assert loaded["embed"].data_ptr() == loaded["head"].data_ptr()
    assert torch.equal(loaded["embed"], torch.full((3, 2), 0.5))


def test_warns_of_what_cannot_be_averaged(tmp_path: Path) -> None:
    a = {"w": numbers("F32", 1, 2), "broken": numbers("F32", math.inf, 1), "n": Tensor("I64", np.arange(2))}
    b = {"w": numbers("F32", 3, 4), "broken": numbers("F32", -math.inf, 1), "n": Tensor("I64", np.ones(2))}
    paths = [str(save(tmp_path / f"{i}.safetensors", tensors)) for i, tensors in enumerate((a, b))]
    result = average(paths, str(tmp_path / "out.safetensors"))
    assert [warning.split(":")[0] for warning in result.warnings] == ["broken", "n"]
    _, found = split((tmp_path / "out.safetensors").read_bytes())
    assert np.isnan(np.frombuffer(found["broken"], np.float32)[0])
    assert found["n"] == a["n"].data


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"v": numbers("F32", 1, 2)}, "alone has it"),
        ({"w": numbers("F32", 1, 2), "v": numbers("F32", 1)}, "alone has it"),
        ({"w": numbers("F32", 1, 2, 3)}, "its shape is [3], and [2]"),
        ({"w": numbers("F64", 1, 2)}, "its dtype is F64, and F32"),
    ],
)
def test_refuses_what_is_another_model(other: Tensors, words: str, tmp_path: Path) -> None:
    a = save(tmp_path / "a.safetensors", {"w": numbers("F32", 1, 2)})
    b = save(tmp_path / "b.safetensors", other)
    with pytest.raises(InputInvalid, match="not checkpoints of one model") as refused:
        average([str(a), str(b)], str(tmp_path / "out"))
    assert words in refused.value.why
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]


def test_a_tied_head_that_one_member_stores_is_explained(tmp_path: Path) -> None:
    table = weights("F32", 8, 4, seed=1)
    one = {"model.embed_tokens.weight": table, "model.norm.weight": weights("F32", 4)}
    save(tmp_path / "a.safetensors", one)
    save(tmp_path / "b.safetensors", {**one, "lm_head.weight": table})
    for names in (("a", "b"), ("b", "a")):
        with pytest.raises(InputInvalid, match="not checkpoints of one model") as refused:
            average([str(tmp_path / f"{name}.safetensors") for name in names], str(tmp_path / "out"))
        assert refused.value.tensor == "lm_head.weight"
        assert "b.safetensors alone has it, beside model.embed_tokens.weight that it is tied to" in str(
            refused.value
        )
        assert "stores a tied weight once" in refused.value.next_step


FACTORS = (
    "base_model.model.q_proj.lora_A.weight",
    "unet.mid.to_q.lora.down.weight",
    "unet.mid.processor.to_q_lora.up.weight",
    "lora_unet_down_blocks_0_to_q.lora_down.weight",
    "lycoris_mid_to_q.hada_w1_a",
    "lycoris_mid_to_q.lokr_w2",
    "base_model.model.q_proj.oft_R.weight",
    "base_model.model.q_proj.vera_lambda_b",
)


@pytest.mark.parametrize("factor", FACTORS)
def test_refuses_adapters_by_their_factors(factor: str, tmp_path: Path) -> None:
    paths = [
        str(save(tmp_path / f"{i}.safetensors", {factor: weights("F32", 4, 8, seed=i)})) for i in range(2)
    ]
    with pytest.raises(InputInvalid, match=r"cannot average adapters.*merge_and_unload") as refused:
        average(paths, str(tmp_path / "out.safetensors"))
    assert refused.value.tensor == factor


@pytest.mark.parametrize("kind", ["LORA", "BONE", "IA3", "PROMPT_TUNING"])
def test_an_adapter_without_factors_has_a_mean(kind: str, tmp_path: Path) -> None:
    for i, name in enumerate("abc"):
        save(tmp_path / name / "adapter_model.safetensors", {"q.x": weights("F32", 8, seed=i)})
        config = {"peft_type": kind, "num_virtual_tokens": 4 + (name == "c"), "base_model_name_or_path": name}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    a, b, c = (str(tmp_path / name) for name in "abc")
    if kind in ("LORA", "BONE"):
        with pytest.raises(InputInvalid, match=rf"factors \({kind}\)"):
            average([a, b], str(tmp_path / "out"))
        return
    average([a, b], str(tmp_path / "out"))
    with pytest.raises(InputInvalid, match=r'adapter_config\.json differs.*"num_virtual_tokens" is 5, and 4'):
        average([a, c], str(tmp_path / "other"))


def test_an_adapter_beside_a_model_does_not_hinder(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / name / "model.safetensors", {"w": weights("F32", 9, seed=ord(name))})
        save(tmp_path / name / "adapter_model.safetensors", {"q.lora_A": weights("F32", 4, 8)})
        (tmp_path / name / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    average([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))
    assert (tmp_path / "out/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("theirs", "field"),
    [
        ({"id2label": {"0": "no", "1": "yes"}}, "id2label.0"),
        ({"vocab_size": 9}, "vocab_size"),
        ({"text_config": {"num_attention_heads": 4}}, "text_config.num_attention_heads"),
        ({"rope_theta": 1e6}, "rope_theta"),
    ],
)
def test_configs_that_differ_are_refused_by_field(theirs: dict[str, Any], field: str, tmp_path: Path) -> None:
    ours = {"id2label": {"0": "yes", "1": "no"}, "vocab_size": 8, "text_config": {"num_attention_heads": 2}}
    for name, config in (("a", ours), ("b", {**ours, **theirs})):
        save(tmp_path / name / "model.safetensors", {"w": weights("F32", 9, seed=ord(name))})
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    members = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(InputInvalid, match=r"config\.json differs.*--ignore-config") as refused:
        average(members, str(tmp_path / "out"))
    assert refused.value.why.startswith(f'"{field}" is ')
    done = CliRunner().invoke(app, ["average", *members, "-o", str(tmp_path / "out"), "--ignore-config"])
    assert done.exit_code == 0
    assert json.loads((tmp_path / "out/config.json").read_text()) == ours


def test_what_a_config_says_of_its_origin_and_training_may_differ(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / name / "model.safetensors", {"w": weights("F32", 9, seed=ord(name))})
        config = {"_name_or_path": name, "hidden_dropout_prob": ord(name) / 999, "transformers_version": name}
        config |= {"problem_type": None} if name == "a" else {"pruned_heads": {}}
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    average([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))
    assert verify(str(tmp_path / "out")).ok


def test_buffers_must_agree(tmp_path: Path) -> None:
    mask = Tensor("F32", np.tril(np.ones((1, 1, 6, 6), np.float32)))
    other = Tensor("F32", np.ones((1, 1, 6, 6), np.float32))
    for name, table in (("a", mask), ("b", mask), ("c", other)):
        tensors = {"h.0.attn.bias": table, "w": weights("F32", 9, 4, seed=ord(name))}
        save(tmp_path / f"{name}.safetensors", tensors)
    a, b, c = (str(tmp_path / f"{name}.safetensors") for name in "abc")
    average([a, b], str(tmp_path / "out.safetensors"))
    _, found = split((tmp_path / "out.safetensors").read_bytes())
    assert found["h.0.attn.bias"] == mask.data
    with pytest.raises(InputInvalid, match=r"a buffer differs: .*h\.0\.attn\.bias") as refused:
        average([a, b, c], str(tmp_path / "other.safetensors"))
    assert refused.value.path == c
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize(
    "names",
    [
        ("bn.running_mean", "bn.running_var"),
        ("batch_stats/bn/mean", "batch_stats/bn/var"),
        ("bn/moving_mean", "bn/moving_variance"),
    ],
)
def test_statistics_are_averaged_where_the_user_says_so(names: tuple[str, str], tmp_path: Path) -> None:
    members = []
    for i in range(2):
        tensors = {name: weights("F32", 4, seed=i * 9 + j) for j, name in enumerate(names)}
        tensors |= {
            "params/bn/scale": weights("F32", 4, seed=i),
            "bn.num_batches_tracked": Tensor("I64", np.array(i)),
        }
        if names[0].startswith("batch_stats"):
            del tensors["bn.num_batches_tracked"]
        members.append(str(save(tmp_path / f"{i}.safetensors", tensors)))
    out = str(tmp_path / "out.safetensors")
    with pytest.raises(InputInvalid, match=r"a buffer differs.*--average-statistics") as refused:
        average(members, out)
    assert refused.value.tensor == names[0]
    done = CliRunner().invoke(app, ["average", *members, "-o", out, "--average-statistics"])
    assert done.exit_code == 0
    assert f"{names[0]}, {names[1]}: the mean of statistics" in done.stderr


def test_other_buffers_have_to_agree_whatever_the_user_says(tmp_path: Path) -> None:
    """Told by values too: a mask of another member."""
    members = []
    for i in range(2):
        mask = Tensor("F32", np.tril(np.ones((8, 8), np.float32), -i))
        members.append(
            str(save(tmp_path / f"{i}.safetensors", {"look": mask, "w": weights("F32", 8, seed=i)}))
        )
    with pytest.raises(InputInvalid, match="a buffer differs") as refused:
        average(members, str(tmp_path / "out.safetensors"), average_statistics=True)
    assert refused.value.tensor == "look"
    assert "--average-statistics" not in str(refused.value)


def test_a_large_buffer_is_compared_in_pieces(tmp_path: Path) -> None:
    mask = Tensor("F32", np.tril(np.ones((1, 1, 2048, 2048), np.float32)))
    members = [
        str(save(tmp_path / f"{i}.safetensors", {"h.0.attn.bias": mask, "w": weights("F32", 9, seed=i)}))
        for i in range(3)
    ]
    with ExitStack() as opened:
        checkpoints = [opened.enter_context(open_checkpoint(member)) for member in members]
        check_same_buffers(checkpoints[:2], members[:2])  # imports what it needs
        tracemalloc.start()
        try:
            check_same_buffers(checkpoints, members)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 8 << 20 < len(mask.data)


def test_refuses_what_holds_nothing_to_average(tmp_path: Path) -> None:
    a = save(tmp_path / "a.safetensors", {"n": Tensor("I64", np.arange(2))})
    with pytest.raises(InputInvalid, match="nothing to average"):
        average([str(a), str(a)], str(tmp_path / "out"))


def test_refuses_a_quantised_member(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / name / "model.safetensors", {"scale": numbers("F32", 1, 2)})
    (tmp_path / "b" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(InputInvalid, match=r"cannot use a quantised checkpoint.* GPTQ .* a mean of them"):
        average([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))


@pytest.mark.parametrize(
    "coefficients", [(1.0,), (1, 2, 3), (1, 0), (1, -1), (1, math.nan), (1, math.inf), (1e308, 1e308)]
)
def test_refuses_bad_coefficients(coefficients: tuple[float, ...], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--coefficients"):
        average(["a", "b"], str(tmp_path / "out"), coefficients=coefficients)


def test_refuses_a_single_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least two"):
        average(["a"], str(tmp_path / "out"))


@pytest.mark.parametrize("out", ["a/out", "b/out"])
def test_never_writes_into_a_member(out: str, tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / name / "model.safetensors", {"w": numbers("F32", 1, 2)})
    with pytest.raises(OutputUnsafe):
        average([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / out))


def test_overwriting_another_member_is_not_advised(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / name / "model.safetensors", {"w": numbers("F32", 1, 2)})
        (tmp_path / name / "noisytune.json").touch()
    with pytest.raises(OutputUnsafe, match="it is the input"):
        average([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "b"))


def test_replaces_an_average(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / name / "model.safetensors", {"w": numbers("F32", 1, 2)})
    members, out = [str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out")
    average(members, out)
    average(members, out, overwrite=True)
    assert verify(out).ok


def test_needs_room_before_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = save(tmp_path / "a.safetensors", {"w": numbers("F32", 1, 2)})
    monkeypatch.setattr(command, "copied_bytes", lambda source: 2**60)
    with pytest.raises(ResourceExhausted, match="not enough space"):
        average([str(a), str(a)], str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_manifest_that_is_not_read_back_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, out = 'w"é\n' * 20, tmp_path / "out.safetensors"
    a = save(tmp_path / "a.safetensors", {name: weights("F32", 2, 2, seed=1)})
    done = average([str(a)] * 50, str(out))
    nbytes = manifest_bytes([one.tensor for one in done.manifest.tensors], 50)
    monkeypatch.setattr(command, "MAX_BYTES", nbytes)
    average([str(a)] * 50, str(tmp_path / "fits.safetensors"))
    with pytest.raises(InputInvalid, match="1 tensors of 51 checkpoints"):
        average([str(a)] * 51, str(tmp_path / "other.safetensors"))
    lines = done.manifest_path.read_text().splitlines()
    (entry,) = (line for line in lines if "source_digests" in line)
    assert len(entry) <= nbytes < len(entry) + 200
    assert not (tmp_path / "other.safetensors").exists()


def test_open_files_are_asked_for_all_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members, limits = [save_chunked(tmp_path / n, {("w",): torch.randn(4, 4)}, files=4) for n in "abc"], []
    monkeypatch.setattr(resource, "setrlimit", lambda what, limit: limits.append(limit))
    monkeypatch.setattr(resource, "getrlimit", lambda what: (10, 1000))
    average([str(member) for member in members], str(tmp_path / "out"))
    # Each holds `.metadata` and four files, and so does the output.
    assert limits[-1] == (64 + 4 * 5, 1000)
    assert verify(str(tmp_path / "out")).ok


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = save(tmp_path / "a.safetensors", {"w": numbers("F32", 1, 2)})

    def fail(*arguments: object) -> int:
        raise MemoryError

    monkeypatch.setattr(Cpu, "convert", fail)
    with pytest.raises(MemoryError):
        average([str(a), str(a)], str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.fixture
def averaged(tmp_path: Path) -> Path:
    for name in "ab":
        save(
            tmp_path / name / "model.safetensors", {"w": weights("F32", 9, seed=ord(name))}, {"format": "pt"}
        )
        (tmp_path / name / "config.json").write_text("{}")
    average([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out"))
    return tmp_path / "out"


def test_the_manifest_follows_its_schema_and_reads_back(averaged: Path) -> None:
    path = averaged / "noisytune.json"
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(path.read_text()))
    recorded = read_any_manifest(path)
    assert recorded.is_original
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert not read_any_manifest(path).is_original


def test_verify_finds_every_changed_byte(averaged: Path) -> None:
    assert verify(str(averaged)).ok
    for name in ("model.safetensors", "config.json"):
        content = (averaged / name).read_bytes()
        for at in range(len(content)):
            (averaged / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            assert not verify(str(averaged)).ok, (name, at)
        (averaged / name).write_bytes(content)
    assert verify(str(averaged)).ok


def test_an_average_has_no_one_base(averaged: Path) -> None:
    with pytest.raises(UsageError, match="several checkpoints"):
        verify(str(averaged), base=str(averaged.parent / "a"))
    with pytest.raises(InputInvalid, match=r"it is that of an average[.].* or name a manifest of noise"):
        replay(
            str(averaged / "noisytune.json"), str(averaged.parent / "again"), base=str(averaged.parent / "a")
        )


def _change(path: tuple[str | int, ...], value: object) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_change(("operation",), "soup"), 'its operation is "soup"'),
        (_change(("members",), []), "fewer than two members"),
        (_change(("members", 0, "coefficient"), 0), "coefficient is not a number > 0"),
        (_change(("members", 0, "coefficient"), "1"), "coefficient is not a number"),
        (_change(("members", 1, "files"), []), "members[1].files is empty"),
        (_change(("members", 1, "path"), "/"), "unknown key"),
        (_change(("tensors", 0, "file"), "../x"), "is not one of source.files"),
        (_change(("tensors", 0, "action"), "copy"), "does not fit the dtype"),
        (_change(("tensors", 0, "source_digests"), []), "one for each member"),
        (_change(("tensors", 0, "source_digests", 1), "blake3:"), "hexadecimal"),
        (_change(("tensors", 0, "digest"), None), "digest is not a string"),
        (_change(("copied", 0, "name"), "../config.json"), "no plain name"),
        (_change(("totals", "bytes"), 1), "totals are not"),
    ],
)
def test_a_manifest_is_read_believing_nothing(
    change: Callable[[Any], None], words: str, averaged: Path
) -> None:
    path = averaged / "noisytune.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputInvalid) as refused:
        verify(str(averaged))
    assert words in refused.value.why


def test_the_command_line(tmp_path: Path) -> None:
    paths = [str(save(tmp_path / f"{i}.safetensors", {"w": numbers("F32", i, 4)})) for i in range(2)]
    out = str(tmp_path / "out.safetensors")
    runner = CliRunner()
    ended = runner.invoke(app, ["average", *paths, "-o", out, "--coefficients", "3,1", "--json", "-q"])
    assert ended.exit_code == 0, ended.output
    said = json.loads(ended.stdout)
    assert [one["coefficient"] for one in said["members"]] == [3.0, 1.0]
    assert (said["tensors"], said["averaged"]) == (1, 1)
    _, found = split(Path(out).read_bytes())
    assert np.frombuffer(found["w"], np.float32).tolist() == [0.25, 4.0]
    assert runner.invoke(app, ["average", *paths, "-o", out]).exit_code == 5
    assert runner.invoke(app, ["average", *paths, "-o", out, "--coefficients", "1;2"]).exit_code == 2
    assert runner.invoke(app, ["average", paths[0], "-o", out]).exit_code == 2


@pytest.mark.parametrize("changed", [0, 1])
def test_a_member_that_changes_while_it_is_read(changed: int, tmp_path: Path) -> None:
    sources = [save(tmp_path / f"{seed}.safetensors", member(seed, 9)) for seed in (0, 1)]

    @contextmanager
    def progress(nbytes: int) -> Iterator[Any]:
        os.utime(sources[changed], ns=(1, 1))
        yield lambda done: None

    with pytest.raises(Mismatch):
        average([str(source) for source in sources], str(tmp_path / "out.safetensors"), progress=progress)
    assert sorted(os.listdir(tmp_path)) == ["0.safetensors", "1.safetensors"]

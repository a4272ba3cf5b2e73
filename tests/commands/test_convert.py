"""Another dtype on the way: the noisy sum rounded once, and index, config and manifest that follow."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from checkpoints import FLOATS, STORED, Tensor, numbers, save, save_sharded, split, std32, weights
from runs import run
from typer.testing import CliRunner

from noisytune_cli.checkpoint.checkpoint import open_checkpoint
from noisytune_cli.cli.app import app
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.engine.walk import Walk
from noisytune_cli.errors import InputInvalid, Mismatch
from noisytune_cli.noise import distributions, stream
from noisytune_cli.output.sidecars import companions
from noisytune_cli.records import Conversion, NoiseSpec

TENSORS = {
    **{f"w.{dtype}": weights(dtype, 70, 45, seed=i) for i, dtype in enumerate(FLOATS)},
    "constant": numbers("F32", 0.1, 0.1, 0.1),
    "one": numbers("F64", 1 / 3),
    "nan": numbers("F32", 1.0, float("nan"), 1 / 3, float("-inf")),
    "excluded": weights("F32", 31),
    "bn.running_mean": weights("F32", 45),
    "bn.running_var": weights("F32", 45),
    "bn.num_batches_tracked": Tensor("I64", np.array(7)),
    "bn.weight": weights("F32", 45),
    "bn.bias": weights("F32", 45),
    "ids": Tensor("I32", np.arange(3)),
    "empty": Tensor("F32", np.empty((0, 4), "<f4")),
}
BUFFERS = {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked", "ids"}
NOISE = NoiseSpec(seed=3, exclude=("excluded",))


def expected(name: str, dtype: str, noise: NoiseSpec) -> bytes:
    """Return what the output holds of a tensor, by the reference."""
    tensor = TENSORS[name]
    flat = np.ascontiguousarray(tensor.values, STORED[tensor.dtype]).ravel()
    if name in BUFFERS:
        return tensor.data
    if not name.startswith(("w.", "bn.")):
        return stream.convert(flat, tensor.dtype, dtype)[0].tobytes()
    amplitude = distributions.load(noise.distribution).amplitude(noise.lam, std32(tensor))
    c = stream.coefficients(noise.distribution, noise.seed, name, 0, flat.size)
    return stream.add_noise(flat, tensor.dtype, c, amplitude, dtype)[0].tobytes()


def base(root: Path) -> Path:
    """A folder of two shards with an index and a config."""
    names = list(TENSORS)
    folder = save_sharded(root / "base", *({n: TENSORS[n] for n in part} for part in (names[:7], names[7:])))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["metadata"] = {"total_parameters": 5, "total_size": sum(len(t.data) for t in TENSORS.values())}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(CONFIG)
    (folder / "tokenizer.json").write_text('{"dtype": "float32"}')
    return folder


CONFIG = """{
    "model_type": "bert",
    "torch_dtype": "float32",
    "epsilon": 1e-12,
    "name": "\\u00e9",
    "text_config": {
        "dtype": "bfloat16"
    },
    "encoder": {
        "model_type": "bert",
        "torch_dtype": "torch.float16"
    },
    "processor": {
        "dtype": "float32"
    },
    "dtype": "auto"
}
"""


def stored(folder: Path) -> dict[str, bytes]:
    """Return the data of all tensors in a folder."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= split(path.read_bytes())[1]
    return found


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_tensor_is_rounded_once_from_the_source(dtype: str, tmp_path: Path) -> None:
    folder = base(tmp_path)
    for distribution in ("uniform", "gaussian"):
        noise = NoiseSpec(seed=3, exclude=("excluded",), distribution=distribution)
        out = tmp_path / distribution
        run(folder, out, noise, conversion=Conversion(dtype=dtype))
        found = stored(out)
        assert found == {name: expected(name, dtype, noise) for name in TENSORS}
        assert verify(str(out), base=str(folder)).mismatches == ()
        replay(str(out / "noisytune.json"), str(tmp_path / f"again-{distribution}"), base=str(folder))
        assert tree(tmp_path / f"again-{distribution}") == tree(out)


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_tiles_and_threads_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base(tmp_path)
    run(folder, tmp_path / "out", NOISE, conversion=Conversion(dtype="F64"))
    monkeypatch.setattr("noisytune_cli.engine.walk._LARGEST_KEPT", 64)
    monkeypatch.setattr("noisytune_cli.commands.perturb.Walk", partial(Walk, tile_bytes=96))
    for threads in (1, 3):
        again = tmp_path / f"again-{threads}"
        run(folder, again, NOISE, conversion=Conversion(dtype="F64"), threads=threads, mmap=threads == 3)
        assert tree(again) == tree(tmp_path / "out")


def test_a_file_and_scope_global(tmp_path: Path) -> None:
    source = save(
        tmp_path / "in.safetensors", {"a": weights("F32", 50, 3), "b": weights("F64", 20)}, {"k": "é"}
    )
    out = tmp_path / "out.safetensors"
    result = run(source, out, NoiseSpec(scope="global"), conversion=Conversion(dtype="BF16"))
    std = oracle.std32(
        v
        for t in ("a", "b")
        for v in oracle.values(
            np.frombuffer(split(source.read_bytes())[1][t], "<f4" if t == "a" else "<f8"),
            "F32" if t == "a" else "F64",
        )
    )
    assert {receipt.std for receipt in result.manifest.receipts} == {std}
    header = json.loads(split(out.read_bytes())[0][8:])
    assert header["__metadata__"] == {"k": "é"}
    assert [entry["dtype"] for name, entry in header.items() if name != "__metadata__"] == ["BF16", "BF16"]
    assert verify(str(out), base=str(source)).ok
    replay(f"{out}.noisytune.json", f"{tmp_path}/again/", base=str(source))
    assert (tmp_path / "again" / "in.safetensors").read_bytes() == out.read_bytes()


def test_index_and_config_follow_and_keep_their_style(tmp_path: Path) -> None:
    folder, out = base(tmp_path), tmp_path / "out"
    run(folder, out, NOISE, conversion=Conversion(dtype="F16"))
    text = CONFIG.replace('"torch_dtype": "float32"', '"torch_dtype": "float16"')
    text = text.replace('"dtype": "bfloat16"', '"dtype": "float16"').replace("torch.float16", "float16")
    assert (out / "config.json").read_text() == text
    before = json.loads((folder / "model.safetensors.index.json").read_text())
    after = json.loads((out / "model.safetensors.index.json").read_text())
    assert after["metadata"] == {"total_parameters": 5, "total_size": sum(map(len, stored(out).values()))}
    assert list(after["weight_map"].items()) == list(before["weight_map"].items())
    assert (out / "model.safetensors.index.json").read_bytes() == json.dumps(after, indent=2).encode() + b"\n"
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    manifest = json.loads((out / "noisytune.json").read_text())
    assert manifest["output"]["dtype"] == "F16"
    assert [entry["name"] for entry in manifest["output"]["rewritten"]] == [
        "model.safetensors.index.json",
        "config.json",
    ]
    assert [entry["name"] for entry in manifest["copied"]] == ["tokenizer.json"]
    out_dtypes = {entry["name"]: entry.get("out_dtype") for entry in manifest["tensors"]}
    assert out_dtypes["w.F16"] is None
    assert out_dtypes["bn.running_var"] is None
    assert out_dtypes["excluded"] == out_dtypes["empty"] == out_dtypes["w.F64"] == "F16"


def test_json_in_one_line_stays_in_one_line(tmp_path: Path) -> None:
    save(tmp_path / "in/model.safetensors", {"w": weights("F32", 9)})
    (tmp_path / "in/config.json").write_bytes('{"dtype":"float32","é":[1,2]}'.encode())
    run(tmp_path / "in", conversion=Conversion(dtype="BF16"))
    assert (tmp_path / "out/config.json").read_text() == '{"dtype":"bfloat16","é":[1,2]}'


def test_the_dtype_that_is_there_changes_no_weight_file(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {"w": weights("F32", 99)}, pad=5)
    run(source, tmp_path / "plain.safetensors")
    run(source, tmp_path / "same.safetensors", conversion=Conversion(dtype="F32"))
    assert (tmp_path / "same.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    assert verify(str(tmp_path / "same.safetensors"), base=str(source)).ok


@pytest.mark.parametrize("order", ["given", "reversed"])
def test_torch_can_view_every_tensor(order: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {"i": Tensor("I32", np.array([1])), "h": weights("F16", 3), "f": weights("F32", 3)}
    source = save(tmp_path / "in.safetensors", tensors, order=order)
    run(source, tmp_path / "out.safetensors", conversion=Conversion(dtype="F64"))
    loaded = load_file(tmp_path / "out.safetensors")
    assert {name: str(value.dtype) for name, value in loaded.items()} == {
        "i": "torch.int32",
        "h": "torch.float64",
        "f": "torch.float64",
    }
    assert loaded["i"].tolist() == [1]
    assert verify(str(tmp_path / "out.safetensors"), base=str(source)).ok


@pytest.mark.parametrize("exclude", [(), ("big",)], ids=["noised", "copied"])
@pytest.mark.parametrize(("dtype", "value"), [("F16", 65520.0), ("BF16", 3.4e38), ("F32", 1e39)])
def test_a_value_that_overflows_by_itself_is_refused(
    dtype: str, value: float, exclude: tuple[str, ...], tmp_path: Path
) -> None:
    big = numbers("F64", 0.5, value, -value, 1.0)
    source = save(tmp_path / "in.safetensors", {"big": big, "w": weights("F32", 9)})
    with pytest.raises(
        InputInvalid, match=rf'tensor "big": 2 of its 4 values are beyond .*{dtype}|to {dtype}'
    ) as caught:
        run(
            source,
            tmp_path / "out.safetensors",
            NoiseSpec(exclude=exclude),
            conversion=Conversion(dtype=dtype),
        )
    assert caught.value.tensor == "big"
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_noise_makes_no_finite_value_infinite(tmp_path: Path) -> None:
    values = numbers("F32", *[65504.0, -65504.0] * 50, *[0.0] * 8)
    source = save(tmp_path / "in.safetensors", {"w": values})
    result = run(source, tmp_path / "out.safetensors", NoiseSpec(lam=1.0), conversion=Conversion(dtype="F16"))
    out = np.frombuffer(split((tmp_path / "out.safetensors").read_bytes())[1]["w"], np.float16)
    assert np.isfinite(out).all()
    (receipt,) = result.manifest.receipts
    assert 20 < receipt.clamped < 80
    assert receipt.clamped <= np.count_nonzero(np.abs(out) == 65504.0)


def test_the_conversion_alone_counts_as_unchanged(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {"w": weights("F32", 4000, centre=1.0, width=1e-4)})
    result = run(source, tmp_path / "out.safetensors", conversion=Conversion(dtype="BF16"))
    (receipt,) = result.manifest.receipts
    flat = np.frombuffer(split(source.read_bytes())[1]["w"], np.float32)
    plain = stream.convert(flat, "F32", "BF16")[0]
    out = np.frombuffer(split((tmp_path / "out.safetensors").read_bytes())[1]["w"], np.uint16)
    assert receipt.unchanged == np.count_nonzero(out == plain) > 3000
    assert any("rounding to BF16" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    "place", ["model-00001-of-00002.safetensors", "config.json", "model.safetensors.index.json"]
)
def test_verify_finds_a_changed_byte(place: str, tmp_path: Path) -> None:
    folder, out = base(tmp_path), tmp_path / "out"
    run(folder, out, NOISE, conversion=Conversion(dtype="BF16"))
    whole = (out / place).read_bytes()
    for at in (20, len(whole) // 2, len(whole) - 1):
        (out / place).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert verify(str(out)).mismatches[0].file == place
    (out / place).unlink()
    assert verify(str(out)).mismatches[0].file == place


def test_a_base_whose_config_changed_is_refused(tmp_path: Path) -> None:
    from noisytune_cli.errors import Mismatch

    folder, out = base(tmp_path), tmp_path / "out"
    run(folder, out, NOISE, conversion=Conversion(dtype="BF16"))
    (folder / "config.json").write_text(CONFIG.replace("1e-12", "1e-11"))
    with pytest.raises(Mismatch, match=r"config\.json"):
        replay(str(out / "noisytune.json"), str(tmp_path / "again"), base=str(folder))
    assert not (tmp_path / "again").exists()


def edited(out: Path, change: Any) -> None:
    """Change the manifest of a folder."""
    manifest = json.loads((out / "noisytune.json").read_text())
    change(manifest)
    (out / "noisytune.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["output"].update(dtype="F32"), "output.dtype asks for"),
        (lambda m: m["output"].update(dtype="I8"), "not one of"),
        (lambda m: m["output"].update(dtype=None), "converts nothing"),
        (lambda m: m["output"].update(format="gguf"), "not one of"),
        (lambda m: m["output"]["files"].pop(), "as many as"),
        (lambda m: m["output"]["files"][0].update(name="../x"), "no plain name"),
        (lambda m: m["output"]["files"][0].update(name="config.json"), "two files"),
        (lambda m: m["output"]["rewritten"][0].update(name="noisytune.json"), "two files"),
        (lambda m: m["output"]["rewritten"][0].update(source="tokenizer.json"), "two files"),
        (lambda m: m["output"]["rewritten"][0].update(source="/etc/passwd"), "no plain name"),
        (lambda m: m["output"].update(more=1), "unknown key"),
        (lambda m: m["tensors"][0].pop("out_dtype"), "output.dtype asks for"),
        (lambda m: m["tensors"][0].update(out_dtype="F16"), "output.dtype asks for"),
        (lambda m: m.pop("output"), "output.dtype asks for"),
        (
            lambda m: next(t for t in m["tensors"] if t["name"] == "ids").update(digest="blake3:" + "0" * 64),
            "copy",
        ),
    ],
)
def test_a_manifest_that_lies_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    folder, out = base(tmp_path), tmp_path / "out"
    run(folder, out, NOISE, conversion=Conversion(dtype="BF16"))
    edited(out, change)
    with pytest.raises(InputInvalid, match=words):
        verify(str(out))


@pytest.mark.parametrize("content", ["[1, 2]", '// made by hand\n{"model_type": "x"}'])
def test_a_config_of_another_program_is_copied(content: str, tmp_path: Path) -> None:
    folder, out = base(tmp_path), tmp_path / "out"
    (folder / "config.json").write_text(content)
    done = run(folder, out, NOISE, conversion=Conversion(dtype="BF16"))
    assert any("config.json" in warning for warning in done.warnings)
    assert (out / "config.json").read_text() == content
    assert verify(str(out), base=str(folder)).ok


def test_a_config_that_changes_meanwhile_is_told_as_such(tmp_path: Path) -> None:
    folder = base(tmp_path)
    with open_checkpoint(str(folder)) as opened:
        (folder / "config.json").write_text("[]")
        with pytest.raises(Mismatch, match="the input changed while it was read"):
            companions(opened, (), Conversion(dtype="BF16"))


def test_the_manifest_follows_its_schema(tmp_path: Path) -> None:
    import jsonschema

    from tests.manifest.test_write import SCHEMA

    run(base(tmp_path), tmp_path / "out", NOISE, conversion=Conversion(dtype="BF16"))
    manifest = json.loads((tmp_path / "out/noisytune.json").read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)
    assert verify(str(tmp_path / "out")).checked.files == 5


def test_the_command_line(tmp_path: Path) -> None:
    folder, out = base(tmp_path), tmp_path / "out"
    arguments = ["perturb", str(folder), "--dtype", "bfloat16"]
    planned = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert "w.F32  F32 -> BF16 70x45  perturb" in planned.stdout
    assert "bn.running_mean  F32 45  copy (buffer" in planned.stdout
    assert not out.exists()
    done = CliRunner().invoke(app, [*arguments, "-o", str(out), "--json", "-q"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["bytes"] == sum(p.stat().st_size for p in out.glob("*.safetensors"))
    refused = CliRunner().invoke(app, ["perturb", str(folder), "--dtype", "int8", "-o", str(out)])
    assert refused.exit_code == 2


def test_transformers_loads_the_dtype_and_the_noise(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel, BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20
    )
    BertModel(config).save_pretrained(tmp_path / "in")
    run(tmp_path / "in", conversion=Conversion(dtype="BF16"))
    model, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    found = stored(tmp_path / "out")
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert value.view(torch.uint8).numpy().tobytes() == found[name]


def test_many_outputs_and_a_recipe_are_those_of_single_runs(tmp_path: Path) -> None:
    folder = base(tmp_path)
    arguments = ["perturb", str(folder), "--dtype", "bfloat16", "-q"]
    for more in (
        ["--seed", "0-2", "-o", f"{tmp_path}/many-{{seed}}"],
        ["--seed", "1", "-o", f"{tmp_path}/one"],
    ):
        assert CliRunner().invoke(app, [*arguments, *more]).exit_code == 0
    assert tree(tmp_path / "many-1") == tree(tmp_path / "one")
    recipe = tmp_path / "recipe.json"
    done = CliRunner().invoke(app, [*arguments, "--seed", "1", "--recipe-only", "-o", str(recipe)])
    assert done.exit_code == 0
    assert recipe.read_bytes() == (tmp_path / "one" / "noisytune.json").read_bytes()
    replay(str(recipe), str(tmp_path / "again"), base=str(folder))
    assert tree(tmp_path / "again") == tree(tmp_path / "one")


def test_each_matrix_of_a_tensor_is_rounded_once(tmp_path: Path) -> None:
    upper, lower = weights("F32", 30, 7, seed=1), weights("F32", 30, 7, seed=2, width=0.5)
    fused = Tensor("F32", np.concatenate([upper.values, lower.values, np.full((30, 7), 0.1, np.float32)]))
    source = save(tmp_path / "in.safetensors", {"w": fused})
    out = tmp_path / "out.safetensors"
    asked = ["--granularity", "matrix", "--split", "w=0:/3", "--dtype", "bfloat16", "-q"]
    assert CliRunner().invoke(app, ["perturb", str(source), *asked, "-o", str(out)]).exit_code == 0
    found = np.frombuffer(split(out.read_bytes())[1]["w"], np.uint16).reshape(3, 210)
    c = stream.coefficients("uniform", 0, "w", 0, 630).reshape(3, 210)
    for i, part in enumerate((upper, lower)):
        amplitude = distributions.load("uniform").amplitude(0.15, std32(part))
        made, _, _ = stream.add_noise(part.values.ravel(), "F32", c[i], amplitude, "BF16")
        assert found[i].tobytes() == made.tobytes()
    assert found[2].tobytes() == stream.convert(np.full(210, 0.1, np.float32), "F32", "BF16")[0].tobytes()
    assert verify(str(out), base=str(source)).ok

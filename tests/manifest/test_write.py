"""The manifest: its schema, its numbers, its bytes."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from checkpoints import Tensor, numbers, save, std32, weights

from noisytune_cli.commands.perturb import Perturbed, Request, perturb
from noisytune_cli.errors import InputInvalid
from noisytune_cli.manifest import write as manifest_module
from noisytune_cli.manifest.write import encode
from noisytune_cli.records import NoiseSpec

SCHEMA = json.loads(files("noisytune_cli.manifest").joinpath("manifest.schema.json").read_text())

#: Names that a checkpoint may hold and that nothing may trip over.
HOSTILE = ["", "\x00", "\x1b[2J", "a\n1 tensor OK", "\u202eevil", "../../etc/passwd", "é", "𝕎", '"', "{}"]

TENSORS = {
    "w": weights("F32", 20, 30),
    "half": weights("BF16", 100, centre=1.0, width=0.001),
    "big": numbers("F64", *np.linspace(-1e200, 1e200, 10)),
    "constant": numbers("F32", 0.5, 0.5),
    "nan": numbers("F16", 1.0, math.nan),
    "inf": numbers("F64", 1.0, math.inf),
    "one": numbers("F32", 2.0),
    "empty": Tensor("F32", np.empty((0, 4), "<f4")),
    "ids": Tensor("I64", np.arange(5)),
} | {name: weights("F32", 9, seed=i) for i, name in enumerate(HOSTILE)}


def run(tmp_path: Path, noise: NoiseSpec, out: str = "out") -> Perturbed:
    source = save(tmp_path / "in.safetensors", TENSORS)
    return perturb(Request(str(source), noise), str(tmp_path / out))


def document(result: Perturbed) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(result.manifest_path.read_bytes(), parse_constant=pytest.fail)
    return loaded


@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_follows_its_schema(distribution: str, scope: str, tmp_path: Path) -> None:
    noise = NoiseSpec(
        seed=2**64 - 1,
        distribution=distribution,
        scope=scope,  # type: ignore[arg-type]
        rules=(("h*", 0.5),),
        include=("*",),
        exclude=("w", "big", "inf") if scope == "global" else ("w",),
    )
    found = document(run(tmp_path, noise))
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    assert found["noise"] == {
        "stream": "philox4x32-10/v1",
        "distribution": distribution,
        "scope": scope,
        "granularity": "tensor",
        "seed": "18446744073709551615",
        "lambda": 0.15,
        "rules": [["h*", 0.5]],
        "include": ["*"],
        "exclude": list(noise.exclude),
    }
    keys = {"low", "high"} if distribution == "uniform" else {"noise_std"}
    assert all(keys == {"low", "high", "noise_std"} & tensor.keys() for tensor in found["tensors"])


def test_the_schema_is_a_schema_and_refuses() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate({"schema": 2})


def test_what_each_tensor_says(tmp_path: Path) -> None:
    result = run(tmp_path, NoiseSpec())
    tensors = {tensor["name"]: tensor for tensor in document(result)["tensors"]}
    assert list(tensors) == list(TENSORS)
    reasons = {name: tensor.get("reason") for name, tensor in tensors.items() if tensor["action"] == "copy"}
    assert reasons == {
        "big": "unrepresentable",
        "constant": "constant",
        "nan": "non-finite",
        "inf": "non-finite",
        "one": "one-element",
        "empty": "empty",
        "ids": "not-float",
    }
    assert tensors["nan"]["std"] is None
    assert tensors["big"]["std"] is None
    assert tensors["constant"]["std"] == 0
    assert tensors["empty"]["shape"] == [0, 4]
    assert tensors["half"]["unchanged"] > 50
    for name, tensor in tensors.items():
        if tensor["action"] == "perturb":
            assert np.float32(tensor["std"]) == tensor["std"] == std32(TENSORS[name])
            assert np.float32(tensor["amplitude"]) == tensor["amplitude"]
            assert (tensor["low"], tensor["high"]) == (-tensor["amplitude"] / 2, tensor["amplitude"] / 2)
            untouched = tensor["unchanged"] == TENSORS[name].values.size
            assert (tensor["digest"] == tensor["source_digest"]) is untouched
        else:
            assert (tensor["lambda"], tensor["amplitude"]) == (0, None)
            assert tensor["digest"] == tensor["source_digest"]
    assert document(result)["totals"] == {
        "tensors": len(TENSORS),
        "perturbed": len(HOSTILE) + 2,
        "parameters": sum(t.values.size for t in TENSORS.values()),
        "bytes": sum(len(t.data) for t in TENSORS.values()),
    }


def test_the_same_run_gives_the_same_bytes_wherever_it_goes(tmp_path: Path) -> None:
    first = run(tmp_path, NoiseSpec(), "a").manifest_path.read_bytes()
    second = run(tmp_path, NoiseSpec(), "deep/b").manifest_path.read_bytes()
    assert first == second
    assert str(tmp_path).encode() not in first


def test_is_ascii_one_tensor_a_line(tmp_path: Path) -> None:
    result = run(tmp_path, NoiseSpec())
    content = result.manifest_path.read_bytes()
    assert content == encode(result.manifest)
    assert content.isascii()
    assert not set(content) & set(range(32)) - {10}
    assert len([line for line in content.splitlines() if b'"source_digest"' in line]) == len(TENSORS)


def test_a_number_that_json_lacks_is_an_error_not_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        manifest_module._dump(math.nan)


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = run(tmp_path, NoiseSpec(), "first").manifest_path.stat().st_size
    monkeypatch.setattr(manifest_module, "MAX_BYTES", written)
    with pytest.raises(InputInvalid, match="too many tensors for one manifest"):
        run(tmp_path, NoiseSpec(), "second")
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("granularity", ["tensor", "matrix"])
def test_the_estimate_is_no_less_than_the_manifest(
    granularity: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(
        tmp_path / "in.safetensors", {"in_proj_weight": weights("F32", 3000, 2), "experts": TENSORS["w"]}
    )
    splits = (("in_proj_weight", "0:/3"),) if granularity == "matrix" else ()
    noise = NoiseSpec(granularity=granularity, lam=1 / 3, seed=2**64 - 1, splits=splits)
    written = perturb(Request(str(source), noise), str(tmp_path / "out")).manifest_path.stat().st_size
    monkeypatch.setattr(manifest_module, "MAX_BYTES", written - 1500)  # what stands beside the tensors
    advice = "--split" if granularity == "matrix" else r"perturb_\(\), which needs no manifest"
    with pytest.raises(InputInvalid, match=f"too many tensors.*{advice}"):
        perturb(Request(str(source), noise), str(tmp_path / "again"))

"""--granularity matrix from end to end: a std for each matrix, as indexing and the reference give it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from checkpoints import FLOATS, Tensor, numbers, save, split
from matrices import LAYOUTS, columns, indices, noised
from runs import run

import noisytune_cli
from noisytune_cli.commands.inspect import inspect
from noisytune_cli.commands.perturb import Request, plan_perturb
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.engine import tiles, walk
from noisytune_cli.errors import InputInvalid
from noisytune_cli.manifest.read import read_manifest
from noisytune_cli.manifest.write import to_json
from noisytune_cli.records import Conversion, NoiseSpec, Receipt

MATRIX = NoiseSpec(granularity="matrix", seed=3)
C_ATTN = "h.0.attn.c_attn.weight"


def scaled(dtype: str, *shape: int, seed: int = 0) -> Tensor:
    """Weights whose spread differs from column to column, so that no two matrices have one std."""
    drawn = np.random.default_rng(seed).normal(0, 0.02, shape) * np.linspace(1, 9, shape[-1])
    flat = numbers(dtype, *drawn.ravel().tolist())
    return Tensor(dtype, flat.values.reshape(shape))


def folder(root: Path, tensors: dict[str, Tensor], config: object = None) -> Path:
    save(root / "model.safetensors", tensors, {"format": "pt"})
    if config is not None:
        (root / "config.json").write_text(json.dumps(config))
    return root


def outputs(out: Path) -> dict[str, bytes]:
    return split((out / "model.safetensors").read_bytes())[1]


def receipts(manifest: Any) -> dict[str, Receipt]:
    return {receipt.step.tensor.name: receipt for receipt in manifest.receipts}


@pytest.mark.parametrize("family", LAYOUTS)
def test_every_layout_gets_a_std_for_each_matrix(family: str, tmp_path: Path) -> None:
    layout = LAYOUTS[family]
    dtype = FLOATS[list(LAYOUTS).index(family) % len(FLOATS)]
    tensors = {layout.name: scaled(dtype, *layout.shape)}
    tensors |= {name: scaled("F32", *shape) for name, shape in layout.beside.items()}
    source = folder(tmp_path / "in", tensors, layout.config)
    result = run(source, tmp_path / "out", MATRIX)
    expected, stds = noised(tensors[layout.name], layout.name, indices(layout.shape, layout.slicing), MATRIX)
    assert outputs(tmp_path / "out")[layout.name] == expected
    receipt = receipts(result.manifest)[layout.name]
    assert {done.part.name: done.std for done in receipt.parts} == stds
    assert len(set(stds.values())) > 1
    assert (receipt.action, receipt.std, receipt.amplitude) == ("perturb", None, None)
    assert receipt.unchanged == sum(done.unchanged for done in receipt.parts)


@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
@pytest.mark.parametrize("tile_bytes", [32, 4096])
def test_tiles_slabs_and_threads_change_nothing(
    distribution: str, tile_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = functools.partial(walk.Walk, tile_bytes=tile_bytes)
    monkeypatch.setattr("noisytune_cli.commands.perturb.Walk", small)
    monkeypatch.setattr(tiles, "_LONG", 16)
    tensor = scaled("BF16", 24, 36)
    source = folder(tmp_path / "in", {"attn.c_attn.weight": scaled("F32", 12, 36), "w": tensor})
    noise = NoiseSpec(granularity="matrix", distribution=distribution, splits=(("w", "0:1,2,3*4"),), lam=0.3)
    for buffer in (64 << 20, 0):
        monkeypatch.setattr(walk, "_LARGEST_KEPT", buffer)
        run(source, tmp_path / f"out-{buffer}", noise, threads=3)
        by_six = {
            name: np.arange(24 * 36).reshape(4, 6, 36)[:, a:b].ravel()
            for name, a, b in (("0", 0, 1), ("1", 1, 3), ("2", 3, 6))
        }
        assert outputs(tmp_path / f"out-{buffer}")["w"] == noised(tensor, "w", by_six, noise)[0]


def test_the_manifest_holds_all_that_verify_and_replay_need(tmp_path: Path) -> None:
    tensors = {C_ATTN: scaled("F32", 8, 24), "odd": scaled("F16", 7, 5), "w": scaled("F32", 3, 3)}
    source = folder(tmp_path / "in", tensors)
    noise = NoiseSpec(granularity="matrix", splits=(("odd", "0:3,4"),))
    run(source, tmp_path / "out", noise)
    recorded = read_manifest(tmp_path / "out" / "noisytune.json")
    assert recorded.is_original
    assert recorded.manifest.noise == noise
    assert verify(str(tmp_path / "out")).ok
    assert verify(str(tmp_path / "out"), base=str(source)).ok
    replay(str(tmp_path / "out" / "noisytune.json"), str(tmp_path / "again"), base=str(source))
    for name in ("model.safetensors", "noisytune.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    schema = Path(noisytune_cli.__file__).parent / "manifest" / "manifest.schema.json"
    document = json.loads(recorded.path.read_bytes())
    jsonschema.Draft202012Validator(json.loads(schema.read_text())).validate(document)
    assert "parts" not in document["tensors"][2]
    assert document["tensors"][0]["parts"][1] | {"std": 0, "amplitude": 0, "low": 0, "high": 0} == {
        "name": "k",
        "shape": [8, 8],
        "first": 8,
        "length": 8,
        "stride": 24,
        "repeat": 8,
        "action": "perturb",
        "lambda": 0.15,
        "std": 0,
        "amplitude": 0,
        "low": 0,
        "high": 0,
        "unchanged": 0,
        "clamped": 0,
    }


def test_verify_sees_an_amplitude_of_a_part_that_is_not_the_bytes(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {C_ATTN: scaled("F32", 8, 24)})
    run(source, tmp_path / "out", MATRIX)
    path = tmp_path / "out" / "noisytune.json"
    document = json.loads(path.read_text())
    q, k = document["tensors"][0]["parts"][:2]
    for key in ("std", "amplitude", "low", "high"):
        q[key], k[key] = k[key], q[key]
    path.write_text(json.dumps(document))
    assert any("other bytes" in d.what for d in verify(str(tmp_path / "out"), base=str(source)).mismatches)


def test_the_copy_rules_apply_by_part(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(0, 1, (6, 4)).astype("<f4")
    values[0:1, :], values[1] = 2.5, [1, np.nan, 3, 4]
    values[2] = [1e-45, 1e-45, 1e-45, 0]
    source = folder(tmp_path / "in", {"w": Tensor("F32", values)})
    noise = NoiseSpec(granularity="matrix", splits=(("w", "0:1,1,1,3"),))
    result = run(source, tmp_path / "out", noise)
    receipt = receipts(result.manifest)["w"]
    assert [(done.action, done.reason) for done in receipt.parts] == [
        ("copy", "constant"),
        ("copy", "non-finite"),
        ("copy", "unrepresentable"),
        ("perturb", None),
    ]
    out = np.frombuffer(outputs(tmp_path / "out")["w"], "<f4").reshape(6, 4)
    assert out[:3].tobytes() == values[:3].tobytes()
    assert (out[3:] != values[3:]).all()
    assert any("w[1]" in warning for warning in result.warnings)
    assert verify(str(tmp_path / "out"), base=str(source)).ok


def test_a_tensor_all_of_whose_parts_are_copied_is_a_copy(tmp_path: Path) -> None:
    tensors = {"w": numbers("F32", 1, 1, 2, 2), "one": numbers("F32", 1, 2, 3), "x": scaled("F32", 4, 4)}
    noise = NoiseSpec(granularity="matrix", splits=(("w", "0:/2"), ("one", "0:/3")))
    source = folder(tmp_path / "in", tensors)
    found = receipts(run(source, tmp_path / "out", noise).manifest)
    assert (found["w"].action, found["w"].reason, found["w"].lam) == ("copy", "constant", 0.0)
    assert (found["one"].action, found["one"].reason) == ("copy", "one-element")
    assert found["w"].digest == found["w"].source_digest
    assert verify(str(tmp_path / "out"), base=str(source)).ok


def test_nothing_left_to_perturb_is_an_error(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"w": numbers("F32", 1, 1, 2, 2)})
    with pytest.raises(InputInvalid, match="1 constant"):
        run(source, tmp_path / "out", NoiseSpec(granularity="matrix", splits=(("w", "0:/2"),)))


def test_global_scope_has_one_std_of_all_finite_parts(tmp_path: Path) -> None:
    values = np.random.default_rng(2).normal(0, 1, (4, 3)).astype("<f4")
    values[0, 0] = np.inf
    source = folder(tmp_path / "in", {"w": Tensor("F32", values), "x": scaled("F32", 5)})
    noise = NoiseSpec(granularity="matrix", scope="global", splits=(("w", "0:1,2,1"),))
    found = receipts(run(source, tmp_path / "out", noise).manifest)
    assert [done.reason for done in found["w"].parts] == ["non-finite", None, None]
    stds = {found["x"].std, *(done.std for done in found["w"].parts[1:])}
    assert len(stds) == 1
    plain = folder(tmp_path / "plain", {"w": Tensor("F32", values[1:]), "x": scaled("F32", 5)})
    assert receipts(run(plain, tmp_path / "o", NoiseSpec(scope="global")).manifest)["x"].std in stds
    assert verify(str(tmp_path / "out"), base=str(source)).ok


def test_a_tensor_that_is_not_finite_is_left_out_of_exact_sums(tmp_path: Path) -> None:
    # A bias of zeros leaves float64 squares that may have underflowed, so that exact sums decide.
    broken = numbers("F64", 1, 2, 3)
    broken.values[0] = np.nan
    tensors = {"w": scaled("F64", 4, 4), "bias": numbers("F64", 0, 0, 0), "broken": broken}
    found = receipts(
        run(folder(tmp_path / "in", tensors), tmp_path / "out", NoiseSpec(scope="global")).manifest
    )
    assert found["broken"].reason == "non-finite"
    plain = folder(tmp_path / "plain", {name: tensors[name] for name in ("w", "bias")})
    assert receipts(run(plain, tmp_path / "o", NoiseSpec(scope="global")).manifest)["w"].std == found["w"].std


def test_sums_that_float64_cannot_decide_are_exact_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path / "in", {C_ATTN: scaled("F32", 8, 24)})
    run(source, tmp_path / "quick", MATRIX)
    monkeypatch.setattr("noisytune_cli.engine.matrix.std_and_equality", lambda moments: None)
    monkeypatch.setattr("noisytune_cli.engine.walk.EXACT_AT_ONCE", 2)
    run(source, tmp_path / "exact", MATRIX)
    assert (tmp_path / "exact" / "noisytune.json").read_bytes() == (
        tmp_path / "quick" / "noisytune.json"
    ).read_bytes()


def test_tied_names_are_divided_alike(tmp_path: Path) -> None:
    shared = scaled("F32", 6, 4)
    tensors = {"lm_head.weight": shared, "model.embed_tokens.weight": shared}
    source = folder(tmp_path / "in", tensors)
    noise = NoiseSpec(granularity="matrix", splits=(("lm_head.weight", "0:2,4"),))
    found = receipts(run(source, tmp_path / "out", noise).manifest)
    both = outputs(tmp_path / "out")
    assert both["lm_head.weight"] == both["model.embed_tokens.weight"]
    assert [len(receipt.parts) for receipt in found.values()] == [2, 2]


def test_a_whole_tensor_has_the_same_noise_at_either_granularity(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {"w": scaled("F32", 6, 4), "half": scaled("BF16", 40, 3)})
    run(source, tmp_path / "tensor", NoiseSpec())
    run(source, tmp_path / "matrix", NoiseSpec(granularity="matrix"))
    assert outputs(tmp_path / "tensor") == outputs(tmp_path / "matrix")
    tensor, matrix = (read_manifest(tmp_path / n / "noisytune.json") for n in ("tensor", "matrix"))
    assert to_json(tensor.manifest)["tensors"] == to_json(matrix.manifest)["tensors"]


def test_inspect_reports_each_matrix(tmp_path: Path) -> None:
    tensor = scaled("F32", 8, 24)
    source = folder(tmp_path / "in", {C_ATTN: tensor, "w": numbers("F32", 1, 2, 3, 4, 4)})
    report = inspect(str(source), granularity="matrix", splits=[("w", "0:1,2,2")])
    _, stds = noised(tensor, C_ATTN, indices((8, 24), columns("q", "k", "v")), MATRIX)
    assert {row.part: row.std for row in report.tensors if row.name == C_ATTN} == stds
    assert [(row.part, row.shape, row.action, row.reason) for row in report.tensors[3:]] == [
        ("0", (1,), "copy", "one-element"),
        ("1", (2,), "perturb", None),
        ("2", (2,), "copy", "constant"),
    ]
    assert (report.totals.tensors, report.totals.perturbed, report.totals.parameters) == (2, 2, 197)
    q = report.tensors[0]
    assert (q.min, q.max) == (float(tensor.values[:, :8].min()), float(tensor.values[:, :8].max()))
    assert q.bytes == 256


def test_inspect_without_values_reports_shapes(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {C_ATTN: scaled("F32", 8, 24), "a.qkv.weight": scaled("F32", 24, 8)})
    rows = inspect(str(source), granularity="matrix", headers_only=True).tensors
    assert [(row.part, row.shape) for row in rows[:3]] == [("q", (8, 8)), ("k", (8, 8)), ("v", (8, 8))]
    assert rows[3].part is None
    assert "no config names it" in str(rows[3].undivided)


def test_a_dry_run_says_what_is_divided(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", {C_ATTN: scaled("F32", 8, 24), "a.qkv.weight": scaled("F32", 24, 8)})
    first, second = plan_perturb(Request(str(source), MATRIX)).plan.steps
    assert [part.name for part in first.parts] == ["q", "k", "v"]
    assert second.undivided is not None


def test_each_matrix_is_rounded_straight_to_another_dtype(tmp_path: Path) -> None:
    values = np.random.default_rng(4).normal(0, 1, (6, 4)).astype("<f4")
    values[0] = 3.25
    source = folder(tmp_path / "in", {"w": Tensor("F32", values)})
    noise = NoiseSpec(granularity="matrix", splits=(("w", "0:1,5"),))
    run(source, tmp_path / "out", noise, conversion=Conversion(dtype="F64"))
    out = np.frombuffer(outputs(tmp_path / "out")["w"], "<f8").reshape(6, 4)
    plain = run(source, tmp_path / "plain", noise)
    same = np.frombuffer(outputs(tmp_path / "plain")["w"], "<f4").reshape(6, 4)
    assert (out == same).all()
    assert [done.reason for done in receipts(plain.manifest)["w"].parts] == ["constant", None]
    assert verify(str(tmp_path / "out"), base=str(source)).ok
    replay(str(tmp_path / "out" / "noisytune.json"), str(tmp_path / "again"), base=str(source))
    assert outputs(tmp_path / "again") == outputs(tmp_path / "out")

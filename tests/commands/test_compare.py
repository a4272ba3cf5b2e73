"""compare: which tensors are held against each other, and what is said of them together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Tensor, Tensors, floats, noised, save, save_sharded, weights
from malformed import frame
from runs import run

from noisytune_cli.commands.compare import SORT_KEYS, Comparison, compare
from noisytune_cli.commands.detect import detect
from noisytune_cli.commands.inspect import inspect
from noisytune_cli.errors import InputInvalid, Mismatch, UsageError
from noisytune_cli.records import NoiseSpec, Term, mixed_strength

BASE = {
    "embed_tokens.weight": weights("F32", 50, 8, seed=1),
    "layers.0.mlp.up_proj.weight": weights("F32", 30, 8, seed=2),
    "layers.0.self_attn.q_proj.weight": weights("F32", 8, 8, seed=3),
    "layers.1.mlp.up_proj.weight": weights("F32", 30, 8, seed=4),
    "norm.weight": Tensor("F32", np.ones(8, "<f4")),
    "ids": Tensor("I64", np.arange(4)),
}


def moved(tensors: Tensors = BASE, by: float = 0.5) -> dict[str, Tensor]:
    return {
        name: Tensor(t.dtype, (t.values * (1 + by)).astype(t.values.dtype)) if t.dtype == "F32" else t
        for name, t in tensors.items()
    }


def pair(folder: Path, a: Tensors, b: Tensors, **options: object) -> Comparison:
    paths = [str(save(folder / f"{side}.safetensors", t)) for side, t in (("a", a), ("b", b))]
    return compare(*paths, **options)  # type: ignore[arg-type]


def test_a_checkpoint_does_not_differ_from_itself(tmp_path: Path) -> None:
    found = pair(tmp_path, BASE, BASE)
    assert not found.differs
    assert {row.equal for row in found.rows} == {1.0}
    assert (found.total.largest, found.total.equal) == (0.0, 1.0)
    assert sorted(row.name for row in found.rows) == sorted(BASE)


def test_rows_are_by_tensor_layer_or_kind(tmp_path: Path) -> None:
    by_layer = pair(tmp_path / "l", BASE, moved(), by="layer")
    assert [(row.name, row.tensors, row.elements) for row in by_layer.rows] == [
        ("no layer", 3, 412),
        ("layers.0", 2, 304),
        ("layers.1", 1, 240),
    ]
    by_kind = pair(tmp_path / "k", BASE, moved(), by="kind")
    assert [(row.name, row.tensors) for row in by_kind.rows] == [
        ("embeddings", 1),
        ("norm", 1),
        ("attention", 1),
        ("mlp", 2),
        ("other", 1),
    ]
    assert all(row.change_norm == pytest.approx(0.5) for row in by_kind.rows if row.name != "other")
    assert by_kind.heat_map.layers == ("no layer", "layers.0", "layers.1")
    assert by_kind.heat_map.kinds == ("embeddings", "norm", "attention", "mlp", "other")
    assert by_kind.heat_map.values[2] == (None, None, None, pytest.approx(0.5), None)


def test_a_kind_is_measured_over_all_its_values(tmp_path: Path) -> None:
    changed = {
        **BASE,
        "layers.1.mlp.up_proj.weight": Tensor("F32", -BASE["layers.1.mlp.up_proj.weight"].values),
    }
    row = {row.name: row for row in pair(tmp_path, BASE, changed, by="kind").rows}["mlp"]
    first, second = (np.array(floats(BASE[f"layers.{i}.mlp.up_proj.weight"])) for i in (0, 1))
    norm = np.abs(first).sum() + np.abs(second).sum()
    assert row.norm_change == 0.0
    assert row.change_norm == pytest.approx(2 * np.abs(second).sum() / norm, rel=1e-12)
    assert row.equal == 0.5


def test_what_has_no_partner_or_does_not_fit_is_listed(tmp_path: Path) -> None:
    other = {
        **{name: t for name, t in BASE.items() if name != "norm.weight"},
        "embed_tokens.weight": weights("F32", 51, 8),
        "ids": Tensor("I32", np.arange(4, dtype="<i4")),
        "lm_head.weight": weights("F32", 50, 8),
    }
    found = pair(tmp_path, BASE, other)
    assert [(t.name, t.shape) for t in found.only_a] == [("norm.weight", (8,))]
    assert [t.name for t in found.only_b] == ["lm_head.weight"]
    assert [(m.name, m.shape_a, m.shape_b) for m in found.misfits] == [
        ("embed_tokens.weight", (50, 8), (51, 8)),
        ("ids", (4,), (4,)),
    ]
    assert found.differs
    assert found.total.tensors == 3


def test_shards_formats_dtypes_and_prefixes_may_differ(tmp_path: Path) -> None:
    half = {
        f"model.{name}": Tensor("BF16", (t.values.view("<u4") >> 16).astype("<u2")) if t.dtype == "F32" else t
        for name, t in BASE.items()
    }
    names = list(half)
    root = save_sharded(tmp_path / "b", {n: half[n] for n in names[:3]}, {n: half[n] for n in names[3:]})
    a = str(save(tmp_path / "a.safetensors", BASE))
    found = compare(a, str(root))
    assert found.renaming == "with model. before"
    assert (found.only_a, found.only_b) == ((), ())
    assert found.other_dtype == tuple(name for name, t in BASE.items() if t.dtype == "F32")
    assert found.rows[0].b == "model.embed_tokens.weight"
    assert found.total.change_norm is not None
    assert 0 < found.total.change_norm < 0.01
    assert found.differs
    assert not compare(a, str(root), tolerance=0.01).differs


def test_pickles_are_read_as_well(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({name: torch.from_numpy(t.values.copy()) for name, t in BASE.items()}, tmp_path / "b.pt")
    assert not compare(str(save(tmp_path / "a.safetensors", BASE)), str(tmp_path / "b.pt")).differs


def test_the_tolerance_is_the_largest_change_that_is_none(tmp_path: Path) -> None:
    a, b = {"w": Tensor("F32", np.array([1, 2], "<f4"))}, {"w": Tensor("F32", np.array([1, 2.5], "<f4"))}
    assert pair(tmp_path, a, b, tolerance=0.25).differs
    assert not pair(tmp_path, a, b, tolerance=0.5).differs
    broken = {"w": Tensor("F32", np.array([1, np.nan], "<f4"))}
    assert pair(tmp_path, a, broken, tolerance=9.0).differs
    assert not pair(tmp_path, broken, broken).differs
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="no finite number"):
            pair(tmp_path, a, b, tolerance=wrong)


def test_rows_come_as_inspect_lists_them(tmp_path: Path) -> None:
    """By name, layer 2 before layer 10, whatever the order in the files; so do lists and layers."""
    names = [f"layers.{layer}.w" for layer in (10, 2, 1)]
    tensors = {name: weights("F32", 8, 8, seed=seed) for seed, name in enumerate(("wte.weight", *names))}
    lone = {f"{name}.{side}": weights("F32", 3) for side in ("x10", "x9") for name in names[:1]}
    found = pair(tmp_path, tensors | lone, tensors)
    inspected = [row.name for row in inspect(str(tmp_path / "b.safetensors"), sort="name").tensors]
    assert [row.name for row in found.rows] == inspected
    assert inspected == ["layers.1.w", "layers.2.w", "layers.10.w", "wte.weight"]
    assert [row.name for row in found.only_a] == ["layers.10.w.x9", "layers.10.w.x10"]
    assert found.heat_map.layers == ("no layer", "layers.1", "layers.2", "layers.10")
    by_layer = pair(tmp_path / "l", tensors, tensors, by="layer")
    assert [row.name for row in by_layer.rows] == list(found.heat_map.layers)
    stored = pair(tmp_path / "s", tensors, tensors, sort=None)
    assert [row.name for row in stored.rows] == list(tensors)


def test_the_cosine_of_values_past_what_squares_can_be_is_unknown(tmp_path: Path) -> None:
    a = {"w": Tensor("F64", np.array([1e300, 1.0], "<f8"))}
    assert pair(tmp_path, a, a).total.cosine is None


def test_rules_patterns_and_sorting(tmp_path: Path) -> None:
    renamed = {name.replace("layers", "h"): t for name, t in moved().items()}
    found = pair(
        tmp_path,
        BASE,
        renamed,
        maps=[("layers.*", "h.*")],
        include=["layers.*"],
        exclude=["*attn*"],
        sort="-l2",
    )
    assert {row.name: row.b for row in found.rows} == {
        "layers.0.mlp.up_proj.weight": "h.0.mlp.up_proj.weight",
        "layers.1.mlp.up_proj.weight": "h.1.mlp.up_proj.weight",
    }
    assert [row.l2 for row in found.rows] == sorted((row.l2 for row in found.rows), reverse=True)  # type: ignore[type-var]
    assert "l2" in SORT_KEYS
    with pytest.raises(UsageError, match="no such key"):
        pair(tmp_path, BASE, BASE, sort="size")
    with pytest.raises(UsageError, match="pattern matches nothing"):
        pair(tmp_path, BASE, BASE, include=["nothing"])


def test_the_manifest_tells_how_a_side_was_made(tmp_path: Path) -> None:
    source = save(tmp_path / "in" / "model.safetensors", BASE)
    run(source, tmp_path / "out.safetensors", NoiseSpec(lam=0.3, seed=5))
    found = compare(str(source), str(tmp_path / "out.safetensors"))
    assert found.a.provenance is None
    assert found.b.provenance is not None
    facts = dict(found.b.provenance.facts)
    assert (facts["base"], facts["seed"], facts["λ"]) == ("model.safetensors", "5", "0.3")
    assert found.b.provenance.replay == (
        "noisytune replay out.safetensors.noisytune.json --base model.safetensors -o OUT"
    )
    row = found.rows[0]
    assert row.noise == "uniform"
    assert row.lam == pytest.approx(0.3, rel=0.1)


def test_a_mixture_of_sigma_is_told_so(tmp_path: Path) -> None:
    source = save(tmp_path / "in" / "model.safetensors", BASE)
    mix = (Term(1, 0.3), Term(2, 0.4))
    noise = NoiseSpec(lam=mixed_strength(mix), distribution="gaussian", scope="absolute", kept=0.5, mix=mix)
    run(source, tmp_path / "out.safetensors", noise)
    found = compare(str(source), str(tmp_path / "out.safetensors"))
    assert found.b.provenance is not None
    facts = dict(found.b.provenance.facts)
    assert (facts["σ"], facts["seed"], facts["weights kept"]) == ("0.5", "2 in a mixture", "0.5")
    assert "λ" not in facts


def test_a_buffer_is_of_no_kind(tmp_path: Path) -> None:
    tensors = {
        "bn.weight": weights("F32", 8, seed=1),
        "bn.running_mean": weights("F32", 8, seed=2),
        "bn.running_var": weights("F32", 8, seed=3, centre=5.0),
        "bn.num_batches_tracked": Tensor("I64", np.array(3)),
    }
    found = pair(tmp_path, tensors, tensors)
    assert [(row.name, row.kind) for row in found.rows] == [
        ("bn.num_batches_tracked", "other"),
        ("bn.running_mean", "other"),
        ("bn.running_var", "other"),
        ("bn.weight", "norm"),
    ]
    assert [row.name for row in pair(tmp_path, tensors, tensors, include=["@norm"]).rows] == ["bn.weight"]


def test_headers_alone_tell_of_300_gigabytes(tmp_path: Path) -> None:
    paths = []
    for side, count in (("a", 300), ("b", 299)):
        header, at = {}, 0
        for index in range(count):
            header[f"layers.{index}.w"] = {
                "dtype": "F32",
                "shape": [16384, 16384],
                "data_offsets": [at, at + (1 << 30)],
            }
            at += 1 << 30
        path = tmp_path / f"{side}.safetensors"
        head = frame(json.dumps(header), b"")
        with path.open("wb") as file:
            file.write(head)
            file.truncate(len(head) + at)
        paths.append(str(path))
    found = compare(*paths, headers_only=True)
    assert (found.total.tensors, found.total.largest) == (299, None)
    assert [lone.name for lone in found.only_a] == ["layers.299.w"]
    assert found.differs
    assert not compare(paths[0], paths[0], headers_only=True).differs


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    a, b = (save(tmp_path / f"{side}.safetensors", BASE) for side in "ab")

    def touch(nbytes: int) -> object:
        b.write_bytes(b.read_bytes())
        from contextlib import nullcontext

        return nullcontext(lambda done: None)

    with pytest.raises(Mismatch):
        compare(str(a), str(b), progress=touch)  # type: ignore[arg-type]


def test_the_seed_of_the_change_is_told_as_detect_tells_it(tmp_path: Path) -> None:
    a = save(tmp_path / "a/model.safetensors", BASE).parent
    out = run(a, tmp_path / "out", NoiseSpec(lam=0.1, seed=7)).output
    found = compare(str(a), str(out), seeds=(3, 7))
    told = detect(str(out), seeds=(3, 7), base=str(a))
    assert found.seeds == told.seeds
    assert [score.found for score in found.seeds] == [False, True]
    assert found.seeds[1].low <= 0.1 <= found.seeds[1].high
    (by_manifest,) = compare(str(a), str(out), manifest=str(out)).seeds
    assert (by_manifest.seed, by_manifest.found) == (7, True)


def test_a_seed_is_told_under_other_names_and_of_what_is_chosen(tmp_path: Path) -> None:
    a = save(tmp_path / "a.safetensors", BASE)
    values = {name: tensor for name, tensor in BASE.items() if tensor.dtype == "F32"}
    made = noised(values, NoiseSpec(seed=7))
    noisy = {
        name: Tensor("F32", np.frombuffer(made[name], "<f4").reshape(tensor.values.shape))
        for name, tensor in values.items()
    }
    b = save(tmp_path / "b.safetensors", {f"model.{name}": t for name, t in noisy.items()})
    found = compare(str(a), str(b), seeds=[7], include=["*mlp*"], maps=[("*", "model.*")])
    assert found.seeds[0].found
    assert {t.name for t in found.seeds[0].tensors} == {
        f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)
    }


def test_a_seed_needs_values_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--headers-only"):
        pair(tmp_path / "h", BASE, BASE, seeds=[1], headers_only=True)
    with pytest.raises(InputInvalid, match="nothing to look for noise in"):
        pair(tmp_path / "n", BASE, BASE, seeds=[1], include=["ids"])

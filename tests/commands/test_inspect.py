"""inspect: the rows, what perturb would do, and what is read for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import STORED, Tensor, floats, save, save_sharded, split, std32, weights

from noisytune_cli.checkpoint.formats.safetensors import SafetensorsSource
from noisytune_cli.commands.inspect import SORT_KEYS, TensorReport, inspect
from noisytune_cli.errors import Mismatch, UsageError
from noisytune_cli.records import TensorSpec


@pytest.fixture
def model(tmp_path: Path) -> str:
    tensors = {
        "b.weight": weights("F32", 6, 4, seed=1, width=2.0),
        "a.weight": weights("BF16", 5, seed=2),
        "constant": Tensor("F16", np.ones(4, "<f2")),
        "broken": Tensor("F32", np.array([1, np.nan, np.inf], "<f4")),
        "tiny": Tensor("F64", np.array([1e-300, 2e-300])),
        "count": Tensor("I64", np.array([3])),
        "scale": Tensor("F32", np.array(2.5, "<f4")),
        "empty": Tensor("F32", np.zeros((0, 3), "<f4")),
        "bn.running_mean": Tensor("F32", np.zeros(3, "<f4")),
        "bn.running_var": Tensor("F32", np.ones(3, "<f4")),
        "bn.num_batches_tracked": Tensor("I64", np.array(1)),
    }
    return str(save(tmp_path / "model.safetensors", tensors))


def by_name(source: str, **options: Any) -> dict[str, TensorReport]:
    return {row.name: row for row in inspect(source, **options).tensors}


def test_each_row_says_what_perturb_would_do(model: str) -> None:
    assert {name: (row.action, row.reason) for name, row in by_name(model).items()} == {
        "b.weight": ("perturb", None),
        "a.weight": ("perturb", None),
        "constant": ("copy", "constant"),
        "broken": ("copy", "non-finite"),
        "tiny": ("copy", "unrepresentable"),  # its std rounds to 0 in float32
        "count": ("copy", "not-float"),
        "scale": ("copy", "one-element"),
        "empty": ("copy", "empty"),
        "bn.running_mean": ("copy", "buffer"),
        "bn.running_var": ("copy", "buffer"),
        "bn.num_batches_tracked": ("copy", "not-float"),
    }


def test_rows_are_in_file_order_with_what_the_header_says(model: str) -> None:
    first, second, *_ = inspect(model).tensors
    assert (first.name, first.file, first.dtype, first.shape, first.elements, first.bytes) == (
        "b.weight",
        "model.safetensors",
        "F32",
        (6, 4),
        24,
        96,
    )
    assert (second.name, second.stream, second.unsure) == ("a.weight", "a.weight", ())


def test_the_noise_range_is_lambda_times_std(model: str) -> None:
    row = by_name(model, lam=0.1)["b.weight"]
    std = std32(weights("F32", 6, 4, seed=1, width=2.0))
    assert row.std == std
    assert row.high == float(np.float32(np.float64(0.1) * np.float64(std))) / 2
    assert row.low == -row.high


def test_lambda_zero_is_a_copy_with_statistics(model: str) -> None:
    row = by_name(model, lam=0.0)["b.weight"]
    assert (row.action, row.reason, row.low, row.high) == ("copy", "lambda-zero", None, None)
    assert row.std


def test_an_amplitude_past_float32_is_unrepresentable(tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", {"w": Tensor("F64", np.array([1e300, -1e300]))})
    row = by_name(str(path))["w"]
    assert (row.action, row.reason, row.high) == ("copy", "unrepresentable", None)


def test_what_is_no_float_has_no_statistics(model: str) -> None:
    row = by_name(model)["count"]
    assert (row.mean, row.std, row.min, row.l1, row.zeros, row.nan, row.inf) == (None,) * 7


def test_totals(model: str) -> None:
    totals = inspect(model).totals
    assert (totals.tensors, totals.perturbed, totals.nan, totals.inf) == (11, 2, 1, 1)
    assert totals.parameters == 24 + 5 + 4 + 3 + 2 + 1 + 1 + 0 + 3 + 3 + 1
    assert totals.bytes == 96 + 10 + 8 + 12 + 16 + 8 + 4 + 0 + 12 + 12 + 8


def test_patterns_choose_the_rows_and_not_the_noise(model: str) -> None:
    inspection = inspect(model, include=("*.weight", "bn.*"), exclude=("bn.num*",))
    assert [row.name for row in inspection.tensors] == [
        "b.weight",
        "a.weight",
        "bn.running_mean",
        "bn.running_var",
    ]
    assert [row.reason for row in inspection.tensors] == [None, None, "buffer", "buffer"]
    assert inspection.totals.tensors == 4


def test_a_pattern_that_matches_nothing_is_a_usage_error(model: str) -> None:
    with pytest.raises(UsageError, match="matches nothing"):
        inspect(model, exclude=("*.wieght",))


@pytest.mark.parametrize(
    ("sort", "first"), [("name", "a.weight"), ("-elements", "b.weight"), ("std", "bn.running_mean")]
)
def test_sorting(model: str, sort: str, first: str) -> None:
    rows = inspect(model, sort=sort, include=("*.weight", "bn.running_mean")).tensors
    assert rows[0].name == first
    assert len(rows) == 3


@pytest.mark.parametrize("sort", ["std", "-std"])
def test_rows_without_a_value_come_last_in_file_order(model: str, sort: str) -> None:
    rows = inspect(model, sort=sort).tensors
    without = [row.name for row in rows if row.std is None]
    assert without == ["broken", "count", "scale", "empty", "bn.num_batches_tracked"]
    assert [row.name for row in rows][-5:] == without


@pytest.mark.parametrize("key", SORT_KEYS)
def test_every_column_is_a_sort_key(model: str, key: str) -> None:
    assert len(inspect(model, sort=key).tensors) == 11


@pytest.mark.parametrize("key", ["unsure", "", "-", "--std", "stdd"])
def test_an_unknown_sort_key_is_a_usage_error_that_lists_them(key: str) -> None:
    with pytest.raises(UsageError, match=r"name, file, dtype, .*, high"):
        inspect("does-not-even-exist", sort=key)


def test_headers_only_reads_no_weights(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> memoryview:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(SafetensorsSource, "read", read)
    rows = by_name(model, headers_only=True)
    row = rows["b.weight"]
    assert (row.action, row.unsure) == ("perturb", ("constant", "non-finite"))
    assert (row.std, row.zeros, row.nan, row.high) == (None,) * 4
    assert rows["bn.running_mean"].reason == "buffer"
    assert inspect(model, headers_only=True).totals.nan is None
    with pytest.raises(AssertionError, match="a weight was read"):
        inspect(model)


def test_headers_only_names_a_possible_tie_and_values_settle_it(tmp_path: Path) -> None:
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    table = weights("F32", 8, 4)
    path = str(save(tmp_path / "m.safetensors", {head: table, embedding: table}))
    assert "tied" in by_name(path, headers_only=True)[head].unsure
    assert {row.stream for row in inspect(path).tensors} == {embedding}
    assert inspect(path, include=(head,)).tensors[0].stream == embedding


def test_a_tie_that_is_not_listed_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = weights("F32", 8, 4)
    names = ("model.embed_tokens.weight", "lm_head.weight", "other.bias")
    path = save(tmp_path / "m.safetensors", dict.fromkeys(names, table))
    read_names = []
    real = SafetensorsSource.read

    def read(self: SafetensorsSource, tensor: TensorSpec, *rest: Any) -> memoryview:
        read_names.append(tensor.name)
        return real(self, tensor, *rest)

    monkeypatch.setattr(SafetensorsSource, "read", read)
    (row,) = inspect(str(path), include=("other.bias",)).tensors
    assert row.name == "other.bias"
    assert read_names == ["other.bias"]


def test_shards_and_threads(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": weights("BF16", 300, 1 + i, seed=i) for i in range(6)}
    names = list(tensors)
    save_sharded(tmp_path, *({name: tensors[name] for name in names[i::2]} for i in range(2)))
    one, five = (inspect(str(tmp_path), threads=threads) for threads in (1, 5))
    assert one == five
    assert [row.name for row in one.tensors] == names[::2] + names[1::2]
    assert len({row.file for row in one.tensors}) == 2
    for row in one.tensors:
        assert row.std == std32(tensors[row.name])


def test_no_tensors_at_all(tmp_path: Path) -> None:
    inspection = inspect(str(save(tmp_path / "m.safetensors", {})))
    assert inspection.tensors == ()
    assert inspection.totals.tensors == inspection.totals.parameters == 0
    assert inspection.warnings


def test_a_source_that_changes_meanwhile_is_a_mismatch(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = SafetensorsSource.read

    def read(self: SafetensorsSource, *arguments: Any) -> memoryview:
        os.utime(model, ns=(0, 1))
        return real(self, *arguments)

    monkeypatch.setattr(SafetensorsSource, "read", read)
    with pytest.raises(Mismatch):
        inspect(model)


def test_quantised_by_its_config_is_listed_and_refused(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"w": weights("F32", 4, 4)})
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    inspection = inspect(str(tmp_path))
    (row,) = inspection.tensors
    assert "GPTQ 4-bit" in (inspection.quantized or "")
    assert (row.action, row.reason, row.unsure, row.high) == ("refuse", "quantized", (), None)
    assert row.std is not None
    assert inspection.totals.perturbed == 0


def test_real_quantised_shards(data: Path) -> None:
    inspection = inspect(str(data / "checkpoints" / "qwen3-mlx-4bit-sharded"))
    assert "MLX 4-bit" in (inspection.quantized or "")
    assert {row.action for row in inspection.tensors} == {"refuse"}
    assert len({row.file for row in inspection.tensors}) == 2


@pytest.mark.parametrize("name", ["capp-gpt", "retsim", "mlx-kan", "qwen3", "peft-gpt2"])
def test_real_checkpoints_agree_with_numpy(data: Path, name: str) -> None:
    (path,) = (data / "checkpoints" / name).glob("*.safetensors")
    contents = split(path.read_bytes())[1]
    rows = by_name(str(path.parent), threads=2)
    assert rows.keys() == contents.keys()
    for row in rows.values():
        stored = np.frombuffer(contents[row.name], STORED[row.dtype])
        x = np.array(floats(Tensor(row.dtype, stored)))
        assert row.elements == x.size
        assert row.l2 == pytest.approx(np.linalg.norm(x), rel=1e-11)
        if row.elements > 1:
            assert row.std == pytest.approx(x.std(ddof=1), rel=6e-8)
            assert row.mean == pytest.approx(x.mean(), rel=1e-9, abs=1e-12)

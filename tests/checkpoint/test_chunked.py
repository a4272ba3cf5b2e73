"""Checkpoints of torch.distributed.checkpoint as torch writes them, and what is refused of others."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from chunked import load_chunked, save_chunked
from malformed_chunks import Call
from pickles import saved
from safetensors.torch import load_file, save_file

from noisytune_cli.checkpoint.checkpoint import open_checkpoint
from noisytune_cli.checkpoint.formats import dcp as dcp_module
from noisytune_cli.commands.inspect import inspect
from noisytune_cli.commands.perturb import Request, perturb, plan_perturb
from noisytune_cli.commands.verify import verify
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.records import Conversion, NoiseSpec

NOISE = NoiseSpec(seed=5)


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model with a batch norm, one step into its training."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(state: dict[str, Any], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is no process group
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def as_safetensors(tensors: dict[str, torch.Tensor], root: Path, noise: NoiseSpec) -> dict[str, torch.Tensor]:
    """The same weights, perturbed as safetensors."""
    root.mkdir()
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, root / "in.safetensors")
    perturb(Request(str(root / "in.safetensors"), noise), str(root / "out.safetensors"))
    return load_file(root / "out.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_what_torch_saves_in_one_process(tmp_path: Path) -> None:
    model, optimizer = trained()
    weights = {
        **model.state_dict(),
        "transposed": torch.randn(6, 4).t(),
        "half": torch.randn(9).bfloat16(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "part": torch.randn(10, 4)[2:5],
    }
    state = {"model": weights, "optimizer": optimizer.state_dict(), "step": 3, "rates": [0.1, torch.ones(2)]}
    source = save(state, tmp_path / "in")
    result = perturb(Request(str(source), NOISE), str(tmp_path / "out"))
    assert [r.step.tensor.name for r in result.manifest.receipts] == list(weights)
    assert [(file.name, file.size > 5000) for file in result.manifest.source.files] == [(".metadata", True)]
    assert {r.step.tensor.name: r.reason for r in result.manifest.receipts if r.reason} == {
        "1.running_mean": "buffer",
        "1.running_var": "buffer",
        "1.num_batches_tracked": "not-float",
        "scalar": "one-element",
        "empty": "empty",
    }
    assert_equal(load_chunked(result.output, "model"), as_safetensors(weights, tmp_path / "plain", NOISE))
    before, after = load_chunked(source), load_chunked(result.output)
    for key in before:
        if not key.startswith("model."):
            assert torch.equal(after[key], before[key]), key
    assert verify(str(result.output), base=str(source)).ok


def test_all_that_a_checkpoint_holds_loads_again(tmp_path: Path) -> None:
    model, optimizer = trained()
    source = save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}, tmp_path / "in"
    )
    out = perturb(Request(str(source), NOISE), str(tmp_path / "out")).output
    other, fresh = trained()
    state = {"model": other.state_dict(), "optimizer": fresh.state_dict(), "step": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=out, no_dist=True)
    assert state["step"] == 3
    assert not torch.equal(state["model"]["0.weight"], model.state_dict()["0.weight"])
    other.load_state_dict(state["model"])


#: Saves a model in parts from each of two processes, and the whole from the first.
_WORKER = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

rank, root = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 1), torch.nn.LayerNorm(3))
more = {name: torch.randn(5, 6) for name in ("columns", "replicated", "plain")}
whole = {name: value.clone() for name, value in model.state_dict().items()} | more
if rank == 0:
    torch.save(whole, f"{root}/whole.pt")
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.randn(2, 7)).sum().backward() if False else None
mesh = init_device_mesh("cpu", (2,))
state = model.state_dict()
state["columns"] = distribute_tensor(more["columns"], mesh, [Shard(1)])
state["replicated"] = distribute_tensor(more["replicated"], mesh, [Replicate()])
state["plain"] = more["plain"]
moments = {name: value * 0 + 0.5 for name, value in model.state_dict().items()}
# As torchtitan lays it out: the model's own keys at the top, the rest under names.
dcp.save(dict(state) | {"optimizer": {"state." + k + ".exp_avg": v for k, v in moments.items()},
                        "train_state": {"step": torch.tensor(7)}, "lr_scheduler": {"last_epoch": 3}},
         checkpoint_id=f"{root}/in")
dist.destroy_process_group()
os._exit(0)  # what is asked for is there; torch's own threads now and then abort a process on its way out
"""


def test_what_torch_saves_in_two_processes(tmp_path: Path) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _WORKER, str(rank), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    for process in running:
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr
    source, out = tmp_path / "in", tmp_path / "out"
    assert {file.name for file in source.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    result = perturb(Request(str(source), NOISE), str(out))
    assert {r.step.tensor.name for r in result.manifest.receipts} == set(whole)
    loaded = load_chunked(out)
    expected = as_safetensors(whole, tmp_path / "plain", NOISE)
    assert_equal({name: loaded[name] for name in whole}, expected)
    state = [key for key in loaded if key.startswith("optimizer.")]
    assert len(state) == 6
    assert all((loaded[key] == 0.5).all() for key in state)
    assert int(loaded["train_state.step"]) == 7
    assert verify(str(out), base=str(source)).ok


def test_a_folder_with_more_in_it(tmp_path: Path) -> None:
    weights = {("model", "w"): torch.randn(6, 4), ("model", "b"): torch.randn(6)}
    source = save_chunked(tmp_path / "in", weights)
    (source / "__7_0.distcp").write_bytes(b"left by an earlier save")
    (source / "train.toml").write_text("[model]")
    (source / "common.pt").write_bytes(saved({"args": torch.ones(3)}))
    (source / "pytorch_model.bin").write_bytes(saved({"w": torch.ones(3)}))
    (source / "config.json").write_text("{}")
    with open_checkpoint(str(source)) as opened:
        assert [file.name for file in opened.sources] == [".metadata"]
        assert opened.sources[0].files == (".metadata", "__0_0.distcp", "__1_0.distcp")
        assert opened.others == ("common.pt", "config.json", "train.toml")
        assert [name for name, _ in opened.left_out] == ["__7_0.distcp", "pytorch_model.bin"]
    planned = plan_perturb(Request(str(source), NOISE))
    assert [step.tensor.name for step in planned.plan.steps] == ["w", "b"]
    rows = inspect(str(source)).tensors
    assert [(row.name, row.file, row.dtype, row.bytes) for row in rows] == [
        ("w", ".metadata", "F32", 96),
        ("b", ".metadata", "F32", 24),
    ]
    assert rows[0].std == pytest.approx(weights["model", "w"].std().item(), rel=1e-6)


def test_safetensors_are_taken_before_chunks(tmp_path: Path) -> None:
    source = save_chunked(tmp_path, {("w",): torch.randn(6, 4)})
    save_file({"w": torch.randn(6, 4)}, source / "model.safetensors")
    with open_checkpoint(str(source)) as opened:
        assert [file.name for file in opened.sources] == ["model.safetensors"]
        assert opened.others == ()
    with open_checkpoint(str(source), weights=".metadata") as opened:
        assert [file.name for file in opened.sources] == [".metadata"]


def test_a_step_of_several_is_named(tmp_path: Path) -> None:
    for step in (1, 2):
        save_chunked(tmp_path / f"step-{step}", {("w",): torch.randn(6, 4)})
    with pytest.raises(InputInvalid, match=r"candidates are step-1/\.metadata, step-2/\.metadata"):
        open_checkpoint(str(tmp_path))
    with open_checkpoint(str(tmp_path), weights="step-2/.metadata") as opened:
        assert opened.sources[0].files[1] == "step-2/__0_0.distcp"
        assert "step-1/.metadata" in opened.others
    with pytest.raises(InputInvalid, match="Give the folder"):
        open_checkpoint(str(tmp_path / "step-1" / ".metadata"))
    with pytest.raises(InputInvalid, match="Give the folder"):
        open_checkpoint(str(tmp_path / "step-1" / "__0_0.distcp"))


def test_weights_alone_in_a_subfolder_verify_and_replay(tmp_path: Path) -> None:
    source = tmp_path / "in"
    save_chunked(source / "weights", {("w",): torch.randn(6, 4)})
    request = Request(str(source), NOISE, weights="weights/.metadata")
    out = perturb(request, str(tmp_path / "out")).output
    assert verify(str(out), base=str(source)).ok
    assert not torch.equal(load_chunked(out / "weights")["w"], load_chunked(source / "weights")["w"])


def test_an_optimizer_alone_is_no_model(tmp_path: Path) -> None:
    source = save_chunked(tmp_path / "in", {("optimizer", "state", "0", "exp_avg"): torch.randn(6, 4)})
    with pytest.raises(InputInvalid, match="nothing to perturb"):
        perturb(Request(str(source), NOISE), str(tmp_path / "out"))
    flat = save_chunked(
        tmp_path / "flat", {("optimizer.state.w.exp_avg",): torch.randn(4), ("w",): torch.randn(4)}
    )
    assert [row.name for row in inspect(str(flat), headers_only=True).tensors] == ["w"]


def test_two_state_dicts_with_a_key_in_common(tmp_path: Path) -> None:
    source = save_chunked(tmp_path / "in", {("model", "w"): torch.randn(4), ("ema", "w"): torch.randn(4)})
    assert [row.name for row in inspect(str(source)).tensors] == ["model.w", "ema.w"]


def test_filters_that_leave_nothing(tmp_path: Path) -> None:
    source = save_chunked(tmp_path / "in", {("w",): torch.randn(4)})
    with pytest.raises(UsageError, match="nothing would be perturbed"):
        plan_perturb(Request(str(source), NoiseSpec(exclude=("w",))))


def test_nothing_that_metadata_names_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = save_chunked(
        tmp_path / "in",
        {("w",): torch.randn(4)},
        edit=lambda metadata: setattr(metadata, "planner_data", Call("touch ran")),
    )
    with pytest.raises(InputInvalid, match=r"(posix|os)\.system"):
        open_checkpoint(str(source))
    assert not (tmp_path / "ran").exists()


def test_chunks_that_are_damaged(tmp_path: Path) -> None:
    source = save_chunked(tmp_path / "in", {("w",): torch.randn(4, 6)}, grid=1, files=1)
    file = source / "__0_0.distcp"
    whole = file.read_bytes()
    for damaged, why in (
        (whole[:-1], "truncated"),
        (b"", "truncated"),
        (b"\0" * len(whole), "truncated"),
        (whole.replace(b"FloatStorage", b"ShortStorage"), "wrong"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(InputInvalid, match=why):
            open_checkpoint(str(source))
    file.write_bytes(whole)
    with open_checkpoint(str(source)) as opened:
        place = opened.tensors[0].offset + 50
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(InputInvalid, match="CRC-32"):
        perturb(Request(str(source), NOISE), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(InputInvalid, match="a FIFO"):
        open_checkpoint(str(source))


@pytest.mark.parametrize("name", [".metadata", "__1_0.distcp"])
def test_a_refused_folder_is_closed(name: str, tmp_path: Path, open_files: Callable[[], int]) -> None:
    folder = save_chunked(tmp_path / "model", {("w",): torch.arange(24.0).reshape(4, 6)})
    (folder / name).write_bytes(b"")
    before = open_files()
    for _ in range(3):
        with pytest.raises(InputInvalid):
            dcp_module.open_source(folder / ".metadata", ".metadata", False)
    assert open_files() == before


def test_large_metadata_needs_large_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_chunked(tmp_path / "in", {(f"w{i}",): torch.randn(3) for i in range(20)})
    monkeypatch.setattr(dcp_module, "MAX_OPCODES", 1000)
    with pytest.raises(InputInvalid, match="more than 1,000 opcodes"):
        open_checkpoint(str(source))
    with (source / "__9_0.distcp").open("wb") as file:
        file.truncate(1 << 40)  # a hole costs nothing to make, and buys nothing
    with pytest.raises(InputInvalid, match="more than 1,000 opcodes"):
        open_checkpoint(str(source))
    monkeypatch.setattr(dcp_module, "_BYTES_FOR_MORE", 1 << 10)
    with open_checkpoint(str(source)) as opened:
        assert len(opened.tensors) == 20
    monkeypatch.setattr(dcp_module, "MAX_BYTES", 100)
    with pytest.raises(InputInvalid, match="1,600 is the limit"):
        open_checkpoint(str(source))


def test_as_safetensors_and_in_another_dtype(tmp_path: Path) -> None:
    weights = {"w": torch.randn(6, 4), "half": torch.randn(9).bfloat16()}
    source = save_chunked(
        tmp_path / "in", {("model", name): tensor for name, tensor in weights.items()} | {("step",): 3}
    )
    (source / "config.json").write_text("{}")
    request = Request(str(source), NOISE, conversion=Conversion(format="safetensors"))
    result = perturb(request, str(tmp_path / "out"))
    assert {file.name for file in result.output.iterdir()} == {
        "config.json",
        "model.safetensors",
        "noisytune.json",
    }
    assert_equal(
        load_file(result.output / "model.safetensors"), as_safetensors(weights, tmp_path / "plain", NOISE)
    )
    assert verify(str(result.output), base=str(source)).ok
    with pytest.raises(UsageError, match="--to=safetensors"):
        perturb(replace(request, conversion=Conversion(dtype="BF16")), str(tmp_path / "other"))


def test_more_files_than_a_process_may_open_at_first(tmp_path: Path) -> None:
    source = save_chunked(tmp_path / "in", {("w",): torch.randn(60, 2)}, grid=8, files=40)
    command = [sys.executable, "-m", "noisytune_cli", "perturb", source, "-o", tmp_path / "out", "--quiet"]
    limited = ["sh", "-c", 'ulimit -S -n 50; exec "$@"', "sh", *map(str, command)]
    done = subprocess.run(limited, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert not torch.equal(load_chunked(tmp_path / "out")["w"], load_chunked(source)["w"])

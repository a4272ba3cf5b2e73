"""PyTorch checkpoints: what is refused, which tensors are weights, where they lie, and their twin."""

from __future__ import annotations

import io
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from costly_pickles import hash_alike
from malformed import Case
from malformed_pickles import CASES
from pickles import Writer, archive, legacy, one, saved

from noisytune_cli.checkpoint import formats
from noisytune_cli.checkpoint.formats.torch import TorchSource, open_source
from noisytune_cli.checkpoint.formats.torch import storages as _storages
from noisytune_cli.checkpoint.formats.torch.globals import DType, StoredTensor
from noisytune_cli.checkpoint.formats.torch.state_dict import sort_content
from noisytune_cli.commands.perturb import Request, perturb
from noisytune_cli.commands.verify import verify
from noisytune_cli.errors import InputInvalid
from noisytune_cli.records import NoiseSpec

REFUSED = [case for case in CASES if case.refused]
ACCEPTED = [case for case in CASES if not case.refused]


def opened(path: Path, content: bytes, mmap: bool = False) -> TorchSource:
    path.write_bytes(content)
    return open_source(path, "m.pt", mmap)


def read(source: TorchSource) -> dict[str, bytes]:
    """Every tensor's bytes in row-major order, by name."""
    return {
        spec.name: bytes(source.read(spec, 0, memoryview(bytearray(spec.nbytes)))) for spec in source.tensors
    }


def bytes_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def load(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


def perturbed(path: Path, value: object, **options: Any) -> tuple[Any, Any]:
    """Perturb what torch.save writes of `value`; return what torch loads of it, and the manifest."""
    path.write_bytes(saved(value, **options))
    result = perturb(Request(str(path), NoiseSpec()), str(path.with_name(f"out-{path.name}")))
    assert verify(str(result.output), base=str(path)).ok
    return load(result.output.read_bytes()), result.manifest


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(InputInvalid) as caught:
        opened(tmp_path / "m.pt", case.build())
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in case.words), line
    assert caught.value.tensor == case.tensor


@pytest.mark.parametrize("case", [c for c in CASES if c.lax is not None], ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore")
def test_torch_takes_what_is_accepted_and_what_is_marked_lax(case: Case) -> None:
    try:
        load(case.build())
    except Exception:
        taken = False
    else:
        taken = True
    assert taken == (not case.refused or case.lax)


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.name)
@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mmap"])
def test_what_is_accepted_reads_as_torch_reads_it(case: Case, mmap: bool, tmp_path: Path) -> None:
    content = case.build()
    source = opened(tmp_path / "m.pt", content, mmap)
    tensors = {name: value for name, value in load(content).items() if isinstance(value, torch.Tensor)}
    assert read(source) == {name: bytes_of(tensor) for name, tensor in tensors.items()}
    source.check_sums()
    source.close()


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.name)
def test_the_twin_of_what_is_accepted_is_the_same_file(case: Case, tmp_path: Path) -> None:
    source = opened(tmp_path / "m.pt", case.build())
    sink = source.create_sink(tmp_path / "twin.pt")
    for spec in reversed(source.tensors):
        data = read(source)[spec.name]
        middle = spec.nbytes // 8 * 4
        sink.write(spec, middle, data[middle:])
        sink.write(spec, 0, data[:middle])
    sink.finish()
    source.close()
    assert (tmp_path / "twin.pt").read_bytes() == (tmp_path / "m.pt").read_bytes()


def test_a_wrong_checksum_of_a_storage_is_found_once_it_is_read(tmp_path: Path) -> None:
    content = bytearray(archive(one()))
    content[content.index(b"data/0") + 6] ^= 1
    source = opened(tmp_path / "m.pt", bytes(content))
    source.check_sums()
    source.read(source.tensors[0], 0, memoryview(bytearray(4)))
    with pytest.raises(InputInvalid, match=r"CRC-32 of its record m/data/0.*set_crc32_options"):
        source.check_sums()
    source.close()


def test_nothing_is_published_of_a_file_with_a_wrong_checksum(tmp_path: Path) -> None:
    content = bytearray(saved({"w": torch.randn(50), "n": torch.arange(3)}))
    content[content.index(torch.arange(3).numpy().tobytes())] ^= 1
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(InputInvalid, match="CRC-32"):
        perturb(Request(str(tmp_path / "m.pt"), NoiseSpec()), str(tmp_path / "out.pt"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pt"]


def test_checksums_that_torch_did_not_write(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        content = saved({"w": torch.randn(5)})
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(InputInvalid, match=r"set_crc32_options\(False\)"):
        opened(tmp_path / "m.pt", content)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_dtype_shape_and_layout(tmp_path: Path, zipped: bool) -> None:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    tensors = {
        **{str(t): torch.randn(4, 3).to(t) for t in (torch.float16, torch.bfloat16, torch.float64)},
        "transposed": torch.randn(5, 7).t(),
        "permuted": torch.randn(2, 3, 4, 5).permute(3, 1, 0, 2),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "left": base[:, :3],
        "right": base[:, 3:],
        "steps": torch.randn(40)[::3],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "ids": torch.arange(9).reshape(3, 3).t(),
        "mask": torch.tensor([True, False]),
        "complex": torch.randn(3, 2, dtype=torch.complex128).t(),
    }
    noisy, manifest = perturbed(tmp_path / "m.pt", tensors, zipped=zipped)
    plain, _ = perturbed(
        tmp_path / "plain.pt", {k: v.contiguous() for k, v in tensors.items()}, zipped=zipped
    )
    for name, tensor in tensors.items():
        assert noisy[name].stride() == tensor.stride()
        assert torch.equal(noisy[name], plain[name])
        assert torch.equal(noisy[name], tensor) != (tensor.is_floating_point() and tensor.numel() > 1)
    assert sum(r.action == "perturb" for r in manifest.receipts) == 9


def test_a_zip_is_whole_for_other_readers(tmp_path: Path) -> None:
    perturbed(
        tmp_path / "m.pt", {"w": torch.randn(300, 200), "t": torch.randn(30, 20).t(), "n": torch.arange(3)}
    )
    with zipfile.ZipFile(tmp_path / "out-m.pt") as zipped:
        assert zipped.testzip() is None


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_shared_storage_is_a_tie(tmp_path: Path, zipped: bool) -> None:
    table = torch.nn.Parameter(torch.randn(10, 4))
    state = OrderedDict(
        {"lm_head.weight": table, "model.embed_tokens.weight": table, "alone": torch.randn(9)}
    )
    noisy, manifest = perturbed(tmp_path / "m.pt", state, zipped=zipped)
    assert noisy["lm_head.weight"].data_ptr() == noisy["model.embed_tokens.weight"].data_ptr()
    streams = {r.step.tensor.name: r.step.stream for r in manifest.receipts}
    assert streams["lm_head.weight"] == streams["model.embed_tokens.weight"] == "model.embed_tokens.weight"
    assert not torch.equal(noisy["lm_head.weight"], table)


def state_dict() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"fc.weight": torch.randn(4, 3), "fc.bias": torch.randn(4)}


def trained() -> dict[str, Any]:
    """An optimizer's state for the model of `state_dict`."""
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    "around",
    [
        lambda state: state,
        lambda state: {"state_dict": state},
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"module": state, "best": torch.tensor([1.0, 2.0])},
        lambda state: {"checkpoint": {"model_state_dict": state}},
        lambda state: {
            "pytorch-lightning_version": "2.5",
            "state_dict": state,
            "optimizer_states": [trained()],
            "lr_schedulers": [{"last_epoch": 1}],
            "loops": {"state": torch.ones(3)},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        },
        lambda state: {
            "model": state,
            "optimizer": trained(),
            "anything": trained(),
            "rng_state": torch.ones(9),
        },
        lambda state: {
            "model": state,
            "exp_avg_sq": {"a.weight": torch.ones(3, 3)},
            "adam": {"v": {"a.weight": torch.ones(3, 3)}},
            "grads": {"a.weight": torch.ones(3, 3)},
            "train_metrics": {"f1": torch.ones(3)},
            "history": {"lr": torch.ones(9)},
            "replay_buffer": {"obs": torch.ones(9, 4)},
        },
    ],
    ids=["bare", "state_dict", "model", "module", "nested", "lightning", "training", "by hand"],
)
def test_the_model_is_found_and_the_rest_is_carried_over(tmp_path: Path, around: Any) -> None:
    bare, _ = perturbed(tmp_path / "bare.pt", state_dict())
    value = around(state_dict())
    noisy, manifest = perturbed(tmp_path / "m.pt", value)
    assert [r.step.tensor.name for r in manifest.receipts] == list(bare)
    leaves = dict(_leaves(noisy))
    weights = 0
    for path, before in _leaves(value):
        if path[-1] in bare:
            weights += 1
            assert torch.equal(leaves[path], bare[path[-1]])
        elif isinstance(before, torch.Tensor):
            assert torch.equal(leaves[path], before)
        else:
            assert leaves[path] == before
    assert weights == len(bare)


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, child in items for leaf in _leaves(child, (*path, key))]
    return [(path, value)]


def test_two_state_dicts_with_a_key_in_common_have_full_names(tmp_path: Path) -> None:
    one, other = {"w": torch.randn(9), "a": torch.randn(9)}, {"w": torch.randn(9)}
    source = opened(tmp_path / "m.pt", saved({"generator": one, "discriminator": other}))
    assert [t.name for t in source.tensors] == ["generator.w", "generator.a", "discriminator.w"]
    source.close()
    apart = opened(tmp_path / "n.pt", saved({"generator": one, "discriminator": {"v": other["w"]}}))
    assert [t.name for t in apart.tensors] == ["w", "a", "v"]
    apart.close()


def test_names_that_only_collide_with_their_paths(tmp_path: Path) -> None:
    content = saved({"x": {"w": torch.ones(2), "y.w": torch.ones(2)}, "x.y": {"w": torch.ones(2)}})
    with pytest.raises(InputInvalid, match=r"two of its tensors have the name x\.y\.w"):
        opened(tmp_path / "m.pt", content)


def test_training_state_that_shares_a_part_of_a_weight(tmp_path: Path) -> None:
    weight = torch.randn(8)
    with pytest.raises(InputInvalid, match="shares a part of a weight's storage"):
        opened(tmp_path / "m.pt", saved({"state_dict": {"w": weight}, "optimizer": {"half": weight[:4]}}))


def test_weights_that_share_a_part_are_to_be_cloned(tmp_path: Path) -> None:
    whole = torch.randn(10, 4)
    halves = {"a": whole[:6], "b": whole[4:]}
    assert all(half.is_contiguous() for half in halves.values())
    with pytest.raises(InputInvalid, match=r"share a part of one storage.*clone\(\) every tensor"):
        opened(tmp_path / "m.pt", saved(halves))
    opened(tmp_path / "n.pt", saved({name: half.clone() for name, half in halves.items()})).close()


@pytest.mark.parametrize(
    ("stored", "why"),
    [(lambda c: c.conj(), "conjugate"), (lambda c: c.conj().imag, "sign to be turned")],
    ids=["conj", "neg"],
)
def test_elements_that_are_not_what_is_read_are_refused(
    stored: Callable[[torch.Tensor], torch.Tensor], why: str, tmp_path: Path
) -> None:
    # torch keeps a flag beside them; other formats have none.
    torch.save({"c": stored(torch.complex(torch.ones(2, 3), torch.ones(2, 3)))}, tmp_path / "m.pt")
    with pytest.raises(InputInvalid, match=why), open_source(tmp_path / "m.pt", "m.pt", False):
        pass


def test_dictionaries_that_multiply(tmp_path: Path) -> None:
    value: dict[str, Any] = {f"k{i}": 0.0 for i in range(50)}
    for _ in range(12):
        value = {f"k{i}": value for i in range(50)}
    with pytest.raises(InputInvalid, match="nested too deep"):
        opened(tmp_path / "m.pt", saved(value))


def test_tensors_in_more_pieces_than_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_storages, "MAX_RUNS", 30)
    content = saved({"a": torch.randn(40)[::2], "b": torch.randn(40)[::2]})
    with pytest.raises(InputInvalid, match="too many pieces"):
        opened(tmp_path / "m.pt", content)


def test_tensors_out_of_order_leave_memory_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_storages, "_HELD_BYTES", 100)
    tensors = {name: torch.randn(4, 5).t() for name in "abc"}
    source = opened(tmp_path / "m.pt", saved(tensors))
    for _ in range(2):
        assert read(source) == {name: bytes_of(tensor) for name, tensor in tensors.items()}
    assert list(source._held) == ["c"]
    source.close()


def test_a_view_of_a_legacy_storage(tmp_path: Path) -> None:
    values = np.arange(6, dtype="<f4")
    pickled = (
        Writer().raw(b"}").value("w").name("torch._utils", "_rebuild_tensor").raw(b"((").value("storage")
    )
    pickled.name("torch", "FloatStorage").value("0").value("cpu").value(6).value(("view", 2, 4)).raw(b"tQ")
    pickled.value(1).value((3,)).value((1,)).raw(b"tRs")
    content = legacy(pickled.end(), {"0": values.tobytes()})
    source = opened(tmp_path / "m.pt", content)
    assert read(source)["w"] == values[3:].tobytes() == bytes_of(load(content)["w"])
    source.close()


@pytest.mark.parametrize(
    ("name", "content", "format_name"),
    [
        ("m.safetensors", archive(one()), None),
        ("m.bin", archive(one()), "torch"),
        ("no suffix", archive(one()), "torch"),
        ("m.ckpt", legacy(one(legacy=True)), "torch"),
        ("m.bin", b"\x02\0\0\0\0\0\0\0{}", "safetensors"),
    ],
)
def test_the_format_is_told_by_content(
    tmp_path: Path, name: str, content: bytes, format_name: str | None
) -> None:
    (tmp_path / name).write_bytes(content)
    if format_name is None:
        with pytest.raises(InputInvalid, match="ZIP archive"):
            formats.open_source(tmp_path / name, name, False)
        return
    source = formats.open_source(tmp_path / name, name, False)
    assert type(source).__module__.endswith(format_name)
    source.close()


def test_a_file_does_not_choose_the_hashes_of_its_slots() -> None:
    slots = [StoredTensor("0", DType("F32", 4), 0, (2, 2), pair).slot for pair in hash_alike(100)]
    assert len({hash(pair) for pair in hash_alike(100)}) == 1
    assert len({hash(slot) for slot in slots}) > 90


@pytest.mark.parametrize("part", ["resampler", "upsampler", "upscaler", "optimal_transport", "up_sampler.x"])
def test_a_part_of_the_model_is_not_taken_for_training_state(tmp_path: Path, part: str) -> None:
    source = opened(tmp_path / "m.pt", saved({"unet": {"a": torch.zeros(2)}, part: {"w": torch.zeros(2, 2)}}))
    assert [spec.name for spec in source.tensors] == ["a", "w"]
    assert (source.beside, source.warnings) == ((), ())


def test_matrices_that_are_no_weights_are_told_of(tmp_path: Path) -> None:
    matrix, moment = torch.zeros(2, 2), torch.zeros(2, 2)
    training = {"optimizer_states": [{"state": {0: moment}, "param_groups": []}], "optim_g": moment}
    training |= {"optim.state.a.exp_avg": moment, "callbacks": {"best": moment}, "epoch": torch.tensor(3.0)}
    training |= {"rng_state": [torch.zeros(9, dtype=torch.uint8)], "losses": torch.zeros(9), "lr": [1e-4]}
    model = {"state_dict": {"a": matrix}}
    assert opened(tmp_path / "quiet.pt", saved(model | training)).warnings == ()
    unclear = {"heads": [{"w": matrix.clone()}], "ema": {"shadow": [matrix.clone()]}, "loose": matrix.clone()}
    source = opened(tmp_path / "m.pt", saved(model | training | unclear | {7: {"w": matrix.clone()}}))
    assert [spec.name for spec in source.tensors] == ["a"]
    (warning,) = source.warnings
    assert warning.startswith(
        "m.pt: the matrices in heads, ema.shadow, loose, … are in no state dict of a model"
    )
    assert {"heads", "ema", "loose", "…", "optim_g"} <= set(source.beside)


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ({"optimizer": {"fp32_groups_flat": [torch.zeros(4)]}}, "optimizer.fp32_groups_flat"),
        ({"optimizer": {"optimizer": {}, "fp32_from_fp16_params": [[torch.zeros(4)]]}}, "fp32_from_fp16"),
        (
            {
                "optim": {
                    "state": {i: {"master_param": torch.zeros(4)} for i in range(1100)},
                    "param_groups": [],
                }
            },
            "optim.state.….master_param",
        ),
        ({"optimizer.state.fp32_param.a": torch.zeros(4)}, "optimizer.state.fp32_param"),
    ],
)
def test_an_optimizers_own_copy_of_the_weights_is_told_of(
    tmp_path: Path, state: dict[str, Any], path: str
) -> None:
    model = {"model": {"a": torch.zeros(2, 2)}}
    (warning,) = opened(tmp_path / "m.pt", saved(model | state)).warnings
    assert path in warning
    assert "the optimizer's own copy of the weights, which stays as it is" in warning


def test_training_state_that_leads_back_ends() -> None:
    root: dict[object, object] = {"model": {"w": StoredTensor("0", DType("F32", 4), 0, (2, 2), (2, 1))}}
    root["optimizer"] = root
    root[7] = root
    found = sort_content(root, StoredTensor)
    assert ([w.name for w in found.weights], found.beside, found.unclear) == (
        ["w"],
        ("optimizer", "…"),
        ("…",),
    )


def test_training_state_is_known_by_a_part_of_its_key(tmp_path: Path) -> None:
    inside = (
        "my_optimizer_0",
        "lr_schedulers",
        "GradScaler.scaler",
        "x_rng\n",
        "samplers",
        "loss",
        "dataloader:0",
    )
    values = {key: {"state": torch.zeros(2)} for key in inside} | {"loss_module": {"w": torch.zeros(2)}}
    assert [spec.name for spec in opened(tmp_path / "m.pt", saved(values)).tensors] == ["w"]

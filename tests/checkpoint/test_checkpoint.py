"""What is opened of a local checkpoint, and what is refused."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from opened import SHARDS, names, refused, save, save_sharded, write

from noisytune_cli.checkpoint import folder as folder_module
from noisytune_cli.checkpoint import hub
from noisytune_cli.checkpoint.checkpoint import open_checkpoint
from noisytune_cli.errors import InputInvalid, InputUnreadable, Mismatch, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_file(tmp_path: Path) -> None:
    path = save(tmp_path / "weights.bin", "a", "b")
    write(tmp_path, "README.md")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with open_checkpoint(str(path)) as opened:
        assert (opened.id, opened.revision, opened.single_file) == ("weights.bin", None, True)
        assert [(t.name, t.file) for t in opened.tensors] == [("a", "weights.bin"), ("b", "weights.bin")]
        assert (opened.others, opened.left_out, opened.index) == ((), (), None)
        assert opened.config == {"model_type": "bert"}
        assert opened.previous_run is None


def test_a_broken_config_beside_a_file_only_warns(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", "a")
    (tmp_path / "config.json").write_text("{")
    with open_checkpoint(str(path)) as opened:
        assert opened.config is None
        assert "not valid JSON" in opened.warnings[0]


def test_an_index_given_as_a_file_is_explained(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    assert "index" in refused(tmp_path / "model.safetensors.index.json")


def test_a_folder_with_one_model(tmp_path: Path) -> None:
    root = tmp_path / "bert"
    save(root / "model.safetensors", "a")
    save(root / "2_Dense/model.safetensors", "d")
    (root / "config.json").write_text("{}")
    write(
        root,
        "tokenizer.json",
        "modeling.py",
        "1_Pooling/config.json",
        "3_Dense/pytorch_model.bin",
        "voices.pt",
    )
    with open_checkpoint(f"{root}/") as opened:
        assert (opened.id, opened.single_file, names(opened)) == ("bert", False, ["model.safetensors"])
        assert opened.others == (
            "1_Pooling/config.json",
            "2_Dense/model.safetensors",
            "3_Dense/pytorch_model.bin",
            "config.json",
            "modeling.py",
            "tokenizer.json",
            "voices.pt",
        )
        assert opened.left_out == ()


def test_an_adapter(tmp_path: Path) -> None:
    save(tmp_path / "adapter_model.safetensors", "a")
    save(tmp_path / "extra.safetensors", "b")
    write(tmp_path, "adapter_config.json", "adapter_model.bin")
    with open_checkpoint(str(tmp_path)) as opened:
        assert names(opened) == ["adapter_model.safetensors"]
        assert opened.others == ("adapter_config.json", "extra.safetensors")
        assert opened.config is None


@pytest.mark.parametrize("name", ["config.json", "README.md", "model.safetensors.index.json", SHARDS[1]])
def test_a_link_out_is_refused_by_name(tmp_path: Path, name: str) -> None:
    root = save_sharded(tmp_path / "model")
    outside = tmp_path / "model-secrets"
    outside.write_bytes((root / name).read_bytes() if (root / name).exists() else b"{}")
    (root / name).unlink(missing_ok=True)
    (root / name).symlink_to(outside)
    said = refused(root)
    assert f"/{name}" in said
    assert "--follow-links" in said
    with open_checkpoint(str(root), follow_links=True):
        pass


def test_a_file_that_is_swapped_for_a_link_out_is_not_copied(tmp_path: Path) -> None:
    root = tmp_path / "model"
    save(root / "model.safetensors", "a")
    write(root, "README.md")
    (tmp_path / "secret").write_bytes(b"x")
    with open_checkpoint(str(root)) as opened:
        (root / "README.md").unlink()
        (root / "README.md").symlink_to(tmp_path / "secret")
        with pytest.raises(InputInvalid, match="link out"):
            opened.open_beside(root / "README.md")


def test_a_side_file_that_is_rewritten_is_noticed(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "a")
    write(tmp_path, "README.md")
    before = (tmp_path / "README.md").stat()
    with open_checkpoint(str(tmp_path)) as opened:
        opened.check_beside()
        (tmp_path / "README.md").write_bytes(b"y")
        os.utime(tmp_path / "README.md", ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(Mismatch, match=r"README\.md"):
            opened.check_beside()


def test_weights_in_a_subfolder(tmp_path: Path) -> None:
    save_sharded(tmp_path / "unet")
    write(
        tmp_path, "model_index.json", "unet/model.fp16.safetensors", "vae/model.safetensors", "vae/model.bin"
    )
    (tmp_path / "unet/config.json").write_text('{"sample_size": 64}')
    assert "unet/model.safetensors.index.json" in refused(tmp_path)
    with open_checkpoint(str(tmp_path), weights="unet/model.safetensors.index.json") as opened:
        assert names(opened) == [f"unet/{shard}" for shard in SHARDS]
        assert opened.config == {"sample_size": 64}
        assert "vae/model.safetensors" in opened.others
        assert "vae/model.bin" in opened.others
        assert [name for name, _ in opened.left_out] == ["unet/model.fp16.safetensors"]


@pytest.mark.parametrize("weights", ["../model.safetensors", "/etc/passwd", "", "."])
def test_weights_cannot_leave_the_folder(tmp_path: Path, weights: str) -> None:
    save(tmp_path / "model.safetensors", "a")
    save(tmp_path / "in/model.safetensors", "a")
    with pytest.raises(UsageError):
        open_checkpoint(str(tmp_path / "in"), weights=weights)


def test_weights_that_are_not_there_or_no_weights(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", "a")
    write(tmp_path, "model.onnx", "model.bin")
    with pytest.raises(InputUnreadable):
        open_checkpoint(str(tmp_path), weights="nothing.safetensors")
    assert "neither safetensors or PyTorch weights" in refused(tmp_path, weights="model.onnx")
    assert "not a valid PyTorch checkpoint" in refused(tmp_path, weights="model.bin")
    with pytest.raises(UsageError):
        open_checkpoint(str(path), weights="model.safetensors")


@pytest.mark.parametrize(("name", "says"), [("m.onnx", "like none of"), ("m.safetensors", "header has")])
def test_a_file_of_another_format_is_not_called_damaged(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / name).write_bytes(b"\x08\x07\x12\x07pytorch" + bytes(99))
    with pytest.raises(InputInvalid, match=says):
        open_checkpoint(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pytorch_model.bin", "PyTorch"),
        ("resnet20.th", "PyTorch"),
        ("model.gguf", "GGUF"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("model.onnx", "ONNX"),
        ("README.md", "no weights"),
    ],
)
def test_a_folder_without_weights_says_what_it_has(tmp_path: Path, name: str, says: str) -> None:
    write(tmp_path, name, "optimizer.pt")
    assert says in refused(tmp_path)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ((), r"it has no weights\. Give a folder or a hub id .* \*\.safetensors, \*\.bin, .*\*\.distcp\.$"),
        (
            ("checkpoint-900/", "checkpoint-1000/"),
            r"-900, checkpoint-1000\. .* checkpoint-1000 in it",
        ),
        (
            ("global_step9/", "global_step20/", "optimizer_1/"),
            r"only global_step9, global_step20\. .*_step20 in",
        ),
        (("checkpoint-5/", "optimizer.pt"), r"only checkpoint-5\. Give the folder checkpoint-5 in it\.$"),
        (("pytorch_model_fsdp_0/",), r"Give the folder pytorch_model_fsdp_0 in it\.$"),
        (("model_best.pth.tar", "optimizer.pt"), r"only model_best\.pth\.tar may be .* Give the file itself"),
        ((".metadata",), r"the checkpoint is incomplete: .* none of the chunks \(\*\.distcp\)"),
        (("step-1/.metadata",), r"the weights are in a folder inside: .* only step-1/\.metadata\. Give that"),
        (("a/model.safetensors",), r"only a/model\.safetensors\. Give that folder, or .*--weights=NAME\.$"),
        ((f"snapshots/{COMMIT}/model.bin",), r"Give that folder\.$"),
        ((f"snapshots/{COMMIT}/model.bin", f"snapshots/{COMMIT[::-1]}/m.bin"), r"Give one of the folders\.$"),
        (("a/model.bin", "b/model.bin"), r"candidates are a/model\.bin, b/model\.bin"),
    ],
)
def test_what_has_no_weights_itself_says_what_to_give(
    tmp_path: Path, names: tuple[str, ...], says: str
) -> None:
    for name in names:
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            write(tmp_path, name)
    assert re.search(says, refused(tmp_path))


def test_links_and_special_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside"
    write(outside, "secret.txt", "vocab.txt")
    root = tmp_path / "model"
    save(root / "model.safetensors", "a")
    write(root, "sub/deep/file.txt")
    (root / "vocab.txt").symlink_to("sub/deep/file.txt")
    (root / "out").symlink_to(outside)
    (root / "sub/deep/up").symlink_to("../..")
    (root / "alias").symlink_to("sub/deep")
    (root / "broken").symlink_to("nowhere")
    os.mkfifo(root / "pipe")
    monkeypatch.chdir(root)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("sock")
    (root / os.fsdecode(b"bad\xff.txt")).write_bytes(b"x")
    with open_checkpoint(".") as opened:
        assert opened.id == "model"
        assert opened.others == ("alias/file.txt", "sub/deep/file.txt", "vocab.txt")
        assert dict(opened.left_out) == {
            "alias/up/": "a link to a folder it lies in",
            "bad\\udcff.txt": "a file whose name is not UTF-8",
            "broken": "a broken link",
            "out/": "a link out of the checkpoint",
            "pipe": "a FIFO",
            "sock": "a socket",
            "sub/deep/up/": "a link to a folder it lies in",
        }


def test_linked_folders_cannot_multiply(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "a")
    folders = "abcdefghij"
    for folder in folders:
        write(tmp_path, f"{folder}/file")
        for other in folders:
            (tmp_path / folder / other).symlink_to(f"../{other}")
    with open_checkpoint(str(tmp_path)) as opened:
        assert opened.others.count("a/b/file") == 1
        assert len(opened.others) == 10 + 10 * 9
        assert ("a/b/c/", "a link inside a linked folder") in opened.left_out


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "model.safetensors", "a")
    write(tmp_path, "sub/1", "sub/2")
    monkeypatch.setattr(folder_module, "_MAX_ENTRIES", 3)
    assert "more than 3 files" in refused(tmp_path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[64, 3], [128, 3]]", "not a JSON object"),
        ('{"a": 1, // of the audio\n}', "not valid JSON"),
        ("model: vits\n", "not valid JSON"),
    ],
)
def test_the_config_of_another_program_is_copied(tmp_path: Path, text: str, why: str) -> None:
    save(tmp_path / "model.safetensors", "a")
    (tmp_path / "config.json").write_text(text)
    with open_checkpoint(str(tmp_path)) as opened:
        assert (opened.config, opened.others) == (None, ("config.json",))
        assert [why in warning for warning in opened.warnings] == [True]


def test_a_config_that_is_no_file(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", "a")
    config = tmp_path / "config.json"
    config.mkdir()
    assert "a directory" in refused(tmp_path)
    config.rmdir()
    os.mkfifo(config)
    assert "a FIFO" in refused(tmp_path)


def test_a_path_into_the_hub_cache_tells_id_and_commit(tmp_path: Path) -> None:
    root = tmp_path / f"models--owner--name/snapshots/{COMMIT}"
    blob = save(tmp_path / "models--owner--name/blobs/abc", "a")
    root.mkdir(parents=True)
    (root / "model.safetensors").symlink_to(os.path.relpath(blob, root))
    (tmp_path / "latest").symlink_to(root)
    for source in (root, root / "model.safetensors", tmp_path / "latest"):
        with open_checkpoint(str(source)) as opened:
            assert (opened.id, opened.revision) == ("owner/name", COMMIT)
    other = save(tmp_path / f"models--gpt2/snapshots/{COMMIT}/model.safetensors", "a")
    with open_checkpoint(str(other)) as opened:
        assert (opened.id, opened.revision) == ("gpt2", COMMIT)


@pytest.mark.parametrize(
    "source", ["./nothing", "./a\0b", "/nothing/at/all", "~/nothing-of-this-name", "a/b/c", "x.safetensors"]
)
def test_a_missing_path_is_unreadable_and_never_a_hub_id(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(hub, "Repository", lambda *args: pytest.fail("asked the hub"))
    with pytest.raises(InputUnreadable):
        open_checkpoint(source)


def test_what_exists_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "owner/name/model.safetensors", "a")
    with open_checkpoint("owner/name") as opened:
        assert (opened.id, opened.revision) == ("name", None)


def test_revision_is_for_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        open_checkpoint(str(save(tmp_path / "model.safetensors", "a")), revision="main")


def test_a_failure_closes_what_was_opened(tmp_path: Path, open_files: Callable[[], int]) -> None:
    save_sharded(tmp_path)
    (tmp_path / SHARDS[1]).write_bytes(b"\x08")
    before = open_files()
    refused(tmp_path)
    assert open_files() == before
    with open_checkpoint(str(save_sharded(tmp_path))):
        assert open_files() == before + 2
    assert open_files() == before


def checkpoints() -> Path:
    """The folder of real checkpoints; the test is skipped where it is absent."""
    data = Path(os.environ.get("NOISYTUNE_DATA", Path(__file__).parents[3] / "shared/data")) / "checkpoints"
    if not data.is_dir():
        pytest.skip("the real checkpoints are not here (NOISYTUNE_DATA)")
    return data


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("burn", ["mnist.safetensors"]),
        ("capp-gpt", ["model.safetensors"]),
        ("peft-gpt2", ["adapter_model.safetensors"]),
        ("qwen3", ["model.safetensors"]),
        ("qwen3-mlx-4bit-sharded", list(SHARDS)),
    ],
)
def test_real_checkpoints(name: str, weights: list[str]) -> None:
    root = checkpoints() / name
    with open_checkpoint(str(root)) as opened:
        assert names(opened) == weights
        assert opened.tensors
        accounted = {*weights, *opened.others, *(left for left, _ in opened.left_out)}
        assert accounted == {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_weights_that_are_mostly_a_copy_are_offered_by_name(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    with pytest.raises(InputInvalid, match=r"only consolidated\.00\.pth.*--weights=consolidated\.00\.pth"):
        open_checkpoint(str(tmp_path))

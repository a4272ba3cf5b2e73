"""The hub, over a server on loopback: what is fetched, what is recorded, and how it fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from chunked import save_chunked
from hub_server import PLAIN, SHARDED, Hub, Repository, fetch, safetensors

from noisytune_cli.checkpoint import hub as hub_module
from noisytune_cli.checkpoint.checkpoint import open_checkpoint
from noisytune_cli.checkpoint.hub_errors import mapped_errors
from noisytune_cli.checkpoint.ids import is_repo_id
from noisytune_cli.commands.average import average
from noisytune_cli.commands.perturb import Request, perturb, plan_perturb
from noisytune_cli.commands.replay import replay
from noisytune_cli.errors import (
    HubError,
    InputInvalid,
    InputUnreadable,
    NoisytuneError,
    OutputUnsafe,
    ResourceExhausted,
    UsageError,
)
from noisytune_cli.records import Combination, NoiseSpec

COMMIT = Repository({}).commit


def fails(repo_id: str, revision: str | None = None) -> HubError:
    """Download and return the error, after checking that it is one line."""
    with pytest.raises(HubError) as caught:
        fetch(repo_id, revision)
    assert "\n" not in str(caught.value)
    return caught.value


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_only_what_is_needed_is_fetched(hub: Hub) -> None:
    with open_checkpoint("plain") as checkpoint:
        assert checkpoint.id == "plain"
        assert checkpoint.revision == COMMIT
        assert [source.name for source in checkpoint.sources] == ["model.safetensors"]
        assert [tensor.name for tensor in checkpoint.tensors] == ["a"]
        assert checkpoint.config == {"model_type": "bert"}
        copied = [".gitattributes", "2_Dense/model.safetensors", "config.json", "onnx/config.json"]
        assert list(checkpoint.others) == [*copied, "tokenizer [v1].json"]
        assert [name for name, _ in checkpoint.left_out] == [
            "coreml/a.mlpackage/",
            "onnx/model.onnx",
            "pytorch_model.bin",
            "tf_model.h5",
        ]
        assert all((checkpoint.root / name).is_file() for name in checkpoint.others)
    assert hub.fetched() == sorted([*copied, "tokenizer [v1].json", "model.safetensors"])


def test_a_sharded_model_is_fetched_by_its_index(hub: Hub) -> None:
    with open_checkpoint("owner/sharded") as checkpoint:
        assert checkpoint.index is not None
        assert checkpoint.index.name == "model.safetensors.index.json"
        assert [tensor.name for tensor in checkpoint.tensors] == ["a", "b"]
        assert dict(checkpoint.left_out).keys() == {"consolidated.safetensors"}
    assert "consolidated.safetensors" not in hub.fetched()


def test_a_manifest_is_fetched_though_it_is_not_copied(hub: Hub) -> None:
    for id_, text in (("settings", b"{}"), ("damaged", b'{"schema": 1, "tool": {"name": "noisytune"')):
        hub.repositories[id_] = Repository({**PLAIN, "noisytune.json": text})
        with open_checkpoint(id_) as checkpoint:
            assert (checkpoint.previous_run is not None) == (id_ == "damaged")
            assert "noisytune.json" in dict(checkpoint.left_out)


def test_chunks_are_fetched_with_their_metadata(hub: Hub, tmp_path: Path) -> None:
    folder = save_chunked(tmp_path / "chunks", {("model", "a"): torch.arange(6.0)})
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.repositories["chunks"] = Repository(
        files | {"train.toml": b"[model]", "optimizer_0/__0_0.distcp": b"x"}
    )
    with open_checkpoint("chunks") as checkpoint:
        assert [source.name for source in checkpoint.sources] == [".metadata"]
        assert [tensor.name for tensor in checkpoint.tensors] == ["a"]
        assert checkpoint.others == ("train.toml",)
    assert hub.fetched() == [".metadata", "__0_0.distcp", "__1_0.distcp", "train.toml"]


def test_weights_chooses_what_is_fetched(hub: Hub) -> None:
    with open_checkpoint("owner/sharded", weights="consolidated.safetensors") as checkpoint:
        assert [source.name for source in checkpoint.sources] == ["consolidated.safetensors"]
    assert hub.fetched() == ["config.json", "consolidated.safetensors"]


def test_a_pipeline_is_fetched_with_the_components_asked_for(hub: Hub, tmp_path: Path) -> None:
    listed = {name: ["diffusers", "X"] for name in ("unet", "vae", "scheduler")}
    values = {"unet": 2.0, "vae": 3.0}
    files = {
        "model_index.json": json.dumps(listed).encode(),
        "scheduler/scheduler_config.json": b"{}",
        **{f"{name}/model.safetensors": safetensors(a=[1.0, x]) for name, x in values.items()},
        **{f"{name}/model.fp16.safetensors": safetensors(a=[1.5, x]) for name, x in values.items()},
    }
    hub.repositories["pipe"] = Repository(files)
    with pytest.raises(InputInvalid, match="components with weights are unet, vae"):
        open_checkpoint("pipe")
    assert hub.fetched() == ["model_index.json"]
    perturb(Request("pipe", NoiseSpec(), components=("unet",)), str(tmp_path / "out"))
    assert hub.fetched() == sorted({*files} - {"unet/model.fp16.safetensors"})
    replay(str(tmp_path / "out"), str(tmp_path / "again"))
    noisy = (tmp_path / "again/unet/model.safetensors").read_bytes()
    assert noisy == (tmp_path / "out/unet/model.safetensors").read_bytes() != files["unet/model.safetensors"]


def test_modules_that_are_one_model_are_fetched_together(hub: Hub) -> None:
    modules = [{"path": path} for path in ("0_Transformer", "1_Dense")]
    names = ("0_Transformer/model.safetensors", "1_Dense/model.safetensors")
    files = {name: safetensors(a=[1.0, float(len(name))]) for name in names}
    hub.repositories["st"] = Repository({"modules.json": json.dumps(modules).encode(), **files})
    with open_checkpoint("st") as checkpoint:
        assert [tensor.name for tensor in checkpoint.tensors] == ["0_Transformer/a", "1_Dense/a"]
    assert hub.fetched() == [*names, "modules.json"]


def test_a_branch_is_resolved_and_a_commit_needs_no_resolving(hub: Hub) -> None:
    hub.repositories["plain"].branches = ("main", "refs/pr/1")
    assert fetch("plain", "refs/pr/1").revision == COMMIT
    assert any(request.path.endswith("/revision/refs%2Fpr%2F1") for request in hub.requests)
    hub.requests.clear()
    assert fetch("plain", COMMIT).revision == COMMIT
    assert hub.requests == []


def test_the_token_is_sent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["plain"].token = "hf_secret"
    assert "401" in str(fails("plain"))
    hub.requests.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch("plain")
    asked = [request for request in hub.requests if "plain" in request.path]
    assert asked
    assert {request.authorization for request in asked} == {"Bearer hf_secret"}


def test_offline_after_a_download_gives_the_same_without_a_request(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = fetch("plain")
    hub.requests.clear()
    offline(monkeypatch)
    assert fetch("plain") == online
    assert hub.requests == []


def test_offline_uses_a_cache_that_was_never_listed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download("plain", "model.safetensors")
    hf_hub_download("owner/sharded", "model.safetensors.index.json")
    offline(monkeypatch)
    assert fetch("plain").listing.files == ("model.safetensors",)
    assert "is not in the cache" in str(fails("owner/sharded"))


def test_a_hub_out_of_reach_is_replaced_by_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    online = fetch("owner/sharded")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch("owner/sharded") == online


def test_offline_and_not_cached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    assert "HF_HUB_OFFLINE" in str(fails("plain"))
    assert hub.requests == []


def test_the_cache_is_left_as_it_was(hub: Hub) -> None:
    def state(root: Path) -> dict[str, tuple[int, str]]:
        blobs = root.parent.parent / "blobs"
        return {
            p.name: (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
            for p in blobs.iterdir()
        }

    root = fetch("plain").root
    before = state(root)
    with open_checkpoint("plain"):
        pass
    assert state(root) == before


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("429", "too many requests"),
        ("500", "HTTP 500"),
        ("401", "not authorised"),
        ("403", "restricted"),
        ("reset", "connection failed"),
        ("html", "not that of a hub"),
    ],
)
def test_a_failing_hub(hub: Hub, fault: str, says: str) -> None:
    hub.faults["api"] = fault
    assert says in str(fails("plain"))


@pytest.mark.parametrize(
    ("fault", "says"),
    [("short", "the hub lists"), ("reset", "connection failed"), ("429", "429"), ("503", "HTTP 503")],
)
def test_a_failing_download_is_never_used(hub: Hub, tmp_path: Path, fault: str, says: str) -> None:
    hub.faults["model.safetensors"] = fault
    assert says in str(fails("plain"))
    stored = [file.stat().st_size for file in (tmp_path / "cache").glob("*/snapshots/*/model.safetensors")]
    assert len(PLAIN["model.safetensors"]) not in stored
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


def in_snapshot(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").glob("*/snapshots/*/*.safetensors") if path.exists()}


def test_what_was_looked_at_stays_where_another_file_fails(hub: Hub, tmp_path: Path) -> None:
    hub.faults[SECOND] = "503"
    fails("owner/sharded")
    assert in_snapshot(tmp_path) == {FIRST}
    del hub.faults[SECOND]
    hub.requests.clear()
    fetch("owner/sharded")
    assert hub.fetched() == [SECOND]


def test_what_nobody_looked_at_is_not_taken_for_good(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.sent[SECOND] = SHARDED[SECOND][:-1] + b"\xff"
    look = hub_module.Repository._check_new

    def stop(repository: hub_module.Repository, path: Path, name: str) -> None:
        if name == SECOND:
            raise KeyboardInterrupt
        look(repository, path, name)

    with monkeypatch.context() as stopping:
        stopping.setattr(hub_module.Repository, "_check_new", stop)
        with pytest.raises(KeyboardInterrupt):
            fetch("owner/sharded")
    assert in_snapshot(tmp_path) == {FIRST}
    assert "another digest" in str(fails("owner/sharded"))


def test_what_another_process_fetched_meanwhile_is_left_to_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = huggingface_hub.hf_hub_download

    def stop(repo_id: str, name: str, *, revision: str, local_files_only: bool, **ours: object) -> str:
        path = download(repo_id, name, revision=revision)
        if name == SECOND:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", stop)
    with pytest.raises(KeyboardInterrupt):
        fetch("owner/sharded")
    assert in_snapshot(tmp_path) == {FIRST, SECOND}


def test_what_another_process_takes_away_is_fetched_once_more(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, taken = hub_module.Repository._check_new, list[Path]()

    def take_away(repository: hub_module.Repository, path: Path, name: str) -> None:
        if name == FIRST and not taken:
            taken.append(path)
            path.unlink()
        look(repository, path, name)

    monkeypatch.setattr(hub_module.Repository, "_check_new", take_away)
    fetch("owner/sharded")
    assert len(taken) == 1
    assert in_snapshot(tmp_path) == {FIRST, SECOND}


def test_a_variable_that_is_not_set_need_not_be_unset(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fetch("owner/sharded").root
    (root / SECOND).unlink()
    monkeypatch.setattr(hub_module, "_cached_list", lambda repo_id, commit: None)
    for is_set in (True, False):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_set)
        failed = fails("owner/sharded")
        assert f"{SECOND} is not in the cache" in failed.why
        assert ("HF_HUB_OFFLINE" in str(failed)) == is_set


def test_a_whole_answer_to_a_range_is_not_appended(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 16)
    hub.faults["model.safetensors"] = "cut once"
    root = fetch("plain").root
    assert (root / "model.safetensors").read_bytes() == PLAIN["model.safetensors"]
    assert any(request.range for request in hub.requests)


def test_a_truncated_blob_in_the_cache_is_refused(hub: Hub) -> None:
    root = fetch("plain").root
    os.truncate(root / "model.safetensors", 20)
    message = str(fails("plain"))
    assert "damaged" in message
    assert str((root / "model.safetensors").resolve()) in message


def test_a_repository_or_revision_that_does_not_exist(hub: Hub) -> None:
    assert "no such repository" in str(fails("owner/nothing"))
    error = fails("plain", "no-such-branch")
    assert "no such revision" in str(error)
    assert error.exit_code == 7


def test_no_hub_at_all(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "connection failed" in str(fails("plain"))


def test_a_repository_without_weights_is_refused_before_any_download(hub: Hub) -> None:
    files = hub.repositories["plain"].files
    for name in ("model.safetensors", "2_Dense/model.safetensors", "pytorch_model.bin"):
        del files[name]
    with pytest.raises(InputInvalid, match=r"no safetensors or PyTorch weights, only.*ONNX.*TensorFlow"):
        open_checkpoint("plain")
    assert hub.fetched() == []


def test_the_config_can_refuse_before_any_weights(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["plain"].files["config.json"] = b'{"quantization_config": {"quant_method": "gptq"}}'
    for command in (
        lambda out: perturb(Request("plain", NoiseSpec()), out),
        lambda out: average(["plain"] * 2, out),
    ):
        with pytest.raises(InputInvalid, match=r"plain/config\.json: .*GPTQ"):
            command(str(tmp_path / "out"))
    assert hub.fetched() == ["config.json"]


@pytest.mark.parametrize("recipe_only", [False, True])
def test_an_output_is_refused_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, recipe_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    (out / "keep").mkdir(parents=True)
    (out / "noisytune.json").write_text("{}")
    request = Request("plain", NoiseSpec())
    with pytest.raises(OutputUnsafe, match="out"):
        perturb(request, str(out), recipe_only=recipe_only)
    with pytest.raises(OutputUnsafe, match="out"):
        plan_perturb(request, [Combination(0.15, 0, str(out))], recipe_only=recipe_only)
    with pytest.raises(OutputUnsafe, match="cache"):
        perturb(request, str(tmp_path / "cache/out"), recipe_only=recipe_only)
    with pytest.raises(OutputUnsafe, match="out"):
        average(["plain", "owner/sharded"], str(out))
    assert hub.requests == []


def test_replay_refuses_an_output_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["plain"].files["model.safetensors"] = safetensors(a=[0.0, 1.0, 2.0, 3.0])
    noisy = tmp_path / "noisy"
    perturb(Request("plain", NoiseSpec()), str(noisy))
    hub.requests.clear()
    with pytest.raises(OutputUnsafe, match="noisy"):
        replay(str(noisy), str(noisy))
    assert hub.requests == []
    replay(str(noisy), str(tmp_path / "again"))
    assert (tmp_path / "again/model.safetensors").read_bytes() == (noisy / "model.safetensors").read_bytes()


def test_a_noised_source_is_refused_before_any_weights(hub: Hub, tmp_path: Path) -> None:
    noised = b'{"schema": 1, "tool": {"name": "noisytune"'
    hub.repositories["plain"].files["noisytune.json"] = noised
    with pytest.raises(InputInvalid, match="--again"):
        perturb(Request("plain", NoiseSpec()), str(tmp_path / "out"))
    assert hub.fetched() == ["config.json", "noisytune.json"]


def test_an_absent_shard_is_found_before_any_weights(hub: Hub) -> None:
    del hub.repositories["owner/sharded"].files["model-00002-of-00002.safetensors"]
    with pytest.raises(InputInvalid, match="absent"):
        open_checkpoint("owner/sharded")
    assert hub.fetched() == ["model.safetensors.index.json"]


def test_an_unsafe_name_is_refused(hub: Hub) -> None:
    hub.repositories["plain"].files["../evil"] = b""
    assert "unsafe file name" in str(fails("plain"))


@pytest.mark.parametrize("text", ["bert-base-uncased", "owner/name", "a", "a_b/c.d-1"])
def test_repo_ids(text: str) -> None:
    assert is_repo_id(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ckpt/model.safetensors",
        "foo/bar/baz",
        "a--b",
        "a..b",
        "-a",
        "a/",
        "/a",
        "é",
        "a b",
        "x" * 97,
        "a\0",
    ],
)
def test_what_is_no_repo_id_never_reaches_the_hub(hub: Hub, text: str) -> None:
    assert not is_repo_id(text)
    with pytest.raises(NoisytuneError) as caught:
        open_checkpoint(text)
    assert isinstance(caught.value, InputUnreadable if text else UsageError)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("owner/name@main", "owner/name --revision=main"),
        ("owner/name:v1.0", "owner/name --revision=v1.0"),
        ("name@refs/pr/1", "name --revision=refs/pr/1"),
        ("https://huggingface.co/owner/name", "owner/name"),
        ("https://hf-mirror.com/owner/name/tree/main/", "owner/name --revision=main"),
        (
            "https://huggingface.co/owner/name/resolve/main/a/model.safetensors?download=true",
            "owner/name --revision=main --weights=a/model.safetensors",
        ),
        ("hf://owner/name@dev", "owner/name --revision=dev"),
        ("hf://owner/name/model.bin", "owner/name --weights=model.bin"),
        ("owner/name/unet", "owner/name --weights=unet/FILE"),
        ("owner/name/unet/model.safetensors", "owner/name --weights=unet/model.safetensors"),
        ("owner/name/", "owner/name"),
        ("models--owner--name", "owner/name"),
        ("owner\\name", "owner/name"),
        ("a b/c", None),
    ],
)
def test_an_id_as_others_write_it_is_explained(hub: Hub, text: str, meant: str | None) -> None:
    with pytest.raises(InputUnreadable) as caught:
        open_checkpoint(text)
    said = caught.value.next_step
    if meant is None:
        assert "a hub id looks like NAME or OWNER/NAME" in said
    else:
        assert said == f"If it is on the hub, give {meant}; else check the spelling"
    assert hub.requests == []


def test_the_environment_is_honoured_and_stderr_stays_empty(hub: Hub, tmp_path: Path) -> None:
    code = (
        "from noisytune_cli.checkpoint.find import find\n"
        "found = find('plain'); found.fetch(); print(found.revision, found.root)"
    )
    environment = {
        "PATH": os.environ["PATH"],
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_other",
    }
    command = [sys.executable, "-c", code]
    online = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    asked = len(hub.requests)
    offline = subprocess.run(
        command, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True
    )
    commit, root = online.stdout.split()
    assert commit == COMMIT
    assert root.startswith(str(tmp_path / "home"))
    assert (online.stderr, offline.stderr, offline.stdout) == ("", "", online.stdout)
    assert len(hub.requests) == asked
    assert {r.authorization for r in hub.requests if "/resolve/" in r.path} == {"Bearer hf_other"}


def test_a_signal_stops_a_download_that_stalls(hub: Hub, tmp_path: Path) -> None:
    hub.faults["model.safetensors"] = "stall"
    code = (
        "import os\nfrom noisytune_cli.checkpoint.find import find\n"
        "try: find('plain').fetch()\nexcept KeyboardInterrupt: os._exit(130)"
    )
    environment = {"PATH": os.environ["PATH"], "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE) as child:
        while "model.safetensors" not in hub.fetched():
            assert child.poll() is None
            threading.Event().wait(0.02)
        child.send_signal(signal.SIGINT)
        try:
            _, stderr = child.communicate(timeout=30)
        finally:
            child.kill()
    assert (child.returncode, stderr) == (130, b"")
    assert not hub.stopped.is_set()


def test_a_cache_that_cannot_be_made_is_no_fault_of_the_network() -> None:
    with (
        pytest.raises(ResourceExhausted, match="cannot write the hub's cache: /dev/null/models--a--b"),
        mapped_errors("a/b", None),
    ):
        os.mkdir("/dev/null/models--a--b")
    with (
        pytest.raises(HubError, match="no such path here, and the connection failed"),
        mapped_errors("a/b", None),
    ):
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def test_a_cache_that_takes_no_list_is_told(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library asks the hub then, and writes nothing down."""
    from huggingface_hub import constants

    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(ResourceExhausted, match=r"cannot write the hub's cache.*another cache with HF_HOME"):
        fetch("plain")

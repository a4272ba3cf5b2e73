"""A hub that lies: one line, exit code 7, and nothing written but in the cache, where nothing wrong stays."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import PLAIN, SHARDED, Hub, Repository, fetch, serve

from noisytune_cli.checkpoint import hub_answers
from noisytune_cli.errors import HubError, UsageError

COMMIT = Repository({}).commit
WEIGHTS = "model.safetensors"


def fails(repo_id: str = "plain", revision: str | None = None) -> str:
    """Download and return the error's line, after checking that it is one and says 7."""
    with pytest.raises(HubError) as caught:
        fetch(repo_id, revision)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 7
    return str(caught.value)


def entry(path: str = WEIGHTS, **changed: object) -> dict[str, object]:
    """What an honest hub lists of a file, but for what is changed."""
    return {"type": "file", "path": path, "size": 12, "oid": "0" * 40} | changed


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag", "X-Repo-Commit"])
@pytest.mark.parametrize("value", ["../../../evil", "{}/evil", '"../../evil"', 'W/"..', "evil\\x", "a, evil"])
def test_what_becomes_a_name_in_the_cache_is_one(hub: Hub, tmp_path: Path, header: str, value: str) -> None:
    value = value.format(tmp_path)
    hub.headers["config.json"] = {header: value}
    assert header in fails()
    assert not list(tmp_path.rglob("*evil*"))
    assert not list(tmp_path.glob("cache/models--plain/blobs/*"))


def test_a_missing_file_names_nothing_either(hub: Hub, tmp_path: Path) -> None:
    hub.faults[WEIGHTS] = "404"
    hub.headers[WEIGHTS] = {"X-Repo-Commit": "../../../evil"}
    assert "X-Repo-Commit" in fails()
    assert not list(tmp_path.rglob("*evil*"))


def test_every_file_is_of_the_commit_that_was_asked_for(hub: Hub, tmp_path: Path) -> None:
    hub.headers[WEIGHTS] = {"X-Repo-Commit": "b" * 40}
    assert f"commit {'b' * 40}" in fails()
    assert [path.name for path in tmp_path.glob("cache/*/snapshots/*")] == [COMMIT]


@pytest.mark.parametrize("etag", ['W/"0abc-12"', '"' + "f" * 128 + '"', "0X8DB_1"])
def test_another_hubs_etags_are_as_good(hub: Hub, etag: str) -> None:
    hub.headers[WEIGHTS] = {"ETag": etag}
    assert (fetch("plain").root / WEIGHTS).read_bytes() == PLAIN[WEIGHTS]


@pytest.mark.parametrize(
    "answer",
    [
        *("null", "[1]", "[]", "{}", "1", '"x"', "", "{", "[" * 100_000, "\udcff", "1" * 5_000),
        *(
            f'{{"id": "plain", "sha": {sha}}}'
            for sha in ("null", "1", "[]", '"../../../evil"', f'"{"A" * 40}"')
        ),
        f'{{"id": "plain", "sha": "{COMMIT}", "siblings": [1]}}',
        f'{{"id": "plain", "sha": "{COMMIT}", "lastModified": 5}}',
        f'{{"sha": "{COMMIT}"}}',
    ],
    ids=lambda answer: answer[:30],
)
def test_what_is_no_answer_about_a_repository(hub: Hub, tmp_path: Path, answer: str) -> None:
    hub.answers["info"] = answer.encode(errors="surrogateescape")
    assert "not that of a hub" in fails()
    assert not list(tmp_path.rglob("refs/*"))


@pytest.mark.parametrize(
    "answer",
    [
        *(None, {}, 1, "x", [1], [None], [[]], [{}], [{"type": "file"}]),
        *([entry(size=size)] for size in ("12", None, -1, 1.5, True, [], 1e300)),
        *(
            [entry(path)]
            for path in ("", "/x", "../x", "a//b", "a/./b", "a\0", "\ud800", "x" * 256, "a/" * 2000)
        ),
        *([entry(path=path)] for path in (None, 1, ["x"])),
        *([entry(oid=oid)] for oid in (None, 1, "../x", "")),
        *([entry(lfs=lfs)] for lfs in (1, {}, {"oid": "../x", "size": 12}, {"oid": "a" * 64, "size": "12"})),
        [entry(type="link")],
        [entry("a"), entry("a/b/c")],
    ],
    ids=lambda answer: json.dumps(answer)[:40],
)
def test_what_is_no_list_of_files_is_not_kept(hub: Hub, answer: object) -> None:
    hub.answers["tree"] = json.dumps(answer).encode()
    fails()
    hub.answers.clear()
    if answer != [entry("a"), entry("a/b/c")]:
        assert (fetch("plain").root / WEIGHTS).read_bytes() == PLAIN[WEIGHTS]


def test_a_list_in_the_cache_is_looked_at_too(hub: Hub, tmp_path: Path) -> None:
    fetch("plain")
    [kept] = tmp_path.glob("cache/*/trees/*.json")
    listed = json.loads(kept.read_text())
    listed["files"][WEIGHTS]["size"] = "12"
    kept.write_text(json.dumps(listed))
    code = "from noisytune_cli.checkpoint.find import find; find('plain').fetch()"
    environment = {
        "PATH": os.environ["PATH"],
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "HubError" in ended.stderr
    assert "of a size that is none" in ended.stderr


def test_a_list_without_end(hub: Hub) -> None:
    again = f"<{hub.endpoint}/api/models/plain/tree/{COMMIT}?cursor=x>; rel=next"
    hub.answers["tree"] = json.dumps([entry()]).encode()
    hub.headers["tree"] = {"Link": again}
    assert "more than 200 answers" in fails()
    assert len(hub.requests) < 210
    hub.headers["tree"] = {"Link": f"<{hub.endpoint}/elsewhere>; rel=next"}
    assert "leads on to" in fails()


def test_names_are_not_compared_with_one_another(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    patterns: list[object] = []
    download = huggingface_hub.snapshot_download

    def watched(*args: object, **options: Any) -> object:
        patterns.extend(options["allow_patterns"])
        return download(*args, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", watched)
    fetch("plain")
    assert patterns == []


def test_a_list_of_too_many_files(hub: Hub) -> None:
    hub.answers["tree"] = json.dumps([entry(f"{i}.txt") for i in range(100_001)]).encode()
    assert "more than 100,000 files" in fails()


@pytest.mark.parametrize("kind", ["info", "tree"])
def test_an_answer_without_measure(hub: Hub, kind: str) -> None:
    hub.answers[kind] = b"[" + b" " * (17 << 20) + b"]"
    assert "more than 16,777,216 bytes" in fails()
    hub.answers[kind] = gzip.compress(hub.answers[kind])
    hub.headers[kind] = {"Content-Encoding": "gzip"}
    assert "compressed" in fails()
    hub.headers.clear()
    hub.answers[kind] = b"[" + b"[]," * 1_000_000 + b"[]]"
    assert "more than 1,000,000 values" in fails()


def test_a_file_without_measure(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_answers, "_MAX_BYTES", 10_000)
    hub.sent[WEIGHTS] = bytes(20_000)
    assert "more than 10,000 bytes" in fails()
    hub.sent[WEIGHTS] = gzip.compress(PLAIN[WEIGHTS])
    hub.headers[WEIGHTS] = {"Content-Encoding": "gzip"}
    assert "compressed" in fails()
    assert not list(tmp_path.glob(f"cache/*/snapshots/*/{WEIGHTS}"))


def test_a_wait_without_measure(hub: Hub) -> None:
    hub.faults["config.json"] = "429"
    for header, value in (("Retry-After", "1" + "0" * 400), ("RateLimit", '"api";r=0;t=900')):
        hub.headers["config.json"] = {header: value}
        assert "to wait" in fails()


@pytest.mark.parametrize("revision", ["../../evil", "/tmp/evil", "a//b", ".", ""])
def test_a_revision_that_cannot_be_is_not_asked_for(hub: Hub, tmp_path: Path, revision: str) -> None:
    hub.repositories["plain"].branches = (revision,)
    assert "no such revision" in fails(revision=revision)
    assert hub.requests == []


def test_a_ref_in_the_cache_that_is_no_commit(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    refs = tmp_path / "cache/models--plain/refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("../../..")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "is no commit" in fails()


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.mark.parametrize("told", ["ETag", "X-Linked-Etag", "list", "git"])
def test_other_bytes_of_the_same_length_are_not_kept(hub: Hub, tmp_path: Path, told: str) -> None:
    right = PLAIN[WEIGHTS]
    wrong = right[:-1] + bytes([right[-1] ^ 1])
    if told == "git":
        hub.answers["tree"] = json.dumps(
            [entry(name, size=len(content), oid=git_digest(content)) for name, content in PLAIN.items()]
        ).encode()
        hub.headers = {name: {"ETag": git_digest(content)} for name, content in PLAIN.items()}
    elif told == "list":
        large = {"oid": hashlib.sha256(right).hexdigest(), "size": len(right), "pointerSize": 130}
        hub.answers["tree"] = json.dumps([entry(size=len(right), lfs=large)]).encode()
        hub.headers[WEIGHTS] = {"ETag": '"mine"'}
    elif told == "X-Linked-Etag":
        hub.headers[WEIGHTS] = {"ETag": "x", told: hashlib.sha256(right).hexdigest()}
    hub.sent[WEIGHTS] = wrong
    assert "another digest" in fails()
    assert wrong not in [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    hub.sent.clear()
    assert (fetch("plain").root / WEIGHTS).read_bytes() == right


def test_what_arrived_is_looked_at_though_another_file_fails(hub: Hub) -> None:
    first, second = sorted(name for name in SHARDED if name.startswith("model-"))
    hub.sent[first] = SHARDED[first][:-1] + b"\xff"
    hub.faults[second] = "500"
    assert "another digest" in fails("owner/sharded")
    hub.sent.clear()
    hub.faults.clear()
    assert (fetch("owner/sharded").root / first).read_bytes() == SHARDED[first]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HF_ENDPOINT", "http://127.0.0.1\n:80"),
        ("HF_ENDPOINT", "{}\n"),
        ("HF_ENDPOINT", "127.0.0.1"),
        ("HF_ENDPOINT", "ftp://127.0.0.1"),
        ("HF_ENDPOINT", "http://[::1"),
        ("HF_ENDPOINT", "http://127.0.0.1:port"),
        ("HF_ENDPOINT", ""),
        ("ALL_PROXY", "socks5://127.0.0.1:9"),
        ("ALL_PROXY", "nonsense://127.0.0.1:9"),
        ("ALL_PROXY", "http://[::1"),
        ("HTTP_PROXY", "127.0.0.1:port"),
        ("HF_TOKEN", "hf_é"),
        ("HF_TOKEN", "hf_\x01"),
        ("HF_HUB_ETAG_TIMEOUT", "soon"),
    ],
)
def test_what_the_user_set_wrongly_is_said_so(tmp_path: Path, variable: str, value: str) -> None:
    with serve(plain=Repository(dict(PLAIN))) as hub:
        environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.endpoint}
        environment |= {variable: value.format(hub.endpoint)}
        command = [sys.executable, "-m", "noisytune_cli", "inspect", "plain"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert hub.requests == []
    assert ended.returncode == UsageError.exit_code
    assert "cannot ask the hub" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert value.strip() not in ended.stderr or variable != "HF_TOKEN"


def test_what_needs_no_hub_needs_no_proxy(hub: Hub, tmp_path: Path) -> None:
    fetch("plain")
    environment = {"PATH": os.environ["PATH"], "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    environment |= {"ALL_PROXY": "socks5://127.0.0.1:9", "HF_ENDPOINT": "nonsense\n"}
    command = [sys.executable, "-m", "noisytune_cli", "inspect", "plain"]
    subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def test_others_clients_are_as_they_were(hub: Hub) -> None:
    from huggingface_hub import get_session

    fetch("plain")
    session = get_session()
    hub.answers["tree"] = gzip.compress(b"[1]")
    hub.headers["tree"] = {"Content-Encoding": "gzip"}
    assert session.get(f"{hub.endpoint}/api/models/plain/tree/main").json() == [1]
    hub.answers.clear()
    fetch("owner/sharded")
    assert get_session() is session

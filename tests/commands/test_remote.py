"""perturb, inspect, verify and compare with checkpoints in an object store: as if they lay here."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import save, weights
from object_store import SECRET, Fault, ObjectStore, error
from runs import run

from noisytune_cli.commands.average import average
from noisytune_cli.commands.compare import compare
from noisytune_cli.commands.inspect import inspect
from noisytune_cli.commands.perturb import Planned, Request, plan_perturb
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.errors import (
    HubError,
    InputInvalid,
    InputUnreadable,
    Mismatch,
    NoisytuneError,
    OutputUnsafe,
    ResourceExhausted,
    UsageError,
)
from noisytune_cli.records import NoiseSpec
from noisytune_cli.study.study import StudyRequest, study

pytestmark = pytest.mark.usefixtures("temporary")


@pytest.fixture(autouse=True)
def short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests for so little at a time that the model's first shard takes three."""
    monkeypatch.setattr("noisytune_cli.checkpoint.bucket.PIECE", 300_000)


@pytest.fixture
def there(store: ObjectStore, model: Path) -> str:
    """The model in the store."""
    store.put_folder(model, "models/a")
    return f"{store.url}/models/a"


def contents(folder: Path) -> dict[str, bytes]:
    """The files of an output by name; what its manifest calls the source is left out."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name, content in found.items():
        if name.endswith("noisytune.json"):
            manifest = json.loads(content)
            assert manifest["source"].pop("id")
            found[name] = json.dumps(manifest).encode()
    return found


def test_a_folder_gives_what_it_gives_here(model: Path, there: str, tmp_path: Path) -> None:
    done = run(there, tmp_path / "out")  # type: ignore[arg-type]
    run(model, tmp_path / "local")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    assert done.manifest.source.id == there


def test_a_name_that_is_not_printable_is_one_as_any(store: ObjectStore, model: Path, tmp_path: Path) -> None:
    # Between the time and AM macOS puts a narrow space that does not break.
    (model / "Screenshot at 9.41.00\u202fAM.png").write_bytes(b"PNG")
    there = f"{store.url}/out"
    run(model, there)  # type: ignore[arg-type]
    assert verify(there, base=str(model)).ok
    run(there, tmp_path / "again", again=True)  # type: ignore[arg-type]
    assert (tmp_path / "again" / "Screenshot at 9.41.00\u202fAM.png").read_bytes() == b"PNG"


def test_a_file_gives_what_it_gives_here(store: ObjectStore, tmp_path: Path) -> None:
    path = save(tmp_path / "in/w.safetensors", {"w.weight": weights("F32", 64, 32)})
    (tmp_path / "in/config.json").write_text("[")  # which helps nobody, and hinders nobody
    store.put_folder(tmp_path / "in", "x")
    there = run(f"{store.url}/x/w.safetensors", f"{tmp_path}/out/")  # type: ignore[arg-type]
    here = run(path, f"{tmp_path}/local/")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    assert set(contents(tmp_path / "out")) == {"w.safetensors", "w.safetensors.noisytune.json"}
    base = f"{store.url}/x/w.safetensors"
    assert verify(str(tmp_path / "out/w.safetensors"), base=base).ok
    replay(str(there.manifest_path), f"{tmp_path}/again/", base=base)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    (told,), (own,) = there.warnings, here.warnings
    assert told == own.replace(f"{tmp_path}/in", f"{store.url}/x")


def plan(source: str, **options: object) -> Planned:
    return plan_perturb(replace(Request(source, NoiseSpec()), **options))  # type: ignore[arg-type]


def fetched(store: ObjectStore) -> int:
    """How many bytes of weights were asked for."""
    total = 0
    for one in store.of("GET", "safetensors$"):
        start, _, end = one.headers["range"].removeprefix("bytes=").partition("-")
        total += int(end) + 1 - int(start)
    return total


@pytest.mark.parametrize("what", ["dry run", "inspect"])
def test_plans_read_headers_by_range(store: ObjectStore, model: Path, there: str, what: str) -> None:
    if what == "dry run":
        assert plan(there).plan == plan(str(model)).plan
    else:
        rows = [inspect(source, headers_only=True).tensors for source in (there, str(model))]
        assert rows[0] == rows[1]
    assert 0 < fetched(store) < 200_000
    gets = [one for one in store.of("GET") if "list-type" not in one.path]
    assert gets
    assert all("range" in one.headers and "if-match" in one.headers for one in gets)
    assert not store.of("PUT") + store.of("DELETE") + store.of("POST")


def test_a_file_is_planned_by_its_header(store: ObjectStore, tmp_path: Path) -> None:
    save(tmp_path / "w.safetensors", {"w.weight": weights("F32", 300, 400)})
    store.put("w.safetensors", (tmp_path / "w.safetensors").read_bytes())
    planned = plan(f"{store.url}/w.safetensors")
    assert planned.plan == plan(str(tmp_path / "w.safetensors")).plan
    assert fetched(store) == 65_536


def test_inspect_and_compare_read_what_lies_there(store: ObjectStore, model: Path, there: str) -> None:
    assert inspect(there).tensors == inspect(str(model)).tensors
    found = compare(there, str(model))
    assert not found.differs
    assert found.a.id == there


def test_a_manifest_that_is_named_alone_has_to_be_here(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has to be here: s3://b/noisytune\.json.*Copy it here"):
        replay("s3://b/noisytune.json", str(tmp_path / "out"), base="s3://b/model")


def test_verify_fetches_the_output(store: ObjectStore, model: Path, there: str, tmp_path: Path) -> None:
    run(model, tmp_path / "out")
    store.put_folder(tmp_path / "out", "out")
    store.put("out/other.safetensors", (model / "model-00001-of-00002.safetensors").read_bytes())
    for name in ("out", "out/", "out/noisytune.json"):
        found = verify(f"{store.url}/{name}", base=there)
        assert found.ok
        assert found.checked.files == 6
        assert found.output == f"{store.url}/out"
        assert found.warnings == ("other.safetensors is not in the manifest, and was not verified",)
    assert not store.of("GET", "other.safetensors")
    store.put("out/tokenizer.json", b"{ }")
    assert [one.file for one in verify(f"{store.url}/out").mismatches] == ["tokenizer.json"]


def test_verify_fetches_a_file_and_its_manifest(store: ObjectStore, tmp_path: Path) -> None:
    run(save(tmp_path / "w.safetensors", {"w": weights("F32", 8)}), tmp_path / "out.safetensors")
    for name in ("out.safetensors", "out.safetensors.noisytune.json"):
        store.put(f"o/{name}", (tmp_path / name).read_bytes())
    assert verify(f"{store.url}/o/out.safetensors").ok
    assert verify(f"{store.url}/o/out.safetensors.noisytune.json").ok
    store.put("o/lone.safetensors", b"x")
    with pytest.raises(InputUnreadable, match=r"no manifest: s3://bucket-\d+/o/lone"):
        verify(f"{store.url}/o/lone.safetensors")


FAULTS = {
    "503": Fault("GET", r"/models/a/.*-00001-", status=503, body=error("SlowDown"), times=2),
    "reset": Fault("GET", r"/models/a/.*-00001-", reset=True, times=2),
    "cut": Fault("GET", r"/models/a/.*-00001-", cut=100_000, times=2),
    "truncated range": Fault("GET", r"/models/a/.*-00001-", short=100_000, times=2),
    "503 to the list": Fault("GET", r"list-type", status=503, times=2),
    "reset of HEAD": Fault("HEAD", r"", reset=True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_waited_for(
    store: ObjectStore, model: Path, there: str, tmp_path: Path, fault: str
) -> None:
    store.faults.append(replace(FAULTS[fault]))
    run(there, tmp_path / "out")  # type: ignore[arg-type]
    assert store.faults[0].times == 0
    run(model, tmp_path / "local")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


@pytest.mark.parametrize(
    ("fault", "kind", "why"),
    [
        (Fault("GET", "-00001-", short=1, times=99), HubError, "fewer bytes were sent than asked for"),
        (Fault("GET", "-00001-", status=403, body=error("AccessDenied")), InputUnreadable, "denied"),
        (
            Fault("GET", "-00001-", status=400, body=error("ExpiredToken")),
            InputUnreadable,
            "400 ExpiredToken",
        ),
        (Fault("GET", "-00001-", status=404, body=error("NoSuchKey")), InputUnreadable, "404 NoSuchKey"),
        (Fault("GET", "list-type", status=403, body=error("AccessDenied")), InputUnreadable, "denied"),
        (Fault("HEAD", "", status=403), InputUnreadable, "denied"),
        (Fault("HEAD", "", status=301), InputUnreadable, r"in another region.*AWS_REGION"),
        (Fault("HEAD", "", status=400), InputUnreadable, r"denied.*answered 400.*AWS_SESSION_TOKEN"),
        (Fault("GET", "list-type", instead=b"<html>", times=9), HubError, "the connection failed"),
    ],
)
def test_what_does_not_pass_is_one_line(
    store: ObjectStore, there: str, tmp_path: Path, fault: Fault, kind: type[NoisytuneError], why: str
) -> None:
    store.faults.append(replace(fault))
    with pytest.raises(kind, match=why) as caught:
        run(there, tmp_path / "out")  # type: ignore[arg-type]
    assert there in caught.value.line()
    assert SECRET not in caught.value.line()
    assert not (tmp_path / "out").exists()


def test_an_object_that_changes_is_refused(store: ObjectStore, there: str) -> None:
    name = "models/a/model-00001-of-00002.safetensors"
    other = store.get(name)[:-1] + b"x"
    store.faults.append(Fault("GET", "-00001-", before=lambda: store.put(name, other)))
    with pytest.raises(
        Mismatch, match=r"changed while it was read: s3://.*-00001-.*took its place"
    ) as caught:
        inspect(there)
    assert caught.value.exit_code == 8


def test_a_store_that_knows_no_conditions_is_held_to_the_etag(
    store: ObjectStore, there: str, tmp_path: Path
) -> None:
    name = "models/a/config.json"
    store.faults.append(
        Fault("GET", "config.json", before=lambda: store.put(name, b'{"model_type": "y"}'), drops="if-match")
    )
    with pytest.raises(Mismatch, match="took its place"):
        run(there, tmp_path / "out")  # type: ignore[arg-type]


def test_what_is_wrong_in_a_file_is_told_of_its_address(
    store: ObjectStore, there: str, tmp_path: Path
) -> None:
    store.put("models/a/model-00002-of-00002.safetensors", b"no safetensors")
    with pytest.raises(InputInvalid) as caught:
        run(there, tmp_path / "out")  # type: ignore[arg-type]
    assert caught.value.path == f"{there}/model-00002-of-00002.safetensors"


def test_a_config_that_is_not_used_is_told_by_its_address(
    store: ObjectStore, model: Path, tmp_path: Path
) -> None:
    (model / "config.json").write_text("[")
    store.put_folder(model, "models/a")
    there = run(f"{store.url}/models/a", tmp_path / "out")  # type: ignore[arg-type]
    here = run(model, tmp_path / "local")
    assert there.warnings == tuple(
        text.replace(str(model), f"{store.url}/models/a") for text in here.warnings
    )
    assert here.warnings


def test_room_is_asked_for_before_anything_is_fetched(
    store: ObjectStore, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=700_000))
    with pytest.raises(ResourceExhausted, match=r"there and 700,000 are free\. Free space, or set TMPDIR"):
        run(there, tmp_path / "out")  # type: ignore[arg-type]
    assert not store.of("GET", "safetensors$")


@pytest.mark.parametrize("out", ["here", "there"])
@pytest.mark.parametrize("command", ["perturb", "replay", "average"])
def test_room_for_the_output_is_asked_for_before_anything_is_fetched(
    store: ObjectStore,
    there: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    out: str,
) -> None:
    place = f"{tmp_path}/out" if out == "here" else f"{store.url}/out"
    made = run(model, tmp_path / "made")
    free = SimpleNamespace(f_bavail=1_000_000, f_frsize=1, f_blocks=2_000_000, f_bfree=1_000_000, f_files=0)
    monkeypatch.setattr("os.statvfs", lambda folder: free)
    commands: dict[str, Callable[[], object]] = {
        "perturb": lambda: run(there, place),  # type: ignore[arg-type]
        "replay": lambda: replay(str(made.manifest_path), place, base=there),
        "average": lambda: average([there, there], place),
    }
    with pytest.raises(ResourceExhausted, match=r"with the source, which is fetched .* and 1,000,000 are"):
        commands[command]()
    assert not store.of("GET", "safetensors$") + store.of("PUT")


def test_an_output_that_exists_is_told_before_weights_are_fetched(
    store: ObjectStore, there: str, tmp_path: Path
) -> None:
    save(tmp_path / "out/model.safetensors", {"w": weights("F32", 8)})
    with pytest.raises(NoisytuneError) as caught:
        run(there, tmp_path / "out")  # type: ignore[arg-type]
    assert caught.value.exit_code == 5
    with pytest.raises(NoisytuneError) as caught:
        run(f"{there}/model-00001-of-00002.safetensors", tmp_path / "out/model.safetensors")  # type: ignore[arg-type]
    assert caught.value.exit_code == 5
    assert not store.of("GET", "safetensors$")


def test_an_output_here_is_kept_if_what_is_there_gives_it(
    store: ObjectStore, there: str, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(there, out)  # type: ignore[arg-type]
    assert run(there, out, skip_existing=True).skipped  # type: ignore[arg-type]
    shard = model / "model-00001-of-00002.safetensors"
    content = shard.read_bytes()
    store.put("models/a/" + shard.name, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(OutputUnsafe, match="exists"):
        run(there, out, skip_existing=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "kind", "why"),
    [
        ("nothing", InputUnreadable, "no object has this key"),
        ("unfinished", InputInvalid, "a run of noisytune is writing it"),
    ],
)
def test_what_is_no_checkpoint(store: ObjectStore, key: str, kind: type[NoisytuneError], why: str) -> None:
    store.put("unfinished/.noisytune/publishing", b"")
    store.put("unfinished/model.safetensors", b"")
    with pytest.raises(kind, match=why):
        inspect(f"{store.url}/{key}")


def test_folders_of_consoles_are_no_files(
    store: ObjectStore, model: Path, there: str, tmp_path: Path
) -> None:
    store.put("models/a/", b"")
    store.put("models/a/sub/", b"")
    run(there + "/", tmp_path / "out")  # type: ignore[arg-type]
    run(model, tmp_path / "local")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


@pytest.mark.parametrize(
    "source",
    [
        f"s3://key:{SECRET}@b/model",
        f"s3://b/model?secret={SECRET}",
        "s3://",
        "s3:///model",
        "s3://b/a//b",
        "s3://b/../b",
    ],
)
def test_an_address_is_a_bucket_and_a_key(source: str) -> None:
    with pytest.raises(UsageError) as caught:
        inspect(source)
    assert SECRET not in caught.value.line()


def test_a_noised_source_is_refused_there_too(store: ObjectStore, model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out")
    store.put_folder(tmp_path / "out", "out")
    with pytest.raises(InputInvalid, match="noised before"):
        run(f"{store.url}/out", tmp_path / "again")  # type: ignore[arg-type]
    assert not store.of("GET", "safetensors$")


def test_a_signal_leaves_nothing_of_what_was_fetched(store: ObjectStore, there: str, tmp_path: Path) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def stall() -> None:
        reached.set()
        go_on.wait(20)

    store.faults.append(Fault("GET", "-00001-", before=stall))
    command = [sys.executable, "-m", "noisytune_cli", "perturb", there, "-o", str(tmp_path / "out")]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert reached.wait(60)
    started.send_signal(signal.SIGTERM)
    _, told = started.communicate(timeout=30)
    go_on.set()
    assert (started.returncode, told) == (128 + signal.SIGTERM, "")
    assert not (tmp_path / "out").exists()


def test_what_needs_a_folder_here_says_so(there: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="every run loads it anew"):
        study(StudyRequest(model=there, out=str(tmp_path / "study")))

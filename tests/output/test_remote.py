"""Outputs that go into an object store: the same bytes as here, complete or known not to be."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import save, weights
from object_store import SECRET, Fault, ObjectStore, error
from runs import run
from without import run_without

from noisytune_cli.commands.average import average
from noisytune_cli.commands.inspect import inspect
from noisytune_cli.commands.perturb import perturb_each
from noisytune_cli.commands.plan import plan_job
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.request import Request
from noisytune_cli.commands.verify import verify
from noisytune_cli.errors import (
    HubError,
    InputInvalid,
    NoisytuneError,
    OutputUnsafe,
    ResourceExhausted,
    UsageError,
)
from noisytune_cli.output.remote import RemotePublication
from noisytune_cli.records import Combination, NoiseSpec

obstore = pytest.importorskip("obstore", reason="object stores need obstore")

WEIGHTS = "model-00001-of-00002.safetensors"
CLAIM = ".noisytune/publishing"

pytestmark = pytest.mark.usefixtures("temporary")


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A model whose weights take three parts, and what a run makes of it here."""
    root = tmp_path_factory.mktemp("large")
    save(root / "in/model.safetensors", {"a.weight": weights("F32", 1500, 1800)})
    (root / "in/config.json").write_text("{}")
    run(root / "in", root / "out")
    return root / "in", contents(root / "out")


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the least size that S3 allows."""
    for room in ("checkpoint.store", "output.sending"):
        monkeypatch.setattr(f"noisytune_cli.{room}.PIECE", 5 << 20)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def sent(store: ObjectStore, key: str = "out") -> dict[str, bytes]:
    """All that lies below a key."""
    return {name: store.get(f"{key}/{name}") for name in store.keys(f"{key}/")}


def plan_job_of(source: Path, out: str) -> None:
    plan_job(Request(str(source), NoiseSpec()), out, [Combination(0.15, 0, out)])


def fails(source: Path, out: str, **options: object) -> NoisytuneError:
    """Run, and return the error that is raised."""
    with pytest.raises(NoisytuneError) as caught:
        run(source, out, **options)
    assert SECRET not in caught.value.line()
    return caught.value


def test_a_folder_is_sent_in_order_and_as_it_is_here(store: ObjectStore, model: Path, tmp_path: Path) -> None:
    done = run(model, f"{store.url}/out/")
    run(model, tmp_path / "local")
    assert sent(store) == contents(tmp_path / "local")
    assert (str(done.output), str(done.manifest_path)) == (
        f"{store.url}/out",
        f"{store.url}/out/noisytune.json",
    )
    names = [one.path.partition("/out/")[2] for one in store.of("PUT")]
    assert names == [
        *[CLAIM] * 2,  # asked for again, to see that the store keeps it
        WEIGHTS,
        WEIGHTS.replace("1-", "2-"),
        "sub/notes%20%C3%A9%20%231.txt",
        "tokenizer.json",
        "model.safetensors.index.json",
        "config.json",
        "noisytune.json",
    ]
    assert all(one.headers["if-none-match"] == "*" for one in store.of("PUT"))
    assert all("x-amz-checksum-sha256" in one.headers for one in store.of("PUT"))


def test_large_files_are_sent_in_parts(
    store: ObjectStore, large: tuple[Path, dict[str, bytes]], in_parts: None
) -> None:
    model, made = large
    run(model, f"{store.url}/out")
    assert sent(store) == made
    parts = store.of("PUT", "partNumber")
    assert len(parts) == 3
    assert all("x-amz-checksum-sha256" in one.headers for one in parts)
    assert store.uploads() == []


def test_a_file_is_sent_with_its_manifest(store: ObjectStore, tmp_path: Path) -> None:
    path = save(tmp_path / "in/w.safetensors", {"w": weights("F32", 8)})
    for out in ("one/x.safetensors", "two/"):
        run(path, f"{store.url}/{out}")
    run(path, f"{tmp_path}/two/")
    assert sent(store, "two") == contents(tmp_path / "two")
    assert store.keys("one/") == {"x.safetensors", "x.safetensors.noisytune.json"}


def test_from_a_bucket_into_a_bucket(store: ObjectStore, model: Path, tmp_path: Path) -> None:
    store.put_folder(model, "in")
    run(f"{store.url}/in", f"{store.url}/out")  # type: ignore[arg-type]
    run(f"{store.url}/in", tmp_path / "local")  # type: ignore[arg-type]
    assert sent(store) == contents(tmp_path / "local")
    for out in ("in", "in/out"):
        assert fails(f"{store.url}/in", f"{store.url}/{out}").exit_code == 5  # type: ignore[arg-type]


def test_recipes_lists_replays_and_averages_go_there_too(
    store: ObjectStore, model: Path, tmp_path: Path
) -> None:
    wanted = [Combination(0.15, seed, f"{store.url}/list-{seed}") for seed in (0, 1)]
    perturb_each(Request(str(model), NoiseSpec()), wanted)
    run(model, tmp_path / "local")
    assert sent(store, "list-0") == contents(tmp_path / "local")
    replay(str(tmp_path / "local"), f"{store.url}/replayed", base=str(model))
    assert sent(store, "replayed") == contents(tmp_path / "local")
    run(model, f"{store.url}/recipe.json", recipe_only=True)
    assert store.get("recipe.json") == (tmp_path / "local/noisytune.json").read_bytes()
    average([str(model), str(model)], f"{store.url}/mean")
    average([str(model), str(model)], str(tmp_path / "mean"))
    assert sent(store, "mean") == contents(tmp_path / "mean")


PASSING = {
    "503": [Fault("PUT", WEIGHTS, status=503, body=error("SlowDown"), times=2)],
    "reset": [Fault("PUT", WEIGHTS, reset=True), Fault("PUT", "config.json", reset=True)],
    "503 to the claim": [Fault("PUT", "publishing", status=503, times=2)],
    "lost answer to the claim": [Fault("PUT", "publishing", lost=True)],
    "lost answers": [Fault("PUT", name, lost=True) for name in (WEIGHTS, "config.json", "noisytune.json$")],
    "409 to the manifest": [Fault("PUT", "noisytune.json$", status=409, body=error("Conflict"))],
    "503 to the list": [Fault("GET", "list-type", status=503)],
    "503 to the claim's removal": [Fault("POST", "delete", status=503)],
}


@pytest.mark.parametrize("faults", PASSING)
def test_what_passes_leaves_no_trace(store: ObjectStore, model: Path, tmp_path: Path, faults: str) -> None:
    store.faults += [replace(fault) for fault in PASSING[faults]]
    run(model, f"{store.url}/out")
    assert not any(fault.times for fault in store.faults)
    run(model, tmp_path / "local")
    assert sent(store) == contents(tmp_path / "local")


IN_PARTS = {
    "503 to a part": [Fault("PUT", "partNumber=2", status=503, times=2)],
    "reset of parts": [Fault("PUT", "partNumber", reset=True, times=2)],
    "lost answer to a part": [Fault("PUT", "partNumber=1", lost=True)],
    "lost answer to Complete": [Fault("POST", "uploadId", lost=True)],
    "NoSuchUpload": [Fault("PUT", "partNumber=2", status=404, body=error("NoSuchUpload"))],
    "NoSuchUpload after Complete": [
        Fault("POST", "uploadId", lost=True),
        Fault("POST", "uploadId", status=404, body=error("NoSuchUpload")),
    ],
    "200 with an error": [Fault("POST", "uploadId", status=200, body=error("InternalError"))],
    "200 with an error, though it is done": [Fault("POST", "uploadId", instead=error("InternalError"))],
    "a part that was damaged": [Fault("PUT", "partNumber=1", damages=True)],
}


@pytest.mark.parametrize("faults", IN_PARTS)
def test_what_passes_leaves_no_trace_of_parts(
    store: ObjectStore, large: tuple[Path, dict[str, bytes]], in_parts: None, faults: str
) -> None:
    store.faults += [replace(fault) for fault in IN_PARTS[faults]]
    run(large[0], f"{store.url}/out")
    assert not any(fault.times for fault in store.faults)
    assert sent(store) == large[1]
    assert store.uploads() == []
    if "Complete" in faults or "done" in faults:  # what is there is looked at before it is sent again
        assert len(store.of("POST", r"\?uploads")) == 1


REFUSED = {
    (403, "AccessDenied"): (ResourceExhausted, "denied"),
    (400, "ExpiredToken"): (ResourceExhausted, "400 ExpiredToken"),
    (507, "XMinioStorageFull"): (ResourceExhausted, "507 XMinioStorageFull"),
    (404, "NoSuchBucket"): (ResourceExhausted, "no such bucket"),
    (409, "Conflict"): (OutputUnsafe, ""),
    (400, "Strange"): (HubError, "400 Strange"),
    (301, "PermanentRedirect"): (ResourceExhausted, "another region"),
    (501, "NotImplemented"): (ResourceExhausted, "501 NotImplemented"),
}


@pytest.mark.parametrize("answer", REFUSED)
def test_what_does_not_pass_is_completed_by_the_same_command(
    store: ObjectStore, model: Path, tmp_path: Path, answer: tuple[int, str]
) -> None:
    (status, code), (kind, why) = answer, REFUSED[answer]
    store.faults.append(Fault("PUT", "config.json", status=status, body=error(code), times=99))
    failed = fails(model, f"{store.url}/out")
    assert type(failed) is kind
    assert why in failed.why
    assert "the same command completes it" in failed.why
    assert failed.path == f"{store.url}/out"
    assert not {"config.json", "noisytune.json"} & store.keys("out/")
    store.faults.clear()
    store.asked.clear()
    other = fails(model, f"{store.url}/out", noise=NoiseSpec(seed=1))
    assert (other.exit_code, other.what) == (5, "the output is claimed")
    run(model, f"{store.url}/out")
    run(model, tmp_path / "local")
    assert sent(store) == contents(tmp_path / "local")
    assert not store.of("PUT", WEIGHTS)


def test_what_cannot_begin_leaves_its_claim(store: ObjectStore, model: Path, tmp_path: Path) -> None:
    store.faults.append(Fault("PUT", WEIGHTS, status=403, body=error("AccessDenied")))
    assert fails(model, f"{store.url}/out").exit_code == 6
    assert store.keys() == {f"out/{CLAIM}"}
    other = fails(model, f"{store.url}/out", noise=NoiseSpec(seed=1))
    assert (other.exit_code, other.what) == (5, "the output is claimed")
    assert f"remove what is there, out/{CLAIM} last" in other.next_step
    store.delete(f"out/{CLAIM}")
    run(model, f"{store.url}/out", noise=NoiseSpec(seed=1))
    run(model, tmp_path / "local", noise=NoiseSpec(seed=1))
    assert sent(store) == contents(tmp_path / "local")


@pytest.mark.parametrize("begin", [run, plan_job_of], ids=["run", "plan"])
def test_a_store_that_replaces_what_is_there_is_refused(
    store: ObjectStore, model: Path, begin: Callable[[Path, str], object]
) -> None:
    store.faults.append(Fault("PUT", "", drops="if-none-match", times=99))
    with pytest.raises(ResourceExhausted, match=r"replaces objects where it was asked not to.*Write to"):
        begin(model, f"{store.url}/out")
    assert store.keys() == set()


def test_a_claim_that_was_taken_back_is_made_again(store: ObjectStore, model: Path, tmp_path: Path) -> None:
    """Whoever has made the same claim may have completed the output before this run looks again."""
    claimed = Fault("PUT", CLAIM, before=lambda: None)
    store.faults += [claimed, Fault("PUT", CLAIM, before=lambda: store.delete(f"out/{CLAIM}"))]
    run(model, f"{store.url}/out")
    run(model, tmp_path / "local")
    assert sent(store) == contents(tmp_path / "local")
    assert len(store.of("PUT", CLAIM)) == 3


def test_parts_that_failed_together_are_sent_one_by_one(
    store: ObjectStore,
    large: tuple[Path, dict[str, bytes]],
    in_parts: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_a_time, put = list[int](), obstore.put
    monkeypatch.setattr(
        obstore, "put", lambda *a, **k: (at_a_time.append(k.get("max_concurrency", 0)), put(*a, **k))[1]
    )
    store.faults.append(Fault("PUT", "partNumber=2", status=404, body=error("NoSuchUpload")))
    run(large[0], f"{store.url}/out")
    assert sent(store) == large[1]
    assert [count for count in at_a_time if count] == [4, 1]


def test_a_slow_line_is_told_what_helps(
    store: ObjectStore, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_TIMEOUT", "1s")
    store.faults.append(Fault("PUT", WEIGHTS, before=lambda: time.sleep(2), status=200, times=99))
    failed = fails(model, f"{store.url}/out")
    assert (failed.exit_code, "took longer than it may" in failed.why) == (7, True)
    assert "AWS_TIMEOUT=300s" in failed.next_step


@pytest.mark.parametrize("recipe_only", [False, True])
def test_a_bucket_is_no_file(store: ObjectStore, tmp_path: Path, recipe_only: bool) -> None:
    model = save(tmp_path / "w.safetensors", {"w.weight": weights("F32", 64, 32)})
    failed = fails(model, store.url, recipe_only=recipe_only)
    assert (failed.exit_code, f"--out={store.url}/ writes a file inside" in failed.why) == (5, True)
    assert not store.keys()


def test_a_name_that_no_file_here_can_have_is_refused_first(store: ObjectStore, model: Path) -> None:
    failed = fails(model, f"{store.url}/{'a' * 300}")
    assert (failed.exit_code, "too long" in failed.why) == (5, True)


@pytest.mark.parametrize(
    "name", ["sub/line\nfeed.txt", "sub/delete\x7f.txt", "/".join(["d" * 250] * 4) + "/deep"]
)
def test_a_file_that_no_object_can_be_named_like_is_refused_first(
    store: ObjectStore, model: Path, name: str
) -> None:
    (model / name).parent.mkdir(parents=True, exist_ok=True)
    (model / name).write_text("beside")
    failed = fails(model, f"{store.url}/out/of/some/depth")
    assert failed.exit_code == 5
    assert "no object can be called" in failed.why or "more than 1,024 bytes" in failed.why
    assert not store.keys()


def test_a_bucket_that_is_not_there_is_told(store: ObjectStore, model: Path) -> None:
    failed = fails(model, f"{store.url}-not-there/out")
    assert (failed.exit_code, "no such bucket" in failed.why) == (6, True)


@pytest.mark.parametrize("name", ["noisytune.json", "config.json", "other.txt", "sub/more.txt"])
def test_what_is_there_stays(store: ObjectStore, model: Path, name: str) -> None:
    store.put(f"out/{name}", b"mine")
    failed = fails(model, f"{store.url}/out")
    assert (failed.exit_code, name in failed.why) == (5, True)
    assert sent(store) == {name: b"mine"}
    assert not store.of("PUT")


def test_a_complete_output_stays(store: ObjectStore, model: Path) -> None:
    run(model, f"{store.url}/out")
    before = sent(store)
    assert fails(model, f"{store.url}/out", noise=NoiseSpec(seed=1)).exit_code == 5
    assert sent(store) == before


@pytest.mark.parametrize("name", ["config.json", "noisytune.json", "stray.txt"])
def test_what_comes_meanwhile_is_not_replaced(store: ObjectStore, model: Path, name: str) -> None:
    when = "publishing" if name == "stray.txt" else f"/{name}$"
    store.faults.append(Fault("PUT", when, before=lambda: store.put(f"out/{name}", b"mine")))
    failed = fails(model, f"{store.url}/out")
    assert (failed.exit_code, name in failed.why) == (5, True)
    assert CLAIM in store.keys("out/")
    assert store.get(f"out/{name}") == b"mine"
    if name != "noisytune.json":
        assert "noisytune.json" not in store.keys("out/")


def test_who_joined_keeps_the_claim_of_who_failed(store: ObjectStore, model: Path, tmp_path: Path) -> None:
    refused = error("AccessDenied")
    store.faults += [
        Fault("PUT", WEIGHTS, status=403, body=refused, before=lambda: fails(model, f"{store.url}/out")),
        Fault("PUT", "config.json", status=403, body=refused),
    ]
    assert fails(model, f"{store.url}/out").exit_code == 6
    assert {WEIGHTS, CLAIM} < store.keys("out/")
    with pytest.raises(InputInvalid, match="or was stopped while it did"):
        inspect(f"{store.url}/out")
    run(model, f"{store.url}/out")
    run(model, tmp_path / "local")
    assert sent(store) == contents(tmp_path / "local")


def test_who_failed_opens_the_way_for_nobody_into_an_upload_that_goes_on(
    store: ObjectStore, large: tuple[Path, dict[str, bytes]], in_parts: None
) -> None:
    source, expected = large
    reached, go_on = threading.Event(), threading.Event()
    others: list[NoisytuneError] = []
    first = threading.Thread(target=lambda: others.append(fails(source, f"{store.url}/out")))

    def stall() -> None:
        reached.set()
        go_on.wait(60)

    def have_others_come() -> None:
        go_on.set()
        first.join()
        others.append(fails(source, f"{store.url}/out", noise=NoiseSpec(seed=1)))

    store.faults = [
        Fault("POST", r"\?uploads", status=403, body=error("AccessDenied"), before=stall),
        Fault("POST", "uploadId", before=have_others_come),
    ]
    first.start()
    assert reached.wait(60)
    run(source, f"{store.url}/out")
    assert [(failed.exit_code, failed.what) for failed in others] == [
        (6, "cannot write"),
        (5, "the output is claimed"),
    ]
    assert sent(store) == expected


def test_who_came_before_the_claim_finds_none(
    store: ObjectStore, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = RemotePublication.commit

    def late(publication: RemotePublication) -> object:
        store.put("out/stray.txt", b"mine")
        return commit(publication)

    monkeypatch.setattr(RemotePublication, "commit", late)
    failed = fails(model, f"{store.url}/out")
    assert (failed.exit_code, "stray.txt" in failed.why) == (5, True)
    assert sent(store) == {"stray.txt": b"mine"}


def test_two_runs_of_one_command_publish_once(store: ObjectStore, model: Path, tmp_path: Path) -> None:
    store.faults.append(Fault("PUT", "tokenizer.json", before=lambda: run(model, f"{store.url}/out")))
    run(model, f"{store.url}/out")
    run(model, tmp_path / "local")
    assert sent(store) == contents(tmp_path / "local")


@pytest.mark.parametrize(
    "options", [{"overwrite": True}, {"overwrite_changed": True}, {"skip_existing": True}]
)
def test_options_that_replace_are_none_of_a_bucket(
    store: ObjectStore, model: Path, options: dict[str, bool]
) -> None:
    failed = fails(model, f"{store.url}/out", **options)
    assert isinstance(failed, UsageError)
    assert store.keys() == set()


def test_a_claim_that_cannot_be_removed_is_told(store: ObjectStore, model: Path, tmp_path: Path) -> None:
    store.faults.append(Fault("POST", "delete", status=403, body=error("AccessDenied")))
    done = run(model, f"{store.url}/out")
    assert "publishing beside or in the output is left over: it could not be deleted" in done.warnings
    assert CLAIM in store.keys("out/")
    assert verify(f"{store.url}/out").ok
    run(model, f"{store.url}/out")  # the same command completes this too
    run(model, tmp_path / "local")
    assert sent(store) == contents(tmp_path / "local")


def test_a_process_that_lacks_obstore_says_how_to_get_it(model: Path, tmp_path: Path) -> None:
    command = ("-m", "noisytune_cli", "perturb", model, "-o", "s3://bucket/out")
    done = run_without(("obstore",), tmp_path, *command)
    assert done.returncode == 6
    assert done.stderr.endswith(" Install it: pip install '.[remote]' in a clone of noisytune.\n")
    assert done.stderr.count("\n") == 1


def _command(source: Path, out: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "noisytune_cli", *options, "perturb", str(source), "-o", out]


def test_a_signal_has_the_parts_forgotten(
    store: ObjectStore, tmp_path: Path, in_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "in/model.safetensors", {"a.weight": weights("F32", 3000, 2500)})
    monkeypatch.setattr("noisytune_cli.checkpoint.store._AT_A_TIME", 1)
    monkeypatch.setattr("noisytune_cli.checkpoint.remote._GRACE", 20.0)

    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        time.sleep(0.5)

    store.faults.append(Fault("PUT", "partNumber=1", before=interrupt))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(path.parent, f"{store.url}/out")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert store.keys() == {f"out/{CLAIM}"}
    assert store.uploads() == []


def test_a_signal_is_not_kept_waiting(store: ObjectStore, tmp_path: Path) -> None:
    reached, go_on = threading.Event(), threading.Event()
    save(tmp_path / "in/model.safetensors", {"a.weight": weights("F32", 1500, 1800)})

    def stall() -> None:
        reached.set()
        go_on.wait(60)

    store.faults.append(Fault("PUT", "partNumber=1", before=stall))
    started = subprocess.Popen(
        _command(tmp_path / "in", f"{store.url}/out"), stderr=subprocess.PIPE, text=True
    )
    assert reached.wait(60)
    started.send_signal(signal.SIGTERM)
    _, told = started.communicate(timeout=30)
    go_on.set()
    assert started.returncode == 128 + signal.SIGTERM
    assert "is not complete: the same command completes it" in told
    assert store.keys() == {f"out/{CLAIM}"}


def test_what_a_store_says_is_not_repeated(store: ObjectStore, model: Path) -> None:
    store.faults.append(Fault("PUT", "config.json", status=403, body=error("AccessDenied")))
    command = [
        sys.executable,
        "-m",
        "noisytune_cli",
        "--debug",
        "perturb",
        str(model),
        "-o",
        f"{store.url}/out",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 6
    assert "access is denied (the store answered 403 AccessDenied)" in done.stderr
    assert SECRET not in done.stderr + done.stdout

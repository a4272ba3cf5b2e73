"""What was changed in an output since noisytune wrote it is replaced only where the user insists."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save, save_sharded, weights
from chunked import save_chunked
from runs import run
from typer.testing import CliRunner

from noisytune_cli.cli.app import app
from noisytune_cli.commands import plan as plan_module
from noisytune_cli.commands import replaced
from noisytune_cli.commands.average import average
from noisytune_cli.commands.finish import finish
from noisytune_cli.commands.perturb import Request, perturb, plan_perturb
from noisytune_cli.commands.plan import plan_job
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.commands.work import work
from noisytune_cli.errors import InputInvalid, OutputUnsafe
from noisytune_cli.output.overwrite import Seen, look_at
from noisytune_cli.output.publish import Publication
from noisytune_cli.records import Combination, NoiseSpec

WEIGHTS = "model-00002-of-00002.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = save_sharded(
        tmp_path / "in", {"a": weights("F32", 9, 9)}, {"b": weights("BF16", 5, 5), "c": weights("F32", 0)}
    )
    (root / "README.md").write_text("of the base")
    (root / "sub").mkdir()
    (root / "sub" / "vocab.txt").write_text("a b c")
    return root


def flip(path: Path) -> None:
    """Change the last byte where it is."""
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def flip_and_set_times_back(path: Path) -> None:
    status = path.stat()
    flip(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def put_an_older_one_there(path: Path) -> None:
    """Rename a file of the same size and of an older time to that name."""
    other = path.parent.parent / "other"
    shutil.copyfile(path, other)
    flip(other)
    os.utime(other, (1, 1))
    os.rename(other, path)


@pytest.mark.parametrize("name", ["README.md", "sub/vocab.txt", WEIGHTS, "model.safetensors.index.json"])
@pytest.mark.parametrize("change", [flip, flip_and_set_times_back, put_an_older_one_there])
def test_a_changed_output_is_replaced_only_on_demand(
    change: Callable[[Path], None],
    name: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = run(source, tmp_path / "out").output
    manifest = shutil.copy(out / "noisytune.json", tmp_path)
    change(out / name)
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        patched.setattr(Publication, "__init__", None)  # refused before there is one
        for again in (
            lambda: run(source, out, overwrite=True),
            lambda: plan_perturb(
                Request(str(source), NoiseSpec()), [Combination(0.15, 0, str(out))], overwrite=True
            ),
            lambda: average([str(source), str(source)], str(out), overwrite=True),
            lambda: replay(str(manifest), str(out), base=str(source), overwrite=True),
        ):
            with pytest.raises(OutputUnsafe, match=f"{name} is not as its .*--overwrite-changed"):
                again()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept
    run(source, out, overwrite_changed=True)
    assert verify(str(out)).ok


def perturb_in_shares(source: Path, out: Path) -> None:
    plan_job(Request(str(source), NoiseSpec()), str(out), [Combination(0.15, 0, str(out))], overwrite=True)
    work(str(out))
    finish(str(out))


VERBS: dict[str, Callable[[Path, Path], object]] = {
    "perturb": lambda source, out: run(source, out, overwrite=True),
    "average": lambda source, out: average([str(source), str(source)], str(out), overwrite=True),
    "replay": lambda source, out: replay(
        str(source.parent / "noisytune.json"), str(out), base=str(source), overwrite=True
    ),
    "finish": perturb_in_shares,
}


def write_when_verified(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a file as soon as an old output was held against its manifest."""
    what_changed = replaced._what_changed

    def and_then_write(*arguments: Any) -> str | None:
        answer = what_changed(*arguments)
        path.write_text("mine")
        return answer

    monkeypatch.setattr(replaced, "_what_changed", and_then_write)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["README.md", "notes.txt"])
def test_what_changes_while_an_old_output_is_verified_is_kept(
    name: str, verb: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(source, tmp_path / "out").output
    shutil.copy(out / "noisytune.json", tmp_path)
    (out / "sub" / "vocab.txt").touch()
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    write_when_verified(out / name, monkeypatch)
    monkeypatch.setattr(plan_module, "check_outputs", lambda *_, **__: {})  # asked when it is finished
    with pytest.raises(OutputUnsafe, match="the output has changed"):
        VERBS[verb](source, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept | {
        out / name: b"mine"
    }


@pytest.mark.parametrize("name", ["out.safetensors", "out.safetensors.noisytune.json"])
def test_a_file_that_changes_while_it_is_verified_is_kept(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.safetensors"
    run(source / WEIGHTS, out)
    out.touch()
    write_when_verified(tmp_path / name, monkeypatch)
    with pytest.raises(OutputUnsafe, match="the output has changed"):
        run(source / WEIGHTS, out, overwrite=True)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("insists", [False, True])
def test_what_comes_between_its_check_and_the_look_is_kept(
    insists: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(source, tmp_path / "out").output

    def write_and_look(output: Path) -> Seen:
        (output / "notes.txt").write_text("mine")
        return look_at(output)

    monkeypatch.setattr(replaced, "look_at", write_and_look)
    with pytest.raises(OutputUnsafe, match="go notes"):
        run(source, out, overwrite=True, overwrite_changed=insists)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_file_that_was_trained_on(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {"w": weights("F32", 9)})
    out = tmp_path / "out.safetensors"
    run(source, out)
    save(out, {"w": weights("F32", 9, seed=3)})
    trained = out.read_bytes()
    with pytest.raises(OutputUnsafe, match="--overwrite-changed"):
        run(source, out, overwrite=True)
    assert out.read_bytes() == trained
    arguments = ["perturb", str(source), "-o", str(out), "--overwrite-changed"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert verify(str(out)).ok


def test_an_average_that_was_trained_on(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    average([str(source), str(source)], str(out))
    flip(out / WEIGHTS)
    with pytest.raises(OutputUnsafe, match=f"{WEIGHTS} .*--overwrite-changed"):
        average([str(source), str(source)], str(out), overwrite=True)
    average([str(source), str(source)], str(out), overwrite_changed=True)
    assert verify(str(out)).ok


def test_what_is_as_it_was_is_replaced_though_it_is_younger_or_lacks_a_file(
    source: Path, tmp_path: Path
) -> None:
    run(source, tmp_path / "first")
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "first", out)
    (out / "README.md").touch()
    (out / "sub" / "vocab.txt").unlink()
    assert run(source, out, overwrite=True).warnings == ()
    assert (out / "sub" / "vocab.txt").exists()


def test_nothing_is_read_of_an_output_that_is_as_it_was_left(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def let_it_age(files: list[Path], manifest: Path) -> None:
        """As if the clock had moved between the files and the manifest, whose ctime is the last."""
        for path in files:
            os.utime(path, ns=(0, manifest.stat().st_mtime_ns - 10**9))
        os.utime(manifest, ns=(0, manifest.stat().st_mtime_ns + 10**9))

    monkeypatch.setattr(replaced, "_what_changed", None)
    out, single = tmp_path / "out", tmp_path / "out.safetensors"
    for noise in (NoiseSpec(), NoiseSpec(seed=1)):
        run(source, out, noise, overwrite=True)
        let_it_age([p for p in out.rglob("*") if p.is_file()], out / "noisytune.json")
    for noise in (NoiseSpec(), NoiseSpec(seed=1)):
        run(source / WEIGHTS, single, noise, overwrite=True)
        let_it_age([single], tmp_path / "out.safetensors.noisytune.json")


def test_what_is_decided_in_another_way_is_not_what_was_made(tmp_path: Path) -> None:
    made = {
        "bn.running_mean": weights("F32", 8),
        "bn.running_var": weights("F32", 8, centre=1.0),
        "bn.weight": weights("F32", 8, seed=1),
    }
    request = Request(str(save(tmp_path / "model.safetensors", made)), NoiseSpec())
    plan = plan_perturb(request).plan
    receipts = perturb(request, str(tmp_path / "out.safetensors")).manifest.receipts
    assert [receipt.reason for receipt in receipts] == ["buffer", "buffer", None]
    assert replaced._is_of(receipts, plan)
    first, *rest = plan.steps
    noised = replace(first, action="perturb", reason=None, told_by=None)
    assert not replaced._is_of(receipts, replace(plan, steps=(noised, *rest)))
    assert not replaced._is_of(receipts[1:], plan)
    kept = replace(plan.steps[2], action="copy", reason="buffer")
    assert not replaced._is_of(receipts, replace(plan, steps=(first, rest[0], kept)))


def test_what_was_divided_in_another_way_is_not_kept(tmp_path: Path) -> None:
    source = save(tmp_path / "model.safetensors", {"w": weights("F32", 8, 8), "v": weights("F32", 4)})
    out = tmp_path / "out.safetensors"

    def divided(by: str) -> NoiseSpec:
        return NoiseSpec(granularity="matrix", splits=(("w", by),))

    run(source, out, divided("0:/2"))
    assert run(source, out, divided("0:/2"), skip_existing=True).skipped
    for other in (divided("0:/4"), NoiseSpec(granularity="matrix")):
        with pytest.raises(OutputUnsafe, match="exists"):
            run(source, out, other, skip_existing=True)


def put_model(folder: Path, seed: int) -> Path:
    """Save a folder with weights and a file beside them, all older than any output."""
    folder.mkdir()
    save(folder / "model.safetensors", {"w": weights("F32", 8, 8, seed=seed)})
    (folder / "config.json").write_text("{}")
    for path in (*folder.iterdir(), folder):
        os.utime(path, (1, 1))
    return folder


@pytest.mark.parametrize("recipe", [False, True])
@pytest.mark.parametrize("by", ["folder", "link", "link to a link", "linked file"])
def test_another_source_of_that_name_is_not_what_was_made(by: str, recipe: bool, tmp_path: Path) -> None:
    """What a name leads to by now may be as old as it likes."""
    first, second = put_model(tmp_path / "first", 1), put_model(tmp_path / "second", 2)
    source = named = tmp_path / "model"
    if by == "folder":
        first.rename(source)
    elif by == "link to a link":
        source.symlink_to("now/model")
        (tmp_path / "now").mkdir()
        named = tmp_path / "now" / "model"
    elif by == "linked file":
        source, named = tmp_path / "model.safetensors", tmp_path / "now.safetensors"
        source.symlink_to("now.safetensors")
        first, second = first / "model.safetensors", second / "model.safetensors"
    if by != "folder":
        named.symlink_to(first)
    out = tmp_path / ("out.json" if recipe else "out.safetensors" if by == "linked file" else "out")
    run(source, out, recipe_only=recipe)
    assert run(source, out, recipe_only=recipe, skip_existing=True).skipped
    if by == "folder":
        source.rename(tmp_path / "old")
        second.rename(source)
    else:
        named.unlink()
        named.symlink_to(second)
    with pytest.raises(OutputUnsafe, match="exists"):
        run(source, out, recipe_only=recipe, skip_existing=True)
    if by == "folder":
        source.rename(second)
        (tmp_path / "old").rename(source)
    else:
        named.unlink()
        named.symlink_to(first)
    assert run(source, out, recipe_only=recipe, skip_existing=True).skipped  # read, and found to be the same


def test_chunks_that_changed_are_not_what_was_made(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    source = save_chunked(tmp_path / "in", {("model", "w"): torch.randn(64, 64)})
    out = tmp_path / "out"
    run(source, out)
    assert run(source, out, skip_existing=True).skipped
    chunks = source / "__0_0.distcp"
    content = chunks.read_bytes()
    at = content.index(torch.load(source / "__0_0.distcp").numpy().tobytes())
    chunks.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(OutputUnsafe, match="exists"):
        run(source, out, skip_existing=True)


def test_what_strict_refuses_is_not_kept(tmp_path: Path) -> None:
    tensors = {"w": weights("F32", 30, 20), "policy.mean": weights("F32", 14)}
    source, out = save(tmp_path / "in.safetensors", tensors), str(tmp_path / "out.safetensors")
    perturb(Request(str(source), NoiseSpec()), out)
    strict = Request(str(source), NoiseSpec(), strict=True)
    with pytest.raises(InputInvalid, match="in doubt"):
        perturb(strict, out, skip_existing=True)
    excluded = replace(strict, noise=NoiseSpec(exclude=("policy.mean",)))
    perturb(excluded, out, overwrite=True)
    assert perturb(excluded, out, skip_existing=True).skipped


def test_finish_says_what_can_be_done_without_options(source: Path, tmp_path: Path) -> None:
    out = run(source, tmp_path / "out").output
    plan_job(Request(str(source), NoiseSpec()), str(out), [Combination(0.15, 0, str(out))], overwrite=True)
    work(str(out))
    (out / "README.md").write_text("mine")
    with pytest.raises(OutputUnsafe, match=r"was changed since .* Move it away, and finish again"):
        finish(str(out))
    out.rename(tmp_path / "kept")
    finish(str(out))


def test_a_manifest_that_was_reformatted_is_not_what_would_be_written(source: Path, tmp_path: Path) -> None:
    out = run(source, tmp_path / "out").output
    request = Request(str(source), NoiseSpec())
    assert perturb(request, str(out), skip_existing=True).skipped
    manifest = out / "noisytune.json"
    manifest.write_text(manifest.read_text().replace("\n", "\r\n"))
    with pytest.raises(OutputUnsafe, match="the output exists"):
        perturb(request, str(out), skip_existing=True)

"""Several outputs of one run: each as a single run makes it, all or none before the first commit."""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Tensor, numbers, save, save_sharded, weights
from chunked import save_chunked
from pickles import saved
from places import old_manifest
from runs import run

from noisytune_cli.cli.parse import combine
from noisytune_cli.commands import perturb as command
from noisytune_cli.commands.perturb import Perturbed, Request, perturb, perturb_each
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.engine import walk as walk_module
from noisytune_cli.engine.walk import Walk
from noisytune_cli.errors import (
    InputInvalid,
    OutputUnsafe,
    ResourceExhausted,
    Stopped,
)
from noisytune_cli.output import destination as output_module
from noisytune_cli.output import publish as publish_module
from noisytune_cli.output.space import needed_bytes
from noisytune_cli.records import Combination, Conversion, NoiseSpec

TENSORS = {
    "transformer.wte.weight": weights("F32", 30, 8, seed=1),
    "transformer.h.0.attn.c_attn.weight": weights("BF16", 8, 24, seed=3),
    "transformer.h.0.attn.c_attn.bias": weights("F64", 24, seed=4),
    "transformer.ln_f.weight": numbers("F32", *[1.0] * 8),
    "transformer.ln_f.bias": numbers("F16", 1.0, math.nan),
    "ids": Tensor("I64", np.arange(8)),
    "lm_head.weight": weights("F32", 30, 8, seed=1),
}


def file(root: Path) -> Path:
    return save(root / "in.safetensors", TENSORS, {"format": "pt"})


def folder(root: Path) -> Path:
    names = list(TENSORS)
    shards = [{name: TENSORS[name] for name in part} for part in (names[:4], names[4:])]
    save_sharded(root / "in", *shards)
    (root / "in/config.json").write_text('{"model_type": "gpt2"}')
    (root / "in/sub").mkdir()
    (root / "in/sub/vocab.txt").write_text("a\nb\n")
    return root / "in"


def pickle(root: Path) -> Path:
    torch.manual_seed(0)
    table = torch.randn(30, 8)
    path = root / "in.bin"
    path.write_bytes(
        saved({"wte": table, "head": table, "turned": torch.randn(9, 7).t(), "n": torch.ones(3)})
    )
    return path


SOURCES = {"file": file, "folder": folder, "pickle": pickle}


def contents(root: Path) -> dict[str, bytes]:
    return {os.fspath(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def _needed_bytes(source: Path) -> int:
    request = Request(str(source), NoiseSpec())
    with request.open() as opened:
        return needed_bytes(opened, command.plan_perturb(request).plan)


def run_each(
    source: Path,
    out: str,
    noise: NoiseSpec | None = None,
    lam: str = "0.1",
    seed: str = "0-1",
    **options: Any,
) -> tuple[Perturbed, ...]:
    wanted = combine(out, lam=lam, noise_std=None, seed=seed, default=0.15)
    return perturb_each(Request(str(source), noise or NoiseSpec()), wanted, **options)


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("buffer", [0, 1 << 20])
@pytest.mark.parametrize("scope", ["matrix", "global"])
@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
def test_each_output_is_that_of_a_single_run(
    make: Callable[[Path], Path],
    buffer: int,
    scope: Any,
    distribution: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "Walk", partial(Walk, tile_bytes=96))
    monkeypatch.setattr(walk_module, "_LARGEST_KEPT", buffer)
    source = make(tmp_path)
    noise = NoiseSpec(scope=scope, distribution=distribution)
    results = run_each(
        source, f"{tmp_path}/many/{{lambda}}-{{seed}}/out", noise, "0.1,0,0.2", "5,9", threads=2
    )
    for lam in (0.1, 0, 0.2):
        for seed in (5, 9):
            single = NoiseSpec(lam=lam, seed=seed, scope=scope, distribution=distribution)
            run(source, tmp_path / f"single/{lam}-{seed}/out", single)
    found = contents(tmp_path / "many")
    assert found == contents(tmp_path / "single")
    assert len({content for name, content in found.items() if name.endswith("noisytune.json")}) == 6
    assert [result.output.parent.name for result in results] == [
        f"{lam}-{seed}" for lam in ("0.1", "0", "0.2") for seed in (5, 9)
    ]
    assert verify(str(results[0].output), base=str(source)).ok


@pytest.mark.parametrize(
    ("make", "conversion"),
    [
        (folder, Conversion(dtype="F32")),
        (file, Conversion(dtype="BF16")),
        (pickle, Conversion(dtype="F64", format="safetensors")),
    ],
)
def test_each_converted_output_and_recipe_is_that_of_a_single_run(
    make: Callable[[Path], Path], conversion: Conversion, tmp_path: Path
) -> None:
    source = make(tmp_path)
    wanted = partial(combine, lam="0.1,0", noise_std=None, seed="5,6", default=0.15)
    request = Request(str(source), NoiseSpec(), conversion)
    perturb_each(request, wanted(f"{tmp_path}/many/{{lambda}}-{{seed}}/out"))
    perturb_each(request, wanted(f"{tmp_path}/recipes/{{lambda}}-{{seed}}/r.json"), recipe_only=True)
    for lam, name in ((0.1, "0.1"), (0.0, "0")):
        for seed in (5, 6):
            single = Request(str(source), NoiseSpec(lam=lam, seed=seed), conversion)
            one = perturb(single, f"{tmp_path}/single/{name}-{seed}/out")
            recipe = tmp_path / f"recipes/{name}-{seed}/r.json"
            assert recipe.read_bytes() == one.manifest_path.read_bytes()
    assert contents(tmp_path / "many") == contents(tmp_path / "single")


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_each_output_with_a_std_for_each_matrix_is_that_of_a_single_run(scope: Any, tmp_path: Path) -> None:
    source = folder(tmp_path)
    noise = NoiseSpec(scope=scope, granularity="matrix", splits=(("*c_attn*", "-1:/3"),))
    results = run_each(source, f"{tmp_path}/many/{{lambda}}-{{seed}}", noise, "0.1,0", "5,6")
    for lam, name in ((0.1, "0.1"), (0.0, "0")):
        for seed in (5, 6):
            run(source, tmp_path / f"single/{name}-{seed}", replace(noise, lam=lam, seed=seed))
    assert contents(tmp_path / "many") == contents(tmp_path / "single")
    parts = [len(receipt.parts) for receipt in results[0].manifest.receipts]
    assert sorted(parts)[-2:] == [3, 3]


def test_space_is_asked_for_all_outputs_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = file(tmp_path)

    class Disk:
        f_frsize, f_files = 1, 0
        f_bavail = 3 * _needed_bytes(source) - 1

    monkeypatch.setattr(output_module.os, "statvfs", lambda path: Disk)
    with pytest.raises(ResourceExhausted, match=r"with 2 more outputs it needs .* nothing was written"):
        run_each(source, f"{tmp_path}/out-{{seed}}", seed="0-2")
    assert os.listdir(tmp_path) == [source.name]
    assert len(run_each(source, f"{tmp_path}/out-{{seed}}", seed="0-1")) == 2


def test_inodes_are_asked_for_all_outputs_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = file(tmp_path)

    class Disk:
        f_frsize, f_bavail, f_files, f_favail = 4096, 1 << 30, 100, 5

    monkeypatch.setattr(output_module.os, "statvfs", lambda path: Disk)
    with pytest.raises(ResourceExhausted, match="6 files and 5 more"):
        run_each(source, f"{tmp_path}/out-{{seed}}", seed="0-2")


def test_open_files_are_asked_for_all_outputs_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, limits = file(tmp_path), []
    monkeypatch.setattr(resource, "setrlimit", lambda what, limit: limits.append(limit))
    monkeypatch.setattr(resource, "getrlimit", lambda what: (10, 200))
    run_each(source, f"{tmp_path}/out-{{seed}}", seed="0-2")
    ((soft, hard),) = limits
    assert (3 * 2 < soft < 200, hard) == (True, 200)
    with pytest.raises(ResourceExhausted, match="shorter lists"):
        run_each(source, f"{tmp_path}/other-{{seed}}", seed="0-99")


def test_each_file_of_a_chunked_checkpoint_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, limits = save_chunked(tmp_path / "in", {("w",): torch.randn(4, 4)}, files=4), []

    class Disk:
        f_frsize, f_bavail, f_files, f_favail = 4096, 1 << 30, 100, 17

    monkeypatch.setattr(resource, "setrlimit", lambda what, limit: limits.append(limit))
    monkeypatch.setattr(resource, "getrlimit", lambda what: (10, 1000))
    monkeypatch.setattr(output_module.os, "statvfs", lambda path: Disk)
    with pytest.raises(ResourceExhausted, match="18 files and 17 more"):
        run_each(source, f"{tmp_path}/out-{{seed}}", seed="0-2")
    assert len(run_each(source, f"{tmp_path}/out-{{seed}}", seed="0-1")) == 2
    # `.metadata` and four files are open for the source, and with the manifest for each output.
    assert limits == [(64 + 5 + 2 * 6, 1000)]


def test_recipes_hold_no_weight_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, limits = save_chunked(tmp_path / "in", {("w",): torch.randn(4, 4)}, files=4), []
    monkeypatch.setattr(resource, "setrlimit", lambda what, limit: limits.append(limit))
    monkeypatch.setattr(resource, "getrlimit", lambda what: (10, 1000))
    assert len(run_each(source, f"{tmp_path}/r{{seed}}.json", seed="0-9", recipe_only=True)) == 10
    assert limits == [(64 + 5 + 10, 1000)]


def test_room_for_a_manifest_of_many_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "in.safetensors", {"w": weights("F32", 400, 4)})
    noise = NoiseSpec(granularity="matrix", splits=(("w", "0:/200"),))
    (full,) = run_each(source, f"{tmp_path}/full.json", noise, seed="0", recipe_only=True)

    class Disk:
        f_frsize, f_bavail, f_files = 1, full.manifest_path.stat().st_size, 0

    monkeypatch.setattr(output_module.os, "statvfs", lambda path: Disk)
    monkeypatch.setattr(Disk, "f_bavail", Disk.f_bavail - 1)
    with pytest.raises(ResourceExhausted, match="nothing was written"):
        run_each(source, f"{tmp_path}/out.json", noise, seed="0", recipe_only=True)


@pytest.mark.parametrize("dtype", [None, "F16"])
def test_says_that_what_is_not_finite_has_no_noise(dtype: str | None, tmp_path: Path) -> None:
    conversion = None if dtype is None else Conversion(dtype=dtype)
    request = Request(str(file(tmp_path)), NoiseSpec(), conversion)
    done = perturb(request, str(tmp_path / "out.safetensors"))
    assert done.warnings == (
        "transformer.ln_f.bias: left without noise, because of values that are NaN or infinite",
    )


@pytest.mark.parametrize("taken", [0, 2])
def test_one_that_exists_stops_all(taken: int, tmp_path: Path) -> None:
    source = file(tmp_path)
    (tmp_path / f"out-{taken}").write_bytes(source.read_bytes())
    before = contents(tmp_path)
    with pytest.raises(OutputUnsafe, match="exists"):
        run_each(source, f"{tmp_path}/out-{{seed}}", seed="0-2")
    assert contents(tmp_path) == before
    run_each(source, f"{tmp_path}/out-{{seed}}", seed="0-2", overwrite=True)
    assert (tmp_path / f"out-{taken}").read_bytes() != source.read_bytes()


def test_outputs_that_are_one_by_a_link(tmp_path: Path) -> None:
    source = folder(tmp_path)
    (tmp_path / "s0").mkdir()
    (tmp_path / "s1").symlink_to("s0")
    with pytest.raises(OutputUnsafe, match="two outputs"):
        run_each(source, f"{tmp_path}/s{{seed}}/out")
    (tmp_path / "s2").symlink_to("s0/out")
    with pytest.raises(OutputUnsafe, match="another output of this run"):
        run_each(source, f"{tmp_path}/s{{seed}}/out", seed="0,2")
    assert os.listdir(tmp_path / "s0") == []


def failing_at(monkeypatch: pytest.MonkeyPatch, output: str, error: Callable[[], BaseException]) -> None:
    """Let the commit of the output of this name fail as it is put in place."""
    put, fill, rename = (
        getattr(publish_module, name) for name in ("rename_file", "rename_any", "rename_directory")
    )

    def guarded(real: Callable[[Path, Path], None], source: Path, target: Path) -> None:
        if target.name == output:
            raise error()
        real(source, target)

    for name, real in (("rename_file", put), ("rename_any", fill), ("rename_directory", rename)):
        monkeypatch.setattr(publish_module, name, partial(guarded, real))


@pytest.mark.parametrize("make", [file, folder])
def test_a_failure_in_the_middle_leaves_complete_outputs_and_says_which(
    make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path)
    failing_at(monkeypatch, "out-2", lambda: OSError(5, "Input/output error"))
    with pytest.raises(ResourceExhausted) as caught:
        run_each(source, f"{tmp_path}/deep/out-{{seed}}", seed="0-3")
    line = caught.value.line()
    assert "out-0, out-1 are published, out-2, out-3 are not" in line
    assert "nothing was published" not in line
    left = {name for name in os.listdir(tmp_path / "deep") if not name.endswith(".json")}
    assert left == {"out-0", "out-1"}
    for name in left:
        assert verify(str(tmp_path / "deep" / name), base=str(source)).ok


@pytest.mark.parametrize("make", [file, folder])
def test_a_failure_before_the_first_commit_leaves_nothing(
    make: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path)
    failing_at(monkeypatch, "out-0", lambda: OSError(5, "Input/output error"))
    with pytest.raises(ResourceExhausted, match="nothing was published"):
        run_each(source, f"{tmp_path}/deep/out-{{seed}}", seed="0-3")
    assert os.listdir(tmp_path) == [source.name]


@pytest.mark.parametrize(
    ("after", "left"),
    [
        ("", None),
        ("out-1", "out-0, out-1 are published, out-2 is not"),
        ("out-2", "out-0, out-1, out-2 are published"),
    ],
)
def test_a_signal_in_the_middle_leaves_complete_outputs_and_says_which(
    after: str, left: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path)
    commit = publish_module.Publication.commit

    def stopped_after(publication: publish_module.Publication) -> Path:
        if not after:
            raise Stopped(signal.SIGINT)
        path = commit(publication)
        if publication.output.name == after:
            raise Stopped(signal.SIGINT)  # as a signal held back meanwhile is
        return path

    monkeypatch.setattr(publish_module.Publication, "commit", stopped_after)
    with pytest.raises(Stopped) as caught:
        run_each(source, f"{tmp_path}/deep/out-{{seed}}", seed="0-2")
    assert caught.value.left == left
    there = sorted(os.listdir(tmp_path / "deep")) if after else []
    assert there == [f"out-{i}" for i in range(int(after[-1:] or -1) + 1)]


#: Runs the command line, and asks it to stop in the middle of the second commit.
_STOPPED_IN_THE_MIDDLE = """
import os, signal
from noisytune_cli.output import publish
rename = publish.rename_directory
def rename_and_ask(source, target):
    rename(source, target)
    if target.name == "out-1":
        os.kill(os.getpid(), signal.SIGINT)
publish.rename_directory = rename_and_ask
from noisytune_cli.__main__ import main
main()
"""


def test_an_interrupted_process_says_what_it_leaves(tmp_path: Path) -> None:
    arguments = ["perturb", str(folder(tmp_path)), "-o", f"{tmp_path}/deep/out-{{seed}}", "--seed", "0-3"]
    done = subprocess.run(
        [sys.executable, "-c", _STOPPED_IN_THE_MIDDLE, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130
    assert done.stderr == "noisytune: stopped: out-0, out-1 are published, out-2, out-3 are not\n"
    assert sorted(os.listdir(tmp_path / "deep")) == ["out-0", "out-1"]


def test_many_names_are_told_by_the_first_and_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = file(tmp_path)
    failing_at(monkeypatch, "out-60", lambda: OSError(5, "Input/output error"))
    with pytest.raises(ResourceExhausted) as caught:
        run_each(source, f"{tmp_path}/out-{{seed}}", seed="0-99")
    assert "out-0 … out-59 (60) are published, out-60 … out-99 (40) are not" in caught.value.line()


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_a_recipe_is_the_manifest_of_a_full_run(
    make: Callable[[Path], Path], scope: Any, tmp_path: Path
) -> None:
    source = make(tmp_path)
    noise = NoiseSpec(scope=scope)
    recipes = run_each(
        source, f"{tmp_path}/recipes/s{{seed}}.noisytune.json", noise, seed="3-4", recipe_only=True
    )
    assert [recipe.output.name for recipe in recipes] == ["s3.noisytune.json", "s4.noisytune.json"]
    full = run_each(source, f"{tmp_path}/full/s{{seed}}", noise, seed="3-4")
    assert contents(tmp_path / "recipes") == {
        f"s{seed}.noisytune.json": one.manifest_path.read_bytes()
        for seed, one in zip((3, 4), full, strict=True)
    }
    for seed, recipe in zip((3, 4), recipes, strict=True):
        replay(str(recipe.output), f"{tmp_path}/again/s{seed}", base=str(source))
    assert contents(tmp_path / "again") == contents(tmp_path / "full")


@pytest.mark.parametrize(
    ("out", "place"),
    [("r.json", "r.json"), ("there", "there/noisytune.json"), ("new/deep/", "new/deep/noisytune.json")],
)
def test_where_a_recipe_goes(out: str, place: str, tmp_path: Path) -> None:
    source = folder(tmp_path)
    (tmp_path / "there").mkdir()
    before = contents(tmp_path)
    one = run(source, f"{tmp_path}/{out}", recipe_only=True)
    assert one.output == one.manifest_path == tmp_path / place
    assert contents(tmp_path).keys() - before.keys() == {place}
    with pytest.raises(OutputUnsafe, match="exists"):
        run(source, f"{tmp_path}/{out}", recipe_only=True)
    old = one.output.read_bytes()
    run(source, f"{tmp_path}/{out}", NoiseSpec(seed=8), recipe_only=True, overwrite=True)
    assert one.output.read_bytes() != old
    assert contents(tmp_path).keys() - before.keys() == {place}


@pytest.mark.parametrize("out", ["in.safetensors", "in.safetensors.noisytune.json", "./", "link", "fifo"])
def test_where_a_recipe_must_not_go(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = file(tmp_path)
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OutputUnsafe):
        run(source, out, recipe_only=True, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_recipe_inside_the_input_folder_is_refused(tmp_path: Path) -> None:
    source = folder(tmp_path)
    for out in (f"{source}/", f"{source}/sub/r.json"):
        with pytest.raises(OutputUnsafe, match="lies in the input"):
            run(source, out, recipe_only=True)


def test_recipes_need_room_for_manifests_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "in.safetensors", {"w": weights("F32", 1000, 100)})

    class Disk:
        f_frsize, f_bavail, f_files = 1, 50_000, 0

    monkeypatch.setattr(output_module.os, "statvfs", lambda path: Disk)
    assert len(run_each(source, f"{tmp_path}/r{{seed}}.json", seed="0-4", recipe_only=True)) == 5
    with pytest.raises(ResourceExhausted):
        run_each(source, f"{tmp_path}/q{{seed}}.json", seed="0-99", recipe_only=True)


def test_a_recipe_whose_commit_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = file(tmp_path)
    (tmp_path / "r.json").write_bytes(old_manifest("old.safetensors"))
    before = contents(tmp_path)
    real = publish_module.sync_directory

    def fail(path: Path) -> None:
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        real(path)

    monkeypatch.setattr(publish_module, "sync_directory", fail)
    for out, overwrite in (("r.json", True), ("new.json", False)):
        with pytest.raises(ResourceExhausted, match="nothing was published"):
            run(source, tmp_path / out, recipe_only=True, overwrite=overwrite)
        assert contents(tmp_path) == before


def test_nothing_to_perturb_stops_all(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {"c": numbers("F32", 1.0, 1.0)})
    with pytest.raises(InputInvalid, match="nothing to perturb"):
        run_each(source, f"{tmp_path}/out-{{lambda}}", lam="0,0.1", seed="0")
    assert os.listdir(tmp_path) == [source.name]


def test_a_dry_run_of_lists(tmp_path: Path) -> None:
    source = file(tmp_path)
    wanted = combine("o-{lambda}-{seed}", lam="0.1,0", noise_std=None, seed="0-1", default=0.15)
    planned = command.plan_perturb(Request(str(source), NoiseSpec()), wanted)
    assert planned.outs == ("o-0.1-0", "o-0.1-1", "o-0-0", "o-0-1")
    assert [(plan.noise.lam, plan.noise.seed) for plan in planned.plans] == [
        (0.1, 0),
        (0.1, 1),
        (0, 0),
        (0, 1),
    ]
    assert planned.plans[0].steps is planned.plans[1].steps
    assert {step.reason for step in planned.plans[2].steps} == {"lambda-zero", "not-float"}


@pytest.mark.parametrize("lams", [("0", "0.1"), ("0.1", "0")])
def test_what_values_tell_is_told_beside_an_output_without_noise(
    tmp_path: Path, lams: tuple[str, str]
) -> None:
    """A table of frequencies is copied, and a doubtful name warned of, whichever λ comes first."""
    tensors = {
        "w": weights("F32", 30, 20),
        "rope.freqs": numbers("F32", *(10000.0 ** -np.linspace(0, 1, 32))),
        "policy.mean": weights("F32", 14),
    }
    source = save(tmp_path / "in.safetensors", tensors)
    single = perturb(Request(str(source), NoiseSpec(lam=0.1)), str(tmp_path / "single.safetensors"))
    wanted = [Combination(float(lam), 0, str(tmp_path / f"o{lam}.safetensors")) for lam in lams]
    for result in perturb_each(Request(str(source), NoiseSpec()), wanted):
        assert result.warnings == single.warnings != ()
    assert (tmp_path / "o0.1.safetensors").read_bytes() == single.output.read_bytes()
    assert {r.step.tensor.name: r.reason for r in single.manifest.receipts}["rope.freqs"] == "buffer"
    with pytest.raises(InputInvalid, match="in doubt"):
        perturb_each(Request(str(source), NoiseSpec(), strict=True), wanted, overwrite=True)


def test_what_is_computed_is_not_shrunk(tmp_path: Path) -> None:
    tensors = {
        "w": weights("F32", 30, 20),
        "rope.freqs": numbers("F32", *(10000.0 ** -np.linspace(0, 1, 32))),
    }
    source = save(tmp_path / "in.safetensors", tensors)
    noise = NoiseSpec(lam=0.0, kept=0.5)
    result = perturb(Request(str(source), noise), str(tmp_path / "out.safetensors"))
    told = {r.step.tensor.name: (r.action, r.reason) for r in result.manifest.receipts}
    assert told == {"w": ("shrink", "lambda-zero"), "rope.freqs": ("copy", "buffer")}

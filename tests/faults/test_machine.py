"""Faults of the machine around a run: file systems, limits, streams, other processes, the power."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import mounts
import power
import pytest
import strace
from processes import COMMAND, finish, start
from scenarios import Expected, Scenario, weights
from warm import Warm

pytestmark = pytest.mark.alone


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights({"w": ("F32", 50_000), "v": ("BF16", 3000)}))
    return path


def nothing_but(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_full_stdout(source: Path, tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        code, said = finish(start(["inspect", str(source), "--format", "json"], stdout=full))
    assert code == 6
    assert len(said.splitlines()) == 1
    assert "No space left" in said


def test_closed_stdout(source: Path) -> None:
    code, said = finish(start(["inspect", str(source), "-q"], setup=lambda: os.close(1)))
    assert code == 6
    assert len(said.splitlines()) == 1


def test_a_reader_that_goes_away(source: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code, said = finish(start(["inspect", str(source), "-q"], stdout=writing))
    os.close(writing)
    assert (code, said) == (141, "")


@pytest.mark.parametrize("options", ["size=64k", "size=1m,nr_inodes=2"])
def test_a_full_file_system(options: str, source: Path, tmp_path: Path) -> None:
    try:
        with mounts.tmpfs(tmp_path / "small", options) as small:
            code, said = finish(start(["perturb", str(source), "-o", str(small / "out"), "-q"]))
            assert code == 6, said
            assert len(said.splitlines()) == 1
            assert nothing_but(small)
    except mounts.Unavailable as why:
        pytest.skip(str(why))


def test_a_read_only_file_system(source: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    try:
        with mounts.read_only(tmp_path / "place") as place:
            code, said = finish(start(["perturb", str(source), "-o", str(place / "out"), "-q"]))
    except mounts.Unavailable as why:
        pytest.skip(str(why))
    assert code == 6
    assert "Read-only" in said
    assert nothing_but(tmp_path / "place")


@pytest.mark.parametrize(
    "limit", ["--fsize=1000", "--fsize=100000", "--nofile=16", "--nofile=10", "--as=900000000"]
)
def test_a_limit(limit: str, source: Path, tmp_path: Path) -> None:
    if shutil.which("prlimit") is None:
        pytest.skip("there is no prlimit")
    (tmp_path / "place").mkdir()
    out = tmp_path / "place" / "out"
    code, said = finish(start(["perturb", str(source), "-o", str(out), "-q"], before=["prlimit", limit]))
    assert "Traceback" not in said
    if code == 0:
        assert nothing_but(tmp_path / "place", "out", "out.noisytune.json")
    else:
        assert code == 6, said
        assert len(said.splitlines()) == 1
        assert nothing_but(tmp_path / "place")


def _set_umask(mask: int) -> None:
    os.umask(mask)


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o000])
def test_the_modes_are_those_of_the_umask(mask: int, source: Path, tmp_path: Path) -> None:
    source.chmod(0o666)  # an output is never more widely readable than its source
    out = tmp_path / "out"
    code, _ = finish(start(["perturb", str(source), "-o", str(out), "-q"], setup=lambda: _set_umask(mask)))
    assert code == 0
    for path in (out, tmp_path / "out.noisytune.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_eight_writers_of_one_output(source: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    runs = [start(["perturb", str(source), "-o", str(place / "out"), "-q"]) for _ in range(8)]
    ended = [finish(run) for run in runs]
    assert sorted(code for code, _ in ended) == [0, *[5] * 7], ended
    assert nothing_but(place, "out", "out.noisytune.json")


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"8 others")


def _replace(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy(path, other)
    other.replace(path)


@pytest.mark.parametrize("change", [_truncate, _overwrite, _replace, os.unlink])
def test_an_input_that_changes_while_it_is_read(
    change: Callable[[Path], None], all_scenarios: dict[str, Scenario], warm: Warm, log: Path, tmp_path: Path
) -> None:
    path, place = tmp_path / "model.safetensors", tmp_path / "place"
    shutil.copy(all_scenarios["file"].source, path)
    place.mkdir()
    run = warm.hold(["perturb", str(path), "-o", str(place / "out"), "-q", "--threads", "1"])
    tracer = strace.attach(run, log, ["trace=pwrite64", "inject=pwrite64:delay_exit=700000:when=1"])
    run.release()
    while not any(file.stat().st_size for file in place.glob(".noisytune-*/out")):
        assert not warm.has_answer(0.002), run.wait().stderr
    change(path)
    ended = run.wait()
    tracer.communicate()
    assert ended.code == 8, ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert nothing_but(place)


def test_a_live_run_is_left_alone_through_another_mount(
    all_scenarios: dict[str, Scenario], warm: Warm, log: Path, tmp_path: Path
) -> None:
    source, place = all_scenarios["folder"].source, tmp_path / "place"
    place.mkdir()
    try:
        with mounts.mirror(place, tmp_path / "mirror") as mirror:
            run = warm.hold(["perturb", str(source), "-o", str(place / "out"), "-q", "--threads", "1"])
            tracer = strace.attach(run, log, ["trace=pwrite64", "inject=pwrite64:delay_exit=3000000:when=1"])
            run.release()
            while not (stages := list(place.glob(".noisytune-*"))):
                assert not warm.has_answer(0.002), run.wait().stderr
            code, said = finish(start(["perturb", str(source), "-o", str(mirror / "out"), "-q"]))
            assert code == 5
            assert stages[0].name in said
            assert "was made through another mount" in said
            ended = run.wait()
            tracer.communicate()
            assert ended.code == 0, ended.stderr
            assert nothing_but(place, "out")
            assert (place / "out" / "noisytune.json").stat().st_size
    except mounts.Unavailable as why:
        pytest.skip(str(why))


def test_exit_0_survives_a_power_cut(
    scenario: Scenario, expected: Expected, warm: Warm, tmp_path: Path
) -> None:
    try:
        with mounts.device(tmp_path) as device:
            disk = power.on(tmp_path / "disk", scenario)
            assert power.cut_after_the_end(disk, expected, warm, device) == []
    except mounts.Unavailable as why:
        pytest.skip(str(why))


def test_a_power_cut_leaves_the_old_state_or_the_new(
    scenario: Scenario, expected: Expected, warm: Warm, log: Path, tmp_path: Path
) -> None:
    try:
        with mounts.device(tmp_path) as device:
            disk = power.on(tmp_path / "disk", scenario)
            disk.reset()
            _, calls = strace.trace(warm, disk.argv, log, calls=power.CALLS)
            moments = power.moments(disk, calls)
            assert moments
            for moment in moments:
                assert power.cut_at(disk, expected, warm, log, device, moment) == [], f"cut after {moment}"
    except mounts.Unavailable as why:
        pytest.skip(str(why))


def test_a_disk_comes_back_whoever_keeps_a_namespace(tmp_path: Path) -> None:
    try:
        with mounts.device(tmp_path) as device, subprocess.Popen(["unshare", "-m", "sleep", "2"]):
            time.sleep(0.5)
            device.cut_power()
            device.unmount()
            device.mount()
            (tmp_path / "disk" / "file").write_bytes(b"alive")
    except (mounts.Unavailable, FileNotFoundError) as why:
        pytest.skip(str(why))


def test_names_from_files_are_printed_escaped(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = weights({"\x1b[2J\nOK \u202e": ("F32", 4)})
    path.write_bytes(content[:-1])
    code, said = finish(start(["perturb", str(path), "-o", str(tmp_path / "out"), "-q"]))
    assert code == 3
    assert said.removesuffix("\n").isprintable()
    path.write_bytes(content)
    listed = subprocess.run(
        [*COMMAND, "inspect", str(path), "--format", "table"], capture_output=True, check=True
    ).stdout.decode()
    assert "\x1b" not in listed
    assert "\u202e" not in listed

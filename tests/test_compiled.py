"""Compiled loops: kept, found again without Numba, and never taken from a damaged or foreign cache."""

from __future__ import annotations

import ast
import ctypes
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from noisytune_cli import compiled

Loop = Callable[..., None]


class Cache:
    """A cache of the test's own; `made` counts compilations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
        self.made = 0
        self._patch = monkeypatch
        self.folders = list(folders)
        monkeypatch.setattr(compiled, "_folders", lambda: self.folders)

    def make(self) -> Loop:
        self.made += 1
        from numba.np.numpy_support import carray

        def loop(source, n, factor, out):  # type: ignore[no-untyped-def]
            x, y = carray(source, (n,), np.float64), carray(out, (n,), np.float64)
            for i in range(n):
                y[i] = x[i] * factor

        return loop

    def run(self) -> None:
        """Get the loop as a new process would, and check what it computes."""
        self._patch.setattr(compiled, "_loops", {})
        call = compiled.compile_loop("test/scale", "pidp", self.make)
        x, y = np.arange(5.0), np.zeros(5)
        call(x.ctypes.data, 5, 3.0, y.ctypes.data)
        assert y.tolist() == [0.0, 3.0, 6.0, 9.0, 12.0]

    def objects(self, folder: Path) -> list[Path]:
        return sorted(folder.glob("noisytune-*"))


def private(path: Path) -> Path:
    path.mkdir(mode=0o700)
    return path


def test_an_object_is_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(monkeypatch, private(tmp_path / "c"))
    cache.run()
    cache.run()
    assert cache.made == 1
    (kept,) = cache.objects(tmp_path / "c")
    assert kept.name.startswith("noisytune-test-scale-")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o644


def damage_cut(content: bytes) -> bytes:
    return content[:-7]


def damage_flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def damage_digest(content: bytes) -> bytes:
    return bytes([content[0] ^ 0x80]) + content[1:]


def damage_empty(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_digest, damage_empty])
def test_a_damaged_object_is_compiled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    cache = Cache(monkeypatch, private(tmp_path / "c"))
    cache.run()
    (kept,) = cache.objects(tmp_path / "c")
    kept.write_bytes(damage(kept.read_bytes()))
    cache.run()
    cache.run()
    assert cache.made == 2  # and the third run found it repaired
    assert cache.objects(tmp_path / "c") == [kept]


def test_a_folder_that_cannot_be_written_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = Cache(monkeypatch, tmp_path / "file", tmp_path / "file" / "under", tmp_path / "new")
    cache.run()
    cache.run()
    assert cache.made == 1
    assert len(cache.objects(tmp_path / "new")) == 1
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_without_any_cache_it_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = Cache(monkeypatch, tmp_path / "file" / "under")
    cache.run()
    cache.run()
    assert cache.made == 2


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    cache = Cache(monkeypatch, private(tmp_path / "c"))
    monkeypatch.setattr(compiled.os, "replace", refuse)
    cache.run()
    assert cache.made == 1
    assert cache.objects(tmp_path / "c") == []


def link(folder: Path) -> None:
    private(folder.with_name("target"))
    folder.symlink_to(folder.with_name("target"))


def open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def open_to_group(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o770)


@pytest.mark.parametrize("spoil", [link, open_to_all, open_to_group])
def test_a_folder_that_others_could_fill_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None]
) -> None:
    cache = Cache(monkeypatch, private(tmp_path / "good"))
    cache.run()
    (kept,) = cache.objects(tmp_path / "good")
    spoil(tmp_path / "bad")
    (tmp_path / "bad" / kept.name).write_bytes(kept.read_bytes())
    cache.folders = [tmp_path / "bad"]
    cache.run()
    assert cache.made == 2  # though a whole object lay there


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = private(tmp_path / "c")
    if os.getuid() == 0:
        os.chown(folder, 65534, -1)
    else:
        uid = os.getuid() + 1
        monkeypatch.setattr(compiled.os, "getuid", lambda: uid)
    cache = Cache(monkeypatch, folder)
    cache.run()
    assert cache.objects(folder) == []


def test_the_folders_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    beside = Path(compiled.__file__).parent / "__pycache__"
    temporary = tmp_path / "t" / f"noisytune-cache-{os.getuid()}"
    monkeypatch.setenv("HOME", str(tmp_path / "h"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert compiled._folders() == [beside, tmp_path / "h" / ".cache" / "noisytune", temporary]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert compiled._folders() == [beside, tmp_path / "x" / "noisytune", temporary]
    for variable in ("HOME", "XDG_CACHE_HOME"):  # never from wherever the process happens to run
        monkeypatch.setenv("HOME", "")
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setenv(variable, "relative")
        assert compiled._folders() == [beside, temporary]
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiled._folders() == [beside, temporary]
    assert list(tmp_path.iterdir()) == []  # looking makes no folder


def test_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setenv("HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert compiled._folders() == [Path(compiled.__file__).parent / "__pycache__"]


def test_threads_compile_a_loop_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(monkeypatch, private(tmp_path / "c"))
    monkeypatch.setattr(compiled, "_loops", {})
    loops: list[Loop] = []
    gate = threading.Barrier(6)

    def work() -> None:
        gate.wait()
        loops.append(compiled.compile_loop("test/scale", "pidp", cache.make))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.made == 1
    assert loops == [loops[0]] * 6


def test_arguments_arrive_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cache(monkeypatch, private(tmp_path / "c"))
    monkeypatch.setattr(compiled, "_loops", {})

    def make() -> Loop:
        from numba.np.numpy_support import carray

        def loop(out, i, u, f, d):  # type: ignore[no-untyped-def]
            o = carray(out, (4,), np.float64)
            o[0], o[1], o[2], o[3] = i, u >> np.uint64(32), f, d

        return loop

    out = (ctypes.c_double * 4)()
    compiled.compile_loop("test/letters", "piufd", make)(
        ctypes.addressof(out), -(2**40), 2**64 - 1, 0.5, 1e300
    )
    assert list(out) == [-(2.0**40), 2.0**32 - 1, 0.5, 1e300]


def test_a_loop_that_needs_numbas_runtime_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(monkeypatch, private(tmp_path / "c"))

    def make() -> Loop:
        def loop(n):  # type: ignore[no-untyped-def]
            x = np.empty(n)
            x[:] = 1.0

        return loop

    with pytest.raises(RuntimeError, match="a compiled loop calls"):
        compiled.compile_loop("test/allocates", "i", make)
    assert cache.objects(tmp_path / "c") == []


def test_a_loop_that_raises_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cache(monkeypatch, private(tmp_path / "c"))

    def make() -> Loop:
        def loop(n):  # type: ignore[no-untyped-def]
            if n > 3:
                raise ValueError("too many")

        return loop

    call = compiled.compile_loop("test/raises", "i", make)
    call(3)
    with pytest.raises(RuntimeError, match="status"):
        call(4)


CHILD = """
import sys
from pathlib import Path
from noisytune_cli import compiled
from noisytune_cli.devices.cpu import open_device
compiled._folders = lambda: [Path(sys.argv[1])]
data = bytes(range(48)) * 8
print(open_device("cpu").moments(memoryview(data), "BF16"))
print("numba" in sys.modules, "torch" in sys.modules)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", CHILD, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_share_the_cache(tmp_path: Path) -> None:
    folder = private(tmp_path / "c")
    at_once = [start(folder) for _ in range(2)]
    answers = [child.communicate(timeout=120)[0].splitlines() for child in at_once]
    later = start(folder).communicate(timeout=120)[0].splitlines()
    assert [a[0] for a in answers] == [later[0]] * 2
    assert later[0].startswith("Moments(count=192")
    assert "True False" in [a[1] for a in answers]
    assert later[1] == "False False"  # neither Numba nor torch
    assert len(list(folder.iterdir())) == 1


def test_an_objects_name_depends_on_every_module_it_is_made_of() -> None:
    package = Path(compiled.__file__).parent
    known = set(compiled._SOURCES)
    for module in ("kernels.py", "sums.py", "stored.py"):
        tree: Any = ast.parse((package / module).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("noisytune_cli."):
                name = str(node.module).removeprefix("noisytune_cli.").replace(".", "/")
                assert f"{name}.py" in known or name == "distributions", (module, name)
    assert all((package / source).is_file() for source in known)


@pytest.mark.parametrize("mapped", [True, False])
def test_no_room_to_map_llvm_is_memory_that_ran_out(
    mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(monkeypatch, private(tmp_path / "cache"))

    def make() -> Loop:
        try:
            why = "cannot open shared object file" if mapped else "failed to map segment from shared object"
            raise OSError(f"libllvmlite.so: {why}")
        except OSError:
            raise OSError("Could not find/load shared object file") from None  # as llvmlite does

    monkeypatch.setattr(cache, "make", make)
    with pytest.raises(OSError if mapped else MemoryError):
        cache.run()

"""Every way to publish: what is there before, and what must be there after."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from noisytune_cli.output.publish import Publication

OLD = {"out.safetensors": b"old weights", "out.safetensors.noisytune.json": b"old manifest"}


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Everything below a folder: the content of files, None for folders."""
    return {
        os.fspath(path.relative_to(root)): None if path.is_dir() else path.read_bytes()
        for path in sorted(root.rglob("*"))
    }


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@dataclass(frozen=True)
class Kind:
    """One way to publish: what is there before, where the output goes, and what must be there after."""

    output: str
    before: dict[str, bytes]
    after: dict[str, bytes]
    directory: bool = False
    overwrite: bool = False
    empty: bool = False
    recipe: bool = False

    def prepare(self, root: Path) -> None:
        root.mkdir()
        write(root, self.before)
        if self.empty:
            (root / self.output).mkdir()
        write(root.with_name(f"{root.name}-source"), {c: c.encode() for c in ("weights", "pooling", "zebra")})

    def publish(self, root: Path) -> Path:
        source = root.with_name(f"{root.name}-source")
        names = {"weights": "model.safetensors", "pooling": "1_Pooling/config.json", "zebra": "zebra.txt"}
        if not self.directory:
            names = {"weights": Path(self.output).name}
        with self.publication(root) as p:
            for content, name in () if self.recipe else names.items():
                p.copy(source / content, name)
            return p.publish(b"manifest")

    def publication(self, root: Path) -> Publication:
        return Publication(
            root / self.output, directory=self.directory, overwrite=self.overwrite, recipe=self.recipe
        )


FILE = {"out.safetensors": b"weights", "out.safetensors.noisytune.json": b"manifest"}


FOLDER = {
    "out/1_Pooling/config.json": b"pooling",
    "out/model.safetensors": b"weights",
    "out/noisytune.json": b"manifest",
    "out/zebra.txt": b"zebra",
}


RECIPE = {"out.noisytune.json": b"manifest"}


BESIDE = {"other": b"beside"}


KINDS = {
    "file": Kind("out.safetensors", BESIDE, BESIDE | FILE),
    "file below missing folders": Kind("a/b/out.safetensors", {}, {f"a/b/{n}": c for n, c in FILE.items()}),
    "file replaced": Kind("out.safetensors", BESIDE | OLD, BESIDE | FILE, overwrite=True),
    "file replaced that had no manifest": Kind(
        "out.safetensors", {"out.safetensors": b"old"}, FILE, overwrite=True
    ),
    "manifest replaced that had no file": Kind(
        "out.safetensors", {"out.safetensors.noisytune.json": b"old"}, FILE, overwrite=True
    ),
    "file not there to replace": Kind("out.safetensors", {}, FILE, overwrite=True),
    "folder": Kind("out", BESIDE, BESIDE | FOLDER, directory=True),
    "folder below missing folders": Kind(
        "a/b/out", {}, {f"a/b/{n}": c for n, c in FOLDER.items()}, directory=True
    ),
    "folder replaced": Kind(
        "out", {"out/noisytune.json": b"old", "out/deep/er": b"old"}, FOLDER, directory=True, overwrite=True
    ),
    "folder not there to replace": Kind("out", {}, FOLDER, directory=True, overwrite=True),
    "empty folder": Kind("out", BESIDE, BESIDE | FOLDER, directory=True, empty=True),
    "recipe": Kind("out.noisytune.json", BESIDE, BESIDE | RECIPE, recipe=True),
    "recipe below missing folders": Kind(
        "a/b/out.noisytune.json", {}, {f"a/b/{n}": c for n, c in RECIPE.items()}, recipe=True
    ),
    "recipe replaced": Kind(
        "out.noisytune.json",
        BESIDE | {"out.noisytune.json": b"old"},
        BESIDE | RECIPE,
        overwrite=True,
        recipe=True,
    ),
    "empty folder replaced": Kind("out", {}, FOLDER, directory=True, overwrite=True, empty=True),
}


def files(root: Path) -> dict[str, bytes]:
    return {name: content for name, content in snapshot(root).items() if content is not None}


def refuse(*_: object) -> None:
    raise OSError(errno.EINVAL, "Invalid argument")

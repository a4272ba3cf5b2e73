"""The ways to write output: what is there before, what is asked for, and what may be there afterwards.

A `Scenario` has a sandbox: the source, which no run may change, and the place, a folder that is made anew
for every run. What is in the place before and after an undisturbed run are the only two states that a fault
may leave behind; a left-over of the staging (`.noisytune-*`) is counted apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from warm import Warm

from noisytune_cli.cli.parse import combine
from noisytune_cli.commands.perturb import perturb
from noisytune_cli.commands.plan import plan_job
from noisytune_cli.commands.request import Request
from noisytune_cli.commands.work import work
from noisytune_cli.manifest.write import encode
from noisytune_cli.records import FileRecord, Manifest, NoiseSpec, SourceRecord

#: path below the folder -> what it is: kind, mode and digest (and mtime where nothing may touch it).
Tree = Mapping[str, tuple[object, ...]]

LEFT_OVER = ".noisytune-"

#: The folder of a job. Whatever ends `plan`, `work` or `finish` leaves it, and the same command goes on.
JOB = f"{LEFT_OVER}job-"

_SHARDS = {
    "model-00001-of-00002.safetensors": {"a.weight": ("F32", 64), "b.weight": ("BF16", 96)},
    "model-00002-of-00002.safetensors": {"c.weight": ("F16", 32), "d.count": ("I64", 2)},
}
#: A job that one command plans, works off and finishes: a share for each weight file, and sums before noise.
_SHARES = ("--engine", "local", "--share-bytes", "1", "--scope", "global")

_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8}


@dataclass(frozen=True)
class Scenario:
    """One way to write output, in its sandbox."""

    name: str
    source: Path
    place: Path
    out: str
    options: tuple[str, ...]
    prepare: Callable[[Path], None]
    #: Whether it takes several renames, of which the manifest's is the last and says that the rest is there.
    piecewise: bool
    #: The verb and what it is given before the output.
    verb: tuple[str, ...] = ()
    #: One, where every run is to make the same system calls in the same order.
    threads: int = 1
    #: How many outputs: whatever stops the run, each is there whole or not at all.
    outputs: int = 1

    @property
    def argv(self) -> list[str]:
        """The command line."""
        out = str(self.place / self.out)
        verb = self.verb or ("perturb", str(self.source))
        named = [out] if verb == ("finish",) else ["-o", out]
        return [*verb, *named, "-q", "--threads", str(self.threads), *self.options]

    def reset(self) -> None:
        """Make the place as it is before a run."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        self.prepare(self.place)


@dataclass(frozen=True)
class Expected:
    """The states of a scenario: the source for ever, the place before and after; and how long a run takes."""

    source: Tree
    before: Tree
    after: Tree
    seconds: float


def scenarios(sandbox: Path) -> tuple[Scenario, ...]:
    """Build all sources below `sandbox`, and return the ways to write what is made of them."""
    folder, file = sandbox / "source" / "model", sandbox / "source" / "single.safetensors"
    build_folder(folder)
    file.write_bytes(weights({"w": ("F32", 300), "v": ("F64", 40)}))

    def scenario(
        name: str,
        source: Path,
        out: str,
        *options: str,
        prepare: Callable[[Path], None] = lambda place: None,
        piecewise: bool = False,
    ) -> Scenario:
        return Scenario(name, source, sandbox / "places" / name, out, options, prepare, piecewise)

    return (
        scenario("folder", folder, "parent/out"),
        scenario("empty-folder", folder, "out", prepare=_empty_folder, piecewise=True),
        scenario("replaced-folder", folder, "out", "--overwrite", prepare=_old_folder),
        scenario("file", file, "out.safetensors", piecewise=True),
        scenario("replaced-file", file, "out.safetensors", "--overwrite", prepare=_old_file, piecewise=True),
    )


def further_scenarios(sandbox: Path) -> tuple[Scenario, ...]:
    """Build the sources of other verbs and formats, which are for the full run alone, after `scenarios`."""
    import torch
    from chunked import save_chunked

    source = sandbox / "source"
    folder, file = source / "model", source / "single.safetensors"
    pickled, chunks = source / "pickled.bin", source / "chunks"
    torch.save({"w": torch.arange(1.0, 301.0), "v": torch.arange(1.0, 41.0).double()}, pickled)
    save_chunked(chunks, {("w",): torch.arange(1.0, 301.0).view(30, 10)})
    large = source / "large.safetensors"
    large.write_bytes(weights({"u": ("F32", 100_003), "w": ("F32", 1_100_000), "v": ("BF16", 5)}))
    recipe = source / "recipe.json"
    perturb(Request(str(folder), NoiseSpec(seed=3)), str(recipe), recipe_only=True)

    def scenario(name: str, of: Path, out: str, *options: str, verb: tuple[str, ...] = ()) -> Scenario:
        piecewise = not (of.is_dir() or out.endswith(".json"))
        place = sandbox / "places" / name
        return Scenario(name, of, place, out, options, lambda place: None, piecewise, verb)

    return (
        scenario("replay", folder, "out", verb=("replay", str(recipe), "--base", str(folder))),
        scenario("average", folder, "out", verb=("average", str(folder), str(folder))),
        scenario("pickle", pickled, "out.bin"),
        scenario("converted", pickled, "out.safetensors", "--to", "safetensors", "--dtype", "bfloat16"),
        scenario("chunks", chunks, "out"),
        scenario("absolute", folder, "out", "--sigma", "0.01", "--shrink", "0.5"),
        scenario("recipe", folder, "out.json", "--recipe-only"),
        scenario("job", folder, "out", *_SHARES),
        replace(scenario("replacing-job", folder, "out", *_SHARES, "--overwrite"), prepare=_old_folder),
        replace(
            scenario("finish", folder, "out", verb=("finish",)),
            prepare=partial(_planned, source=folder, templates=sandbox / "templates"),
        ),
        # Of two whole chunks, which threads of their own write, and the rest of a third.
        scenario("direct", large, "out.safetensors", "--direct"),
        replace(scenario("many", folder, "out-{seed}", "--seed", "0-2"), outputs=3),
        replace(scenario("many-files", file, "out-{seed}.safetensors", "--seed", "0,1"), outputs=2),
    )


def learn(scenario: Scenario, warm: Warm) -> Expected:
    """Run a scenario undisturbed, twice, and return its states; RuntimeError unless both agree."""
    scenario.reset()
    before = tree(scenario.place)
    source = tree(scenario.source.parent, mtime=True)
    seen, times = [], []
    for _ in range(2):
        scenario.reset()
        started = time.monotonic()
        ended = warm.run(scenario.argv)
        times.append(time.monotonic() - started)
        if ended.code != 0:
            raise RuntimeError(f"{scenario.name}: undisturbed, it ends with {ended.code}: {ended.stderr}")
        seen.append(tree(scenario.place))
    if seen[0] != seen[1] or seen[0] == before:
        raise RuntimeError(f"{scenario.name}: two undisturbed runs do not agree")
    if left_overs(scenario.place):
        raise RuntimeError(f"{scenario.name}: an undisturbed run leaves {left_overs(scenario.place)}")
    return Expected(source, before, seen[0], min(times))


def tree(root: Path, *, mtime: bool = False) -> Tree:
    """Describe everything below `root` but left-overs; with `mtime`, when it was last modified too."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(LEFT_OVER)]
        for name in (*folders, *files):
            path = Path(folder, name)
            status = path.lstat()
            times = (status.st_mtime_ns,) if mtime else ()
            content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else ""
            found[str(path.relative_to(root))] = (stat.filemode(status.st_mode), content, *times)
    return found


def left_overs(root: Path) -> list[str]:
    """Return the names of the staging directories anywhere below `root`, but for a job's own."""
    found = []
    for _, folders, files in os.walk(root):
        found += [name for name in (*folders, *files) if name.startswith(LEFT_OVER)]
        folders[:] = [name for name in folders if not name.startswith(LEFT_OVER)]
    return sorted(name for name in found if not name.startswith(JOB))


def has_plan(place: Path) -> bool:
    """Tell whether a job is there that is not finished."""
    return any(place.glob(f"{JOB}*/plan.json"))


def weights(tensors: Mapping[str, tuple[str, int]]) -> bytes:
    """Return a safetensors file of vectors whose bytes depend on their names alone; all values are finite."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, count) in tensors.items():
        nbytes = count * _BYTES.get(dtype, 8)
        body = bytearray(hashlib.shake_128(name.encode()).digest(nbytes))
        step = _BYTES.get(dtype, 8)
        for last in range(step - 1, nbytes, step):
            body[last] = 0x3C  # sign and top of the exponent: small, positive, finite in every float dtype
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [len(data), len(data) + nbytes]}
        data += body
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def build_folder(root: Path) -> None:
    """Make a small sharded checkpoint with a config and a subfolder."""
    (root / "1_Pooling").mkdir(parents=True)
    (root / "1_Pooling" / "config.json").write_text('{"pooling": "mean"}')
    (root / "config.json").write_text('{"model_type": "bert"}')
    for name, tensors in _SHARDS.items():
        (root / name).write_bytes(weights(tensors))
    weight_map = {tensor: name for name, tensors in _SHARDS.items() for tensor in tensors}
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _empty_folder(place: Path) -> None:
    (place / "out").mkdir()


def _old_folder(place: Path) -> None:
    (place / "out" / "sub").mkdir(parents=True)
    (place / "out" / "sub" / "old.bin").write_bytes(b"what was there before")
    (place / "out" / "config.json").write_text("{}")
    # As if written long before the manifest, which is believed then, false digests and all.
    for path in (place / "out" / "sub" / "old.bin", place / "out" / "config.json"):
        os.utime(path, (0, 0))
    # Nothing else is replaced than what a manifest records.
    digest = f"blake3:{64 * '0'}"
    source = SourceRecord("old", None, (FileRecord("sub/old.bin", 20, digest),))
    manifest = Manifest("noisytune", "0", source, NoiseSpec(), (), (("config.json", digest),))
    (place / "out" / "noisytune.json").write_bytes(encode(manifest))


def _old_file(place: Path) -> None:
    # Without its manifest, as a kill can leave it, only weights are replaced.
    (place / "out.safetensors").write_bytes(weights({"old": ("F32", 30)}))
    (place / "out.safetensors.noisytune.json").write_text('{"schema": 1, "tool": {"name": "noisytune"}}')


def _planned(place: Path, source: Path, templates: Path) -> None:
    """Put a job there whose shares are all done; it is made once for each place, which its plan names."""
    template = templates / f"{place.parent.name} {place.name}"
    if not template.exists():
        out = str(place / "out")
        plan_job(Request(str(source), NoiseSpec()), out, combine(out, seed="0", default=0.15), share_bytes=1)
        work(out, threads=1)
        template.parent.mkdir(exist_ok=True)
        shutil.move(place, template)
    shutil.copytree(template, place, dirs_exist_ok=True)

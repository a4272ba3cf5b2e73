"""Random commands, each held against the NumPy reference, `verify --base` and `replay`.

A case is a checkpoint (a format, dtypes, shapes, values of all kinds) and a `noisytune perturb` with random
options. What every tensor of its output has to be is worked out here, from exact standard deviations and the
stream's reference; then `verify` has to agree, with the base too, and `replay` has to make the same bytes.
So has, for every fourth, the same run done as a job.
"""

from __future__ import annotations

import fnmatch
import io
import json
import math
import random
import shutil
import traceback
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
from checkpoints import FLOATS, STORED, Tensor, Tensors, save, save_sharded, split, std32
from chunked import load_chunked, save_chunked
from pickles import to_torch, torch_bytes

from noisytune_cli.noise import distributions, stream
from noisytune_cli.noise.distributions import to_float32

#: How noisytune ends at Ctrl-C, which is meant for the long run.
_INTERRUPTED = 130

FORMATS = ("file", "folder", "zip", "legacy", "chunks")

#: Names that say what they are: what is a buffer is asked elsewhere.
_NAMES = tuple(
    f"layers.{layer}.{name}"
    for layer in range(3)
    for name in ("attn.q_proj.weight", "attn.q_proj.bias", "mlp.up_proj.weight", "input_layernorm.weight")
)
_ALWAYS = "embed.weight"
_PATTERNS = ("*.bias", "layers.0.*", "*q_proj*", "*layernorm.weight", "layers.[12].mlp*", "layers.?.attn*")
_SPELLED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


#: What the amplitudes of a mixture have to stay below, so that float32 holds whatever they come to.
_MOST = 2.0**125


class TooLarge(Exception):
    """A value, noise or none, has no place in the dtype that is asked for: the run has to say so."""


@dataclass(frozen=True)
class Noise:
    """What is asked for, as the reference needs it: terms are (seed, strength with its coefficient).

    Those of a mixture may be one.
    """

    distribution: str
    absolute: bool
    scope: str
    terms: tuple[tuple[int, float], ...]
    mixed: bool = False
    kept: float = 1.0
    rules: tuple[tuple[str, float], ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    out_dtype: str | None = None


@dataclass
class Case:
    """A checkpoint in `format`, the options of a run, and what they mean.

    `running` are those of how it is done; `share` is how large shares are where it is done as a job, too.
    """

    format: str
    tensors: dict[str, Tensor]
    noise: Noise
    options: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    mix: str | None = None
    share: str | None = None


def make_case(seed: int) -> Case:
    """Return the case of a seed."""
    choose, rng = random.Random(seed), np.random.default_rng(seed)
    format_ = choose.choice(FORMATS)
    scope = choose.choice(("matrix", "matrix", "global"))
    tensors = {_ALWAYS: Tensor("F32", oracle.weights(rng, 64, "F32").reshape(8, 8))}
    for name in choose.sample(_NAMES, choose.randint(1, 8)):
        tensors[name] = _tensor(choose, rng, finite=scope == "global")
    noise, options, mix = _noise(choose, scope)
    running = ["--threads", choose.choice("124")]
    if choose.random() < 0.2:
        running.append("--mmap")
    out_dtype = None
    if format_ in ("zip", "legacy") and choose.random() < 0.3:
        options += ["--to", "safetensors"]
    if (format_ in ("file", "folder") or "--to" in options) and choose.random() < 0.3:
        spelled, out_dtype = choose.choice([*_SPELLED.items()])
        options += ["--dtype", spelled]
    share = choose.choice(("1", "200", "1G")) if format_ != "chunks" and choose.random() < 0.25 else None
    return Case(format_, tensors, replace(noise, out_dtype=out_dtype), options, running, mix, share)


def _tensor(choose: random.Random, rng: np.random.Generator, *, finite: bool) -> Tensor:
    if choose.random() < 0.1:
        return Tensor("I64", rng.integers(0, 9, choose.randint(0, 9)))
    dtype = choose.choice(FLOATS)
    shape = tuple(choose.choice((0, 1, 2, 3, 5, 8, 17, 31)) for _ in range(choose.randint(1, 3)))
    if choose.random() < 0.02:
        shape = (257, 263)
    count = int(np.prod(shape))
    kind = choose.choice(("weights", "weights", "weights", "centred", "constant", "any", "not finite"))
    if kind == "any" and count and not finite:
        values = oracle.any_finite(rng, count, dtype)
    elif kind == "constant":
        values = np.repeat(oracle.weights(rng, 1, dtype), count)
    else:
        values = oracle.weights(
            rng, count, dtype, 3.0 if kind == "centred" else 0.0, 10 ** rng.uniform(-4, 1)
        )
    if kind == "not finite" and count and not finite:
        bits = values.view(oracle.STORED[dtype][1])
        bits[choose.randrange(count)] = oracle.STORED[dtype][2]
    return Tensor(dtype, values.reshape(shape))


def _noise(choose: random.Random, scope: str) -> tuple[Noise, list[str], str | None]:
    """Return noise, the options that ask for it, and the lines of a mixture if it is one."""
    options: list[str] = []
    distribution = choose.choice(distributions.names())
    seed = choose.choice((0, 1, 2**32, 2**64 - 1, choose.getrandbits(64)))
    how = choose.choice(("--lambda", "--lambda", "--noise-std", "--sigma", "--mix"))
    absolute, mix = how == "--sigma", None
    value = round(choose.choice((-1, 1)) * 10 ** choose.uniform(-4, 0.5), choose.randint(4, 9)) or 0.15
    terms = ((seed, value),)
    if how == "--mix":
        absolute = choose.random() < 0.5
        lines = [
            (choose.getrandbits(64), 10 ** choose.uniform(-4, 0), choose.uniform(-1, 1))
            for _ in range(choose.randint(1, 5))
        ]
        key = "sigma" if absolute else "lambda"
        mix = "".join(json.dumps({"seed": str(s), key: v, "coefficient": c}) + "\n" for s, v, c in lines)
        terms = tuple((s, c * v) for s, v, c in lines)
    else:
        options += [f"{how}={value!r}", "--seed", str(seed)]
        if how == "--noise-std":
            terms = ((seed, 12**0.5 * value),)
    if not absolute and scope == "global":
        options += ["--scope", "global"]
    options += ["--noise", distribution]
    rules: tuple[tuple[str, float], ...] = ()
    if how != "--mix" and choose.random() < 0.3:
        rules = tuple((p, choose.choice((0.0, 0.02, 0.5))) for p in choose.sample(_PATTERNS, 2))
    kept = choose.choice((0.0, 0.5, 0.9)) if choose.random() < 0.25 else 1.0
    if kept != 1.0:
        options += ["--shrink", repr(kept)]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    if choose.random() < 0.3:
        include = (_ALWAYS, *choose.sample(_PATTERNS, choose.randint(0, 2)))
    if choose.random() < 0.3:
        exclude = tuple(choose.sample(_PATTERNS, choose.randint(1, 2)))
    where = "absolute" if absolute else scope
    return (
        Noise(distribution, absolute, where, terms, mix is not None, kept, rules, include, exclude),
        options,
        mix,
    )


def _matching(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    return [p for p in patterns if any(fnmatch.fnmatchcase(name, p) for name in names)]


def reference(tensors: Tensors, noise: Noise) -> dict[str, bytes]:
    """Return the bytes of every tensor of the output."""
    wanted = {name: _strengths(name, tensor, noise) for name, tensor in tensors.items()}
    every: list[float] = []
    if noise.scope == "global":
        for name, terms in wanted.items():
            if terms and any(value for _, value in terms):
                every += oracle.values(tensors[name].values.ravel(), tensors[name].dtype)
    whole = oracle.std32(every) if len(every) > 1 else 0.0
    return {name: _of_tensor(name, tensor, noise, wanted[name], whole) for name, tensor in tensors.items()}


def _strengths(name: str, tensor: Tensor, noise: Noise) -> tuple[tuple[int, float], ...] | None:
    """Return seeds and strengths of a tensor's noise, or None where it is left as it is."""
    if tensor.dtype not in FLOATS or not tensor.values.size:
        return None
    if noise.include and not any(fnmatch.fnmatchcase(name, p) for p in noise.include):
        return None
    if any(fnmatch.fnmatchcase(name, p) for p in noise.exclude):
        return None
    terms = noise.terms
    for pattern, value in noise.rules:
        if fnmatch.fnmatchcase(name, pattern):
            terms = ((noise.terms[0][0], value),)
    return terms


def _of_tensor(
    name: str, tensor: Tensor, noise: Noise, terms: tuple[tuple[int, float], ...] | None, whole: float
) -> bytes:
    dtype = tensor.dtype
    if dtype not in FLOATS:
        return tensor.data
    stored = np.ascontiguousarray(tensor.values, STORED[dtype]).ravel()
    out_dtype = noise.out_dtype or dtype
    plain, overflowed = (stored, 0) if out_dtype == dtype else stream.convert(stored, dtype, out_dtype)
    finite = bool(np.isfinite(stream.upcast(stored, dtype)).all())
    amplitudes = _amplitudes(tensor, noise, terms, whole) if terms is not None and finite else None
    if overflowed:
        raise TooLarge(name)
    if terms is None or not finite or (amplitudes is None and noise.kept == 1.0):
        return plain.tobytes()
    words = [stream.stream_words(seed, name) for seed, _ in terms]
    drawn = () if amplitudes is None else tuple(zip(words, amplitudes, strict=True))
    made = stream.Noise(noise.distribution, drawn, noise.kept)
    return stream.mix(stored, dtype, made, 0, out_dtype)[0].tobytes()


def _amplitudes(
    tensor: Tensor, noise: Noise, terms: tuple[tuple[int, float], ...], whole: float
) -> list[float] | None:
    """Return the amplitudes of a finite tensor's noise, None where it gets none."""
    values = oracle.values(tensor.values.ravel(), tensor.dtype)
    if not any(value for _, value in terms):
        return None
    law = distributions.load(noise.distribution)
    if noise.absolute:
        found = [float(law.absolute_amplitude(value)) for _, value in terms]
    else:
        if noise.scope == "matrix" and (len(values) < 2 or len(set(values)) < 2):
            return None
        std = whole if noise.scope == "global" else std32(tensor)
        found = [float(law.amplitude(value, std)) for _, value in terms]
    overall = abs(float(to_float32(law.overall_amplitude(found))))
    if noise.mixed and math.fsum(map(abs, found)) >= _MOST:
        return None
    return found if 0.0 < overall < float("inf") else None


def lay(case: Case, root: Path) -> Path:
    """Write a case's checkpoint below `root`, and return what to name as the source."""
    if case.format == "file":
        return save(root / "in.safetensors", case.tensors, {"format": "pt"})
    if case.format == "folder":
        names = list(case.tensors)
        half = len(names) // 2
        shards = [{n: case.tensors[n] for n in part} for part in (names[:half], names[half:]) if part]
        return save_sharded(root / "in", *shards)
    if case.format == "chunks":
        values = {(name,): to_torch(tensor) for name, tensor in case.tensors.items()}
        return save_chunked(root / "in", values)
    path = root / "in.bin"
    path.write_bytes(torch_bytes(case.tensors, zipped=case.format == "zip"))
    return path


def read(case: Case, out: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor of an output."""
    import torch

    if case.format == "file" or "--to" in case.options:
        return split(out.read_bytes())[1]
    if case.format == "folder":
        found: dict[str, bytes] = {}
        for path in out.glob("*.safetensors"):
            found |= split(path.read_bytes())[1]
        return found
    loaded = load_chunked(out) if case.format == "chunks" else torch.load(out, weights_only=True)
    return {
        name: tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        for name, tensor in loaded.items()
    }


class Commands:
    """Runs of the command line in this process."""

    def __init__(self) -> None:
        import typer.main

        from noisytune_cli.cli.app import app

        self._command: Any = typer.main.get_command(app)

    def run(self, *arguments: object) -> str:
        """Run `noisytune ARGUMENTS`; return what was wrong, nothing if it ended with 0. Ctrl-C is raised."""
        said = io.StringIO()
        code: object = 0
        with redirect_stdout(said), redirect_stderr(said):
            try:
                self._command.main(args=[str(one) for one in arguments], prog_name="noisytune")
            except SystemExit as ended:
                code = ended.code
            except Exception:
                code = traceback.format_exc()
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        return "" if code in (0, None) else f"exit {code}: {said.getvalue()}"


def try_case(seed: int, root: Path, commands: Commands) -> list[str]:
    """Try the case of a seed in an empty folder; return what does not hold."""
    case = make_case(seed)
    names = list(case.tensors)
    noise = replace(
        case.noise,
        rules=tuple(rule for rule in case.noise.rules if _matching((rule[0],), names)),
        include=tuple(_matching(case.noise.include, names)),
        exclude=tuple(_matching(case.noise.exclude, names)),
    )
    source = lay(case, root)
    out = root / "once" / ("out.safetensors" if "--to" in case.options else f"out{source.suffix}")
    options = list(case.options)
    if case.mix is not None:
        (root / "mix.jsonl").write_text(case.mix)
        options += ["--mix", str(root / "mix.jsonl")]
    rule = "--sigma-for" if noise.absolute else "--lambda-for"
    options += [word for pattern, value in noise.rules for word in (rule, f"{pattern}={value!r}")]
    options += [word for pattern in noise.include for word in ("--include", pattern)]
    options += [word for pattern in noise.exclude for word in ("--exclude", pattern)]
    what = f"{case.format}: {' '.join([*options, *case.running])}"
    wrong = commands.run("perturb", source, "-o", out, *options, *case.running, "-q")
    try:
        expected = reference(case.tensors, noise)
    except TooLarge:
        return [] if wrong.startswith("exit 3: ") else [f"{what}: not refused: {wrong}"]
    if wrong:
        return [f"{what}: {wrong}"]
    found = read(case, out)
    if expected.keys() != found.keys():
        return [f"{what}: it has {sorted(found)}"]
    again = root / "again" / out.name
    recipe = Path(f"{out}.noisytune.json") if out.is_file() else out / "noisytune.json"
    checks = (
        ("verify", out, "-q"),
        ("verify", out, "--base", source, "-q"),
        ("replay", recipe, "--base", source, "-o", again, "-q"),
    )
    breaches = [f"{name} is another" for name in expected if expected[name] != found[name]]
    breaches += [f"{argv[0]}: {wrong}" for argv in checks if (wrong := commands.run(*argv))]
    if not breaches and _files(out) != _files(again):
        breaches.append("replay makes another output")
    if not breaches and case.share is not None:
        in_shares = root / "in shares" / out.name
        steps = (
            ("plan", source, "-o", in_shares, *options, "--share-bytes", case.share, "-q"),
            ("work", in_shares, *case.running, "-q"),
            ("finish", in_shares, "-q"),
        )
        breaches += [f"{argv[0]}: {wrong}" for argv in steps if (wrong := commands.run(*argv))]
        if not breaches and _files(out.parent) != _files(in_shares.parent):
            breaches.append("a job makes another output")
    return [f"{what}: {breach}" for breach in breaches]


def _files(path: Path) -> Mapping[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def empty(root: Path) -> None:
    """Make a folder as if new."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)

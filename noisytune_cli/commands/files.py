"""The verbs as Python functions: for files what `perturb_` and its kin are for a model in memory.

They do what the command line does, and raise its errors. What it would warn of is a `NoisytuneWarning`;
nothing is printed, and a download shows no bar. Paths may be texts or `os.PathLike`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence

from noisytune_cli.commands import compare as comparing
from noisytune_cli.commands import inspect as inspecting
from noisytune_cli.commands import perturb as perturbing
from noisytune_cli.commands import replay as replaying
from noisytune_cli.commands import verify as verifying
from noisytune_cli.commands.compare import By, Comparison
from noisytune_cli.commands.inspect import Inspection
from noisytune_cli.commands.perturb import Perturbed
from noisytune_cli.commands.replay import Replayed
from noisytune_cli.commands.request import Request, make_conversion
from noisytune_cli.commands.verify import Verified
from noisytune_cli.dtypes import BY_TORCH_NAME
from noisytune_cli.engine.threads import thread_count
from noisytune_cli.errors import NoisytuneWarning
from noisytune_cli.plan.arguments import (
    Mix,
    Pairs,
    Patterns,
    check_choice,
    count,
    in_python,
    make_spec,
    of_python,
    patterns,
    percents,
    texts,
)
from noisytune_cli.records import Granularity, Scope

#: A file, a folder, or where that is allowed a hub id.
Place = str | os.PathLike[str]


@of_python
def perturb(
    source: Place,
    out: Place,
    *,
    lam: float | None = None,
    seed: int | None = None,
    sigma: float | None = None,
    mix: Mix | None = None,
    shrink: float | None = None,
    noise: str | None = None,
    scope: Scope | None = None,
    granularity: Granularity = "tensor",
    splits: Pairs[str] = (),
    include: Patterns = (),
    exclude: Patterns = (),
    rules: Pairs[float] = (),
    dtype: str | None = None,
    to: str | None = None,
    dequantize: str | None = None,
    buffers_from: str = "auto",
    strict: bool = False,
    weights: str | None = None,
    components: Patterns = (),
    revision: str | None = None,
    mmap: bool = False,
    follow_links: bool = False,
    again: bool = False,
    card: bool = False,
    recipe_only: bool = False,
    overwrite: bool = False,
    overwrite_changed: bool = False,
    skip_existing: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    direct: bool | None = None,
) -> Perturbed:
    """Write a noisy copy of `source` and its manifest to `out`, durably, or change nothing.

    The arguments are the options of `noisytune perturb`; `rules` are `--lambda-for` or `--sigma-for`. One
    output comes of one call: of lists, the command line makes all from one read.
    """
    if dtype is not None:
        check_choice("dtype", dtype, tuple(BY_TORCH_NAME))
    if to is not None:
        check_choice("to", to, ("safetensors",))
    if dequantize is not None:
        check_choice("dequantize", dequantize, ("bf16",))
    spec = make_spec(
        lam=lam,
        seed=seed,
        sigma=sigma,
        mix=mix,
        shrink=shrink,
        noise=noise,
        scope=scope,
        granularity=granularity,
        splits=splits,
        include=include,
        exclude=exclude,
        rules=rules,
    )
    request = Request(
        os.fspath(source),
        spec,
        conversion=make_conversion(dtype, to, dequantize),
        weights=weights,
        components=patterns("components", components),
        revision=revision,
        mmap=mmap,
        again=again,
        buffers_from=buffers_from,
        strict=strict,
        follow_links=follow_links,
        card=card,
    )
    done = perturbing.perturb(
        request,
        os.fspath(out),
        recipe_only=recipe_only,
        overwrite=overwrite,
        overwrite_changed=overwrite_changed,
        skip_existing=skip_existing,
        device=str(device),
        threads=thread_count(threads),
        direct=direct,
    )
    _warn(perturb, done.warnings)
    return done


@of_python
def inspect(
    source: Place,
    *,
    lam: float = 0.15,
    sigma: float | None = None,
    include: Patterns = (),
    exclude: Patterns = (),
    granularity: Granularity = "tensor",
    splits: Pairs[str] = (),
    sort: str | None = "name",
    limit: int | None = None,
    percentiles: Sequence[float] = (),
    headers_only: bool = False,
    buffers_from: str = "auto",
    weights: str | None = None,
    components: Patterns = (),
    revision: str | None = None,
    mmap: bool = False,
    follow_links: bool = False,
    threads: int | None = None,
) -> Inspection:
    """Return a checkpoint's tensors with their statistics, and what `perturb` would do with each.

    The arguments are the options of `noisytune inspect`; without `sort` tensors come in their files' order.
    """
    found = inspecting.inspect(
        os.fspath(source),
        lam=lam,
        sigma=sigma,
        include=patterns("include", include),
        exclude=patterns("exclude", exclude),
        granularity=granularity,
        splits=texts("splits", splits),
        sort=sort,
        limit=count("limit", limit),
        percentiles=percents("percentiles", percentiles),
        headers_only=headers_only,
        weights=weights,
        components=patterns("components", components),
        revision=revision,
        mmap=mmap,
        threads=thread_count(threads),
        follow_links=follow_links,
        buffers_from=buffers_from,
    )
    _warn(inspect, found.warnings)
    return found


@of_python
def verify(
    out: Place,
    *,
    base: Place | None = None,
    mmap: bool = False,
    follow_links: bool = False,
    threads: int | None = None,
) -> Verified:
    """Hold an output against its manifest, and with `base` against what it was made from.

    The answer is `ok` and `mismatches`: what does not match is no error.
    """
    found = verifying.verify(
        os.fspath(out),
        base=None if base is None else os.fspath(base),
        threads=thread_count(threads),
        mmap=mmap,
        follow_links=follow_links,
    )
    _warn(verify, found.warnings)
    return found


@of_python
def replay(
    manifest: Place,
    out: Place,
    *,
    base: Place | None = None,
    overwrite: bool = False,
    overwrite_changed: bool = False,
    mmap: bool = False,
    follow_links: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    direct: bool | None = None,
) -> Replayed:
    """Write to `out` exactly what a manifest records, from `base` or the hub's commit that it names.

    `manifest` may be an output, which has its own. Mismatch where a byte would differ: nothing is written.
    """
    done = replaying.replay(
        os.fspath(manifest),
        os.fspath(out),
        base=None if base is None else os.fspath(base),
        overwrite=overwrite,
        overwrite_changed=overwrite_changed,
        device=str(device),
        threads=thread_count(threads),
        direct=direct,
        mmap=mmap,
        follow_links=follow_links,
    )
    _warn(replay, done.warnings)
    return done


@of_python
def compare(
    a: Place,
    b: Place,
    *,
    by: By = "tensor",
    maps: Pairs[str] = (),
    include: Patterns = (),
    exclude: Patterns = (),
    sort: str | None = "name",
    tolerance: float = 0.0,
    headers_only: bool = False,
    components: Patterns = (),
    mmap: bool = False,
    follow_links: bool = False,
    threads: int | None = None,
) -> Comparison:
    """Return what lies between two checkpoints, by `tensor`, `layer` or `kind`.

    The arguments are options of `noisytune compare`, which has more; `maps` are `--map`. Without `sort`
    tensors come in the order of A's files.
    """
    check_choice("by", by, ("tensor", "layer", "kind"))
    found = comparing.compare(
        os.fspath(a),
        os.fspath(b),
        by=by,
        maps=texts("maps", maps),
        include=patterns("include", include),
        exclude=patterns("exclude", exclude),
        sort=sort,
        tolerance=tolerance,
        headers_only=headers_only,
        components=patterns("components", components),
        mmap=mmap,
        threads=thread_count(threads),
        follow_links=follow_links,
    )
    _warn(compare, found.warnings)
    return found


def _warn(function: Callable[..., object], texts: Sequence[str]) -> None:
    for text in texts:
        # Past the function that warns, and past what puts its errors into Python's words.
        warnings.warn(in_python(function, text), NoisytuneWarning, stacklevel=4)

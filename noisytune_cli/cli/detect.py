"""`noisytune detect`: is the noise of a seed in a checkpoint? Options and answer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noisytune_cli.cli.help import NOISE, SOURCE, TENSORS
from noisytune_cli.cli.options import (
    AsJson,
    Components,
    FollowLinks,
    Maps,
    Mmap,
    Patterns,
    Quiet,
    Revision,
    Threads,
    Weights,
)

if TYPE_CHECKING:
    from noisytune_cli.commands.detect import Detection, SeedScore


def detect(
    suspect: Annotated[
        str,
        typer.Argument(
            metavar="SUSPECT",
            help="The checkpoint that may have noise in it: a weight file, a folder, a hub id, or an address (s3://…).",
            show_default=False,
        ),
    ],
    seed: Annotated[
        str | None,
        typer.Option(
            metavar="N[-M][,…]",
            help="The seeds to look for. [default: those of --manifest]",
            rich_help_panel=NOISE,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="What it was before, where you have it: a sharper look.",
            rich_help_panel=SOURCE,
        ),
    ] = None,
    manifest: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A manifest (or the output it lies with) that has names, seed and noise.",
            rich_help_panel=NOISE,
        ),
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option(
            metavar="uniform|gaussian", help="The noise to look for. [default: both]", rich_help_panel=NOISE
        ),
    ] = None,
    name_map: Maps = None,
    include: Annotated[
        Patterns,
        typer.Option(
            metavar="PATTERN", help="Look only at these: a shell pattern or a kind.", rich_help_panel=TENSORS
        ),
    ] = None,
    exclude: Annotated[
        Patterns,
        typer.Option(
            metavar="PATTERN",
            help="Do not look at these.",
            rich_help_panel=TENSORS,
        ),
    ] = None,
    threads: Threads = None,
    mmap: Mmap = False,
    follow_links: FollowLinks = False,
    weights: Weights = None,
    component: Components = None,
    revision: Revision = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Tell whether the noise of a seed is in a checkpoint, from its weights alone.

    A line for each seed: yes or no, the λ that was found with its interval of 95 %, z, and p, the chance of
    such a z without noise, with all noises that were tried allowed for. Yes is p below one in a million.
    Exit code 8 where the answer is no for every seed. It also finds noise that was finetuned, rounded, pruned
    or averaged since, and names that have or lack a prefix now; not permuted neurons (docs/detect.md).

    Examples:
      noisytune detect ./suspect --seed 0-99
      noisytune detect ./suspect --manifest ./bert-noisy --base ./bert
    """
    from noisytune_cli.cli import show
    from noisytune_cli.cli.parse import parse_map, read_components, read_seeds
    from noisytune_cli.commands import detect as command
    from noisytune_cli.engine.threads import default_threads

    result = command.detect(
        suspect,
        seeds=read_seeds(seed) if seed is not None else (),
        base=base,
        manifest=manifest,
        distribution=noise,
        maps=[parse_map(text) for text in name_map or ()],
        include=include or (),
        exclude=exclude or (),
        weights=weights,
        components=read_components(component),
        revision=revision,
        mmap=mmap,
        threads=threads or default_threads(),
        follow_links=follow_links,
        progress=lambda nbytes: show.progress(nbytes, "detect"),
    )
    _show(result, as_json=as_json, knows_names=base is not None or manifest is not None)


def _show(result: Detection, *, as_json: bool, knows_names: bool) -> None:
    """Print the answer; raises Mismatch where it is no for every seed."""
    from noisytune_cli.cli.show import warn_all, write_out
    from noisytune_cli.errors import Mismatch

    warn_all(result.warnings)
    if as_json:
        write_out(json.dumps(_document(result), indent=1, allow_nan=False) + "\n")
    else:
        width = max(len(str(score.seed)) for score in result.seeds)
        write_out((line_of(score, width) for score in result.seeds), spelled=True)
    if not result.found:
        best = max(result.seeds, key=lambda score: abs(score.z))
        weakest = result.weakest
        raise Mismatch(
            "no such noise was found",
            path=result.suspect,
            why=f"the largest z, of {result.tests:,} tried, is {best.z:.1f} (seed {best.seed})"
            + (f"; here it would be found from a λ of some {weakest:.2g}" if weakest else ""),
            next_step="Try other seeds"
            + (
                ", or give --manifest or --base, which know the names"
                if not knows_names
                else ", or give --base, by which weaker noise is found"
                if result.base is None
                else ""
            )
            + "; permuted neurons hide it",
        )


def line_of(score: SeedScore, width: int = 0) -> str:
    """Return what is said of a seed, its number padded to a width."""
    return (
        f"seed {score.seed:<{width}}  {'yes' if score.found else 'no ':3}  "
        f"λ {score.lam:.4f} [{score.low:.4f}, {score.high:.4f}]  z {score.z:.1f}  p {_power(score)}"
        + (f"  {score.distribution}" if score.found else "")
        + (f", names {score.renaming}" if score.found and score.renaming else "")
        + "\n"
    )


def _power(score: SeedScore) -> str:
    """Write p, which float64 may be too small for."""
    return f"{score.p:.2g}" if score.log10_p > -300 else f"1e{score.log10_p:.0f}"


def _document(result: Detection) -> dict[str, Any]:
    return {
        "suspect": result.suspect,
        "revision": result.revision,
        "base": result.base,
        "found": result.found,
        "tensors": result.tensors,
        "elements": result.elements,
        "tests": result.tests,
        "seeds": [entry_of(score) for score in result.seeds],
    }


def entry_of(score: SeedScore) -> dict[str, Any]:
    """Return a seed as it stands in JSON."""
    return {
        "seed": str(score.seed),
        "found": score.found,
        "distribution": score.distribution,
        "renamed": score.renaming or None,
        "lambda": score.lam,
        "low": score.low,
        "high": score.high,
        "z": score.z,
        "p": score.p,
        "log10_p": score.log10_p,
        "tensors": [
            {"name": t.name, "stream": t.stream, "elements": t.elements, "lambda": t.lam, "z": t.z}
            for t in score.tensors
        ],
    }

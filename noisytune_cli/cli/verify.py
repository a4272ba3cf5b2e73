"""`noisytune verify`, which checks outputs: its options and its answer."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from noisytune_cli.cli.help import RUNNING, SOURCE
from noisytune_cli.cli.options import FollowLinks, Mmap, Quiet, Threads
from noisytune_cli.errors import Mismatch, NoisytuneError, ResourceExhausted, UsageError

if TYPE_CHECKING:
    from noisytune_cli.commands.verify import Verified


def verify(
    outs: Annotated[
        list[str],
        typer.Argument(
            metavar="OUT",
            help="The folders or files that perturb, replay or average wrote, or their manifests.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Also make every tensor again from this, and compare.",
            rich_help_panel=SOURCE,
        ),
    ] = None,
    threads: Threads = None,
    mmap: Mmap = False,
    follow_links: FollowLinks = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer as JSON on stdout.", rich_help_panel=RUNNING)
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Check outputs against their manifests: every byte of them, and with --base where they came from.

    Exit code 8 and the names of the first tensors and files that do not match, 0 if all do. Of several
    outputs all are looked at, and the exit code is that of the first with a fault; --json prints a line each.

    Examples:
      noisytune verify ./bert-noisy
      noisytune verify ./bert-l0.1-s* --base ./bert
      noisytune verify ./bert-noisy --base bert-base-uncased
    """
    from noisytune_cli.cli import show
    from noisytune_cli.commands import verify as command

    faults: list[NoisytuneError] = []
    for out in outs:
        try:
            result = command.verify(
                out,
                base=base,
                threads=threads,
                mmap=mmap,
                follow_links=follow_links,
                progress=lambda nbytes: show.progress(nbytes, "verify"),
            )
            _show_verified(result, as_json=as_json, several=len(outs) > 1)
        except NoisytuneError as error:
            if len(outs) == 1 or isinstance(error, (UsageError, ResourceExhausted)):
                raise
            if as_json and not isinstance(error, Mismatch):
                show.write_out(json.dumps({"output": out, "ok": False, "error": error.line()}) + "\n")
            show.fail(error.line())
            faults.append(error)
    if faults:
        raise typer.Exit(faults[0].exit_code)


def _show_verified(result: Verified, *, as_json: bool, several: bool) -> None:
    """Print the answer; raises Mismatch, which names the first differences, where it is no."""
    from noisytune_cli.cli.show import note, size_of, warn_all, write_out
    from noisytune_cli.commands.differences import mismatch

    warn_all(result.warnings)
    if as_json:
        answer = {
            "output": str(result.output),
            "ok": result.ok,
            "checked": asdict(result.checked),
            "mismatches": [asdict(difference) for difference in result.mismatches],
        }
        write_out(json.dumps(answer, indent=None if several else 1) + "\n")
    if not result.ok:
        what, next_step = "the output does not match its manifest", "Fetch it again"
        if result.checked.base:
            what = "output, manifest and base do not match"
            next_step = "Give as --base the checkpoint that was perturbed, fetch the output again"
        raise mismatch(
            result.mismatches,
            what=what,
            path=result.output,
            next_step=f"{next_step}, or write it again with perturb or replay",
        )
    made = " and the base gives" if result.checked.base else ""
    whose = f"{result.output}: " if several else ""
    note(
        f"{whose}verified {result.checked.tensors} tensors, {size_of(result.checked.bytes)}: "
        f"all as the manifest says{made}"
    )

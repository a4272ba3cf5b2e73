"""What verify and replay tell: a line of summary, JSON on request, and what does not match."""

from __future__ import annotations

import json
from dataclasses import asdict

from noisytune_cli.cli.show import note, warn, write_out
from noisytune_cli.commands.compare import mismatch
from noisytune_cli.commands.replay import Replayed
from noisytune_cli.commands.verify import Verified
from noisytune_cli.escape import escape


def show_verified(result: Verified, *, as_json: bool, quiet: bool) -> None:
    """Print the answer; raises Mismatch, which names the first differences, where it is no."""
    for warning in result.warnings:
        warn(warning)
    if as_json:
        answer = {
            "ok": result.ok,
            "checked": asdict(result.checked),
            "mismatches": [asdict(difference) for difference in result.mismatches],
        }
        write_out(json.dumps(answer, indent=1) + "\n")
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
    if not quiet:
        made = " and the base gives" if result.checked.base else ""
        note(
            f"verified {result.checked.tensors} tensors, {result.checked.bytes / 1e6:,.1f} MB: "
            f"all as the manifest says{made}"
        )


def show_replayed(result: Replayed, *, as_json: bool, quiet: bool) -> None:
    """Say what was written: one line on stderr, or with `as_json` a document on stdout."""
    for name in result.cleared:
        note(f"noisytune: removed {escape(name)}, which a run that was killed had left")
    for warning in result.warnings:
        warn(warning)
    source, tensors = result.manifest.source, len(result.manifest.receipts)
    if as_json:
        document = {
            "output": str(result.output),
            "manifest": str(result.manifest_path),
            "source": {"id": source.id, "revision": source.revision},
            "tensors": tensors,
        }
        write_out(json.dumps(document, indent=1) + "\n", [result.output])
    if not quiet:
        note(f"rebuilt {tensors} tensors exactly as recorded: {result.output}")

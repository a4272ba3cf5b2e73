"""What average tells: one line of summary, or JSON on request."""

from __future__ import annotations

import json

from noisytune_cli.cli.show import note, note_left_out, warn, write_out
from noisytune_cli.commands.average import Averaged
from noisytune_cli.escape import escape


def show_averaged(result: Averaged, *, as_json: bool, quiet: bool) -> None:
    """Print the summary: one line on stderr, or with `as_json` a document on stdout."""
    for name in result.cleared:
        note(f"noisytune: removed {escape(name)}, which a run that was killed had left")
    for warning in result.warnings:
        warn(warning)
    manifest = result.manifest
    averaged = sum(done.action == "average" for done in manifest.tensors)
    nbytes = sum(file.size for file in manifest.members[0][1].files)
    if as_json:
        document = {
            "output": str(result.output),
            "manifest": str(result.manifest_path),
            "members": [
                {"id": source.id, "revision": source.revision, "coefficient": coefficient}
                for coefficient, source in manifest.members
            ],
            "tensors": len(manifest.tensors),
            "averaged": averaged,
            "bytes": nbytes,
            "left_out": [{"name": name, "why": why} for name, why in manifest.left_out],
            "warnings": list(result.warnings),
        }
        write_out(json.dumps(document, indent=1) + "\n", [result.output])
    if not quiet:
        note(
            f"averaged {averaged} of {len(manifest.tensors)} tensors of {len(manifest.members)} checkpoints "
            f"-> {result.output}: {nbytes / 1e6:,.1f} MB"
        )
        note_left_out(manifest.left_out)

"""`noisytune status`, which tells how far a job is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from noisytune_cli.cli.options import AsJson, JobOut

if TYPE_CHECKING:
    from noisytune_cli.commands.status import Status

#: Shares that a line names.
_MOST_NAMED = 20


def status(out: JobOut, as_json: AsJson = False) -> None:
    """Tell which shares of a job are done, and which are left.

    Examples:
      noisytune plan ./llama -o ./llama-noisy
      noisytune status ./llama-noisy
      noisytune status ./llama-noisy --json
    """
    from noisytune_cli.cli.show import write_out
    from noisytune_cli.commands import status as command

    found = command.status(out)
    write_out(json.dumps(document(found), indent=1) + "\n" if as_json else _lines(found), spelled=not as_json)


def document(found: Status) -> dict[str, object]:
    """Return a job's state as JSON has it."""
    job = found.folder.job
    return {
        "job": str(found.folder.path),
        "plan": found.folder.digest,
        "outputs": [output.path for output in job.outputs],
        "shares": found.shares,
        "done": found.shares - len(found.left),
        "left": list(found.left),
        "lacking_sums": list(found.lacking_sums),
        "bytes": found.nbytes,
        "bytes_done": found.done_bytes,
    }


def _lines(found: Status) -> str:
    from noisytune_cli.cli.show import size_of
    from noisytune_cli.escape import escape, list_some

    def named(shares: tuple[int, ...]) -> str:
        return list_some([str(share) for share in shares], _MOST_NAMED)

    done = found.shares - len(found.left)
    sizes = f"{size_of(found.done_bytes)} of {size_of(found.nbytes)}"
    lines = [f"{done} of {found.shares} shares done, {sizes}"]
    if found.lacking_sums:
        lines.append(f"sums still to come: {named(found.lacking_sums)}")
    lines.append(f"left: {named(found.left)}" if found.left else "left: noisytune finish")
    lines += [f"output: {escape(output.path)}" for output in found.folder.job.outputs[:_MOST_NAMED]]
    lines.append(f"job: {escape(str(found.folder.path))}")
    return "".join(f"{line}\n" for line in lines)

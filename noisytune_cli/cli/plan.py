"""`noisytune plan`, which writes a run of `perturb` down as a job: its options are those of `perturb`."""

# Annotations are no strings here: Typer would compile and evaluate each of them four times.

import inspect
import json
import shlex
from typing import Any

from noisytune_cli.cli.perturb import ask, perturb
from noisytune_cli.errors import UsageError

#: Options of `perturb` that say how to run, which those who do the shares are told.
_OF_RUNNING = ("device", "threads", "direct", "mmap", "dry_run", "skip_existing", "engine", "address")


def plan(**given: Any) -> None:
    """Write what perturb would do down as a job, and print how many shares it has.

    A share is one weight file, or small ones together. Do them with noisytune work, in any order, by any
    number of processes and machines that see SOURCE and OUT; noisytune finish then publishes what a single
    run would have written, byte for byte. The job is a hidden folder beside OUT, in an object store below it.

    Examples:
      noisytune plan ./llama -o ./llama-noisy
      noisytune plan ./llama --lambda 0.1,0.15 --seed 0-4 -o 'llama-l{lambda}-s{seed}' --share-bytes 8G
    """
    from noisytune_cli.cli import show
    from noisytune_cli.commands import plan as command

    asked = ask(mmap=False, **given)
    out = given["out"]
    if out is None:
        raise UsageError("--out is missing", why="a job lies beside its output", next_step="Give -o OUT")
    planned = command.plan_job(
        asked.request, out, asked.wanted, share_bytes=asked.share_bytes, **asked.outputs
    )
    show.warn_all(planned.warnings)
    job = planned.folder.job
    shares = len(job.shares)
    if given["as_json"]:
        document = {
            "job": str(planned.folder.path),
            "plan": planned.folder.digest,
            "joined": planned.joined,
            "outputs": [output.path for output in job.outputs],
            "shares": shares,
            "bytes": sum(share.nbytes for share in job.shares),
        }
        show.write_out(json.dumps(document, indent=1) + "\n")
    else:
        show.write_out(f"{shares}\n")
    what = "the same job was planned before" if planned.joined else "planned"
    then = f"noisytune work {shlex.quote(out)}"
    show.note(f"{what}; outputs: {len(job.outputs)}, shares: {shares}; next: {then}")


_parameters = [
    parameter for name, parameter in inspect.signature(perturb).parameters.items() if name not in _OF_RUNNING
]
plan.__signature__ = inspect.Signature(_parameters, return_annotation=None)  # type: ignore[attr-defined]
plan.__annotations__ = {parameter.name: parameter.annotation for parameter in _parameters} | {"return": None}

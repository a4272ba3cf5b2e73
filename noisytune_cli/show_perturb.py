"""What perturb tells: a dry run's plan, and the summary of what was published."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from noisytune_cli.commands.perturb import Perturbed, Planned
from noisytune_cli.escape import escape
from noisytune_cli.records import NoiseSpec, Step
from noisytune_cli.show import note, warn, write_out

_TOLD_BY = {"names": "its name", "model": "the model"}


def show_planned(planned: Planned, *, as_json: bool) -> None:
    """Print a dry run's plan on stdout, a tensor a line."""
    for warning in planned.warnings:
        warn(warning)
    steps = planned.plan.steps
    if as_json:
        document = {
            "dry_run": True,
            "source": {"id": planned.id, "revision": planned.revision},
            "noise": _noise(planned.plan.noise),
            "tensors": [_step(step) for step in steps],
            "ties": [
                {"stream": tie.stream, "names": list(tie.names), "evidence": tie.evidence}
                for tie in planned.plan.ties
            ],
        }
        write_out(json.dumps(document, indent=1) + "\n")
        return
    write_out(_plan_lines(steps))
    counts = Counter("perturb" if step.reason is None else str(step.reason) for step in steps)
    found = ", ".join(f"{count} {what}" for what, count in counts.most_common())
    note(f"dry run: {len(steps)} tensors: {found}; nothing was written")


def show_perturbed(result: Perturbed, *, as_json: bool, quiet: bool, seconds: float) -> None:
    """Print the summary: one line on stderr, or with `as_json` a document on stdout."""
    for name in result.cleared:
        note(f"noisytune: removed {escape(name)}, which a run that was killed had left")
    for warning in result.warnings:
        warn(warning)
    manifest = result.manifest
    perturbed = sum(receipt.action == "perturb" for receipt in manifest.receipts)
    files = manifest.source.files if manifest.output is None else manifest.output.files
    nbytes = sum(file.size for file in files)
    if as_json:
        document = {
            "output": str(result.output),
            "manifest": str(result.manifest_path),
            "source": {"id": manifest.source.id, "revision": manifest.source.revision},
            "noise": _noise(manifest.noise),
            "tensors": len(manifest.receipts),
            "perturbed": perturbed,
            "unchanged": sum(receipt.unchanged for receipt in manifest.receipts),
            "clamped": sum(receipt.clamped for receipt in manifest.receipts),
            "bytes": nbytes,
            "warnings": list(result.warnings),
        }
        write_out(json.dumps(document, indent=1) + "\n")
    if not quiet:
        noise = manifest.noise
        note(
            f"perturbed {perturbed} of {len(manifest.receipts)} tensors "
            f"(λ {noise.lam:g}, seed {noise.seed}, {noise.distribution}) "
            f"-> {result.output}: {nbytes / 1e6:,.1f} MB in {seconds:.1f} s"
        )


def _plan_lines(steps: tuple[Step, ...]) -> Iterator[str]:
    for step in steps:
        tensor = step.tensor
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        what = f"perturb λ={step.lam:g}" if step.reason is None else f"copy ({step.reason})"
        if step.reason == "buffer":
            what = f"copy (buffer, told by {_TOLD_BY[step.told_by]})"
        if step.stream != tensor.name:
            what += f", tied to {escape(step.stream)}"
        if "tied" in step.unsure:
            what += ", tied if the bytes agree"
        if unless := [word for word in step.unsure if word != "tied"]:
            what += f"; unless {' or '.join(unless)}"
        if step.reason is None and step.undivided is not None:
            what += f"; one matrix: {escape(step.undivided)}"
        if step.reason is None and step.parts:
            what += f"; {len(step.parts)} matrices"
        dtype = tensor.dtype if step.out_dtype is None else f"{tensor.dtype} -> {step.out_dtype}"
        yield f"{escape(tensor.name)}  {dtype} {shape}  {what}\n"
        for part in step.parts if step.reason is None else ():
            shape = "x".join(map(str, part.shape))
            yield f"{escape(tensor.name)}[{escape(part.name)}]  {dtype} {shape}\n"


def _noise(noise: NoiseSpec) -> dict[str, Any]:
    return {
        "distribution": noise.distribution,
        "scope": noise.scope,
        "granularity": noise.granularity,
        "seed": str(noise.seed),
        "lambda": noise.lam,
    }


def _step(step: Step) -> dict[str, Any]:
    return {
        "name": step.tensor.name,
        "file": step.tensor.file,
        "dtype": step.tensor.dtype,
        "out_dtype": step.out_dtype,
        "shape": list(step.tensor.shape),
        "action": step.action,
        "reason": step.reason,
        "lambda": step.lam,
        "stream": step.stream,
        "unsure": list(step.unsure),
        "parts": [asdict(part) for part in step.parts] if step.reason is None else [],
        "undivided": step.undivided,
        "told_by": step.told_by,
    }

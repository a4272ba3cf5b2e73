"""What perturb tells: a dry run's plan, and the summary of what was published."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from noisytune_cli.checkpoint.layout import index_suffix, is_weights
from noisytune_cli.cli.show import TOLD_BY, note, note_left_out, size_of, warn_all, write_out
from noisytune_cli.commands.perturb import Perturbed, Planned
from noisytune_cli.escape import escape
from noisytune_cli.manifest.write import left_out_json, noise_json
from noisytune_cli.records import Manifest, NoiseSpec, Step


def show_planned(planned: Planned, *, as_json: bool) -> None:
    """Print a dry run's plan on stdout: a tensor a line, then what is left out, then several outputs."""
    warn_all(planned.warnings)
    by_tensor = _by_tensor(planned)
    several = len(planned.plans) > 1
    if as_json:
        document = {
            "dry_run": True,
            "source": {"id": planned.id, "revision": planned.revision},
            "noise": _noise(planned.plan.noise),
            "tensors": [_step(steps[0]) for steps in by_tensor],
            "ties": [
                {"stream": tie.stream, "names": list(tie.all_names), "evidence": tie.evidence}
                for tie in planned.plan.ties
            ],
            "left_out": left_out_json(planned.left_out),
            "parameters": _parameters(planned),
            "bytes": planned.nbytes,
            "free": planned.free,
            **({"kept": list(planned.kept)} if planned.kept else {}),
        }
        if several:
            document["tensors"] = [
                _step(steps[0]) | {"lambdas": [step.lam for step in steps]} for steps in by_tensor
            ]
            document["outputs"] = [
                {"output": out, "noise": _noise(plan.noise)}
                for out, plan in zip(planned.outs, planned.plans, strict=True)
            ]
        write_out(json.dumps(document, indent=1) + "\n")
        return
    symbol = planned.plan.noise.symbol
    write_out((line for steps in by_tensor for line in _plan_lines(steps, symbol)), spelled=True)
    write_out((f"{escape(name)}  left out ({why})\n" for name, why in planned.left_out), spelled=True)
    if several:
        write_out(_output_lines(planned), spelled=True)
    counts = Counter(str(_telling(steps).reason or "perturb") for steps in by_tensor)
    found = ", ".join(f"{count} {what}" for what, count in counts.most_common())
    outputs = f"{len(planned.plans)} outputs of " if several else ""
    for out in planned.kept:
        note(f"would keep {escape(out, None)}: it is already what this would write")
    free = "" if planned.free is None else f", {size_of(planned.free)} are free"
    note(
        f"dry run: {len(by_tensor)} tensors: {found}; {_parameters(planned):,} parameters; "
        f"{outputs}{size_of(planned.nbytes)}{' in all' if several else ''} to write{free}; "
        "nothing was written"
    )


def show_perturbed(results: Sequence[Perturbed], *, as_json: bool, seconds: float) -> None:
    """Print the summary: a line for each output on stderr, or with `as_json` a document on stdout.

    Of several outputs the documents are a line each, in the outputs' order.
    """
    warn_all(
        dict.fromkeys(warning for result in results for warning in result.warnings),
        dict.fromkeys(name for result in results for name in result.cleared),
    )
    if as_json:
        indent = 1 if len(results) == 1 else None
        documents = (f"{json.dumps(_document(result), indent=indent)}\n" for result in results)
        write_out(documents, [result.output for result in results])
    for result in results:
        took = f" in {seconds:.1f} s" if len(results) == 1 and not result.skipped else ""
        note(f"{_summary(result)}{took}")
    if len(results) > 1:
        kept = sum(result.skipped for result in results)
        said = f"{len(results)} outputs" + (f", {kept} of them kept," if kept else "")
        note(f"{said} in {seconds:.1f} s")
    if not results[0].recipe:  # one source, so they all lack the same
        note_left_out(results[0].manifest.left_out)


def _document(result: Perturbed) -> dict[str, Any]:
    manifest = result.manifest
    return {
        "output": None if result.recipe else str(result.output),
        "manifest": str(result.manifest_path),
        "source": {"id": manifest.source.id, "revision": manifest.source.revision},
        "noise": _noise(manifest.noise),
        "tensors": len(manifest.receipts),
        "perturbed": sum(receipt.action == "perturb" for receipt in manifest.receipts),
        "copied": _copied(manifest),
        "weight_files": {"perturbed": len(manifest.source.files), "copied": _clean_weights(manifest)},
        "unchanged": sum(receipt.unchanged for receipt in manifest.receipts),
        "clamped": sum(receipt.clamped for receipt in manifest.receipts),
        "bytes": _bytes(manifest),
        "left_out": left_out_json(manifest.left_out),
        "skipped": result.skipped,
        "warnings": list(result.warnings),
    }


def _summary(result: Perturbed) -> str:
    """Say what was done to how many tensors, and where it went."""
    manifest, noise = result.manifest, result.manifest.noise
    perturbed = sum(receipt.action == "perturb" for receipt in manifest.receipts)
    others = ", ".join(f"{count} {reason}" for reason, count in _copied(manifest).items())
    spec = f"{_strength(noise)}, {noise.distribution}"
    told = f"{others}; {spec}" if others else spec
    noised, clean = len(manifest.source.files), _clean_weights(manifest)
    files = f" in {noised} of {noised + clean} weight files" if clean else ""
    what = f"{perturbed} of {len(manifest.receipts)} tensors{files} ({told}) -> {result.output}"
    if result.skipped:
        return f"kept {result.output}: it is already what this would write"
    if result.recipe:
        return f"wrote the recipe alone for {what}"
    return f"perturbed {what}: {size_of(_bytes(manifest))}"


def _strength(noise: NoiseSpec) -> str:
    """Say how strong the noise is and of which seed."""
    seeds = f"{len(noise.mix):,} seeds" if noise.mix else f"seed {noise.seed}"
    kept = "" if noise.kept == 1.0 else f", {noise.kept:g} of the weights kept"
    return f"{noise.symbol} {noise.lam:g}, {seeds}{kept}"


def _clean_weights(manifest: Manifest) -> int:
    """Return how many other weight files came along, which have no noise."""
    names = [name for name, _ in manifest.copied if is_weights(name) and index_suffix(name) is None]
    return len(names)


def _copied(manifest: Manifest) -> dict[str, int]:
    """Return how many tensors got no noise, by reason, the most frequent first."""
    return dict(Counter(str(r.reason) for r in manifest.receipts if r.action != "perturb").most_common())


def _bytes(manifest: Manifest) -> int:
    return sum(file.size for file in manifest.output_files)


def _parameters(planned: Planned) -> int:
    return sum(step.tensor.elements for step in planned.plan.steps)


def _by_tensor(planned: Planned) -> list[tuple[Step, ...]]:
    """Return for each tensor its steps, one for each λ: a seed changes nothing in them."""
    plans = {plan.noise.lam: plan for plan in planned.plans}
    return list(zip(*(plan.steps for plan in plans.values()), strict=True))


def _telling(steps: Sequence[Step]) -> Step:
    """Return the step that tells most of a tensor: one that perturbs it, if any does."""
    return next((step for step in steps if step.reason is None), steps[0])


def _output_lines(planned: Planned) -> Iterator[str]:
    for out, plan in zip(planned.outs, planned.plans, strict=True):
        name = "" if out is None else f"  {escape(out, None)}"
        yield f"output {plan.noise.symbol}={plan.noise.lam:g} seed={plan.noise.seed}{name}\n"


def _plan_lines(steps: Sequence[Step], symbol: str) -> Iterator[str]:
    """Yield what happens to one tensor, whose steps differ in λ alone, and to its parts."""
    step = _telling(steps)
    tensor = step.tensor
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    lams = ",".join(dict.fromkeys(f"{one.lam:g}" for one in steps))
    what = f"perturb {symbol}={lams}" if step.reason is None else f"{step.action} ({step.reason})"
    if step.reason == "buffer":
        what = f"copy (buffer, told by {TOLD_BY[step.told_by]})"
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
    if step.doubt:
        what += "; in doubt by its name"
    yield f"{escape(tensor.shown)}  {dtype} {shape}  {what}\n"
    for part in step.parts if step.reason is None else ():
        shape = "x".join(map(str, part.shape))
        yield f"{escape(tensor.shown)}[{escape(part.name)}]  {dtype} {shape}\n"


def _noise(noise: NoiseSpec) -> dict[str, Any]:
    told = noise_json(noise)
    keys = ("distribution", "scope", "granularity", "seed", "lambda", "sigma", "shrink", "mix")
    return {key: told[key] for key in keys if key in told}


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
        "doubt": step.doubt,
        **({"path": step.tensor.path} if step.tensor.path else {}),
    }

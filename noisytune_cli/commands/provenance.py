"""What a checkpoint's manifest says of where it came from: for the head of a page, so only what is plain."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.errors import NoisytuneError
from noisytune_cli.escape import list_some


@dataclass(frozen=True, slots=True)
class Provenance:
    """What was done, as (label, value), and the command that does it again; None where there is none."""

    facts: tuple[tuple[str, str], ...]
    replay: str | None = None


def provenance_of(checkpoint: Checkpoint) -> Provenance | None:
    """Return what the manifest that lies with a checkpoint's weights says, None without one to be read."""
    if checkpoint.previous_run is None:
        return None
    # Most weights have no manifest beside them, and should not wait for what reads one.
    from noisytune_cli.manifest.average import RecordedAverage, read_any_manifest
    from noisytune_cli.manifest.locate import manifest_of

    try:
        recorded = read_any_manifest(manifest_of(str(checkpoint.path)))
    except NoisytuneError:
        return None
    if isinstance(recorded, RecordedAverage):
        members = [f"{c:.4g} × {source.id}" for c, source in recorded.average.members]
        return Provenance((("made by", "average"), ("members", list_some(members))))
    manifest = recorded.manifest
    noise, source = manifest.noise, manifest.source
    facts = [
        ("base", source.id),
        ("commit", source.revision or ""),
        ("seed", noise.seeds),
        (noise.symbol, f"{noise.lam:g}"),
        (f"{noise.symbol} for", ", ".join(f"{pattern}: {lam:g}" for pattern, lam in noise.rules)),
        ("weights kept", f"{noise.kept:g}" if noise.kept < 1.0 else ""),
        ("distribution", noise.distribution),
        ("scope", noise.scope),
        ("granularity", noise.granularity if noise.granularity != "tensor" else ""),
        ("include", ", ".join(noise.include)),
        ("exclude", ", ".join(noise.exclude)),
        ("perturbed", f"{sum(r.action == 'perturb' for r in manifest.receipts):,} tensors"),
    ]
    base = source.id if source.revision is None else ""
    command = f"noisytune replay {shlex.quote(recorded.path.name)}"
    command += f" --base {shlex.quote(base)}" if base else ""
    return Provenance(
        tuple((label, value) for label, value in facts if value),
        f"{command} -o OUT",
    )

"""Add up the journals of long runs (`make soak`), for people and for the pages that show them.

python docs/long_runs.py [JOURNAL ...]      by default docs/long-runs.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
JOURNAL = DOCS / "long-runs.jsonl"

#: How a page names what the journal calls a kind, in the order of its table.
RELIABILITY = {
    "fault": "injected faults",
    "lost stage": "staging taken away",
    "kill": "random `kill -9`",
    "signal": "random SIGINT, SIGTERM, SIGHUP (every third twice)",
    "short transfer": "runs of short transfers",
    "power cut": "power cuts",
    "store fault": "runs into an object store that fails at random",
    "random command": "random commands, against the reference",
    "lost turn": "turns in which the harness itself failed",
    "kernel test under sanitizers": "kernels' tests under sanitizers",
}
_JOB = {
    "plan": "plan of a job",
    "steps": "steps of a share",
    "sums": "sums of a share",
    "receipt": "receipt of a share",
}
_READERS = {
    "header": "safetensors header",
    "index": "index",
    "config": "config",
    "pickle": "PyTorch file",
    "metadata": "`.metadata` of chunks",
    "chunks": "file of chunks",
    "manifest": "manifest",
    "parts": "manifest with parts",
    "moves": "what a killed run moved",
    **_JOB,
}
_QUICK = {
    "header": "safetensors header",
    "index": "index",
    "config": "config",
    "json": "JSON",
    "zip": "ZIP directory",
    "pickle": "pickle",
    "metadata": "`.metadata` of chunks",
    "manifest": "manifest",
    "mix": "file of a mixture",
    "patterns": "pattern and names",
    **_JOB,
}
SECURITY = {
    **{f"fuzz {key}": f"{name}, opened and read to its end" for key, name in _READERS.items()},
    **{f"fuzz quick-{key}": f"{name}, in memory" for key, name in _QUICK.items()},
}


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the lines of journals; a last one that was cut off is none."""
    lines = [line for path in paths if path.exists() for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]


def table(records: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """Return the sums of all kinds that have a name here, as a table in Markdown."""
    rows = [
        "| | tried | hit a running process | broke a promise | hours | on |",
        "| --- |" + " ---: |" * 4 + " --- |",
    ]
    for kind, name in names.items():
        of_kind = [
            record for record in records if record["kind"] == kind and (record["count"] or record["broken"])
        ]
        if not of_kind:
            continue
        count, broken = (sum(record[key] for record in of_kind) for key in ("count", "broken"))
        hits = [record["hit"] for record in of_kind if "hit" in record]
        hit = f"{sum(hits):,}" if hits else ""
        hours = sum(record["seconds"] for record in of_kind) / 3600
        dates = sorted({record["date"] for record in of_kind})
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        rows.append(f"| {name} | {count:,} | {hit} | {broken:,} | {hours:.2f} | {when} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    found = read([Path(name) for name in sys.argv[1:]] or [JOURNAL])
    print(table(found, RELIABILITY | SECURITY))
    print(f"commits: {', '.join(dict.fromkeys(record['commit'] for record in found))}")

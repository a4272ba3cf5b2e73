"""Write docs/cli.md from the commands' own --help, docs/json.md from the schemas, tables from the journal.

python docs/generate.py [--check]      with --check: only say whether it is current
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

# Help is wrapped to the terminal; the reference must not depend on whose terminal it was.
os.environ["COLUMNS"] = "100"
os.environ["NO_COLOR"] = "1"

import long_runs
import studies
from typer.main import get_command
from typer.testing import CliRunner

from noisytune_cli.cli.app import app

DOCS = Path(__file__).parent

HEAD = """# Command line reference

Made by `make docs` from `--help`; edit the docstrings and options in `noisytune_cli/cli/*.py` instead.
"""

TAIL = """
## Exit codes

| code | meaning |
| --- | --- |
| 0 | done and durable |
| 1 | a bug in noisytune (the traceback is kept) |
| 2 | usage |
| 3 | input malformed (an incomplete checkpoint too), unsafe or not supported |
| 4 | input missing or unreadable |
| 5 | output exists, is in use, or is unsafe to write |
| 6 | out of a resource, a write failed, or a package that is needed is not installed |
| 7 | hub, object store or network |
| 8 | input changed while read, or the answer is "does not match" |
| 130, 143, 129, 141 | stopped by SIGINT, SIGTERM, SIGHUP, a closed pipe |

An error is one line on stderr: `noisytune: error: WHAT: PATH[: tensor "NAME"]: WHY. NEXT STEP`. One of usage
is the command's usage, a hint at its help, and `Error: WHAT`.
"""


def reference() -> str:
    """Return the reference as Markdown."""
    runner = CliRunner()
    commands = [[], *([name] for name in get_command(app).commands)]  # type: ignore[attr-defined]
    sections = []
    for command in commands:
        result = runner.invoke(app, [*command, "--help"], prog_name="noisytune", terminal_width=100)
        if result.exit_code != 0:
            raise SystemExit(f"--help of {command} failed: {result.output}")
        title = " ".join(["noisytune", *command])
        text = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
        sections.append(f"\n## {title}\n\n```text\n{text}\n```\n")
    return HEAD + "".join(sections) + TAIL


JSON_HEAD = """# JSON

Made by `make docs` from the schemas in `noisytune_cli/cli/schemas`, which every document follows.

Documents go to stdout, alone; what people are told goes to stderr. Numbers round-trip, what does not exist is
null, names are as they are stored, and seeds of noise are strings, since they may not fit a float. Keys may
be added in later versions: skip those that you do not know. Keys in brackets are not always there. The
schemas (JSON Schema 2020-12) come with the package:

```python
from importlib.resources import files

schema = files("noisytune_cli.cli").joinpath("schemas/perturb.schema.json").read_text()
```

The manifest has a page of its own, [manifest.md](manifest.md).
"""

#: The schemas, in the order of the verbs.
SCHEMAS = ("perturb", "dry-run", "inspect", "histogram", "verify", "replay")
SCHEMAS += ("compare", "detect", "average", "plan", "status", "study")


def json_reference() -> str:
    """Return the page of the JSON of every verb."""
    folder = files("noisytune_cli.cli").joinpath("schemas")
    if untold := {file.name for file in folder.iterdir()} ^ {f"{name}.schema.json" for name in SCHEMAS}:
        raise SystemExit(f"told of here or there alone: {', '.join(sorted(untold))}")
    sections = []
    for name in SCHEMAS:
        schema = json.loads(folder.joinpath(f"{name}.schema.json").read_text(encoding="utf-8"))
        rows = [f"| `{key}` | {kind} | {text} |" for key, kind, text in _keys(schema, schema, "", set())]
        about = f"{schema.get('description', '')} Schema: `{name}.schema.json`.".lstrip() + "\n\n"
        table = "\n".join(["| key | value | |", "| --- | --- | --- |", *rows])
        sections.append(f"\n## {schema['title']}\n\n{about}{table}\n")
    return JSON_HEAD + "".join(sections)


def _keys(schema: Any, root: Any, before: str, told: set[str]) -> Iterator[tuple[str, str, str]]:
    """Yield each key with its path, what it holds and what it means; what is told once is not told again."""
    name = schema.get("$ref", "").removeprefix("#/$defs/")
    if name:
        if name in told:
            return
        told.add(name)
        schema = root["$defs"][name]
    for one in schema.get("anyOf", ()):
        yield from _keys(one, root, before, told)
    if "items" in schema:
        yield from _keys(schema["items"], root, f"{before}[]", told)
    if isinstance(schema.get("additionalProperties"), dict):
        yield from _keys(schema["additionalProperties"], root, f"{before}.NAME" if before else "NAME", told)
    for key, inner in schema.get("properties", {}).items():
        path = f"{before}.{key}" if before else key
        shown = path if key in schema["required"] else f"[{path}]"
        yield shown, _kind(inner, root), inner.get("description", "").replace("|", "\\|")
        yield from _keys(inner, root, path, told)


def _kind(schema: Any, root: Any) -> str:
    """Say what a value may be."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    if "anyOf" in schema:
        return ", ".join(_kind(one, root) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    kinds = schema["type"]
    return " or ".join([kinds] if isinstance(kinds, str) else kinds)


def _long_runs(page: str, names: Mapping[str, str]) -> str:
    records = long_runs.read([long_runs.JOURNAL])
    return _filled(page, {long_runs.JOURNAL.name: long_runs.table(records, names)})


def _filled(page: str, tables: Mapping[str, str]) -> str:
    """Return a page with today's tables between the marks that name their source."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for source, table in tables.items():
        begin, end = f"<!-- made by `make docs` from {source} -->\n", "<!-- end -->\n"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{page} has no place for the table of {source}")
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


PAGES: dict[str, Callable[[], str]] = {
    "cli.md": reference,
    "json.md": json_reference,
    "reliability.md": lambda: _long_runs("reliability.md", long_runs.RELIABILITY),
    "security.md": lambda: _long_runs("security.md", long_runs.SECURITY),
    "results.md": lambda: _filled("results.md", studies.tables()),
}


def main(arguments: list[str]) -> int:
    """Write the pages, or compare them."""
    for name, made in PAGES.items():
        text = made()
        if arguments == ["--check"]:
            if (DOCS / name).read_text(encoding="utf-8") != text:
                print(f"{name} is not current: run `make docs`", file=sys.stderr)
                return 1
        else:
            (DOCS / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

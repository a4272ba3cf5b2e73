"""Write docs/cli.md from the commands' own --help, so that the two cannot differ.

python docs/generate.py [--check]      with --check: only say whether it is current
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Help is wrapped to the terminal; the reference must not depend on whose terminal it was.
os.environ["COLUMNS"] = "100"
os.environ["NO_COLOR"] = "1"

from typer.main import get_command
from typer.testing import CliRunner

from noisytune_cli.cli.app import app

TARGET = Path(__file__).parent / "cli.md"

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
| 7 | hub or network |
| 8 | input changed while read, or the answer is "does not match" |
| 130, 143, 129, 141 | stopped by SIGINT, SIGTERM, SIGHUP, a closed pipe |

Usage errors look as above; every other error is one line on stderr:
`noisytune: error: WHAT: PATH[: tensor "NAME"]: WHY. NEXT STEP`.
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


def main(arguments: list[str]) -> int:
    """Write the reference, or compare it."""
    text = reference()
    if arguments == ["--check"]:
        if TARGET.read_text(encoding="utf-8") != text:
            print(f"{TARGET.name} is not current: run `make docs`", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

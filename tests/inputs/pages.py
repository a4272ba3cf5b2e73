"""The commands and the Python of README.md and docs/*.md, as a reader would copy them.

A fenced block of `sh` is commands; of `console` its lines after `$`, the others are what they print; of
`python` code; of `text` in docs/cli.md the examples at the end of a verb's help. What no test can run has
an HTML comment before it, which no reader sees: `<!-- not run: WHY -->`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}

#: Languages of blocks that hold nothing to run.
SILENT = {"text", "dockerfile", "mermaid", "json", "yaml", "jsonl"}

_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>.+?) -->\n\n?)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block; `why` says why it is not run, where it is not."""

    page: str
    line: int
    language: str
    text: str
    why: str | None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The lines that a shell would be given, continued ones joined."""
        text = self.text.replace("\\\n", " ")
        if self.language == "sh":
            lines = text.splitlines()
        elif self.language == "console":
            lines = re.findall(r"^\$ (.*)$", text, re.MULTILINE)
        elif self.language == "text" and self.page == "cli.md":
            lines = re.findall(r"^  (noisytune .*)$", text.partition("\nExamples:\n")[2], re.MULTILINE)
        else:
            lines = []
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = PAGES[page].read_text(encoding="utf-8")
    return [
        Block(
            page, text.count("\n", 0, found.start("text")) + 1, found["language"], found["text"], found["why"]
        )
        for found in _FENCE.finditer(text)
    ]

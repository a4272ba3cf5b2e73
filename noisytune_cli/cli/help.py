"""How help is laid out: options under headings, examples last.

An option stands under the heading that its `rich_help_panel` names (Typer's own word, which it heeds in
Rich's layout alone). The examples are the end of a verb's docstring, from a line `Examples:` on.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand

#: Headings that verbs share. They come in the order of their first options; `Options` has the rest.
NOISE = "Noise"
TENSORS = "Which tensors"
SOURCE = "Source"
OUTPUT = "Output"
RUNNING = "Running"

_EXAMPLES = "\nExamples:\n"
#: What Typer raises of whatever was typed wrongly, and how it begins to say that words are left over.
_REFUSED: Any = typer.BadParameter.__base__
_LEFT_OVER = "Got unexpected extra argument"

_DOCS = "Every option, with exit codes: docs/cli.md in the source."


@contextmanager
def usage_shown(ctx: Any) -> Iterator[None]:
    """Have what is refused shown with the command's usage, which Typer leaves out of a lone option."""
    try:
        yield
    except _REFUSED as error:
        if error.ctx is None:
            error.ctx, error.cmd = ctx, ctx.command
        raise


class HelpfulCommand(TyperCommand):
    """A command whose help has headings and examples, in plain text."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the pieces of the usage line, which versions of Typer make of other signs."""
        arguments = [one for one in self.get_params(ctx) if one.param_type_name == "argument"]
        return ["[OPTIONS]", *(f"{one.metavar}{'' if one.nargs == 1 else '...'}" for one in arguments)]

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write the docstring without its examples."""
        text = inspect.cleandoc(self.help or "").partition(_EXAMPLES)[0]
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(text)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options under their headings."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is None:
                continue
            if parameter.param_type_name == "argument":
                sections["Arguments"].append((re.sub(" <.*>$", "", record[0]), record[1]))
            else:
                panel = getattr(parameter, "rich_help_panel", None) or "Options"
                sections.setdefault(panel, []).append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, each on a line of its own, and where there is more to read."""
        examples = inspect.cleandoc(self.help or "").partition(_EXAMPLES)[2]
        if examples:
            formatter.write_paragraph()
            formatter.write(f"Examples:\n{examples.rstrip()}\n")
        formatter.write_paragraph()
        formatter.write(f"{_DOCS}\n")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as Typer does; of what it refuses drop the words that the library behind it puts before."""
        with usage_shown(ctx):
            try:
                return super().parse_args(ctx, args)
            except _REFUSED as error:
                error.message = error.message.removeprefix("Value error, ")
                writes = any(one.metavar == "OUT" and "-o" in one.opts for one in self.params)
                if writes and error.message.startswith(_LEFT_OVER):
                    error.message += ". The output goes after -o, and patterns stand in quotes."
                raise

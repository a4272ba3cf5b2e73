"""Arguments and options that several commands share, as types to annotate a parameter with."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from noisytune_cli.cli.help import OUTPUT, RUNNING, SOURCE, TENSORS
from noisytune_cli.cli.parse import decimal


class Granularity(StrEnum):
    tensor = "tensor"
    matrix = "matrix"


def number(text: str | float) -> float:
    """Read an option that is one number."""
    try:
        return decimal(str(text))
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no number.") from None


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A weight file (safetensors or a PyTorch pickle), a checkpoint's folder, a hub id (NAME or "
        "OWNER/NAME), or an address in an object store (s3://…).",
        show_default=False,
    ),
]
Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE",
        help="Weight files (safetensors or PyTorch pickles), checkpoints' folders, hub ids (NAME or "
        "OWNER/NAME), or addresses in an object store (s3://…).",
        show_default=False,
    ),
]
Patterns = list[str] | None
GranularityOption = Annotated[
    Granularity,
    typer.Option(
        help="What has a std of its own: each tensor, or each matrix of those that hold several "
        "(fused attention, stacked experts).",
        rich_help_panel=TENSORS,
    ),
]
Splits = Annotated[
    Patterns,
    typer.Option(
        metavar="PATTERN=DIM:SIZES",
        help="With --granularity matrix: the matrices in these tensors, such as 0:4096,1024,1024 or 0:/3 "
        "(three equal ones); beats what is known of the model.",
        rich_help_panel=TENSORS,
    ),
]
Maps = Annotated[
    Patterns,
    typer.Option(
        "--map",
        metavar="PATTERN=NAME",
        help="What a tensor is called there: each * of PATTERN stands for the * of NAME, such as "
        "'bert.*=*'. A prefix is found by itself.",
        rich_help_panel=TENSORS,
    ),
]


class ReportFormat(StrEnum):
    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"
    html = "html"


Format = Annotated[
    ReportFormat | None,
    typer.Option(
        "--format",
        help="How to print. [default: by the ending of --out, else table]",
        rich_help_panel=OUTPUT,
    ),
]
Report = Annotated[
    str | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FILE",
        help="Write to a new file in place of stdout.",
        rich_help_panel=OUTPUT,
    ),
]
Raw = Annotated[
    bool,
    typer.Option(
        "--raw",
        help="In CSV, put no apostrophe before what a spreadsheet would take for a formula.",
        rich_help_panel=OUTPUT,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The weights or index in the folder, where there are several.",
        rich_help_panel=SOURCE,
    ),
]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a hub id.", rich_help_panel=SOURCE)
]
Components = Annotated[
    str | None,
    typer.Option(
        "--component",
        metavar="NAME,…",
        help="Of a folder of several models (a pipeline of diffusers), the folders of those that are meant, "
        "or all.",
        rich_help_panel=SOURCE,
    ),
]
JobOut = Annotated[
    str,
    typer.Argument(
        metavar="OUT",
        help="The output, as noisytune plan was given it: with its placeholders where it has any.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=256,
        metavar="N",
        help="Threads; the result does not depend on it. [default: the CPUs, up to 8]",
        rich_help_panel=RUNNING,
    ),
]
Direct = Annotated[
    bool | None,
    typer.Option(
        "--direct/--no-direct",
        help="Write past the page cache, where the output then is not. [default: if it would take half of "
        "the free memory]",
        show_default=False,
        rich_help_panel=RUNNING,
    ),
]
Mmap = Annotated[
    bool,
    typer.Option(
        "--mmap/--no-mmap",
        help="Map the source instead of reading it: a little faster on a local disk, but a file that "
        "shrinks meanwhile kills the process.",
        rich_help_panel=SOURCE,
    ),
]
BuffersFrom = Annotated[
    str,
    typer.Option(
        metavar="auto|names|model",
        help="What tells buffers from parameters: their names, a model that its library builds from "
        "config.json without weights, or the model only where the names leave a doubt.",
        rich_help_panel=TENSORS,
    ),
]
Device = Annotated[
    str,
    typer.Option(metavar="DEVICE", help="Where to compute: cpu, cuda, cuda:N, mps.", rich_help_panel=RUNNING),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace an existing output: a folder that noisytune wrote, or a weight file.",
        rich_help_panel=OUTPUT,
    ),
]
OverwriteChanged = Annotated[
    bool,
    typer.Option(
        "--overwrite-changed",
        help="Replace an existing output also where its files were changed since noisytune wrote them; else "
        "--overwrite refuses that.",
        rich_help_panel=OUTPUT,
    ),
]
Card = Annotated[
    bool,
    typer.Option(
        "--card",
        help="Write the model card (README.md) anew: what was done and to which model, without its scores.",
        rich_help_panel=OUTPUT,
    ),
]
FollowLinks = Annotated[
    bool,
    typer.Option(
        "--follow-links",
        help="Read files that links lead to outside the folder too; an output holds what they hold.",
        rich_help_panel=SOURCE,
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=RUNNING)
]
#: What prints heeds it (`show.errors_alone`), so that verbs have it in their signatures alone.
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.", rich_help_panel=RUNNING)
]

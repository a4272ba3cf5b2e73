"""`noisytune study`: its options, which are many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from noisytune_cli.cli.help import OUTPUT, RUNNING
from noisytune_cli.cli.options import Quiet, Revision
from noisytune_cli.errors import UsageError

_T = TypeVar("_T")

_MAX_SEED = 2**63 - 1

#: What the NoisyTune paper searches; its 0 is plain.
_SEARCHED = "0.05,0.1,0.15,0.2,0.25,0.3"

#: Headings of the help that only a study has.
_ROWS, _METHODS, _SEEDS, _TRAINING = "Rows", "Methods", "Seeds", "Training"


class _Format(StrEnum):
    table = "table"
    json = "json"
    html = "html"


class _Precision(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class _Anchor(StrEnum):
    original = "original"
    noised = "noised"


def study(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A checkpoint's folder with its tokenizer, or a hub id.", show_default=False
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            metavar="OUT",
            help="The study's folder; one that holds this study is continued.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="A GLUE task: cola, mrpc, rte, sst2, stsb, wnli. Of several also what they say together.",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="The folder of the GLUE tasks, or of this one; or one with splits of your own.",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Rows to train on: .tsv, .csv, .jsonl, .parquet or .arrow; or a folder of such.",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    dev: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows to report the score of.", rich_help_panel=_ROWS)
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="A[,B]", help="The column of the text, or two of a pair.", rich_help_panel=_ROWS
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option(metavar="C", help="The column of the label.", rich_help_panel=_ROWS)
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="M,…",
            help="accuracy, f1, macro_f1, matthews; or, for numbers, pearson, spearman. The first counts. "
            "[default: the task's, else accuracy]",
            show_default=False,
            rich_help_panel=_ROWS,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME,…",
            help="Methods to compare; A+B is both together (noisytune+mixout).",
            rich_help_panel=_METHODS,
        ),
    ] = "plain,noisytune",
    lam: Annotated[
        str | None,
        typer.Option(
            "--lambda",
            metavar="λ,…",
            help="noisytune's λ; of several one is chosen on the held-out rows. [default: 0.15]",
            show_default=False,
            rich_help_panel=_METHODS,
        ),
    ] = None,
    choose: Annotated[
        bool,
        typer.Option(
            "--choose",
            help="Search λ as the NoisyTune paper does: 0.05 to 0.3, or what --lambda says.",
            rich_help_panel=_METHODS,
        ),
    ] = False,
    noise: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="noisytune's noise: uniform, gaussian. [default: uniform]",
            rich_help_panel=_METHODS,
        ),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="noisytune's scope: matrix, global. [default: matrix]",
            rich_help_panel=_METHODS,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="METHOD.KEY=VALUE",
            help="A constant of a method, such as r3f.lambda=0.7.",
            rich_help_panel=_METHODS,
        ),
    ] = None,
    seed: Annotated[
        str,
        typer.Option(
            metavar="N,N-M,…", help="Seeds; every method gets the same ones.", rich_help_panel=_SEEDS
        ),
    ] = "0-5",
    init_seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=_MAX_SEED, metavar="N", help="One seed of the head for all.", rich_help_panel=_SEEDS
        ),
    ] = None,
    order_seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=_MAX_SEED,
            metavar="N",
            help="One seed of batches and dropout for all.",
            rich_help_panel=_SEEDS,
        ),
    ] = None,
    noise_seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=_MAX_SEED, metavar="N", help="One seed of the noise for all.", rich_help_panel=_SEEDS
        ),
    ] = None,
    share: Annotated[
        str,
        typer.Option(
            metavar="X,…", help="Shares of the training rows, each a study of its own.", rich_help_panel=_ROWS
        ),
    ] = "1",
    train_rows: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Train on N rows, drawn once. [default: all]", rich_help_panel=_ROWS
        ),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Rows of the training file that λ is chosen on. [default: 500, at most a fifth]",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    data_seed: Annotated[
        int,
        typer.Option(
            min=0, max=_MAX_SEED, metavar="N", help="Seed of the choice of rows.", rich_help_panel=_ROWS
        ),
    ] = 0,
    probe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Also learn this GLUE task from each finetuned encoder, frozen, and score it.",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Passes over the rows.", rich_help_panel=_TRAINING)
    ] = 3,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rows of a step.", rich_help_panel=_TRAINING)
    ] = 16,
    learning_rate: Annotated[
        float, typer.Option(min=0.0, metavar="X", help="AdamW's peak rate.", rich_help_panel=_TRAINING)
    ] = 2e-5,
    weight_decay: Annotated[
        float, typer.Option(min=0.0, metavar="X", help="AdamW's decay.", rich_help_panel=_TRAINING)
    ] = 0.01,
    warmup: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="X",
            help="Share of the steps with a rising rate.",
            rich_help_panel=_TRAINING,
        ),
    ] = 0.1,
    max_length: Annotated[
        int, typer.Option(min=4, metavar="N", help="Tokens of a row.", rich_help_panel=_TRAINING)
    ] = 128,
    group_by_length: Annotated[
        bool,
        typer.Option(
            "--group-by-length",
            help="Make batches of rows of similar length: less padding.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    anchor: Annotated[
        _Anchor,
        typer.Option(
            help="The weights that mixout and recadam hold on to, with noisytune.", rich_help_panel=_METHODS
        ),
    ] = _Anchor.original,
    lora: Annotated[
        bool,
        typer.Option("--lora", help="Train low-rank adapters and the head only.", rich_help_panel=_TRAINING),
    ] = False,
    lora_rank: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Rank of the adapters. [default: 8]", rich_help_panel=_TRAINING
        ),
    ] = None,
    lora_alpha: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Scale of the adapters. [default: 16]", rich_help_panel=_TRAINING
        ),
    ] = None,
    lora_dropout: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=0.99,
            metavar="X",
            help="Dropout before the adapters. [default: 0.1]",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N.", rich_help_panel=RUNNING),
    ] = "cpu",
    precision: Annotated[
        _Precision,
        typer.Option(
            help="Of the forward and backward pass; auto is bfloat16 where the device computes in it.",
            rich_help_panel=_TRAINING,
        ),
    ] = _Precision.auto,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=256,
            metavar="N",
            help="Threads of each job. [default: the CPUs, up to 8, shared]",
            rich_help_panel=RUNNING,
        ),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            min=1, max=64, metavar="N", help="Runs at once, a process each.", rich_help_panel=RUNNING
        ),
    ] = 1,
    revision: Revision = None,
    report_only: Annotated[
        bool,
        typer.Option(
            "--report-only",
            help="Carry out no runs: report those that are finished.",
            rich_help_panel=RUNNING,
        ),
    ] = False,
    output_format: Annotated[
        _Format,
        typer.Option(
            "--format",
            help="Print the table, results.json, or the page that lies in OUT as report.html.",
            rich_help_panel=OUTPUT,
        ),
    ] = _Format.table,
    as_json: Annotated[
        bool, typer.Option("--json", help="The same as --format json.", rich_help_panel=RUNNING)
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Finetune with several methods and the same seeds, and tell what differs by more than chance.

    Every finished run is kept, so a study that was stopped continues with the same command; more methods, λ,
    shares and seeds may be asked for later. Needs the extra: pip install '.[study]' in a clone.

    Examples:
      noisytune study bert-base-uncased --task rte --data ./glue --seed 0-5 -o ./study-rte
      noisytune study ./bert --train train.csv --dev dev.csv --text text --label label -o ./study
      noisytune study ./bert --task rte --data ./glue --method plain,noisytune,mixout -o ./study-rte
      noisytune study ./bert --task rte --data ./glue --choose -o ./study-lambda
    """
    from noisytune_cli.cli import show, show_study
    from noisytune_cli.cli.parse import check_out, format_of, numbers, read_seeds, refuse_given, words
    from noisytune_cli.cli.study_page import NAME, study_page
    from noisytune_cli.study import study as command
    from noisytune_cli.study.journal import write_durably
    from noisytune_cli.study.settings import Recipe

    check_out(out)
    wanted = None if output_format is _Format.table else output_format.value
    printed = format_of(wanted, None, as_json=as_json)
    as_json, as_html = printed == "json", printed == "html"
    tasks = _listed("--task", task)
    methods = _once(words("--method", method))
    if not lora:
        adapters = {"--lora-rank": lora_rank, "--lora-alpha": lora_alpha, "--lora-dropout": lora_dropout}
        refuse_given(adapters, None, "it is of adapters, and all weights are trained", "Add --lora")
    if not any("noisytune" in one.split("+") for one in methods):
        refuse_given(
            {"--lambda": lam, "--noise": noise, "--scope": scope},
            None,
            "it is of noisytune, which is none of the methods",
            "Add noisytune to --method; constants of the others are set by --set METHOD.KEY=VALUE",
        )
    holds = ({"noisytune", name} <= set(one.split("+")) for one in methods for name in ("mixout", "recadam"))
    if anchor is _Anchor.noised and not any(holds):
        refuse_given(
            {"--anchor noised": anchor},
            None,
            "no method holds on to weights that noisytune has changed",
            "Add noisytune+mixout or noisytune+recadam to --method, or leave it out",
        )
    if train and dev and not probe:
        why = "the rows are those of --train and --dev"
        refuse_given({"--data": data}, None, why, "Leave it out, or the two others")
    request = command.StudyRequest(
        model=model,
        out=os.path.expanduser(out),
        methods=methods,
        task=tasks[0] if tasks else None,
        data=_home(data),
        train=_home(train),
        dev=_home(dev),
        text=_listed("--text", text),
        label=label,
        metrics=_listed("--metric", metric),
        lambdas=_once(numbers("--lambda", _given(lam, _SEARCHED if choose else "0.15"), 0)),
        choose=choose,
        noises=_once(words("--noise", _given(noise, "uniform"), ("uniform", "gaussian"))),
        scopes=_once(words("--scope", _given(scope, "matrix"), ("matrix", "global"))),
        shares=_once(numbers("--share", share, 0, 1)),
        seeds=_once(read_seeds(seed, _MAX_SEED)),
        init_seed=init_seed,
        order_seed=order_seed,
        noise_seed=noise_seed,
        settings=settings or (),
        train_rows=train_rows,
        held_out=held_out,
        data_seed=data_seed,
        probe=probe,
        recipe=Recipe(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup=warmup,
            max_length=max_length,
            group_by_length=group_by_length,
            anchor=anchor.value,
            lora_rank=(lora_rank or 8) if lora else 0,
            lora_alpha=lora_alpha or 16,
            lora_dropout=0.1 if lora_dropout is None else lora_dropout,
        ),
        precision=precision.value,
        revision=revision,
        device=device,
        threads=threads,
        jobs=jobs,
        report_only=report_only,
    )

    def progress(steps: int) -> AbstractContextManager[Callable[[int], None]]:
        return show.progress(steps, "study", of_steps=True)

    if len(tasks) < 2:
        studied, together = [command.study(request, tell=show.note, progress=progress)], None
    elif as_html:
        raise UsageError(
            "--format html with several tasks",
            why="each of them has a page of its own",
            next_step="Leave it out, and open report.html in each task's folder",
        )
    else:
        studied, together = command.study_tasks(request, tasks, tell=show.note, progress=progress)
    for one in studied:
        page = "".join(
            study_page(one.results, one.folder, show_study.COLUMNS, show_study.study_rows(one.results))
        )
        write_durably(one.folder / NAME, page.encode())
        if as_html:
            show.write_out(page)
        is_printed = as_html or (as_json and together is not None)
        show_study.show_study(one.results, one.folder, as_json=as_json, is_printed=is_printed)
    if together is not None:
        show_study.show_together(together, Path(request.out), as_json=as_json)


def _home(path: str | None) -> str | None:
    """Return a path with a leading `~` as the home directory: a shell leaves that of --data=~/glue."""
    return None if path is None else os.path.expanduser(path)


def _given(text: str | None, default: str) -> str:
    """Return what was given: an empty text, as of a shell's variable that is not set, is no default."""
    return default if text is None else text


def _listed(option: str, text: str | None) -> tuple[str, ...]:
    """Return the words of a comma list, each once; none where it is not given."""
    from noisytune_cli.cli.parse import words

    return () if text is None else _once(words(option, text))


def _once(values: Iterable[_T]) -> tuple[_T, ...]:
    """Return the items of a list, each once."""
    return tuple(dict.fromkeys(values))

"""study: finetune a checkpoint with several methods and seeds, and tell what differs by more than chance.

Everything that can be refused is refused before a model is loaded: methods, options, rows, the folder. Then
every run that the folder lacks is carried out and recorded, one durable line each, and what all recorded runs
say together is written beside them. So a study that was stopped continues, and a finished one is only shown.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisytune_cli import __version__
from noisytune_cli.checkpoint import open_checkpoint
from noisytune_cli.crew import default_threads
from noisytune_cli.errors import InputInvalid, ResourceExhausted, UsageError, unreadable
from noisytune_cli.study import metrics, tasks
from noisytune_cli.study.settings import Material, Recipe, record

if TYPE_CHECKING:
    from noisytune_cli.study.design import Run

#: Reports progress: entered with the steps in all, gives what is called with the steps just done.
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]

#: What the extra `study` brings; peft only where --lora asks for it.
_PACKAGES = ("transformers", "sklearn", "scipy", "matplotlib")


@dataclass(frozen=True)
class Request:
    """What is asked for: the model, the rows, the runs and the recipe. λ, noise and scope are noisytune's."""

    model: str
    out: str
    methods: Sequence[str] = ("plain", "noisytune")
    task: str | None = None
    data: str | None = None
    train: str | None = None
    dev: str | None = None
    text: Sequence[str] = ()
    label: str | None = None
    metrics: Sequence[str] = ()
    lambdas: Sequence[float] = (0.15,)
    noises: Sequence[str] = ("uniform",)
    scopes: Sequence[str] = ("matrix",)
    shares: Sequence[float] = (1.0,)
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    init_seed: int | None = None
    order_seed: int | None = None
    noise_seed: int | None = None
    settings: Sequence[str] = ()
    train_rows: int | None = None
    held_out: int | None = None
    data_seed: int = 0
    probe: str | None = None
    recipe: Recipe = field(default_factory=Recipe)
    revision: str | None = None
    device: str = "cpu"
    threads: int | None = None
    jobs: int = 1
    report_only: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Studied:
    """A study's outcome: the folder, its results, the runs in their order, and how many were new."""

    folder: Path
    results: dict[str, Any]
    runs: tuple[dict[str, Any], ...]
    carried_out: int


def study(request: Request, *, progress: Progress = lambda steps: nullcontext(lambda done: None)) -> Studied:
    """Carry out the runs that are asked for and not yet recorded; each is kept as soon as it is done."""
    _check_packages(lora=bool(request.recipe.lora_rank))
    from noisytune_cli.study.combination import read_settings
    from noisytune_cli.study.design import Seeds, plan_runs, split_rows
    from noisytune_cli.study.journal import Journal
    from noisytune_cli.study.outputs import write_outputs

    task, train, dev = _task(request)
    runs = plan_runs(
        request.methods,
        lambdas=request.lambdas,
        noises=request.noises,
        scopes=request.scopes,
        shares=request.shares,
        seeds=Seeds(request.seeds, request.init_seed, request.order_seed, request.noise_seed),
        settings=read_settings(request.settings),
    )
    data = tasks.read_data(task, train, dev)
    split = split_rows(
        len(data.train),
        train_rows=request.train_rows,
        held_out=request.held_out,
        seed=request.data_seed,
    )
    with open_checkpoint(request.model, revision=request.revision, quiet=request.quiet) as source:
        if source.single_file:
            raise InputInvalid(
                "cannot study a weight file alone",
                path=request.model,
                why="a study needs the model's config and tokenizer too",
                next_step="Give the folder that it lies in",
            )
        parameters = sum(tensor.elements for tensor in source.tensors)
        model = {"id": source.id, "revision": source.revision, "parameters": parameters}
        digests = {
            "model": _digest(source.root / file.name for file in source.sources),
            "train": _digest([train]),
            "dev": _digest([dev]),
        }
        folder = source.root
    material = Material(
        model=folder,
        task=task,
        train=train,
        dev=dev,
        train_rows=len(split.train),
        held_out=len(split.held_out),
        data_seed=request.data_seed,
        **_probe(request),
    )
    threads = request.threads or max(1, default_threads() // request.jobs)
    kind = _check_device(request.device)
    document = {
        "schema": 1,
        "tool": {"name": "noisytune", "version": __version__},
        "settings": record(material, request.recipe, digests, kind),
        "model": model,
        "task": task.name,
        "primary": task.metrics[0],
        "regression": task.regression,
        "label_names": list(data.label_names),
        "dev_labels": [label if task.regression else int(label) for label in data.dev.labels],
        "machine": _machine(request.device, threads, request.jobs),
        "design": [run.record() for run in runs],
    }
    with Journal(Path(request.out), document) as journal:
        lacking = [run for run in runs if run.key not in journal.runs and not request.report_only]
        if lacking:
            _carry_out(request, material, lacking, parameters, threads, journal.add, progress)
        finished = tuple(
            journal.runs[run["key"]] for run in journal.study["design"] if run["key"] in journal.runs
        )
        results = write_outputs(journal.folder, journal.study, finished)
        return Studied(journal.folder, results, finished, len(lacking))


def _carry_out(
    request: Request,
    material: Material,
    runs: Sequence[Run],
    parameters: int,
    threads: int,
    add: Callable[[dict[str, Any]], None],
    progress: Progress,
) -> None:
    from noisytune_cli.study.workers import Place, carry_out, check_memory

    check_memory(parameters, request.jobs)
    recipe = request.recipe
    place = Place(request.device, request.jobs, threads)
    rows = material.train_rows or 0
    steps = sum(recipe.epochs * -(-max(1, round(rows * run.share)) // recipe.batch_size) for run in runs)
    with progress(steps) as report, _stated_memory():
        for done in carry_out(material, recipe, runs, place, report):
            add(done)


def _task(request: Request) -> tuple[tasks.Task, Path, Path]:
    """Return the task and its files, one of the two ways in which it can be named."""
    chosen = tuple(request.metrics)
    known = (*metrics.CLASSIFICATION, *metrics.REGRESSION)
    for name in chosen:
        if name not in known:
            raise UsageError(
                f"--metric {name}", why="there is no such metric", next_step=f"Use one of: {', '.join(known)}"
            )
    if len({name in metrics.REGRESSION for name in chosen}) > 1:
        raise UsageError(
            f"--metric {','.join(chosen)}",
            why="some are of classes and some of numbers",
            next_step=f"Give either some of {', '.join(metrics.CLASSIFICATION)}, "
            f"or some of {', '.join(metrics.REGRESSION)}",
        )
    if request.task is not None:
        if request.train or request.dev or request.text or request.label:
            raise UsageError(
                f"--task {request.task} with --train, --dev, --text or --label",
                why="the task's files and columns are known",
                next_step="Give --task and --data, or the files and columns",
            )
        if request.data is None:
            raise UsageError(
                f"--task {request.task} without --data",
                why="nothing is downloaded",
                next_step="Name the folder of the GLUE tasks with --data",
            )
        task = tasks.glue_task(request.task)
        train, dev = tasks.glue_files(task, Path(request.data))
        if chosen:
            task = tasks.Task(task.name, task.text, task.label, chosen, task.header)
        return task, train, dev
    if not (request.train and request.dev and request.text and request.label):
        raise UsageError(
            "no task",
            why="neither a task's name nor its files and columns are given",
            next_step="Give --task NAME --data DIR, or --train, --dev, --text and --label",
        )
    if len(request.text) > 2:
        raise UsageError(
            f"--text {','.join(request.text)}",
            why="a row is one text or a pair",
            next_step="Name one column or two",
        )
    train = Path(request.train)
    return (
        tasks.Task(train.stem, tuple(request.text), request.label, chosen or ("accuracy",)),
        train,
        Path(request.dev),
    )


def _probe(request: Request) -> dict[str, Any]:
    """Return the probe's part of the material: a GLUE task from the folder of --data."""
    if request.probe is None:
        return {}
    task = tasks.glue_task(request.probe)
    if request.data is None:
        raise UsageError(
            f"--probe {request.probe} without --data",
            why="nothing is downloaded",
            next_step="Name the folder of the GLUE tasks with --data",
        )
    train, dev = tasks.glue_files(task, Path(request.data))
    tasks.read_data(task, train, dev)
    return {"probe": task, "probe_train": train, "probe_dev": dev}


def _check_packages(*, lora: bool) -> None:
    """Refuse to begin without what the extra brings."""
    wanted = (*_PACKAGES, "peft") if lora else _PACKAGES
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise ResourceExhausted(
            "cannot study",
            why=f"not installed: {', '.join(missing)}",
            next_step="Install the extra: pip install 'noisytune[study]'",
        )


def _check_device(device: str) -> str:
    """Return the device's kind; UsageError for one that is not there."""
    import torch

    kind = device.partition(":")[0]
    try:
        if kind not in ("cpu", "cuda"):
            raise ValueError("a study runs on cpu, cuda or cuda:N")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no such device here")
        torch.empty(1, device=device)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"--device {device}", why=str(error).splitlines()[0], next_step="Use --device cpu"
        ) from None
    return kind


def _digest(paths: Iterator[Path] | list[Path]) -> str:
    """Return one digest of some files' bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        try:
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise unreadable(error, path) from error
    return f"blake2b:{digest.hexdigest()}"


def _machine(device: str, threads: int, jobs: int) -> dict[str, Any]:
    """Say what the first runs of a study were carried out with."""
    import os

    import torch
    import transformers

    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "threads": threads,
        "jobs": jobs,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextmanager
def _stated_memory() -> Iterator[None]:
    """Say what a failed allocation on the host means here."""
    try:
        yield
    except MemoryError as error:
        raise ResourceExhausted(
            "out of memory",
            why="a run does not fit; finished runs are kept",
            next_step="Use a smaller --batch-size or --max-length, or fewer --jobs",
        ) from error

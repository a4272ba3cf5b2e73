"""study: finetune a checkpoint with several methods and seeds, and tell what differs by more than chance.

Everything that can be refused is refused before a model is loaded: methods, options, rows, the folder. Then
every run that the folder lacks is carried out and recorded, one durable line each, and what all recorded runs
say together is written beside them. So a study that was stopped continues, and a finished one is only shown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisytune_cli.checkpoint.address import is_address
from noisytune_cli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from noisytune_cli.checkpoint.config import ADAPTER_CONFIG
from noisytune_cli.engine.threads import default_threads
from noisytune_cli.errors import InputInvalid, UsageError, unreadable
from noisytune_cli.study import machine
from noisytune_cli.study.data.tasks import check_apart, choose_glue, choose_task, glue_task, read_data
from noisytune_cli.study.report import wording
from noisytune_cli.study.settings import Material, Recipe, record
from noisytune_cli.version import __version__

if TYPE_CHECKING:
    from noisytune_cli.study.data.splits import Files
    from noisytune_cli.study.data.tasks import Data, Task
    from noisytune_cli.study.design import Run, Split
    from noisytune_cli.study.journal import Journal

#: Reports progress: entered with the steps in all, gives what is called with the steps just done.
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class StudyRequest:
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
    choose: bool = False
    noises: Sequence[str] = ("uniform",)
    scopes: Sequence[str] = ("matrix",)
    shares: Sequence[float] = (1.0,)
    seeds: Sequence[int] = (0, 1, 2, 3, 4, 5)
    init_seed: int | None = None
    order_seed: int | None = None
    noise_seed: int | None = None
    settings: Sequence[str] = ()
    train_rows: int | None = None
    held_out: int | None = None
    data_seed: int = 0
    probe: str | None = None
    recipe: Recipe = field(default_factory=Recipe)
    precision: str = "auto"
    revision: str | None = None
    device: str = "cpu"
    threads: int | None = None
    jobs: int = 1
    report_only: bool = False


@dataclass(frozen=True)
class Studied:
    """A study's outcome: its folder, and what its finished runs say together."""

    folder: Path
    results: dict[str, Any]


def study(
    request: StudyRequest,
    *,
    tell: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda steps: nullcontext(lambda done: None),
) -> Studied:
    """Carry out the runs that are asked for and not yet recorded; each is kept as soon as it is done.

    `tell` is called before the first of them with what so few seeds cannot show, where that is so.
    """
    if is_address(request.model):
        raise UsageError(
            "cannot study a model in an object store",
            path=request.model,
            why="every run loads it anew",
            next_step="Copy its folder here, and give that",
        )
    machine.check_packages(lora=bool(request.recipe.lora_rank))
    kind = machine.check_device(request.device)
    precision = machine.choose_precision(request.precision, request.device)
    request = replace(request, recipe=replace(request.recipe, precision=precision))
    from noisytune_cli.study.combination import combine, read_settings
    from noisytune_cli.study.design import Seeds, plan_runs
    from noisytune_cli.study.journal import Journal
    from noisytune_cli.study.report.results import foresee
    from noisytune_cli.study.report.write import write_outputs
    from noisytune_cli.study.training.metrics import constant_score

    task, train, dev = _choose_task(request)
    settings = read_settings(request.settings)
    _check_used(settings, request.methods)
    runs = plan_runs(
        request.methods,
        lambdas=request.lambdas,
        noises=request.noises,
        scopes=request.scopes,
        shares=request.shares,
        seeds=Seeds(request.seeds, request.init_seed, request.order_seed, request.noise_seed),
        settings=settings,
    )
    for method in request.methods:
        combine(method, settings).check(request.recipe.learning_rate)
    data, split = _divided(request, task, train, dev)
    probe, probe_files = _probe(request)
    if request.task is not None and "probe" in probe:
        check_apart("--probe", probe["probe"].name, probe["probe_train"], {task.name: train})
    with open_checkpoint(request.model, revision=request.revision, follow_links=True) as source:
        _check_folder(source, request.model)
        parameters = sum(tensor.elements for tensor in source.tensors)
        digests = {
            "model": _digest(source.root / file.name for file in source.sources),
            "config": _digest(_read_by_transformers(source)),
            "train": _digest(train),
            "dev": _digest(dev),
            "probe_data": _digest(probe_files) if probe_files else None,
        }
    material = Material(
        model=source.root,
        task=task,
        train=train,
        dev=dev,
        train_rows=len(split.train),
        held_out=len(split.held_out),
        data_seed=request.data_seed,
        **probe,
    )
    threads = request.threads or max(1, default_threads() // request.jobs)
    dev_labels = [label if task.regression else int(label) for label in data.dev.labels]
    document = {
        "schema": 1,
        "tool": {"name": "noisytune", "version": __version__},
        "settings": record(material, request.recipe, digests, kind),
        "model": {
            "id": source.id,
            "revision": source.revision,
            "parameters": parameters,
            **({"earlier": source.previous_run.what} if source.previous_run else {}),
            **_other_order(source.config, data.label_names),
        },
        "task": task.name,
        "primary": task.metrics[0],
        "regression": task.regression,
        "label_names": list(data.label_names),
        "constant_score": constant_score(task.metrics[0], dev_labels, len(data.label_names)),
        "dev_labels": dev_labels,
        "repeated": _repeated(data, split),
        "machine": machine.describe_machine(request.device, threads, request.jobs),
        "design": [run.record() for run in runs],
    }
    with Journal(Path(request.out), document, grow=not request.report_only) as journal:
        lacking = [run for run in runs if run.key not in journal.runs and not request.report_only]
        if lacking:
            foreseen = foresee(journal.study["design"])
            if foreseen is not None and (weak := wording.too_few(*foreseen)):
                tell(weak)
            for told in (
                *wording.earlier(journal.study),
                *wording.other_order(journal.study),
                *wording.repeated(journal.study),
                *(wording.elsewhere(journal.study, document) if journal.runs else ()),
            ):
                tell(told)
        # Whether anything is drawn from the seed of initialisation only a finished run can tell.
        fresh = all(run.get("fresh", True) for run in journal.runs.values())

        def settle() -> list[Run]:
            return _record_same(lacking, journal, regression=task.regression, fresh=fresh)

        def add(done: dict[str, Any]) -> None:
            journal.add(done)
            settle()

        if needed := settle():
            _carry_out(request, material, needed, split, parameters, threads, add, progress)
        planned = [run["key"] for run in journal.study["design"]]
        finished = [journal.runs[key] for key in planned if key in journal.runs]
        return Studied(journal.folder, write_outputs(journal.folder, journal.study, finished))


def study_tasks(
    request: StudyRequest,
    tasks: Sequence[str],
    *,
    tell: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda steps: nullcontext(lambda done: None),
) -> tuple[list[Studied], dict[str, Any]]:
    """Carry out a study of each GLUE task in a folder of its name, and return what they say together."""
    from noisytune_cli.study.journal import check_together
    from noisytune_cli.study.report.write import write_tasks

    folder = Path(request.out)
    names = list(dict.fromkeys(glue_task(task).name for task in tasks))
    check_together(folder)
    requests = [replace(request, task=task, out=str(folder / task)) for task in names]
    # The rows of all, before the first is trained on for hours.
    found: dict[str, Files] = {}
    for one in requests:
        task, train, dev = _choose_task(one)
        check_apart("--task", task.name, train, found)
        found[task.name] = train
        _divided(one, task, train, dev)
    studied = [study(one, tell=tell, progress=progress) for one in requests]
    return studied, write_tasks(folder, [one.results for one in studied])


def _choose_task(request: StudyRequest) -> tuple[Task, Files, Files]:
    """Return the task that is asked for, with its files to train on and to score."""
    return choose_task(
        task=request.task,
        data=request.data,
        train=request.train,
        dev=request.dev,
        text=request.text,
        label=request.label,
        chosen=request.metrics,
    )


def _divided(request: StudyRequest, task: Task, train: Files, dev: Files) -> tuple[Data, Split]:
    """Return a task's rows, and which of them are trained on and held out, as far as that can be."""
    from noisytune_cli.study.design import split_rows

    data = read_data(task, train, dev)
    split = split_rows(
        len(data.train), train_rows=request.train_rows, held_out=request.held_out, seed=request.data_seed
    )
    if request.choose:
        _check_choice(request, split)
    return data, split


def _record_same(runs: Sequence[Run], journal: Journal, *, regression: bool, fresh: bool) -> list[Run]:
    """Record the runs that are one with a finished one; return those that have to be carried out."""
    from noisytune_cli.study.design import drawn_from

    def told(run: Mapping[str, Any]) -> str:
        return drawn_from(run, regression=regression, fresh=fresh)

    finished = {told(run): run for run in reversed(journal.runs.values())}
    needed: dict[str, Run] = {}
    for run in runs:
        same = told(run.record())
        if run.key in journal.runs:
            continue
        if (done := finished.get(same)) is not None:
            journal.add({**done, **run.record(), "same_as": done.get("same_as", done["key"])})
        else:
            needed.setdefault(same, run)
    return list(needed.values())


def _repeated(data: Data, split: Split) -> dict[str, int]:
    """Return how many rows that are scored have the text of a row that is trained on, by what they are."""
    known = {data.train.texts[place] for place in split.train}
    held_out = (data.train.texts[place] for place in split.held_out)
    scored: Mapping[str, Iterable[tuple[str, ...]]] = {"dev": data.dev.texts, "held_out": held_out}
    return {part: sum(texts in known for texts in rows) for part, rows in scored.items()}


def _other_order(config: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, list[str]]:
    """Return config.json's names of the classes where they are the rows' in another order, else nothing."""
    listed = (config or {}).get("id2label")
    theirs = [str(listed.get(str(i))) for i in range(len(names))] if isinstance(listed, Mapping) else []
    folded, own = ([name.casefold() for name in some] for some in (theirs, names))
    return {"label_names": theirs} if folded != own and sorted(folded) == sorted(own) else {}


def _carry_out(
    request: StudyRequest,
    material: Material,
    runs: Sequence[Run],
    split: Split,
    parameters: int,
    threads: int,
    add: Callable[[dict[str, Any]], None],
    progress: Progress,
) -> None:
    from noisytune_cli.study.workers import Place, carry_out, check_memory

    # Under LoRA the members share what is frozen, which is nearly all.
    members = (
        max(int(run.options.get("deni.members", 1)) for run in runs) if not request.recipe.lora_rank else 1
    )
    check_memory(parameters, min(request.jobs, len(runs)), members)
    place = Place(request.device, request.jobs, threads)
    with progress(sum(split.steps(run.share, request.recipe) for run in runs)) as report:
        for done in carry_out(material, request.recipe, runs, place, report):
            add(done)


def _probe(request: StudyRequest) -> tuple[dict[str, Any], Files]:
    """Return the probe's part of the material, a GLUE task, and its files, which can be read."""
    if request.probe is None:
        return {}, ()
    task, train, dev = choose_glue("--probe", request.probe, request.data)
    read_data(task, train, dev)
    return {"probe": task, "probe_train": train, "probe_dev": dev}, (*train, *dev)


def _check_used(settings: Iterable[str], methods: Iterable[str]) -> None:
    """Refuse a constant, by its full name, of a method that is none of those that are compared."""
    used = {name for method in methods for name in method.split("+")}
    for full in settings:
        name = full.partition(".")[0]
        if name not in used:
            raise UsageError(
                f"--set {full}",
                why=f"{name} is none of the methods, so no run would have it",
                next_step=f"Add {name} to --method, or leave it out",
            )


def _check_choice(request: StudyRequest, split: Split) -> None:
    """Refuse to search λ where there is no noise, one λ, or no rows to choose it on but the reported ones."""
    if all("noisytune" not in method.split("+") for method in request.methods) or len(request.lambdas) < 2:
        raise UsageError(
            "--choose",
            why="there is nothing to choose: it takes the method noisytune and several λ",
            next_step="Give --method plain,noisytune, and several --lambda or none",
        )
    if not split.held_out:
        raise UsageError(
            "--choose without held-out rows",
            why="λ would be chosen on the rows that the scores are reported on",
            next_step="Leave --held-out out, or give more rows to train on",
        )


def _check_folder(source: Checkpoint, model: str) -> None:
    if source.single_file:
        raise InputInvalid(
            "cannot study a weight file alone",
            path=model,
            why="a study needs the model's config and tokenizer too",
            next_step="Give the folder that it lies in",
        )
    # transformers then loads another model, which the config names, and trains the adapter's head alone.
    if (source.root / ADAPTER_CONFIG).exists():
        raise InputInvalid(
            "cannot study an adapter",
            path=model,
            why=f"{ADAPTER_CONFIG} lies there: its weights are only what is added to another model",
            next_step="Merge it into its model and give that, or give the model alone, with --lora",
        )


#: How the names of what transformers reads beside the weights end: config and tokenizer.
_READ = (".json", ".txt", ".model", ".tiktoken", ".bpe", ".vocab")


def _read_by_transformers(source: Checkpoint) -> list[Path]:
    """Return the files of a checkpoint that make the network and the tokens what they are."""
    weights = {file.name for file in source.sources}
    return [
        source.root / name
        for name in sorted(source.others)
        if "/" not in name and name.endswith(_READ) and name not in weights
    ]


def _digest(paths: Iterable[Path]) -> str:
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

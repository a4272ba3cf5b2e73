"""Noise for training scripts that use transformers: while a model is loaded, or as training begins.

Loading knows which parameters the checkpoint lacked, so `noisy_from_pretrained` leaves a fresh head alone
without being told. `NoisyTuneCallback` is for models that are loaded elsewhere; it perturbs a model once, and
never one that resumes from a checkpoint, whose weights had their noise before their first step.
"""

from __future__ import annotations

import glob
import os
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from noisytune_cli.errors import InputInvalid, NoisytuneWarning, UsageError, unwritable
from noisytune_cli.escape import enumerate_some
from noisytune_cli.manifest.write import encode
from noisytune_cli.memory.adapters import base_names
from noisytune_cli.memory.loading import Origin, Origins, noised_before, watched
from noisytune_cli.memory.perturb import check_options, perturb_
from noisytune_cli.plan.arguments import in_python, reusable
from noisytune_cli.records import Manifest, SourceRecord

#: The record of the callback's noise in the trainer's output folder. It is no checkpoint's manifest.
RECORD = "noisytune-training.json"

_patching = threading.Lock()

#: The records of the block that this thread or task is in; None outside of it, and while it loads a model.
_records: ContextVar[list[Manifest] | None] = ContextVar("noisy_from_pretrained", default=None)


@contextmanager
def noisy_from_pretrained(
    lam: float | None = None, seed: int | None = None, **options: Any
) -> Iterator[list[Manifest]]:
    """Perturb every model that transformers loads inside the `with` block; yield the list of their records.

    Models that other threads load meanwhile, and those of other asyncio tasks, get none. Takes the options of
    `perturb_`. Noise is named after the keys of the checkpoint, whatever the model calls its parameters, so
    it is that of the checkpoint on disk. Parameters that the checkpoint lacked, or had in another shape,
    count as fresh and get no noise unless `fresh="perturb"`. A model with a part that it loads by itself,
    such as a backbone, is perturbed once, as a whole. Under FSDP's memory-saving load only the process that
    has the weights adds the noise, which the others then receive. UsageError inside another such block, and
    for options that make no sense, before anything is loaded; a NoisytuneWarning where none was loaded.
    InputInvalid for a folder that `perturb` or `average` wrote, unless `again=True`.
    """
    asked = _checked({"lam": lam, "seed": seed, **options})
    if not _patching.acquire(blocking=False):
        raise UsageError(
            "noisy_from_pretrained inside another",
            why="models would get noise twice",
            next_step="Leave the outer block first",
        )
    try:
        original = PreTrainedModel.__dict__["from_pretrained"]
        manifests: list[Manifest] = []
        origins: Origins
        was_loaded = False

        def from_pretrained(cls: Any, name: Any = None, *arguments: Any, **keywords: Any) -> Any:
            nonlocal was_loaded
            load = original.__get__(None, cls)
            if _records.get() is not manifests:
                return load(name, *arguments, **keywords)
            before = noised_before(name, keywords.get("subfolder") or "")
            if before is not None and not asked.get("again"):
                next_step = in_python(perturb_, before.next_step)
                raise InputInvalid(before.what, path=str(name), why=before.why, next_step=next_step)
            wants_info = keywords.pop("output_loading_info", False)
            _records.set(None)
            try:
                loaded = load(name, *arguments, output_loading_info=True, **keywords)
            finally:
                _records.set(manifests)
            # A class with a way of loading of its own may know of no such report.
            model, info = loaded if isinstance(loaded, tuple) else (loaded, {})
            was_loaded = True
            if not _comes_later(model):
                origin = origins.get(model, Origin())
                manifests.append(_perturb_loaded(model, info, origin, name, {**asked}))
            return (model, info) if wants_info else model

        with watched() as origins:
            setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))  # noqa: B010
            _records.set(manifests)
            try:
                yield manifests
                if not was_loaded:
                    warnings.warn(
                        "noisy_from_pretrained: no model got noise, for inside the block this thread or task "
                        "called no from_pretrained of transformers; what is loaded in another way, or by "
                        "another thread, gets noise by perturb_",
                        NoisytuneWarning,
                        stacklevel=3,
                    )
            finally:
                _records.set(None)
                setattr(PreTrainedModel, "from_pretrained", original)  # noqa: B010
    finally:
        _patching.release()


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of `perturb_` for several models; UsageError where they make no sense for any."""
    options = reusable(options)
    check_options(options)
    return options


def _comes_later(model: torch.nn.Module) -> bool:
    """Say whether another process has the weights and will send them with their noise."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_rank() != 0 and all(p.is_meta for p in model.parameters())


def _perturb_loaded(
    model: Any, info: dict[str, Any], origin: Origin, name: Any, options: dict[str, Any]
) -> Manifest:
    """Add noise to a model as it was loaded; the record's source is the checkpoint."""
    fresh = {*info.get("missing_keys", ()), *(entry[0] for entry in info.get("mismatched_keys", ()))}
    fresh |= origin.lacking
    if (own := base_names(model)) is None:
        own = {name: name for name, _ in model.named_parameters(remove_duplicate=False)}
    known = options.pop("fresh_names", ())
    patterns = [known] if isinstance(known, str) else list(known)
    patterns += sorted(glob.escape(name) for name, base in own.items() if base in fresh)
    made: list[str] = []
    if options.get("names") is None and origin.keys:
        names, made = _checkpoint_names(model, own, origin.keys, fresh)
        options = {**options, "names": names.get}
    manifest = perturb_(model, **options, fresh_names=patterns)
    if made:
        warning = (
            f"{enumerate_some(made, 3)}: made of other tensors of the checkpoint as they were loaded; "
            "their noise is another than on disk"
        )
        warnings.warn(warning, NoisytuneWarning, stacklevel=5)
        manifest = replace(manifest, warnings=(*manifest.warnings, warning))
    if options.get("manifest") is not None or name is None:
        return manifest
    revision = getattr(model.config, "_commit_hash", None)
    # A folder's name says enough: a record holds no path of this machine.
    source = Path(name).resolve().name if os.path.exists(name) else str(name)
    return replace(manifest, source=SourceRecord(source, revision, ()))


def _checkpoint_names(
    model: Any, own: dict[str, str], keys: dict[str, str | None], fresh: set[str]
) -> tuple[dict[str, str], list[str]]:
    """Return each parameter's name in the checkpoint, and those that were loaded and have none there.

    A name that the checkpoint lacks (a tied head, a fresh one) stays, unless the checkpoint means another.
    """
    names: dict[str, str] = {}
    taken = {key for key in keys.values() if key is not None}
    as_they_were, loaded = set[int](), set[int]()
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name in own}
    for name, base in own.items():
        key = keys.get(base)
        names[name] = key or (f"{base} (in the model)" if base in taken else base)
        if key is not None:
            as_they_were.add(id(parameters[name]))
        elif base not in fresh:
            loaded.add(id(parameters[name]))
    made = loaded - as_they_were
    return names, [name for name in own if id(parameters[name]) in made]


class NoisyTuneCallback(TrainerCallback):
    """Perturb the model as training begins: once, and not on resuming from a checkpoint.

    Takes the options of `perturb_`, and raises UsageError for those that make no sense as it is made. All
    parameters get noise, a fresh head too, unless `fresh_names` names it. The record is `manifest`, and lies
    in the trainer's output folder as `noisytune-training.json`.

    Once is once for a model object, whatever is loaded into it later: the callback cannot tell weights that
    were reset from those that were trained. Where they are reset, for the next fold, take a new callback.
    """

    def __init__(self, lam: float | None = None, seed: int | None = None, **options: Any) -> None:
        self.options = _checked({"lam": lam, "seed": seed, **options})
        self.manifest: Manifest | None = None
        self._perturbed: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the models that it perturbed, which another process does not have."""
        return {name: value for name, value in self.__dict__.items() if name != "_perturbed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _perturbed=weakref.WeakSet())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the noise, unless the model has it; UsageError where DeepSpeed holds copies of the weights."""
        model = kwargs["model"]
        if state.global_step > 0 or model in self._perturbed:
            return
        if args.resume_from_checkpoint:  # which the Trainer itself does not read
            warnings.warn(
                "NoisyTuneCallback: no noise, because resume_from_checkpoint is set in the arguments, though "
                "training begins at step 0; leave it out for a run that is not resumed",
                NoisytuneWarning,
                stacklevel=2,
            )
            return
        # `accelerate launch` sets the plugin alone.
        if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None) is not None:
            raise UsageError(
                "NoisyTuneCallback under DeepSpeed",
                why="its optimizer holds copies of the weights, which would undo the noise",
                next_step="Load the model inside noisytune_cli.noisy_from_pretrained() instead",
            )
        self.manifest = perturb_(model, **self.options)
        self._perturbed.add(model)
        if state.is_world_process_zero:
            _write(Path(args.output_dir) / RECORD, self.manifest)


def _write(path: Path, manifest: Manifest) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(manifest))
    except OSError as error:
        raise unwritable(error, path) from error

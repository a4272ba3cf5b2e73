"""Noise in memory: `perturb_` changes a model or a state dict in place, with the bits of the command line.

The same plan, streams and standard deviations as for a file, over tensors that are already loaded. First
everything is measured, then every amplitude is settled, then noise is added: so a device is not waited for
tensor by tensor, and sharded tensors need one exchange for all of them. What a GPU measures ahead of the plan
goes in batches instead, in front of all else. A refusal changes nothing.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from noisytune_cli.engine.threads import thread_count
from noisytune_cli.errors import NoisytuneWarning, UsageError
from noisytune_cli.escape import escape
from noisytune_cli.manifest.locate import manifest_of
from noisytune_cli.manifest.read import read_manifest
from noisytune_cli.memory.adapters import base_names
from noisytune_cli.memory.ahead import SumsAhead
from noisytune_cli.memory.batches import batches, begin, receipts_of
from noisytune_cli.memory.loading import noised_before
from noisytune_cli.memory.plan import (
    WHERE_NOTHING_IS_PERTURBED,
    leave_out,
    plan_parameters,
    recorded_parameters,
    warnings_for,
)
from noisytune_cli.memory.quantized import refuse_quantized_model
from noisytune_cli.memory.spreads import Spreads
from noisytune_cli.memory.tensors import Names, live_tensors_of
from noisytune_cli.plan.arguments import (
    Mix,
    Pairs,
    Patterns,
    check_choice,
    make_spec,
    of_python,
    patterns,
)
from noisytune_cli.plan.plan import check_outcomes
from noisytune_cli.records import (
    Action,
    Granularity,
    Manifest,
    NoiseSpec,
    Receipt,
    Scope,
    SourceRecord,
)
from noisytune_cli.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

#: What noise a module's parameters have, for as long as these live: their version then, and the seeds.
_noised: Any = WeakIdKeyDictionary()


@of_python
def perturb_(
    model: nn.Module | Mapping[str, Tensor],
    lam: float | None = None,
    seed: int | None = None,
    *,
    sigma: float | None = None,
    shrink: float | None = None,
    mix: Mix | None = None,
    noise: str | None = None,
    scope: Scope | None = None,
    granularity: Granularity = "tensor",
    splits: Pairs[str] = (),
    include: Patterns = (),
    exclude: Patterns = (),
    rules: Pairs[float] = (),
    names: Names = None,
    frozen: Action = "perturb",
    fresh: Action = "copy",
    fresh_names: Patterns = (),
    manifest: Manifest | str | os.PathLike[str] | None = None,
    config: Mapping[str, Any] | None = None,
    again: bool = False,
    threads: int | None = None,
) -> Manifest:
    """Add noise to a model's parameters, or to a state dict's, in place; return the manifest's record.

    One of three gives the strength, which may be negative: `lam`, the width in units of each std (0.15
    where none is given); `sigma`, the std itself, Gaussian unless `noise` says otherwise; `mix`, noises to be
    added up, as dictionaries {"seed", "sigma" or "lambda", "coefficient"} or a file of such lines. `shrink`
    is the share of the weights that is kept under the noise.

    `include`, `exclude`, `rules` (pattern to λ or σ) and `splits` (pattern to DIM:SIZES, with `granularity`
    "matrix") are the command line's, on checkpoint names: those of the model after `names` (a map, a
    function, or a prefix to take away, such as "bert"). `frozen` and `fresh` say whether parameters without
    gradients, and those that `fresh_names` (patterns on the model's own names) call freshly initialised, are
    perturbed or left as they are. `manifest` gives the noise of an earlier run, its seed, streams and
    amplitudes; no std is measured. `config` is that of a state dict.

    Of a model with adapters (peft) the base gets noise, under its own names. A module's parameters that have
    noise of the same seed from an earlier call, and were not written to since, are refused without `again`.

    What noise could not reach, or hardly (a NaN inside, more than half of the values as rounding left them),
    is a NoisytuneWarning, and so is what it may have spoilt: a matrix that is half zeros, or whose std a few
    extreme values make, and noise that is stronger than the weights. What needs no look at values is warned
    of before anything is changed.

    The record has no digests; `unchanged` and `clamped` of a sharded parameter count the elements held here.
    All processes that share sharded parameters must call this alike. Raises UsageError, InputInvalid or
    Mismatch before anything is changed; a call that is interrupted later leaves some tensors with noise.
    """
    spec = make_spec(
        lam=lam,
        seed=seed,
        sigma=sigma,
        mix=mix,
        shrink=shrink,
        noise=noise,
        scope=scope,
        granularity=granularity,
        splits=splits,
        include=include,
        exclude=exclude,
        rules=rules,
    )
    check_choice("frozen", frozen, ("perturb", "copy"))
    check_choice("fresh", fresh, ("perturb", "copy"))
    fresh_patterns, count = patterns("fresh_names", fresh_names), thread_count(threads)
    source = SourceRecord(type(model).__name__, None, ())
    tensors, names, spared = taking_noise(model, names)
    is_module = not isinstance(model, Mapping)
    # Not where it may be for nothing: a manifest has the amplitudes, and patterns may choose a few tensors.
    ahead = SumsAhead(value for _, value in tensors if manifest is None and not spec.include)
    live_tensors = live_tensors_of(tensors, names)
    config = config_of(model, config) if manifest is None else None
    refuse_quantized_model(model, live_tensors, config=config, source=source.id)
    doubts: tuple[str, ...] = ()
    if manifest is None:
        parameters, doubts = plan_parameters(
            live_tensors, spec, is_module=is_module, config=config, source=source.id
        )
    else:
        recorded = _read(manifest, spec)
        spec, source = recorded.noise, recorded.source
        parameters = recorded_parameters(live_tensors, recorded)
    leave_out(parameters, frozen=frozen, fresh=fresh, fresh_names=fresh_patterns, spared=spared)
    noised = [p.live.tensor for p in parameters if is_module and p.outcome()[0] == "perturb"]
    had = [seeds_of(tensor) for tensor in noised]
    seeds = frozenset(term.seed for term in spec.mix) or frozenset((spec.seed,))
    if not again and (twice := seeds.intersection(frozenset[int]().union(*had))):
        raise UsageError(
            "the model was noised before",
            path=source.id,
            why=f"it has the noise of seed {min(twice)} from an earlier call",
            next_step="Load the weights anew, take another seed, or pass again=True",
        )
    name = getattr(model, "name_or_path", None)  # of a model of transformers
    if not again and noised_before(name) is not None:
        doubts += (
            f"the model was loaded from {escape(str(name))}, whose manifest tells of noise or of an average: "
            "this noise comes on top; again=True says that it is meant",
        )
    planned = warnings_for(doubts, spec, ())
    for warning in planned:  # before anything is changed, for whoever has warnings raised
        warnings.warn(warning, NoisytuneWarning, stacklevel=3)
    begun = []
    spreads = Spreads(count, ahead)
    for batch in batches(parameters, spec, ahead):
        if manifest is None:
            spreads.settle(batch, spec)
        else:  # its amplitudes are of other values, or of these in another precision
            spreads.leave_broken(batch)
        begun.append((batch, begin(batch, spec, count)))
    # Where this refuses, no noise was added.
    check_outcomes(spec, (p.outcome() for p in parameters), path=source.id, advice=WHERE_NOTHING_IS_PERTURBED)
    receipts: dict[int, list[Receipt]] = {}
    for batch, finish in begun:
        finish()
        receipts |= {id(parameter): receipts_of(parameter) for parameter in batch}
    for tensor, before in zip(noised, had, strict=True):
        note_seeds(tensor, before | seeds)
    in_order = tuple([receipt for parameter in parameters for receipt in receipts[id(parameter)]])
    told = warnings_for(doubts, spec, in_order)
    for warning in told[len(planned) :]:
        warnings.warn(warning, NoisytuneWarning, stacklevel=3)
    return Manifest("noisytune", __version__, source, spec, in_order, warnings=told)


def check_options(options: Mapping[str, Any]) -> None:
    """Raise what `perturb_` would of its options, whatever the model; UsageError for one that it has not."""
    known = {name: each.default for name, each in inspect.signature(perturb_).parameters.items()}
    del known["model"]
    for name in options.keys() - known:
        raise UsageError(
            f"{name}=", why="perturb_ has no such option", next_step=f"Use some of: {', '.join(known)}"
        )
    given = {**known, **options}
    spec = make_spec(**{name: given[name] for name in inspect.signature(make_spec).parameters})
    for name in ("frozen", "fresh"):
        check_choice(name, given[name], ("perturb", "copy"))
    patterns("fresh_names", given["fresh_names"])
    thread_count(given["threads"])
    live_tensors_of((), given["names"])
    config_of(None, given["config"])
    if given["manifest"] is not None:
        _read(given["manifest"], spec)


def seeds_of(tensor: Tensor) -> frozenset[int]:
    """Return the seeds whose noise a parameter has; none where it was written to since (loaded, trained)."""
    version, seeds = _noised.get(tensor, (None, frozenset()))
    return seeds if version == _version(tensor) else frozenset()


def note_seeds(tensor: Tensor, seeds: frozenset[int]) -> None:
    """Note that a parameter has the noise of some seeds as it is now."""
    _noised[tensor] = _version(tensor), seeds


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def taking_noise(
    model: nn.Module | Mapping[str, Tensor], names: Names
) -> tuple[list[tuple[str, object]], Names, list[str]]:
    """Return the tensors that may get noise, what they are to be called, and the names of those left alone.

    Of a model with adapters these are the base's, under its own names where `names` says nothing else.
    """
    tensors = named_tensors(model)
    if isinstance(model, Mapping) or (bases := base_names(model)) is None:
        return tensors, names, []
    taken = [(name, value) for name, value in tensors if name in bases]
    spared = [name for name, _ in tensors if name not in bases]
    return taken, bases if names is None else names, spared


def named_tensors(model: nn.Module | Mapping[str, Tensor]) -> list[tuple[str, object]]:
    """Return the tensors of a model or a state dict by name, every name of a tie."""
    if isinstance(model, Mapping):
        # What a module keeps beside its tensors may be anything.
        return [(n, v) for n, v in model.items() if not str(n).endswith("_extra_state")]
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"cannot add noise to a {type(model).__name__}",
            why="it is neither a module nor a state dict",
            next_step="Give the model, or a dictionary from names to tensors",
        )
    _shard_again(model)
    return list(model.named_parameters(remove_duplicate=False))


def _shard_again(model: nn.Module) -> None:
    """Have FSDP2 drop the whole parameters that it may hold since a forward pass.

    What is written to these is lost, and what is written to the shards is not in them.
    """
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp):
                module.reshard()


def config_of(model: object, config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the config given, else that of a model of transformers, which may be in a wrapper."""
    if not isinstance(config, Mapping | None):
        raise UsageError(
            f"config={config!r}",
            why="it is not the content of a config.json",
            next_step="Give a dictionary, such as model.config.to_dict()",
        )
    if config is not None:
        return config
    carried = _carried(model)
    return carried[0]() if len(carried) == 1 else None  # of several models, which may not be alike


def _carried(module: object) -> list[Callable[[], dict[str, Any]]]:
    """Return what gives the config of each model of transformers that is in no other."""
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    if to_dict is not None:
        return [to_dict]
    return [found for child in getattr(module, "children", tuple)() for found in _carried(child)]


def _read(manifest: Manifest | str | os.PathLike[str], spec: NoiseSpec) -> Manifest:
    """Return the manifest, which says all about the noise: so nothing else may."""
    if spec != NoiseSpec() or spec.splits:
        raise UsageError(
            "manifest= and other noise",
            why="the manifest gives strength, seeds, distribution, scope, granularity and patterns",
            next_step="Leave these options out, or the manifest",
        )
    if isinstance(manifest, Manifest):
        return manifest
    if not isinstance(manifest, str | os.PathLike) or isinstance(path := os.fspath(manifest), bytes):
        raise UsageError(
            f"manifest={manifest!r}",
            why="it is neither a record nor a path",
            next_step="Give what perturb_ returned, or where a manifest lies",
        )
    return read_manifest(manifest_of(path)).manifest

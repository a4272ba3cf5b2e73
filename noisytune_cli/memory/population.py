"""Many noises in turn on one model: its base is kept once, and each noise is written over the one before.

Subtracting noise does not give a weight back once a sum was rounded, so the base is kept, bit for bit, and
noise goes from there to the model in one pass. The base is measured once, at the first noise that needs it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from noisytune_cli.engine.threads import thread_count
from noisytune_cli.errors import InputInvalid, NoisytuneError, NoisytuneWarning
from noisytune_cli.memory import in_place
from noisytune_cli.memory.adapters import merged_layers, still_merged
from noisytune_cli.memory.batches import begin, receipts_of
from noisytune_cli.memory.overlaps import NO_MEMORY, find_overlap, has_memory, place
from noisytune_cli.memory.perturb import config_of, named_tensors, note_seeds, seeds_of, taking_noise
from noisytune_cli.memory.plan import (
    WHERE_NOTHING_IS_PERTURBED,
    Parameter,
    leave_out,
    plan_parameters,
    warnings_for,
)
from noisytune_cli.memory.quantized import refuse_quantized_model
from noisytune_cli.memory.sharded import LocalTensor, held_part
from noisytune_cli.memory.spreads import Spreads
from noisytune_cli.memory.tensors import LiveTensor, Names, live_tensors_of
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
from noisytune_cli.records import Action, Granularity, Manifest, NoiseSpec, Scope, SourceRecord
from noisytune_cli.version import __version__

if TYPE_CHECKING:
    from torch import Tensor, nn


class Population:
    """A model, the base of its parameters, and the noise of one member of a population at a time.

    The base is a copy of the parameters that may get noise, where they are or, with `host`, in host memory.
    `include`, `exclude`, `names`, `frozen`, `fresh`, `fresh_names` and `config` say which these are, as for
    `perturb_`. As a context manager it restores the model at its end. Buffers are neither kept nor restored.
    All processes that share sharded parameters must make the same calls.
    """

    @of_python
    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        *,
        host: bool = False,
        include: Patterns = (),
        exclude: Patterns = (),
        names: Names = None,
        frozen: Action = "perturb",
        fresh: Action = "copy",
        fresh_names: Patterns = (),
        config: Mapping[str, Any] | None = None,
        threads: int | None = None,
    ) -> None:
        """Keep the base; raises UsageError or InputInvalid as `perturb_` does."""
        chosen = make_spec(sigma=1.0, include=include, exclude=exclude)
        check_choice("frozen", frozen, ("perturb", "copy"))
        check_choice("fresh", fresh, ("perturb", "copy"))
        self._model, self._threads = model, thread_count(threads)
        self._which: dict[str, Any] = {"include": chosen.include, "exclude": chosen.exclude}
        self._left_out: dict[str, Any] = {
            "frozen": frozen,
            "fresh": fresh,
            "fresh_names": patterns("fresh_names", fresh_names),
        }
        tensors, names, self._left_out["spared"] = taking_noise(model, names)
        self._about: dict[str, Any] = {
            "is_module": not isinstance(model, Mapping),
            "config": config_of(model, config),
            "source": type(model).__name__,
        }
        self._live_tensors = live_tensors_of(tensors, names)
        refuse_quantized_model(
            model, self._live_tensors, config=self._about["config"], source=self._about["source"]
        )
        parameters, doubts = self._plan(chosen)
        for warning in warnings_for(doubts, chosen, ()):
            warnings.warn(warning, NoisytuneWarning, stacklevel=3)
        changing = {id(p.live) for p in parameters if p.outcome()[0] != "copy"}
        with in_place.enough_memory():
            self._live_tensors = [_kept(r, host=host) if id(r) in changing else r for r in self._live_tensors]
        #: Those of which a base is kept, by the first of their own names.
        self._kept = {r.own[0]: r for r in self._live_tensors if r.is_kept}
        #: The noise of `perturb_` that they have, which it does not add twice.
        self._had = {name: seeds_of(kept.tensor) for name, kept in self._kept.items()}
        self._spreads = Spreads(self._threads)

    @of_python
    def set(
        self,
        *,
        lam: float | None = None,
        seed: int | None = None,
        sigma: float | None = None,
        shrink: float | None = None,
        mix: Mix | None = None,
        noise: str | None = None,
        scope: Scope | None = None,
        granularity: Granularity = "tensor",
        splits: Pairs[str] = (),
        rules: Pairs[float] = (),
    ) -> Manifest:
        """Give the model the base with this noise, whatever it holds; return the record.

        The options are those of `perturb_`, and so are the bits. A refusal changes nothing. What `perturb_`
        would warn of is the record's `warnings`.
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
            rules=rules,
            **self._which,
        )
        parameters, doubts = self._plan(spec)
        self._spreads.settle(parameters, spec)
        source = SourceRecord(self._about["source"], None, ())
        check_outcomes(
            spec, (p.outcome() for p in parameters), path=source.id, advice=WHERE_NOTHING_IS_PERTURBED
        )
        targets, problems = self._targets()
        if problems:
            raise problems[0]
        for parameter in parameters:
            parameter.target = targets.get(parameter.live.own[0])
        begin(parameters, spec, self._threads)()
        in_order = tuple([receipt for parameter in parameters for receipt in receipts_of(parameter)])
        # On the record alone: what is said of one member would be said of all.
        told = warnings_for(doubts, spec, in_order)
        return Manifest("noisytune", __version__, source, spec, in_order, warnings=told)

    def restore(self) -> None:
        """Give the model its base back, bit for bit.

        InputInvalid where a parameter was replaced by one of another shape or dtype, or has an adapter merged
        into it; all others are restored.
        """
        targets, problems = self._targets()
        for name, target in targets.items():
            in_place.overwrite(target.values, self._kept[name].held.values.view(-1))
            if self._had[name]:
                note_seeds(self._kept[name].tensor, self._had[name])
        if problems:
            raise problems[0]

    def __enter__(self) -> Population:
        """Return the population."""
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the model."""
        self.restore()

    def _plan(self, spec: NoiseSpec) -> tuple[list[Parameter], tuple[str, ...]]:
        parameters, doubts = plan_parameters(self._live_tensors, spec, **self._about)
        leave_out(parameters, **self._left_out)
        return parameters, doubts

    def _targets(self) -> tuple[dict[str, LocalTensor], list[NoisytuneError]]:
        """Return where each parameter lies now, by the first of its own names, and what is wrong with others.

        A model may have been moved to another device, or got other tensors, since its base was kept. What an
        adapter was merged into is not given the base: unmerging would take from it what it does not have.
        """
        tensors = dict(named_tensors(self._model))
        merged = () if isinstance(self._model, Mapping) else merged_layers(self._model)
        targets: dict[str, LocalTensor] = {}
        problems: list[NoisytuneError] = []
        for name, kept in self._kept.items():
            try:
                for own in kept.own:
                    if own.startswith(merged):
                        raise still_merged(own)
                targets[name] = _target(kept, tensors)
            except NoisytuneError as problem:
                problems.append(problem)
        # Of what became one parameter meanwhile the first keeps its place, as of a tie.
        names = list(reversed(targets))
        while (at := find_overlap([targets[name].values for name in names])) is not None:
            del targets[name := names.pop(at)]
            problems.append(_cannot_write(name, "it shares memory with another parameter now, and did not"))
        return targets, problems


@contextmanager
def noisy(
    model: nn.Module | Mapping[str, Tensor],
    lam: float | None = None,
    seed: int | None = None,
    *,
    host: bool = False,
    include: Patterns = (),
    exclude: Patterns = (),
    names: Names = None,
    frozen: Action = "perturb",
    fresh: Action = "copy",
    fresh_names: Patterns = (),
    config: Mapping[str, Any] | None = None,
    threads: int | None = None,
    **noise: Any,
) -> Iterator[Manifest]:
    """Have a model with noise inside the `with` block, and its own bits afterwards; yield the record.

    `noise` are the options of `Population.set`, such as `sigma`; the others are `Population`'s.
    """
    population = Population(
        model,
        host=host,
        include=include,
        exclude=exclude,
        names=names,
        frozen=frozen,
        fresh=fresh,
        fresh_names=fresh_names,
        config=config,
        threads=threads,
    )
    with population:
        yield population.set(lam=lam, seed=seed, **noise)


def _kept(live: LiveTensor, *, host: bool) -> LiveTensor:
    """Return a parameter with a copy of its values in row-major order, where they are or in host memory."""
    values = live.held.values
    with torch.no_grad():
        copy = torch.empty(
            values.shape,
            dtype=values.dtype,
            device="cpu" if host else values.device,
            pin_memory=host and values.device.type == "cuda",
        ).copy_(values)
    return replace(live, held=replace(live.held, values=copy), is_kept=True)


def _target(kept: LiveTensor, tensors: Mapping[str, Any]) -> LocalTensor:
    """Return where a parameter lies now; InputInvalid where that has no room for its base."""
    found = [(name, tensor) for name in kept.own if isinstance(tensor := tensors.get(name), torch.Tensor)]
    held = [held_part(tensor, name) for name, tensor in found]
    why = None
    if len(held) < len(kept.own):
        why = "the model has no tensor of that name any more"
    else:
        values, base = held[0].values, kept.held.values
        if (values.dtype, values.shape, held[0].runs) != (base.dtype, base.shape, kept.held.runs):
            why = f"it is now {values.dtype} {list(values.shape)}, and was {base.dtype} {list(base.shape)}"
        elif values.is_meta or not has_memory(values):
            why = NO_MEMORY
        elif any(place(other.values) != place(values) for other in held[1:]):
            why = f"{', '.join(kept.own[1:])} was one parameter with it, and is no more"
    if why is not None:
        raise _cannot_write(kept.own[0], why)
    return held[0]


def _cannot_write(name: str, why: str) -> InputInvalid:
    return InputInvalid(
        "cannot write to the model",
        tensor=name,
        why=why,
        next_step="Call restore() before the model is changed so, and make a new Population afterwards",
    )

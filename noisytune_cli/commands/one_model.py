"""Are these checkpoints of one model, so that the mean of their weights is a model's too?

They need the same tensors, and configs that make the same model of them. Adapters have no mean of their own:
what they add to a weight is a product of theirs, and the mean of factors is no factor of the mean. Buffers
are computed or counted, not learned: where they differ, they are of different models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from noisytune_cli.checkpoint.adapter import adapter_config, factors_among, kind_of_factors
from noisytune_cli.checkpoint.checkpoint import Checkpoint
from noisytune_cli.checkpoint.config import ADAPTER_CONFIG
from noisytune_cli.dtypes import FLOAT_DTYPES
from noisytune_cli.errors import InputInvalid
from noisytune_cli.escape import enumerate_some, escape, list_some
from noisytune_cli.plan.evidence.told import tell_checkpoint
from noisytune_cli.plan.plans import plan_checkpoint
from noisytune_cli.plan.settle import look_at_values
from noisytune_cli.plan.ties import find_ties
from noisytune_cli.records import NoiseSpec, TensorSpec

#: Fields of a config that say where it came from, or how to train: whatever they are, the model is the same.
_OF_NO_ACCOUNT = re.compile(
    r"_name_or_path|transformers_version|_commit_hash|_attn_implementation.*|use_cache|torch_dtype|dtype"
    r"|.*(dropout|drop_rate|drop_path|layerdrop).*|(output|return)_.*|.*initializer.*|gradient_checkpointing"
    r"|finetuning_task|base_model_name_or_path|inference_mode"
)

_MAX_SHOWN = 60

#: Why a buffer is one that a model estimates on data, whatever its framework calls it.
_STATISTICS = re.compile(
    r"batch norm|running statistics|in the collection \w*stats|a mean and its spread, .*"
)

_TILE_BYTES = 1 << 20


def check_same_tensors(first: Checkpoint, first_name: str, other: Checkpoint, name: str) -> None:
    """Raise InputInvalid unless `other` has just the tensors that `first` has, wherever they are stored."""
    ours = {tensor.name: tensor for tensor in first.tensors}
    theirs = {tensor.name: tensor for tensor in other.tensors}
    for tensor in (*first.tensors, *other.tensors):
        a, b = ours.get(tensor.name), theirs.get(tensor.name)
        next_step = "Average checkpoints with the same tensors, such as finetuned copies of one base"
        if a is None or b is None:
            having, lacking = (first, theirs) if b is None else (other, ours)
            why = f"{escape(first_name if b is None else name)} alone has it"
            if twin := _tied_to(tensor, having, lacking):
                why += f", beside {escape(twin)} that it is tied to, and the other stores that name alone"
                next_step = "Save both alike: save_pretrained stores a tied weight once"
        elif a.shape != b.shape:
            why = f"its shape is {list(b.shape)}, and {list(a.shape)} in {escape(first_name)}"
        elif a.dtype != b.dtype:
            why = f"its dtype is {b.dtype}, and {a.dtype} in {escape(first_name)}"
        else:
            continue
        raise InputInvalid(
            "not checkpoints of one model", path=name, tensor=tensor.name, why=why, next_step=next_step
        )


def _tied_to(tensor: TensorSpec, having: Checkpoint, lacking: Mapping[str, TensorSpec]) -> str | None:
    """Return a name of the same parameter that the other checkpoint has, where there is one."""
    ties = find_ties(
        having.tensors,
        config=having.config,
        configs=having.configs,
        metadata=having.metadata,
        stored_as_one=having.stored_as_one,
    )
    names = next((tie.all_names for tie in ties if tensor.name in tie.all_names), ())
    return next((name for name in names if name in lacking), None)


def refuse_adapter(checkpoint: Checkpoint, path: str) -> None:
    """Raise InputInvalid if the tensors are an adapter's factors, which have no mean."""
    factor = next(iter(factors_among(tensor.name for tensor in checkpoint.tensors)), None)
    kind = kind_of_factors(checkpoint)
    if factor is None and not kind:
        return
    raise InputInvalid(
        "cannot average adapters",
        path=path,
        tensor=factor,
        why=f"they hold factors{f' ({kind})' if kind else ''} of what they add to the weights, "
        "and the mean of factors does not give the mean of the products",
        next_step="Merge each adapter into its model (peft: merge_and_unload), and average the models",
    )


def check_same_config(first: Checkpoint, first_name: str, other: Checkpoint, name: str) -> None:
    """Raise InputInvalid where the configs make other models of the same tensors; it names the fields."""
    folders = first.configs.keys() & other.configs.keys()
    for ours, theirs, file in (
        (first.config, other.config, "config.json"),
        *((first.configs[at], other.configs[at], f"{at}/config.json") for at in sorted(folders)),
        (adapter_config(first), adapter_config(other), ADAPTER_CONFIG),
    ):
        if ours is None or theirs is None:
            continue
        fields = list(_differences(ours, theirs, ""))
        if fields:
            field, a, b = fields[0]
            also = f" (as do {list_some([field for field, _, _ in fields[1:]], 3)})" if fields[1:] else ""
            raise InputInvalid(
                f"the members' {file} differs",
                path=name,
                why=f'"{field}" is {_shown(b)}, and {_shown(a)} in {first_name}{also}',
                next_step="Average checkpoints of one model, or pass --ignore-config to keep the first's",
            )


def _differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], above: str
) -> Iterator[tuple[str, object, object]]:
    """Yield the fields in which two configs differ, with both values; one that is not there is null."""
    for key in dict.fromkeys((*ours, *theirs)):
        a, b = ours.get(key), theirs.get(key)
        if _OF_NO_ACCOUNT.fullmatch(key):
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{above}{key}.")
        elif (a or b) and _canonical(a) != _canonical(b):
            yield above + key, a, b


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def check_same_buffers(
    members: Sequence[Checkpoint], names: Sequence[str], *, average_statistics: bool = False
) -> list[str]:
    """Raise InputInvalid where a buffer is not the same everywhere; return a warning of estimates.

    A batch norm's statistics differ as the weights do, and their mean is not the averaged model's: they are
    averaged where the user says so.
    """
    first = members[0]
    buffers = _buffers(first)
    others = [{tensor.name: tensor for tensor in member.tensors} for member in members[1:]]
    estimated = []
    for tensor in first.tensors:
        # How many batches were counted makes no difference to anything.
        if tensor.name not in buffers or not tensor.nbytes or tensor.name.endswith(".num_batches_tracked"):
            continue
        is_statistic = _STATISTICS.fullmatch(buffers[tensor.name]) is not None
        for member, name, theirs in zip(members[1:], names[1:], others, strict=True):
            # The first's is read anew for each, as a mask or a queue may be too large to be kept.
            pieces = zip(_pieces(first, tensor), _pieces(member, theirs[tensor.name]), strict=True)
            if all(a == b for a, b in pieces):
                continue
            if is_statistic and average_statistics:
                estimated.append(tensor.name)
                break
            next_step = "Average checkpoints of one model, whose buffers agree"
            if is_statistic:
                next_step += ", or pass --average-statistics and estimate them again on data afterwards"
            raise InputInvalid(
                "a buffer differs",
                path=name,
                tensor=tensor.name,
                why=f"it is not learned but computed or counted, has no mean, and is another in {names[0]}",
                next_step=next_step,
            )
    if not estimated:
        return []
    return [
        f"{enumerate_some(estimated, 3)}: the mean of statistics is not what the averaged model needs: "
        "estimate them again on data"
    ]


def _buffers(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Return what is a buffer, each with the reason, as perturb tells it."""
    told = tell_checkpoint(checkpoint, "auto")
    plan = plan_checkpoint(checkpoint, NoiseSpec(), told)
    return look_at_values(plan, told, {file.name: file for file in checkpoint.sources}).buffers


def _pieces(checkpoint: Checkpoint, tensor: TensorSpec) -> Iterable[bytes]:
    source = next(file for file in checkpoint.sources if file.name == tensor.file)
    size = FLOAT_DTYPES.get(tensor.dtype, 1)
    step = _TILE_BYTES // size * size
    for start in range(0, tensor.nbytes, step):
        length = min(step, tensor.nbytes - start)
        yield bytes(source.read(tensor, start, memoryview(bytearray(length))))

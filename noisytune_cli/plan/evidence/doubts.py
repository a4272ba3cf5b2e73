"""Doubts: names of the kinds that frameworks give to buffers, where nothing stronger tells.

A mean, a queue, a centre or class weights are accumulated or given, seldom learned; a name alone proves
nothing, so such a tensor is perturbed, and one warning says how to keep it. So are single values that count
steps. What values would show (masks of zeros and ones, frequencies, tables) raises no doubt: they were looked
at. Nor do names that end in `weight` (`queue.weight`), which layers have, nor logarithms (`log_std`), which
are learned.
"""

from __future__ import annotations

import glob
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from noisytune_cli.errors import InputInvalid
from noisytune_cli.escape import enumerate_some, escape
from noisytune_cli.plan.evidence.declared import AVERAGE, is_class_weights, is_metrics_weight
from noisytune_cli.plan.evidence.structure import split_name
from noisytune_cli.records import Plan, Step, TensorSpec

#: What a name's own last word says that it is.
_LAST = re.compile(
    r"queues?|cent(er|re|roid)s?|means?|stds?|stddev|vars?|variances?|ema|avg|average|stats|statistics|counts?"
    r"|counter|buffers?|caches?|shadow|masks?|anchors|cov|covariance|energies|usages?"
)
_FIRST = re.compile(r"running|moving|ema|buffer|frozen|fixed|rand|random")
_WHOLE = re.compile(
    r"(pos|class|cls|ce|code|empty|label)_weights?|(class|cls|label)_(freqs?|frequenc(y|ies)|priors?)|(memory|feature|key)_?bank"
    r"|anchor_grids?"
)
#: How a normaliser may call one of its two, and the other then. Layers that draw noise, and mixtures, learn a
#: `mu` and a `sigma`: vectors alone, and none of a weight or bias, are in doubt.
_BESIDE = {"scale": "mean", "sigma": "mu", "mu": "sigma"}
_ONE_OF_TWO = re.compile(r"(?<![^_])(scale|sigma|mu)(?![^_])")
_LEARNED = frozenset(("log", "raw", "logit"))
#: What a single value may count or say, which one of many would be learned for.
_ONE_LAST = re.compile(
    r"steps?|iters?|iterations?|epochs?|updates?|batches|samples|version|eps|epsilon|total|inited|initted"
    r"|initiali[sz]ed"
)
_ONE_FIRST = re.compile(r"num|avg|total")

_SHOWN, _LONGEST = 6, 600

#: A name's numbers, which one pattern covers.
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def is_doubtful(tensor: TensorSpec, names: set[str]) -> bool:
    """Say whether a tensor's name is one that buffers have; `names` are all tensors'."""
    module, last = split_name(tensor.shown)
    if last.isdecimal():  # one of a list, which is called what its tensors are
        last = split_name(module[:-1])[1]
    words = re.findall(r"[^_-]+", last.lower()) or [""]
    if not _LEARNED.isdisjoint(words):
        return False
    if (one := _ONE_OF_TWO.search(last)) is not None:
        other = f"{module}{last[: one.start()]}{_BESIDE[one[0]]}{last[one.end() :]}"
        is_vector = sum(n != 1 for n in tensor.shape) <= 1 and {"weight", "bias"}.isdisjoint(words)
        if other in names and (one[0] == "scale" or is_vector):
            return True
    found = _LAST.fullmatch(words[-1]) or _FIRST.fullmatch(words[0]) or _WHOLE.fullmatch(last.lower())
    if tensor.elements == 1:
        found = found or _ONE_LAST.fullmatch(words[-1]) or _ONE_FIRST.fullmatch(words[0])
    return found is not None or is_class_weights(tensor, names) or is_metrics_weight(tensor, names)


def warning_of(plan: Plan) -> tuple[str, ...]:
    """Return the warning of what is perturbed though its name is a buffer's, none where there is no doubt."""
    doubts = [step for step in plan.steps if step.doubt and step.action != "copy"]
    if not doubts:
        return ()
    count = "tensor" if len(doubts) == 1 else f"{len(doubts)} tensors"
    return (
        f"{_shown(doubts)}: perturbed, though the name of the {count} may be that of statistics or of a "
        f"trainer's state, and nothing else tells; to keep {'it' if len(doubts) == 1 else 'them'}: "
        f"{exclude_line(plan, doubts)}",
    )


def warning_of_averages(plan: Plan, buffers: Mapping[str, str]) -> tuple[str, ...]:
    """Return the warning of averages (EMA) that stay without noise; `buffers` says why each buffer is one.

    Some loaders take the averages where there are any, so that the noise would be lost without a word.
    """
    kept = [s for s in plan.steps if s.reason == "buffer" and buffers.get(s.tensor.name) == AVERAGE]
    kept = [step for step in kept if step.tensor.elements > 1]
    if not kept:
        return ()
    what = "an average (EMA)" if len(kept) == 1 else f"{len(kept)} averages (EMA)"
    return (
        f"{_shown(kept)}: {what} of other weights, left without noise; a program that loads averages where "
        "it finds them gets none. --include names what is to get it instead",
    )


def refuse_doubts(plan: Plan, path: str) -> None:
    """Raise InputInvalid where a name leaves a doubt, which --strict asks for."""
    doubts = [step for step in plan.steps if step.doubt and step.action != "copy"]
    if doubts:
        raise InputInvalid(
            "parameter or buffer: in doubt",
            path=path,
            why=f"{_shown(doubts)} may be statistics or a trainer's state by name, and nothing else tells",
            next_step=f"Keep what is no parameter with {exclude_line(plan, doubts)}, or leave --strict out",
        )


def _shown(doubts: Sequence[Step]) -> str:
    return enumerate_some([step.tensor.shown for step in doubts], _SHOWN)


def exclude_line(plan: Plan, doubts: Iterable[Step]) -> str:
    """Return the options that leave the doubtful tensors as they are, and nothing else that is perturbed."""
    others = [s.tensor.name for s in plan.steps if s.action == "perturb" and not s.doubt]
    patterns: dict[str, None] = {}
    for step in doubts:
        name = step.tensor.name
        # What is not printed as it stands is any character.
        exact = "".join(c if escape(c) == c else "?" for c in glob.escape(name))
        wide = _NUMBER.sub("*", exact)
        if wide not in patterns:
            catches = re.compile(re.escape(wide).replace(r"\*", ".*").replace(r"\?", ".")).fullmatch
            if wide != exact and any(map(catches, others)):
                wide = exact
        patterns[wide] = None
    options = [f"--exclude={shlex.quote(pattern)}" for pattern in patterns]
    while len(options) > 1 and sum(map(len, options)) > _LONGEST:
        options = options[: len(options) // 2]
    more = len(patterns) - len(options)
    return " ".join(options) + (f" and {more} more, which --dry-run names" if more else "")

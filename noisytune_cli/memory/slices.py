"""The noise of a slice of a named tensor, for engines that fuse, split or rename weights.

An inference engine may hold q, k and v as rows of one tensor, and of each only its own rank's. Noise depends
on a tensor's name and an element's index in it, so a slice needs no more than to know where it belongs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from noisytune_cli.engine.matrix import UNMEASURED, outcome_of
from noisytune_cli.engine.threads import thread_count
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.memory import in_place
from noisytune_cli.memory.sharded import Dose, runs_of
from noisytune_cli.memory.tensors import LiveTensor, live_tensors_of
from noisytune_cli.noise.amplitudes import noise_of
from noisytune_cli.plan.arguments import Mix, make_spec, of_python
from noisytune_cli.plan.evidence.told import Told
from noisytune_cli.plan.plan import make_plan
from noisytune_cli.records import whole

if TYPE_CHECKING:
    from torch import Tensor


@of_python
def add_noise_(
    tensor: Tensor,
    *,
    name: str,
    seed: int | None = None,
    sigma: float | None = None,
    mix: Mix | None = None,
    shrink: float | None = None,
    noise: str | None = None,
    shape: Sequence[int] | None = None,
    offset: int | Sequence[int] = 0,
    threads: int | None = None,
) -> Tensor:
    """Add to a tensor the noise that `perturb --sigma` gives the same values of tensor `name`; return it.

    `tensor` is the slice whole[o0 : o0 + n0, o1 : o1 + n1, …] of the named tensor, with n its own shape.
    `shape` is that of the whole named tensor, as in the checkpoint; None where `tensor` is all of it.
    `offset` is o, the index in the whole of the slice's first element along each dimension, 0 along those
    that are not given; a single number is that of the first row. So the rank that holds rows 512 to 1023 of q
    gives `offset=512`, and one that holds these columns `offset=(0, 512)`. A view into a fused tensor is
    changed where it lies.

    `name` is the checkpoint's; of tied tensors, that whose noise they get (`stream` in a plan). The strength
    is `sigma` or a `mix` of σ; `seed`, `shrink` and `noise` are `perturb_`'s. A tensor that has a NaN or an
    infinity anywhere gets no noise on disk, so values that are not finite are refused here. Raises
    UsageError or InputInvalid before anything is changed.
    """
    if sigma is None and mix is None:
        raise UsageError(
            "add_noise_ without a strength",
            why="λ needs the std of the whole tensor, and this is a slice",
            next_step="Give sigma=, or mix= with the σ of each noise",
        )
    spec = make_spec(seed=seed, sigma=sigma, mix=mix, shrink=shrink, noise=noise, scope="absolute")
    count = thread_count(threads)
    (live,) = live_tensors_of([(name, tensor)])
    live = _placed(live, shape, offset)
    (described,) = live.specs()
    described = replace(described, shape=tuple(live.tensor.shape if shape is None else shape))
    (step,) = make_plan([described], spec, told=Told({}, {})).steps
    if step.reason == "not-float":
        raise InputInvalid(
            "cannot add noise",
            tensor=name,
            why=f"its values are {described.dtype}",
            next_step="Leave it out: only floating-point parameters get noise",
        )
    moments = in_place.measure([live.held], count)[0]
    if not all(m.finite for m in moments):
        raise InputInvalid(
            "cannot add noise",
            tensor=name,
            why="it holds NaN or infinite values, and as a whole it stays as it is",
            next_step="Leave it out, with all its slices",
        )
    outcome = outcome_of(spec, step, whole(described), UNMEASURED)
    found = noise_of(spec, step.stream, outcome)
    if found is not None:
        in_place.begin_noise([Dose(live.held, found)], count)()
    return tensor


def _placed(live: LiveTensor, shape: Any, offset: Any) -> LiveTensor:
    """Return a tensor as the slice that it is of one of another shape."""
    held, own = live.held, tuple(live.tensor.shape)
    try:
        whole = own if shape is None else tuple(operator.index(size) for size in shape)
        given = _indices(offset)
    except TypeError:
        whole, given = (), (-1,)
    if held.mesh is not None:
        if shape is not None or given:
            raise UsageError(
                f"shape= or offset= of {live.own[0]}",
                why="it is a DTensor, which knows where its part belongs",
                next_step="Leave them out, or give its local tensor",
            )
        return live
    at = given + (0,) * (len(whole) - len(given))
    fits = len(whole) == len(own) == len(at) and all(
        first >= 0 and first + size <= all_of for first, size, all_of in zip(at, own, whole, strict=True)
    )
    if not fits:
        raise UsageError(
            f"shape={shape!r} and offset={offset!r}",
            why=f"a tensor of shape {list(own)} is no slice from there of one of that shape",
            next_step="Give the shape of the whole named tensor, and the index in it of the first element "
            "along each dimension",
        )
    indices = [np.arange(first, first + size) for first, size in zip(at, own, strict=True)]
    return replace(live, held=replace(held, runs=tuple(runs_of(whole, indices))))


def _indices(offset: Any) -> tuple[int, ...]:
    """Return an offset along the dimensions that it names; TypeError for what is none."""
    try:
        first = operator.index(offset)
    except TypeError:
        return tuple(map(operator.index, offset))
    return (first,) if first else ()

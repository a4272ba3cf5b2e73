"""What the values of matrices in memory show: whether all are finite, and their std; found once.

Noise that is scaled with a std needs the moments of each matrix, those of sharded ones from all processes;
noise of a given std needs to know only that nothing in it is NaN or infinite. What was found is kept, so that
the same weights are measured once for any number of noises.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from noisytune_cli.engine.matrix import UNMEASURED, Spread, faint_below, outcome_of
from noisytune_cli.memory import in_place, matrices
from noisytune_cli.memory.ahead import SumsAhead
from noisytune_cli.memory.plan import Matrix, Parameter
from noisytune_cli.memory.sharded import LocalTensor, share_exact_sums, share_moments, share_verdicts
from noisytune_cli.noise.std import Moments, exact_std, exactly_equal, std_and_equality
from noisytune_cli.records import NoiseSpec, Part, copied

#: Bytes of divided parameters to measure at a time: on a device their matrices are copied first.
_BATCH_BYTES = 64 << 20

#: A matrix: the first of its parameter's names, and the part that it is.
_Key = tuple[str, Part]


class Spreads:
    """The spreads of matrices that do not change meanwhile."""

    def __init__(self, threads: int, ahead: SumsAhead | None = None) -> None:
        """Measure with so many threads; what is under way on a device is taken from `ahead`."""
        self._threads = threads
        self._ahead = SumsAhead() if ahead is None else ahead
        self._here: dict[_Key, list[Moments]] = {}
        self._whole: dict[_Key, list[Moments]] = {}
        self._finite: dict[_Key, bool] = {}
        self._faint: dict[tuple[str, float], int] = {}
        self._stds: dict[tuple[_Key, ...], tuple[float, bool]] = {}

    def settle(self, parameters: Sequence[Parameter], noise: NoiseSpec) -> None:
        """Give each matrix its std and its amplitude, or the reason why it has none."""
        wanted = {
            (parameter.steps[0].tensor.name, matrix.part): (parameter, matrix)
            for parameter in parameters
            for matrix in parameter.matrices
            if matrix.outcome is None
        }
        self._measure({key: each for key, each in wanted.items() if key not in self._here})
        spreads: dict[_Key, Spread]
        if noise.needs_std:
            self._share(wanted)
            spreads = self._scaled(wanted, noise)
        else:
            self._share_finite(wanted)
            spreads = {key: UNMEASURED for key in wanted if self._finite[key]}
        for key, (parameter, matrix) in wanted.items():
            matrix.outcome = outcome_of(noise, parameter.steps[0], matrix.part, spreads.get(key))
        for parameter in {id(parameter): parameter for parameter, _ in wanted.values()}.values():
            parameter.faint = self._faint_of(parameter, noise)

    def _faint_of(self, parameter: Parameter, noise: NoiseSpec) -> int:
        """Return how many values of a parameter are 0, or next to it beside their std: a matrix's alone."""
        held = parameter.live.held
        if held.values.dim() < 2:
            return 0
        stds = [matrix.outcome.std for matrix in parameter.matrices if matrix.outcome is not None]
        key = parameter.steps[0].tensor.name, faint_below(noise, stds)
        if key not in self._faint:
            self._faint[key] = in_place.faint(held, key[1])
        return self._faint[key]

    def leave_broken(self, parameters: Sequence[Parameter]) -> None:
        """Leave matrices as they are whose outcome is known, and whose values are not all finite here."""
        wanted = {
            (parameter.steps[0].tensor.name, matrix.part): (parameter, matrix)
            for parameter in parameters
            for matrix in parameter.matrices
            if matrix.outcome is not None and matrix.outcome.action != "copy"
        }
        self._measure(wanted)
        self._share_finite(wanted)
        for key, (_, matrix) in wanted.items():
            if not self._finite[key]:
                matrix.outcome = copied("non-finite")

    def _scaled(self, wanted: dict[_Key, tuple[Parameter, Matrix]], noise: NoiseSpec) -> dict[_Key, Spread]:
        """Return the spread to scale the noise of each finite matrix with."""
        finite = [key for key in wanted if all(m.finite for m in self._whole[key])]
        if noise.scope != "global":
            self._find_stds([(key,) for key in finite], wanted)
            return {key: Spread(*self._stds[key,]) for key in finite}
        found = set(finite)
        # The second storage of a tie is the same parameter, and its values count once; what is only shrunk
        # does not count.
        once = {
            (parameter.steps[0].stream, matrix.part): key
            for key, (parameter, matrix) in wanted.items()
            if key in found and parameter.steps[0].action == "perturb"
        }
        group = tuple(once.values())
        self._find_stds([group], wanted)
        return dict.fromkeys(finite, Spread(self._stds[group][0]))

    def _find_stds(
        self, groups: Sequence[tuple[_Key, ...]], wanted: dict[_Key, tuple[Parameter, Matrix]]
    ) -> None:
        """Find the std of each group of matrices together, and whether all its values are equal."""
        groups = [group for group in groups if group not in self._stds]
        undecided = []
        for group in groups:
            count = sum([part.elements for _, part in group])
            # Of fewer than two values there is no std, and nothing to scale noise with.
            moments = [m for key in group for m in self._whole[key]]
            std = std_and_equality(moments) if count > 1 else (0.0, True)
            if std is None:
                undecided.append(group)
            else:
                self._stds[group] = std
        keys = [key for group in undecided for key in group]
        sums = {i: in_place.exact_sums(_values(*wanted[key])) for i, key in enumerate(keys)}
        share_exact_sums([wanted[key][0].live.held for key in keys], sums)
        by_key = dict(zip(keys, sums.values(), strict=True))
        for group in undecided:
            count = sum([part.elements for _, part in group])
            total = sum([by_key[key] for key in group[1:]]) + by_key[group[0]]
            self._stds[group] = exact_std(total, count), exactly_equal(total, count)

    def _share(self, wanted: dict[_Key, tuple[Parameter, Matrix]]) -> None:
        """Have the moments of each whole matrix, from all processes that hold some of it."""
        missing = [key for key in wanted if key not in self._whole]
        held = [wanted[key][0].live.held for key in missing]
        whole = share_moments(held, [self._here[key] for key in missing])
        self._whole |= zip(missing, whole, strict=True)

    def _share_finite(self, wanted: dict[_Key, tuple[Parameter, Matrix]]) -> None:
        """Know of each whole matrix whether all its values are finite."""
        missing = []
        for key in wanted:
            if key in self._whole:
                self._finite[key] = all(m.finite for m in self._whole[key])
            elif key not in self._finite:
                missing.append(key)
        held = [wanted[key][0].live.held for key in missing]
        finite = share_verdicts(held, [all(m.finite for m in self._here[key]) for key in missing])
        self._finite |= zip(missing, finite, strict=True)

    def _measure(self, wanted: dict[_Key, tuple[Parameter, Matrix]]) -> None:
        """Measure what is here of each matrix; of divided parameters, a few are measured at a time."""
        whole, divided = [], []
        for key, (parameter, _) in wanted.items():
            if parameter.is_divided:
                divided.append(key)
            elif parameter.live.tensor in self._ahead:
                self._here[key] = [self._ahead.moments(parameter.live.tensor)]
            else:
                whole.append(key)
        self._measure_here({key: wanted[key][0].live.held for key in whole})
        batch: dict[_Key, LocalTensor] = {}
        nbytes = 0
        for _, group in itertools.groupby(divided, key=lambda key: id(wanted[key][0])):
            keys = list(group)
            views = matrices.views(wanted[keys[0]][0].live.held, [part for _, part in keys])
            batch |= zip(keys, views, strict=True)
            nbytes += sum(view.values.nbytes for view in views)
            if nbytes >= _BATCH_BYTES:
                self._measure_here(batch)
                batch, nbytes = {}, 0
        self._measure_here(batch)

    def _measure_here(self, held: dict[_Key, LocalTensor]) -> None:
        if held:
            self._here |= zip(held, in_place.measure(list(held.values()), self._threads), strict=True)


def _values(parameter: Parameter, matrix: Matrix) -> LocalTensor:
    """Return the values of a matrix that are held here."""
    held = parameter.live.held
    return matrices.views(held, [matrix.part])[0] if parameter.is_divided else held

"""What `perturb` is asked for, and its source opened: what can be refused is, before weights are fetched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from noisytune_cli.checkpoint.checkpoint import Checkpoint, open_found
from noisytune_cli.checkpoint.composition import Component
from noisytune_cli.checkpoint.find import Found, find
from noisytune_cli.checkpoint.quantized import refuse_quantized_config, refuse_quantized_models
from noisytune_cli.dtypes import BY_TORCH_NAME
from noisytune_cli.errors import InputInvalid, UsageError
from noisytune_cli.output.destination import resolve_folder
from noisytune_cli.output.space import check_space_to_fetch
from noisytune_cli.records import Conversion, NoiseSpec

#: The bytes of weight files that are one share of a job together, unless one alone has more.
SHARE_BYTES = 1 << 30


def make_conversion(dtype: str | None, to: str | None, dequantize: str | None) -> Conversion | None:
    """Return in what the output's weights are to differ from the source's, None where in nothing.

    `dtype` is one of BY_TORCH_NAME, `to` a format and `dequantize` a dtype, as options have them.
    """
    conversion = Conversion(
        dtype=None if dtype is None else BY_TORCH_NAME[dtype],
        format="safetensors" if to == "safetensors" else None,
        dequantized="BF16" if dequantize == "bf16" else None,
    )
    return None if conversion == Conversion() else conversion


def check_room_beside(found: Found, outs: Sequence[str]) -> None:
    """Raise ResourceExhausted unless `outs`, of the source's size each, fit beside what is to be fetched."""
    if outs and found.remote is not None:
        weights = sum(map(found.remote.size, found.files))
        places = [resolve_folder(out) for out in outs]
        check_space_to_fetch(found.root, found.missing_bytes, places, weights)


@dataclass(frozen=True)
class Request:
    """Where to read and how; what `perturb`, its dry run, its shares and `average` have in common."""

    source: str
    noise: NoiseSpec
    conversion: Conversion | None = None
    weights: str | None = None
    components: tuple[str, ...] = ()
    revision: str | None = None
    mmap: bool = False
    again: bool = False
    buffers_from: str = "auto"
    strict: bool = False
    follow_links: bool = False
    card: bool = False

    def find(self) -> Found:
        """Look at the source."""
        return find(
            self.source,
            weights=self.weights,
            components=self.components,
            revision=self.revision,
            follow_links=self.follow_links,
        )

    def open(
        self, *, headers_only: bool = False, few_values: bool = False, outs: Sequence[str] = ()
    ) -> Checkpoint:
        """Open the source; with `headers_only` no weights of a hub's are fetched (see `open_found`).

        `outs` name outputs of its size, for which there has to be room before it is fetched.
        Raises InputInvalid for one that is quantised, or was noised before and not asked for `again`.
        """
        found = self.find()
        with ExitStack() as opened:
            opened.callback(found.close)
            self._check_found(found)
            if self.conversion is None:
                check_room_beside(found, outs)
            source = opened.enter_context(
                open_found(found, mmap=self.mmap, headers_only=headers_only, few_values=few_values)
            )
            if self.conversion is not None and any(isinstance(file, Component) for file in source.sources):
                raise UsageError(
                    "--dtype, --to and --dequantize are for one model",
                    path=self.source,
                    why="the components of this one lie in folders, and get noise together",
                    next_step="Convert them one by one, with --weights=FOLDER/NAME",
                )
            if self._dequantizes:
                from noisytune_cli.checkpoint.dequantize import dequantize  # few weights are fp8

                source = dequantize(source, self.source)
            else:
                refuse_quantized_models(
                    source.models, metadata=source.metadata, path=self.source, are_all=True
                )
            opened.pop_all()
        return source

    @property
    def _dequantizes(self) -> bool:
        return self.conversion is not None and self.conversion.dequantized is not None

    def _check_found(self, found: Found) -> None:
        """Raise InputInvalid for what can be refused before its weights are fetched."""
        if found.previous_run is not None and not self.again:
            earlier = found.previous_run
            raise InputInvalid(earlier.what, path=self.source, why=earlier.why, next_step=earlier.next_step)
        if found.remote is not None:
            for config, path in found.named_configs:
                if self._dequantizes:
                    from noisytune_cli.checkpoint.dequantize import check_config

                    check_config(config or {}, path)
                else:
                    refuse_quantized_config(config or {}, path)

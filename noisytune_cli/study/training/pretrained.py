"""The checkpoint as runs start from it: loaded once, copied for each run, its head drawn from the run's seed.

The weights are float32 whatever they are stored as. What the checkpoint lacks, the task's head, is fresh: it
is initialised for each run as transformers initialises it, from the run's seed of initialisation alone, and
so are the adapters where LoRA is asked for.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from noisytune_cli.errors import InputInvalid, UsageError

#: False, not left out: transformers then asks on stdin whether to run the folder's Python files.
_AS_DATA: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters in place of full finetuning: peft's rank, alpha and dropout."""

    rank: int
    alpha: int
    dropout: float


@dataclass(frozen=True)
class Start:
    """A model to train: with the pretrained values by parameter name, and the names of what is fresh.

    `anchor` holds neither fresh parameters nor adapters; on the CPU its tensors are shared between runs.
    """

    model: PreTrainedModel
    anchor: dict[str, Tensor]
    fresh: frozenset[str]


class Pretrained:
    """A checkpoint's model with a head of `outputs` numbers, and its tokenizer (`tokenizer`)."""

    def __init__(self, folder: Path, outputs: int, lora: Lora | None = None) -> None:
        """Load from a folder; InputInvalid where transformers cannot make a classifier of what is there."""
        self.lora, self._folder = lora, folder
        with _quiet(), _explained(folder):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **_AS_DATA)
            self._model, info = AutoModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=outputs,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **_AS_DATA,
            )
        # Of a folder without a tokenizer transformers makes one to which every word is unknown.
        if len(self.tokenizer) <= len(self.tokenizer.all_special_ids):
            raise InputInvalid(
                "the tokenizer knows no words",
                path=folder,
                why="its files are absent, or hold nothing but special tokens",
                next_step="Put the model's tokenizer into the folder, as its save_pretrained writes it",
            )
        missing = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
        self._fresh = frozenset(missing & {name for name, _ in self._model.named_parameters()})
        self._check_encoder()
        # A decoder may know of no padding; its model then needs to be told what the rows are padded with.
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token_id is None:
            raise InputInvalid(
                "cannot pad rows of text",
                path=folder,
                why="the tokenizer has neither a padding nor an end-of-text token",
                next_step="Give its tokenizer_config.json a pad_token",
            )
        self.check_tokens([self.tokenizer.pad_token_id])
        # A decoder's head looks for the last token that is not this one.
        self._model.config.pad_token_id = self.tokenizer.pad_token_id
        with _explained(folder):
            self.tokenizer.padding_side = self._padding_side()
        self._values = {name: p.detach() for name, p in self._model.named_parameters()}

    @property
    def longest(self) -> int:
        """How many tokens a row may have: what the model has positions for.

        Where padding has a position (RoBERTa, XLM-R, MPNet), those of tokens begin behind it.
        """
        positions = getattr(self._model.config, "max_position_embeddings", None) or 0
        if positions < 1:  # none, or XLNet's -1: there is no limit
            positions = 1 << 20
        for name, module in self._model.named_modules():
            padding = getattr(module, "padding_idx", None)
            if "position" in name and padding is not None and isinstance(module.weight, Tensor):
                positions = min(positions, len(module.weight) - padding - 1)
        return int(min(positions, self.tokenizer.model_max_length))

    def check_tokens(self, ids: Iterable[int]) -> None:
        """Raise InputInvalid where the model has no embedding for a token's number."""
        try:
            table = getattr(self._model.get_input_embeddings(), "weight", None)
        except NotImplementedError:  # of characters (CANINE)
            return
        largest = max(ids)
        if table is not None and largest >= len(table):
            raise InputInvalid(
                "the tokenizer is not this model's",
                path=self._folder,
                why=f"it gives a token the number {largest}, and the model has {len(table)} embeddings",
                next_step="Put the model's own tokenizer there, or resize the model's embeddings to it",
            )

    def check_ends(self, rows: Sequence[Sequence[int]]) -> None:
        """Raise InputInvalid where some of an encoder-decoder's rows [n] end more often than the others.

        Its head reads the last end of each, and needs as many in all rows of a batch.
        """
        end = self._model.config.eos_token_id
        if not self._model.config.is_encoder_decoder or not isinstance(end, int):
            return
        ends = [row.count(end) for row in rows]
        if len(set(ends)) > 1:
            odd = rows[ends.index(max(ends))]
            raise InputInvalid(
                "a row's text holds the token that ends a row",
                path=self._folder,
                why=f"the model cannot tell where this one ends: {self.tokenizer.decode(odd)[:200]}",
                next_step=f"Take {self.tokenizer.decode([end])} out of the rows' texts",
            )

    def _check_encoder(self) -> None:
        """Raise InputInvalid where more than the head and a pooler would begin at random values.

        So it is where names or config.json do not belong to the weights, of which transformers only warns.
        """
        encoder = f"{self._model.base_model_prefix}."
        lacking = sorted(name for name in self._fresh if name.startswith(encoder) and "pool" not in name)
        if lacking:
            raise InputInvalid(
                "weights do not fit the model",
                path=self._folder,
                why=f"{len(lacking)} of its parameters have none of their name and shape, so that they would "
                f"begin at random: {lacking[0]}",
                next_step="Give a checkpoint whose weights and config.json belong together",
            )

    def _padding_side(self) -> str:
        """Return where rows are padded: on the right, unless only on the left it changes no row's logits.

        So it is for a head that takes the last position whatever the mask says (XLNet). Of models that mix
        all positions (FNet) either side changes them.
        """
        row = self.tokenizer("a", padding=False)["input_ids"] or [self.tokenizer.pad_token_id]
        padding = [self.tokenizer.pad_token_id] * 3
        device = next(self._model.parameters()).device

        def logits(before: list[int], after: list[int]) -> Tensor:
            ids = torch.tensor([before + row + after], device=device)
            mask = torch.tensor([[0] * len(before) + [1] * len(row) + [0] * len(after)], device=device)
            found: Tensor = self._model(input_ids=ids, attention_mask=mask).logits
            return found

        with torch.inference_mode():
            alone = logits([], [])

            def same(padded: Tensor) -> bool:
                return torch.allclose(alone, padded, rtol=1e-3, atol=1e-5, equal_nan=True)

            return "left" if not same(logits([], padding)) and same(logits(padding, [])) else "right"

    def start(self, init_seed: int, device: torch.device) -> Start:
        """Return a copy on the device, with a head (and adapters) drawn from `init_seed`."""
        model = copy.deepcopy(self._model)
        torch.manual_seed(init_seed)
        self._draw_fresh(model)
        names = {name: name for name in self._values}
        if self.lora is not None:
            model = _with_adapters(model, self.lora, self._head(model))
            names = {name: _without_adapters(name) for name, _ in model.named_parameters()}
        model.to(device)
        anchor = {
            name: self._values[own].to(device)
            for name, own in names.items()
            if own in self._values and own not in self._fresh
        }
        return Start(model, anchor, frozenset(name for name, own in names.items() if own in self._fresh))

    def _head(self, model: PreTrainedModel) -> list[str]:
        """Return the modules that are the task's: those beside the encoder, and what is fresh within it."""
        parts = dict(model.named_children())
        encoder = parts.pop(model.base_model_prefix, None)
        beside = [name for name, part in parts.items() if encoder is not None and [*part.parameters()]]
        fresh = {name.rpartition(".")[0] for name in self._fresh}
        return beside + sorted(name for name in fresh if name.partition(".")[0] not in beside)

    def _draw_fresh(self, model: Any) -> None:
        """Initialise what the checkpoint lacked as transformers does: modules in order, a parent last.

        A parent may have its own rule for its layers, as T5's head has.
        """
        parameters = dict(model.named_parameters())
        fresh = {id(parameters[name]) for name in self._fresh}

        def draw(module: torch.nn.Module) -> None:
            if any(id(parameter) in fresh for parameter in module.parameters()):
                model._init_weights(module)

        with torch.no_grad():
            model.apply(draw)
            for name in parameters.keys() - self._fresh:
                parameters[name].copy_(self._values[name])


def _with_adapters(model: PreTrainedModel, lora: Lora, head: list[str]) -> Any:
    """Return the model with LoRA adapters, which train with the head's modules."""
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    config = LoraConfig(
        task_type="SEQ_CLS",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        # Where peft knows no layers of its own choice for an architecture: all but the head.
        target_modules=None if model.config.model_type in KNOWN else "all-linear",
        exclude_modules=rf"({'|'.join(map(re.escape, head))})(\..*)?" if head else None,
        modules_to_save=head or None,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise UsageError(
            "--lora", why=f"peft refuses this model: {error}", next_step="Finetune it in full"
        ) from error


def _without_adapters(name: str) -> str:
    """Return a parameter's name as it was before peft wrapped the model."""
    plain = name.removeprefix("base_model.model.")
    for wrapper in (".base_layer", ".modules_to_save.default", ".original_module"):
        plain = plain.replace(wrapper, "")
    return plain


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' remarks and progress bars off stderr."""
    logging: Any = transformers_logging  # whose functions have no types
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    restore: Callable[[], None] = logging.enable_progress_bar if bars else logging.disable_progress_bar
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        restore()


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn whatever transformers raises about a checkpoint into the error the user sees."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # of every kind: its packages have classes of their own, and assertions
        lines = str(error).strip().splitlines()
        if "trust_remote_code" in str(error):
            raise InputInvalid(
                "cannot load a classifier",
                path=folder,
                why="its architecture or tokenizer is Python code that comes with it, which is never run",
                next_step="Give a checkpoint of an architecture that transformers has",
            ) from error
        raise InputInvalid(
            "cannot load a classifier",
            path=folder,
            why=lines[0] if lines else type(error).__name__,
            next_step="Give a folder with the model's config.json, its weights and its tokenizer",
        ) from error

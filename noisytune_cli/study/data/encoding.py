"""TaskRows as a model reads them: token ids, cut to a length, padded batch by batch.

A row is encoded once for the whole study. Batches are padded to their own longest row, on the tokenizer's
side, so the padding costs little where rows are short; evaluation takes rows of one length together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from noisytune_cli.study.data.tasks import TaskRows


@dataclass(frozen=True)
class Encoded:
    """[n] rows: for each input of the model its [n] lists of ids, what they are padded with, and labels.

    `left` is where: before the ids, not after them.
    """

    inputs: dict[str, list[list[int]]]
    padding: dict[str, int]
    labels: tuple[float, ...]
    regression: bool
    left: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, places: Sequence[int]) -> Encoded:
        """Return the rows at `places`, in that order."""
        inputs = {name: [rows[i] for i in places] for name, rows in self.inputs.items()}
        return replace(self, inputs=inputs, labels=tuple(self.labels[i] for i in places))

    def length(self, place: int) -> int:
        """Return how many tokens a row has."""
        return len(self.inputs["input_ids"][place])

    def batch(self, places: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        """Return the inputs [B, L] int64 and `labels` [B] (int64 classes, or float32) of some rows."""
        batch = {}
        for name, rows in self.inputs.items():
            length = max(len(rows[i]) for i in places)
            padded = []
            for i in places:
                padding = [self.padding[name]] * (length - len(rows[i]))
                padded.append(padding + rows[i] if self.left else rows[i] + padding)
            batch[name] = torch.tensor(padded, dtype=torch.int64)
        kind = torch.float32 if self.regression else torch.int64
        batch["labels"] = torch.tensor([self.labels[i] for i in places], dtype=kind)
        if device.type == "cpu":
            return batch
        return {name: values.pin_memory().to(device, non_blocking=True) for name, values in batch.items()}

    def by_length(self, batch_size: int) -> Iterator[list[int]]:
        """Yield the places of all rows, batch by batch, the shortest first."""
        order = sorted(range(len(self)), key=self.length)
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


def encode(
    tokenizer: PreTrainedTokenizerBase, rows: TaskRows, *, max_length: int, regression: bool
) -> Encoded:
    """Return rows as token ids, the longer text cut first where a row has more than `max_length`.

    A row without any, which no model can read, gets the padding's as its text.
    """
    first = [texts[0] for texts in rows.texts]
    second = [texts[1] for texts in rows.texts] if len(rows.texts[0]) > 1 else None
    found = tokenizer(first, second, truncation=True, max_length=max_length, padding=False)
    padding = {
        "input_ids": tokenizer.pad_token_id,
        "attention_mask": 0,
        "token_type_ids": tokenizer.pad_token_type_id,
    }
    empty = {**padding, "attention_mask": 1}
    inputs = {name: [ids or [empty[name]] for ids in found[name]] for name in padding if name in found}
    left = tokenizer.padding_side == "left"
    return Encoded(inputs, {name: padding[name] for name in inputs}, rows.labels, regression, left)

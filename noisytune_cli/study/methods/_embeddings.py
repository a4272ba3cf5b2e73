"""Change token embeddings on their way into a model, for as long as a `with` block lasts.

A hook at the table sees the raw embeddings, before positions and LayerNorm, and the model still gets its
token ids: a decoder finds its last token by them, which it could not if it were given embeddings instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from noisytune_cli.errors import InputInvalid


@contextmanager
def changed_embeddings(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the token embeddings [B, L, d] by `change` of them in every forward pass inside the block.

    Raises InputInvalid where the model looks no token up in the table that it calls its input embeddings.
    """
    looked_up = 0

    def replace(module: nn.Module, inputs: object, embeddings: Tensor) -> Tensor:
        nonlocal looked_up
        looked_up += 1
        return change(embeddings)

    weight = getattr(model.get_input_embeddings(), "weight", None)
    # Encoder and decoder of one model may have modules of their own over one table.
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is weight]
    handles = [table.register_forward_hook(replace) for table in tables]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not looked_up:
        raise InputInvalid(
            f"cannot add noise to the embeddings of {type(model).__name__}",
            why="it does not look tokens up in its input embeddings",
            next_step="Leave out the methods that need it: r3f, r4f, neftune",
        )

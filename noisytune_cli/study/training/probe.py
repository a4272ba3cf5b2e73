"""A probe of representational collapse: what a finetuned encoder still knows about another task.

As in Aghajanyan et al. (ICLR 2021): the encoder is frozen and a linear model learns another task from it. The
features of a row are the mean of the last hidden states over its tokens; the linear model is scikit-learn's
logistic regression (ridge regression for a number), on standardised features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from noisytune_cli.study.training.metrics import score

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from noisytune_cli.study.data.encoding import Encoded
    from noisytune_cli.study.data.tasks import Data


def run_probe(
    model: PreTrainedModel, data: Data, train: Encoded, dev: Encoded, batch_size: int
) -> dict[str, Any]:
    """Return the task's name and the scores, on its dev rows, of a linear model on frozen features."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    task = data.task
    learner = Ridge() if task.regression else LogisticRegression(max_iter=1000, random_state=0)
    pipeline = make_pipeline(StandardScaler(), learner)
    pipeline.fit(features(model, train, batch_size), train.labels)
    predictions = pipeline.predict(features(model, dev, batch_size)).tolist()
    return {"task": task.name, **score(task.metrics, predictions, dev.labels, data.outputs)}


def features(model: PreTrainedModel, rows: Encoded, batch_size: int) -> NDArray[np.float32]:
    """Return [n, H] float32: each row's mean last hidden state, in the order of the rows.

    Of a model with a decoder it is the encoder's; what is not finite, of a run that diverged, is 0.
    """
    import torch

    peft = getattr(model, "get_base_model", None)
    whole = peft() if peft is not None else model
    encoder = getattr(whole, whole.base_model_prefix)
    if whole.config.is_encoder_decoder:
        encoder = encoder.get_encoder()
    device = next(whole.parameters()).device
    found: list[torch.Tensor] = []
    places: list[int] = []
    with torch.inference_mode():
        for chosen in rows.by_length(batch_size):
            inputs = {name: t for name, t in rows.batch(chosen, device).items() if name != "labels"}
            states = encoder(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].unsqueeze(-1).float()
            found.append(((states * mask).sum(1) / mask.sum(1)).cpu())
            places += chosen
    pooled = torch.empty_like(torch.cat(found))
    pooled[places] = torch.cat(found)
    return pooled.nan_to_num(0.0, 0.0, 0.0).numpy()

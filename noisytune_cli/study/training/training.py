"""One run: a model, the order of the data, the loop over steps, and the scores at its end.

Everything that is drawn comes from the run's seeds: the head from the seed of initialisation; batches and
dropout from the seed of order; a method's noise from the seed of noise. So a run's numbers are the same
whichever runs went before. The score is that of the last step; no better step is searched for.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from noisytune_cli.study.combination import MethodCombination, combine
from noisytune_cli.study.data.encoding import Encoded, encode
from noisytune_cli.study.data.tasks import Data, read_data
from noisytune_cli.study.design import Run, Split, split_rows
from noisytune_cli.study.methods import Member, Training
from noisytune_cli.study.settings import Material, Recipe
from noisytune_cli.study.training.drift import measure_drift, snapshot
from noisytune_cli.study.training.metrics import score
from noisytune_cli.study.training.pretrained import Lora, Pretrained
from noisytune_cli.study.training.probe import run_probe

#: Gradients are clipped at this norm, for each member.
_CLIP = 1.0

#: Rows of a batch in evaluation, times what a batch in training has.
_EVALUATION = 4

#: Batches of a stretch of rows that are sorted by length.
_STRETCH = 16

#: Called after each step.
Step = Callable[[], None]


@dataclass(frozen=True)
class _ProbeRows:
    data: Data
    train: Encoded
    dev: Encoded


class Bench:
    """Where runs are carried out, one after the other: the model and the rows, loaded once a process."""

    def __init__(self, material: Material, recipe: Recipe, device: str, threads: int) -> None:
        """Load what the runs need; the errors of reading rows and of loading a model."""
        torch.set_num_threads(threads)
        self.recipe, self.device = recipe, torch.device(device)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.data = read_data(material.task, material.train, material.dev)
        lora = Lora(recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout) if recipe.lora_rank else None
        self.pretrained = Pretrained(material.model, self.data.outputs, lora)
        self.split: Split = split_rows(
            len(self.data.train),
            train_rows=material.train_rows,
            held_out=material.held_out,
            seed=material.data_seed,
        )
        self.train = self._encode(self.data, self.split.train, "train")
        self.held_out = self._encode(self.data, self.split.held_out, "train") if self.split.held_out else None
        self.dev = self._encode(self.data, range(len(self.data.dev)), "dev")
        self.probe: _ProbeRows | None = None
        if material.probe is not None:
            data = read_data(material.probe, material.probe_train, material.probe_dev)
            chosen = split_rows(
                len(data.train),
                train_rows=min(material.probe_rows, len(data.train)),
                held_out=0,
                seed=material.data_seed,
            )
            self.probe = _ProbeRows(
                data,
                self._encode(data, chosen.train, "train"),
                self._encode(data, range(len(data.dev)), "dev"),
            )

    def _encode(self, data: Data, places: Sequence[int], part: Literal["train", "dev"]) -> Encoded:
        rows = (data.train if part == "train" else data.dev).take(places)
        length = min(self.recipe.max_length, self.pretrained.longest)
        found = encode(self.pretrained.tokenizer, rows, max_length=length, regression=data.task.regression)
        self.pretrained.check_tokens(max(ids) for ids in found.inputs["input_ids"])
        self.pretrained.check_ends(found.inputs["input_ids"])
        return found

    def check(self, runs: Iterable[Run]) -> None:
        """Raise what the methods of some runs raise of this model, before any run is trained."""
        kinds: dict[tuple[Any, ...], Run] = {}
        for run in runs:
            kinds.setdefault((run.method, *sorted(run.options.items())), run)
        # What the first of them raises comes at once, anyway.
        for run in list(kinds.values())[1:]:
            method, training = self._begin(run, _Forward(self.device, self.recipe.precision))
            with torch.no_grad():
                method.loss(training, training.members[0], self.train.batch([0], self.device))

    def carry_out(self, run: Run, after_step: Step = lambda: None) -> dict[str, Any]:
        """Train and evaluate one run; return its record, a line of runs.jsonl."""
        started = time.perf_counter()
        recipe = self.recipe
        rows = self.train.take(range(len(self.split.share(run.share))))
        forward = _Forward(self.device, recipe.precision)
        method, training = self._begin(run, forward)
        before = snapshot(training.model)
        counts: Counter[str] = Counter()
        loss = self._train(training, method, rows, counts, after_step)
        counts["forwards"] = forward.count
        method.finish(training)
        models: list[nn.Module] = [member.model for member in training.members]
        for model in models:
            model.eval()
        predictions = {
            part: self._predict(models, encoded, forward)
            for part, encoded in (("dev", self.dev), ("held_out", self.held_out))
            if encoded is not None
        }
        names, classes = self.data.task.metrics, self.data.outputs
        held_out = self.held_out
        return {
            "schema": 1,
            "task": self.data.task.name,
            **run.record(),
            "train_rows": len(rows),
            "held_out_rows": 0 if held_out is None else len(held_out),
            "dev_rows": len(self.dev),
            "epochs": recipe.epochs,
            "steps": training.steps,
            "anchor": recipe.anchor,
            "fresh": bool(training.fresh) or training.peft,
            "dev": score(names, predictions["dev"], self.dev.labels, classes),
            "held_out": None
            if held_out is None
            else score(names, predictions["held_out"], held_out.labels, classes),
            "primary": names[0],
            "predictions": predictions["dev"],
            "drift": None if training.peft else measure_drift(before, models[0]),
            "probe": None if self.probe is None else self._run_probe(models[0], self.probe),
            "member_steps": counts["member_steps"],
            "forwards": counts["forwards"],
            "loss": loss,
            "seconds": round(time.perf_counter() - started, 3),
        }

    def _begin(self, run: Run, forward: _Forward) -> tuple[MethodCombination, Training]:
        """Return a run's methods, and the run as they see it: prepared, with its one member."""
        recipe = self.recipe
        method = combine(run.method, _settings(run))
        start = self.pretrained.start(_derive(run.init_seed, "init"), self.device)
        training = Training(
            model=start.model,
            anchor=start.anchor,
            fresh=start.fresh,
            regression=self.data.task.regression,
            task_loss=_squared_error if self.data.task.regression else nn.functional.cross_entropy,
            steps=self.split.steps(run.share, recipe),
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            warmup=recipe.warmup,
            peft=bool(recipe.lora_rank),
            init_seed=run.init_seed,
            order_seed=run.order_seed,
            noise_seed=run.noise_seed,
            generator=torch.Generator().manual_seed(run.noise_seed),
            new_member=lambda model: Member(cast(Any, model), self._optimizer(model), None),
            forward=forward,
            anchor_kind="noised" if recipe.anchor == "noised" else "original",
        )
        method.prepare(training)
        optimizer = method.make_optimizer(training) or self._optimizer(training.model)
        scheduler = _linear_schedule(optimizer, round(recipe.warmup * training.steps), training.steps)
        training.members = [Member(training.model, optimizer, scheduler)]
        return method, training

    def _train(
        self, training: Training, method: Any, rows: Encoded, counts: Counter[str], after_step: Step
    ) -> float | None:
        """Go through all steps; return the mean loss over the last epoch, None where it is not finite."""
        torch.manual_seed(_derive(training.order_seed, "dropout"))
        total = torch.zeros((), device=self.device)
        summed = 0
        last_epoch = training.steps - training.steps // self.recipe.epochs
        for step, places in enumerate(self._batches(rows, training.order_seed)):
            batch = rows.batch(places, self.device)
            method.before_step(training, step)
            for member in training.members:
                member.model.train()
                loss = method.loss(training, member, batch)
                loss.backward()
                held = [p for group in member.optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(held, _CLIP)
                member.optimizer.step()
                if member.scheduler is not None:
                    member.scheduler.step()
                member.optimizer.zero_grad()
                counts["member_steps"] += 1
                if step >= last_epoch:
                    total += loss.detach()
                    summed += 1
            method.after_step(training, step)
            after_step()
        mean = float(total) / max(summed, 1)
        return mean if math.isfinite(mean) else None

    def _batches(self, rows: Encoded, order_seed: int) -> Iterator[list[int]]:
        """Yield the places of each batch, every epoch in an order of its own; one of them may be short."""
        generator = torch.Generator().manual_seed(_derive(order_seed, "order"))
        size = self.recipe.batch_size
        for _ in range(self.recipe.epochs):
            order = torch.randperm(len(rows), generator=generator).tolist()
            if not self.recipe.group_by_length:
                yield from _cut(order, size)
                continue
            # Sorted within stretches of the random order: so batches are not the same in every epoch.
            stretches = [sorted(s, key=rows.length) for s in _cut(order, size * _STRETCH)]
            batches = [batch for stretch in stretches for batch in _cut(stretch, size)]
            for index in torch.randperm(len(batches), generator=generator).tolist():
                yield batches[index]

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return AdamW over what is to be trained, without decay for biases and norms."""
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.recipe.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        # Fused: one pass over the memory. On a CPU it takes a fifth of the default's time.
        return torch.optim.AdamW(groups, lr=self.recipe.learning_rate, fused=True)

    def _predict(self, models: Sequence[nn.Module], rows: Encoded, forward: _Forward) -> list[float]:
        """Return [n] predictions: a class index or a number; those of several models together.

        Classes are voted for by majority, and where votes are equal the mean probability decides.
        """
        count, regression = len(rows), self.data.task.regression
        found = torch.zeros(len(models), count, self.data.outputs)
        with torch.inference_mode():
            for places in rows.by_length(self.recipe.batch_size * _EVALUATION):
                batch = rows.batch(places, self.device)
                for index, model in enumerate(models):
                    found[index, places] = forward(model, batch).cpu()
        if regression:
            return [float(value) for value in found.mean(0).squeeze(-1).nan_to_num().tolist()]
        votes = nn.functional.one_hot(found.argmax(-1), self.data.outputs).sum(0)
        probability = found.softmax(-1).mean(0).nan_to_num()
        return [int(c) for c in (votes + probability / 2).argmax(-1).tolist()]

    def _run_probe(self, model: Any, rows: _ProbeRows) -> dict[str, Any]:
        size = self.recipe.batch_size * _EVALUATION
        return run_probe(model, rows.data, rows.train, rows.dev, size)


class _Forward:
    """The forward pass of every method: logits in float32; `count` says how often it ran in training."""

    def __init__(self, device: torch.device, precision: str) -> None:
        self.count = 0
        self._device, self._precision = device, precision

    def __call__(self, model: nn.Module, batch: Any, /, **replaced: Tensor | None) -> Tensor:
        """Return logits [B, C] in float32 of a batch's inputs, some of them replaced or left out."""
        inputs = {**{name: values for name, values in batch.items() if name != "labels"}, **replaced}
        self.count += torch.is_grad_enabled()
        with self._autocast():
            logits: Tensor = model(**{name: v for name, v in inputs.items() if v is not None}).logits
        return logits.float()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision == "bfloat16":
            return torch.autocast(self._device.type, dtype=torch.bfloat16)
        return nullcontext()


def _cut(places: list[int], size: int) -> list[list[int]]:
    """Return places in pieces of `size`; the last one may be shorter."""
    return [places[start : start + size] for start in range(0, len(places), size)]


def _linear_schedule(
    optimizer: torch.optim.Optimizer, warmup: int, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a rate that rises for `warmup` steps and then falls to 0 at the last."""

    def factor(step: int) -> float:
        return step / warmup if step < warmup else max(0.0, (steps - step) / max(1, steps - warmup))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.mse_loss(logits.squeeze(-1), labels)


def _settings(run: Run) -> dict[str, Any]:
    """Return a run's options by full name, noisytune's λ, noise and scope among them."""
    own = {"noisytune.lambda": run.lam, "noisytune.noise": run.noise, "noisytune.scope": run.scope}
    return {**run.options, **{name: value for name, value in own.items() if value is not None}}


def _derive(seed: int, use: str) -> int:
    """Return another seed for each use of one, so that no two uses draw the same numbers."""
    digest = hashlib.blake2b(f"{use} {seed}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")

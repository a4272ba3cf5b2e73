"""A ladder of noise on a real model: an encoder finetuned on SST-2, scored under Gaussian noise of growing σ.

    python benchmarks/ladder.py MODEL SST2 OUT [--labels N] [--learning-rate X] [--threads N]

MODEL is the folder of all-MiniLM-L6-v2 or, with the rate 5e-5, of all-mpnet-base-v2; SST2 that of GLUE's
SST-2 (train.tsv, dev.tsv). Into the folder OUT go the table (ladder.csv) and the figures (ladder-sigma.png,
ladder-lambda.png) that docs/recipes.md shows: accuracy on the 872 rows of dev.tsv, five seeds for each σ, and
the same for λ, in units of each matrix's std.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # all is on this disk

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import noisytune_cli

SIGMAS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03)
LAMBDAS = (0.15, 0.3, 0.6, 1.0, 1.5)
SEEDS = range(5)

EPOCHS, BATCH, LENGTH = 3, 16, 64


def read(path: Path) -> list[tuple[str, int]]:
    """Return the sentences of a GLUE file with their labels."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row["sentence"], int(row["label"])) for row in rows]


class Scorer:
    """The rows of the development set, in batches of like length."""

    def __init__(self, tokenizer: object, rows: list[tuple[str, int]]) -> None:
        """Prepare the batches once."""
        rows = sorted(rows, key=lambda row: len(row[0]))
        self._batches = [
            (_encode(tokenizer, rows[i : i + 64]), torch.tensor([label for _, label in rows[i : i + 64]]))
            for i in range(0, len(rows), 64)
        ]
        self._count = len(rows)

    def __call__(self, model: nn.Module) -> float:
        """Return the accuracy in percent."""
        with torch.inference_mode():
            right = sum(
                int((model(**batch).logits.argmax(1) == labels).sum()) for batch, labels in self._batches
            )
        return 100 * right / self._count


def _encode(tokenizer: object, rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
    texts = [text for text, _ in rows]
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"))  # type: ignore[operator]


def finetune(folder: Path, rows: list[tuple[str, int]], rate: float) -> tuple[nn.Module, object]:
    """Finetune on these rows and return model and tokenizer: AdamW, a rate that falls to 0, no dropout."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps = EPOCHS * (len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order = random.Random(0)
    for _ in range(EPOCHS):
        shuffled = order.sample(rows, len(rows))
        for i in range(0, len(rows) // BATCH * BATCH, BATCH):
            batch = shuffled[i : i + BATCH]
            labels = torch.tensor([label for _, label in batch])
            model(**_encode(tokenizer, batch), labels=labels).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model, tokenizer


def main() -> None:
    """Finetune, climb, and write table and figures."""
    parser = argparse.ArgumentParser(description="Score a finetuned encoder under growing noise.")
    parser.add_argument("model", type=Path)
    parser.add_argument("sst2", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--labels", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="from which it falls to 0")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    options.out.mkdir(exist_ok=True)
    started = time.monotonic()
    rows = random.Random(0).sample(read(options.sst2 / "train.tsv"), options.labels)
    model, tokenizer = finetune(options.model, rows, options.learning_rate)
    score = Scorer(tokenizer, read(options.sst2 / "dev.tsv"))
    print(f"finetuned on {len(rows)} rows in {time.monotonic() - started:.0f} s: {score(model):.1f} %")
    by_sigma = noisytune_cli.ladder(model, score, sigma=SIGMAS, seeds=SEEDS)
    by_lambda = noisytune_cli.ladder(model, score, lam=LAMBDAS, seeds=SEEDS)
    by_sigma.figure(path=options.out / "ladder-sigma.png")
    by_lambda.figure(path=options.out / "ladder-lambda.png")
    with (options.out / "ladder.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("strength", "value", "seed", "accuracy"))
        for name, ladder in (("sigma", by_sigma), ("lam", by_lambda)):
            table.writerows((name, row[name], row["seed"], row["score"]) for row in ladder)
    for name, strengths, ladder in (("σ", SIGMAS, by_sigma), ("λ", LAMBDAS, by_lambda)):
        print(f"\n| {name} | mean | lowest | highest |\n| --- | --- | --- | --- |")
        print(f"| 0 | {ladder[0]['score']:.1f} | | |")
        for value in strengths:
            found = [row["score"] for row in ladder if row[ladder.strength] == value]
            print(f"| {value:g} | {sum(found) / len(found):.1f} | {min(found):.1f} | {max(found):.1f} |")
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

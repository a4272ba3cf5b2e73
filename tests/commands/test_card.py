"""--card: the model card of an output claims no base, and no scores, that are the source's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from checkpoints import save, weights
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from noisytune_cli.cli.app import app
from noisytune_cli.commands import card as command
from noisytune_cli.commands.average import average
from noisytune_cli.commands.perturb import Request, perturb, perturb_each, plan_perturb
from noisytune_cli.commands.replay import replay
from noisytune_cli.commands.verify import verify
from noisytune_cli.errors import InputInvalid, Mismatch, UsageError
from noisytune_cli.manifest.average import read_any_manifest
from noisytune_cli.records import Combination, Conversion, Manifest, NoiseSpec, SourceRecord, Term
from tests.commands.test_replay import tree
from tests.commands.test_verify import found

COMMIT = "c0ffee" + "0" * 34

CARD = """---
# by hand
language:
- en
license: apache-2.0   # kept as it was typed
tags: [bert, 'no', "a: b"]
library_name: transformers
base_model: someone/else
base_model_relation: quantized
model-index:
- name: bert
  results:
  - task: {type: fill-mask}
    dataset: {type: glue, name: GLUE}
    metrics:
    - type: accuracy
      value: 0.99
pipeline_tag: fill-mask
---
# Bert

It is 99 % accurate.
"""


def source(folder: Path, card: str | bytes | None = CARD, **others: str) -> Path:
    """A checkpoint's folder with a card."""
    save(folder / "model.safetensors", {"w": weights("F32", 40, 8), "v": weights("F32", 9, seed=1)})
    if card is not None:
        (folder / "README.md").write_bytes(card.encode() if isinstance(card, str) else card)
    for name, text in others.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def on_hub(folder: Path, name: str = "owner--model", **options: Any) -> Path:
    """The same where the hub's cache has it, which tells id and commit."""
    return source(folder / f"models--{name}" / "snapshots" / COMMIT, **options)


def carded(base: Path, out: Path, **noise: Any) -> ModelCard:
    """Perturb with a card, and read it as the hub does."""
    perturb(Request(str(base), NoiseSpec(**noise), card=True), str(out))
    return ModelCard.load(out / "README.md")


def entries(base: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((base / "README.md").read_text().split("---")[1]))


def test_a_card_names_its_base_and_keeps_the_rest(tmp_path: Path) -> None:
    base, out = on_hub(tmp_path), tmp_path / "out"
    card = carded(base, out, lam=0.3, seed=7)
    assert entries(out) == {
        "language": ["en"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "base_model": "owner/model",
        "base_model_relation": "finetune",
        "tags": ["bert", "no", "a: b", "noisytune"],
    }
    assert card.data.eval_results is None
    text = (out / "README.md").read_text()
    assert text.startswith("---\n# by hand\nlanguage:\n- en\nlicense: apache-2.0   # kept as it was typed\n")
    for said in (
        "λ: 0.3",
        "seed: 7",
        f"owner/model at commit {COMMIT}",
        "noisytune replay noisytune.json -o OUT",
    ):
        assert said in text
    assert text.endswith("# Bert\n\nIt is 99 % accurate.\n")


#: The bytes of a card: a manifest's digest is of these, so they never change.
FROZEN = """---
license: mit
base_model: owner/model
base_model_relation: finetune
tags:
- noisytune
---

## Weight noise

These weights have noise on them, added once by noisytune (NoisyTune, arXiv 2202.12024):

    weights: owner/model at commit c0ffee0000000000000000000000000000000000
    noise: gaussian, scaled with each tensor's std
    λ: 0.15
    λ for @bias: 0.05
    seed: 18446744073709551615
    weights kept: 0.9

They are made again, bit for bit, by

    noisytune replay noisytune.json -o OUT

What follows is the card of the weights before that: scores in it are theirs.

# M
"""


def test_the_bytes_of_a_card_are_frozen(tmp_path: Path) -> None:
    base = on_hub(tmp_path, card="---\nlicense: mit\n---\n\n# M\n")
    noise = {"distribution": "gaussian", "seed": 2**64 - 1, "kept": 0.9, "rules": (("@bias", 0.05),)}
    save(base / "model.safetensors", {"w": weights("F32", 40, 8), "bias": weights("F32", 9, seed=1)})
    carded(base, tmp_path / "out", **noise)
    assert (tmp_path / "out" / "README.md").read_text() == FROZEN


@pytest.mark.parametrize("has_card", [True, False])
def test_the_manifest_records_a_card_and_replay_makes_it_again(tmp_path: Path, has_card: bool) -> None:
    base = source(tmp_path / "base", CARD if has_card else None, config='{"a": 1}')
    out, again = tmp_path / "out", tmp_path / "again"
    carded(base, out)
    document = json.loads((out / "noisytune.json").read_text())
    (entry,) = document["rewritten"]
    assert (entry["name"], entry["source"]) == ("README.md", "README.md" if has_card else None)
    assert [one["name"] for one in document["copied"]] == ["config.json"]
    schema = json.loads(files("noisytune_cli.manifest").joinpath("manifest.schema.json").read_text())
    jsonschema.validate(document, schema)
    assert verify(str(out), base=str(base)).ok
    replay(str(out), str(again), base=str(base))
    assert tree(again) == tree(out)
    (again / "README.md").write_text("other")
    assert found(verify(str(again))) == {("README.md", None)}


def test_a_base_with_another_card_is_no_base(tmp_path: Path) -> None:
    base, out = source(tmp_path / "base"), tmp_path / "out"
    carded(base, out)
    (base / "README.md").write_text(CARD.replace("Bert", "Berta"))
    assert verify(str(out)).ok
    assert found(verify(str(out), base=str(base))) == {("README.md", None)}
    with pytest.raises(Mismatch, match="another card"):
        replay(str(out), str(tmp_path / "again"), base=str(base))
    assert not (tmp_path / "again").exists()


def test_each_output_has_its_own_card_and_a_recipe_has_its_digest(tmp_path: Path) -> None:
    base = source(tmp_path / "base")
    request = Request(str(base), NoiseSpec(), Conversion(dtype="BF16"), card=True)
    wanted = [Combination(0.1, seed, str(tmp_path / f"s{seed}")) for seed in (3, 4)]
    first, second = perturb_each(request, wanted)
    assert "seed: 3\n" in (first.output / "README.md").read_text()
    assert "seed: 4\n" in (second.output / "README.md").read_text()
    assert verify(str(second.output), base=str(base)).ok
    recipes = [Combination(one.lam, one.seed, f"{one.out}.json") for one in wanted]
    for full, recipe in zip((first, second), perturb_each(request, recipes, recipe_only=True), strict=True):
        assert recipe.manifest_path.read_bytes() == full.manifest_path.read_bytes()


@pytest.mark.parametrize(
    ("said", "adapter", "expected"),
    [
        ("", None, {}),
        (
            "base_model: a/b\nbase_model_relation: quantized\n",
            None,
            {"base_model": "a/b", "relation": "quantized"},
        ),
        ("'base_model': [a/b, c/d]\n", None, {"base_model": ["a/b", "c/d"], "relation": "finetune"}),
        ("base_model: a/b\n", '{"peft_type": "LORA"}', {"base_model": "a/b", "relation": "adapter"}),
    ],
)
def test_a_local_source_keeps_the_base_that_it_names(
    said: str, adapter: str | None, expected: Mapping[str, Any], tmp_path: Path
) -> None:
    others = {} if adapter is None else {"adapter_config": adapter}
    base = source(tmp_path / "base", f"---\nlicense: mit\n{said}---\nx", **others)
    carded(base, tmp_path / "out")
    data = entries(tmp_path / "out")
    assert data.get("base_model") == expected.get("base_model")
    assert data.get("base_model_relation") == expected.get("relation")


def test_line_ends_marks_and_texts_without_front_matter_are_kept(tmp_path: Path) -> None:
    for name, text in {
        "crlf": "---\r\nlicense: mit\r\nmodel-index: []\r\n---\r\n# A\r\nb\r\n",
        "bom": "\ufeff---\nlicense: mit\n---\n# A\nb\n",
        "text": "# A\n\n---\nlicense: mit\n---\n",
        "empty": "",
    }.items():
        base = source(tmp_path / name, text.encode())
        carded(base, tmp_path / f"{name}-out")
        made = (tmp_path / f"{name}-out" / "README.md").read_bytes().decode()
        data = ModelCard(made).data
        assert data.tags == ["noisytune"]
        assert data.license == ("mit" if name in ("crlf", "bom") else None)
        assert ("\r\n" in made) == (name == "crlf")
        assert made.replace("\r\n", "").count("\r") == 0
        assert made.endswith(text[text.find("# A") :] if text else "-o OUT\n\n")


def test_texts_of_a_manifest_stay_texts(tmp_path: Path) -> None:
    source_record = SourceRecord("x`\n---\n<script>\u202e", None, ())
    noise = NoiseSpec(scope="absolute", lam=0.5, mix=(Term(1, 0.3), Term(2, 0.4)), rules=(("a\r\nb", 1.0),))
    card = command.Card(None, 0o644, (), "finetune", tags=("null", "1e5", "#x", "ok"))
    made = card.of_noise(Manifest("noisytune", "1", source_record, noise, ())).decode()
    assert "    weights: x`\\n---\\n<script>\\u202e\n" in made
    assert "    σ for a\\r\\nb: 1\n" in made
    assert ModelCard(made).data.tags == ["null", "1e5", "#x", "ok", "noisytune"]


def test_an_average_is_a_merge_of_its_members(tmp_path: Path) -> None:
    members = [on_hub(tmp_path, f"owner--{name}") for name in "ab"]
    out = tmp_path / "out"
    average([str(one) for one in members], str(out), coefficients=(3, 1), card=True)
    data = entries(out)
    assert data["base_model"] == ["owner/a", "owner/b"]
    assert data["base_model_relation"] == "merge"
    assert data["tags"][-1] == "noisytune"
    assert "model-index" not in data
    assert f"    3 x owner/a at commit {COMMIT}\n    1 x owner/b" in (out / "README.md").read_text()
    recorded = read_any_manifest(out / "noisytune.json")
    assert recorded.is_original
    assert recorded.manifest.rewritten
    schema = json.loads(files("noisytune_cli.manifest").joinpath("average.schema.json").read_text())
    jsonschema.validate(json.loads((out / "noisytune.json").read_bytes()), schema)
    assert verify(str(out)).ok


def test_scores_in_files_of_their_own_stay_behind(tmp_path: Path) -> None:
    base = source(tmp_path / "base", "# no front matter\n")
    (base / ".eval_results").mkdir()
    (base / ".eval_results" / "glue.yaml").write_text("- value: 0.9\n")
    out = tmp_path / "out"
    perturb(Request(str(base), NoiseSpec(), card=True), str(out))
    assert not (out / ".eval_results").exists()
    (left,) = json.loads((out / "noisytune.json").read_text())["left_out"]
    assert left == {"name": ".eval_results/glue.yaml", "why": "scores of the source (--card)"}
    replay(str(out), str(tmp_path / "again"), base=str(base))
    assert tree(tmp_path / "again") == tree(out)


#: What cannot be rewritten, and a word of why.
BROKEN = {
    "no YAML": ("---\na: [\n---\nx", "no YAML"),
    "no mapping": ("---\n- a\n- b\n---\nx", "no list of entries"),
    "a number": ("---\n1: 2\n---\nx", "no list of entries"),
    "one line": ("---\n{license: mit, model-index: [], base_model: a/b}\n---\nx", "no list of entries"),
    "merged": ("---\n<<: {base_model: a/b}\n---\nx", "no list of entries"),
    "cut in a text": ('---\na: "x\nbase_model: y"\n---\nx', "no list of entries"),
    "twice over itself": (
        "---\na: &a [x, x]\n"
        + "".join(f"b{i}: &b{i} [*{'a' if i == 0 else f'b{i - 1}'}]\n" for i in range(9))
        + "---\n",
        "refers to itself",
    ),
    "deep": ("---\na: " + "[" * 100_000 + "\n---\nx", "longer than|nested too deep"),
    "deep lists": ("---\na:\n  " + "- " * 30_000 + "\n---\nx", "nested too deep"),
    "deep and short": ("---\na: " + "[" * 30_000 + "\n---\nx", "nested too deep"),
    "many": ("---\n" + "a: b\n" * 1001 + "---\nx", "more than 1,000 entries"),
    "long": ("---\n" + "a: b\n" + "#\n" * 40_000 + "---\nx", "longer than"),
    "tags": ("---\ntags: [[a]]\n---\nx", "no texts"),
    "an object": ("---\na: !!python/object/apply:os.system [x]\n---\nx", "no YAML"),
    "a huge number": ("---\na: " + "1" * 60_000 + "\n---\nx", "digits|integer"),
    "bytes": (b"---\na: \xff\n---\nx", "not UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_hostile_card_is_refused_in_a_line_and_copied_without_card(name: str, tmp_path: Path) -> None:
    text, why = BROKEN[name]
    base = source(tmp_path / "base", text)
    for act in (perturb_with, plan_with):
        with pytest.raises(InputInvalid, match=why) as caught:
            act(base, tmp_path / "out")
        assert "\n" not in caught.value.line()
        assert not (tmp_path / "out").exists()
    perturb(Request(str(base), NoiseSpec()), str(tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").read_bytes() == (base / "README.md").read_bytes()


def perturb_with(base: Path, out: Path) -> None:
    perturb(Request(str(base), NoiseSpec(), card=True), str(out))


def plan_with(base: Path, out: Path) -> None:
    plan_perturb(Request(str(base), NoiseSpec(), card=True))


def test_a_card_of_100_megabytes_is_refused_and_its_scores_cost_nothing(tmp_path: Path) -> None:
    base = source(tmp_path / "base")
    with (base / "README.md").open("r+b") as opened:
        opened.truncate(100 << 20)
    with pytest.raises(InputInvalid, match="larger than"):
        perturb_with(base, tmp_path / "out")
    many = "".join(f"- name: m{i}\n  results: []\n" for i in range(100_000))
    (base / "README.md").write_text(f"---\nmodel-index:\n{many}license: mit\n---\n# A\n")
    perturb_with(base, tmp_path / "out")
    assert entries(tmp_path / "out") == {"license": "mit", "tags": ["noisytune"]}


def test_a_file_has_no_card(tmp_path: Path) -> None:
    base = source(tmp_path / "base")
    with pytest.raises(UsageError, match="a file"):
        perturb_with(base / "model.safetensors", tmp_path / "out.safetensors")


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stderr


def test_a_copied_card_that_claims_something_is_warned_of_once(tmp_path: Path) -> None:
    base = source(tmp_path / "base")
    for arguments in (
        ("perturb", base, "-o", tmp_path / "a-{seed}", "--seed", "1,2"),
        ("average", base, base, "-o", tmp_path / "b"),
    ):
        said = invoke(*arguments)
        assert said.count("--card") == 1
        assert "scores (model-index) and a base model (base_model)" in said
    assert "--card" not in invoke("perturb", base, "-o", tmp_path / "c", "-q")
    assert "--card" not in invoke("perturb", base, "-o", tmp_path / "d", "--card")
    assert "--card" not in invoke("perturb", base / "model.safetensors", "-o", tmp_path / "e.safetensors")
    (base / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\nbase_model: model-index:\n")
    assert "--card" not in invoke("perturb", base, "-o", tmp_path / "f")


def test_a_manifest_has_no_other_rewritten_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    carded(source(tmp_path / "base"), out)
    manifest = out / "noisytune.json"
    content = manifest.read_text()
    for old, new, why in (
        ('{"name": "README.md", "source"', '{"name": "train.py", "source"', "newer noisytune"),
        ('"source": "README.md"', '"source": "/etc/passwd"', "not one of"),
        ('"copied": [', '"copied": [{"name": "README.md", "digest": "blake3:' + "0" * 64 + '"}', "two files"),
    ):
        assert old in content
        manifest.write_text(content.replace(old, new))
        with pytest.raises(InputInvalid, match=why):
            verify(str(out))


def test_what_a_card_claims_is_read_before_anything_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(source: object) -> list[str]:
        raise Mismatch("the input changed", why="another run wrote it", next_step="Run again")

    monkeypatch.setattr(command, "claims_of", changed)
    base = source(tmp_path / "model")
    with pytest.raises(Mismatch):
        perturb(Request(str(base), NoiseSpec()), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()

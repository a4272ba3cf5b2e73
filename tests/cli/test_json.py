"""The JSON of every verb follows its schema, and the schemas name no key that is never there."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Tensors, numbers, save, weights
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from noisytune_cli.cli.app import app

SCHEMAS = {
    path.name.removesuffix(".schema.json"): json.loads(path.read_text(encoding="utf-8"))
    for path in files("noisytune_cli.cli").joinpath("schemas").iterdir()
}

#: A buffer, a constant, a tie, a stack of experts in another dtype, what is not finite, and no float.
TENSORS: Tensors = {
    "model.embed_tokens.weight": weights("F32", 6, 4),
    "model.layers.0.self_attn.q_proj.weight": weights("F32", 80, 4, seed=1),
    "model.layers.0.mlp.experts.gate_up_proj": weights("BF16", 2, 4, 8, seed=2),
    "model.layers.0.norm.weight": numbers("F32", 1, 1, 1),
    "model.layers.0.broken.weight": numbers("F32", 1, float("nan"), 2),
    "model.position_ids": numbers("I64", 0, 1, 2),
    "lm_head.weight": weights("F32", 6, 4),
}


def made(*arguments: Any, code: int = 0) -> list[Any]:
    """Return the documents that a command prints: one, or one a line."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    try:
        return [json.loads(result.stdout)]
    except json.JSONDecodeError:
        return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Documents of every verb, by the schema that they should follow; lines of JSONL under `VERB lines`."""
    folder = tmp_path_factory.mktemp("json")
    a, b = folder / "a", folder / "b"
    save(a / "model.safetensors", TENSORS)
    (a / "config.json").write_text('{"model_type": "llama"}')
    (a / "optimizer.pt").write_bytes(b"left out")
    other = {**TENSORS, "model.layers.0.norm.weight": numbers("F32", 1, 1), "only": weights("F32", 3)}
    del other["model.position_ids"]
    noisy, sigma, mixed, recipe = (folder / name for name in ("noisy", "sigma", "mixed", "recipe.json"))
    mix = folder / "mix.jsonl"
    mix.write_text('{"seed": 1, "lambda": 0.1}\n{"seed": 2, "lambda": 0.1, "coefficient": -1}\n')
    matrix = ("--granularity", "matrix")
    many = ("--lambda", "0.1,0.2", "-o", folder / "many-{lambda}")
    found: dict[str, list[Any]] = defaultdict(list)
    found["dry-run"] += made("perturb", a, "--dry-run", "--json")
    found["dry-run"] += made("perturb", a, "--dry-run", "--json", *many, *matrix, "--dtype", "bfloat16")
    found["dry-run"] += made("perturb", a, "--dry-run", "--json", "--mix", mix, "--shrink", "0.5")
    found["dry-run"] += made("perturb", a, "--dry-run", "--json", "--sigma", "0.01")
    found["perturb"] += made("perturb", a, "--seed", "7", "-o", noisy, "--json")
    found["perturb"] += made("perturb", a, "--seed", "7", "-o", noisy, "--json", "--skip-existing")
    found["dry-run"] += made(
        "perturb", a, "--seed", "7", "-o", noisy, "--json", "--skip-existing", "--dry-run"
    )
    found["perturb"] += made("perturb", a, "--sigma", "0.01", "--shrink", "0.5", "-o", sigma, "--json")
    found["perturb"] += made("perturb", a, "--mix", mix, "-o", mixed, "--json")
    found["perturb"] += made("perturb", a, "--recipe-only", "-o", recipe, "--json")
    found["perturb"] += made("perturb", a, *many, "--json")
    found["inspect"] += made("inspect", a, "--json")
    found["inspect"] += made("inspect", a, noisy, "--json", *matrix, "--percentiles", "1,99")
    found["inspect"] += made("inspect", a, "--json", "--headers-only")
    found["inspect"] += made("inspect", a, "--json", "--sigma", "0.01")
    found["inspect lines"] += made("inspect", a, "--format", "jsonl")
    found["histogram"] += made("inspect", a, "--histogram", "model.embed_tokens.weight", "--format", "json")
    found["verify"] += made("verify", noisy, "--base", a, "--json")
    found["replay"] += made("replay", noisy, "--base", a, "-o", folder / "again", "--json")
    save(b / "model.safetensors", other)
    found["compare"] += made("compare", a, noisy, "--format", "json")
    found["compare"] += made("compare", a, noisy, "--format", "json", "--seed", "7,8")
    found["compare"] += made("compare", a, b, "--format", "json", "--by", "kind")
    found["compare"] += made("compare", a, b, "--format", "json", "--headers-only")
    found["compare lines"] += made("compare", a, b, "--format", "jsonl")
    found["compare lines"] += made("compare", a, noisy, "--format", "jsonl", "--seed", "7")
    found["detect"] += made("detect", noisy, "--seed", "7,8", "--base", a, "--json")
    found["detect"] += made("detect", noisy, "--seed", "8", "--json", code=8)
    found["average"] += made("average", a, noisy, "-o", folder / "mean", "--json")
    job = folder / "job"
    found["plan"] += made("plan", a, "--scope", "global", "-o", job, "--json")
    found["status"] += made("status", job, "--json")
    for _ in range(2):
        assert CliRunner().invoke(app, ["work", str(job), "--share", "1/1"]).exit_code == 0
    found["status"] += made("status", job, "--json")
    found["perturb"] += made("finish", job, "--json")
    content = (noisy / "model.safetensors").read_bytes()
    (noisy / "model.safetensors").write_bytes(content[:-4] + b"\0\0\0\1")
    found["verify"] += made("verify", noisy, folder / "nothing", sigma, "--json", code=8)
    return found


@pytest.mark.parametrize("name", [*sorted(SCHEMAS.keys() - {"study"}), "inspect lines", "compare lines"])
def test_what_is_printed_follows_its_schema(name: str, outputs: dict[str, list[Any]]) -> None:
    schema = SCHEMAS[name.removesuffix(" lines")]
    if name.endswith(" lines"):
        schema = schema | schema["$defs"]["line"]
        schema = {key: value for key, value in schema.items() if key in ("$defs", "anyOf")}
    assert outputs[name]
    for document in outputs[name]:
        Draft202012Validator(schema).validate(document)


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_schemas_are_schemas_and_refuse_a_key_more(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])
    assert SCHEMAS[name]["$id"] == f"urn:noisytune:json:{name}:1"
    assert not Draft202012Validator(SCHEMAS[name]).is_valid({"surprise": 1})


@pytest.mark.parametrize("name", sorted(SCHEMAS.keys() - {"study"}))
def test_every_key_of_a_schema_is_seen(name: str, outputs: dict[str, list[Any]]) -> None:
    seen = {key for document in outputs[name] for key in keys(document)}
    named = {key for schema in objects(SCHEMAS[name]) for key in schema.get("properties", {})}
    # `path` is of a nested state dict; `totals`, `misfit` are of lines.
    assert named - seen <= {"path", "totals", "misfit"}


def keys(value: Any) -> Iterator[str]:
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from keys(inner)
    if isinstance(value, dict):
        yield from value


def objects(value: Any) -> Iterator[dict[str, Any]]:
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(inner)
    if isinstance(value, dict):
        yield value


def test_the_results_of_studies_follow_theirs() -> None:
    pytest.importorskip("sklearn")
    from noisytune_cli.study.report.results import summarise
    from tests.study.records import runs, study

    drift = {"mlp": {"norm_change": 0.1, "change_norm": 0.2}}
    records = [
        *runs("plain", [0.5, 0.6, 0.7], drift=drift, probe={"task": "rte", "accuracy": 0.6}),
        *runs("noisytune", [0.6, 0.7], lam=0.1),
        *runs("noisytune", [0.5, 0.7], lam=0.2),
        *runs("mixout", [0.5, 0.6]),
        *runs("noisytune+mixout", [0.5, 0.7], lam=0.1),
    ]
    results = json.loads(json.dumps(summarise(study(records), records[:-1])))
    assert all(results[key] for key in ("comparisons", "combinations", "ensembles", "missing"))
    assert {one["search"] is None for one in results["comparisons"]} == {True, False}
    Draft202012Validator(SCHEMAS["study"]).validate(results)


def test_the_package_takes_its_schemas_along() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert "cli/schemas/*.json" in project["tool"]["setuptools"]["package-data"]["noisytune_cli"]

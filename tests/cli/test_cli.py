"""The command line: exit codes, and what goes to stdout and stderr."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from pathlib import Path

import pytest
from checkpoints import Tensor, numbers, safetensors_bytes, save, weights
from typer.testing import CliRunner, Result

from noisytune_cli import __version__
from noisytune_cli.cli.app import app
from noisytune_cli.commands import perturb as command
from noisytune_cli.errors import unwritable
from noisytune_cli.output import staging

NAME = "encoder.layer.0.attention.query.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(
        tmp_path / "in.safetensors", {NAME: weights("F32", 30, 10), "embeddings.weight": weights("F32", 9, 9)}
    )


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error(code: int, *arguments: object) -> str:
    """Run a command that must fail with this code and one line on stderr, and return the line."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert re.fullmatch(r"noisytune: error: [^\n]+\. [^\n]+\.\n", result.stderr)
    return result.stderr


def usage(*arguments: object) -> str:
    """Run a command that Typer must refuse, and return its words on stderr."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("Usage: ")
    return " ".join(result.stderr.split())


def test_perturb_writes_and_says_so(source: Path, tmp_path: Path) -> None:
    result = invoke("perturb", source, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "perturbed 2 of 2" in result.stderr
    manifest = json.loads((tmp_path / "out.safetensors.noisytune.json").read_bytes())
    assert manifest["tool"] == {"name": "noisytune", "version": __version__}
    assert manifest["noise"]["lambda"] == 0.15


def test_every_option_reaches_the_manifest(source: Path, tmp_path: Path) -> None:
    result = invoke(
        *("perturb", source, "--out", tmp_path / "out", "--lambda", "0.3", "--seed", str(2**64 - 1)),
        *("--noise", "gaussian", "--scope", "global", "--include", "*.weight", "--exclude", "@embeddings"),
        *("--lambda-for", "@attention=0.5", "--lambda-for", "*query*=0.25", "--threads", "3", "--mmap"),
    )
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "out.noisytune.json").read_bytes())
    assert manifest["noise"] == {
        "stream": "philox4x32-10/v1",
        "distribution": "gaussian",
        "scope": "global",
        "granularity": "tensor",
        "seed": "18446744073709551615",
        "lambda": 0.3,
        "rules": [["@attention", 0.5], ["*query*", 0.25]],
        "include": ["*.weight"],
        "exclude": ["@embeddings"],
    }
    assert [t["lambda"] for t in manifest["tensors"]] == [0.25, 0]


def test_noise_std_and_preset(source: Path, tmp_path: Path) -> None:
    assert invoke("perturb", source, "-o", tmp_path / "a", "--noise-std", "0.05").exit_code == 0
    assert json.loads((tmp_path / "a.noisytune.json").read_bytes())["noise"]["lambda"] == math.sqrt(12) * 0.05
    assert invoke("perturb", source, "-o", tmp_path / "b", "--preset", "xtreme").exit_code == 0
    noise = json.loads((tmp_path / "b.noisytune.json").read_bytes())["noise"]
    assert (noise["lambda"], noise["exclude"]) == (0.1, ["@embeddings"])


def test_json_is_all_of_stdout(source: Path, tmp_path: Path) -> None:
    result = invoke("perturb", source, "-o", tmp_path / "out", "--json", "--quiet")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["output"] == str(tmp_path / "out")
    assert document["perturbed"] == 2
    assert result.stderr == ""


def test_quiet_is_silent_but_for_errors(tmp_path: Path) -> None:
    fine = save(tmp_path / "fine.safetensors", {"w": weights("F32", 30)})
    result = invoke("perturb", fine, "-o", tmp_path / "a", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    broken = save(
        tmp_path / "broken.safetensors", {"w": weights("F32", 30), "nan\n": numbers("F32", math.nan, 1.0)}
    )
    result = invoke("perturb", broken, "-o", tmp_path / "b", "-q")
    assert (result.exit_code, result.output) == (0, "")
    document = json.loads(invoke("perturb", broken, "-o", tmp_path / "c", "-q", "--json").stdout)
    assert any(warning.startswith("nan\\x0a") for warning in document["warnings"])
    assert "nan\\x0a" in invoke("perturb", broken, "-o", tmp_path / "d").stderr
    assert error(4, "perturb", tmp_path / "missing", "-o", tmp_path / "e", "-q")


def test_a_strength_that_drowns_the_weights_is_warned_of(source: Path, tmp_path: Path) -> None:
    for strong in (["--lambda", "15"], ["--lambda=-15"], ["--lambda", "0.1,15"], ["--noise-std", "4.33"]):
        said = invoke("perturb", source, "--dry-run", *strong).stderr
        assert "4.33 times the weights' std" in said
    assert "4.33 times" in invoke("perturb", source, "--dry-run", "--lambda-for", "*query*=15").stderr
    assert "4.33 times" in invoke("perturb", source, "--lambda", "15", "-o", tmp_path / "a.st").stderr
    for fine in (["--lambda", "3.4"], ["--sigma", "15"]):
        assert "warning" not in invoke("perturb", source, "--dry-run", *fine).stderr


def test_a_file_without_an_extension_is_warned_of(source: Path, tmp_path: Path) -> None:
    told = "noisytune: warning: noisy has no extension"
    assert told in invoke("perturb", source, "-o", tmp_path / "noisy").stderr
    made = tmp_path / "noisy.noisytune.json"
    (tmp_path / "again").mkdir()
    assert told in invoke("replay", made, "--base", source, "-o", tmp_path / "again/noisy").stderr
    assert told in invoke("average", source, source, "-o", tmp_path / "again/noisy", "--overwrite").stderr
    for fine in (["-o", tmp_path / "b.safetensors"], ["--recipe-only", "-o", tmp_path / "recipe"]):
        assert "extension" not in invoke("perturb", source, *fine).stderr
    (folder := tmp_path / "folder").mkdir()
    (folder / "model.safetensors").write_bytes(source.read_bytes())
    assert "extension" not in invoke("perturb", folder, "-o", tmp_path / "out").stderr


@pytest.mark.parametrize("verb", ["perturb", "inspect"])
def test_names_in_one_pattern_are_said_to_be_several(verb: str, source: Path, tmp_path: Path) -> None:
    asked = [verb, source] + (["-o", tmp_path / "o.safetensors"] if verb == "perturb" else [])
    for patterns in (f"{NAME},embeddings.weight", "@norm,@bias", "*.bias,*query*"):
        for option in ("--include", "--exclude"):
            assert "repeat --include or --exclude" in usage(*asked, option, patterns)


def test_what_is_not_a_choice_is_said_plainly(source: Path) -> None:
    said = usage("inspect", source, "--format", "cvs")
    assert "'--format': 'cvs' is not one of" in said
    assert "Usage: noisytune inspect [OPTIONS] SOURCE... " in said


def test_an_output_of_noisytune_can_be_inspected_without_a_warning(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    invoke("perturb", source, "-o", out)
    said = invoke("inspect", out)
    assert (said.exit_code, said.stderr.count("\n")) == (0, 1)
    assert said.stderr == "the source was noised before; perturb needs --again\n"
    assert invoke("inspect", out, "-q").stderr == ""


def test_a_dry_run_prints_the_plan_and_writes_nothing(source: Path) -> None:
    result = invoke("perturb", source, "--dry-run", "--exclude", "@embeddings")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(NAME)
    assert "excluded" in lines[1]
    assert "nothing was written" in result.stderr
    document = json.loads(invoke("perturb", source, "--dry-run", "--json").stdout)
    assert [tensor["action"] for tensor in document["tensors"]] == ["perturb", "perturb"]
    assert os.listdir(source.parent) == [source.name]


def test_a_dry_run_tells_the_room_and_fails_where_the_run_would(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = json.loads(invoke("perturb", source, "--dry-run", "--json").stdout)
    assert document["parameters"] == 381
    assert document["free"] is None
    size = source.stat().st_size
    assert size < document["bytes"] < size + 10_000
    several = ("--seed", "0-2", "-o", f"{tmp_path}/o{{seed}}")
    told = json.loads(invoke("perturb", source, "--dry-run", "--json", *several).stdout)
    assert told["bytes"] == 3 * document["bytes"]
    assert told["free"] > 0
    free = os.statvfs(tmp_path)
    little = os.statvfs_result((*free[:3], 0, 0, *free[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: little)
    assert "not enough space" in error(6, "perturb", source, "--dry-run", *several)


def test_a_current_directory_that_is_gone_is_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "the current directory is gone" in error(6, "inspect", os.path.relpath(source, gone))


@pytest.mark.parametrize("words", [("perturb", "", "-o", "x"), ("inspect", ""), ("compare", "a", "")])
def test_an_empty_name_of_a_source_is_told(words: tuple[str, ...], source: Path) -> None:
    told = invoke(*(str(source) if word == "a" else word for word in words))
    assert told.exit_code == 2
    assert "no SOURCE is named: its name is empty. Give one; . is this folder." in told.stderr


def test_a_study_knows_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="a study needs the extra [study]")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    rows = ("--train=~/a.tsv", "--dev=~/b.tsv", "--text", "t", "--label", "l")
    for data, named in ((("--task", "rte", "--data=~/glue"), "glue"), (rows, "a.tsv")):
        assert f"{tmp_path}/{named}: " in invoke("study", "~/m", *data, "--out=~/st").stderr
    assert not (tmp_path / "~").exists()


def test_an_option_that_is_given_twice_is_warned_of(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    told = invoke(
        "perturb", source, "--seed", "7", "-o", "x", "--seed=8", "--out", out, "--exclude", "*a*", "-q", "-q"
    )
    assert told.stderr == ""
    told = invoke("perturb", out, "--seed", "7", "--seed=8", "-o", "x", "--out", out, "--again", "--dry-run")
    assert (
        "warning: --seed is given more than once, and the last counts; several go into one list"
        in told.stderr
    )
    assert "warning: --out is given more than once, and the last counts\n" in told.stderr
    assert "seed" not in invoke("perturb", source, "--dry-run", "--exclude", "*a*", "--exclude", "*b*").stderr


def test_a_dry_run_tells_what_would_be_kept(source: Path, tmp_path: Path) -> None:
    out = f"{tmp_path}/o{{seed}}.safetensors"
    invoke("perturb", source, "-o", f"{tmp_path}/o1.safetensors", "--seed", "1")
    asked = ("perturb", source, "-o", out, "--skip-existing", "--dry-run")
    alone = invoke(*asked, "--seed", "1")
    assert f"would keep {tmp_path}/o1.safetensors: it is already" in alone.stderr
    assert "0 bytes to write" in alone.stderr
    document = json.loads(invoke(*asked, "--seed", "0-1", "--json").stdout)
    assert document["kept"] == [f"{tmp_path}/o1.safetensors"]
    assert document["bytes"] == json.loads(invoke("perturb", source, "--dry-run", "--json").stdout)["bytes"]
    assert "the output exists" in error(5, *asked, "--seed", "1", "--lambda", "0.1")
    address = ("s3://bucket/in", "-o", out, "--seed", "0", "--skip-existing", "--dry-run")
    refused = invoke("perturb", *address)
    assert refused.exit_code == 2
    assert "would have to be fetched" in refused.stderr


@pytest.mark.parametrize("adapter", [False, True])
def test_noise_on_an_adapter_is_warned_of(adapter: bool, tmp_path: Path) -> None:
    names = ["a.lora_A.weight", "a.lora_B.weight"] if adapter else ["a.weight", "b.weight"]
    folder = tmp_path / "in"
    folder.mkdir()
    save(folder / "adapter_model.safetensors", {name: weights("F32", 8, 8) for name in names})
    if adapter:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    for run in (("-o", tmp_path / "out"), ("--dry-run",)):
        result = invoke("perturb", folder, *run)
        assert result.exit_code == 0, result.output
        assert ("a.lora_A.weight is of an adapter (LORA)" in result.stderr) == adapter
    (folder / "adapter_config.json").unlink(missing_ok=True)
    asked = ("perturb", folder, "--dry-run")
    for parts, warned in ((["w", "lora_A.w", "lora_B.w"], True), (["w", "v", "w_lora.lora.0.weight"], False)):
        save(folder / "adapter_model.safetensors", {name: weights("F32", 8, 8) for name in parts})
        assert ("lora_A.w is of an adapter, whose" in invoke(*asked).stderr) == warned
        assert "adapter" not in invoke(*asked, "--exclude", "*lora*").stderr


def test_a_folder_that_is_named_like_a_file_is_warned_of(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    source.rename(folder / "model.safetensors")
    result = invoke("perturb", folder, "-o", tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors/model.safetensors").is_file()
    assert "warning: x.safetensors is a folder, as the source is, though named like a file" in result.stderr


def test_a_file_that_holds_no_weights_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "m.safetensors").write_text('{"error": "not found"}')
    assert "Give the file with the weights, or the folder" in error(
        3, "perturb", tmp_path / "config.json", "-o", "x"
    )
    assert "Download the file again" in error(3, "perturb", tmp_path / "m.safetensors", "-o", "x")


def test_an_output_that_is_there_already_is_kept(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out-{seed}.safetensors"
    first = tmp_path / "out-1.safetensors"
    run = ("perturb", source, "-o", out, "--skip-existing", "--json")
    assert invoke(*run, "--seed", "1").exit_code == 0
    before = first.stat()
    result = invoke(*run, "--seed", "0-2")
    assert result.exit_code == 0, result.output
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    assert [document["skipped"] for document in documents] == [False, True, False]
    assert [document["noise"]["seed"] for document in documents] == ["0", "1", "2"]
    assert f"kept {first}: it is already what this would write" in result.stderr
    assert "3 outputs, 1 of them kept, in " in result.stderr
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    again = invoke(*run, "--seed", "0-2")
    assert [json.loads(line)["skipped"] for line in again.stdout.splitlines()] == [True] * 3


@pytest.mark.parametrize("change", ["noise", "dtype", "source", "output", "gone"])
def test_what_is_something_else_is_not_kept(change: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    run = ["perturb", source, "-o", out, "--skip-existing"]
    assert invoke(*run).exit_code == 0
    content = out.read_bytes()
    if change == "noise":
        run += ["--exclude", "@embeddings"]
    elif change == "dtype":
        run += ["--dtype", "bfloat16"]
    elif change == "source":
        os.utime(source)
    elif change == "output":
        out.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        out.unlink()
        assert invoke(*run).exit_code == 5  # a manifest lies there
        run += ["--overwrite"]
        assert invoke(*run).exit_code == 0
        assert out.read_bytes() == content
        return
    assert "the output exists" in error(5, *run)


def test_a_recipe_and_a_folder_are_kept_too(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    source.rename(folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    for run in (("-o", tmp_path / "out"), ("-o", tmp_path / "r.json", "--recipe-only")):
        results = [invoke("perturb", folder, *run, "--skip-existing", "--json") for _ in range(2)]
        assert [json.loads(result.stdout)["skipped"] for result in results] == [False, True]
    run = ("perturb", folder, "-o", tmp_path / "out", "--skip-existing")
    (folder / "vocab.txt").touch()
    os.utime(folder / "vocab.txt", (0, 0))  # older than the output, and not in it
    assert "the output exists" in error(5, *run)
    (folder / "vocab.txt").unlink()
    assert invoke(*run).exit_code == 0
    (tmp_path / "out" / "config.json").unlink()
    assert "the output exists" in error(5, *run)


def test_what_was_made_of_other_files_is_not_kept(tmp_path: Path) -> None:
    def put(name: str, seed: int) -> Path:
        path = tmp_path / name / "model.safetensors"
        path.parent.mkdir(exist_ok=True)
        save(path, {"w": weights("F32", 8, 8, seed=seed)})
        (path.parent / "config.json").write_text(json.dumps({"seed": seed}))
        (path.parent / "notes.txt").write_text("x")
        for file in path.parent.iterdir():
            os.utime(file, (0, 0))  # older than any output, wherever it is moved to
        return path.parent

    folder, other, out = put("model", 1), put("other", 2), tmp_path / "out"
    run = ("perturb", folder, "-o", out, "--card", "--skip-existing")
    assert invoke(*run).exit_code == 0

    def kept() -> bool:
        result = invoke(*run)
        assert result.exit_code in (0, 5), result.output
        return "it is already what this would write" in result.stderr

    assert kept()
    (folder / "model.safetensors").chmod(0o600)  # changes when it was last changed, and nothing else
    assert kept()
    for name in ("model.safetensors", "config.json"):
        mine = folder / name
        mine.rename(tmp_path / "mine")
        (other / name).rename(mine)
        assert not kept()
        (tmp_path / "mine").rename(mine)
        assert kept()
    card = (out / "README.md").read_bytes()
    (out / "README.md").unlink()
    assert not kept()
    (out / "README.md").write_bytes(card)
    assert kept()
    (folder / "notes.txt").unlink()  # which the output has
    assert not kept()


def test_several_outputs_are_verified_and_all_faults_told(source: Path, tmp_path: Path) -> None:
    outs = [tmp_path / f"o{seed}" for seed in range(3)]
    assert invoke("perturb", source, "--seed", "0-2", "-o", tmp_path / "o{seed}").exit_code == 0
    result = invoke("verify", *outs, "--json", "--base", source)
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(answer["output"], answer["ok"]) for answer in answers] == [(str(out), True) for out in outs]
    outs[0].write_bytes(outs[0].read_bytes()[:-1] + b"x")
    (tmp_path / "o1.noisytune.json").unlink()
    result = invoke("verify", *outs, "--json")
    assert result.exit_code == 8
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["ok"] for answer in answers] == [False, False, True]
    assert "no manifest" in answers[1]["error"]
    assert [line.partition(": ")[2][:5] for line in result.stderr.splitlines()[:2]] == ["error", "error"]
    assert result.stderr.splitlines()[2].startswith(f"{outs[2]}: verified 2 tensors")
    assert invoke("verify", *outs[1:], "-q").exit_code == 4


def test_inspect_lists_by_name_as_people_count(tmp_path: Path) -> None:
    names = [f"layer.{i}.weight" for i in (0, 1, 10, 2)]
    path = save(tmp_path / "a.safetensors", {name: weights("F32", 3, 3) for name in names})
    document = json.loads(invoke("inspect", path, "--json", "--limit", "3").stdout)
    assert [row["name"] for row in document["tensors"]] == [f"layer.{i}.weight" for i in (0, 1, 2)]
    assert document["totals"]["tensors"] == 4
    both = json.loads(invoke("inspect", path, path, "--json", "--headers-only").stdout)
    assert [one["id"] for one in both] == ["a.safetensors"] * 2
    assert "--percentiles" in usage("inspect", path, "--percentiles", "101")
    close = json.loads(invoke("inspect", path, "--json", "--percentiles", "50,99.99999,100").stdout)
    assert list(close["tensors"][0]["percentiles"]) == ["p50", "p99.99999", "p100"]
    assert "--format html" in usage("inspect", path, path, "--format", "html")


def test_lists_make_an_output_and_a_line_for_each(source: Path, tmp_path: Path) -> None:
    lists = ("--lambda", "0.10,0.2", "--seed", "3-4", "-o", f"{tmp_path}/l{{lambda}}-s{{seed}}")
    result = invoke("perturb", source, *lists, "--json")
    assert result.exit_code == 0, result.output
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    names = [f"l{lam}-s{seed}" for lam in ("0.10", "0.2") for seed in (3, 4)]
    assert [document["output"] for document in documents] == [str(tmp_path / name) for name in names]
    assert [document["noise"]["seed"] for document in documents] == ["3", "4", "3", "4"]
    assert [line.split(" -> ")[0] for line in result.stderr.splitlines()[:-1]] == [
        f"perturbed 2 of 2 tensors (λ {lam}, seed {seed}, uniform)" for lam in (0.1, 0.2) for seed in (3, 4)
    ]
    assert result.stderr.splitlines()[-1].startswith("4 outputs in ")


def test_a_dry_run_of_lists_prints_the_plan_once_and_the_outputs(source: Path) -> None:
    lists = ("--lambda", "0,0.2", "--seed", "3-4", "--lambda-for", "embeddings*=0.5")
    result = invoke("perturb", source, *lists, "-o", "l{lambda}-s{seed}", "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"{NAME}  F32 30x10  perturb λ=0,0.2; unless constant or non-finite",
        "embeddings.weight  F32 9x9  perturb λ=0.5; unless constant or non-finite",
        "output λ=0 seed=3  l0-s3",
        "output λ=0 seed=4  l0-s4",
        "output λ=0.2 seed=3  l0.2-s3",
        "output λ=0.2 seed=4  l0.2-s4",
    ]
    assert re.search("2 perturb; 381 parameters; 4 outputs of [0-9.]+ KB in all to write, ", result.stderr)
    document = json.loads(invoke("perturb", source, *lists, "--dry-run", "--json").stdout)
    assert [tensor["lambdas"] for tensor in document["tensors"]] == [[0.0, 0.2], [0.5, 0.5]]
    assert [one["output"] for one in document["outputs"]] == [None] * 4
    assert [one["noise"]["lambda"] for one in document["outputs"]] == [0.0, 0.0, 0.2, 0.2]
    assert os.listdir(source.parent) == [source.name]


def test_the_summary_counts_what_got_no_noise_by_reason(tmp_path: Path) -> None:
    tensors = {"w": weights("F32", 9, 9), **{f"b{i}": numbers("F32", 1, 1) for i in range(2)}}
    source = save(
        tmp_path / "in.safetensors", {**tensors, "scale": numbers("F32", 1), "x": weights("F32", 4)}
    )
    result = invoke("perturb", source, "--exclude", "x", "-o", tmp_path / "out", "--json")
    assert "perturbed 1 of 5 tensors (2 constant, 1 one-element, 1 excluded; λ 0.15, seed 0" in result.stderr
    assert json.loads(result.stdout)["copied"] == {"constant": 2, "one-element": 1, "excluded": 1}


def test_a_recipe_only_run_says_so(source: Path, tmp_path: Path) -> None:
    result = invoke("perturb", source, "--recipe-only", "-o", tmp_path / "r.json", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["output"], document["manifest"]) == (None, str(tmp_path / "r.json"))
    assert result.stderr.startswith("wrote the recipe alone for 2 of 2 tensors (λ 0.15, seed 0, uniform) -> ")
    assert sorted(os.listdir(tmp_path)) == ["in.safetensors", "r.json"]
    assert invoke("replay", tmp_path / "r.json", "--base", source, "-o", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out.noisytune.json").read_bytes() == (tmp_path / "r.json").read_bytes()


def test_names_are_printed_escaped(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {"\x1b[2J\n[red]x": weights("F32", 30)})
    result = invoke("perturb", source, "--dry-run")
    assert result.stdout.startswith(r"\x1b[2J\x0a[red]x ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["perturb"], "SOURCE"),
        (["perturb", "{}"], "-o OUT"),
        (["perturb", "{}", "-o", "x", "--lambda", "nan"], "finite"),
        (["perturb", "{}", "-o", "x", "--lambda", "wide"], "is not a number"),
        (["perturb", "{}", "-o", "x", "--lambda", "1", "--noise-std", "1"], "--noise-std"),
        (["perturb", "{}", "-o", "x", "--seed", "-1"], "--seed"),
        (["perturb", "{}", "-o", "x", "--seed", str(2**64)], "--seed"),
        (["perturb", "{}", "-o", "x", "--seed", ""], "is neither a seed"),
        (["perturb", "{}", "-o", "x", "--seed", "0-1"], "{seed} is missing"),
        (["perturb", "{}", "-o", "x", "--lambda", "1e400"], "beyond what float64 holds"),
        (["perturb", "{}", "-o", "x", "--mix", ""], "no mixture is named"),
        (["perturb", "{}", "--dry-run", "--device", "abacus"], "abacus"),
        (["perturb", "{}", "--dry-run", "--device", ""], "names none"),
        (["perturb", "{}", "--dry-run", "--engine", "steam"], "no such engine"),
        (["perturb", "{}", "--dry-run", "--address", "h:1"], "--engine ray"),
        (["perturb", "{}", "--dry-run", "--engine", "local", "--address", "h:1"], "--engine=ray"),
        (["perturb", "{}", "--dry-run", "--share-bytes", "1K"], "--engine local"),
        (["perturb", "{}", "--dry-run", "--engine", "local", "--skip-existing"], "--skip-existing"),
        (["inspect", "{}", "--headers-only", "--percentiles", "50"], "--percentiles"),
        (["inspect", "{}", "--headers-only", "--histogram", NAME], "--histogram"),
        (["inspect", "{}", "--histogram", NAME, "--limit", "3"], "--limit and --histogram"),
        (["inspect", "{}", "--histogram", NAME, "--sort", "-std"], "--sort and --histogram"),
        (["inspect", "{}", "--histogram", NAME, "--exclude", "*"], "--exclude and --histogram"),
        (["inspect", "{}", "--headers-only", "--plot", "a.svg"], "--plot"),
        (["compare", "{}", "{}", "--headers-only", "--plot", "a.svg"], "--plot"),
        (["compare", "{}", "{}", "--tolerance", "inf", "--json"], "--tolerance=inf"),
        (["inspect", "{}", "-o", "reports/"], "names no file"),
        (["inspect", "{}", "--lambda", "0.1", "--sigma", "0.1"], "both set the strength"),
        (["perturb", "{}", "--dry-run", "--lambda", "1,1"], "twice"),
        (["perturb", "{}", "-o", "x", "--noise", "pink"], "gaussian"),
        (["perturb", "{}", "-o", "x", "--scope", "layer"], "global"),
        (["perturb", "{}", "-o", "x", "--exclude", "nowhere"], "nowhere"),
        (["perturb", "{}", "-o", "x", "--include", "@nothing"], "@nothing"),
        (["perturb", "{}", "-o", "x", "--lambda-for", "w"], "PATTERN=VALUE"),
        (["perturb", "{}", "-o", "x", "--lambda-for", "w=1_0"], "PATTERN=VALUE"),
        (["inspect", "{}", "--lambda", "1_0"], "1_0"),
        (["inspect", "{}", "--lambda", "０.１"], "０.１"),
        (["perturb", "{}", "-o", "x", "--exclude", "*"], "nothing would be perturbed"),
        (["perturb", "{}", "-o", "x", "--preset", "glue"], "xtreme"),
        (["perturb", "{}", "-o", "x", "--device", "abacus"], "abacus"),
        (["perturb", "{}", "-o", "x", "--threads", "0"], "--threads"),
        (["perturb", "{}", "-o", "x", "--revision", "main"], "--revision"),
        (["perturb", "{}", "-o", "x", "--weights", "a"], "--weights"),
        (["perturb", "{}", "-o", "x", "--colour"], "--colour"),
        (["destroy"], "destroy"),
    ],
)
def test_usage_errors(
    arguments: list[str], words: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    assert words in usage(*(argument.replace("{}", str(source)) for argument in arguments))
    assert os.listdir(source.parent) == [source.name]


@pytest.mark.parametrize(
    "out", ["S3://b/x", "s3:/b/x", "hf://me/x", "https://h/x", "file:///x", "file:/x", "S3://b/x.safetensors"]
)
def test_an_address_of_another_kind_is_no_folder_here(
    out: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["perturb", source, "-o", out], ["plan", source, "-o", out], ["work", out]):
        assert "addresses begin with s3://, gs:// or az://" in usage(*arguments)
    assert os.listdir() == [source.name]
    assert invoke("perturb", source, "-o", f"./{out}/").exit_code == 0  # as one asks for it


def test_nothing_is_not_the_current_directory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert invoke("perturb", source, "-o", tmp_path / "here/w.safetensors").exit_code == 0
    (tmp_path / "here/w.safetensors").rename(tmp_path / "here/model.safetensors")
    (tmp_path / "here/w.safetensors.noisytune.json").rename(tmp_path / "here/noisytune.json")
    monkeypatch.chdir(tmp_path / "here")
    for verb in ("verify", "work", "finish", "status"):
        assert "is this folder" in usage(verb, "")
    assert "is this folder" in usage("replay", "", "--base", source, "-o", tmp_path / "again")


@pytest.mark.parametrize("columns", ["0", "", "1", "abc"])
def test_a_table_has_its_lines_whatever_the_width_is_said_to_be(
    columns: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert NAME in invoke("inspect", source).stdout


def test_input_errors(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty.safetensors").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    integers = save(
        tmp_path / "ids.safetensors", {"ids": Tensor("I64", weights("F32", 9).values.astype("i8"))}
    )
    assert "empty" in error(3, "perturb", tmp_path / "empty.safetensors", "-o", out)
    assert "FIFO" in error(3, "perturb", tmp_path / "fifo", "-o", out)
    assert "no weights" in error(3, "perturb", tmp_path / "folder", "-o", out)
    assert "nothing to perturb" in error(3, "perturb", integers, "-o", out)
    assert "No such file" in error(4, "perturb", tmp_path / "nowhere.safetensors", "-o", out)
    assert "hub id" in error(4, "perturb", "not a hub id", "-o", out)
    assert "Addresses begin with s3://" in error(4, "perturb", "S3://b/x", "-o", out)
    # What takes no hub id advises none.
    for arguments in (["verify", "my-org/my-model"], ["perturb", integers, "--mix", "no", "-o", out]):
        assert error(4, *arguments).endswith("No such file or directory. Check the spelling.\n")
    assert not out.exists()


def test_a_hostile_tensor_name_in_an_error(tmp_path: Path) -> None:
    content = safetensors_bytes({"\x1b[2J\n\u202e": weights("F32", 4)})
    (tmp_path / "in.safetensors").write_bytes(content.replace(b'"F32"', b'"F99"'))
    assert r"\x1b[2J\x0a\u202e" in error(3, "perturb", tmp_path / "in.safetensors", "-o", tmp_path / "out")


def test_output_errors(source: Path, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    os.mkfifo(tmp_path / "fifo")
    assert "--overwrite" in error(5, "perturb", source, "-o", tmp_path / "there")
    error(5, "perturb", source, "-o", source, "--overwrite")
    error(5, "perturb", source, "-o", tmp_path / "fifo", "--overwrite")
    error(5, "perturb", source, "-o", "/dev/null", "--overwrite")
    assert invoke("perturb", source, "-o", tmp_path / "there", "--overwrite").exit_code == 0


def test_an_output_that_no_path_can_be(source: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    folder = save(tmp_path / "folder/model.safetensors", {"w": weights("F32", 9)}).parent
    for options in ((source,), (folder,), (source, "--recipe-only")):
        assert "is no folder" in error(5, "perturb", *options, "-o", source / "x" / "y")
        for more in ((), ("--skip-existing",)):
            assert "shorter name" in error(5, "perturb", *options, *more, "-o", tmp_path / ("x" * 256))
        assert "leads back to itself" in error(5, "perturb", *options, "-o", tmp_path / "loop" / "x")
    # The manifest beside it would be too long.
    assert "shorter name" in error(5, "perturb", source, "-o", tmp_path / ("x" * 250))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "Free space"),
        (errno.EDQUOT, "Free space"),
        (errno.EROFS, "not mounted read-only"),
        (errno.EACCES, "this user may write"),
        (errno.EPERM, "this user may write"),
        (errno.EMFILE, "Raise the limit"),
        (errno.EFBIG, "ulimit -f"),
        (errno.ENOENT, "is gone"),
        (errno.EIO, "Check the disk"),
    ],
)
def test_what_to_do_where_writing_fails(
    number: int, words: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(*_: object) -> None:
        raise unwritable(OSError(number, ""), tmp_path / "out")

    monkeypatch.setattr(staging, "create", create)
    line = error(6, "perturb", source, "-o", tmp_path / "out")
    assert f"{os.strerror(number)}; nothing was published. " in line
    assert words in line


def test_memory_that_gives_out(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def perturb(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(command, "perturb_each", perturb)
    assert "out of memory" in error(6, "perturb", source, "-o", tmp_path / "out")


def test_debug_shows_a_traceback(tmp_path: Path) -> None:
    result = invoke("--debug", "perturb", tmp_path / "nowhere.safetensors", "-o", tmp_path / "out")
    assert result.exit_code == 4
    assert "Traceback" in result.stderr
    assert "FileNotFoundError" in result.stderr


def test_a_bug_keeps_its_traceback(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def perturb(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(command, "perturb_each", perturb)
    result = invoke("perturb", source, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_version_and_help() -> None:
    assert invoke("--version").stdout == f"noisytune {__version__}\n"
    assert "--lambda" in invoke("perturb", "--help").stdout
    verbs = invoke("--help").stdout.partition("Commands:\n")[2].splitlines()
    order = ["perturb", "inspect", "verify", "replay", "compare", "detect", "average"]
    order += ["plan", "work", "finish", "status", "study"]
    assert [line.split()[0] for line in verbs] == order
    assert all(re.search(r"[a-z)]\.$", line) for line in verbs)  # none is cut off
    assert invoke().exit_code == 2

"""`noisytune study` end to end: a tiny task from the command line to the runs, stopped and continued."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from noisytune_cli.cli.app import app
from noisytune_cli.errors import InputInvalid, ResourceExhausted
from noisytune_cli.study import study as command

from .conftest import Tiny
from .tiny import SENTENCES


def study(tiny: Tiny, out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*tiny.arguments, "-o", str(out), *arguments])


def done(tiny: Tiny, out: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run a study that must succeed, and return the runs it recorded."""
    result = study(tiny, out, *arguments)
    assert result.exit_code == 0, result.output
    return lines(out)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def numbers(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run without the time it took."""
    return {key: value for key, value in run.items() if key != "seconds"}


def refused(tiny: Tiny, out: Path, code: int, *arguments: str) -> str:
    """Run a study that must fail with this code, and return what it says."""
    result = study(tiny, out, *arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def start(tiny: Tiny, out: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a study in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "noisytune_cli", *tiny.arguments, "-o", str(out), *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for_a_run(process: subprocess.Popen[str], out: Path) -> None:
    """Wait until a study has recorded a run, or has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (out / "runs.jsonl").exists() and (out / "runs.jsonl").stat().st_size:
            return
        time.sleep(0.02)


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two methods and two seeds."""
    out = tmp_path_factory.mktemp("finished") / "out"
    done(tiny, out, "--seed", "0-1", "--lambda", "0.15")
    return out


def test_every_method_and_seed_is_a_run_that_has_learnt(finished: Path) -> None:
    runs = lines(finished)
    assert [(run["method"], run["seed"]) for run in runs] == [
        ("plain", 0),
        ("noisytune", 0),
        ("plain", 1),
        ("noisytune", 1),
    ]
    rows = len(SENTENCES) * 4 // 5
    for run in runs:
        noisy = run["method"] == "noisytune"
        assert (run["lambda"], run["noise"], run["scope"]) == (
            (0.15, "uniform", "matrix") if noisy else (None, None, None)
        )
        assert run["init_seed"] == run["order_seed"] == run["noise_seed"] == run["seed"]
        assert run["train_rows"] + run["held_out_rows"] == rows
        assert run["held_out_rows"] == rows // 5
        assert run["steps"] == run["member_steps"] == run["forwards"] == 6 * -(-run["train_rows"] // 8)
        assert run["dev"]["accuracy"] > 0.7
        assert len(run["predictions"]) == run["dev_rows"] == len(SENTENCES[::5])
        # Biases begin at 0 in a random model, so there is nothing that a change could be relative to.
        assert set(run["drift"]) == {"head", "embeddings", "norm", "attention", "mlp"}
        for change in run["drift"].values():
            assert 0 <= change["norm_change"] <= change["change_norm"] * (1 + 1e-9)
            assert change["change_norm"] > 0
    assert runs[0]["loss"] != runs[1]["loss"] != runs[2]["loss"]


def test_the_score_is_that_of_the_stored_predictions(finished: Path) -> None:
    recorded = json.loads((finished / "study.json").read_text())
    assert recorded["label_names"] == ["0", "1"]
    assert recorded["dev_labels"] == [int(label) for _, label in SENTENCES[::5]]
    assert recorded["constant_score"] == max(Counter(recorded["dev_labels"]).values()) / len(SENTENCES[::5])
    assert len(recorded["design"]) == 4
    for run in lines(finished):
        right = [a == b for a, b in zip(run["predictions"], recorded["dev_labels"], strict=True)]
        assert run["dev"]["accuracy"] == pytest.approx(sum(right) / len(right))


def test_the_same_seed_gives_the_same_numbers(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    alone = done(tiny, tmp_path / "out", "--seed", "1", "--method", "noisytune")
    assert [numbers(run) for run in alone] == [numbers(lines(finished)[3])]


def test_processes_give_the_same_numbers(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    runs = done(tiny, tmp_path / "out", "--seed", "0-1", "--jobs", "2")
    assert sorted(map(str, map(numbers, runs))) == sorted(map(str, map(numbers, lines(finished))))


def test_seeds_are_varied_apart(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    varied = done(tiny, tmp_path / "out", "--seed", "0-1", "--init-seed", "0", "--order-seed", "0")
    plain = [run for run in varied if run["method"] == "plain"]
    noisy = [run for run in varied if run["method"] == "noisytune"]
    assert plain[0]["loss"] == plain[1]["loss"] == lines(finished)[0]["loss"]  # only the noise differs
    assert noisy[0]["loss"] == lines(finished)[1]["loss"] != noisy[1]["loss"]
    # So plain is carried out once, for all seeds that may be asked for later too.
    assert [run.get("same_as") for run in plain] == [None, plain[0]["key"]]
    assert [run["noise_seed"] for run in plain] == [0, 1]
    more = done(
        tiny, tmp_path / "out", "--seed", "2", "--method", "plain", "--init-seed", "0", "--order-seed", "0"
    )
    assert (more[-1]["seed"], more[-1]["same_as"]) == (2, plain[0]["key"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["conditions"][0]["runs"], results["finished"], results["missing"]) == (1, 5, [])


def test_a_finished_study_is_not_done_again_and_may_grow(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = done(tiny, out, "--seed", "0", "--method", "plain")
    assert done(tiny, out, "--seed", "0", "--method", "plain") == first
    grown = done(tiny, out, "--seed", "0-1", "--lambda", "0.15")
    assert grown[0] == first[0]
    assert [run["key"] for run in grown] == [run["key"] for run in lines(finished)]
    assert len(json.loads((out / "study.json").read_text())["design"]) == 4


def test_a_killed_study_continues_where_it_stopped(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(tiny, out, "--seed", "0-1", "--lambda", "0.15")
    wait_for_a_run(process, out)
    process.kill()
    process.communicate()
    kept = (out / "runs.jsonl").read_bytes()
    assert kept.count(b"\n") >= 1
    with open(out / "runs.jsonl", "ab") as file:
        file.write(b'{"schema": 1, "key": "plain-1-')  # as if the kill had torn a line
    runs = done(tiny, out, "--seed", "0-1", "--lambda", "0.15")
    assert (out / "runs.jsonl").read_bytes().startswith(kept)
    assert [numbers(run) for run in runs] == [numbers(run) for run in lines(finished)]


def test_the_outputs_are_there_and_the_table_is_printed(tiny: Tiny, finished: Path) -> None:
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    assert names >= {"study.json", "runs.jsonl", "results.json", "report.md"}
    for figure in ("methods", "drift"):
        assert (finished / f"figures/{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (finished / f"figures/{figure}.svg").read_text()
    result = study(tiny, finished, "--seed", "0-1")
    assert result.exit_code == 0
    assert re.search(r"^noisytune +0\.15 ", result.stdout, re.MULTILINE), result.stdout
    as_json = study(tiny, finished, "--seed", "0-1", "--json")
    assert json.loads(as_json.stdout) == json.loads((finished / "results.json").read_text())


def test_that_the_seeds_are_too_few_is_said_before_training(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise InputInvalid("stopped", why="training begins", next_step="None")

    monkeypatch.setattr(command, "_carry_out", stop)
    aloud = [argument for argument in tiny.arguments if argument != "--quiet"]
    for seeds, method, weak in (
        ("0-4", "plain,noisytune", "5 paired seeds cannot give a two-sided p below 0.0625: "),
        ("0-5", "plain,noisytune", None),
        ("0-5", "plain,noisytune,r3f", "which 2 comparisons adjust to 0.0625: "),
        ("0-4", "plain", None),
        ("0-4", "noisytune", None),
    ):
        out = str(tmp_path / f"{seeds}-{method}")
        options = ["-o", out, "--seed", seeds, "--method", method]
        options += ["--lambda", "0.1,0.2"] if "noisytune" in method else []
        said = CliRunner().invoke(app, [*aloud, *options]).stderr
        assert "training begins" in said
        assert ("cannot give" in said) == (weak is not None)
        assert (weak or "") in said
        assert "cannot give" not in CliRunner().invoke(app, [*aloud, *options, "--quiet"]).stderr
    # However many seeds of noise there are: plain's run is one.
    fixed = ["--seed", "0-7", "--init-seed", "0", "--order-seed", "0"]
    said = CliRunner().invoke(app, [*aloud, "-o", str(tmp_path / "fixed"), *fixed]).stderr
    assert "1 paired seed cannot give" in said
    assert "pairs that share a run are one" in said


def test_runs_that_are_added_with_something_else_are_told(
    tiny: Tiny, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise InputInvalid("stopped", why="training begins", next_step="None")

    monkeypatch.setattr(command, "_carry_out", stop)
    out = shutil.copytree(finished, tmp_path / "out")
    aloud = [argument for argument in tiny.arguments if argument != "--quiet"]
    grown = [*aloud, "-o", str(out), "--seed", "0-2"]
    assert "runs are added" not in CliRunner().invoke(app, grown).stderr
    recorded = json.loads((out / "study.json").read_text())
    recorded["machine"]["torch"] = "1.0"
    (out / "study.json").write_text(json.dumps(recorded))
    said = CliRunner().invoke(app, grown).stderr
    assert re.search(r"runs are added with torch \S+ \(the first runs: 1.0\): what is compared across", said)


def test_another_study_in_the_folder_is_refused(tiny: Tiny, finished: Path) -> None:
    before = (finished / "runs.jsonl").read_bytes()
    said = refused(tiny, finished, 5, "--weight-decay", "0.5")
    assert "its weight_decay is 0.01, now 0.5 is asked for" in said
    assert (finished / "runs.jsonl").read_bytes() == before


def test_another_network_or_tokenizer_in_the_folder_is_refused(
    tiny: Tiny, finished: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny.model, tmp_path / "model")
    arguments = [str(model) if argument == str(tiny.model) else argument for argument in tiny.arguments]
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (model / "README.md").write_text("what nobody trains with")
    assert CliRunner().invoke(app, [*arguments, "-o", str(out), "--seed", "0-1"]).exit_code == 0
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    result = CliRunner().invoke(app, [*arguments, "-o", str(out), "--seed", "0-1"])
    assert result.exit_code == 5
    assert "its config is" in result.stderr
    # A study that was begun before anyone looked at it goes on.
    recorded = json.loads((out / "study.json").read_text())
    del recorded["settings"]["config"]
    (out / "study.json").write_text(json.dumps(recorded))
    assert CliRunner().invoke(app, [*arguments, "-o", str(out), "--seed", "0-1"]).exit_code == 0


def test_lambda_is_searched_as_the_paper_does_and_chosen_on_held_out_rows(tiny: Tiny, tmp_path: Path) -> None:
    runs = done(tiny, tmp_path / "out", "--seed", "0", "--choose", "--epochs", "1")
    assert [run["lambda"] for run in runs] == [None, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["lambda_chosen_on"] == "held_out"
    best = max(run["held_out"]["accuracy"] for run in runs[1:])
    (chosen,) = (c for c in results["conditions"] if c["reported"] and c["method"] == "noisytune")
    assert chosen["lambda"] == min(r["lambda"] for r in runs[1:] if r["held_out"]["accuracy"] == best)
    assert "It was chosen by the runs that are compared" in (tmp_path / "out/report.md").read_text()


def test_another_precision_in_the_folder_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (run,) = done(tiny, out, "--seed", "0", "--method", "plain", "--precision", "bfloat16")
    assert run["dev"]["accuracy"] > 0.7
    assert json.loads((out / "study.json").read_text())["settings"]["precision"] == "bfloat16"
    assert "precision | bfloat16" in (out / "report.md").read_text()
    before = (out / "runs.jsonl").read_bytes()
    said = refused(tiny, out, 5, "--seed", "0-1", "--precision", "float32")
    assert 'its precision is "bfloat16", now "float32" is asked for' in said
    assert (out / "runs.jsonl").read_bytes() == before


@pytest.mark.parametrize(("device", "had"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_a_study_of_before_there_was_a_choice_has_the_precision_that_its_device_had(
    tiny: Tiny, finished: Path, tmp_path: Path, device: str, had: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    recorded = json.loads((out / "study.json").read_text())
    del recorded["settings"]["precision"]
    recorded["settings"]["device"] = device
    (out / "study.json").write_text(json.dumps(recorded))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.machine, "check_device", lambda asked: device)
        other = "float32" if had == "bfloat16" else "bfloat16"
        assert f'its precision is "{had}"' in refused(tiny, out, 5, "--seed", "0-1", "--precision", other)
        assert len(done(tiny, out, "--seed", "0-1", "--precision", had)) == 4


def told_of_pairs(tiny: Tiny, folder: Path, *tasks: str) -> list[str]:
    """Write RTE and WNLI into a folder, and return a study's arguments that name model, rows and seeds."""
    for task in tasks or ("RTE", "WNLI"):
        (folder / task).mkdir(parents=True)
        for name, rows in (("train", SENTENCES[::2]), ("dev", SENTENCES[1::4])):
            table = ["sentence1\tsentence2\tlabel", *(f"{text}\t{text}\t{label}" for text, label in rows)]
            (folder / task / f"{name}.tsv").write_text("\n".join(table) + "\n")
    return [*("study", str(tiny.model), "--data", str(folder), "--seed", "0-1", "--threads", "1")]


def test_tasks_of_the_same_rows_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    told = told_of_pairs(tiny, tmp_path / "glue", "RTE")
    told[told.index("--data") + 1] = str(tmp_path / "glue/RTE")
    for arguments in (["--task", "rte,wnli"], ["--task", "rte", "--probe", "wnli"]):
        result = CliRunner().invoke(app, [*told, *arguments, "-o", str(tmp_path / "out")])
        assert result.exit_code == 2, result.output
        assert "as rte is" in " ".join(re.sub("[│╭╰─╮╯]", "", result.stderr).split())
        assert not (tmp_path / "out").exists()


def test_all_tasks_are_found_before_the_first_is_trained_on(tiny: Tiny, tmp_path: Path) -> None:
    told = told_of_pairs(tiny, tmp_path / "glue", "RTE")
    result = CliRunner().invoke(app, [*told, "--task", "rte,sst2", "-o", str(tmp_path / "out")])
    assert (result.exit_code, "SST-2/train.tsv" in result.stderr) == (4, True)
    assert not (tmp_path / "out").exists()
    # WNLI is smaller than the others.
    told = told_of_pairs(tiny, tmp_path / "smaller")
    table = (tmp_path / "smaller/WNLI/train.tsv").read_text().splitlines()
    (tmp_path / "smaller/WNLI/train.tsv").write_text("\n".join([table[0], *table[-4:], *table[1:3]]))
    for options in (["--train-rows", "20"], ["--held-out", "5", "--train-rows", "2"]):
        result = CliRunner().invoke(app, [*told, "--task", "rte,wnli", *options, "-o", str(tmp_path / "out")])
        assert (result.exit_code, "training file has 6 rows" in result.stderr) == (2, True)
        assert not (tmp_path / "out").exists()


def test_what_else_lies_in_the_folder_of_several_tasks_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    told = [*told_of_pairs(tiny, tmp_path / "glue"), "--task", "rte,wnli", "--report-only", "-o"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/tasks.md").write_text("what I have to do")
    result = CliRunner().invoke(app, [*told, str(tmp_path / "out")])
    assert (result.exit_code, "holds other files and no study" in result.stderr) == (5, True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tasks.md"]
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        assert CliRunner().invoke(app, [*told, str(tmp_path / "empty")]).exit_code == 0


def test_several_tasks_are_a_study_each_and_what_they_say_together(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = told_of_pairs(tiny, tmp_path / "glue")
    arguments = [*told, "--epochs", "1", "--task", "rte,WNLI", "-o", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert [len(lines(out / task)) for task in ("rte", "wnli")] == [4, 4]
    assert (out / "rte/report.html").exists()
    assert "all tasks: mean paired difference from plain" in result.stdout
    assert re.search(r"^noisytune +2 +2 ", result.stdout, re.MULTILINE), result.stdout
    summary = json.loads((out / "tasks.json").read_text())
    again = CliRunner().invoke(app, [*arguments, "--json", "-q"])
    assert json.loads(again.stdout) == summary
    assert [task["task"] for task in summary["tasks"]] == ["rte", "wnli"]
    assert re.search(
        r"--format html with several tasks", CliRunner().invoke(app, [*arguments, "--format", "html"]).stderr
    )
    inside = CliRunner().invoke(app, [*told, "--task", "rte,wnli", "-o", str(out / "rte")])
    assert (inside.exit_code, "it is itself the study of one task" in inside.stderr) == (5, True)


def test_a_study_that_is_interrupted_keeps_its_runs(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(tiny, out, "--seed", "0-99")
    wait_for_a_run(process, out)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert 1 <= len(lines(out)) < 200


def test_columns_and_labels_that_are_wrong_are_named(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for option in ("--text", "--label"):
        said = refused(tiny, out, 3, option, "colour")
        assert 'there is no column "colour"; the columns are sentence, label' in said
    strange = tmp_path / "strange.tsv"
    strange.write_text("sentence\tlabel\nthe film was fine\t2\n")
    said = refused(tiny, out, 3, "--dev", str(strange))
    assert f'{strange}: line 2: column "label" has the label "2", which no row of train.tsv has' in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (2, ("--method", "magic"), "no such method: magic"),
        (2, ("--method", "plain,"), "is not a name"),
        (2, ("--method", "noisytune+plain"), "plain is finetuning without any method"),
        (2, ("--set", "r3f.lambda=x"), "r3f.lambda"),
        (2, ("--set", "r3f.colour=1"), "r3f.lambda"),
        (2, ("--set", "r3f.sigma=1e-4"), "Add r3f to --method, or leave it out."),
        (2, ("--lora-alpha", "64"), "Add --lora."),
        (2, ("--lora-dropout", "0"), "Add --lora."),
        (2, ("--anchor", "noised"), "Add noisytune+mixout or noisytune+recadam to --method"),
        (2, ("--anchor", "noised", "--method", "noisytune,mixout"), "no method holds on to weights"),
        (2, ("--method", "plain,r3f", "--lambda", "0.7"), "--lambda: it is of noisytune"),
        (2, ("--method", "plain", "--noise", "uniform"), "--noise: it is of noisytune"),
        (2, ("--lambda", ""), '"" is not a number'),
        (2, ("--noise", ""), '"" is not uniform or gaussian'),
        (2, ("--metric", ""), '"" is not a name'),
        (2, ("--lambda", "0.1,x"), '"x" is not a number'),
        (2, ("--lambda", "nan"), '"nan" is not a number'),
        (2, ("--lambda", "1_0"), '"1_0" is not a number'),
        (2, ("--seed", "1_0"), '"1_0" is neither a seed (0 to 2^63-1) nor a range of seeds'),
        (2, ("--seed", "4-0"), 'the range "4-0" ends before it begins'),
        (2, ("--seed", "-1"), '"-1" is neither a seed (0 to 2^63-1) nor a range of seeds'),
        (2, ("--seed", str(2**63)), "a seed is larger than 2^63-1"),
        (2, ("--noise", "pink"), "is not uniform or gaussian"),
        (2, ("--share", "1.5"), "is not a number from 0 to 1"),
        (2, ("--metric", "bleu"), "there is no such metric"),
        (2, ("--metric", "f1,pearson"), "some are of classes and some of numbers"),
        (2, ("--task", "rte"), "the task's files and columns are known"),
        (2, ("--text", "a,b,c"), "a row is one text or a pair"),
        (2, ("--probe", "rte"), "--probe rte without --data"),
        (2, ("--json", "--format", "html"), "--json is --format json"),
        (2, ("--data", "/nowhere"), "the rows are those of --train and --dev"),
        (2, ("--train-rows", "100"), "the training file has 64 rows"),
        (2, ("--choose", "--held-out", "0"), "--choose without held-out rows"),
        (2, ("--choose", "--lambda", "0.1"), "there is nothing to choose"),
        (2, ("--choose", "--method", "plain,r3f"), "there is nothing to choose"),
        (2, ("--method", "plain,recadam"), "Take a gamma of 100 or less"),
        (2, ("--device", "tpu"), "a study runs on cpu, cuda or cuda:N"),
        (3, ("--metric", "pearson", "--label", "sentence"), "which is no number"),
        (4, ("--dev", "/nowhere/dev.tsv"), "No such file"),
        (4, ("--probe", "rte", "--data", "/nowhere"), "neither train.tsv nor RTE/train.tsv"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tiny: Tiny, tmp_path: Path, code: int, arguments: tuple[str, ...], said: str
) -> None:
    assert said in re.sub(r"[│╭╰─╮╯]| +(?=│)", "", refused(tiny, tmp_path / "out", code, *arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_what_a_method_cannot_do_with_the_model_is_said_before_a_run_is_trained(
    tiny: Tiny, tmp_path: Path, jobs: str
) -> None:
    out = tmp_path / "out"
    told = ("--lora", "--method", "plain,noisytune,mixout", "--epochs", "5000", "--jobs", jobs)
    assert "mixout changes nothing here" in refused(tiny, out, 2, *told)
    assert lines(out) == []


def test_a_model_that_is_no_classifier_s_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.model, folder)
    (folder / "config.json").write_text('{"model_type": "none-such"}')
    arguments = [str(folder) if a == str(tiny.model) else a for a in tiny.arguments]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out")])
    assert result.exit_code == 3
    assert re.fullmatch(r"noisytune: error: cannot load a classifier: [^\n]+\n", result.stderr)


def test_an_adapter_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.model, tmp_path / "model")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    arguments = [str(folder) if a == str(tiny.model) else a for a in tiny.arguments]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out")])
    assert (result.exit_code, "cannot study an adapter" in result.stderr) == (3, True)
    assert not (tmp_path / "out").exists()


def test_a_model_that_was_noised_before_is_told(tiny: Tiny, tmp_path: Path) -> None:
    noised = str(tmp_path / "noised")
    assert CliRunner().invoke(app, ["perturb", str(tiny.model), "-o", noised, "-q"]).exit_code == 0
    arguments = [noised if a == str(tiny.model) else a for a in tiny.arguments]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out"), "--report-only"])
    assert result.exit_code == 0, result.output
    assert "the source was noised before" in (tmp_path / "out/report.md").read_text()


def test_rows_that_are_scored_and_trained_on_are_told(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    study(tiny, out, "--seed", "0", "--method", "plain", "--dev", str(tiny.train), "--report-only")
    repeated = json.loads((out / "results.json").read_text())["study"]["repeated"]
    # All but the fifth that is held out, in which nothing of the others lies.
    assert repeated == {"dev": len(SENTENCES) * 4 // 5 - 12, "held_out": 0}
    assert "52 dev rows have the text of a row that is trained on" in (out / "report.md").read_text()


def test_classes_that_the_model_has_in_another_order_are_told(tiny: Tiny, tmp_path: Path) -> None:
    named = {"0": "bad_", "1": "good*"}
    for path, name in ((tiny.train, "train"), (tiny.dev, "dev")):
        rows = [line.rpartition("\t") for line in path.read_text().splitlines()[1:]]
        table = ["sentence\tlabel", *(f"{text}\t{named[label]}" for text, _, label in rows)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(table) + "\n")
    model = shutil.copytree(tiny.model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    arguments = [str(model) if a == str(tiny.model) else a for a in tiny.arguments if a != "--quiet"]
    arguments += ["--train", str(tmp_path / "train.tsv"), "--dev", str(tmp_path / "dev.tsv"), "--report-only"]
    for listed, told in (
        ({"0": "GOOD*", "1": "BAD_"}, True),
        ({"0": "BAD_", "1": "GOOD*"}, False),
        ({"0": "LABEL_0", "1": "LABEL_1"}, False),
        ({"1": "good*"}, False),
        (["good*", "bad_"], False),
    ):
        (model / "config.json").write_text(json.dumps({**config, "id2label": listed}))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out")])
        assert result.exit_code == 0, result.output
        assert ("in the order GOOD*, BAD_, a study in the order bad_, good*: " in result.stderr) == told
        report = (tmp_path / "out/report.md").read_text()
        assert ("in the order GOOD\\*, BAD\\_, a study in" in report) == told


def test_rows_in_a_file_whose_name_is_no_utf_8_have_a_study(tiny: Tiny, tmp_path: Path) -> None:
    train = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.tsv")
    shutil.copyfile(tiny.train, train)
    result = study(tiny, tmp_path / "out", "--train", train, "--report-only")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out/study.json").read_text("utf-8"))["task"] == "caf\\udce9"


def test_a_weight_file_alone_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    file = str(tiny.model / "model.safetensors")
    arguments = [file if a == str(tiny.model) else a for a in tiny.arguments]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out")])
    assert result.exit_code == 3
    assert "a study needs the model's config and tokenizer too" in result.stderr


def test_without_the_extra_the_next_step_is_said(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name))
    said = refused(tiny, tmp_path / "out", 6)
    assert said == (
        "noisytune: error: cannot study: not installed: sklearn. "
        "Install the extra: pip install '.[study]' in a clone of noisytune."
    )


def test_more_processes_than_fit_are_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from noisytune_cli.study import workers

    monkeypatch.setattr(workers, "free_memory", lambda: 2 << 30)
    said = refused(tiny, tmp_path / "out", 6, "--jobs", "8")
    assert "and 2.0 GiB are free. Use --jobs 2." in said
    workers.check_memory(8_000_000, 2)
    with pytest.raises(ResourceExhausted, match="each takes about 1"):
        workers.check_memory(8_000_000, 2, members=10)


def test_a_process_that_dies_is_said_and_finished_runs_are_kept(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from noisytune_cli.study import workers

    monkeypatch.setattr(workers, "_work", dies)
    said = refused(tiny, tmp_path / "out", 6, "--jobs", "2")
    assert "a process of the study died" in said
    assert (tmp_path / "out" / "runs.jsonl").read_bytes() == b""


def test_a_bug_in_a_process_is_no_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from noisytune_cli.study import workers
    from noisytune_cli.study.settings import Recipe

    ours, theirs = multiprocessing.Pipe()
    monkeypatch.setattr(workers.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(workers, "Bench", lambda *arguments: {}["the bug"])
    place = workers.Place("cpu", 2, 1)
    workers._work(theirs, Any, Recipe(), place, ())  # type: ignore[arg-type]
    kind, content = workers._receive(ours)
    assert kind == "bug"
    assert "KeyError: 'the bug'" in content


def dies(*arguments: object) -> None:
    """Stand in for a worker that the system ends."""
    os.kill(os.getpid(), signal.SIGKILL)

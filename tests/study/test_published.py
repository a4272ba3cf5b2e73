"""The published studies' journals, and the tables and figures that docs/results.md has of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .records import runs, study

DOCS = Path(__file__).parents[2] / "docs"

#: Scores of plain by seed, and by how much noise changes them.
PLAIN = [0.40, 0.42, 0.39, 0.41, 0.43]
CHANGES = [0.02, -0.01, 0.03, 0.01, 0.02]
NOISY = [plain + change for plain, change in zip(PLAIN, CHANGES, strict=True)]
DRIFT = {"head": {"norm_change": 0.05, "change_norm": 0.1}}


def journal(folder: Path, made: list[dict[str, Any]], model: str, task: str, **others: Any) -> None:
    """Leave a study's files as `noisytune study` does."""
    folder.mkdir(parents=True)
    about = study(made, model={"id": model, "revision": None, "parameters": 1}, task=task, **others)
    (folder / "study.json").write_text(json.dumps(about))
    (folder / "runs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))


@pytest.fixture
def studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return docs/studies.py, over journals of its own, which it took."""
    monkeypatch.syspath_prepend(str(DOCS))
    import studies

    monkeypatch.setattr(studies, "STUDIES", tmp_path / "taken")
    monkeypatch.setattr(studies, "DOCS", tmp_path)
    (tmp_path / "figures").mkdir()
    cola = runs("plain", PLAIN, drift=DRIFT) + runs("noisytune", NOISY, drift=DRIFT)
    cola += runs("noisytune", PLAIN, noise="gaussian") + runs("noisytune", PLAIN, lam=0.3)
    cola += runs("plain", PLAIN, share=0.2) + runs("noisytune", NOISY, share=0.2)
    for method in (*studies.COMBINED, "deni"):
        cola += runs(method, NOISY if "noisytune" in method else PLAIN)
    journal(tmp_path / "out/pairs/cola", cola, "model", "cola")
    for task, seeds, constant in (("sst2", 5, 0.2), ("stsb", 3, 0.2), ("rte", 1, 0.2), ("wnli", 5, 0.6)):
        few = runs("plain", PLAIN[:seeds]) + runs("noisytune", NOISY[:seeds])
        if task == "sst2":
            few += runs("mixout", NOISY[:4])
        journal(tmp_path / f"out/pairs/{task}", few, "model", task, constant_score=constant)
    probed = [
        one | {"probe": {"task": "sst2", "accuracy": score}}
        for method, scores in (("plain", PLAIN), ("r3f", NOISY), ("noisytune", PLAIN))
        for one, score in zip(runs(method, NOISY), scores, strict=True)
    ]
    journal(tmp_path / "out/probe/cola", probed, "model", "cola")
    journal(tmp_path / "out/lora/sst2", runs("plain", PLAIN) + runs("deni", NOISY), "model", "sst2")
    # Of which no pair is finished yet.
    journal(tmp_path / "out/mpnet-rte", runs("plain", PLAIN[:2]), "all-mpnet-base-v2", "rte")
    mpnet = runs("plain", PLAIN) + runs("noisytune", NOISY)
    journal(tmp_path / "out/mpnet-cola", mpnet, "all-mpnet-base-v2", "cola")
    studies.take(tmp_path / "out")
    return studies


def test_a_journal_is_taken_without_what_is_not_ours(studies: Any) -> None:
    taken = json.loads((studies.STUDIES / "pairs/cola/study.json").read_text())
    assert "dev_labels" not in taken
    assert taken["model"]["id"] == "all-MiniLM-L6-v2"
    assert {path.name for path in (studies.STUDIES / "mpnet-cola").iterdir()} == {"study.json", "runs.jsonl"}


def test_tables_hold_what_each_is_about(studies: Any) -> None:
    tables = studies.tables()
    change = "+1.40 [+0.20, +2.40] | [−0.48, +3.28] | 4 of 5 | 0.188"
    pairs = tables["studies: pairs"].splitlines()
    # Adjusted for the five of this table: 0.1875 × 5.
    assert (
        f"| MiniLM | CoLA, Matthews correlation | 41.00 ± 1.58 | 42.40 ± 1.52 | {change} | 0.938 |" in pairs
    )
    assert [line.split(" | ")[:2] for line in pairs[2:]] == [
        ["| MiniLM", "CoLA, Matthews correlation"],
        ["| MiniLM", "SST-2, Matthews correlation"],
        ["| MiniLM", "STS-B, Matthews correlation"],
        ["| MiniLM", "WNLI, Matthews correlation"],
        ["| MPNet", "CoLA, Matthews correlation"],
    ]
    together = tables["studies: tasks"].splitlines()[2:]
    assert [line.split(" | ")[:3] for line in together] == [
        ["| CoLA, SST-2", "5", "+1.40 [+0.20, +2.40]"],
        ["| CoLA, SST-2, STS-B", "3", "+1.33 [-1.00, +3.00]".replace("-", "−")],
        # With the task on which plain has learnt nothing.
        ["| CoLA, SST-2, STS-B, WNLI", "3", "+1.33 [-1.00, +3.00]".replace("-", "−")],
    ]
    assert "| deni | 41.00 ± 1.58 | 41.00 ± 1.58 | +0.00 " in tables["studies: deni"]
    assert f"| deni | 41.00 ± 1.58 | 42.40 ± 1.52 | {change} |" in tables["studies: adapters"]
    probe = tables["studies: probe"]
    assert f"| r3f | 41.00 ± 1.58 | 42.40 ± 1.52 | {change} |" in probe
    assert "| noisytune | 41.00 ± 1.58 | 41.00 ± 1.58 | +0.00 " in probe
    kinds = tables["studies: kinds"]
    assert "| noisytune (gaussian) | 41.00 ± 1.58 | 41.00 ± 1.58 | +0.00 [+0.00, +0.00] |" in kinds
    assert kinds.count("\n") == 4  # no other λ
    together = tables["studies: combinations"]
    assert together.count(change) == 2
    assert together.splitlines()[2].startswith("| mixout | 41.00 ± 1.58 | 42.40 ± 1.52 |")
    shares = [line.split(" | ")[0] for line in tables["studies: shares"].splitlines()[2:]]
    assert shares == ["| 200", "| 1000"]
    lambdas = tables["studies: lambda"].splitlines()[2:]
    assert lambdas[0].startswith(
        f"| 0.15 (chosen) | 50.00 ± 0.00 | 41.00 ± 1.58 | 42.40 ± 1.52 | {change} | 0.375 |"
    )
    assert lambdas[1].startswith("| 0.3 | 50.00 ± 0.00 | 41.00 ± 1.58 | 41.00 ± 1.58 | +0.00 [")
    methods = [line.split(" | ") for line in tables["studies: methods"].splitlines()[2:]]
    assert [row[0] for row in methods if row[0] != ""] == ["| noisytune", "| mixout", "| recadam"]
    assert methods[0][2:5] == ["×1.00", "41.00 ± 1.58", "42.40 ± 1.52"]
    of_sst2 = tables["studies: methods on SST-2"].splitlines()[2:]
    assert [row.split(" | ")[0] for row in of_sst2] == ["| noisytune", "| mixout"]
    over = [line.split(" | ") for line in tables["studies: methods over tasks"].splitlines()[2:]]
    assert [[cell.split(" [")[0] for cell in row[:4]] for row in over] == [
        ["| noisytune", "+1.40", "+1.40", "+1.40"],
        ["| mixout", "+0.00", "+1.25", "+0.63"],  # over four seeds
    ]
    (of_mpnet,) = tables["studies: methods of MPNet"].splitlines()[2:]
    assert of_mpnet.startswith("| noisytune | 75.00 ± 0.00 | ×1.00 | 41.00 ± 1.58 | 42.40 ± 1.52 |")
    for measure in ("change of norms", "norms of the change"):
        rows = tables[f"studies: {measure}"].splitlines()[2:]
        assert [row.split(" | ")[0] for row in rows] == ["| plain", "| noisytune"]


def test_figures_are_drawn(studies: Any, tmp_path: Path) -> None:
    studies.draw_figures()
    drawn = {path.stem: path.read_bytes()[:4] for path in (tmp_path / "figures").iterdir()}
    of_cola = {f"cola-{name}" for name in ("methods", "kinds", "combinations", "shares", "lambda", "drift")}
    assert set(drawn) == {*of_cola, "sst2-methods", "mpnet-cola", "tasks"}
    assert set(drawn.values()) == {b"\x89PNG"}


def test_the_published_journals_are_whole() -> None:
    # A folder that is gone on with from here has its runs once each, of rows that all have a prediction.
    found = sorted((DOCS / "studies").rglob("study.json"))
    assert found
    for path in found:
        about = json.loads(path.read_text())
        made = [json.loads(line) for line in path.with_name("runs.jsonl").read_text().splitlines()]
        keys = [one["key"] for one in made]
        assert len(set(keys)) == len(keys), path
        assert set(keys) <= {one["key"] for one in about["design"]}, path
        assert {len(one["predictions"]) for one in made} == {made[0]["dev_rows"]}, path
        assert "dev_labels" not in about, path
        assert not about["model"]["id"].startswith("/"), path

"""Every command and every piece of Python in README.md and docs/, run in order on small inputs.

Each page has a folder of its own, in which lie stand-ins for what it names. What cannot be run is marked in
the page (tests/inputs/pages.py) and listed here, so that leaving something out is seen in a change.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import Repository, asked, serve
from pages import PAGES, ROOT, SILENT, Block, blocks
from typer.testing import CliRunner

from noisytune_cli.cli.app import app

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
import torch
from safetensors.torch import load_file
from stand_ins import COMMIT, StandIns, given

#: What no test runs, and why: a word of each block, by page.
NOT_RUN = {
    "README.md": [
        ("pip install .", "installs packages"),
        ("pip install --no-deps", "installs packages"),
    ],
    "containers.md": [("docker build", "needs Docker")],
    "publishing.md": [("hf upload", "publishes on the hub")],
    "scale.md": [
        ("rm -r .noisytune-job", "removes a job, which the reader may have none of"),
        ("s3://models/llama", "needs a bucket"),
        ("sbatch", "needs Slurm"),
        ("--engine ray", "needs a cluster"),
    ],
    "study.md": [("make demo", "installs packages")],
    "remote.md": [("s3://models/llama", "needs a bucket")],
    "python.md": [("class NoiseExtension", "needs vLLM; its slices are tested with stand-ins")],
}

RUNNABLE = [page for page in PAGES if any(b.commands or b.language == "python" for b in blocks(page))]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIns]:
    """The stand-ins, and a hub that has bert-base-uncased."""
    made = StandIns(tmp_path_factory.mktemp("stand-ins"))
    with (
        pytest.MonkeyPatch.context() as patch,
        serve(**{"bert-base-uncased": Repository(made.hub_files(), COMMIT)}) as hub,
    ):
        cache = tmp_path_factory.mktemp("hub")
        asked(hub, cache, patch)
        patch.setenv("HF_ENDPOINT", hub.endpoint)
        patch.setenv("HF_HOME", str(cache))
        yield made


class Rows(list[Any]):
    """What the pages do with a data frame, where there is no pandas."""

    def sort_values(self, by: str) -> list[Any]:
        return sorted(self, key=lambda row: row[by] or 0)


@pytest.fixture
def shell(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `noisytune` and a `python` for the lines that need a shell."""
    folder = tmp_path_factory.mktemp("bin")
    for name, module in (("noisytune", " -m noisytune_cli"), ("python", "")):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}"{module} "$@"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")


def run(block: Block, names: dict[str, Any]) -> None:
    """Run a block as its reader would; a failure names the line."""
    if re.search(r"\b(jax|flax)\b", block.text):
        # JAX has threads of its own, and a process that has them may not fork, as other tests do.
        subprocess.run([sys.executable, "-c", block.text], check=True, timeout=120)
    elif block.language == "python":
        code = compile("\n" * (block.line - 1) + block.text, str(PAGES[block.page]), "exec")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=Rows))
            exec(code, names)
    for line in block.commands:
        if line.startswith("noisytune study "):
            line = re.sub(r" --seed 0-\d", "", line) + " --seed 0"  # more take minutes
        # What single quotes do not hide: anything that a shell would do more with than cut it into words.
        plain = not re.search(r"""[*?<>|&;$`(){}~"]""", re.sub(r"'[^']*'|#.*", "", line))
        if line.startswith("noisytune ") and plain:
            done = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
            assert done.exit_code == 0, f"{block.place}: {line}\n{done.stderr}"
        else:
            ran = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=120, check=False)
            assert ran.returncode == 0, f"{block.place}: {line}\n{ran.stderr}"


def stories(page: str) -> list[list[Block]]:
    """Return a page's blocks that are run, by the folder they run in; docs/cli.md has one for each verb."""
    wanted = [block for block in blocks(page) if block.why is None]
    return [[block] for block in wanted if block.commands] if page == "cli.md" else [wanted]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # what libraries say to each other
@pytest.mark.usefixtures("shell")
@pytest.mark.parametrize("page", RUNNABLE)
def test_every_command_of_a_page_runs(
    page: str, stand_ins: StandIns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, story in enumerate(stories(page)):
        folder = tmp_path / str(index)
        folder.mkdir()
        monkeypatch.chdir(folder)
        commands = "\n".join("\n".join(block.commands) for block in story)
        mentioned = set(re.findall(r"(?:^|[\s=])(?:\./)?([\w.*-]+)", commands))
        made = {name.removeprefix("./") for name in re.findall(r"(?:-o|>) '?([\w./-]+)", commands)}
        stand_ins.lay(mentioned, folder, but=made)
        names = given() if any(block.language == "python" for block in story) else {}
        for block in story:
            run(block, names)
        if page in CHECKS:
            CHECKS[page](names)


def test_every_block_is_run_or_says_why_not() -> None:
    left_out = {page: [block for block in blocks(page) if block.why is not None] for page in PAGES}
    assert {page: [block.why for block in some] for page, some in left_out.items() if some} == {
        page: [why for _, why in some] for page, some in NOT_RUN.items()
    }
    for page, some in NOT_RUN.items():
        assert all(word in block.text for (word, _), block in zip(some, left_out[page], strict=True))


@pytest.mark.parametrize("page", PAGES)
def test_no_command_hides(page: str) -> None:
    text = PAGES[page].read_text(encoding="utf-8")
    found = blocks(page)
    assert 2 * len(found) == len(re.findall(r"^\s*```", text, re.MULTILINE)), "a fence that is not seen"
    assert {block.language for block in found} <= SILENT | {"sh", "console", "python"}
    assert text.count("<!-- not run") == sum(block.why is not None for block in found)
    # In a block of no language, or one that is copied as it is, nothing that a reader would type.
    assert not re.search(r"^ {4,}(\$ )?noisytune ", text, re.MULTILINE) or page in ("cli.md",)
    for block in found:
        assert block.language != "sh" or not re.search(r"^\$ ", block.text, re.MULTILINE), block.place
        assert block.language != "console" or len(block.commands) < block.text.count("\n"), (
            f"{block.place}: commands without what they print are `sh`, to be copied"
        )


def check_recipes(names: dict[str, Any]) -> None:
    """Look at what the recipes made."""
    model, evaluate = names["model"], names["evaluate"]
    held = dict(model.named_parameters())
    start = load_file("llama/model.safetensors")
    assert all(torch.equal(held[name], tensor) for name, tensor in start.items())
    assert len(names["best"]) == 5
    assert len(list(Path("candidates").iterdir())) == 30
    assert len(list(Path("pairs").iterdir())) == 8
    assert [row["lam"] for row in names["rows"][::3]] == [0.0, 0.03, 0.41, 0.54][: len(names["rows"][::3])]
    # The run that scores led is better than where it began, and the file of its seeds gives the same bits.
    import noisytune_cli

    reward = evaluate(model)
    with noisytune_cli.noisy(model, mix=names["history"]):
        assert evaluate(model) > reward
        made = load_file("llama-es/model.safetensors")
        assert all(torch.equal(held[name], tensor) for name, tensor in made.items())
    apart = load_file("upcycled-apart/model.safetensors")
    first, second = (apart[f"layers.0.moe.experts.{i}.w1.weight"] for i in range(2))
    assert not torch.equal(first, second)
    stacked = apart["layers.1.mlp.experts.gate_up_proj"]
    assert not torch.equal(stacked[0], stacked[1])
    norms = load_file("llama-norms/model.safetensors")
    assert not torch.equal(norms["model.norm.weight"], held["model.norm.weight"].float())
    assert torch.equal(norms["lm_head.weight"], held["lm_head.weight"].float())


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {"recipes.md": check_recipes}

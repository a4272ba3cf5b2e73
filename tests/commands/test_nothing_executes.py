"""Nothing that a checkpoint holds is run: no program, no socket, no import, no write but the output.

Hostile pickles, configs that name Python files, and the Python files lie together, and the process that reads
them is watched: by Python's own audit events, and where it is installed by strace, which sees what Python
does not say.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import save, weights
from malformed_pickles import CASES

#: Runs each argument list in one process; prints the audit events that nothing here has a reason for.
_WATCHED = """
import json, os, sys

root, runs = sys.argv[1], json.loads(sys.argv[2])
found = []
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.", "socket.connect",
             "socket.bind", "socket.sendto", "socket.getaddrinfo", "pty.", "webbrowser.",
             "ftplib.", "urllib.", "http.", "pickle.find_class")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

def watch(event, arguments):
    if not armed:
        return
    if event.startswith(FORBIDDEN):
        found.append([event, repr(arguments)[:200]])
    elif event in ("exec", "compile") and root in repr(arguments):
        found.append([event, repr(arguments)[:200]])
    elif event == "import" and str(arguments[1] or "").startswith(root):
        found.append([event, repr(arguments)[:200]])
    elif event == "open":
        path, mode, flags = arguments
        # A name alone is one in an open directory, which the event does not tell: of these the test looks
        # at what is left.
        named = isinstance(path, (str, bytes)) and os.path.isabs(path)
        named = named and isinstance(flags, int) and flags & WRITES
        if named and not os.fsdecode(path).startswith(os.path.join(root, "out")):
            found.append([event, repr(arguments)[:200]])

armed = False
sys.addaudithook(watch)
os.chdir(root)
from noisytune_cli.cli.app import app
import typer.main
command = typer.main.get_command(app)
codes = []

def run(argv):
    try:
        command.main(args=argv, prog_name="noisytune")
    except SystemExit as ended:
        codes.append(ended.code or 0)

sys.stdout = open(os.devnull, "w")
sys.stderr = open(os.devnull, "w")
run(runs[0])  # what is imported and compiled once is not the checkpoint's doing
codes.clear()
armed = True
for argv in runs:
    run(argv)
armed = False
sys.__stdout__.write(json.dumps([codes, found, sorted(m for m in sys.modules if m.startswith("payload"))]))
"""

#: What would leave a trace if it ran or were imported.
_PAYLOAD = "import os\nopen({marker!r}, 'w').close()\n"


@pytest.fixture
def runs(tmp_path: Path) -> list[list[str]]:
    """Commands on a folder of hostile files; the first is harmless and loads what every run loads."""
    root = tmp_path / "model"
    save(root / "model.safetensors", {"w": weights("F32", 8, 4)})
    marker = str(tmp_path / "ran")
    (root / "config.json").write_text(
        json.dumps({"auto_map": {"AutoModel": "payload.Model"}, "architectures": ["payload.Model"]})
    )
    for name in ("payload", "modeling", "configuration", "__init__", "sitecustomize", "json", "numpy"):
        (root / f"{name}.py").write_text(_PAYLOAD.format(marker=marker))
    (root / "payload.pth").write_text(f"import os; open({marker!r}, 'w')")
    harmless = tmp_path / "harmless.safetensors"
    save(harmless, {"w": weights("F32", 8, 4)})
    found = [["perturb", str(harmless), "-o", str(tmp_path / "out" / "first"), "--overwrite"]]
    (tmp_path / "out").mkdir()
    found.append(["inspect", str(root)])
    found.append(["perturb", str(root), "-o", str(tmp_path / "out" / "model")])
    for number, case in enumerate(CASES):
        if case.refused and ("global" in " ".join(case.words) or number % 6 == 0):
            path = tmp_path / f"{number}.pt"
            path.write_bytes(case.build())
            found.append(["inspect", str(path)])
    hostile = tmp_path / "system.pt"
    hostile.write_bytes(
        f"\x80\x02cos\nsystem\nX{chr(len(marker) + 6)}\0\0\0touch {marker}\x85R.".encode("latin1")
    )
    found.append(["inspect", str(hostile)])
    return found


def test_by_audit_events(runs: list[list[str]], tmp_path: Path) -> None:
    before = sorted(path for path in tmp_path.rglob("*") if tmp_path / "out" not in path.parents)
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED, str(tmp_path), json.dumps(runs)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    codes, found, imported = json.loads(done.stdout)
    assert found == []
    assert imported == []
    assert codes[:3] == [0, 0, 0]
    assert set(codes[3:]) <= {0, 3}
    assert 3 in codes
    assert not (tmp_path / "ran").exists()
    assert sorted(path for path in tmp_path.rglob("*") if tmp_path / "out" not in path.parents) == before


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_by_system_calls(runs: list[list[str]], tmp_path: Path) -> None:
    log = tmp_path / "log"
    calls = "execve,execveat,fork,vfork,clone,clone3,socket,connect,openat,open,creat,ptrace,memfd_create"
    script = _WATCHED.replace("sys.addaudithook(watch)", "")
    tracer = ["strace", "-f", "-y", "-e", f"trace={calls}", "-o", str(log)]
    done = subprocess.run(
        [*tracer, sys.executable, "-c", script, str(tmp_path), json.dumps(runs)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    lines = log.read_text(errors="replace").splitlines()
    # Python starts with an execve; from where the checkpoint is opened on, nothing else may.
    begin = next(i for i, line in enumerate(lines) if f"{tmp_path}/model" in line)
    after = lines[begin:]
    assert len(after) > len(runs)
    started = [
        line for line in after if re.search(r"\b(execve|execveat|fork|vfork|socket|connect|ptrace)\(", line)
    ]
    assert started == []
    assert [line for line in after if re.search(r"\bclone3?\(", line) and "CLONE_THREAD" not in line] == []
    written = [line for line in after if re.search(r"O_(WRONLY|RDWR|CREAT|TRUNC)", line)]
    elsewhere = [line for line in written if f"{tmp_path}/out" not in line and "/dev/null" not in line]
    assert elsewhere == []
    assert written
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "out" / "model" / "noisytune.json").is_file()


#: Configs of which transformers makes a classifier only with the folder's own Python files.
_OWN_CODE = {
    "architecture": {"model_type": "payload", "auto_map": {"AutoConfig": "payload.Config"}},
    "classifier": {
        "model_type": "vit",
        "auto_map": {"AutoModelForSequenceClassification": "payload.Model"},
    },
}


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
@pytest.mark.parametrize("part", _OWN_CODE)
def test_a_study_asks_nobody_whether_to_run_code(part: str, tmp_path: Path) -> None:
    from tests.study.tiny import save_model, save_rows

    model = save_model(tmp_path / "model")
    (model / "config.json").write_text(json.dumps(_OWN_CODE[part]))
    marker = tmp_path / "ran"
    (model / "payload.py").write_text(_PAYLOAD.format(marker=str(marker)))
    train, dev = save_rows(tmp_path)
    arguments = ("study", model, "--train", train, "--dev", dev, "--text", "sentence", "--label", "label")
    done = subprocess.run(
        [sys.executable, "-m", "noisytune_cli", *arguments, "-o", tmp_path / "out", "--seed", "0", "--quiet"],
        input="y\n" * 100,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert not marker.exists()
    assert done.returncode == 3
    assert done.stdout == ""
    line = r"noisytune: error: cannot load a classifier: [^\n]+never run\. [^\n]+\n"
    assert re.fullmatch(line, done.stderr)

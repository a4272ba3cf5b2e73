"""What is imported when: heavy packages where they are used, and some never."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from checkpoints import save, weights

import noisytune_cli

ROOT = Path(noisytune_cli.__file__).parent
MODULES = sorted(os.fspath(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))


def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text())


def imported(module: str) -> Iterator[tuple[str, bool]]:
    """Yield what a module imports, as dotted names, and whether it does so as it is imported itself."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{module}: imports are absolute"
                assert child.module is not None
                yield child.module, at_import
                yield from ((f"{child.module}.{alias.name}", at_import) for alias in child.names)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, at_import and not inside)

    return visit(tree(module), True)


def reached() -> set[str]:
    """Follow what is imported at import time, from the command line and what a run on the CPU needs."""
    lazily = {
        "engine/walk.py",
        "noise/devices/cpu/__init__.py",
        "checkpoint/formats/safetensors/__init__.py",
    }
    rooms = {module for module in MODULES if module.startswith(("cli/", "commands/"))}
    pending = {"__main__.py"} | lazily | rooms
    found: set[str] = set()
    while pending:
        module = pending.pop()
        found.add(module)
        for name, at_import in imported(module):
            path = name.removeprefix("noisytune_cli.").replace(".", "/")
            if at_import and name != path:
                pending |= {f"{path}.py", f"{path}/__init__.py"} & set(MODULES) - found
    return found


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    heavy = {"torch", "huggingface_hub", "transformers", "rich", "safetensors"}
    modules = reached()
    assert len(modules) > 30
    for module in modules:
        now = {name.split(".")[0] for name, at_import in imported(module) if at_import}
        assert not now & heavy, module


def loaded(*arguments: object) -> set[str]:
    """Run noisytune in a process of its own and return what it had imported at its end."""
    script = (
        "import atexit, sys\n"
        "atexit.register(lambda: sys.__stderr__.write(' '.join(sys.modules)))\n"
        "from noisytune_cli.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_help_imports_no_numerics() -> None:
    heavy = {
        "numpy",
        "torch",
        "huggingface_hub",
        "transformers",
        "safetensors",
        "blake3",
        "scipy",
        "pydantic",
    }
    assert not loaded("perturb", "--help") & heavy
    heavy.add("pydantic")
    modules = loaded("--help")
    assert not modules & heavy
    assert {name for name in modules if name.startswith("noisytune_cli.cli.")} == {
        "noisytune_cli.cli.app",
        "noisytune_cli.cli.help",
    }


def test_a_plain_run_imports_no_more_than_it_needs(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {"w": weights("F32", 30)})
    modules = loaded("perturb", source, "-o", tmp_path / "out.safetensors", "--quiet")
    heavy = {
        "torch",
        "huggingface_hub",
        "transformers",
        "safetensors",
        "rich",
        "scipy",
        "jinja2",
        "matplotlib",
    }
    # What takes as long as NumPy, or as tens of modules of ours.
    assert not modules & (heavy | {"jinja2", "pydantic", "logging", "concurrent.futures", "html", "secrets"})
    ours = {name.removeprefix("noisytune_cli.") for name in modules if name.startswith("noisytune_cli.")}
    assert {name for name in ours if name.startswith(("cli.", "commands."))} == {
        *("cli.app", "cli.help", "cli.options", "cli.parse", "cli.perturb", "cli.show", "cli.show_perturb"),
        *("commands.perturb", "commands.replaced", "commands.request", "commands.result", "commands.write"),
    }
    for seldom in (
        *("memory", "study", "checkpoint.formats.torch", "checkpoint.formats.dcp", "checkpoint.hub"),
        *("checkpoint.hub_answers", "checkpoint.hub_errors", "checkpoint.dequantize", "plan.families"),
        *("plan.evidence.buffers_by_model", "manifest.read", "manifest.average", "manifest.mixture"),
        *("noise.devices.torch", "noise.devices.cuda", "noise.devices.cpu.reference"),
    ):
        assert seldom not in ours


def test_what_is_asked_of_headers_waits_for_no_more_than_it_needs(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {"w": weights("F32", 30)})
    unneeded = {"pydantic", "noisytune_cli.cli.pages", "noisytune_cli.manifest.read"}
    assert not loaded("inspect", source, "--headers-only") & unneeded
    assert not loaded("perturb", source, "--dry-run", "--include", "w", "--device", "cpu") & unneeded


def test_the_shorter_name_is_the_same_and_as_light() -> None:
    code = (
        "import sys, noisytune; assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "import noisytune_cli; assert dir(noisytune) == noisytune.__all__ == noisytune_cli.__all__\n"
        "assert noisytune.__version__ == noisytune_cli.__version__\n"
        "from noisytune import perturb; assert perturb is noisytune_cli.perturb\n"
        "assert not hasattr(noisytune, 'errors')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    shown = subprocess.run(
        [sys.executable, "-m", "noisytune", "-V"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == f"noisytune {noisytune_cli.__version__}\n"


def test_options_that_say_what_they_mean_need_no_pydantic(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {"w": weights("F32", 30)})
    for number, options in enumerate(
        (
            ("perturb", source, "-o", tmp_path / "0.safetensors", "--noise", "gaussian", "--threads", "2"),
            ("perturb", source, "--dry-run", "--dtype", "bfloat16", "--granularity", "matrix"),
            ("inspect", source, "--format", "json", "--limit", "1", "--lambda", "0.2"),
            ("compare", source, source, "--by", "kind", "--tolerance", "1e-3", "--format", "csv"),
        )
    ):
        assert "pydantic" not in loaded(*options), number


def test_a_comparison_reads_no_manifest_and_draws_no_page_unless_asked(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {"w": weights("F32", 30)})
    modules = loaded("compare", source, source, "--format", "csv")
    for seldom in ("cli.pages", "commands.detect", "engine.correlation", "manifest.average", "manifest.read"):
        assert f"noisytune_cli.{seldom}" not in modules
    assert "rich" not in modules

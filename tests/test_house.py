"""The house's law: what lies in which room, and that imports run down only, lazy ones included."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import noisytune_cli

ROOT = Path(noisytune_cli.__file__).parent
PAGE = ROOT.parent / "docs" / "architecture.md"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

#: The floor of each room. What stands at the root is below them all, but for the process itself.
FLOORS = {
    "noise": 1,
    "manifest": 2,
    "checkpoint": 3,
    "plan": 4,
    "engine": 4,
    "output": 5,
    "commands": 6,
    "memory": 6,
    "study": 7,
    "cli": 8,
}
FILES = {"__init__", "__main__", "version", "records", "dtypes", "errors", "escape", "reading"}

#: Packages whose `__init__` states a contract.
CONTRACTS = {
    "checkpoint.formats",
    "commands.engines",
    "noise.devices",
    "noise.distributions",
    "study.methods",
}

#: A wing reaches the rest by few doors.
DOORS = {
    ("memory", "checkpoint"): {"checkpoint.quantized"},
    ("study", "memory"): {"memory.perturb"},
}


def room_of(module: str) -> str:
    return module.split(".")[0] if module.split(".")[0] in FLOORS else ""


def floor_of(module: str) -> int:
    return 9 if module == "__main__" else FLOORS.get(room_of(module), 0)


def known(name: str) -> str | None:
    """Return the module of ours that a dotted name is or stands in; `__init__` for the package itself."""
    if name == "noisytune_cli":
        return "__init__"
    name = name.removeprefix("noisytune_cli.")
    return name if name in MODULES else None


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """Yield what a module imports of ours, now or later, and whether it does so for types alone."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))

    def visit(node: ast.AST, types: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            inside = types or (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING")
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names if alias.name.startswith("noisytune_cli")]
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{module}: imports are absolute"
                source = child.module or ""
                if source.split(".")[0] == "noisytune_cli":
                    deeper = {f"{source}.{alias.name}" for alias in child.names}
                    names = [name if known(name) else source for name in sorted(deeper)]
            for name in names:
                if (found := known(name)) is not None and found != module:
                    yield found, inside
            yield from visit(child, inside)

    return visit(tree, False)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return what is left of a graph once all that depends on nothing in it has been taken away."""
    left = {module: set(needed) for module, needed in graph.items()}
    while free := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in free:
            del left[module]
    return [sorted(left)] if left else []


def test_every_module_is_in_a_room() -> None:
    at_root = {path.stem for path in ROOT.glob("*.py")}
    assert at_root == FILES
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert rooms == set(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_down(module: str) -> None:
    for name, for_types in imports(module):
        if for_types:
            continue  # these must only close no circle
        same = room_of(name) == room_of(module)
        assert same or floor_of(name) < floor_of(module), f"{module} imports {name}"
        assert name != "__main__", module
        doors = DOORS.get((room_of(module), room_of(name)))
        assert doors is None or name in doors, f"{module} imports {name}"


def test_there_is_no_circle() -> None:
    # The package's own names for types are those of its users; nothing of ours imports the package itself.
    graph = {module: {name for name, _ in imports(module)} for module in MODULES if module != "__init__"}
    assert circles(graph) == []


def test_rooms_say_what_they_are_and_no_more() -> None:
    for path in ROOT.rglob("__init__.py"):
        name = ".".join(path.parent.relative_to(ROOT).parts)
        if name in FLOORS or name in ("study.data", "study.training", "study.report"):
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert len(body) == 1, name
            assert isinstance(body[0], ast.Expr), name
    assert set(MODULES) >= CONTRACTS


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_line_knows_typer_and_only_show_prints(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
            packages = {name.split(".")[0] for name in names}
            assert "typer" not in packages or room_of(module) == "cli", f"{module}:{node.lineno}"
            assert "click" not in packages, f"{module}:{node.lineno}"
        if isinstance(node, ast.Call) and not module.startswith("cli.show"):
            called = ast.unparse(node.func)
            assert called not in ("print", "input", "breakpoint"), f"{module}:{node.lineno}"
            assert not called.endswith((".echo", "stdout.write", "stderr.write")), f"{module}:{node.lineno}"


#: Public classes that still share a name, to be worked off.
SHARED: set[str] = set()


def test_no_two_public_classes_share_a_name() -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(module)
    assert {name for name, modules in found.items() if len(modules) > 1} == SHARED


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_named_for_nothing(module: str) -> None:
    if module == "commands.base":  # the user's --base
        return
    words = set(module.split(".")[-1].split("_"))
    assert not words & {"utils", "util", "common", "helper", "helpers", "manager", "base", "misc"}


@pytest.mark.parametrize("module", MODULES)
def test_files_that_comments_name_are_there(module: str) -> None:
    path = MODULES[module]
    for name in re.findall(r"`([\w/]+\.py)`", path.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file() or (path.parent / name).is_file(), name


def test_the_page_has_these_rooms() -> None:
    shown = re.findall(r"^  (\w+)/ ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(shown) == sorted(FLOORS)

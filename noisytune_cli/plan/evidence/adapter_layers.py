"""What an adapter's layers learn and what they keep, as peft declares it.

Each of peft's layers says by name which of its tensors are trained (`adapter_layer_names`) and which are not
(`other_param_names`: VeRA's frozen projections, TinyLoRA's). The declarations are read from the source of the
package that is installed: to import it takes seconds, and these are two tuples of strings.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from noisytune_cli.plan.evidence.structure import Kind

_LEARNED, _KEPT = "adapter_layer_names", "other_param_names"

WHY = "declared by its adapter's layers"


def kinds_of(adapter: Mapping[str, Any] | None, names: Iterable[str]) -> dict[str, tuple[Kind, str]]:
    """Return the kind of each name that the layers of an adapter's method declare."""
    method = (adapter or {}).get("peft_type")
    declared = _declared(method.lower()) if isinstance(method, str) and method.isidentifier() else {}
    kinds: dict[str, tuple[Kind, str]] = {}
    for name in names if declared else ():
        # The innermost module that is declared, as a layer may lie in another.
        for part in reversed(name.split(".")):
            if part in declared:
                kinds[name] = declared[part], WHY
                break
    return kinds


def _declared(method: str) -> dict[str, Kind]:
    """Return the kind of each name that the layers of a method declare; empty where peft is not installed."""
    package = importlib.util.find_spec("peft")
    kinds: dict[str, Kind] = {}
    for place in (package and package.submodule_search_locations) or ():
        try:
            tree = ast.parse((Path(place) / "tuners" / method / "layer.py").read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        found = [*_tuples(tree)]
        # Single words (`r`, `scaling`) are numbers, and may be any module.
        kept = [name for key, names in found if key == _KEPT for name in names if "_" in name]
        kinds |= dict.fromkeys(kept, "buffer")
        kinds |= {name: "parameter" for key, names in found if key == _LEARNED for name in names}
    return kinds


def _tuples(tree: ast.AST) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the tuples of strings that classes declare, by name."""
    for kind in ast.walk(tree):
        for node in kind.body if isinstance(kind, ast.ClassDef) else ():
            if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Tuple):
                continue
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                strings = [item.value for item in node.value.elts if isinstance(item, ast.Constant)]
                yield target.id, tuple(item for item in strings if isinstance(item, str))

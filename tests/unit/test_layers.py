"""The modules import only downwards in the list of docs/architecture.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SDK = ROOT / "sdk" / "mlinfra_sdk"


def layers() -> dict[str, int]:
    """The layer of each package and module, counted from the top."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text[text.index("## Layers") : text.index("## The life of a cell")]
    found: dict[str, int] = {}
    for number, row in enumerate(re.findall(r"^\| (`mlinfra_sdk/.*?) \|", table, re.M)):
        for name in re.findall(r"`(?:mlinfra_sdk/)?([a-z_]+)(?:\.py)?`", row):
            found[name] = number
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of ours that are imported when the code is, not those for types only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "mlinfra_sdk":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("mlinfra_sdk."):
                yield node.module.split(".")[1]
        yield from imported(node)


def test_imports_run_downwards() -> None:
    order = layers()
    wrong = []
    for path in sorted(SDK.rglob("*.py")):
        name = path.relative_to(SDK).parts[0].removesuffix(".py")
        if name.startswith("_"):
            continue
        for other in imported(ast.parse(path.read_text())):
            if not other.startswith("_") and order[other] < order[name]:
                wrong.append(f"{path.relative_to(SDK)} imports {other}")
    assert not wrong

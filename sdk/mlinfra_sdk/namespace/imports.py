"""Which modules code imports, and which ones objects need to be rebuilt."""

from __future__ import annotations

import ast
import dis
import types
from collections.abc import Iterable
from functools import lru_cache


def imports_of(tree: ast.AST) -> set[str]:
    """Dotted names of all modules that the code may import, by statement or by a constant name;
    not those that are relative to its own."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            name = getattr(function, "id", getattr(function, "attr", ""))
            if name in ("__import__", "import_module") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
            elif name == "run_line_magic" and len(node.args) > 1:
                found |= _imports_of_magic(node.args[0].value, node.args[1])
    return {name for name in found if name and not name.startswith(".")}


def _imports_of_magic(magic: object, line: ast.expr) -> set[str]:
    if magic in ("matplotlib", "pylab"):
        return {"matplotlib", "numpy"} if magic == "pylab" else {"matplotlib"}
    if magic in ("load_ext", "reload_ext") and isinstance(line, ast.Constant):
        return {str(line.value).strip()}
    return set()


def imports_of_source(source: bytes) -> set[str]:
    """As :func:`imports_of`, of the text of a module; nothing if it cannot be parsed."""
    try:
        return imports_of(ast.parse(source))
    except (SyntaxError, ValueError):
        return set()


def modules_of(objects: Iterable[object]) -> set[str]:
    """Names of the modules that must be there for these objects to be unpickled and used: those of
    classes, functions and modules among them, and what code among them imports."""
    found: set[str] = set()
    kinds: set[type] = set()
    for obj in objects:
        kinds.add(type(obj))
        if isinstance(obj, types.ModuleType):
            found.add(obj.__name__)
        elif isinstance(obj, types.CodeType):
            found |= imports_of_code(obj)
        elif isinstance(obj, (type, types.FunctionType, types.BuiltinFunctionType)):
            module = obj.__module__
            if isinstance(module, str):
                found.add(module)
    return found | {kind.__module__ for kind in kinds}


@lru_cache(maxsize=4096)
def imports_of_code(code: types.CodeType) -> frozenset[str]:
    """Modules that compiled code imports, that of nested functions included."""
    found = {it.argval for it in dis.get_instructions(code) if it.opname == "IMPORT_NAME"}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= imports_of_code(constant)
    return frozenset(name for name in found if name)

"""The scopes of Python code: which names a function or class body owns itself."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any


class Frame:
    """One scope: ``bound`` is what is surely bound now (module and class), ``locals`` what a
    function or comprehension owns throughout."""

    __slots__ = ("bound", "globals", "kind", "live", "locals", "name")

    def __init__(self, kind: str, locals_: Iterable[str] = (), name: str = "") -> None:
        self.kind = kind
        self.name = name
        self.locals = set(locals_)
        self.globals: set[str] = set()
        self.bound: set[str] = set()
        self.live = True


def arguments(args: ast.arguments) -> list[ast.arg]:
    every = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
    return [arg for arg in every if arg is not None]


def type_params(node: Any) -> list[str]:
    return [param.name for param in getattr(node, "type_params", ())]


_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def collect_bindings(body: Iterable[ast.AST], frame: Frame) -> None:
    """Fill in the names that a function with this body owns, and those it declares global."""
    outer: set[str] = set()
    nodes = list(body)
    while nodes:
        node: Any = nodes.pop()
        if isinstance(node, _DEFINITIONS):
            frame.locals.add(node.name)
        elif isinstance(node, _COMPREHENSIONS):
            walruses = (n for n in ast.walk(node) if isinstance(n, ast.NamedExpr))
            frame.locals.update(walrus.target.id for walrus in walruses)
        elif isinstance(node, ast.Global):
            frame.globals.update(node.names)
        elif isinstance(node, ast.Nonlocal):
            outer.update(node.names)
        elif isinstance(node, ast.Name):
            if not isinstance(node.ctx, ast.Load):
                frame.locals.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (alias.asname or alias.name.partition(".")[0] for alias in node.names)
            frame.locals.update(names)
        elif not isinstance(node, ast.Lambda):
            # Exception handlers and patterns bind by a plain string.
            for field in ("name", "rest"):
                name = getattr(node, field, None)
                if isinstance(name, str):
                    frame.locals.add(name)
            nodes.extend(ast.iter_child_nodes(node))
    frame.locals -= outer | frame.globals

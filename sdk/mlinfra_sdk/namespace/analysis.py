"""Which names of the notebook a cell may need, bind or delete.

Found on the text alone, by definite assignment: a name counts as read unless every way to the
place of the read binds it first. Where the text does not tell (a branch, a loop that may run zero
times, a ``with`` that may swallow an exception, a function body that may be called at once) the
name counts as read: one name too many costs a digest, one too few gives a wrong result.

Code in strings counts too: the arguments of IPython's magics and of ``exec``/``eval``, and the
languages that look up Python names (``df.query("a > @x")``, ``duckdb.sql("... from df")``,
formulas ``"y ~ f(x)"``). Such text is not seen when it comes from a variable of an earlier cell.
"""

from __future__ import annotations

import ast
import functools
import warnings
from collections.abc import Callable, Container, Iterable
from typing import Any, NamedTuple

from mlinfra_sdk.namespace.imports import imports_of
from mlinfra_sdk.namespace.magic_text import expanded, identifiers, magic_names, transformed
from mlinfra_sdk.namespace.scopes import Frame, arguments, collect_bindings, type_params


class CellNames(NamedTuple):
    """What a cell does with the names of the notebook.

    ``reads``: available names that it may read (or delete) before it surely binds them.
    ``binds``, ``deletes``: names that it may bind or delete (a hint: the worker finds out itself).
    ``everything``: it may look at any name (``globals()``, ``%who``, ``exec`` of unknown code).
    ``imports``: modules that it may import.
    """

    reads: frozenset[str]
    binds: frozenset[str]
    deletes: frozenset[str]
    everything: bool
    imports: frozenset[str] = frozenset()


def cell_names(transformed_code: str, available: Container[str], raw: str = "") -> CellNames:
    """The names of one cell, after IPython's input transformation; never raises on bad code.

    ``raw`` is the text before the transformation; its words are taken where the code cannot be
    parsed. Only ``reads`` is filtered by ``available``.
    """
    found = _analyse(transformed_code, raw)
    return found._replace(reads=frozenset(name for name in found.reads if name in available))


_FILENAME = "<mlinfra cell>"
# Names that belong to the process, not to the notebook.
_PROCESS_NAMES = frozenset(
    {"__name__", "__doc__", "__builtins__", "__builtin__", "__loader__", "__package__", "__spec__"}
)
_CODE_METHODS = frozenset({"run_cell", "ex", "ev", "magic"})
_QUERY_METHODS = frozenset({"query", "eval", "evaluate", "sql", "execute"})
_NAMESPACE_ATTRIBUTES = frozenset({"user_ns", "user_global_ns", "f_globals", "__globals__"})


@functools.lru_cache(maxsize=512)
def _analyse(code: str, raw: str) -> CellNames:
    walker = _Walker()
    try:
        tree = _parse(code)
        walker.imports |= imports_of(tree)
        walker.visit_all(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        walker.reads.update(identifiers(raw or code))
    else:
        if walker.unknown_query:
            texts = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant))
            for text in texts:
                if isinstance(text, str):
                    walker.reads.update(identifiers(text))
    return CellNames(
        frozenset(walker.reads - _PROCESS_NAMES),
        frozenset(walker.binds),
        frozenset(walker.deletes),
        walker.everything,
        frozenset(walker.imports),
    )


def _parse(text: str) -> ast.Module:
    # The parser's warnings (invalid escapes) are the user's, given when the cell really runs.
    # Not catch_warnings(): that makes all "once per place" warnings appear again.
    show = warnings.showwarning

    def forward(message: Any, category: Any, filename: str, *rest: Any, **named: Any) -> None:
        if filename != _FILENAME:
            show(message, category, filename, *rest, **named)

    warnings.showwarning = forward
    try:
        return ast.parse(text, _FILENAME)
    finally:
        warnings.showwarning = show


class _Walker:
    """Walks a cell in the order of execution; one method per node type that matters."""

    def __init__(self) -> None:
        self.reads: set[str] = set()
        self.binds: set[str] = set()
        self.deletes: set[str] = set()
        self.everything = False
        self.imports: set[str] = set()
        self.unknown_query = False
        self.module = Frame("module")
        self.frames = [self.module]

    # Names

    def load(self, name: str) -> None:
        for frame in reversed(self.frames):
            if name in frame.globals:
                break
            if frame.kind == "class":
                # Only code directly in the body sees its names; methods see the class itself.
                if name in frame.bound if frame is self.frames[-1] else name == frame.name:
                    return
            elif name in frame.locals:
                return
        if name not in self.module.bound:
            self.reads.add(name)

    def store(self, name: str, *, walrus: bool = False) -> None:
        frame = self.frames[-1]
        if walrus:
            frame = next(f for f in reversed(self.frames) if f.kind != "comprehension")
        if name in frame.globals:
            self.binds.add(name)
        elif frame.kind == "module":
            self.binds.add(name)
            if frame is self.frames[-1]:
                frame.bound.add(name)
        elif frame.kind == "class":
            frame.bound.add(name)

    def delete(self, name: str) -> None:
        frame = self.frames[-1]
        if frame.kind == "module" or name in frame.globals:
            self.load(name)
            self.deletes.add(name)
        frame.bound.discard(name)

    def mention(self, names: Iterable[str]) -> None:
        for name in names:
            self.load(name)

    # Traversal

    def visit(self, node: ast.AST) -> None:
        method = getattr(self, node.__class__.__name__, None)
        if method is None:
            for child in ast.iter_child_nodes(node):
                self.visit(child)
        else:
            method(node)

    def visit_all(self, nodes: Iterable[ast.AST | None]) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)

    def flows(self, *ways: Callable[[], None]) -> None:
        """Alternatives from one start: afterwards only what all of them bound is sure."""
        frame = self.frames[-1]
        start = frame.bound
        ends = []
        for way in ways:
            frame.bound, frame.live = set(start), True
            way()
            if frame.live:
                ends.append(frame.bound)
        frame.bound = set.intersection(*ends) if ends else start
        frame.live = bool(ends)

    def maybe(self, nodes: Iterable[ast.AST | None]) -> None:
        if nodes:
            self.flows(lambda: self.visit_all(nodes), lambda: None)

    # Expressions

    def Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.load(node.id)
        elif isinstance(node.ctx, ast.Store):
            self.store(node.id)
        else:
            self.delete(node.id)

    def Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and "~" in node.value and len(node.value) < 2000:
            self.mention(identifiers(node.value))

    def NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self.store(node.target.id, walrus=True)

    def BoolOp(self, node: ast.BoolOp) -> None:
        self.visit(node.values[0])
        self.maybe(node.values[1:])

    def IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.test)
        self.flows(lambda: self.visit(node.body), lambda: self.visit(node.orelse))

    def Lambda(self, node: ast.Lambda) -> None:
        self.visit_all([*node.args.defaults, *node.args.kw_defaults])
        self._function_body(node.args, [node.body], ())

    def ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> None:
        self._comprehension(node.generators, [node.elt])

    SetComp = GeneratorExp = ListComp

    def DictComp(self, node: ast.DictComp) -> None:
        self._comprehension(node.generators, [node.key, node.value])

    def _comprehension(self, generators: list[ast.comprehension], result: list[ast.expr]) -> None:
        self.visit(generators[0].iter)
        targets = (n for g in generators for n in ast.walk(g.target) if isinstance(n, ast.Name))
        names = [n.id for n in targets if isinstance(n.ctx, ast.Store)]
        self.frames.append(Frame("comprehension", names))
        for index, generator in enumerate(generators):
            if index:
                self.visit(generator.iter)
            self.visit_all([generator.target, *generator.ifs])
        self.visit_all(result)
        self.frames.pop()

    def Attribute(self, node: ast.Attribute) -> None:
        self.visit(node.value)
        if node.attr in _NAMESPACE_ATTRIBUTES:
            self.everything = True

    def Subscript(self, node: ast.Subscript) -> None:
        key = _text(node.slice)
        if key == "__main__":
            self.everything = True
        elif key is not None and self._is_namespace(node.value):
            self.Name(ast.Name(key, node.ctx))
            return
        self.visit(node.value)
        self.visit(node.slice)

    def Compare(self, node: ast.Compare) -> None:
        name = _text(node.left)
        if name is not None and len(node.ops) == 1 and self._is_namespace(node.comparators[0]):
            self.load(name)
        else:
            self.visit_all([node.left, *node.comparators])

    def _is_namespace(self, node: ast.expr) -> bool:
        """Whether the expression is the notebook's namespace itself."""
        if isinstance(node, ast.Attribute):
            return node.attr in _NAMESPACE_ATTRIBUTES
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            return False
        if node.args or node.keywords:
            return False
        if node.func.id == "globals":
            return True
        return node.func.id in ("locals", "vars", "dir") and self.frames[-1] is self.module

    def Call(self, node: ast.Call) -> None:
        func = node.func
        first = _text(node.args[0]) if node.args else None
        if self._is_namespace(node):
            self.everything = True
            return
        if isinstance(func, ast.Name):
            self.load(func.id)
            self.visit_all([*node.args, *node.keywords])
            if func.id in ("exec", "eval", "compile") and node.args:
                self._code(first)
            return
        if isinstance(func, ast.Attribute):
            if func.attr in ("get", "pop", "setdefault") and first is not None:
                if self._is_namespace(func.value):
                    self.load(first)
                    self.visit_all([*node.args, *node.keywords])
                    return
            elif self._ipython_call(func.attr, [_text(arg) for arg in node.args]):
                pass
            elif func.attr in _QUERY_METHODS and node.args:
                self.unknown_query |= first is None
                self.mention(identifiers(first or ""))
        self.visit(func)
        self.visit_all([*node.args, *node.keywords])

    # Text that IPython or Python run as code

    def _ipython_call(self, method: str, texts: list[str | None]) -> bool:
        """Handle a call of the shell that the input transformation makes, or one like it."""
        if method in ("run_line_magic", "run_cell_magic") and len(texts) >= 2:
            name, line, body = (*texts, "")[:3]
            if name is None or line is None or body is None:
                self.everything = True
                return True
            use = magic_names(name, line, body)
            self.mention(use.mentions)
            for code in use.code:
                self._code(code)
            for target in use.binds:
                self.store(target)
            self.deletes.update(use.deletes)
            self.everything |= use.everything
        elif method in ("system", "getoutput") and texts:
            self.mention(expanded(texts[0] or ""))
        elif method in _CODE_METHODS and texts and texts[0] is not None:
            self._code(transformed(texts[0]))
        else:
            return False
        return True

    def _code(self, text: str | None) -> None:
        """Code that runs here and now; None: its text is not known."""
        if text is None:
            self.everything = True
            return
        if self.frames[-1] is not self.module:
            # Comprehensions and functions in it see the notebook's names, not the local ones.
            self.reads.update(set(identifiers(text)) - self.module.bound)
        try:
            tree = _parse(text.strip())
        except (SyntaxError, ValueError):
            self.mention(identifiers(text))
        else:
            self.imports |= imports_of(tree)
            self.visit_all(tree.body)

    # Statements

    def Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        self.visit_all(node.targets)

    def AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.load(node.target.id)
        self.visit(node.value)
        self.visit(node.target)

    def AnnAssign(self, node: ast.AnnAssign) -> None:
        self._annotations([node.annotation])
        if node.value is not None:
            self.visit(node.value)
            self.visit(node.target)
        elif not isinstance(node.target, ast.Name):
            self.visit(node.target)

    def _annotations(self, nodes: Iterable[ast.expr | None]) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)
                for part in ast.walk(node):
                    self.mention(identifiers(_text(part) or ""))

    def Global(self, node: ast.Global) -> None:
        self.frames[-1].globals.update(node.names)

    def Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.everything |= alias.name == "__main__"
            self.store(alias.asname or alias.name.partition(".")[0])

    def ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if alias.name == "*":
                self.everything |= node.module == "__main__"
                continue
            if node.module == "__main__":
                self.load(alias.name)
            self.store(alias.asname or alias.name)

    def If(self, node: ast.If) -> None:
        self.visit(node.test)
        self.flows(lambda: self.visit_all(node.body), lambda: self.visit_all(node.orelse))

    def For(self, node: ast.For | ast.AsyncFor) -> None:
        self.visit(node.iter)
        self._loop([node.target, *node.body], node.orelse)

    AsyncFor = For

    def While(self, node: ast.While) -> None:
        self.visit(node.test)
        self._loop(node.body, node.orelse)

    def _loop(self, body: list[Any], orelse: list[ast.stmt]) -> None:
        self.maybe(body)
        self.maybe(orelse)
        self.frames[-1].live = True

    def With(self, node: ast.With | ast.AsyncWith) -> None:
        for item in node.items:
            self.visit_all([item.context_expr, item.optional_vars])
        self.maybe(node.body)

    AsyncWith = With

    def Try(self, node: Any) -> None:
        frame = self.frames[-1]
        start = frame.bound
        handlers = [functools.partial(self.visit, handler) for handler in node.handlers]
        self.flows(lambda: self.visit_all([*node.body, *node.orelse]), *handlers)
        after, live = frame.bound, frame.live
        frame.bound, frame.live = set(start), True
        self.visit_all(node.finalbody)
        frame.bound = (after | (frame.bound - start)) - (start - frame.bound)
        frame.live &= live

    TryStar = Try

    def ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.type is not None:
            self.visit(node.type)
        if node.name:
            self.store(node.name)
        self.visit_all(node.body)
        if node.name:
            self.frames[-1].bound.discard(node.name)

    def Match(self, node: Any) -> None:
        self.visit(node.subject)
        ways = [functools.partial(self.visit, case) for case in node.cases]
        last = node.cases[-1]
        catches_all = getattr(last.pattern, "pattern", "") is None and last.guard is None
        self.flows(*ways, *([] if catches_all else [lambda: None]))

    def MatchAs(self, node: Any) -> None:
        self.visit_all([node.pattern])
        if node.name:
            self.store(node.name)

    def MatchStar(self, node: Any) -> None:
        if node.name:
            self.store(node.name)

    def MatchMapping(self, node: Any) -> None:
        self.visit_all([*node.keys, *node.patterns])
        if node.rest:
            self.store(node.rest)

    def Raise(self, node: ast.stmt) -> None:
        self.visit_all(ast.iter_child_nodes(node))
        self.frames[-1].live = False

    Return = Break = Continue = Raise

    # Scopes

    def FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        args = node.args
        self.visit_all([*node.decorator_list, *args.defaults, *args.kw_defaults])
        params = type_params(node)
        annotations = [*(a.annotation for a in arguments(args)), node.returns]
        self._with_type_params(params, lambda: self._annotations(annotations))
        self.store(node.name)
        self._function_body(args, node.body, params)

    AsyncFunctionDef = FunctionDef

    def _function_body(self, args: ast.arguments, body: list[Any], params: Iterable[str]) -> None:
        frame = Frame("function", params)
        frame.locals.update(a.arg for a in arguments(args))
        collect_bindings(body, frame)
        self.frames.append(frame)
        self.visit_all(body)
        self.frames.pop()

    def ClassDef(self, node: ast.ClassDef) -> None:
        self.visit_all(node.decorator_list)
        self._with_type_params(type_params(node), lambda: self._class_body(node))
        self.store(node.name)

    def _class_body(self, node: ast.ClassDef) -> None:
        self.visit_all([*node.bases, *node.keywords])
        self.frames.append(Frame("class", name=node.name))
        self.visit_all(node.body)
        self.frames.pop()

    def TypeAlias(self, node: Any) -> None:
        self._with_type_params(type_params(node), lambda: self.visit(node.value))
        self.visit(node.name)

    def _with_type_params(self, names: list[str], action: Callable[[], None]) -> None:
        if names:
            self.frames.append(Frame("function", names))
            action()
            self.frames.pop()
        else:
            action()


def _text(node: ast.AST) -> str | None:
    value = node.value if isinstance(node, ast.Constant) else None
    return value if isinstance(value, str) else None

"""What IPython's magics and shell commands do with the names of the notebook."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_IDENTIFIER = re.compile(r"[^\W\d]\w*")
# IPython expands {expression} and $name in the lines of magics and in shell commands.
_EXPANDED = re.compile(r"\{([^}]*)|\$([^\W\d]\w*)")
_OPTIONS = re.compile(r"\s*(?:-[A-Za-z]+(?:\s*\d+)?\s+)*")
_RUN_IN_NAMESPACE = re.compile(r"(^|\s)-\w*i|\.ipynb\b")

_PYTHON = frozenset({"time", "timeit", "prun", "capture", "memit", "mprun"})
_SHELL = frozenset({"system", "sx", "!"})
_EVERYTHING = frozenset(
    {
        *("who", "who_ls", "whos", "store", "reset", "reset_selective"),
        *("rerun", "recall", "rep", "macro", "edit", "debug"),
    }
)
# Their line is expanded, their body is no Python code.
_TEXT = frozenset(
    {
        *("bash", "sh", "script", "cmd", "perl", "ruby", "pypy", "python", "python2", "python3"),
        *("html", "HTML", "javascript", "js", "latex", "markdown", "svg", "SVG"),
        *("writefile", "file", "load", "loadpy", "save", "run", "subshell"),
        *("pip", "conda", "mamba", "micromamba", "uv", "env", "set_env"),
        *("load_ext", "reload_ext", "unload_ext", "autoreload", "aimport"),
        *("matplotlib", "pylab", "gui", "notebook", "precision", "xmode", "colors", "tb"),
        *("cd", "pwd", "pushd", "popd", "dirs", "dhist", "bookmark", "ls", "ll", "lf", "ldir"),
        *("cat", "less", "more", "man", "pycat", "mkdir", "rmdir", "mv", "cp", "rm", "rehashx"),
        *("alias", "alias_magic", "autocall", "automagic", "autosave", "doctest_mode"),
        *("history", "hist", "logstart", "logstop", "lsmagic", "magic", "quickref"),
        "killbgscripts",
    }
)


class MagicNames(NamedTuple):
    """What one magic does: ``code`` runs in the namespace in this order, ``mentions`` may be read,
    ``binds`` and ``deletes`` change; ``everything``: it may look at any name."""

    code: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()
    binds: tuple[str, ...] = ()
    deletes: tuple[str, ...] = ()
    everything: bool = False


def identifiers(text: str) -> Iterator[str]:
    """Every word of the text that could be a name."""
    return (match.group() for match in _IDENTIFIER.finditer(text))


def expanded(text: str) -> tuple[str, ...]:
    """The names that IPython looks up to expand ``{expression}`` and ``$name`` in the text."""
    return tuple(
        found
        for expression, name in _EXPANDED.findall(text)
        for found in identifiers(expression or name)
    )


def magic_names(name: str, line: str, body: str) -> MagicNames:
    """The names used by the line magic ``%name line`` (no body) or the cell magic ``%%name``."""
    if name in _PYTHON:
        if name == "capture":
            target = tuple(word for word in line.split() if word.isidentifier())
            return MagicNames((transformed(body),), expanded(line), target)
        options = _OPTIONS.match(line)
        statement = line[options.end() :] if options else line
        return MagicNames((transformed(statement), transformed(body)), expanded(line))
    if name in _SHELL:
        return MagicNames(mentions=expanded(line + body))
    if name in _EVERYTHING:
        return MagicNames(everything=True)
    if name == "xdel":
        names = tuple(identifiers(line))
        return MagicNames(mentions=names, deletes=names)
    if name in _TEXT:
        everything = name == "run" and _RUN_IN_NAMESPACE.search(line) is not None
        return MagicNames(mentions=expanded(line), everything=everything)
    return MagicNames(mentions=(*identifiers(line), *identifiers(body)))


def transformed(text: str) -> str:
    """Python code from IPython's input syntax (``!cmd``, ``%magic``, ``name?``)."""
    if not text or text.isidentifier():
        return text
    try:
        return _transformer()(text)
    except SyntaxError:
        return text


@functools.lru_cache(maxsize=1)
def _transformer() -> Callable[[str], str]:
    try:
        from IPython.core import inputtransformer2
    except ImportError:  # a script: there are no magics
        return str
    manager = inputtransformer2.TransformerManager()
    transform: Callable[[str], str] = manager.transform_cell
    return transform

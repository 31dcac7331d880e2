"""Which files stay where they are.

In order, the last word counts: names that are never worth sending, the ``.gitignore`` files from
the root down, the ``.mlignore`` files from the root down. The rules are always those of the
notebook's side: the machine is sent them, so that both sides mean the same.
"""

from __future__ import annotations

import codecs
import os
import posixpath
from collections.abc import Iterable

import msgspec
from pathspec import GitIgnoreSpec

from . import names

FILES = (b".gitignore", b".mlignore")
MARKERS = (b"pyvenv.cfg", b"CACHEDIR.TAG")
"""A directory with one of these is a virtual environment or a cache, whatever its name is."""

_FOLDERS = frozenset(
    b".git .hg .svn .bzr .jj .venv venv .tox .nox .conda __pycache__ __pypackages__ node_modules"
    b" .ipynb_checkpoints .virtual_documents .mypy_cache .pytest_cache .ruff_cache .hypothesis"
    b" .cache .eggs .Trash-1000 $RECYCLE.BIN".split(b" ")
)
_NAMES = frozenset({b".DS_Store", b"Thumbs.db", b"desktop.ini", b".git"})
_SUFFIXES = (b".pyc", b".pyo", b".swp", b".swx", b"~")


class RuleFile(msgspec.Struct, array_like=True, frozen=True):
    """A file with rules: its path and its content."""

    path: bytes
    text: bytes


class Rules:
    """The rules of a tree. ``warnings`` are sentences about lines that cannot be understood."""

    def __init__(self, files: Iterable[RuleFile] = ()) -> None:
        self.warnings: list[str] = []
        self.files: dict[bytes, RuleFile] = {}
        self._specs: dict[bytes, GitIgnoreSpec] = {}
        self._layers: list[list[tuple[bytes, GitIgnoreSpec]]] = []
        self._known: dict[tuple[bytes, bool], bool] = {}
        for file in files:
            self.put(file)

    def put(self, file: RuleFile) -> None:
        """Take a file's rules, in the place of those that it had."""
        self.files[file.path] = file
        self._specs[file.path] = self._spec(file)
        self._arrange()

    def drop(self, path: bytes) -> None:
        """The file of this path is gone."""
        del self.files[path], self._specs[path]
        self._arrange()

    def _arrange(self) -> None:
        self._known.clear()
        self._layers = []
        for kind in FILES:
            paths = [path for path in self._specs if posixpath.basename(path) == kind]
            paths.sort(key=lambda path: path.count(b"/"))
            self._layers.append([(_prefix(path), self._specs[path]) for path in paths])

    def _spec(self, file: RuleFile) -> GitIgnoreSpec:
        patterns: list[str] = []
        for line in os.fsdecode(file.text.removeprefix(codecs.BOM_UTF8)).splitlines():
            try:
                GitIgnoreSpec.from_lines([line])
            except Exception:  # whatever a regular expression made of it may raise
                self.warnings.append(
                    f"The line {line.strip()[:60]!r} of {names.shown(file.path)} is no pattern of"
                    " .gitignore; it is left out."
                )
            else:
                patterns.append(line)
        return GitIgnoreSpec.from_lines(patterns)

    def ignored(self, path: bytes, is_folder: bool) -> bool:
        """Whether ``path`` is ignored; the directories above it are taken not to be."""
        key = path, is_folder
        verdict = self._known.get(key)
        if verdict is None:
            verdict = self._known[key] = self._decide(path, is_folder)
        return verdict

    def covers(self, path: bytes, is_folder: bool) -> bool:
        """Whether ``path`` or a directory above it is ignored."""
        return self.ignored(path, is_folder) or any(
            self.ignored(folder, True) for folder in names.ancestors(path)
        )

    def _decide(self, path: bytes, is_folder: bool) -> bool:
        for layer in reversed(self._layers):
            for prefix, spec in reversed(layer):
                if path.startswith(prefix):
                    text = os.fsdecode(path[len(prefix) :]) + ("/" if is_folder else "")
                    verdict = spec.check_file(text).include
                    if verdict is not None:
                        return bool(verdict)
        name = posixpath.basename(path)
        if is_folder:
            return name in _FOLDERS
        return name in _NAMES or name.endswith(_SUFFIXES)


def _prefix(path: bytes) -> bytes:
    folder = posixpath.dirname(path)
    return folder + b"/" if folder else b""

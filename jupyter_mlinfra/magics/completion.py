"""Tab completion of ``%%remote`` and ``%remote`` lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from IPython.core.completer import CompletionContext, SimpleCompletion, context_matcher
from IPython.core.interactiveshell import InteractiveShell

from mlinfra_sdk import spec
from mlinfra_sdk.catalog import catalog
from mlinfra_sdk.ledger.report import GROUPS
from mlinfra_sdk.spec import CELL, NOTEBOOK, SETTINGS

from .grammar import SUBCOMMANDS, SYNC_OPTIONS

Names = Callable[[], Iterable[str]]


def install(shell: InteractiveShell, *, machines: Names, pullable: Names) -> Callable[[], None]:
    """Complete remote lines in this shell; returns what takes it out again.

    ``machines`` gives the names of machines, ``pullable`` those of variables that can be pulled;
    both are called when such a name is being completed, so they must be quick.
    """

    @context_matcher(identifier="jupyter_mlinfra.remote")  # type: ignore[untyped-decorator]
    def matcher(context: CompletionContext) -> dict[str, Any]:
        line = context.line_with_cursor[: context.cursor_position]
        found = complete(line, context.cursor_line == 0, machines=machines, pullable=pullable)
        if found is None:
            return {"completions": []}
        fragment, words = found
        return {
            "completions": [SimpleCompletion(word, type="param") for word in words],
            "matched_fragment": fragment,
            "suppress": True,
            "ordered": True,
        }

    custom: list[Any] = shell.Completer.custom_matchers
    custom.append(matcher)

    def uninstall() -> None:
        if matcher in custom:
            custom.remove(matcher)

    return uninstall


def complete(
    line: str, first_line: bool, *, machines: Names, pullable: Names
) -> tuple[str, list[str]] | None:
    """The word being written at the end of ``line`` and what it may become; None if the line is
    no remote line."""
    magic, space, rest = line.lstrip().partition(" ")
    if (
        not space
        or magic not in ("%%remote", "%remote")
        or (magic == "%%remote" and not first_line)
    ):
        return None
    words = rest.split(" ")
    earlier, word = [w for w in words[:-1] if w], words[-1]
    if magic == "%%remote":
        return _setting(word, earlier, CELL, machines)
    if not earlier:
        return _starting_with(word, SUBCOMMANDS)
    if earlier[0] in ("use", "quote"):
        return _setting(word, earlier[1:], NOTEBOOK, machines)
    if earlier in (["stop"], ["extend"]):
        return _starting_with(word, machines())
    if earlier[0] == "catalog":
        return _starting_with(word, ("--refresh",) if word.startswith("-") else catalog().names)
    if earlier == ["cost"]:
        return _starting_with(word, GROUPS)
    if earlier[0] == "sync" and word.startswith("-"):
        return _starting_with(word, [name for name in SYNC_OPTIONS if name not in earlier])
    if earlier[0] == "pull":
        return _starting_with(word, [name for name in pullable() if name not in earlier])
    return word, []


def _setting(
    word: str, earlier: list[str], place: str, machines: Names
) -> tuple[str, list[str]] | None:
    key, equals, value = word.partition("=")
    if equals:
        setting = SETTINGS.get(key)
        if setting is None:
            return value, []
        if setting.kind is spec.GPU:
            value = value.rpartition("|")[2]
        return _starting_with(
            value, machines() if setting.kind is spec.NAME else setting.kind.suggestions()
        )
    taken = {used.partition("=")[0] for used in earlier}
    return _starting_with(
        word,
        [
            name if setting.kind is spec.FLAG else f"{name}="
            for name, setting in SETTINGS.items()
            if place in setting.where and name not in taken
        ],
    )


def _starting_with(word: str, candidates: Iterable[str]) -> tuple[str, list[str]]:
    return word, [name for name in candidates if name.lower().startswith(word.lower())]

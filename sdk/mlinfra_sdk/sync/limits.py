"""What is too much to be sent without a word, and how the user is asked."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.units import format_size

from . import names

MOST_FILES = 50_000
_NAMED = 3
_FEW = 10
"""Removals up to this number are never suspicious."""


def check_root(root: Path) -> None:
    """Refuse directories that are nobody's project. Raises :class:`RequestError`."""
    home = Path.home()
    if not root.is_dir():
        raise RequestError(
            f"The notebook's folder {root} is not there.", hint="Write sync=no to go without it."
        )
    try:
        is_home = root.samefile(home)
    except OSError:
        is_home = False
    if root == Path(root.anchor) or is_home or root.resolve() in home.resolve().parents:
        what = "your home directory" if is_home else str(root)
        raise RequestError(
            f"The notebook's folder is {what}, and that is not sent to a machine.",
            hint="Put the notebook in a folder of its own, or write sync=no.",
        )


def check_size(files: Iterable[tuple[bytes, int]], limit: int) -> None:
    """Raise :class:`RequestError` if that is more than the user may expect; says where it lies."""
    files = list(files)
    total = sum(size for _, size in files)
    if total <= limit and len(files) <= MOST_FILES:
        return
    sizes: Counter[bytes] = Counter()
    counts: Counter[bytes] = Counter()
    for path, size in files:
        place = path.split(b"/", 1)[0] + (b"/" if b"/" in path else b"")
        sizes[place] += size
        counts[place] += 1
    if total > limit:
        what = f"{format_size(total)} of files would be sent (sync_limit is {format_size(limit)})"
        biggest = [
            f"{names.shown(name)} {format_size(size)}" for name, size in sizes.most_common(_NAMED)
        ]
        hint = f"or allow it by sync_limit={_next_size(total)}; sync=no sends nothing."
    else:
        what = f"{len(files)} files would be sent, more than {MOST_FILES}"
        biggest = [
            f"{names.shown(name)} with {count} files" for name, count in counts.most_common(_NAMED)
        ]
        hint = "or keep them in an archive; sync=no sends nothing."
    most = names.shown((sizes if total > limit else counts).most_common(1)[0][0])
    raise RequestError(
        f"{what}. Most of it: {', '.join(biggest)}.",
        hint=f"Write what the machine does not need into .mlignore (such as /{most}), {hint}",
    )


def _next_size(size: int) -> str:
    """A round size that is enough."""
    unit, word = (10**9, "GB") if size >= 10**9 else (10**6, "MB")
    return f"{-(-size * 11 // (10 * unit))}{word}"


def suspicious(removed: int, known: int) -> bool:
    """Whether so many removals look like an accident."""
    return removed > _FEW and removed * 2 > known


def is_below(path: Path, root: Path) -> bytes | None:
    """``path`` relative to ``root``, if it lies in there."""
    try:
        return os.fsencode(path.resolve().relative_to(root.resolve()))
    except ValueError:
        return None

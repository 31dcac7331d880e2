"""The SDK's own environments on a host: ``bootstrap.sh`` makes one for each version that is used
there, named by its digest. Those that nobody needs any more are removed by the agents' upkeep.

The newest :data:`KEPT` stay, if they were used in the last :data:`DAYS` days, and so does any that
a machine needs: one that runs, or one with runs to be collected, which an older client does.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from mlinfra_sdk.worker.folder import ENVIRONMENT

KEPT = 3
DAYS = 30.0
_USED = "used"
"""A file that ``bootstrap.sh`` writes at each launch."""
_NAME = re.compile(r"[0-9a-f]{20}")
_DAY_S = 86400.0


def claim(folder: Path) -> None:
    """Note in a machine's folder that its agent has this environment."""
    link = folder / ENVIRONMENT
    link.unlink(missing_ok=True)
    link.symlink_to(sys.prefix)


def is_in(home: Path) -> bool:
    """Whether this process has an environment of that directory."""
    with suppress(OSError):
        return os.path.samefile(Path(sys.prefix).parent, home / "sdk")
    return False


def take_out(home: Path, machines: Iterable[Path]) -> list[Path]:
    """Take environments out of use that neither this process, nor any of the ``machines``' folders,
    nor the next launch needs. Gives what :func:`remove` is to remove; ``bootstrap.sh`` does so
    later with what a process leaves that is killed before."""
    needed = {Path(sys.prefix).name, *_claimed(machines)}
    known = [path for path in (home / "sdk").iterdir() if _NAME.fullmatch(path.name)]
    out = []
    for place, path in enumerate(sorted(known, key=_last_used, reverse=True)):
        fresh = place < KEPT and time.time() - _last_used(path) < DAYS * _DAY_S
        if not fresh and path.name not in needed:
            trash = home / f"new.{path.name}.{os.getpid()}"
            path.rename(trash)
            out.append(trash)
    return out


def remove(paths: Iterable[Path]) -> None:
    """Remove what was taken out."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def _claimed(machines: Iterable[Path]) -> Iterator[str]:
    for folder in machines:
        with suppress(OSError):
            yield (folder / ENVIRONMENT).readlink().name


def _last_used(path: Path) -> float:
    for file in (path / _USED, path):
        with suppress(OSError):
            return file.stat().st_mtime
    return 0.0

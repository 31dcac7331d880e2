"""What has to move, decided by three states of each path: here, there, and the last common one.

Nothing that a side has changed is ever overwritten or removed by the other one's version:

- changed on one side only: that side's version goes to the other; a removal too;
- removed on one side and changed on the other: the changed version stays and comes back;
- changed on both sides in different ways: there, the version is put aside under another name, and
  both then go both ways;
- a directory goes only when nothing in it stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .entries import ABSENT, FOLDER
from .names import ancestors

_FOLDER = FOLDER.encode()


@dataclass
class Plan:
    """Paths by what is to be done with them; each list is sorted."""

    up: list[bytes] = field(default_factory=list)
    """This side's version goes there."""
    down: list[bytes] = field(default_factory=list)
    """That side's version comes here."""
    remove_there: list[bytes] = field(default_factory=list)
    remove_here: list[bytes] = field(default_factory=list)
    aside: list[bytes] = field(default_factory=list)
    """Conflicts: what is there gets another name, then all is decided anew."""
    settled: list[bytes] = field(default_factory=list)
    """Both sides have come to the same by themselves, or both have removed it."""

    @property
    def empty(self) -> bool:
        """Whether nothing has to move."""
        lists = self.up, self.down, self.remove_there, self.remove_here, self.aside
        return not any(lists)


def merge(
    base: Mapping[bytes, bytes], here: Mapping[bytes, bytes], there: Mapping[bytes, bytes]
) -> Plan:
    """Decide. The mappings give the state of each path that exists (``Entry.state``)."""
    plan = Plan()
    if base == here == there:
        return plan
    for path in sorted(base.keys() | here.keys() | there.keys()):
        old = base.get(path, ABSENT)
        mine, theirs = here.get(path, ABSENT), there.get(path, ABSENT)
        if mine == theirs:
            if mine != old:
                plan.settled.append(path)
        elif mine == old or (not mine and theirs != old):
            (plan.down if theirs else plan.remove_here).append(path)
        elif theirs == old or not theirs:
            (plan.up if mine else plan.remove_there).append(path)
        else:
            plan.aside.append(path)
    if not plan.empty:
        _keep_folders(plan, here, there)
    return plan


def _keep_folders(plan: Plan, here: Mapping[bytes, bytes], there: Mapping[bytes, bytes]) -> None:
    """Make the outcome a tree: what stays has directories above it."""
    final = dict(here)
    final.update({path: there[path] for path in plan.down})
    for path in (*plan.remove_here, *plan.remove_there):
        final.pop(path, None)
    needed = {folder for path in final for folder in ancestors(path)}

    for removals, back in ((plan.remove_here, plan.up), (plan.remove_there, plan.down)):
        kept = [path for path in removals if path in needed]
        back += [path for path in kept if (here if back is plan.up else there)[path] == _FOLDER]
        removals[:] = [path for path in removals if path not in needed]
        plan.aside += [path for path in kept if path not in back]
    for path in needed:
        if path in final and final[path] != _FOLDER and path not in plan.aside:
            plan.aside.append(path)
    moved = {path for path in plan.aside if path in there}
    plan.aside = sorted(moved)

    def undisturbed(paths: Iterable[bytes]) -> list[bytes]:
        return sorted(
            path for path in paths if path not in moved and moved.isdisjoint(ancestors(path))
        )

    plan.up, plan.down = undisturbed(plan.up), undisturbed(plan.down)
    plan.remove_here = undisturbed(plan.remove_here)
    plan.remove_there = undisturbed(plan.remove_there)
    plan.settled = undisturbed(plan.settled)

"""What the local side remembers of what the worker holds."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

from mlinfra_sdk.namespace.graphs import Root, to_runs


class Record(msgspec.Struct, frozen=True):
    """The worker holds the content ``digest`` of a variable, loaded with group ``group``."""

    digest: bytes
    group: int


class GroupRecord(msgspec.Struct, frozen=True):
    """A graph that the worker holds.

    ``runs`` say for each variable which index of the group's graph is which of the variable's own.
    Groups of one ``family`` share objects over there.
    """

    names: tuple[str, ...]
    digest: bytes
    runs: dict[str, list[int]]
    family: int


KnownGroups: TypeAlias = dict[int, dict[str, list[int]]]
"""By group id: the runs (see GroupRecord) of its variables that are still what they were."""


class Exchange(msgspec.Struct, eq=False):
    """A cell that is under way."""

    roots: dict[str, Root]
    records: dict[str, Record]
    groups: dict[int, GroupRecord]
    deleted: list[str]
    exports: int
    released: int
    ambient: dict[str, bytes] = {}


class Arrived(msgspec.Struct, eq=False):
    """A rebuilt group: its values, the ids of its objects by index, groups it shares with."""

    group: int
    values: dict[str, Any]
    ids: dict[int, int]
    linked: set[int]


def group_record(roots: list[Root], digest: bytes, ids: dict[int, int], family: int) -> GroupRecord:
    """``ids`` are the ids of the local objects by their index in the group's graph."""
    runs = {}
    for root in roots:
        memo = root.dump.memo
        pairs = ((index, memo[key][0]) for index, key in ids.items() if key in memo)
        runs[root.name] = to_runs(pairs)
    return GroupRecord(tuple(root.name for root in roots), digest, runs, family)

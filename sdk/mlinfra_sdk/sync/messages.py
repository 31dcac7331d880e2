"""What the two sides of a workspace say to each other."""

from __future__ import annotations

import msgspec

from .entries import Entry
from .ignore import RuleFile


class List(msgspec.Struct, tag=True, omit_defaults=True):
    """What has changed in the workspace of this name since the change ``since`` of the record
    ``epoch``; answered with a :class:`Listing`. New files above ``lazy_above`` bytes get no digest
    unless they are ``wanted``."""

    name: str
    rules: list[RuleFile]
    epoch: str = ""
    since: int = 0
    lazy_above: int = 0
    wanted: list[bytes] = []


class Listing(msgspec.Struct, array_like=True):
    """``whole``: the entries are all that there are. ``skipped`` take no part, for a reason."""

    root: str
    epoch: str
    change: int
    whole: bool
    entries: list[Entry]
    gone: list[bytes]
    skipped: dict[bytes, str]


class Want(msgspec.Struct, array_like=True, gc=False):
    """A file, in this state, of which these pieces are wanted (none: all of a small one)."""

    path: bytes
    state: bytes
    pieces: list[int] = []


class Expect(msgspec.Struct, tag=True):
    """These large files are about to be sent: have their pieces put where they belong at once.
    Answered with those of ``digests`` that are not there yet. What was expected before in this
    workspace and was not put in place may be forgotten, but for what has come of it."""

    name: str
    files: list[Entry]
    digests: list[bytes]


class Stage(msgspec.Struct, tag=True):
    """Make pieces ready to be fetched by their digests; answered with a :class:`Staged`. What was
    staged before in this workspace may be forgotten."""

    name: str
    wants: list[Want]


class Place(msgspec.Struct, array_like=True, gc=False):
    """Where a small file's content lies: in which pack, and from which byte on. ``error`` says why
    it cannot be had."""

    pack: bytes = b""
    offset: int = 0
    error: str = ""


class Staged(msgspec.Struct, array_like=True):
    """One :class:`Place` for each file, and the digests of all that is to be fetched."""

    places: list[Place]
    digests: list[bytes]


class Change(msgspec.Struct, array_like=True, gc=False):
    """Something to be done at a path, provided that it is still in the state ``old``.

    With an ``entry`` that is put there, its content taken from ``place`` or from its pieces; with
    ``to`` what is there gets this name; with neither it is removed.
    """

    path: bytes
    old: bytes
    entry: Entry | None = None
    place: Place = msgspec.field(default_factory=Place)
    to: bytes = b""


class Apply(msgspec.Struct, tag=True):
    """Make these changes; answered with an :class:`Applied`."""

    name: str
    changes: list[Change]


class Applied(msgspec.Struct, array_like=True):
    """For each change nothing, or why it was not made. The record was at change ``before`` and is
    at ``after`` now."""

    problems: list[str]
    before: int
    after: int


AnyMessage = List | Expect | Stage | Apply

CHANGED = "it has changed meanwhile"
"""The problem of a change that did not find what it expected."""

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(AnyMessage).decode

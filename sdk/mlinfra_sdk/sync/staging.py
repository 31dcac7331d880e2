"""Content on its way: taken from the files at one end.

What is not larger than one piece travels in packs of many files; larger files go piece by piece,
and only pieces that the other side has in no file. Memory is bounded by the size of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable

from mlinfra_sdk.errors import ChunkMissing, SyncError

from . import names
from .entries import CHUNK, FILE, Entry, digest_of, piece_length, read_piece
from .messages import CHANGED, Place, Want
from .tree import Tree

PACK = 4 << 20
"""Bytes of small files that travel together."""
_MAGIC = b"mlinfra pack\n"
"""At the beginning of each pack: no other chunk is ever the same, so a pack may be removed from a
store when its files are in place."""


class Stager:
    """Pieces of the files of a tree that are about to be sent, by their digests."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._packs: dict[bytes, bytes] = {}
        self._pieces: dict[bytes, tuple[bytes, int, int]] = {}

    def stage(self, wants: Iterable[Want]) -> tuple[list[Place], list[bytes]]:
        """Make these ready, and nothing else; see :class:`messages.Staged`."""
        self._packs, self._pieces = {}, {}
        places: list[Place] = []
        open_places: list[Place] = []
        pack = bytearray(_MAGIC)

        def seal() -> None:
            nonlocal pack
            if open_places:
                digest = digest_of(pack)
                self._packs[digest] = bytes(pack)
                for place in open_places:
                    place.pack = digest
                open_places.clear()
                pack = bytearray(_MAGIC)

        for want in wants:
            place = Place()
            places.append(place)
            try:
                entry = self._entry(want)
                if want.pieces:
                    for index in want.pieces:
                        length = piece_length(entry, index)
                        self._pieces[entry.chunks[index]] = entry.path, index * CHUNK, length
                    continue
                data = self._small(entry)
            except SyncError as error:
                place.error = error.message
                continue
            except OSError as error:
                place.error = f"it cannot be read ({error.strerror})"
                continue
            if len(pack) + len(data) > PACK:
                seal()
            place.offset = len(pack)
            pack += data
            open_places.append(place)
        seal()
        return places, [*self._packs, *self._pieces]

    def _entry(self, want: Want) -> Entry:
        names.parts(want.path)
        known = self._tree.known.get(want.path)
        if known is None or known.entry.state != want.state or known.entry.kind != FILE:
            raise SyncError(CHANGED)
        if want.pieces and not 0 <= max(want.pieces) < len(known.entry.chunks):
            raise SyncError(CHANGED)
        return known.entry

    def _small(self, entry: Entry) -> bytes:
        data = self._tree.fresh.pop(entry.path, None)
        if data is None:
            with self._tree.root.reading(entry.path) as fd:
                data = read_piece(fd, 0, CHUNK + 1)
            if digest_of(data) != entry.digest:
                raise SyncError(CHANGED)
        return data

    def size(self, digest: bytes) -> int:
        """Bytes of a staged piece; 0 if it is none."""
        pack = self._packs.get(digest)
        return len(pack) if pack is not None else self._pieces.get(digest, (b"", 0, 0))[2]

    def read_chunk(self, digest: bytes, *, verify: bool = True) -> bytes:
        """A staged piece. Raises :class:`ChunkMissing` if its file cannot be read, or has changed
        meanwhile; who does not have that found out gets another piece then."""
        pack = self._packs.get(digest)
        if pack is not None:
            return pack
        if digest not in self._pieces:
            raise ChunkMissing("What was to be sent is not there any more.")
        path, offset, length = self._pieces[digest]
        try:
            with self._tree.root.reading(path) as fd:
                data = read_piece(fd, offset, length)
        except OSError as error:
            raise ChunkMissing(f"{names.shown(path)} cannot be read: {error.strerror}.") from None
        if verify and digest_of(data) != digest:
            raise ChunkMissing(f"{names.shown(path)} has changed while it was sent.")
        return data

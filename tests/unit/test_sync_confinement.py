"""Nothing outside of a workspace is read or written, whatever the other side sends."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twins import Twins, contents, twins

from mlinfra_sdk.errors import MlinfraError, SyncError
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.sync import names
from mlinfra_sdk.sync.entries import FILE, FOLDER, LINK, Entry, digest_of
from mlinfra_sdk.sync.messages import Change, Listing, Place, Want
from mlinfra_sdk.sync.placing import Placer
from mlinfra_sdk.sync.root import Root
from mlinfra_sdk.sync.staging import Stager
from mlinfra_sdk.sync.tree import Tree

SECRET = "not for you"


class Jail:
    """A root with a secret beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "root"
        (self.root / "sub").mkdir(parents=True)
        (self.root / "sub" / "file").write_text("inside")
        (folder / "secret").write_text(SECRET)
        (self.root / "out").symlink_to("..")
        (self.root / "sub" / "out").symlink_to(folder)
        self.store = ChunkStore(folder / "store")
        self.tree = Tree(self.root)
        self.tree.scan()
        self.placer = Placer(self.tree, self.store, durable=False)

    def outside(self) -> dict[str, object]:
        found = contents(self.folder)
        return {name: it for name, it in found.items() if not name.startswith(("root/", "store"))}


@pytest.fixture
def jail(tmp_path: Path) -> Jail:
    return Jail(tmp_path)


components = st.one_of(
    st.sampled_from([b"..", b".", b"", b"out", b"sub", b"file", b"secret", b"x", b"/", b"a" * 256]),
    st.binary(max_size=6),
)
paths = st.lists(components, max_size=5).map(b"/".join)
kinds = st.sampled_from([FILE, FOLDER, LINK, "z"])


@given(path=paths, target=paths, kind=kinds, old=st.sampled_from([b"", b"d", b"?", b"lx"]))
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_changes_stay_inside(jail: Jail, path: bytes, target: bytes, kind: str, old: bytes) -> None:
    before = jail.outside()
    pack = jail.store.put_chunk(b"content")
    digest = target if kind == LINK else digest_of(b"content")
    entry = Entry(path, kind, 7, 1, False, digest)
    jail.placer.apply(
        [
            Change(path, old, entry, Place(pack, 0)),
            Change(path, old),
            Change(b"sub/file", jail.tree.now(b"sub/file"), to=path),
            Change(path, old, to=target),
            Change(b"sub/made", b"", Entry(b"sub/made", kind, 7, 1, False, digest), Place(pack, 0)),
        ]
    )
    assert jail.outside() == before
    for link in jail.root.rglob("*"):
        if link.is_symlink() and link.name != "out":
            inside = os.path.realpath(link)
            assert inside.startswith(str(jail.root)) or "out" in str(link.readlink())


@given(path=paths)
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_only_files_inside_are_staged(jail: Jail, path: bytes) -> None:
    places, _ = Stager(jail.tree).stage([Want(path, b"f" + digest_of(SECRET.encode()))])
    assert places[0].error
    with pytest.raises((OSError, SyncError)), Root(jail.root).reading(path + b"/secret"):
        pass


@given(path=st.binary(max_size=12), target=st.binary(max_size=12))
@settings(max_examples=300, deadline=None)
def test_paths_and_links_by_their_text(path: bytes, target: bytes) -> None:
    try:
        parts = names.parts(path)
    except SyncError:
        return
    assert os.path.normpath(b"/r/" + path) == b"/r/" + b"/".join(parts)
    if names.link_stays_inside(path, target):
        lead = os.path.normpath(os.path.join(b"/r", os.path.dirname(path), target))
        assert lead == b"/r" or lead.startswith(b"/r/")


def test_a_folder_that_turns_into_a_link_in_the_middle(jail: Jail) -> None:
    """Many times, while another thread swaps them."""
    target = jail.folder / "elsewhere"
    target.mkdir()
    stop = threading.Event()
    swapped: list[int] = []
    shelf, sub = jail.root / "shelf", jail.root / "sub"

    def swap() -> None:
        while not stop.is_set():
            os.rename(sub, shelf)
            with suppress(FileExistsError):  # it has been made again meanwhile
                sub.symlink_to(target)
                swapped.append(1)
                sub.unlink()
            if sub.is_dir():
                shutil.rmtree(sub, ignore_errors=True)
            with suppress(OSError):
                os.rename(shelf, sub)
            if shelf.is_dir():
                shutil.rmtree(shelf)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for number in range(300):
            path = f"sub/{number}".encode()
            data = b"%d" % number
            pack = jail.store.put_chunk(data)
            entry = Entry(path, FILE, len(data), 1, False, digest_of(data))
            jail.placer.apply([Change(path, b"", entry, Place(pack, 0))])
    finally:
        stop.set()
        thread.join()
    assert swapped
    assert list(target.iterdir()) == []


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Twins]:
    with twins(tmp_path) as it:
        yield it


@pytest.mark.parametrize(
    "path", [b"../evil", b"/etc/evil", b"a/../../evil", b"", b"a//b", b".mlinfra-tmp-1", b"a\0b"]
)
def test_a_machine_that_lists_what_it_must_not(pair: Twins, path: bytes) -> None:
    ask = pair.peer.ask

    def lie(message: object, kind: type) -> object:
        answer = ask(message, kind)  # type: ignore[arg-type]
        if isinstance(answer, Listing):
            answer.entries.append(Entry(path, FILE, 1, 1, False, digest_of(b"x")))
        return answer

    pair.peer.ask = lie  # type: ignore[method-assign]
    before = contents(pair.folder / "project")
    with pytest.raises(SyncError):
        pair.sync()
    assert contents(pair.folder / "project") == before
    assert not (pair.folder / "evil").exists()


def test_a_machine_that_sends_other_content(pair: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.write("a", "what it is", there=True)
    read = Stager.read_chunk
    with monkeypatch.context() as patch:
        patch.setattr(
            Stager, "read_chunk", lambda self, digest, **options: read(self, digest)[:-1] + b"!"
        )
        with pytest.raises(AssertionError):
            pair.sync()  # a store takes chunks by their own digest, whatever they are said to be
    assert contents(pair.here) == {}
    pair.sync()
    assert contents(pair.here) == {"a": b"what it is"}


def test_names_of_workspaces(pair: Twins) -> None:
    for name in ("..", ".", "a/b", "", "x\0", "/etc"):
        with pytest.raises(MlinfraError, match="no name of a workspace"):
            pair.files._twin(name)


def test_one_bad_path_among_many_new_files_is_refused_alone(jail: Jail) -> None:
    before = jail.outside()
    pack = jail.store.put_chunk(b"content")
    paths = [b"new/%d" % number for number in range(100)] + [b"../evil", b"sub/file/below", b"a//b"]
    changes = [
        Change(path, b"", Entry(path, FILE, 7, 1, False, digest_of(b"content")), Place(pack, 0))
        for path in paths
    ]
    problems = jail.placer.apply(changes)
    assert problems[:100] == [""] * 100
    assert all(problems[100:])
    assert len(list((jail.root / "new").iterdir())) == 100
    assert jail.outside() == before

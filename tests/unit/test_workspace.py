"""Two folders are kept alike, and nothing that anybody has changed is lost."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from twins import Twins, contents, twins

from mlinfra_sdk.errors import ChunkMissing, RequestError, StoreError, SyncError
from mlinfra_sdk.sync import messages
from mlinfra_sdk.sync.entries import CHUNK
from mlinfra_sdk.sync.placing import Placer
from mlinfra_sdk.sync.staging import Stager


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Twins]:
    with twins(tmp_path) as it:
        yield it


def test_files_go_there_and_come_back(pair: Twins) -> None:
    pair.write("data/train.csv", "a,b\n1,2\n")
    pair.write("utils.py", "x = 1\n")
    (pair.here / "empty" / "inner").mkdir(parents=True)
    assert pair.sync().sent == 2
    assert contents(pair.there) == contents(pair.here)
    pair.write("out/result.txt", "42", there=True)
    pair.write("utils.py", "x = 2\n", there=True)
    report = pair.sync()
    assert sorted(report.received) == ["out/result.txt", "utils.py"]
    assert report.warnings == []
    assert contents(pair.there) == contents(pair.here)


def test_what_has_not_changed_is_neither_read_nor_asked_for(pair: Twins) -> None:
    file = pair.write("a.txt", "content")
    os.utime(file, ns=(10**18, 10**18))
    pair.sync()
    pair.sync()  # by now the files are old enough to be believed
    asked, sent = pair.peer.asked, pair.peer.sent
    file.chmod(0)  # it could not be read by anybody but root
    file.chmod(0o644)
    pair.workspace.sync()
    assert (pair.peer.asked, pair.peer.sent) == (asked, sent)


def test_both_sides_changed(pair: Twins) -> None:
    pair.write("model.tar.gz", "old")
    pair.sync()
    pair.write("model.tar.gz", "mine")
    pair.write("model.tar.gz", "theirs", there=True)
    report = pair.sync()
    assert contents(pair.here) == contents(pair.there)
    assert (pair.here / "model.tar.gz").read_text() == "mine"
    (copy,) = [it for it in pair.here.iterdir() if "conflict" in it.name]
    assert re.fullmatch(r"model\.tar \(conflict from box [0-9 .-]+\)\.gz", copy.name)
    assert copy.read_text() == "theirs"
    assert "model.tar.gz was changed on both sides" in report.warnings[0]
    assert pair.sync().warnings == []


def test_removals(pair: Twins) -> None:
    for name in ("a", "b", "c", "d/e", "d/f", "kept/g"):
        pair.write(name, name)
    pair.sync()
    (pair.here / "a").unlink()
    (pair.there / "b").unlink()
    (pair.here / "c").unlink()
    pair.write("c", "changed", there=True)
    for file in (pair.there / "d").iterdir():
        file.unlink()
    (pair.there / "d").rmdir()
    (pair.there / "kept" / "g").unlink()
    (pair.there / "kept").rmdir()
    pair.write("kept/new", "here")
    report = pair.sync()
    assert contents(pair.here) == contents(pair.there)
    assert contents(pair.here) == {"c": b"changed", "kept": "folder", "kept/new": b"here"}
    assert sorted(report.removed) == ["b", "d", "d/e", "d/f", "kept/g"]


def test_a_package_that_is_renamed(pair: Twins) -> None:
    """Python has left its bytecode in the old one, which would be imported as an empty package."""
    pair.write("old/inner/module.py", "x = 1")
    pair.write("other.txt")
    pair.write("more.txt")
    pair.sync()
    pair.write("old/inner/__pycache__/module.cpython-311.pyc", there=True)
    pair.write("old/__pycache__/__init__.cpython-311.pyc", there=True)
    (pair.here / "old").rename(pair.here / "new")
    assert pair.sync().warnings == []
    assert contents(pair.here) == contents(pair.there)


def test_most_files_are_not_deleted_without_being_told(pair: Twins) -> None:
    for number in range(30):
        pair.write(f"{number}.txt", str(number))
    pair.sync()
    for number in range(20):
        (pair.there / f"{number}.txt").unlink()
    report = pair.sync()
    assert len(contents(pair.here)) == 30
    assert report.warnings == [
        "20 of 30 files were deleted on the machine and are kept here:"
        " `%remote sync --delete` deletes them."
    ]
    assert len(pair.sync(delete=True).removed) == 20
    assert len(contents(pair.here)) == 10


def test_a_root_that_has_been_emptied_empties_nothing(pair: Twins) -> None:
    for number in range(30):
        pair.write(f"{number}.txt", str(number))
    pair.sync()
    for file in pair.here.iterdir():
        file.unlink()
    pair.restart()
    report = pair.sync()
    assert len(contents(pair.there)) == 30
    assert "30 of 30 files were deleted here" in report.warnings[0]


def test_files_become_folders_and_folders_files(pair: Twins) -> None:
    pair.write("a", "file")
    pair.write("b/inner", "file")
    pair.write("c", "file")
    pair.write("d/inner", "file")
    pair.sync()
    (pair.here / "a").unlink()
    pair.write("a/inner/deep", "new")
    (pair.here / "b" / "inner").unlink()
    (pair.here / "b").rmdir()
    pair.write("b", "new")
    (pair.there / "c").unlink()
    pair.write("c/inner/deep", "new", there=True)
    (pair.there / "d" / "inner").unlink()
    (pair.there / "d").rmdir()
    (pair.there / "d").symlink_to("c")
    assert pair.sync().warnings == []
    assert contents(pair.here) == contents(pair.there)
    assert (pair.here / "d").readlink() == Path("c")
    assert (pair.there / "a" / "inner" / "deep").read_text() == "new"


def test_a_folder_against_a_changed_file(pair: Twins) -> None:
    pair.write("x/inner", "old")
    pair.sync()
    (pair.here / "x" / "inner").unlink()
    (pair.here / "x").rmdir()
    pair.write("x", "now a file")
    pair.write("x/new", "written by the cell", there=True)
    report = pair.sync()
    here = contents(pair.here)
    assert here == contents(pair.there)
    assert here["x"] == b"now a file"
    assert b"written by the cell" in here.values()
    assert "changed on both sides" in report.warnings[0]


NAMES = [
    "with space",
    "new\nline",
    "tab\t'quote\"",
    "üñí\N{SNOWMAN}",
    "-rf",
    "n" * 255,
    "Case",
    "case",
    "CON",
    "e\N{COMBINING ACUTE ACCENT}",
    "\N{LATIN SMALL LETTER E WITH ACUTE}",
    "back\\slash",
    "$(touch x)",
    "*?[a]",
]


def test_odd_names(pair: Twins) -> None:
    for name in NAMES:
        pair.write(name, name)
    (pair.here / os.fsdecode(b"bytes\xff\xfe")).write_text("no text")
    assert pair.sync().warnings == []
    assert contents(pair.there) == contents(pair.here)
    for name in NAMES:
        pair.write(name, name + "!", there=True)
    assert len(pair.sync().received) == len(NAMES)
    assert contents(pair.there) == contents(pair.here)


def test_conflicts_of_long_names(pair: Twins) -> None:
    names = ["n" * 251 + ".csv", "é" * 127, os.fsdecode(b"\xff" * 255)]
    for name in names:
        pair.write(name, "mine")
        pair.write(name, "theirs", there=True)
    pair.sync()
    assert contents(pair.here) == contents(pair.there)
    assert sorted(map(str, contents(pair.here).values())) == ["b'mine'"] * 3 + ["b'theirs'"] * 3
    assert any(name.endswith(").csv") for name in contents(pair.here))


def test_permissions_and_times(pair: Twins) -> None:
    script = pair.write("run.sh", "#!/bin/sh\n")
    script.chmod(0o755)
    private = pair.write("private", "1")
    private.chmod(0o600)
    os.utime(script, ns=(1_234_567_890, 1_600_000_000_123_456_789))
    pair.sync()
    there = (pair.there / "run.sh").stat()
    assert there.st_mode & 0o100
    assert there.st_mtime_ns == 1_600_000_000_123_456_789
    pair.write("private", "22", there=True)
    (pair.there / "run.sh").chmod(0o644)
    pair.sync()
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert private.read_text() == "22"
    assert not script.stat().st_mode & 0o111


def test_links(pair: Twins, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    pair.write("a/file", "x")
    (pair.here / "a" / "up").symlink_to("../a/file")
    (pair.here / "to_folder").symlink_to("a")
    (pair.here / "dangling").symlink_to("nowhere")
    (pair.here / "outside").symlink_to("../secret")
    (pair.here / "absolute").symlink_to("/etc/passwd")
    (pair.here / "tricky").symlink_to("to_folder/../../secret")
    report = pair.sync()
    assert set(contents(pair.there)) == {"a", "a/file", "a/up", "to_folder", "dangling"}
    assert len([it for it in report.warnings if "outside" in it]) == 3
    (pair.there / "to_folder").unlink()
    (pair.there / "to_folder").symlink_to("a/file")
    (pair.there / "leak").symlink_to("/etc")
    report = pair.sync()
    assert (pair.here / "to_folder").readlink() == Path("a/file")
    assert not (pair.here / "leak").exists()
    assert "leak is left out: it is a link to /etc, outside." in report.warnings


def test_special_files_and_unreadable_ones(pair: Twins) -> None:
    os.mkfifo(pair.here / "pipe")
    pair.write("fine", "x")
    pair.write("deep/" + "d/" * 120 + "x", "too deep")
    report = pair.sync()
    assert "pipe is left out: it is neither a file nor a directory." in report.warnings
    assert any("directories deep" in warning for warning in report.warnings)
    assert (pair.there / "fine").read_text() == "x"


def test_a_file_that_cannot_be_read_is_named_and_not_taken_for_deleted(pair: Twins) -> None:
    pair.write("a", "1")
    pair.write("folder/b", "1")
    pair.sync()
    (pair.here / "a").unlink()
    os.mkfifo(pair.here / "a")  # as good as unreadable, also for root
    pair.write("folder/CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55")
    report = pair.sync()
    assert (pair.there / "a").read_text() == "1"
    assert (pair.there / "folder" / "b").read_text() == "1"
    assert "a is left out" in report.warnings[0]


def test_ignore_rules(pair: Twins) -> None:
    for name in (
        ".git/config",
        "venv/pyvenv.cfg",
        "env2/pyvenv.cfg",
        "env2/lib/x.py",
        "pkg/__pycache__/m.pyc",
        "node_modules/m/index.js",
        ".ipynb_checkpoints/a.ipynb",
        "a.log",
        "logs/a.txt",
        "logs/keep.txt",
        "sub/b.tmp",
        "sub/deep/b.tmp",
        "sub/deep/keep.tmp",
        "kept.txt",
        "data/big.bin",
        "mine/only.txt",
    ):
        pair.write(name, name)
    pair.write(".gitignore", "*.log\nlogs/*\n!logs/keep.txt\ndata/\n[z-a]\n")
    pair.write("sub/.gitignore", "*.tmp\n")
    pair.write("sub/deep/.gitignore", "!keep.tmp\n")
    pair.write(".mlignore", "!data/\nmine/\n")
    report = pair.sync()
    files = {name for name, content in contents(pair.there).items() if content != "folder"}
    assert files == {
        ".gitignore",
        ".mlignore",
        "kept.txt",
        "logs/keep.txt",
        "data/big.bin",
        "sub/.gitignore",
        "sub/deep/.gitignore",
        "sub/deep/keep.tmp",
    }
    assert report.warnings == [
        "The line '[z-a]' of .gitignore is no pattern of .gitignore; it is left out."
    ]
    pair.write("x.log", "there", there=True)
    pair.write(".git/hooks/pre-commit", "evil", there=True)
    pair.write("sub/x.tmp", "there", there=True)
    assert pair.sync().received == []
    assert not (pair.here / ".git" / "hooks").exists()


def test_rules_in_a_file_with_a_byte_order_mark(pair: Twins) -> None:
    (pair.here / ".gitignore").write_bytes(b"\xef\xbb\xbfsecret.txt\n")
    pair.write("secret.txt")
    pair.sync()
    assert sorted(contents(pair.there)) == [".gitignore"]


def test_rules_that_change_delete_nothing(pair: Twins) -> None:
    pair.write("data/a", "1")
    pair.write("b", "1")
    pair.sync()
    pair.write(".gitignore", "data/\n")
    pair.sync()
    assert (pair.there / "data" / "a").read_text() == "1"
    pair.write(".gitignore", "b\n", there=True)  # a cell's own rules come here first
    pair.sync()
    pair.sync()
    for side in (pair.here, pair.there):
        assert (side / "b").exists() and (side / "data" / "a").exists()


def test_large_files_stay_there_until_they_are_fetched(pair: Twins) -> None:
    pair.workspace.eager_limit = 1000
    pair.write("runs/model.bin", "m" * 5000, there=True)
    pair.write("runs/small", "s", there=True)
    report = pair.sync()
    assert report.received == ["runs/small"]
    assert report.listed == [("runs/model.bin", 5000)]
    assert "Stays on the machine: runs/model.bin (5 kB)" in report.warnings[0]
    assert pair.sync().listed == []  # it has been said
    assert not (pair.here / "runs" / "model.bin").exists()
    assert pair.sync(fetch={b"runs"}).received == ["runs/model.bin"]
    assert (pair.here / "runs" / "model.bin").read_text() == "m" * 5000
    pair.write("runs/model.bin", "n" * 5000, there=True)
    pair.write("runs/model.bin", "mine")
    pair.sync()
    assert (pair.here / "runs" / "model.bin").read_text() == "mine"
    assert (pair.there / "runs" / "model.bin").read_text() == "mine"
    assert len([it for it in contents(pair.there).values() if it == b"n" * 5000]) == 1


def test_only_changed_pieces_of_a_large_file_are_sent(pair: Twins) -> None:
    content = bytearray(os.urandom(5 * CHUNK + 100))
    file = pair.here / "big.bin"
    file.write_bytes(content)
    pair.sync()
    first = pair.peer.sent
    assert first < len(content) + 1000
    content[2 * CHUNK + 5] ^= 1
    file.write_bytes(content)
    pair.sync()
    assert pair.peer.sent - first == CHUNK
    assert (pair.there / "big.bin").read_bytes() == content
    os.rename(file, pair.here / "renamed.bin")
    pair.sync()
    assert pair.peer.sent - first == CHUNK
    assert (pair.there / "renamed.bin").read_bytes() == content
    content[4 * CHUNK] ^= 1
    (pair.there / "renamed.bin").write_bytes(content + b"more")
    pair.sync()
    assert pair.peer.received == CHUNK + 104
    assert contents(pair.here) == contents(pair.there)
    left = [path for path in pair.folder.rglob("chunks/*/*") if path.is_file()]
    assert left == []


def test_holes(pair: Twins) -> None:
    file = pair.here / "sparse"
    with file.open("wb") as out:
        out.truncate(1 << 30)
        out.seek(500 << 20)
        out.write(b"data")
    pair.sync()
    there = (pair.there / "sparse").stat()
    assert (there.st_size, pair.peer.sent) == (1 << 30, CHUNK)
    assert there.st_blocks * 512 < 8 * CHUNK


def test_a_file_that_changes_while_it_is_sent(pair: Twins) -> None:
    file = pair.write("a", "1" * 3000)
    pair.write("b", "fine")
    changed = []

    def change(message: messages.AnyMessage) -> None:
        if isinstance(message, messages.Apply) and not changed:
            changed.append(pair.write("a", "theirs", there=True))
            file.write_text("2" * 3000)

    pair.peer.before = change
    pair.sync()
    assert contents(pair.here) == contents(pair.there)
    assert (pair.there / "b").read_text() == "fine"
    assert sorted(map(str, contents(pair.here).values())) == sorted(
        map(str, [b"2" * 3000, b"fine", b"theirs"])
    )


@pytest.mark.parametrize("count", [1, 100])
@pytest.mark.parametrize("size", [3000, 3 * CHUNK])
def test_a_file_that_appears_where_one_is_being_put(
    pair: Twins, monkeypatch: pytest.MonkeyPatch, size: int, count: int
) -> None:
    for number in range(count):
        pair.write(f"{number}.txt", "mine", there=True)
    pair.write("7.txt", "m" * size, there=True)
    fill = Placer._fill

    def while_the_user_writes(placer: Placer, fd: int, change: messages.Change, *rest: Any) -> None:
        if change.path == b"7.txt":
            monkeypatch.undo()
            pair.write("7.txt", "his own")
        fill(placer, fd, change, *rest)

    monkeypatch.setattr(Placer, "_fill", while_the_user_writes)
    report = pair.sync()
    assert contents(pair.here) == contents(pair.there)
    assert (pair.here / "7.txt").read_text() == "his own"
    assert "was changed on both sides" in report.warnings[0]
    assert len(contents(pair.here)) == max(2, count) + 1
    assert not list(pair.folder.rglob(".mlinfra-tmp-*"))


def test_two_processes_of_one_folder(pair: Twins) -> None:
    """What one has brought to the machine is not taken for deleted there by the other."""
    pair.write("a.txt", "a")
    first = pair.workspace
    first.sync()
    pair.restart()
    pair.write("typed.md", "by hand")
    pair.write("made.csv", "there", there=True)
    pair.sync()
    assert first.sync().removed == []
    assert (pair.here / "typed.md").read_text() == "by hand"
    assert (pair.here / "made.csv").read_text() == "there"


def test_a_file_that_is_written_to_while_it_comes_holds_nothing_up(
    pair: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.sync()
    log = pair.write("log.bin", there=True)
    log.write_bytes(os.urandom(2 * CHUNK + 100))
    pair.write("result.txt", "42", there=True)
    pair.write("z.bin", there=True).write_bytes(os.urandom(3 * CHUNK))
    download = pair.peer.download

    def while_it_is_written(digests: list[bytes], *rest: Any) -> None:
        log.write_bytes(os.urandom(2 * CHUNK + 100))
        lost = []
        for digest in digests:
            try:
                download([digest], *rest)
            except ChunkMissing as error:
                lost.append(error)
        if lost:
            raise lost[0]

    pair.peer.download = while_it_is_written  # type: ignore[method-assign]
    report = pair.sync()
    assert "log.bin could not follow: it is being written" in report.warnings[0]
    assert (pair.here / "result.txt").read_text() == "42"
    assert (pair.here / "z.bin").exists() and not (pair.here / "log.bin").exists()
    pair.peer.download = download  # type: ignore[method-assign]
    pair.sync()
    assert contents(pair.here) == contents(pair.there)


def test_what_fails_again_is_said_again(pair: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    file = pair.write("big.bin")
    read = Stager.read_chunk

    def while_it_is_written(stager: Stager, digest: bytes, *, verify: bool = True) -> bytes:
        file.write_bytes(os.urandom(2 * CHUNK))
        return read(stager, digest, verify=verify)

    for fails in (True, False, True):
        file.write_bytes(os.urandom(2 * CHUNK))
        with monkeypatch.context() as patch:
            if fails:
                patch.setattr(Stager, "read_chunk", while_it_is_written)
            warnings = pair.sync().warnings
        assert bool(warnings) == fails


def test_the_size_guard_names_the_biggest(pair: Twins) -> None:
    pair.workspace.sync_limit = 10_000
    pair.write("data/x.bin", "x" * 9000)
    pair.write("models/y.bin", "y" * 5000)
    with pytest.raises(RequestError) as caught:
        pair.sync()
    assert caught.value.message == (
        "14 kB of files would be sent (sync_limit is 10 kB). Most of it: data/ 9 kB, models/ 5 kB."
    )
    assert "/data/" in caught.value.hint and "sync_limit=1MB" in caught.value.hint
    assert contents(pair.there) == {} if pair.there.exists() else True
    pair.write(".mlignore", "/data/\n")
    pair.sync()
    assert "models/y.bin" in contents(pair.there)


def test_roots_that_nobody_means(pair: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(pair.here))
    with pytest.raises(RequestError, match="your home directory"):
        pair.restart()
    monkeypatch.setenv("HOME", str(pair.here / "deep" / "home"))
    with pytest.raises(RequestError, match="sync=no"):
        pair.restart()


def test_another_process_and_another_agent_go_on(pair: Twins) -> None:
    for number in range(5):
        pair.write(f"{number}", "x")
    pair.sync()
    pair.restart_agent()
    pair.restart()
    (pair.there / "1").unlink()
    pair.write("2", "changed")
    report = pair.sync()
    assert (report.removed, report.sent) == (["1"], 1)
    assert contents(pair.here) == contents(pair.there)


def test_state_is_private(pair: Twins) -> None:
    pair.write("a", "x")
    pair.sync()
    files = [path for path in (pair.folder / "state").rglob("*") if path.is_file()]
    assert len(files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE((pair.folder / "state").stat().st_mode) == 0o700
    pair.workspace.forget()
    assert not list((pair.folder / "state").glob("*.base"))


def test_preview_moves_nothing(pair: Twins) -> None:
    pair.write("a", "1")
    pair.write("gone", "1")
    pair.sync()
    (pair.there / "gone").unlink()
    pair.write("new", "12")
    pair.write("back", "123", there=True)
    before = contents(pair.here), contents(pair.there)
    rows = {(it.what, it.path, it.size) for it in pair.workspace.preview()}
    assert rows == {("send", "new", 2), ("fetch", "back", 3), ("delete here", "gone", 0)}
    assert (contents(pair.here), contents(pair.there)) == before


def test_interrupted_and_continued(pair: Twins) -> None:
    for number in range(3000):
        pair.write(f"d{number % 7}/{number}", str(number))
    pair.write("big", "")
    (pair.here / "big").write_bytes(os.urandom(40 * CHUNK))
    count = 0

    def interrupt(message: messages.AnyMessage) -> None:
        nonlocal count
        count += isinstance(message, messages.Apply)
        if count == 2:
            raise KeyboardInterrupt

    pair.peer.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        pair.sync()
    assert 0 < len(contents(pair.there)) < 3000
    sent = pair.peer.sent
    pair.peer.before = lambda message: None
    pair.restart()
    pair.sync()
    assert contents(pair.here) == contents(pair.there)
    assert pair.peer.sent < sent + 42 * CHUNK
    for side in (pair.here, pair.there):
        assert not list(side.rglob(".mlinfra-tmp-*"))


def test_remains_of_a_killed_transfer_are_removed(pair: Twins) -> None:
    pair.write("a/.mlinfra-tmp-0123", "half")
    pair.write("b/.mlinfra-tmp-4567", "half", there=True)
    pair.sync()
    assert contents(pair.here) == contents(pair.there) == {"a": "folder", "b": "folder"}


def test_a_damaged_record_is_as_good_as_none(pair: Twins) -> None:
    pair.write("a", "1")
    pair.sync()
    for file in (pair.folder / "state").iterdir():
        file.write_bytes(b"\xff damaged")
    pair.restart()
    pair.write("b", "1", there=True)
    assert pair.sync().received == ["b"]


def test_a_workspace_that_vanishes(pair: Twins) -> None:
    pair.here.rmdir()
    with pytest.raises((RequestError, SyncError)):
        pair.sync()


def test_pieces_come_from_a_file_in_another_folder(tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    with twins(tmp_path) as t:
        t.write("a/first/one.bin")
        (t.here / "a/first/one.bin").write_bytes(content)
        t.sync()
        sent = t.peer.sent
        (t.here / "b").mkdir()
        (t.here / "b/two.bin").write_bytes(content + b"more")
        report = t.sync()
        assert not report.warnings
        assert t.peer.sent - sent < 1 << 20
        assert contents(t.there) == contents(t.here)
        assert not [path for path in t.there.rglob(".*")]


def test_of_a_large_file_only_what_has_changed_is_sent_and_read(pair: Twins) -> None:
    content = bytearray(os.urandom(5 << 20)) + b"end"
    file, twin = pair.here / "big.bin", pair.there / "big.bin"
    file.write_bytes(content)
    pair.sync()
    for position in (0, 3 << 20, len(content) - 1):
        sent = pair.peer.sent
        content[position] ^= 1
        file.write_bytes(content)
        assert pair.sync().sent == 1
        assert pair.peer.sent - sent <= CHUNK
        assert twin.read_bytes() == content
    file.write_bytes(content[: 3 << 20])
    pair.sync()
    assert twin.read_bytes() == content[: 3 << 20]


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[str], None]]:
    """A file system of 6 MiB in the folder; gives what changes its size."""

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        return subprocess.run(command, capture_output=True).returncode == 0

    folder.mkdir()
    if not mount("size=6m"):
        pytest.skip("this user may not mount a small file system")
    try:
        yield lambda size: mount(f"remount,size={size}") or pytest.fail("remount")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("full", ["machine", "project"])
def test_a_disk_that_is_full_in_the_middle(tmp_path: Path, full: str) -> None:
    there = full == "project"
    with small_disk(tmp_path / full) as resize, twins(tmp_path) as pair:
        pair.write("seen.txt", "once")
        pair.sync()
        for number in range(8):
            file = pair.write(f"{number}.bin", there=there)
            file.write_bytes(os.urandom(1_300_000 if number % 2 else 900_000))
        with pytest.raises((SyncError, StoreError), match=r"full|No space left") as caught:
            pair.sync()
        assert "Free some" in caught.value.hint
        room, source = (pair.here, pair.there) if there else (pair.there, pair.here)
        for file in room.iterdir():
            assert file.read_bytes() == (source / file.name).read_bytes()
        resize("64m")
        pair.sync()
        assert contents(pair.here) == contents(pair.there)
        assert len(contents(pair.here)) == 9


@pytest.mark.parametrize("full", ["machine", "project"])
def test_a_disk_that_is_full_among_many_small_files(tmp_path: Path, full: str) -> None:
    there = full == "project"
    with small_disk(tmp_path / full) as resize, twins(tmp_path) as pair:
        for number in range(200):
            file = pair.write(f"{number % 7}/{number}.bin", there=there)
            file.write_bytes(os.urandom(20_000 if there else 50_000))
        if there:
            resize("3m")
        with pytest.raises((SyncError, StoreError), match=r"full|No space left"):
            pair.sync()
        room, source = (pair.here, pair.there) if there else (pair.there, pair.here)
        for path in room.rglob("*.bin"):
            assert path.read_bytes() == (source / path.relative_to(room)).read_bytes()
        assert not list(room.rglob(".mlinfra-tmp-*"))
        resize("64m")
        pair.sync()
        assert contents(pair.here) == contents(pair.there)
        assert len(list(room.rglob("*.bin"))) == 200

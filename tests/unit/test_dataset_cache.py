"""The cache of datasets, and local folders as datasets."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlinfra_sdk.datasets import cache as cache_module
from mlinfra_sdk.datasets.cache import Cache, Entry, key_of, version_of
from mlinfra_sdk.datasets.local import Folder
from mlinfra_sdk.errors import RequestError, StoreError

KEY = key_of("somewhere")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def listed(files: dict[str, bytes], marks: str = "") -> tuple[str, list[Entry]]:
    """A version of these files and their entries."""
    entries = [Entry(path, len(data), f"{path}{marks}") for path, data in files.items()]
    return version_of(entries), entries


def write(cache: Cache, version: str, entries: list[Entry], files: dict[str, bytes]) -> list[str]:
    """Write what is missing; gives the paths."""
    missing = cache.begin(KEY, version, entries)
    for entry in missing:
        path = cache.part(KEY, version) / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[entry.path])
    return [entry.path for entry in missing]


def bring(cache: Cache, files: dict[str, bytes], marks: str = "") -> tuple[str, list[str]]:
    """Have this version; gives its name, and the paths of what was missing."""
    version, entries = listed(files, marks)
    missing = write(cache, version, entries, files)
    cache.finish(KEY, version, entries)
    assert cache.has(KEY, version)
    return version, missing


def test_what_was_written_to_is_replaced_also_if_its_size_is_the_same(cache: Cache) -> None:
    files = {"a": b"right", "b/c": b"right"}
    version, _ = bring(cache, files)
    path = cache.version(KEY, version) / "a"
    path.chmod(0o600)
    path.write_bytes(b"wrong")
    assert not cache.has(KEY, version)
    assert bring(cache, files) == (version, ["a"])
    assert path.read_bytes() == b"right"


def test_nothing_is_right_when_the_manifest_is_damaged(cache: Cache) -> None:
    version, _ = bring(cache, {"a": b"right"})
    folder = cache.version(KEY, version)
    folder.with_name(f"{version}.manifest").write_bytes(b"?")
    assert not cache.has(KEY, version)
    assert bring(cache, {"a": b"right"}) == (version, ["a"])


def test_two_that_bring_the_same_version_at_once(cache: Cache) -> None:
    files = {"a": b"1", "b": b"2"}
    version, entries = listed(files)
    assert write(cache, version, entries, files) == ["a", "b"]
    cache.finish(KEY, version, entries)
    inode = cache.version(KEY, version).stat().st_ino
    cache.finish(KEY, version, entries)
    write(cache, version, entries, files)
    cache.finish(KEY, version, entries)
    assert cache.version(KEY, version).stat().st_ino == inode, "it may be in use"
    assert not cache.part(KEY, version).exists()


def test_an_empty_dataset(cache: Cache) -> None:
    version, entries = listed({})
    folder = cache.finish(KEY, version, entries)
    assert cache.has(KEY, version) and list(folder.iterdir()) == []


def test_only_the_files_that_are_asked_for_are_looked_at(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {str(number): b"x" for number in range(100)}
    version, _ = bring(cache, files)
    looked: list[Path] = []
    look = Path.stat

    def stat(path: Path, **options: Any) -> os.stat_result:
        looked.append(path)
        return look(path, **options)

    other, entries = listed(files | {"new": b"y"})
    monkeypatch.setattr(Path, "stat", stat)
    assert cache.begin(KEY, other, entries[-3:]) == entries[-1:]
    older = cache.version(KEY, version)
    assert {path.name for path in looked if path.parent == older} == {"98", "99"}
    assert cache.older(KEY, {"7", "new"}) == {"7": older / "7"}


def test_room_is_made_by_two_processes_at_once(tmp_path: Path) -> None:
    for number in range(40):
        bring(Cache(tmp_path), {"f": b"x"}, str(number))

    def evict(_: int) -> None:
        with pytest.raises(StoreError, match="does not fit"):
            Cache(tmp_path).evict(1 << 60)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(evict, range(4)))
    assert list(tmp_path.glob("*/*/*")) == []


def test_room_is_made_by_what_was_left_behind_first(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, _ = bring(cache, {"f": b"x"})
    other, entries = listed({"f": b"y"}, "other")
    cache.begin(KEY, other, entries)
    gone = cache.version(KEY, version).with_name("x.1.gone")
    gone.mkdir()

    def evict(*rooms: float) -> None:
        room = iter(rooms)
        monkeypatch.setattr(cache, "_room", lambda least_free: next(room))
        cache.evict(1)

    evict(0, 1, 1)
    assert not gone.exists() and cache.part(KEY, other).exists()
    monkeypatch.setattr(cache_module, "_ABANDONED_S", -1.0)
    evict(0, 1, 1)
    assert not cache.part(KEY, other).exists()
    assert cache.has(KEY, version)


# Local folders


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "set").mkdir()
    return Folder(tmp_path / "set", tmp_path / "index")


def test_another_file_with_the_same_size_and_time_is_read_again(
    folder: Folder, tmp_path: Path
) -> None:
    path = tmp_path / "set/labels.csv"
    path.write_text("old")
    os.utime(path, (1, 1))
    before = folder.scan()
    assert folder.scan() == before
    time.sleep(0.05)  # the clock of file systems ticks
    path.write_text("new")
    os.utime(path, (1, 1))
    assert folder.scan() != before


def test_a_folder_that_is_scanned_by_two_at_once(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "set/a").touch()
    with ThreadPoolExecutor(8) as pool:
        scanned = list(pool.map(lambda _: folder.scan(), range(200)))
    assert scanned == [folder.scan()] * 200


def test_a_name_that_is_not_utf_8(folder: Folder, tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/set/caf\xe9")).touch()
    with pytest.raises(RequestError, match=r"caf\\xe9.* not UTF-8"):
        folder.scan()


def test_what_may_not_be_read_is_not_left_out_silently(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set/open").mkdir()
    (tmp_path / "set/open/a").touch()
    (tmp_path / "set/linked").symlink_to("open")
    (tmp_path / "set/broken").symlink_to("nowhere")
    assert [file.path for file in folder.scan()] == ["open/a"]
    scan, look = os.scandir, os.stat

    def refused(path: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", lambda it: refused(it) if it.endswith("open") else scan(it))
    with pytest.raises(RequestError, match="set/open cannot be read"):
        folder.scan()
    monkeypatch.undo()
    monkeypatch.setattr(
        os, "stat", lambda it, **k: refused(it) if str(it).endswith("/a") else look(it, **k)
    )
    with pytest.raises(RequestError, match="set/open/a cannot be read"):
        folder.scan()

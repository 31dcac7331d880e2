"""File operations that cannot leave one directory.

Every component of a path is opened on its own and without following links (``O_NOFOLLOW``,
relative to the directory before it), so neither ``..`` nor a link that is put there in the middle
of an operation leads outside.
"""

from __future__ import annotations

import errno
import os
import posixpath
import secrets
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from . import names

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _Held(threading.local):
    """The directory that a thread keeps open: its descriptor, and its path up to the last slash."""

    on = False
    fd: int | None = None
    folder: bytes | None = None


class Root:
    """One directory, by its path; it must exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held = _Held()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """In this thread, keep the directory open that was used last: many files of one directory
        then cost the way to it only once. The descriptor of a directory is good until another one
        is asked for."""
        self._held.on = True
        try:
            yield
        finally:
            self._held.on = False
            self._release()

    def _release(self) -> None:
        fd, self._held.fd, self._held.folder = self._held.fd, None, None
        if fd is not None:
            os.close(fd)

    def at(self, path: bytes, *, create: bool = False) -> tuple[int, bytes]:
        """As :meth:`parent`, while :meth:`holding`."""
        held = self._held
        name = path[path.rfind(b"/") + 1 :]
        folder = path[: len(path) - len(name)]
        if held.fd is None or held.folder != folder:
            *folders, name = names.parts(path)
            self._release()
            held.fd = self._walk(folders, create)
            held.folder = folder
        else:
            names.check(path, name)
        return held.fd, name

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor of the directory itself."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def parent(self, path: bytes, *, create: bool = False) -> Iterator[tuple[int, bytes]]:
        """A descriptor of the directory that ``path`` lies in, and its last component.

        Raises OSError where a component is missing (unless ``create``), a link, or no directory.
        """
        if self._held.on:
            yield self.at(path, create=create)
            return
        *folders, name = names.parts(path)
        fd = self._walk(folders, create)
        try:
            yield fd, name
        finally:
            os.close(fd)

    def _walk(self, folders: list[bytes], create: bool) -> int:
        """A descriptor of the directory at the end of these names."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for folder in folders:
                if create:
                    with suppress(FileExistsError):
                        os.mkdir(folder, dir_fd=fd)
                inner = os.open(folder, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = inner
        except BaseException:
            os.close(fd)
            raise
        return fd

    def status(self, path: bytes) -> os.stat_result | None:
        """Of what lies at ``path`` itself; None if nothing does."""
        try:
            if self._held.on:
                folder, name = self.at(path)
                return os.stat(name, dir_fd=folder, follow_symlinks=False)
            with self.parent(path) as (folder, name):
                return os.stat(name, dir_fd=folder, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK):  # a link on the way
                return None
            raise

    @contextmanager
    def reading(self, path: bytes) -> Iterator[int]:
        """A descriptor of a regular file. Opening does not wait for a writer of a fifo."""
        fd = self.open(path)
        try:
            yield fd
        finally:
            os.close(fd)

    def open(self, path: bytes) -> int:
        """As :meth:`reading`; the caller closes it."""
        if self._held.on:
            folder, name = self.at(path)
            return open_file(name, folder)
        with self.parent(path) as (folder, name):
            return open_file(name, folder)

    def target(self, path: bytes) -> bytes:
        """Where a symbolic link leads."""
        with self.parent(path) as (folder, name):
            return os.readlink(name, dir_fd=folder)

    def make_directory(self, path: bytes) -> None:
        """Make a directory and those above it; one that is there already is fine."""
        with self.parent(path, create=True) as (folder, name):
            with suppress(FileExistsError):
                os.mkdir(name, dir_fd=folder)
            os.close(os.open(name, _DIRECTORY, dir_fd=folder))

    def make_link(self, path: bytes, target: bytes, *, replace: bool) -> None:
        """Put a symbolic link there, or in the place of what is there. Raises FileExistsError."""
        with self.parent(path, create=True) as (folder, name):
            if not replace:
                os.symlink(target, name, dir_fd=folder)
                return
            temporary = names.TEMPORARY + secrets.token_hex(8).encode()
            os.symlink(target, temporary, dir_fd=folder)
            try:
                os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                os.unlink(temporary, dir_fd=folder)
                raise

    def remove(self, path: bytes) -> None:
        """Remove a file, a link, or a directory with nothing in it but bytecode of Python's."""
        with self.parent(path) as (folder, name):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                try:
                    os.rmdir(name, dir_fd=folder)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    _remove_bytecode(folder, name)
                    os.rmdir(name, dir_fd=folder)
            else:
                os.unlink(name, dir_fd=folder)
        self._release()  # it may be the directory that is held

    def move(self, path: bytes, to: bytes) -> None:
        """Rename within one directory; ``to`` must be free. Raises FileExistsError."""
        with self.parent(path) as (folder, name):
            new = names.parts(to)[-1]
            if posixpath.dirname(path) != posixpath.dirname(to):
                raise OSError(errno.EXDEV, "not in the same directory")
            with suppress(FileNotFoundError):
                os.stat(new, dir_fd=folder, follow_symlinks=False)
                raise FileExistsError(errno.EEXIST, "a file of the new name exists")
            os.rename(name, new, src_dir_fd=folder, dst_dir_fd=folder)
        self._release()


def _remove_bytecode(folder: int, name: bytes) -> None:
    """Of a package whose source is gone; it would keep the package importable, though empty."""
    with suppress(FileNotFoundError, NotADirectoryError), ExitStack() as stack:
        for component in (name, b"__pycache__"):
            outer, folder = folder, os.open(component, _DIRECTORY, dir_fd=folder)
            stack.callback(os.close, folder)
        names_there = os.listdir(folder)
        if all(it.endswith(".pyc") for it in names_there):
            for it in names_there:
                os.unlink(it, dir_fd=folder)
            os.rmdir(b"__pycache__", dir_fd=outer)


def open_file(name: bytes, folder: int) -> int:
    """A descriptor of a regular file in an opened directory."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=folder)

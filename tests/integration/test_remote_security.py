"""What lies on disk is for this user alone, nothing listens on the network, secrets stay secret."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from live import Notebook, opened


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    """A notebook that has used every part of a machine, with a umask that hides nothing."""
    with opened(tmp_path_factory.mktemp("notebook")) as notebook:
        notebook.run("import os, numpy; os.umask(0); big = numpy.random.bytes(5_000_000)")
        notebook.remote("print(len(big))\nother = big[::-1]")
        notebook.remote("import time; print('done')")
        yield notebook


def everything(folder: Path) -> Iterator[Path]:
    yield folder
    for path in folder.rglob("*"):
        if not path.is_symlink():
            yield path


def test_files_are_for_this_user_alone(busy: Notebook) -> None:
    # A closed directory closes all that lies in it; state files are closed by themselves too.
    chunks = busy.home / "store" / "chunks"
    modes = {
        str(path): oct(stat.S_IMODE(path.stat().st_mode))
        for path in everything(busy.home)
        if path != chunks and chunks not in path.parents
    }
    assert {path: mode for path, mode in modes.items() if not mode.endswith("00")} == {}
    (sockets,) = busy.temporary.glob("mlinfra-*")
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    assert stat.S_IMODE(busy.home.stat().st_mode) == 0o700
    (machine,) = busy.machines()
    assert stat.S_IMODE(machine.stat().st_mode) == 0o700
    assert stat.S_IMODE((machine / "agent.sock").stat().st_mode) == 0o600


def test_nothing_listens_on_the_network(busy: Notebook) -> None:
    (agent,), (worker,) = busy.agents(), busy.workers()
    for process in (agent, worker):
        listening = [
            connection.laddr
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN or connection.type.name == "SOCK_DGRAM"
        ]
        assert listening == []


def test_the_secret_is_nowhere_but_in_its_file(busy: Notebook) -> None:
    from mlinfra_sdk.worker.folder import load_config

    (machine,) = busy.machines()
    secret = load_config(machine).secret
    assert len(secret) == 32
    texts = {secret.hex(), secret.hex().upper(), repr(secret)[2:-1]}
    for process in busy.processes():
        exposed = [*process.cmdline(), *process.environ().values()]
        assert not any(text in value for text in texts for value in exposed)
    holding = [
        path.name
        for path in everything(busy.home)
        if path.is_file()
        and any(form in path.read_bytes() for form in (secret, *(t.encode() for t in texts)))
    ]
    assert holding == ["config"]


def test_another_secret_opens_nothing(busy: Notebook) -> None:
    import anyio

    from mlinfra_sdk.errors import AuthenticationError
    from mlinfra_sdk.link.client import connect
    from mlinfra_sdk.link.unix import connect_unix

    (machine,) = busy.machines()

    async def intrude() -> None:
        async with connect(lambda: connect_unix(machine / "agent.sock"), b"x" * 32):
            pass

    with pytest.raises(AuthenticationError):
        anyio.run(intrude)
    assert busy.remote("1 + 1").result == "2"

"""Programs with binary stdin and stdout on a real Jupyter Server, and what its refusals say."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator

import anyio
import psutil
import pytest
from jupyter_servers import Cuttable, JupyterServer, jupyter_server
from live import until
from processes import free_port

from mlinfra_sdk.credentials import take_apart
from mlinfra_sdk.errors import LinkError, MlinfraError, ProviderError, RequestError
from mlinfra_sdk.providers.jupyter.process import KernelProcess, open_process
from mlinfra_sdk.providers.jupyter.server import KernelGone, Server, server_url

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    with jupyter_server(tmp_path_factory.mktemp("jupyter")) as server:
        yield server


def client(url: str, token: str) -> Server:
    async def current() -> str:
        return token

    return Server(url, current)


@pytest.fixture(scope="module")
async def kernel(live: JupyterServer) -> str:
    answer = await client(live.url, live.token).ask("POST", "api/kernels", {})
    return str(answer["id"])


async def run(live: JupyterServer, kernel: str, code: str) -> KernelProcess:
    return await open_process(client(live.url, live.token), kernel, [sys.executable, "-c", code])


async def everything(process: KernelProcess) -> bytes:
    space, found = bytearray(1 << 20), bytearray()
    while count := await process.receive_into(memoryview(space)):
        found += space[:count]
    return bytes(found)


async def test_bytes_both_ways(live: JupyterServer, kernel: str) -> None:
    """All of them, whatever their values and sizes, while both directions are full."""
    data = os.urandom(24 << 20)
    process = await open_process(client(live.url, live.token), kernel, ["cat"])
    received = hashlib.sha256()

    async def read() -> None:
        space, left = bytearray(300_000), len(data)
        while left:
            count = await process.receive_into(memoryview(space))
            received.update(space[:count])
            left -= count

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            for start in range(0, len(data), 3 << 20):
                piece = data[start : start + (3 << 20)]
                await process.send([piece[:1], b"", memoryview(piece)[1:7], piece[7:]])
    assert received.digest() == hashlib.sha256(data).digest()
    await process.aclose()


async def test_many_small_outputs_pass_the_servers_limit(live: JupyterServer, kernel: str) -> None:
    """It drops what a kernel publishes faster than a thousand messages a second."""
    process = await run(
        live, kernel, "import os\nfor n in range(20_000): os.write(1, b'%d\\n' % n)"
    )
    with anyio.fail_after(60):
        assert await everything(process) == b"".join(b"%d\n" % n for n in range(20_000))
    await process.aclose()


async def test_a_reader_that_waits_holds_the_program_back(live: JupyterServer, kernel: str) -> None:
    code = "import sys\nfor n in range(64): sys.stdout.buffer.write(bytes([n]) * (1 << 20))"
    process = await run(live, kernel, code)
    with anyio.fail_after(60):
        space = bytearray(1)
        assert await process.receive_into(memoryview(space)) == 1
        assert process.returncode is None  # most of it waits there
        rest = await everything(process)
    assert bytes(space) + rest == b"".join(bytes([n]) * (1 << 20) for n in range(64))
    await process.aclose()


async def test_what_a_program_complains_of(live: JupyterServer, kernel: str) -> None:
    process = await run(live, kernel, "import sys; sys.exit('it is Tuesday')")
    with anyio.fail_after(30):
        assert await everything(process) == b""
    assert process.returncode == 1
    assert process.complaint() == "it is Tuesday"
    with pytest.raises(LinkError, match="it is Tuesday"):
        await process.send([b"more"])
    await process.aclose()


async def test_a_program_that_is_not_there(live: JupyterServer, kernel: str) -> None:
    process = await open_process(client(live.url, live.token), kernel, ["no-such-program"])
    with pytest.raises(LinkError, match="no-such-program"):
        await everything(process)
    await process.aclose()


SLEEPER = "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"


async def started(process: KernelProcess) -> int:
    space = bytearray(100)
    count = await process.receive_into(memoryview(space))
    return int(space[:count])


async def test_closing_ends_the_program(live: JupyterServer, kernel: str) -> None:
    process = await run(live, kernel, SLEEPER)
    pid = await started(process)
    await process.aclose()
    await process.aclose()
    until(lambda: not psutil.pid_exists(pid), "the program's end")


async def test_a_cut(live: JupyterServer, kernel: str) -> None:
    with Cuttable(live.port) as path:
        near = client(live.url.replace(str(live.port), str(path.port)), live.token)
        process = await open_process(near, kernel, [sys.executable, "-c", SLEEPER])
        pid = await started(process)
        path.cut()
        with pytest.raises(LinkError, match="broke"):
            await everything(process)
        await process.aclose()
    psutil.Process(pid).kill()


async def test_two_at_once_on_one_kernel(live: JupyterServer, kernel: str) -> None:
    first = await run(live, kernel, "print('first' * 200_000)")
    second = await run(live, kernel, "print('second' * 200_000)")
    with anyio.fail_after(60):
        assert await everything(second) == b"second" * 200_000 + b"\n"
        assert await everything(first) == b"first" * 200_000 + b"\n"
    await first.aclose()
    await second.aclose()


async def test_the_kernel_ends(live: JupyterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = client(live.url, live.token)
    kernel = (await server.ask("POST", "api/kernels", {}))["id"]
    process = await run(live, kernel, SLEEPER)
    pid = await started(process)
    await server.ask("DELETE", f"api/kernels/{kernel}")
    monkeypatch.setattr("mlinfra_sdk.providers.jupyter.process._PING_EVERY", 0.5)
    with pytest.raises(LinkError), anyio.fail_after(30):
        await everything(process)
    await process.aclose()
    with pytest.raises(KernelGone):
        await run(live, kernel, SLEEPER)
    psutil.Process(pid).kill()


# -- refusals ------------------------------------------------------------------------------------


async def test_a_wrong_token(live: JupyterServer, kernel: str) -> None:
    server = client(live.url, "wrong")
    with pytest.raises(ProviderError, match="refuses the token") as caught:
        await server.ask("GET", "api/kernels")
    with pytest.raises(ProviderError, match="refuses the token"):
        await open_process(server, kernel, ["cat"])
    assert "wrong" not in str(caught.value)


async def test_a_wrong_base_url(live: JupyterServer) -> None:
    server = client(f"http://127.0.0.1:{live.port}/user/you/", live.token)
    with pytest.raises(ProviderError, match="no Jupyter Server at"):
        await server.ask("GET", "api/kernels")


async def test_nobody_listens() -> None:
    server = client(f"http://127.0.0.1:{free_port()}/", "")
    with pytest.raises(LinkError, match="does not answer"):
        await server.ask("GET", "api/kernels")
    with pytest.raises(LinkError, match="does not answer"):
        await open_process(server, "1", ["cat"])


def test_a_token_is_not_sent_in_the_clear() -> None:
    async def token() -> str:
        raise AssertionError

    with pytest.raises(RequestError, match="not encrypted"):
        Server("http://lab.example.org:8888/", token)
    Server("http://lab.example.org:8888/", token, plain_http=True)


@pytest.mark.parametrize(
    ("given", "url", "token"),
    [
        ("https://hub.example.org/user/me/", "https://hub.example.org/user/me/", ""),
        (
            "https://hub.example.org/user/me/lab/tree/a.ipynb",
            "https://hub.example.org/user/me/",
            "",
        ),
        ("http://127.0.0.1:8888/tree?token=5ec", "http://127.0.0.1:8888/", "5ec"),
        ("http://127.0.0.1:8888/lab?token=5ec&reset", "http://127.0.0.1:8888/", "5ec"),
        ("hub.example.org", "https://hub.example.org/", ""),
    ],
)
def test_addresses_as_they_are_copied(given: str, url: str, token: str) -> None:
    bare, found = take_apart(given)
    assert (server_url(bare), found) == (url, token)


@pytest.mark.parametrize("given", ["ftp://a/", "https:///lab", "https://me:secret@a/"])
def test_what_is_no_address(given: str) -> None:
    with pytest.raises(MlinfraError) as caught:
        server_url(given)
    assert "secret" not in str(caught.value)

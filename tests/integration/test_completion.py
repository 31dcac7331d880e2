"""Completion of remote lines as front ends get it: through a kernel's complete_request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import start_new_kernel

INSTALL = """
from jupyter_mlinfra.magics.completion import install
model, history = 1, 2
remove = install(get_ipython(), machines=lambda: ["train", "test-2"],
                 pullable=lambda: ["model", "history"])
"""


@pytest.fixture(scope="module")
def client() -> Iterator[BlockingKernelClient]:
    manager, client = start_new_kernel(kernel_name="python3")
    run(client, INSTALL)
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run(client: BlockingKernelClient, code: str) -> None:
    reply = client.execute_interactive(code, timeout=60)
    assert reply["content"]["status"] == "ok", reply["content"]


def complete(client: BlockingKernelClient, code: str) -> tuple[str, list[str]]:
    """The text that would be replaced and what by; the cursor is at ``|``."""
    position = code.index("|")
    code = code.replace("|", "")
    reply: dict[str, Any] = client.complete(code, position, reply=True, timeout=60)
    content = reply["content"]
    assert content["status"] == "ok"
    return code[content["cursor_start"] : content["cursor_end"]], content["matches"]


@pytest.mark.parametrize(
    ("code", "replaced", "matches"),
    [
        ("%%remote g|\nx = 1", "g", ["gpu="]),
        ("%%remote gpu=A10:2 is|\nx = 1", "is", ["isolate"]),
        ("%%remote gpu=l|\nx", "l", ["L4", "L40", "L40S"]),
        ("%%remote idle=|", "", ["15m", "30m", "1h", "2h"]),
        ("%%remote machine=test-|", "test-", ["test-2"]),
        ("%remote st|", "st", ["status", "stop"]),
        ("x = 1\n%remote stop t|", "t", ["train", "test-2"]),
        ("%remote pull |", "", ["model", "history"]),
        ("%remote use eager_limit=1|", "1", ["16MB", "1GB"]),
    ],
)
def test_remote_lines(
    client: BlockingKernelClient, code: str, replaced: str, matches: list[str]
) -> None:
    assert complete(client, code) == (replaced, matches)


def test_the_cells_code_completes_as_usual(client: BlockingKernelClient) -> None:
    replaced, matches = complete(client, "%%remote gpu=A10\nhistor|")
    assert (replaced, matches) == ("histor", ["history"])
    assert "gpu=" not in complete(client, "%%remote\ng|")[1]


def test_it_is_taken_out_cleanly(client: BlockingKernelClient) -> None:
    run(client, "remove(); remove()")
    try:
        assert "gpu=" not in complete(client, "%%remote g|")[1]
    finally:
        run(client, INSTALL)
    assert complete(client, "%%remote g|") == ("g", ["gpu="])

"""What moves beside any run is in the ledger, too: it takes time, and may cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from mlinfra_sdk.errors import LedgerError
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines.client import AgentClient


@contextmanager
def recorded(
    ledger: Ledger,
    machine_id: str,
    client: AgentClient,
    direction: Literal["up", "down"],
    what: str,
) -> Iterator[None]:
    """Record what moves inside, also if it fails. A ledger that cannot be written stops nothing."""

    def moved() -> int:
        return client.bytes_sent if direction == "up" else client.bytes_received

    began, before, number = time.monotonic(), moved(), None
    with suppress(LedgerError):
        number = ledger.open_transfer(machine_id, direction, what)
    try:
        yield
    finally:
        if number is not None:
            with suppress(LedgerError):
                seconds = time.monotonic() - began
                ledger.close_transfer(number, size=moved() - before, seconds=seconds)

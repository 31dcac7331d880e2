"""Services on loopback that tests of several folders use."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from emulators.modal import Emulator

# Who starts the tests in the background may have it ignored, which all processes would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Sessions of tests start no sweeps beside them; those that are about sweeps do.
os.environ["MLINFRA_SWEEP"] = "no"


@pytest.fixture(scope="session")
def modal_service() -> Iterator[Emulator]:
    """Modal's service; a process has one client, so there is one service for all tests."""
    from emulators.modal import emulator

    with emulator() as service:
        yield service


@pytest.fixture
def modal_emulator(
    modal_service: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Emulator:
    """The service, to which the environment of this test sends clients."""
    for name, value in modal_service.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(tmp_path / "modal.toml"))
    return modal_service

"""Services on loopback that tests of several folders use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from emulators.modal import Emulator


@pytest.fixture(scope="session")
def modal_emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """Modal's service, which this process's client talks to; one client a process, so there is
    one service for all tests."""
    from emulators.modal import emulator

    home: Path = tmp_path_factory.mktemp("modal-home")
    with emulator() as service, pytest.MonkeyPatch.context() as patch:
        for name, value in service.environment.items():
            patch.setenv(name, value)
        patch.setenv("MODAL_CONFIG_PATH", str(home / "modal.toml"))
        yield service

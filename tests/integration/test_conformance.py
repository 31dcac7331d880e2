"""The suite of all backends, on those that work here without anything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
from sshd import Sshd

from mlinfra_sdk import paths
from mlinfra_sdk.testing import ProviderSuite

pytestmark = pytest.mark.timeout(300)


@contextmanager
def without_folder_for_machines(parent: Path, name: str = "machines") -> Iterator[None]:
    """Nothing can be made where machines should lie, not even by root."""
    machines, away = parent / name, parent / "away"
    machines.mkdir(mode=0o700, parents=True, exist_ok=True)
    machines.rename(away)
    machines.touch()
    try:
        yield
    finally:
        machines.unlink()
        away.rename(machines)


class TestLocal(ProviderSuite):
    on = "local"
    settings: ClassVar = {"isolate": True}

    @pytest.fixture(autouse=True, scope="class")
    @staticmethod
    def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLINFRA_HOME", str(tmp_path_factory.mktemp("home")))
            yield

    @contextmanager
    def broken(self) -> Iterator[None]:
        with without_folder_for_machines(paths.data_dir()):
            yield


class TestSsh(ProviderSuite):
    on = "ssh:box"
    box: Sshd

    @pytest.fixture(autouse=True, scope="class")
    @staticmethod
    def _box(request: pytest.FixtureRequest, warm_box: Sshd) -> Iterator[None]:
        request.cls.box = warm_box
        with warm_box.known():
            yield

    @contextmanager
    def broken(self) -> Iterator[None]:
        with without_folder_for_machines(self.box.cache):
            yield

"""The suite of all backends, on a real Jupyter Server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from jupyter_servers import TOKEN, JupyterServer, jupyter_server
from test_conformance import without_folder_for_machines

from mlinfra_sdk.testing import ProviderSuite


class TestJupyter(ProviderSuite):
    server: JupyterServer

    @pytest.fixture(autouse=True, scope="class")
    @staticmethod
    def _server(
        request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[None]:
        with (
            jupyter_server(tmp_path_factory.mktemp("jupyter")) as server,
            pytest.MonkeyPatch.context() as patch,
        ):
            server.furnish()
            patch.setenv("MLINFRA_HOME", str(tmp_path_factory.mktemp("state")))
            patch.setenv(TOKEN, server.token)
            request.cls.server = server
            request.cls.on = f"jupyter:{server.url}"
            yield

    @contextmanager
    def broken(self) -> Iterator[None]:
        with without_folder_for_machines(self.server.home / ".cache" / "mlinfra"):
            yield

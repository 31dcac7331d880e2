"""The extension as Jupyter Server starts and stops it."""

from __future__ import annotations

from jupyter_server.extension.application import ExtensionApp

from .handlers import handlers
from .service import Service
from .watcher import Watcher


class MlinfraApp(ExtensionApp):
    """Serves ``/mlinfra``. Nothing is opened or asked before the first request."""

    name = "mlinfra"
    open_browser = False

    def initialize_handlers(self) -> None:
        """Called by the server."""
        assert self.serverapp is not None
        watcher = Watcher(self.serverapp.root_dir, self.log)
        self.settings["mlinfra"] = self._watcher = watcher
        self.handlers.extend(handlers(Service(watcher), watcher))

    async def stop_extension(self) -> None:
        """Called by the server at its end."""
        await self._watcher.close()

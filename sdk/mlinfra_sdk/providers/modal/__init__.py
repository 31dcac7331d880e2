"""``on=modal``: a sandbox at Modal, paid by the second.

A machine is a sandbox whose name and tag hold its key. It ends in four ways, whichever comes first:
the agent's own watchdog, whose end the sandbox's entrypoint notices within seconds; the entrypoint,
if no agent ever comes; Modal's ``idle_timeout``, once no command of ours runs; and Modal's
``timeout``, which is always set.
"""

from __future__ import annotations

from mlinfra_sdk.providers.modal.provider import ModalProvider, Options

__all__ = ["ModalProvider", "Options"]

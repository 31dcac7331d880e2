"""Colab's control plane on loopback, for the real `google-colab-cli` client.

It speaks exactly the calls of that client that are used: `/tun/m/assign`, `unassign`,
`assignments` and `ccu-info`, with their XSRF tokens and prefix. A runtime is a folder with its own
HOME and a real jupyter_server that lets in by the proxy's token, in the protocol for kernel
messages that Colab uses. It can give itself back by the address that runtimes know as
`TBE_RUNTIME_ADDR`.
"""

from emulators.colab.server import Emulator, emulator

__all__ = ["Emulator", "emulator"]

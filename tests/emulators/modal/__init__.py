"""Modal's service on loopback, for the real `modal` client.

It speaks the control plane and the task command router (gRPC, `modal_proto` of the installed
client), the block store of volumes (HTTP) and tunnels (TLS). A sandbox is a folder with its own
HOME; its commands are real processes, which all end with it. What the real service refuses is
refused.

Not spoken: the file tools of a sandbox, sidecars, snapshots, functions. A method without
an implementation answers UNIMPLEMENTED with its name.
"""

from emulators.modal.server import Emulator, emulator

__all__ = ["Emulator", "emulator"]

"""Kaggle's API on loopback, for the real `kaggle` client.

It speaks exactly the calls of that client that are used: saving a kernel, its session's status, log
and output, deleting it, uploading, creating and deleting a dataset, the accelerator quota, and
whose token it is. A pushed script runs as a real process in a folder and with a HOME of its own,
by the Python of the tests, beside its datasets. What the real service refuses is refused.
"""

from emulators.kaggle.server import Emulator, emulator

__all__ = ["Emulator", "emulator"]

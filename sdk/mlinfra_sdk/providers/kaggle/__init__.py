"""``on=kaggle``: runs on Kaggle's free machines, as batch jobs.

Kaggle lets nobody talk to a running program, so a machine is an agent on this computer, which
pushes each run as a script, waits for its end, and replays what it published.
"""

from __future__ import annotations

from mlinfra_sdk.providers.kaggle.provider import KaggleProvider, Options

__all__ = ["KaggleProvider", "Options"]

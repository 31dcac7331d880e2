"""Runs that go on by themselves: in the background, detached, and brought back."""

from mlinfra_sdk.jobs.background import Background
from mlinfra_sdk.jobs.handle import RunHandle

__all__ = ["Background", "RunHandle"]

"""Runs that go on by themselves: in the background, detached, and brought back."""

from mlinfra_sdk.jobs.background import Background
from mlinfra_sdk.jobs.handle import RunHandle
from mlinfra_sdk.jobs.job import Job, LostJob, Unseen

__all__ = ["Background", "Job", "LostJob", "RunHandle", "Unseen"]

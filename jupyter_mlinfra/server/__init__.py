"""The Jupyter Server extension: machines, runs and costs as REST and as a stream of events."""

from .app import MlinfraApp

__all__ = ["MlinfraApp"]

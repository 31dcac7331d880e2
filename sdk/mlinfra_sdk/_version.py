"""The version of this distribution; ``jupyter_mlinfra._version`` carries the same."""

__version__ = "0.1.0"

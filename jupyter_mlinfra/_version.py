"""The version; ``package.json`` and ``mlinfra_sdk._version`` carry the same."""

__version__ = "0.1.0"

"""``on=colab``: a runtime of Google Colab, paid by compute units or free of charge.

A machine is a runtime that is assigned to a notebook of its own, whose name is made of the
machine's key: so the same key gives the same runtime. The way into it is its Jupyter Server, as at
``on=jupyter``. A guard in the runtime gives it back to Colab when the agent has ended.
"""

from __future__ import annotations

from mlinfra_sdk.providers.colab.provider import ColabProvider, Options

__all__ = ["ColabProvider", "Options"]

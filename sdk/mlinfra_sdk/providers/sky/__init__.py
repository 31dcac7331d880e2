"""``on=sky``: machines of some twenty clouds and clusters, by SkyPilot."""

from .provider import Options, SkyProvider

__all__ = ["Options", "SkyProvider"]

"""The run card: one line above a cell's outputs that says where it runs and what it costs."""

from .card import bundle, message, render_html, render_text
from .state import RunState

__all__ = ["RunState", "bundle", "message", "render_html", "render_text"]

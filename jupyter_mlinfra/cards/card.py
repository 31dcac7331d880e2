"""Drawing a run card as HTML and as text.

The HTML must survive where notebooks are shown: front ends that strip scripts and style sheets
(hence inline styles and nothing external), GitHub, which strips all styling (hence a structure
that reads well bare), light and dark themes (hence JupyterLab's colour variables, with fallbacks
that inherit), JupyterLab's typesetter (which takes what stands between two dollar signs for
mathematics, unless tags come between). Drawing is in the path of every cell and costs a few
hundredths of a millisecond.
"""

from __future__ import annotations

import html
import time
from typing import Any, NamedTuple

from mlinfra_sdk.units import format_duration, format_size, format_usd

from .state import ENDED, Phase, RunState
from .usage import curves, live_facts, usage_rows

MIME = "application/vnd.mlinfra.run+json"
METADATA = {"mlinfra": {"card": True}}
_MOST_NAMES = 24


class _Look(NamedTuple):
    words: str
    short: str
    colour: str
    symbol: str = ""


# Colours with a contrast of at least 3:1 on white and on near-black.
_LOOKS: dict[Phase, _Look] = {
    "quote": _Look("Looking for a machine", "quote", "#7c7f88"),
    "confirm": _Look("Waiting for your answer", "answer", "#d97706", "?"),
    "start": _Look("Starting the machine", "start", "#8b5cf6"),
    "environment": _Look("Preparing the environment", "environment", "#0d9488"),
    "data": _Look("Moving data", "data", "#d97706"),
    "running": _Look("Running", "running", "#3b82f6"),
    "reconnecting": _Look("Reconnecting", "reconnecting", "#d97706"),
    "detached": _Look("Detached", "detached", "#7c7f88", "↗"),  # for good: this card is not redrawn
    "done": _Look("Done", "done", "#16a34a", "✓"),
    "error": _Look("Error", "error", "#dc2626", "✗"),
    "interrupted": _Look("Interrupted", "interrupted", "#d97706", "■"),
    "lost": _Look("Lost", "lost", "#dc2626", "✗"),
}

_SPINNER = (
    '<svg width="11" height="11" viewBox="0 0 16 16" fill="none" stroke="{0}" stroke-width="3"'
    ' aria-hidden="true" style="vertical-align:-1px">'
    '<circle cx="8" cy="8" r="6" stroke-opacity="0.3"/><path d="M8 2a6 6 0 0 1 6 6">'
    '<animateTransform attributeName="transform" type="rotate" from="0 8 8" to="360 8 8"'
    ' dur="1s" repeatCount="indefinite"/></path></svg>'
)
_BOX = (
    "font-family:var(--jp-ui-font-family,system-ui,sans-serif);font-size:12px;line-height:22px;"
    "color:var(--jp-ui-font-color1,inherit);"
    "border:1px solid var(--jp-border-color2,rgba(128,128,128,.4));border-radius:3px;"
    "overflow:hidden"
)
_FAINT = "opacity:.75"


def render_text(state: RunState) -> str:
    """The card in one line."""
    elapsed = sum(state.phases().values())
    return " · ".join((_words(state), *_facts(state, elapsed), *_remarks(state)))


def render_html(state: RunState) -> str:
    """The card as one self-contained ``div``."""
    phases = state.phases()
    elapsed = sum(phases.values())
    look = _LOOKS[state.phase]
    words = _words(state)
    facts = _facts(state, elapsed)
    line = " · ".join(map(_escape, facts))
    symbol = (
        f'<span aria-hidden="true" style="color:{look.colour}">{look.symbol}</span>'
        if look.symbol
        else _SPINNER.format(look.colour)
    )
    remarks = "".join(
        f'<div style="padding:0 8px 2px 26px">{_escape(remark)}</div>' for remark in _remarks(state)
    )
    head = f'{symbol} <b>{_escape(words)}</b> <span style="{_FAINT}">· {line}</span>'
    if state.phase in ENDED:
        body = (
            f'<details><summary style="padding:0 8px;cursor:pointer">{head}</summary>'
            f'<div style="padding:0 8px 4px 26px">{_details(state, phases, elapsed)}</div>'
            f"</details>{remarks}"
        )
    else:  # drawn again every second, which would close the details
        bar = _done(state) or _bar(phases, elapsed, "2px")
        body = f'<div style="padding:0 8px">{head}{curves(state)}</div>{remarks}{bar}'
    return (
        f'<div role="status" aria-label="{html.escape(" · ".join((words, *facts)))}"'
        f' style="{_BOX}">{body}</div>'
    )


def bundle(state: RunState) -> dict[str, Any]:
    """The card as a mime bundle: HTML, text, and the raw facts."""
    return {
        "text/html": render_html(state),
        "text/plain": render_text(state),
        MIME: state.facts(),
    }


def message(state: RunState, display_id: str) -> dict[str, Any]:
    """The content of a ``display_data`` or ``update_display_data`` message with the card."""
    return {
        "data": bundle(state),
        "metadata": METADATA,
        "transient": {"display_id": display_id},
    }


def _escape(text: str) -> str:
    return html.escape(text).replace("$", "<span>$</span>")


def _words(state: RunState) -> str:
    """The phase."""
    words = _LOOKS[state.phase].words
    if state.phase == "reconnecting":
        return f"{words} for {format_duration(state.present())}"
    if state.progress:
        done, total = state.progress
        share = f" ({100 * done // total} %)" if total else ""
        return f"{words}: {format_size(done)} of {format_size(total)}{share}"
    if state.detail:
        return f"{words}: {state.detail}"
    if state.phase == "detached" and state.run:
        return f"{words} as {state.run}"
    return words


def _facts(state: RunState, elapsed: float) -> list[str]:
    """What the line says after the phase."""
    place = f"{state.target} {state.gpu}".rstrip()
    facts = [place, format_duration(elapsed)]
    if state.phase not in ("quote", "confirm"):
        rate, spent = state.rate, state.spent(elapsed)
        hourly = f" ({format_usd(rate)}/h)" if rate else ""
        facts.append("price unknown" if spent is None else format_usd(spent) + hourly)
    moved = []
    if state.bytes_up:
        moved.append(f"↑ {format_size(state.bytes_up)}")
    if state.bytes_down:
        moved.append(f"↓ {format_size(state.bytes_down)}")
    if moved:
        facts.append(" ".join(moved))
    if state.phase == "running":
        facts += live_facts(state)
    if state.safe is not None:
        _, step, at = state.safe
        age = "" if state.phase in ENDED else f", {format_duration(time.time() - at)} ago"
        facts.append(f"safe at step {step}{age}")
    return facts


def _remarks(state: RunState) -> list[str]:
    """What must not be hidden behind a click."""
    remarks = [f"⚠ {warning}" for warning in state.warnings]
    return [*remarks, state.note] if state.note else remarks


def _details(state: RunState, phases: dict[Phase, float], elapsed: float) -> str:
    rows = []
    if state.machine:
        rows.append(("Machine", _escape(state.machine)))
    if phases:
        times = " · ".join(
            f'<span style="color:{_LOOKS[phase].colour}" aria-hidden="true">▬</span> '
            f"{_LOOKS[phase].short} {format_duration(seconds)}"
            for phase, seconds in phases.items()
        )
        rows.append(("Time", times + _bar(phases, elapsed, "4px")))
    if state.safe is not None:
        rows.append(("Checkpoint", f"{_escape(state.safe[0])}, step {state.safe[1]}"))
    if state.sent or state.bytes_up:
        rows.append(("Sent", _moved(state.sent, state.bytes_up)))
    if state.received or state.bytes_down:
        rows.append(("Received", _moved(state.received, state.bytes_down)))
    if state.usage is not None:
        rows += [(label, _escape(words)) for label, words in usage_rows(state.usage)]
    return "".join(f"<div><b>{label}</b> {content}</div>" for label, content in rows)


def _moved(names: list[str], size: int) -> str:
    shown = ", ".join(f"<code>{_escape(name)}</code>" for name in names[:_MOST_NAMES])
    if len(names) > _MOST_NAMES:
        shown += f" and {len(names) - _MOST_NAMES} more"
    if shown and size:
        return f"{shown} ({format_size(size)})"
    return shown or format_size(size)


def _done(state: RunState) -> str:
    """The share of the present phase that is done as a line, if that is known."""
    if not state.progress or not state.progress[1]:
        return ""
    done, total = state.progress
    width = f"width:{min(100.0, 100 * done / total):.1f}%"
    return (
        '<div aria-hidden="true" style="height:3px;background:rgba(128,128,128,.25)">'
        f'<div style="{width};height:3px;background:{_LOOKS[state.phase].colour}"></div></div>'
    )


def _bar(phases: dict[Phase, float], elapsed: float, height: str) -> str:
    """How the time so far divides among the phases, as one line of colours."""
    parts = "".join(
        f'<span style="display:block;width:{100 * seconds / elapsed:.2f}%;'
        f'background:{_LOOKS[phase].colour}"></span>'
        for phase, seconds in phases.items()
        if seconds > 0
    )
    return f'<div aria-hidden="true" style="display:flex;height:{height}">{parts}</div>'

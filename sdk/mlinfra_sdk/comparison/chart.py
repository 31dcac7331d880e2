"""A comparison as one self-contained piece of HTML: bars of time, and the table below.

It must survive where notebooks are shown: no scripts, no style sheets, nothing external; GitHub
strips all styling, so the table alone has to be enough. What a bar stands for is told when the
pointer is on it.
"""

from __future__ import annotations

import html

from mlinfra_sdk.comparison.result import PHASES, WARM_UP_RULE, Comparison, TargetResult
from mlinfra_sdk.units import format_duration

# Colours with a contrast of at least 3:1 on white and on near-black, as on run cards.
_COLOURS = {
    "start": "#8b5cf6",
    "environment": "#0d9488",
    "data": "#d97706",
    "compute": "#3b82f6",
}
_BOX = (
    "font-family:var(--jp-ui-font-family,system-ui,sans-serif);font-size:12px;line-height:20px;"
    "color:var(--jp-ui-font-color1,inherit);padding:6px 8px;"
    "border:1px solid var(--jp-border-color2,rgba(128,128,128,.4));border-radius:3px"
)
_CELL = "text-align:left;vertical-align:top;padding:1px 12px 1px 0;max-width:22em"
_WIDTH = 320
_FAINT = "opacity:.75"


def render(comparison: Comparison) -> str:
    """The comparison as it is now; targets that are still at work show what they do."""
    longest = max((_seconds(target) for target in comparison.targets), default=0.0)
    bars = "".join(_bar(target, longest) for target in comparison.targets)
    legend = " ".join(
        f'<span style="color:{colour}" aria-hidden="true">▬</span> {phase}'
        for phase, colour in _COLOURS.items()
    )
    words = "".join(f"<div>{_escape(sentence)}</div>" for sentence in comparison.sentences())
    outputs = "".join(
        f"<details><summary>Output on {_escape(target.name)}</summary>"
        f'<pre style="margin:0">{_escape(target.trials[0].output)}</pre></details>'
        for target in comparison.targets
        if target.trials and target.trials[0].output
    )
    return (
        f'<div role="group" aria-label="Comparison" style="{_BOX}">{bars}'
        f'<div style="{_FAINT}">first result from door to door: {legend}</div>'
        f"{_table(comparison)}{words}"
        f'<div style="{_FAINT}">~ estimated, all others measured. {_escape(WARM_UP_RULE)}</div>'
        f"{outputs}</div>"
    )


def _seconds(target: TargetResult) -> float:
    return target.trials[0].total if target.trials else 0.0


def _bar(target: TargetResult, longest: float) -> str:
    name = f'<span style="display:inline-block;min-width:14em">{_escape(target.name)}</span>'
    if not target.trials:
        return f'<div>{name}<span style="{_FAINT}">{_escape(target.phase)} ...</span></div>'
    trial = target.trials[0]
    parts = "".join(
        f'<span title="{phase} {format_duration(trial.seconds[phase])}"'
        ' style="display:inline-block;height:10px;'
        f"width:{_WIDTH * trial.seconds[phase] / longest:.1f}px;"
        f'background:{_COLOURS[phase]}"></span>'
        for phase in PHASES
        if trial.seconds.get(phase) and longest
    )
    more = "" if target.phase in ("done", "failed") else f" {_escape(target.phase)} ..."
    total = f"{format_duration(trial.total)}{' ✗' if trial.error else ''}{more}"
    return f'<div style="white-space:nowrap">{name}{parts} {total}</div>'


def _table(comparison: Comparison) -> str:
    header, lines = comparison.table()
    if not lines:
        return ""
    head = "".join(f'<th scope="col" style="{_CELL}">{_escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row" style="{_CELL};font-weight:normal;{_FAINT}">{_escape(line[0])}</th>'
        + "".join(f'<td style="{_CELL}">{_escape(cell)}</td>' for cell in line[1:])
        + "</tr>"
        for line in lines
    )
    return (
        '<div style="overflow-x:auto"><table style="border-collapse:collapse;margin:4px 0;'
        'font:inherit;color:inherit">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _escape(text: str) -> str:
    # A typesetter takes what stands between two dollar signs for mathematics, unless tags come
    # between.
    return html.escape(text).replace("$", "<span>$</span>")

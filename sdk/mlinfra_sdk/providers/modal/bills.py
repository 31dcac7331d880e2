"""What Modal says afterwards: when a sandbox ended, and what it has billed for it."""

from __future__ import annotations

import contextlib
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import anyio

from mlinfra_sdk import units
from mlinfra_sdk.providers.base import Bill, Status
from mlinfra_sdk.providers.modal.errors import translated

if TYPE_CHECKING:
    from modal import Sandbox

SOURCE = "Modal's billing report"
_HOUR = 3600.0
_LATE = 2 * _HOUR
"""Seconds behind the last billed hour at which the report is taken for complete: it may be late by
minutes, and this computer's clock may be wrong by an hour."""
_ASK_SECONDS = 10.0


async def bill(tag: str, key: str, sandbox: str, started: float, stopped: float) -> Bill | None:
    """What the workspace was billed for the sandbox with this id or tag, or None if that is not
    known yet, or not told for single sandboxes. The report has whole hours of UTC."""
    import modal

    first = (started - _LATE) // _HOUR * _HOUR
    last = (stopped + _LATE) // _HOUR * _HOUR + _HOUR
    if time.time() < last:
        return None
    begin, end = (datetime.fromtimestamp(it, timezone.utc) for it in (first, last))
    with translated():
        rows = await modal.Workspace.from_context().billing.report.aio(
            start=begin, end=end, resolution="h", tag_names=[tag]
        )
    mine = [row for row in rows if row.object_id == sandbox or row.tags.get(tag) == key]
    if not mine:
        return None
    return Bill(round(sum(row.cost for row in mine) * units.MICRO), SOURCE)


async def ended(sandbox: Sandbox, reason: str) -> Status:
    """The status of a sandbox that is over, with its end by this computer's clock and its length
    if Modal tells. Its statistics are experimental and may be late by minutes."""
    with contextlib.suppress(Exception), anyio.move_on_after(_ASK_SECONDS):
        stats = await sandbox._experimental_stats.aio()
        if stats.duration:
            # They end with Modal's present, which says how its clock differs from this one.
            ago = max(0.0, (stats.until - stats.since - stats.duration).total_seconds())
            return Status(False, reason, time.time() - ago, seconds=stats.duration.total_seconds())
    return Status(False, reason)

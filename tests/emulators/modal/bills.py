"""What the service bills: seconds of sandboxes at its rates, told by the hour."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from decimal import Decimal

from modal_proto import api_pb2

from emulators.modal.box import Box

SANDBOX_RATES = {"CPU": Decimal("0.00003942"), "Memory": Decimal("0.00000667")}
"""USD per second of a core and of a GiB of a sandbox: https://modal.com/pricing, 2026-10-08."""
_HOUR = 3600


def per_second(box: Box, rates: Mapping[str, str]) -> dict[str, Decimal]:
    """What a second of a sandbox costs, by resource."""
    resources = box.definition.resources
    found = {
        "CPU": SANDBOX_RATES["CPU"] * resources.milli_cpu / 1000,
        "Memory": SANDBOX_RATES["Memory"] * resources.memory_mb / 1024,
    }
    gpu = resources.gpu_config
    if gpu.gpu_type:
        found[gpu.gpu_type] = Decimal(rates[gpu.gpu_type]) * gpu.count
    return found


def seconds(box: Box) -> int:
    """Whole seconds that are billed for a sandbox so far."""
    if box.began is None:
        return 0
    return math.ceil((time.time() if box.over is None else box.over) - box.began)


def billed(box: Box, rates: Mapping[str, str]) -> Decimal:
    """USD that a sandbox has cost so far."""
    return sum(per_second(box, rates).values(), Decimal(0)) * seconds(box)


def report(
    boxes: list[Box],
    rates: Mapping[str, str],
    request: api_pb2.WorkspaceBillingReportRequest,
    shift: float,
) -> Iterator[api_pb2.WorkspaceBillingReportItem]:
    """Rows of whole hours that are over; sandboxes count as if they had run ``shift`` seconds
    earlier."""
    first = request.start_timestamp.seconds // _HOUR * _HOUR
    last = min(request.end_timestamp.seconds, int(time.time())) // _HOUR * _HOUR
    for box in boxes:
        if box.began is None:
            continue
        began, rate = box.began - shift, per_second(box, rates)
        over = began + seconds(box)
        for hour in range(first, last, _HOUR):
            spent = max(0.0, min(over, hour + _HOUR) - max(began, hour))
            if not spent:
                continue
            costs = {name: price * Decimal(spent) for name, price in rate.items()}
            row = api_pb2.WorkspaceBillingReportItem(
                object_id=box.id,
                description=box.definition.name,
                environment_name="main",
                cost=str(sum(costs.values(), Decimal(0))),
                tags={key: box.tags[key] for key in request.tag_names if key in box.tags},
                cost_by_resource={name: str(cost) for name, cost in costs.items()},
            )
            row.interval.seconds = hour
            yield row

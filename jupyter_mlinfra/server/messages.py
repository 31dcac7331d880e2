"""What the server is asked, and what it answers: the schemas of ``/mlinfra/openapi.json``.

Money is USD, times are Unix seconds, durations seconds, sizes bytes. No field holds source code
beyond a run's first line, a provider's handle, or a credential.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, TypeVar

import msgspec

from mlinfra_sdk.worker.usage import Usage

T = TypeVar("T")

Limit = Annotated[int, msgspec.Meta(ge=1, le=500, description="How many at most")]
Offset = Annotated[int, msgspec.Meta(ge=0, le=1_000_000, description="How many are left out")]
Text = Annotated[str, msgspec.Meta(max_length=200)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=31_536_000)]


# -- questions -------------------------------------------------------------------------------------


class Nothing(msgspec.Struct, frozen=True):
    """No parameters. Unknown ones are passed over in all queries: JupyterLab adds the time to keep
    browsers from answering themselves."""


class Cursor(msgspec.Struct, frozen=True):
    """A page: ``cursor`` is the ``next`` of the page before."""

    limit: Limit = 50
    cursor: Text = ""


class Place(msgspec.Struct, frozen=True):
    """A page of a list that does not change meanwhile."""

    limit: Limit = 100
    offset: Offset = 0


class MachinesQuery(Cursor, frozen=True):
    """All machines, also those that have ended, newest first."""


class RunsQuery(Cursor, frozen=True):
    """All runs, newest first."""


class LogQuery(msgspec.Struct, frozen=True):
    """What a run has printed after its message number ``after``."""

    after: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)] = 0


class CostsQuery(Place, frozen=True):
    """``since`` and ``until`` are a local date (2026-11-25) or a duration ago (7d)."""

    by: Text = "day"
    since: Text = "30d"
    until: Text = ""


class CatalogQuery(Place, frozen=True):
    """``gpu`` as %%remote takes it; ``provider`` is who asks the price."""

    gpu: Text = ""
    provider: Text = ""


class QuotesQuery(msgspec.Struct, frozen=True):
    """As %%remote takes them. Providers are asked. ``run``: the id of a run whose cell's time is to
    be estimated."""

    gpu: Text = ""
    on: Text = ""
    run: Annotated[str, msgspec.Meta(pattern="^([0-9]{1,18})?$")] = ""


class SettingsQuery(msgspec.Struct, frozen=True):
    """``path`` is a folder below the server's root: its project's settings count."""

    path: Annotated[str, msgspec.Meta(max_length=4096)] = ""


class Extension(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The machine does not end for being idle, nor for its time, before so many ``seconds`` from
    now."""

    seconds: Seconds = 1800.0


class SettingsChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings as a user writes them, empty to take one out of ``config.toml``. What is left out
    stays."""

    gpu: Text | msgspec.UnsetType = msgspec.UNSET
    on: Text | msgspec.UnsetType = msgspec.UNSET
    idle: Text | msgspec.UnsetType = msgspec.UNSET
    time: Text | msgspec.UnsetType = msgspec.UNSET
    budget: Text | msgspec.UnsetType = msgspec.UNSET
    month_budget: Text | msgspec.UnsetType = msgspec.UNSET
    confirm: Text | msgspec.UnsetType = msgspec.UNSET


# -- answers ---------------------------------------------------------------------------------------


class End(msgspec.Struct):
    """When a machine ends by itself, unless something postpones that. ``cause`` is ``idle``,
    ``time``, ``lease`` or ``budget``."""

    cause: str
    at: float
    reason: str


class Machine(msgspec.Struct, kw_only=True):
    """A machine. ``usd`` is its cost at the instant ``now`` of the answer; None: nobody states a
    price. What is known of its agent only is None while that is not asked."""

    id: str
    name: str
    target: str
    gpu: str
    gpu_count: int
    state: str
    """``starting``, ``running``, ``ended``."""
    notebook: str
    path: str
    """The notebook's path below the server's root, empty if it is not there."""
    intended_at: float
    started_at: float | None
    stopped_at: float | None
    stop_reason: str
    usd_per_hour: float | None
    price: str
    usd: float | None
    idle_usd: float | None
    reachable: bool | None = None
    problem: str = ""
    busy: bool | None = None
    idle_seconds: float | None = None
    ends: list[End] = []
    usage: list[Usage] = []
    waits: str = ""
    """What it waits for while it starts."""
    shell: str = ""
    """The command that opens a shell on it in a terminal of this server."""


class Progress(msgspec.Struct):
    """The outermost loop of a run: ``done`` of ``total`` (0: not known) units. ``left``: seconds to
    its end at its mean speed until now, None if that cannot be told."""

    label: str
    unit: str
    done: float
    total: float
    left: float | None


class Run(msgspec.Struct, kw_only=True):
    """A run. ``live``: its machine still has it, so it can be attached or cancelled."""

    id: str
    name: str
    kind: str
    title: str
    machine: str
    machine_id: str
    target: str
    notebook: str
    path: str
    status: str
    opened_at: float
    seconds: float | None
    usd: float | None
    bytes_up: int
    bytes_down: int
    live: bool = False
    followed: bool = False
    messages: int = 0
    progress: Progress | None = None


class Spent(msgspec.Struct, kw_only=True):
    """What all machines cost. ``unpriced``: how many that run have no known price."""

    usd_per_hour: float
    unpriced: int
    usd_today: float
    usd_month: float
    usd_total: float
    basis: str


class State(msgspec.Struct, kw_only=True):
    """All that goes on at the instant ``now``; ``ledger`` and ``settings`` are other numbers after
    each change of the ledger and of the user's ``config.toml``."""

    now: float
    ledger: int
    settings: int
    machines: list[Machine]
    runs: list[Run]
    spent: Spent


class Page(msgspec.Struct, Generic[T]):
    """Some of a list. ``next`` is the cursor of the page behind it, empty at the end."""

    items: list[T]
    next: str = ""


class Log(msgspec.Struct):
    """Text that a run has printed, colours left out. ``next`` is the ``after`` of what comes then;
    ``dropped``: text before it that was too much to be kept or sent."""

    text: str
    next: int
    ended: bool
    dropped: bool = False


class CostRow(msgspec.Struct):
    """One row of a report; ``usd`` is estimated, ``billed`` what providers have billed so far."""

    labels: dict[str, str]
    usd: float
    billed: float | None
    seconds: float
    runs: int


class Costs(msgspec.Struct):
    """Rows that add up to ``usd``, whatever page of them this is."""

    items: list[CostRow]
    total: int
    usd: float
    basis: str


class Offer(msgspec.Struct, kw_only=True):
    """What an accelerator costs at whom, and who says so."""

    gpu: str
    count: int
    memory_gb: int | None
    vendor: str
    sku: str
    region: str
    spot: bool
    usd_per_hour: float
    source: str
    date: str
    stale: bool
    trust: str


class Offers(msgspec.Struct):
    """Of ``total`` rates, the cheapest of each accelerator first."""

    items: list[Offer]
    total: int


class Target(msgspec.Struct):
    """What ``on=`` may name. ``problem`` says what it lacks, ``mend`` what to do about that."""

    name: str
    provider: str
    ready: bool
    problem: str = ""
    mend: str = ""


class Targets(msgspec.Struct):
    """In the order in which they are offered."""

    items: list[Target]


class Estimate(msgspec.Struct):
    """Seconds that a cell will take: in 8 of 10 cases between ``low`` and ``high``. ``basis`` says
    what it rests on."""

    seconds: float
    low: float
    high: float
    basis: str


class Quote(msgspec.Struct, kw_only=True):
    """A machine that could be had now. ``usd_per_hour`` None: nobody states a price."""

    target: str
    gpu: str
    count: int
    usd_per_hour: float | None
    price: str
    start_seconds: float
    estimate: Estimate | None = None


class Quotes(msgspec.Struct):
    """The one that %%remote would take first; ``notes`` says who has nothing."""

    items: list[Quote]
    notes: list[str]


class Setting(msgspec.Struct, kw_only=True):
    """A setting as it holds, and where it was set. ``own`` is what the user's ``config.toml`` says,
    empty if it says nothing."""

    name: str
    value: str
    origin: str
    help: str
    example: str
    default: str
    own: str = ""
    writable: bool = False
    suggestions: list[str] = []
    """Of one that is ``writable``."""


class Settings(msgspec.Struct):
    """All of them, and the path of the user's ``config.toml``."""

    items: list[Setting]
    file: str


class Done(msgspec.Struct):
    """A sentence about what was done."""

    message: str


class Problem(msgspec.Struct):
    """What is wrong, and what to do about it. ``field``: which field of the body it is about."""

    message: str
    hint: str = ""
    field: str = ""


Document = dict[str, Any]
"""An OpenAPI document."""

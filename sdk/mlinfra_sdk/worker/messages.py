"""What a client and an agent say to each other, one msgpack message at a time.

Requests and replies go on the CONTROL channel, what a kernel publishes on JOURNAL, chunks of the
content-addressed store on BULK. Jupyter's own messages keep their JSON parts as bytes: the agent
only passes them on.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from mlinfra_sdk.datasets.cache import Entry
from mlinfra_sdk.datasets.local import File
from mlinfra_sdk.meters import Meter
from mlinfra_sdk.worker.recipe import Recipe
from mlinfra_sdk.worker.usage import Usage
from mlinfra_sdk.worker.watchdog import End


class Request(msgspec.Struct, tag=True, omit_defaults=True):
    """A request; the reply carries the same ``id``."""

    id: int


class OpenKernel(Request):
    """Make sure that the kernel of this name runs, or without a name one that nobody uses;
    answered with a :class:`KernelInfo`. ``environment`` is the key of a prepared one, for a process
    that is yet to be started; without it the kernel has the agent's own packages."""

    kernel: str
    cwd: str = ""
    environment: str = ""


class RestartKernel(Request):
    """Replace the kernel's process by a fresh one; answered with a :class:`KernelInfo`."""

    kernel: str
    environment: str = ""


class AskPlatform(Request):
    """Answered with a :class:`mlinfra_sdk.worker.recipe.Platform`."""


class Prepare(Request):
    """Make an environment of this ``key`` (default: the recipe's) unless it is there, or with
    ``onto`` add to the one that has that key; answered with
    :class:`mlinfra_sdk.worker.recipe.Prepared`. What it is at is told as records of ``name``, which
    are :data:`mlinfra_sdk.worker.records.PREPARING`. ``indexes`` are asked beside the machine's
    own; they may hold credentials."""

    name: str
    recipe: Recipe
    key: str = ""
    onto: str = ""
    indexes: list[str] = []


class GiveUp(Request):
    """The environment that is being prepared under this name is not wanted any more."""

    name: str


class CloseKernel(Request):
    """End the kernel's process."""

    kernel: str


class Execute(Request):
    """Run a cell. Answered when it has been handed to the kernel; everything else, its end
    included, arrives as :class:`Record` of ``run``.

    ``inputs`` is an encoded :class:`mlinfra_sdk.namespace.delta.Inputs`.
    """

    kernel: str
    run: str
    code: str
    inputs: bytes = b""
    count: int = 0
    allow_stdin: bool = False
    label: str = ""
    notebook: str = ""
    ledger: int = 0
    """The client's own number of the run, for whoever collects it."""
    detached: bool = False
    """Nobody waits for the run: this client only takes its checkpoints, while it is there."""
    again: bool = False
    """It was cut off on another machine, or in another kernel."""
    said: str = ""
    """What stands first among its outputs."""
    watch: tuple[str, str] = ("", "")
    """The name of checkpoints, and the folder whose files they keep; empty: none."""
    paid: float | None = None
    """Seconds after its beginning at which it is stopped, for then ``budget`` is spent."""
    budget: str = ""


class Evaluate(Request):
    """Have the kernel answer a question about its variables: ``fetch`` (one token) or ``values``
    (names). Answered with encoded :class:`mlinfra_sdk.namespace.delta.Outputs`."""

    kernel: str
    what: str
    arguments: list[str] = []


class Attach(Request):
    """Follow a run, by its id or label, from the message after ``after`` on; answered with its
    :class:`RunInfo`. A run that another client follows is refused unless ``take``; who only wants
    to ``watch`` will not collect it."""

    run: str
    after: int = 0
    take: bool = False
    watch: bool = False


class Leave(Request):
    """Follow a run no longer."""

    run: str


class Collected(Request):
    """The client has all of a run and its variables: its journal can go."""

    run: str


class Cancel(Request):
    """Take a run out of the queue, or interrupt it if it runs already."""

    run: str


class ListRuns(Request):
    """Answered with a list of :class:`RunInfo`."""


class Interrupt(Request):
    """Send the kernel an interrupt, as Ctrl-C does."""

    kernel: str


class Answer(Request):
    """What the user typed at an ``input_request``."""

    kernel: str
    text: str


class Comm(Request):
    """A comm message from a front end; ``parent`` is its message id there."""

    kernel: str
    parent: str
    msg_type: str
    content: bytes
    metadata: bytes = b"{}"
    buffers: list[bytes] = []


class Missing(Request):
    """Which of these chunks the agent does not have; answered with a list of digests. They are
    then expected on BULK."""

    digests: list[bytes]


class Await(Request):
    """Answered when all that came on BULK before ``mark`` has been stored, with those of these
    chunks that are not there."""

    digests: list[bytes]
    mark: int


class Fetch(Request):
    """Send these chunks on BULK; answered with :class:`Fetched` when all have been handed to the
    link. With ``verify`` damaged ones are found before they are sent."""

    digests: list[bytes]
    verify: bool = False


class Halt(Request):
    """Send nothing more of the :class:`Fetch` with the id ``fetch``."""

    fetch: int


class FetchDataset(Request):
    """Bring the dataset at a URL to the machine, and under its name to its kernels. Answered with
    a :class:`DatasetState` at once; ``options`` may hold credentials, which stay in memory."""

    name: str
    url: str
    options: dict[str, Any] = {}


class WatchDataset(Request):
    """Answered with a :class:`DatasetState` when there is something to tell."""

    name: str


class DropDataset(Request):
    """Stop to fetch it; another time it is gone on with."""

    name: str


class LinkDataset(Request):
    """Have kernels find a folder of this same machine, as a dataset, where it is."""

    name: str
    path: str


class UseDataset(Request):
    """Have kernels find a version of a dataset, the whole or only its one ``file``; in the
    workspace of this name, or else the machine's working directory, also under the path ``link``.
    Answered with whether the machine has it."""

    name: str
    key: str
    version: str
    file: str = ""
    link: str = ""
    workspace: str = ""


class OfferFiles(Request):
    """Files of a version that is to be put together; answered with the digests of the chunks that
    the machine needs for them."""

    key: str
    version: str
    files: list[File]


class WriteFiles(Request):
    """The same, when these chunks have come: they become files."""

    key: str
    version: str
    files: list[File]


class FinishDataset(Request):
    """All its files have been written: the version is complete."""

    key: str
    version: str
    files: list[Entry]


class PlaceCheckpoint(Request):
    """The answer to a :data:`WANTED` record's ``token``: an encoded manifest whose chunks have
    come, or nothing if the client has none that is newer."""

    token: str
    manifest: bytes = b""


class Files(Request):
    """An encoded message of :mod:`mlinfra_sdk.sync.messages` about a workspace, answered with what
    that says."""

    body: bytes


class Limit(Request):
    """From now on end the machine by these limits, in seconds."""

    idle: float
    time: float | None = None


class Pay(Request):
    """From now on the machine's budgets pay for so many seconds more (None: there are none);
    ``budget`` names the tightest in words."""

    seconds: float | None = None
    budget: str = ""


class Extend(Request):
    """Do not end for being idle before so many seconds from now; answered with a list of
    :class:`mlinfra_sdk.worker.watchdog.End`."""

    seconds: float


class Stop(Request):
    """End the agent and with it the machine."""

    reason: str = "asked by the user"


class Describe(Request):
    """Answered with :class:`AgentInfo`."""


class Observe(Request):
    """Answered with :class:`Observed`. Unlike every other request it is no sign that a client is
    there: who only observes keeps the machine from none of its ends, its lease included."""


class Accelerators(Request):
    """Answered with a list of :class:`mlinfra_sdk.catalog.Device`: those that the machine's driver
    lets kernels use."""


AnyRequest = (
    OpenKernel
    | RestartKernel
    | CloseKernel
    | AskPlatform
    | Prepare
    | GiveUp
    | Execute
    | Evaluate
    | Attach
    | Leave
    | Collected
    | Cancel
    | ListRuns
    | Interrupt
    | Answer
    | Comm
    | Missing
    | Await
    | Fetch
    | Halt
    | FetchDataset
    | WatchDataset
    | DropDataset
    | LinkDataset
    | UseDataset
    | OfferFiles
    | WriteFiles
    | FinishDataset
    | PlaceCheckpoint
    | Files
    | Limit
    | Pay
    | Extend
    | Stop
    | Describe
    | Observe
    | Accelerators
)


class Reply(msgspec.Struct, omit_defaults=True):
    """The answer to the request ``id``: an encoded ``result``, or ``error`` with a ``hint``."""

    id: int
    result: bytes = b""
    error: str = ""
    hint: str = ""
    kind: str = ""
    """Name of the class in ``mlinfra_sdk.errors`` that the error has."""


class Fetched(msgspec.Struct, omit_defaults=True):
    """The chunks have been sent, the mark behind them; some could not be read."""

    mark: int
    unreadable: list[bytes] = []


class DatasetState(msgspec.Struct, omit_defaults=True):
    """How far a dataset is; ``ready`` when kernels find it."""

    done: int = 0
    total: int = 0
    ready: bool = False


class KernelInfo(msgspec.Struct, omit_defaults=True):
    """A running kernel. ``generation`` counts its processes: another one has other variables."""

    kernel: str
    generation: int
    pid: int
    python: str
    environment: str = ""
    """The key of the one that its process has."""


class RunInfo(msgspec.Struct, omit_defaults=True):
    """A run on the machine. Times are Unix seconds; ``title`` is its first line of code."""

    run: str
    kernel: str
    started: float
    label: str = ""
    notebook: str = ""
    title: str = ""
    status: str = "queued"
    """``queued``, ``running``, ``done``, ``error``, ``interrupted``, ``died`` (with its kernel),
    ``lost`` (with the agent) or ``cancelled`` (before it began)."""
    ended: float = 0.0
    messages: int = 0
    followed: bool = False
    ledger: int = 0
    generation: int = 0
    """Which process of its kernel it was given to."""
    progress: Meter | None = None
    """Its outermost loop that is under way."""


class AgentInfo(msgspec.Struct, omit_defaults=True):
    """What an agent says of itself. ``store`` is the id of its chunk store."""

    versions: dict[str, str]
    store: str
    started: float
    busy: bool
    idle_seconds: float
    kernels: list[str] = []
    ends: list[End] = []
    """When it ends by itself, the next end first."""


class Observed(msgspec.Struct, omit_defaults=True):
    """How a machine is at this instant, for who only looks; its next end comes first."""

    busy: bool
    idle_seconds: float
    ends: list[End]
    runs: list[RunInfo] = []
    usage: Usage | None = None


# What the agent tells its kernels, in their environment.
STORE_VARIABLE = "MLINFRA_STORE"
JOBS_VARIABLE = "MLINFRA_JOBS"
SHARED_VARIABLE = "MLINFRA_SHARED"
WORKSPACES_VARIABLE = "MLINFRA_WORKSPACES"
WORKER_VARIABLE = "MLINFRA_WORKER"
"""Set in kernels on a machine: there, ``@remote`` functions run in place."""

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode_request = msgspec.msgpack.Decoder(AnyRequest).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode

T = TypeVar("T")


def decode_as(kind: type[T], data: bytes) -> T:
    """An encoded result."""
    return msgspec.msgpack.decode(data, type=kind)


def encode_result(value: Any) -> bytes:
    """The result of a request, for :class:`Reply`."""
    return b"" if value is None else encode(value)

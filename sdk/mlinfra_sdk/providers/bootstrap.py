"""From a machine on which commands can be run to an agent that listens there.

One conversation does it all, so that a warm start is one command: ``bootstrap.sh`` finds or makes
an environment for the very SDK that runs here, in a directory named by the digest of what is in
it, and becomes ``mlinfra_sdk.worker.host``, which starts the agent, says so, and takes it back
unless it hears that this side knows.
"""

from __future__ import annotations

import functools
import hashlib
import shlex
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec

from mlinfra_sdk.errors import LinkError, ProviderError
from mlinfra_sdk.link.processes import skip_to_marker
from mlinfra_sdk.link.wire import Wire
from mlinfra_sdk.providers import packages
from mlinfra_sdk.providers.remote import (
    PRINTED_MARKER,
    ExecWire,
    Remote,
    ask,
    begun,
    read_line,
    result,
    set_home,
)
from mlinfra_sdk.providers.waiting import tell
from mlinfra_sdk.units import format_size
from mlinfra_sdk.worker.host import KEPT, Launch, Launched
from mlinfra_sdk.worker.wheel import build_wheel

_SCRIPT = Path(__file__).with_name("bootstrap.sh")
_CHUNK = 1 << 20
_ROLL_BACK = 20.0
_VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
_FAILURES = {
    "disk": (
        "has no space left for the packages",
        "Free some there, or name a directory on another disk by home= in the target's settings.",
    ),
    "home": (
        "has no directory that can be written to",
        "Name one by home= in the target's settings.",
    ),
    "others": (
        "has a directory that belongs to others, or that others can write to",
        "Nothing in it was run. If it is yours, make it yours alone (chmod 700); else name another"
        " one by home= in the target's settings.",
    ),
    "python": (
        "has no Python {version}, which this one is, and could not get it",
        "Install Python {version} or uv there, or name an interpreter by python=.",
    ),
    "packages": ("could not unpack the packages that were sent", "Run `mlinfra doctor`."),
    "start": (
        "cannot use the packages that it has installed",
        "On a disk without exec, name another directory by home= in the target's settings.",
    ),
}


async def start(
    remote: Remote, launch: Launch, *, home: str = "", python: str = ""
) -> dict[str, str]:
    """Have an agent run there; gives ``home``, ``python`` and ``gpus`` for a handle's data.

    Raises :class:`ProviderError` (also :class:`RequestError` for a GPU that is not there, and
    :class:`LinkError` when the machine cannot be reached), and leaves no agent behind then, or
    when it is cancelled.
    """
    tell(f"starting the worker at {remote.where}")
    shipment = await anyio.to_thread.run_sync(_shipment)
    data = {"home": home, "python": ""}
    wire = await begun(remote, *_opening(shipment, home, python))
    try:
        data = await _until_ready(remote, wire, shipment)
        frame = msgspec.msgpack.encode(launch)
        await wire.send([len(frame).to_bytes(4, "big"), frame])
        await skip_to_marker(wire)
        launched = result(await read_line(wire), Launched, remote.where)
        await wire.send([KEPT])
        await _until_closed(wire)
    except BaseException as error:
        complaint = wire.complaint()
        with anyio.CancelScope(shield=True):
            await wire.aclose()
            if data["python"]:
                await _take_back(remote, data, launch.key)
        if isinstance(error, LinkError):
            raise ProviderError(
                f"{remote.where} broke off while it started: {error.message} {complaint}".strip(),
                hint="Try again.",
            ) from error
        raise
    with anyio.CancelScope(shield=True):  # from here on it is there
        await wire.aclose()
    gpus = ", ".join(gpu.name for gpu in launched.gpus)
    return {**data, "gpus": gpus}


async def _take_back(remote: Remote, data: dict[str, str], key: str) -> None:
    """The host takes a launch back that nobody confirms; this waits until it has, and ends what was
    confirmed."""
    with anyio.move_on_after(_ROLL_BACK):
        try:
            await ask(remote, data, "stop", type(None), key)
        except (LinkError, ProviderError):
            return  # it cannot be reached now, and takes the launch back by itself


async def _until_closed(wire: ExecWire) -> None:
    """The command has nothing more to say; only then has it surely read the confirmation."""
    with anyio.move_on_after(_ROLL_BACK), suppress(LinkError):
        await read_line(wire)


class _Shipment(msgspec.Struct, frozen=True):
    name: str
    wheel: bytes
    pins: str
    digest: str


@functools.cache
def _shipment() -> _Shipment:
    """The SDK that runs here, and the versions of what it needs."""
    with tempfile.TemporaryDirectory(prefix="mlinfra-") as folder:
        path = build_wheel(Path(folder))
        wheel, pins = path.read_bytes(), packages.pins()
    digest = hashlib.sha256(_VERSION.encode() + wheel + pins.encode()).hexdigest()[:20]
    return _Shipment(path.name, wheel, pins, digest)


def _opening(shipment: _Shipment, home: str, python: str) -> tuple[list[str], bytes]:
    """The command, and the script that it reads: shells of all kinds pass such a short one on."""
    values = {
        "version": _VERSION,
        "digest": shipment.digest,
        "wheel": shipment.name,
        "size": str(len(shipment.wheel)),
        "pins": shipment.pins,
        "python": python,
    }
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in values.items()]
    lines.append(f"{set_home(home)}\n")
    script = f"printf '{PRINTED_MARKER}'\n{''.join(lines)}{_SCRIPT.read_text()}".encode()
    return ["sh", "-c", f'eval "$(head -c {len(script)})"'], script


async def _until_ready(remote: Remote, wire: ExecWire, shipment: _Shipment) -> dict[str, str]:
    """Answer the script until the environment is there."""
    while True:
        word, _, rest = (await read_line(wire)).partition(" ")
        match word:
            case "wheel":
                tell("installing the worker there, once for this version")
                with suppress(LinkError):  # its last line says why
                    await wire.send([shipment.wheel])
            case "packages":
                name, _, libc = rest.partition(" ")
                tell("it has no index of packages: collecting them here")
                with suppress(LinkError):
                    await _send_packages(wire, shipment, packages.Platform(name, libc))
            case "ready":
                return {"home": rest, "python": f"{rest}/sdk/{shipment.digest}/bin/python"}
            case "fail":
                kind, _, detail = rest.partition(" ")
                what, hint = _FAILURES.get(kind, (f"failed ({kind})", "Try again."))
                said = f": {detail.strip()}" if detail.strip() else ""
                what, hint = (text.replace("{version}", _VERSION) for text in (what, hint))
                raise ProviderError(f"{remote.where} {what}{said}.", hint=hint)
            case _:
                raise LinkError(f"It said {word[:80]!r}.")


async def _send_packages(wire: Wire, shipment: _Shipment, platform: packages.Platform) -> None:
    """What an index could not give."""
    with tempfile.TemporaryDirectory(prefix="mlinfra-") as folder:
        tree, wheel = Path(folder) / "tree.tar.gz", Path(folder) / shipment.name
        wheel.write_bytes(shipment.wheel)

        def write() -> None:
            with open(tree, "wb") as file:
                packages.write_tree(wheel, platform, file)

        await anyio.to_thread.run_sync(write)
        size = tree.stat().st_size
        with open(tree, "rb") as file:
            await wire.send([f"{size}\n".encode()])
            while chunk := await anyio.to_thread.run_sync(file.read, _CHUNK):
                await wire.send([chunk])
                share = f"{format_size(file.tell())} of {format_size(size)}"
                tell(f"sending the worker's packages: {share}")

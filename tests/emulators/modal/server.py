"""The emulator in a thread of its own, so that clients may block."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from grpclib.server import Server
from modal_proto import api_pb2
from modal_proto.api_grpc import ModalClientBase
from modal_proto.task_command_router_grpc import TaskCommandRouterBase

from emulators.modal import bills
from emulators.modal.box import Box
from emulators.modal.control import Control
from emulators.modal.faults import Faults
from emulators.modal.router import Router
from emulators.modal.service import implement
from emulators.modal.world import TOKEN, World

T = TypeVar("T")
_Result = api_pb2.GenericResult


class Emulator:
    """What a test holds. All methods may be called from any thread but the emulator's own."""

    def __init__(self, world: World, calls: Counter[str], loop: asyncio.AbstractEventLoop) -> None:
        self._world = world
        self._loop = loop
        self.calls = calls
        """How often each method was called."""

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that send a client here."""
        return {
            "MODAL_SERVER_URL": self._world.url,
            "MODAL_TOKEN_ID": TOKEN[0],
            "MODAL_TOKEN_SECRET": TOKEN[1],
            "MODAL_LOGLEVEL": "ERROR",
            "SSL_CERT_FILE": str(self._world.tunnels.authority),
        }

    @property
    def faults(self) -> Faults:
        """What goes wrong from now on."""
        return self._world.faults

    def heal(self) -> None:
        """Switch all faults off."""
        self._world.faults = Faults()
        self._world.tunnels.closed = False
        self._loop.call_soon_threadsafe(self._world.capacity.set)

    @property
    def rates(self) -> dict[str, str]:
        """The account's billing rates."""
        return self._world.rates

    def add_secret(self, name: str, values: dict[str, str]) -> None:
        """A secret that the user has made before."""
        secret_id = self._world.new_id("st")
        self._world.secrets[secret_id] = values
        self._world.named_secrets[name] = secret_id

    def image_lines(self, box: Box) -> list[str]:
        """The commands that the image of a sandbox is built by."""
        return self._world.image_lines(box.definition.image_id)

    def volume(self, name: str) -> Path:
        """The folder of a volume."""
        return next(it.folder for it in self._world.volumes.values() if it.name == name)

    def boxes(self) -> list[Box]:
        """Sandboxes that have not ended, the newest last."""
        return [box for box in list(self._world.boxes.values()) if not box.ended.is_set()]

    def all_boxes(self) -> list[Box]:
        """Sandboxes, also those that have ended, the newest last."""
        return list(self._world.boxes.values())

    def billed(self, key: str) -> float:
        """USD that all sandboxes of this tag have cost so far."""
        boxes = [box for box in list(self._world.boxes.values()) if key in box.tags.values()]
        return float(sum(bills.billed(box, self._world.rates) for box in boxes))

    def wait_ended(self, box: Box, timeout: float = 60) -> None:
        """Wait for the end of a sandbox."""

        async def wait() -> None:
            await asyncio.wait_for(box.ended.wait(), timeout)

        self._run(wait())

    def preempt(self, box: Box) -> None:
        """Take the machine away; returns when all its processes are gone."""

        async def preempt() -> None:
            box.end(_Result.GENERIC_STATUS_INTERNAL_FAILURE, "the worker was preempted", 1)
            await box.ended.wait()

        self._run(preempt())

    def cut_execs(self, box: Box, word: str) -> int:
        """Kill the running commands that have this word; gives their number."""

        async def cut() -> int:
            count = 0
            for process in box.execs.values():
                if not process.ended.is_set() and word in " ".join(process.argv):
                    process.kill()
                    count += 1
            return count

        return self._run(cut())

    def cut_tunnels(self, *, closed: bool = False) -> int:
        """End all connections through tunnels; gives their number. With ``closed`` no more can be
        made."""

        async def cut() -> int:
            self._world.tunnels.closed = closed
            return self._world.tunnels.cut()

        return self._run(cut())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


@contextmanager
def emulator() -> Iterator[Emulator]:
    """A service for as long as the block runs; then every process of it has ended."""
    folder = Path(tempfile.mkdtemp(prefix="modal-"))
    ready: list[Emulator] = []
    failed: list[BaseException] = []
    up, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        world, calls = World(folder), Counter[str]()
        control = Control(world)
        server = Server(
            [
                implement(ModalClientBase, control, calls, control.admit, world.disturbed),
                implement(
                    TaskCommandRouterBase, Router(world), calls, lambda *_: None, world.disturbed
                ),
            ]
        )
        await world.blocks.start()
        await server.start("127.0.0.1", 0)
        port = server._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        world.url = f"http://127.0.0.1:{port}"
        ready.append(Emulator(world, calls, asyncio.get_running_loop()))
        up.set()
        await stop.wait()
        await world.close()
        server.close()
        await server.wait_closed()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            failed.append(error)
        finally:
            up.set()

    thread = threading.Thread(target=run, name="modal emulator", daemon=True)
    thread.start()
    up.wait()
    try:
        if not ready:
            raise failed[0]
        yield ready[0]
    finally:
        if ready:
            ready[0]._loop.call_soon_threadsafe(stop.set)
        thread.join()
        shutil.rmtree(folder, ignore_errors=True)
    if failed:
        raise failed[0]

"""What the agents of running machines say of themselves, asked over a connection to each that is
kept while somebody looks. Providers are asked only about a machine that does not answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TypeVar

from mlinfra_sdk import paths, providers
from mlinfra_sdk.errors import LinkClosed, LinkError, MlinfraError
from mlinfra_sdk.ledger import Machine
from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.providers.base import Handle
from mlinfra_sdk.worker import messages as m
from mlinfra_sdk.worker.usage import Usage

T = TypeVar("T")

EVERY = 2.0
"""Seconds between two questions to an agent."""
_PATIENCE = 15.0
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 60.0
_SAMPLES = 60


class Observer:
    """One machine's agent. ``changed`` is called after each answer, ``lost`` when none comes."""

    def __init__(
        self,
        machine: Machine,
        changed: Callable[[], None],
        lost: Callable[[], Awaitable[None]],
        log: logging.Logger,
    ) -> None:
        self.machine = machine
        self.latest: m.Observed | None = None
        self.at = 0.0
        """When that came."""
        self.usage: deque[Usage] = deque(maxlen=_SAMPLES)
        self.problem = ""
        """Why it does not answer."""
        self._changed = changed
        self._lost = lost
        self._log = log
        self._client: AgentClient | None = None
        self._connecting = asyncio.Lock()
        self._closed = False
        self._task = asyncio.ensure_future(self._observe())

    async def _observe(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            try:
                client = await self.client()
                while True:
                    observed = await ask(client, m.Observe(client.next_id()), m.Observed)
                    self.latest, self.at = observed, time.time()
                    self.problem, pause = "", _FIRST_PAUSE
                    if observed.usage is not None:
                        self.usage.append(observed.usage)
                    self._changed()
                    await asyncio.sleep(EVERY)
            except (MlinfraError, OSError) as error:
                self.problem = str(error) or "It does not answer."
                self.latest = None
            except Exception as error:  # a third party's provider must not end the others
                self._log.exception("The machine %s cannot be observed", self.machine.name)
                self.problem, self.latest = f"{type(error).__name__}: {error}", None
            self._disconnect()
            self._changed()
            await self._lost()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def client(self) -> AgentClient:
        """A connection to the agent. Raises :class:`MlinfraError` if there can be none."""
        async with self._connecting:
            client = self._client
            if client is None or client.closed is not None:
                client = self._client = await asyncio.to_thread(_connect, self.machine)
                if self._closed:  # meanwhile
                    self._disconnect()
            return client

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def close(self) -> None:
        """Look no longer."""
        self._closed = True
        self._task.cancel()
        self._disconnect()


class Observers:
    """One for each machine that runs."""

    def __init__(
        self,
        changed: Callable[[], None],
        lost: Callable[[], Awaitable[None]],
        log: logging.Logger,
    ) -> None:
        self._changed, self._lost, self._log = changed, lost, log
        self._by_id: dict[str, Observer] = {}

    def follow(self, machines: Iterable[Machine]) -> None:
        """Observe these, as far as they have started, and no others."""
        wanted = {it.id: it for it in machines if it.handle and it.started_at is not None}
        for gone in self._by_id.keys() - wanted.keys():
            self._by_id.pop(gone).close()
        for machine_id, machine in wanted.items():
            if machine_id not in self._by_id:
                self._by_id[machine_id] = Observer(machine, self._changed, self._lost, self._log)

    def get(self, machine_id: str) -> Observer | None:
        """That of a machine which is followed."""
        return self._by_id.get(machine_id)

    @asynccontextmanager
    async def client(self, machine: Machine) -> AsyncIterator[AgentClient]:
        """A connection to a machine's agent, whether that is followed or not. Raises
        :class:`MlinfraError`."""
        observer = self._by_id.get(machine.id)
        if observer is not None:
            yield await observer.client()
            return
        async with self.own_client(machine) as client:
            yield client

    @asynccontextmanager
    async def own_client(self, machine: Machine) -> AsyncIterator[AgentClient]:
        """A connection for one purpose. Raises :class:`MlinfraError`."""
        client = await asyncio.to_thread(_connect, machine)
        try:
            yield client
        finally:
            client.close()

    def close(self) -> None:
        """Observe none."""
        self.follow(())


async def ask(client: AgentClient, request: m.AnyRequest, kind: type[T]) -> T:
    """The answer to a request. Raises :class:`MlinfraError`."""
    return m.decode_as(kind, await tell(client, request))


async def tell(client: AgentClient, request: m.AnyRequest) -> bytes:
    """Have a request done. Raises :class:`MlinfraError`."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(client.send(request)), _PATIENCE)
    except asyncio.TimeoutError:
        raise LinkError(f"The machine did not answer within {_PATIENCE:g} s.") from None


def _connect(machine: Machine) -> AgentClient:
    handle = Handle.from_json(machine.handle)
    provider = providers.of(handle)

    async def check() -> None:
        status = await provider.status(handle)
        if not status.alive:
            raise LinkClosed(f"The machine {machine.name} has ended: {status.reason}.")

    store = ChunkStore(paths.data_dir() / "store")
    secret = portal().call(provider.secret(handle))
    return AgentClient.open(
        portal(), lambda: provider.connect(handle), secret, store, _PATIENCE, check
    )

"""What every backend must do, as tests to be inherited; see docs/writing-a-provider.md.

>>> class TestMine(ProviderSuite):
...     on = "mine:somewhere"

The tests need pytest or any runner that calls methods named ``test_...``; they start about a
dozen machines, one after the other, and stop them.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import anyio

from mlinfra_sdk import providers, spec
from mlinfra_sdk.errors import LinkError, MlinfraError
from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.paths import data_dir
from mlinfra_sdk.providers.base import Handle, Provider
from mlinfra_sdk.providers.remote import ExecProvider
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request
from mlinfra_sdk.worker import messages as m

T = TypeVar("T")

_LARGE = 100_000_000
_BLOCK = 1 << 20
_CANCELLED_AFTER = (0.01, 0.3, 1.0)
"""Seconds; wherever in its launch that hits a backend, nothing may be left."""

_ANOTHER_PROCESS = """
import sys
from mlinfra_sdk.providers.base import Handle
from mlinfra_sdk.testing import described
print(described(Handle.from_json(sys.argv[1])).started)
"""


class ProviderSuite:
    """The tests of one backend. Set ``on``; raise ``patience`` for slow ones."""

    on: str
    """What a user would write; a target of the settings or a provider with its argument."""
    settings: ClassVar[Mapping[str, object]] = {}
    """More settings, such as ``isolate``."""
    patience: float = 60.0
    """Seconds within which a machine that has reached a limit must be gone."""

    @contextmanager
    def broken(self) -> Iterator[None]:
        """Override it with what makes launches fail after they have begun: a full disk, a quota,
        an image that is not there."""
        raise NotImplementedError
        yield

    # -- means ---------------------------------------------------------------------------------

    def request(self, **more: object) -> Request:
        """The request of a test; files and packages of who runs it stay where they are."""
        always = {"on": self.on, "idle": "5m", "sync": "no", "env": "none"}
        values: dict[str, object] = {**always, **self.settings, **more}
        layer = spec.parse(values, place=spec.NOTEBOOK, origin="the conformance suite")
        return spec.resolve([layer]).request

    @property
    def provider(self) -> Provider:
        return providers.load(self.on)

    async def launched(self, key: str, **more: object) -> Handle:
        """A machine by the cheapest offer."""
        request = self.request(**more)
        offers = await self.provider.offers(request)
        return await self.provider.launch(offers[0], request, key)

    @contextmanager
    def machine(self, **more: object) -> Iterator[Handle]:
        """A machine that is stopped at the end."""
        handle = run(self.launched(_key(), **more))
        try:
            yield handle
        finally:
            run(self.provider.stop(handle))

    def keys(self) -> set[str]:
        """What the provider itself says is there."""
        return {handle.key for handle in run(self.provider.list())}

    # -- tests ---------------------------------------------------------------------------------

    def test_offers_have_a_price_with_its_source(self) -> None:
        for offer in run(self.provider.offers(self.request())):
            if offer.price.known:
                assert offer.price.source and offer.price.date
            assert offer.price.micro_per_hour >= 0

    def test_it_is_there_until_it_is_stopped_also_twice(self) -> None:
        """By what ``list`` says, too: whoever launched it may have died before he knew more."""
        with self.machine() as handle:
            (found,) = (it for it in run(self.provider.list()) if it.key == handle.key)
            for known in (handle, found):
                assert run(providers.of(known).status(known)).alive
            run(providers.of(found).stop(found))
            for known in (handle, found):
                assert not run(providers.of(known).status(known)).alive
            assert handle.key not in self.keys()
            run(self.provider.stop(handle))

    def test_its_handle_is_plain_and_holds_no_secret(self) -> None:
        with self.machine() as handle:
            text = handle.to_json()
            assert Handle.from_json(text) == handle
            secret = run(self.provider.secret(handle))
            assert len(secret) >= 16
            for written in (secret.hex(), repr(secret)[2:-1]):
                assert written not in text

    def test_another_process_finds_it_by_its_handle(self) -> None:
        with self.machine() as handle:
            here = described(handle)
            found = subprocess.run(
                [sys.executable, "-c", _ANOTHER_PROCESS, handle.to_json()],
                capture_output=True,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            assert found.returncode == 0, found.stderr
            assert float(found.stdout) == here.started

    def test_two_at_once_are_two_and_one_key_is_one(self) -> None:
        one, other = _key(), _key()
        handles: list[Handle] = []

        async def launch(key: str) -> None:
            handles.append(await self.launched(key))

        async def all_of_them() -> None:
            async with anyio.create_task_group() as tasks:
                for key in (one, other, one):
                    tasks.start_soon(launch, key)

        try:
            run(all_of_them())
            assert {one, other} <= self.keys()
            secrets = {run(self.provider.secret(handle)) for handle in handles}
            assert len(secrets) == 2, "the second launch of a key has made another machine"
            assert len({described(handle).started for handle in handles}) == 2
        finally:
            for handle in handles:
                run(self.provider.stop(handle))
        assert not self.keys() & {one, other}

    def test_a_cancelled_launch_leaves_nothing(self) -> None:
        async def cancelled(key: str, after: float) -> Handle | None:
            with anyio.move_on_after(after):
                return await self.launched(key)
            return None

        for after in _CANCELLED_AFTER:
            key = _key()
            handle = run(cancelled(key, after))
            if handle is not None:  # it was quicker
                run(self.provider.stop(handle))
            assert key not in self.keys()

    def test_a_failed_launch_leaves_nothing_and_says_why(self) -> None:
        key = _key()
        with self.broken():
            try:
                run(self.launched(key))
            except (MlinfraError, OSError) as error:
                assert str(error)
            else:
                raise AssertionError("the launch went well")
        assert key not in self.keys()

    def test_it_ends_at_its_deadline_without_any_client(self) -> None:
        with self.machine(time="2s") as handle:
            end = time.monotonic() + self.patience
            while run(self.provider.status(handle)).alive:
                assert time.monotonic() < end, "it lives on behind its deadline"
                time.sleep(0.2)
            assert handle.key not in self.keys()

    def test_large_values_arrive_unharmed_both_ways(self) -> None:
        payload = os.urandom(_LARGE)
        with self.session() as session:
            session.push(payload=payload)
            session.run("import hashlib; digest = hashlib.sha256(payload).hexdigest()")
            assert session.namespace["digest"] == hashlib.sha256(payload).hexdigest()
            session.run("back = payload[::-1]; del payload")
            assert session.pull("back") == payload[::-1]

    def test_commands_have_binary_streams(self) -> None:
        """Backends with ``exec``: 100 MB to a command's stdin come back from its stdout."""
        provider = self.provider
        if not isinstance(provider, ExecProvider):
            return
        with self.machine() as handle:
            remote = provider.remote(handle.data)
            sent, back = run(echoed(lambda: remote.exec(["cat"]), _LARGE))
            assert sent == back

    def test_a_session_stops_its_machine(self) -> None:
        with self.session() as session:
            session.run("x = 6 * 7")
            assert session.namespace["x"] == 42
            assert session.machine is not None
            key = session.machine.id
            assert key in self.keys()
        assert key not in self.keys()

    def session(self) -> Session:
        """A session on a machine of its own."""
        return Session(namespace={}, request=self.request())


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a provider's coroutine where it runs in use."""
    return portal().call(coroutine)


def described(handle: Handle) -> m.AgentInfo:
    """Connect to a machine's agent and have it say who it is."""
    provider = providers.of(handle)
    client = AgentClient.open(
        portal(),
        lambda: provider.connect(handle),
        run(provider.secret(handle)),
        ChunkStore(data_dir() / "store"),
    )
    try:
        return client.ask(m.Describe(client.next_id()), m.AgentInfo)
    finally:
        client.close()


async def echoed(start: Callable[[], Coroutine[Any, Any, Any]], size: int) -> tuple[bytes, bytes]:
    """Digests of random bytes sent to a command that echoes them, and of what came back."""
    sent, back = hashlib.sha256(), hashlib.sha256()
    wire = await start()

    async def send() -> None:
        block = os.urandom(_BLOCK)
        for offset in range(0, size, _BLOCK):
            data = block[: min(_BLOCK, size - offset)]
            sent.update(data)
            await wire.send([data])

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            space, missing = memoryview(bytearray(_BLOCK)), size
            while missing:
                count = await wire.receive_into(space[: min(_BLOCK, missing)])
                if not count:
                    raise LinkError(f"It ended {missing} bytes too early. {wire.complaint()}")
                back.update(space[:count])
                missing -= count
    finally:
        await wire.aclose()
    return sent.digest(), back.digest()


def _key() -> str:
    return uuid.uuid4().hex

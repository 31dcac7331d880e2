"""A machine's workspaces over an agent's client."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.machines.moves import Move
from mlinfra_sdk.objects.bulk import Source
from mlinfra_sdk.sync import messages
from mlinfra_sdk.worker import messages as m

T = TypeVar("T")


class AgentFiles:
    """The :class:`mlinfra_sdk.sync.workspace.Peer` of an agent."""

    def __init__(self, client: AgentClient) -> None:
        self._client = client

    def _request(self, message: messages.AnyMessage) -> m.Files:
        return m.Files(self._client.next_id(), messages.encode(message))

    def ask(self, message: messages.AnyMessage, kind: type[T]) -> T:
        """Send a message and wait for its answer."""
        return self._client.ask(self._request(message), kind)

    def begin(self, message: messages.AnyMessage, kind: type[T]) -> Future[T]:
        """Send a message; the answer comes later."""
        answer: Future[T] = Future()

        def take(encoded: Future[bytes]) -> None:
            try:
                result = m.decode_as(kind, encoded.result())
            except Exception as error:
                answer.set_exception(error)
            else:
                answer.set_result(result)

        self._client.send(self._request(message)).add_done_callback(take)
        return answer

    def upload(
        self, digests: list[bytes], source: Source, expect: messages.Expect | None = None
    ) -> Move:
        """Begin to send those of the chunks that the machine lacks; over when it has them.
        ``expect`` tells it what large files they belong to."""
        if not digests:
            return Move()
        question = m.Missing(self._client.next_id(), digests)
        return self._client.begin_upload(self._request(expect) if expect else question, source)

    def download(self, digests: list[bytes], progress: Callable[[int, int], None]) -> None:
        """Bring chunks into the local store."""
        self._client.download(digests, progress)

"""From classes with a method for each call to services that gRPC can serve."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from grpclib import GRPCError, Status
from grpclib.server import Stream

T = TypeVar("T")


def streaming(method: T) -> T:
    """Mark a method that is given the stream to answer on, after the first request."""
    method.streaming = True  # type: ignore[attr-defined]
    return method


def implement(
    base: type,
    methods: object,
    calls: Counter[str],
    admit: Callable[[str, Any], None],
    disturbed: Callable[[str], str],
) -> Any:
    """An instance of the generated ``base`` that answers with ``methods``.

    Each takes the request and the metadata and returns the answer. ``admit`` sees every call
    first and may refuse it. ``disturbed`` says how a call goes wrong: ``before`` it is done,
    ``after`` it, or ``twice`` is how often it is done; empty if it does not.
    """

    def answer(name: str) -> Any:
        method = getattr(methods, name, None)

        async def handle(_self: object, stream: Stream[Any, Any]) -> None:
            calls[name] += 1
            if method is None:
                raise GRPCError(Status.UNIMPLEMENTED, f"The emulator does not speak {name}")
            metadata = stream.metadata or {}
            admit(name, metadata)
            request = await stream.recv_message()
            if hasattr(method, "streaming"):
                await method(request, metadata, stream)
                return
            fault = disturbed(name)
            if fault == "before":
                raise GRPCError(Status.UNAVAILABLE, "it took too long, and was not done")
            reply = await method(request, metadata)
            if fault == "twice":  # the network delivers a call again
                with suppress(GRPCError):
                    await method(request, metadata)
            if fault == "after":
                raise GRPCError(Status.UNAVAILABLE, "it took too long, but was done")
            await stream.send_message(reply)

        return handle

    names = base.__abstractmethods__  # type: ignore[attr-defined]
    unknown = {name for name in vars(type(methods)) if name[0].isupper()} - set(names)
    if unknown:
        raise TypeError(f"{base.__name__} has no {', '.join(sorted(unknown))}")
    return type(type(methods).__name__, (base,), {name: answer(name) for name in names})()

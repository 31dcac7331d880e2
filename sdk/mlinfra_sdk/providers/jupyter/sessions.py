"""Our kernel on a Jupyter Server: found by its session's name, made when it is needed."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, TypeVar

import anyio
import msgspec

from mlinfra_sdk.errors import LinkError, ProviderError
from mlinfra_sdk.providers.jupyter.server import KernelGone, Server

SESSION = "mlinfra"
"""What the session is called in the server's list of running kernels."""
_START_WITHIN = 120.0
_UNUSED_WITHIN = 3.0
_LOOK_EVERY = 0.1


T = TypeVar("T")


class _Kernel(msgspec.Struct):
    id: str
    connections: int = 0


class _Session(msgspec.Struct):
    id: str
    name: str = ""
    type: str = ""
    kernel: _Kernel | None = None


class _Spec(msgspec.Struct):
    language: str = ""


class _NamedSpec(msgspec.Struct):
    spec: _Spec


class _Specs(msgspec.Struct):
    default: str
    kernelspecs: dict[str, _NamedSpec]


class Sessions:
    """The sessions of one server. ``wanted`` is the kernel to start, if it is known."""

    def __init__(self, server: Server, wanted: str = "") -> None:
        self._server = server
        self._wanted = wanted

    async def kernel(self) -> str:
        """The id of our kernel."""
        found = await self._ours()
        if found is None:
            body = {
                "name": SESSION,
                "path": SESSION,
                "type": SESSION,
                "kernel": {"name": await self.python_kernel()},
            }
            made = await self._server.ask("POST", "api/sessions", body, _START_WITHIN)
            found = self._read(made, _Session)
        if found.kernel is None:
            raise ProviderError(f"The server at {self._server.url} has started no kernel.")
        return found.kernel.id

    async def python_kernel(self) -> str:
        """The name of the kernel to start. Raises :class:`ProviderError` if there is no Python."""
        specs = self._read(await self._server.ask("GET", "api/kernelspecs"), _Specs)
        names = [specs.default, *sorted(specs.kernelspecs)]
        if self._wanted:
            names = [self._wanted]
        for name in names:
            spec = specs.kernelspecs.get(name)
            if spec is not None and spec.spec.language.lower() == "python":
                return name
        what = f"Python kernel {self._wanted!r}" if self._wanted else "Python kernel"
        raise ProviderError(
            f"The server at {self._server.url} has no {what}.",
            hint=f"It has {', '.join(sorted(specs.kernelspecs)) or 'none'}: install ipykernel.",
        )

    async def release(self) -> None:
        """End our kernel, unless a websocket is open to it: ours may take a moment to close."""
        with anyio.move_on_after(_UNUSED_WITHIN):
            while True:
                found = await self._ours()
                if found is None:
                    return
                if found.kernel is None or not found.kernel.connections:
                    with suppress(KernelGone):  # somebody else was quicker
                        await self._server.ask("DELETE", f"api/sessions/{found.id}")
                    return
                await anyio.sleep(_LOOK_EVERY)

    async def _ours(self) -> _Session | None:
        sessions = self._read(await self._server.ask("GET", "api/sessions"), list[_Session])
        return next((it for it in sessions if it.name == it.type == SESSION), None)

    def _read(self, answer: Any, kind: type[T]) -> T:
        try:
            return msgspec.convert(answer, kind)
        except msgspec.ValidationError as error:
            raise LinkError(
                f"The server at {self._server.url} did not answer as a Jupyter Server: {error}."
            ) from None

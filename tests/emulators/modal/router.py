"""The task command router: commands in sandboxes, and their streams."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from grpclib import Status
from modal_proto import task_command_router_pb2 as pb

from emulators.modal.box import Box
from emulators.modal.process import Gone, Output, Process
from emulators.modal.service import streaming
from emulators.modal.world import World, refused

_STDOUT = 0


class Router:
    """Methods of the service; each is given the request and the call's metadata."""

    def __init__(self, world: World) -> None:
        self._world = world

    def _box(self, request: Any, metadata: Any) -> Box:
        self._world.admit(metadata.get("authorization", ""), request.task_id)
        return self._world.of_task(request.task_id)

    def _process(self, request: Any, metadata: Any) -> tuple[Box, Process]:
        box = self._box(request, metadata)
        try:
            return box, box.execs[request.exec_id]
        except KeyError:
            raise refused(Status.NOT_FOUND, f"exec {request.exec_id} not found") from None

    async def TaskExecStart(self, request: Any, metadata: Any) -> pb.TaskExecStartResponse:
        box = self._box(request, metadata)
        if not request.command_args or request.container_id:
            raise refused(Status.INVALID_ARGUMENT, "a command is needed; there are no sidecars")
        env: dict[str, str] = {}
        for source in request.secret_sources:
            if source.WhichOneof("source") == "env":
                env.update(source.env.contents)
            elif source.secret_id in self._world.secrets:
                env.update(self._world.secrets[source.secret_id])
            else:
                raise refused(Status.NOT_FOUND, f"Secret {source.secret_id} not found")
        try:
            await box.exec(
                request.exec_id,
                list(request.command_args),
                env,
                request.workdir,
                request.timeout_secs,
            )
        except ValueError as error:
            raise refused(Status.INVALID_ARGUMENT, str(error)) from None
        return pb.TaskExecStartResponse()

    @streaming
    async def TaskExecStdioRead(self, request: Any, metadata: Any, stream: Any) -> None:
        _, process = self._process(request, metadata)
        output = process.stdout if request.file_descriptor == _STDOUT else process.stderr
        await self._send(output, request.offset, stream, pb.TaskExecStdioReadResponse)

    async def _send(self, output: Output, offset: int, stream: Any, kind: Any) -> None:
        faults = self._world.faults
        try:
            async for data in output.read(offset):
                if 0 < faults.cut_after < len(data):
                    data, faults.cut_after = data[: faults.cut_after], 0
                    await stream.send_message(kind(data=data))
                    raise refused(Status.UNAVAILABLE, "the stream was cut")
                await stream.send_message(kind(data=data))
        except Gone:
            raise refused(Status.OUT_OF_RANGE, "this output is not kept any more") from None

    async def TaskExecStdinWrite(
        self, request: Any, metadata: Any
    ) -> pb.TaskExecStdinWriteResponse:
        box, process = self._process(request, metadata)
        await self._write(box, process, request)
        return pb.TaskExecStdinWriteResponse()

    async def _write(self, box: Box, process: Process, request: Any) -> None:
        box.touched = time.monotonic()
        try:
            await process.write(request.offset, request.data, request.eof)
        except Gone:
            raise refused(Status.OUT_OF_RANGE, "input before this offset is missing") from None

    async def TaskExecWait(self, request: Any, metadata: Any) -> pb.TaskExecWaitResponse:
        box, process = self._process(request, metadata)
        waits = [asyncio.create_task(it.ended.wait()) for it in (process, box)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if process.returncode is None:
            raise refused(Status.NOT_FOUND, "Sandbox has already finished")
        return _ended(process, pb.TaskExecWaitResponse)

    async def TaskExecPoll(self, request: Any, metadata: Any) -> pb.TaskExecPollResponse:
        _, process = self._process(request, metadata)
        if process.returncode is None:
            return pb.TaskExecPollResponse()
        return _ended(process, pb.TaskExecPollResponse)

    # -- the entrypoint of V2 sandboxes ------------------------------------------------------

    def _main(self, request: Any, metadata: Any) -> tuple[Box, Process]:
        box = self._box(request, metadata)
        if box.main is None:
            raise refused(Status.FAILED_PRECONDITION, "this sandbox has no entrypoint")
        return box, box.main

    @streaming
    async def SandboxStdioReadV2(self, request: Any, metadata: Any, stream: Any) -> None:
        _, process = self._main(request, metadata)
        stdout = request.file_descriptor == pb.SANDBOX_STDIO_FILE_DESCRIPTOR_STDOUT
        output = process.stdout if stdout else process.stderr
        offset = request.offset

        def response(data: bytes) -> pb.SandboxStdioReadV2Response:
            nonlocal offset
            answer = pb.SandboxStdioReadV2Response(data=data, starting_offset=offset)
            offset += len(data)
            return answer

        await self._send(output, request.offset, stream, response)

    async def SandboxStdinWriteV2(self, request: Any, metadata: Any) -> Any:
        box, process = self._main(request, metadata)
        await self._write(box, process, request)
        return pb.SandboxStdinWriteV2Response()

    async def SandboxWaitUntilReady(self, request: Any, metadata: Any) -> Any:
        self._box(request, metadata)
        return pb.SandboxWaitUntilReadyTcrResponse()

    async def TaskReloadVolumes(self, request: Any, metadata: Any) -> Any:
        self._box(request, metadata)
        return pb.TaskReloadVolumesResponse()


def _ended(process: Process, kind: Any) -> Any:
    assert process.returncode is not None
    if process.returncode < 0:
        return kind(signal=-process.returncode)
    return kind(code=process.returncode)

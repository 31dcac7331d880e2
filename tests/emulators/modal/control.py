"""The control plane: apps, images, secrets, sandboxes and billing rates."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from google.protobuf.empty_pb2 import Empty
from grpclib import Status
from modal_proto import api_pb2

from emulators.modal import bills
from emulators.modal.box import Box
from emulators.modal.service import streaming
from emulators.modal.volumes_calls import VolumeCalls
from emulators.modal.world import TOKEN, World, make_jwt, refused

_Result = api_pb2.GenericResult
_CREATE = {
    api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING,
    api_pb2.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS,
}
_EPHEMERAL = {
    api_pb2.OBJECT_CREATION_TYPE_ANONYMOUS_OWNED_BY_APP,
    api_pb2.OBJECT_CREATION_TYPE_EPHEMERAL,
}


class Control(VolumeCalls):
    """Methods of the service; each is given the request and the call's metadata."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._replies: dict[str, asyncio.Future[Any]] = {}

    def admit(self, name: str, metadata: Any) -> None:
        """Check the token that comes with every call, and switch on faults."""
        faults = self._world.faults
        if faults.unavailable.get(name, 0) > 0:
            faults.unavailable[name] -= 1
            raise refused(Status.UNAVAILABLE, "the service is not available")
        token = (metadata.get("x-modal-token-id"), metadata.get("x-modal-token-secret"))
        if token != TOKEN:
            raise refused(Status.UNAUTHENTICATED, "Token ID is malformed or unknown")

    def _check_auth_token(self, metadata: Any) -> None:
        if not metadata.get("x-modal-auth-token"):
            raise refused(Status.UNAUTHENTICATED, "an auth token is needed for this call")

    async def ClientHello(self, request: Any, metadata: Any) -> api_pb2.ClientHelloResponse:
        return api_pb2.ClientHelloResponse(image_builder_version="2025.06")

    async def AuthTokenGet(self, request: Any, metadata: Any) -> api_pb2.AuthTokenGetResponse:
        return api_pb2.AuthTokenGetResponse(token=make_jwt({"exp": int(time.time()) + 1200}))

    async def WorkspaceNameLookup(self, request: Any, metadata: Any) -> Any:
        return api_pb2.WorkspaceNameLookupResponse(workspace_name="emulated", username="tester")

    async def WorkspaceBillingRates(self, request: Any, metadata: Any) -> Any:
        return api_pb2.WorkspaceBillingRatesResponse(rates=self._world.rates)

    @streaming
    async def WorkspaceBillingReport(self, request: Any, metadata: Any, stream: Any) -> None:
        world = self._world
        boxes = list(world.boxes.values())
        for row in bills.report(boxes, world.rates, request, world.faults.billed_earlier):
            await stream.send_message(row)

    async def SandboxGetStats(self, request: Any, metadata: Any) -> Any:
        box = self._world.box(request.sandbox_id)
        now = time.time()
        ran = 0.0 if box.began is None else (box.over or now) - box.began
        answer = api_pb2.SandboxGetStatsResponse(duration_hours=ran / 3600)
        ahead = self._world.faults.clock_ahead
        answer.since.FromNanoseconds(int(((box.began or box.created) + ahead) * 1e9))
        answer.until.FromNanoseconds(int((now + ahead) * 1e9))
        return answer

    async def EnvironmentGetOrCreate(self, request: Any, metadata: Any) -> Any:
        settings = api_pb2.EnvironmentSettings(image_builder_version="2025.06")
        return api_pb2.EnvironmentGetOrCreateResponse(
            environment_id="en-1",
            metadata=api_pb2.EnvironmentMetadata(name="main", settings=settings),
        )

    async def AppGetOrCreate(self, request: Any, metadata: Any) -> api_pb2.AppGetOrCreateResponse:
        apps = self._world.apps
        if request.app_name not in apps:
            if request.object_creation_type not in _CREATE:
                raise refused(Status.NOT_FOUND, f"App '{request.app_name}' not found")
            apps[request.app_name] = self._world.new_id("ap")
        return api_pb2.AppGetOrCreateResponse(app_id=apps[request.app_name])

    # -- images ------------------------------------------------------------------------------

    async def ImageGetOrCreate(self, request: Any, metadata: Any) -> Any:
        world = self._world
        for base in request.image.base_images:
            if base.image_id not in world.images:
                raise refused(Status.NOT_FOUND, f"Image {base.image_id} not found")
        key = request.image.SerializeToString(deterministic=True)
        if world.faults.image_log:
            return api_pb2.ImageGetOrCreateResponse(image_id=world.new_id("im"))
        same = (
            image_id
            for image_id, known in world.images.items()
            if known.SerializeToString(deterministic=True) == key
        )
        image_id = next(same, None) or world.new_id("im")
        world.images[image_id] = request.image
        return api_pb2.ImageGetOrCreateResponse(
            image_id=image_id,
            result=_Result(status=_Result.GENERIC_STATUS_SUCCESS),
            metadata=api_pb2.ImageMetadata(image_builder_version="2025.06"),
        )

    @streaming
    async def ImageJoinStreaming(self, request: Any, metadata: Any, stream: Any) -> None:
        log = self._world.faults.image_log
        for number, line in enumerate(log.splitlines(keepends=True)):
            await stream.send_message(
                api_pb2.ImageJoinStreamingResponse(
                    task_logs=[api_pb2.TaskLogs(data=line)], entry_id=str(number + 1)
                )
            )
        failure = _Result.GENERIC_STATUS_FAILURE
        await stream.send_message(
            api_pb2.ImageJoinStreamingResponse(result=_Result(status=failure), eof=True)
        )

    # -- secrets -----------------------------------------------------------------------------

    async def SecretGetOrCreate(self, request: Any, metadata: Any) -> Any:
        world = self._world
        if request.object_creation_type in _EPHEMERAL:
            secret_id = world.new_id("st")
            world.secrets[secret_id] = dict(request.env_dict)
        elif request.deployment_name in world.named_secrets:
            secret_id = world.named_secrets[request.deployment_name]
        else:
            raise refused(Status.NOT_FOUND, f"Secret '{request.deployment_name}' not found")
        return api_pb2.SecretGetOrCreateResponse(secret_id=secret_id)

    # -- sandboxes ---------------------------------------------------------------------------

    async def _once(self, metadata: Any, make: Any) -> Any:
        """A call that is made again with the same idempotency key gets the same answer."""
        key = str(metadata.get("x-idempotency-key") or self._world.new_id("key"))
        if key in self._replies:
            return await asyncio.shield(self._replies[key])
        future = self._replies[key] = asyncio.get_running_loop().create_future()
        try:
            future.set_result(await make())
        except BaseException:
            del self._replies[key]
            raise
        return future.result()

    async def SandboxCreate(self, request: Any, metadata: Any) -> api_pb2.SandboxCreateResponse:
        async def make() -> api_pb2.SandboxCreateResponse:
            tags = {tag.tag_name: tag.tag_value for tag in request.tags}
            box = self._world.create(request.app_id, request.definition, tags, v1=True)
            return api_pb2.SandboxCreateResponse(sandbox_id=box.id, metadata=_handle(box))

        return await self._once(metadata, make)

    async def SandboxCreateV2(self, request: Any, metadata: Any) -> api_pb2.SandboxCreateV2Response:
        self._check_auth_token(metadata)

        async def make() -> api_pb2.SandboxCreateV2Response:
            world = self._world
            tags = {tag.tag_name: tag.tag_value for tag in request.tags}
            definition = request.definition
            for source in request.secret_sources:
                if source.WhichOneof("source") == "env":
                    secret_id = world.new_id("st")
                    world.secrets[secret_id] = dict(source.env.contents)
                    definition.secret_ids.append(secret_id)
                elif source.secret_id not in definition.secret_ids:
                    definition.secret_ids.append(source.secret_id)
            box = world.create(request.app_id, definition, tags, v1=False)
            await _first(box.started, box.ended)
            access = api_pb2.CommandRouterAccess(url=world.url, jwt=world.grant(box.task_id))
            return api_pb2.SandboxCreateV2Response(
                sandbox_id=box.id,
                task_id=box.task_id,
                metadata=_handle(box),
                command_router_access=access,
            )

        return await self._once(metadata, make)

    async def SandboxGetTaskId(self, request: Any, metadata: Any) -> Any:
        box = self._world.box(request.sandbox_id)
        if box.ended.is_set():
            return api_pb2.SandboxGetTaskIdResponse(task_result=box.result)
        task_id = box.task_id if box.started.is_set() else None
        return api_pb2.SandboxGetTaskIdResponse(task_id=task_id)

    SandboxGetTaskIdV2 = SandboxGetTaskId

    async def TaskGetCommandRouterAccess(self, request: Any, metadata: Any) -> Any:
        box = self._world.of_task(request.task_id)
        return api_pb2.TaskGetCommandRouterAccessResponse(
            url=self._world.url, jwt=self._world.grant(box.task_id)
        )

    async def SandboxGetCommandRouterAccess(self, request: Any, metadata: Any) -> Any:
        self._check_auth_token(metadata)
        world = self._world
        by_task = request.WhichOneof("target") == "task_id"
        box = world.of_task(request.task_id) if by_task else world.box(request.sandbox_id)
        world.of_task(box.task_id)
        return api_pb2.SandboxGetCommandRouterAccessResponse(
            url=world.url, jwt=world.grant(box.task_id)
        )

    async def SandboxWait(self, request: Any, metadata: Any) -> api_pb2.SandboxWaitResponse:
        box = self._world.box(request.sandbox_id)
        if request.timeout:
            await asyncio.wait((asyncio.ensure_future(box.ended.wait()),), timeout=request.timeout)
        result = box.result if box.ended.is_set() else None
        return api_pb2.SandboxWaitResponse(result=result, metadata=_handle(box))

    SandboxWaitV2 = SandboxWait

    async def SandboxGetTunnels(self, request: Any, metadata: Any) -> Any:
        box = self._world.box(request.sandbox_id)
        await _first(box.started, box.ended)
        ports = [it.port for it in box.definition.open_ports.ports]
        if not box.tunnels:
            box.tunnels = [await self._world.tunnels.open(port) for port in ports]
        return api_pb2.SandboxGetTunnelsResponse(
            result=_Result(status=_Result.GENERIC_STATUS_SUCCESS), tunnels=box.tunnels
        )

    SandboxGetTunnelsV2 = SandboxGetTunnels

    async def SandboxTerminate(self, request: Any, metadata: Any) -> Any:
        box = self._world.box(request.sandbox_id)
        box.end(_Result.GENERIC_STATUS_TERMINATED)
        return api_pb2.SandboxTerminateResponse(
            existing_result=box.result if box.ended.is_set() else None
        )

    SandboxTerminateV2 = SandboxTerminate

    async def SandboxTagsGet(self, request: Any, metadata: Any) -> api_pb2.SandboxTagsGetResponse:
        return api_pb2.SandboxTagsGetResponse(tags=_tags(self._world.box(request.sandbox_id)))

    SandboxTagsGetV2 = SandboxTagsGet

    async def SandboxTagsSet(self, request: Any, metadata: Any) -> Empty:
        box = self._world.box(request.sandbox_id)
        box.tags = {tag.tag_name: tag.tag_value for tag in request.tags}
        return Empty()

    SandboxTagsSetV2 = SandboxTagsSet

    async def SandboxGetFromName(self, request: Any, metadata: Any) -> Any:
        return self._from_name(request, v1=True)

    async def SandboxGetFromNameV2(self, request: Any, metadata: Any) -> Any:
        self._check_auth_token(metadata)
        return self._from_name(request, v1=False)

    def _from_name(self, request: Any, *, v1: bool) -> api_pb2.SandboxGetFromNameResponse:
        app_id = self._world.apps.get(request.app_name, "")
        box = self._world.named(app_id, request.sandbox_name)
        if box is None or box.v1 is not v1:
            raise refused(Status.NOT_FOUND, f"Sandbox '{request.sandbox_name}' not found")
        return api_pb2.SandboxGetFromNameResponse(sandbox_id=box.id, metadata=_handle(box))

    async def SandboxList(self, request: Any, metadata: Any) -> api_pb2.SandboxListResponse:
        return self._list(request, {True})

    async def SandboxListV2(self, request: Any, metadata: Any) -> api_pb2.SandboxListResponse:
        self._check_auth_token(metadata)
        return self._list(request, {True, False})

    def _list(self, request: Any, kinds: set[bool]) -> api_pb2.SandboxListResponse:
        wanted = {tag.tag_name: tag.tag_value for tag in request.tags}.items()
        boxes = [
            box
            for box in self._world.boxes.values()
            if box.v1 in kinds
            and not box.ended.is_set()
            and request.app_id in ("", box.app_id)
            and wanted <= box.tags.items()
            and (not request.before_timestamp or box.created < request.before_timestamp)
        ]
        boxes.sort(key=lambda box: -box.created)
        return api_pb2.SandboxListResponse(
            sandboxes=[
                api_pb2.SandboxInfo(
                    id=box.id,
                    created_at=box.created,
                    app_id=box.app_id,
                    tags=_tags(box),
                    name=box.definition.name,
                    image_id=box.definition.image_id,
                    metadata=_handle(box),
                )
                for box in boxes
            ]
        )


def _tags(box: Box) -> list[api_pb2.SandboxTag]:
    return [api_pb2.SandboxTag(tag_name=k, tag_value=v) for k, v in box.tags.items()]


def _handle(box: Box) -> api_pb2.SandboxHandleMetadata:
    return api_pb2.SandboxHandleMetadata(app_id=box.app_id)


async def _first(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()

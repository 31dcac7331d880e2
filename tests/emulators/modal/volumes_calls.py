"""Calls about volumes."""

from __future__ import annotations

from typing import Any

from google.protobuf.empty_pb2 import Empty
from grpclib import Status
from modal_proto import api_pb2

from emulators.modal.service import streaming
from emulators.modal.volumes import Volume
from emulators.modal.world import World, refused

_V2 = api_pb2.VOLUME_FS_VERSION_V2


class VolumeCalls:
    """The part of the control plane that deals with volumes."""

    def __init__(self, world: World) -> None:
        self._world = world

    def _volume(self, volume_id: str) -> Volume:
        try:
            return self._world.volumes[volume_id]
        except KeyError:
            raise refused(Status.NOT_FOUND, f"Volume {volume_id} not found") from None

    async def VolumeGetOrCreate(self, request: Any, metadata: Any) -> Any:
        world = self._world
        for volume in world.volumes.values():
            if volume.name == request.deployment_name:
                break
        else:
            if request.object_creation_type != api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING:
                raise refused(Status.NOT_FOUND, f"Volume '{request.deployment_name}' not found")
            if request.version != _V2:
                raise refused(Status.UNIMPLEMENTED, "The emulator has only volumes of version 2")
            volume = world.add_volume(request.deployment_name)
        return api_pb2.VolumeGetOrCreateResponse(
            volume_id=volume.id,
            version=_V2,
            metadata=api_pb2.VolumeMetadata(version=_V2, name=volume.name),
        )

    async def VolumePutFiles2(self, request: Any, metadata: Any) -> Any:
        volume, blocks = self._volume(request.volume_id), self._world.blocks
        missing = [
            api_pb2.VolumePutFiles2Response.MissingBlock(
                file_index=index,
                block_index=number,
                put_url=blocks.put_url(block.contents_sha256),
            )
            for index, file in enumerate(request.files)
            for number, block in enumerate(file.blocks)
            if not blocks.has(block.contents_sha256)
        ]
        if not missing:
            for file in request.files:
                path = volume.path(file.path)
                if request.disallow_overwrite_existing_files and path.exists():
                    raise refused(Status.ALREADY_EXISTS, f"{file.path} already exists")
                path.parent.mkdir(parents=True, exist_ok=True)
                data = b"".join(blocks.read(block.contents_sha256) for block in file.blocks)
                path.write_bytes(data.ljust(file.size, b"\0"))
        return api_pb2.VolumePutFiles2Response(missing_blocks=missing)

    async def VolumeGetFile2(self, request: Any, metadata: Any) -> Any:
        path = self._volume(request.volume_id).path(request.path)
        if not path.is_file():
            raise refused(Status.NOT_FOUND, f"{request.path} not found")
        size = path.stat().st_size
        urls = self._world.blocks.get_urls(path, size)
        return api_pb2.VolumeGetFile2Response(get_urls=urls, size=size, start=0, len=size)

    @streaming
    async def VolumeListFiles2(self, request: Any, metadata: Any, stream: Any) -> None:
        volume = self._volume(request.volume_id)
        folder = volume.path(request.path)
        found = folder.rglob("*") if request.recursive else folder.glob("*")
        kind = api_pb2.FileEntry.FileType
        entries = [
            api_pb2.FileEntry(
                path=str(path.relative_to(volume.folder)),
                type=kind.DIRECTORY if path.is_dir() else kind.FILE,
                size=path.stat().st_size,
            )
            for path in sorted(found)
        ]
        await stream.send_message(api_pb2.VolumeListFiles2Response(entries=entries))

    async def VolumeRemoveFile2(self, request: Any, metadata: Any) -> Empty:
        path = self._volume(request.volume_id).path(request.path)
        if not path.is_file():
            raise refused(Status.NOT_FOUND, f"{request.path} not found")
        path.unlink()
        return Empty()

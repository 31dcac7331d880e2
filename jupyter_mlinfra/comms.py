"""Comms of widgets that live on a machine: opened here in its name, and routed both ways.

JupyterLab asks the kernel for the state of all widgets when a page is loaded again, so that state
is kept here too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

from ipykernel.jsonutil import json_clean

from mlinfra_sdk.frontend import Frontend
from mlinfra_sdk.worker.records import Record

_WIDGET = "jupyter.widget"
_CONTROL = "jupyter.widget.control"


class Machine(Protocol):
    """What the comms need of a session."""

    def comm(
        self,
        parent: str,
        msg_type: str,
        content: bytes,
        metadata: bytes,
        buffers: list[bytes],
        frontend: Frontend,
    ) -> None: ...


class RemoteComm:
    """Stands in this kernel's comm manager for a comm on the machine."""

    def __init__(self, comms: RemoteComms, comm_id: str, target_name: str) -> None:
        self.comm_id = comm_id
        self.target_name = target_name
        self.model: dict[str, Any] = {}
        """A widget's model name, module and version."""
        self.state: dict[str, Any] = {}
        self.buffers: dict[tuple[Any, ...], bytes] = {}
        self._comms = comms

    def handle_msg(self, msg: dict[str, Any]) -> None:
        """A message from the front end."""
        content = msg["content"]
        self.update(content.get("data", {}), msg.get("buffers") or [])
        self._comms.forward("comm_msg", msg)

    def handle_close(self, msg: dict[str, Any]) -> None:
        """The front end has closed it."""
        self._comms.forward("comm_close", msg)

    def update(self, data: dict[str, Any], buffers: list[Any]) -> None:
        """Take over a widget's state, or the part of it that a message carries."""
        state = data.get("state")
        if not isinstance(state, dict) or data.get("method", "update") != "update":
            return
        _twins_follow(self.comm_id, data, buffers)
        for name in state:
            for path in [path for path in self.buffers if path[0] == name]:
                del self.buffers[path]
        self.state.update(state)
        for path, buffer in zip(data.get("buffer_paths", []), buffers, strict=False):
            self.buffers[tuple(path)] = bytes(buffer)


class RemoteComms:
    """All comms of one machine's kernel. ``frontend`` gives that of the message which this kernel
    is handling."""

    def __init__(
        self, kernel: Any, machine: Machine, frontend: Callable[[RemoteComms], Frontend]
    ) -> None:
        self._kernel = kernel
        self._machine = machine
        self._frontend = frontend
        self._comms: dict[str, RemoteComm] = {}

    def published(self, msg_type: str, content: dict[str, Any], buffers: list[bytes]) -> None:
        """Note what the machine's kernel says to the front end."""
        comm_id = content["comm_id"]
        if msg_type == "comm_open":
            comm = RemoteComm(self, comm_id, content["target_name"])
            data = content.get("data", {})
            state = data.get("state", {})
            comm.model = {
                f"model_{key}": state.get(f"_model_{key}")
                for key in ("name", "module", "module_version")
            }
            comm.update({**data, "method": "update"}, buffers)
            self._comms[comm_id] = comm
            self._kernel.comm_manager.register_comm(comm)
            if comm.target_name == _WIDGET:
                _Control.install(self._kernel.comm_manager)
        elif comm_id not in self._comms:  # from the twin of a widget that was made here
            if msg_type == "comm_msg" and content.get("data", {}).get("method") == "update":
                _twins_follow(comm_id, content["data"], buffers)
        elif msg_type == "comm_close":
            self._drop(comm_id)
        else:
            self._comms[comm_id].update(content.get("data", {}), buffers)

    def _drop(self, comm_id: str) -> None:
        comm = self._comms.pop(comm_id, None)
        if comm is not None and self._kernel.comm_manager.comms.get(comm_id) is comm:
            self._kernel.comm_manager.unregister_comm(comm)

    def close(self) -> None:
        """The machine's kernel is gone, and its comms with it. The front end's messages go to the
        widgets' twins from now on."""
        for comm_id in list(self._comms):
            self._drop(comm_id)
            twins = _twins()
            twin = twins.find(comm_id) if twins is not None else None
            if twin is not None:
                self._kernel.comm_manager.register_comm(twin.comm)

    def forward(self, msg_type: str, msg: dict[str, Any]) -> None:
        """Pass a message of the front end on, and wait until the machine has handled it: the front
        end takes what a message causes only while this kernel is busy with it."""
        self._machine.comm(
            msg["header"]["msg_id"],
            msg_type,
            json.dumps(json_clean(msg["content"])).encode(),
            json.dumps(json_clean(msg.get("metadata", {}))).encode(),
            [bytes(buffer) for buffer in msg.get("buffers") or []],
            self._frontend(self),
        )

    def other(self, record: Record) -> None:
        """What the machine's kernel publishes by itself (a thread, a timer)."""
        content = json.loads(record.content)
        if record.msg_type.startswith("comm_"):
            self.published(record.msg_type, content, record.buffers)
        self._kernel.session.send(
            self._kernel.iopub_socket,
            record.msg_type,
            content,
            metadata=json.loads(record.metadata),
            ident=self._kernel._topic(record.msg_type),
            buffers=record.buffers or None,
        )


def _twins() -> ModuleType | None:
    """Where the twins of remote widgets are known, if there are any."""
    return sys.modules.get("mlinfra_sdk.objects.reducers_widgets")


def _twins_follow(comm_id: str, data: dict[str, Any], buffers: list[Any]) -> None:
    twins = _twins()
    if twins is not None:
        twins.follow(comm_id, data["state"], data.get("buffer_paths", []), buffers)


class _Control:
    """Answers a page that asks for the state of all widgets: ipywidgets' own and ours."""

    def __init__(self, manager: Any, original: Any) -> None:
        self._manager = manager
        self._original = original

    @classmethod
    def install(cls, manager: Any) -> None:
        """Take the place of ipywidgets' handler, which knows only the widgets of this kernel."""
        present = manager.targets.get(_CONTROL)
        if not isinstance(present, cls):
            manager.register_target(_CONTROL, cls(manager, present))

    def __call__(self, comm: Any, msg: dict[str, Any]) -> None:
        """A page opens the control comm."""

        def answer(request: dict[str, Any]) -> None:
            if request["content"]["data"].get("method") == "request_states":
                self._answer(comm)

        comm.on_msg(answer)

    def _answer(self, comm: Any) -> None:
        states, paths, buffers = _local_states() if self._original is not None else ({}, [], [])
        for remote in list(self._manager.comms.values()):
            if isinstance(remote, RemoteComm) and remote.target_name == _WIDGET:
                states[remote.comm_id] = {**remote.model, "state": remote.state}
                for path, buffer in remote.buffers.items():
                    paths.append([remote.comm_id, "state", *path])
                    buffers.append(buffer)
        data = {"method": "update_states", "states": states, "buffer_paths": paths}
        comm.send(data, buffers=buffers)


def _local_states() -> tuple[dict[str, Any], list[Any], list[Any]]:
    """The states of this kernel's own widgets, as ipywidgets' handler sends them."""
    from ipywidgets import Widget
    from ipywidgets.widgets.widget import _remove_buffers

    states = Widget.get_manager_state(drop_defaults=False)["state"]
    found: tuple[dict[str, Any], list[Any], list[Any]] = _remove_buffers(states)
    return found

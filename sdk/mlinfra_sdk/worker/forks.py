"""What forked children of the kernel print, without a port on the network."""

from __future__ import annotations

import os
from typing import Any

import ipykernel.kernelapp
import zmq
from ipykernel.iostream import IOPubThread
from zmq.eventloop.zmqstream import ZMQStream


def use_socket(address: str) -> None:
    """From now on kernels of this process take it through this address of their own, where
    ipykernel listens on a TCP port."""

    class PublishThread(IOPubThread):
        """Overrides the two ends of that pipe."""

        def _setup_pipe_in(self) -> None:
            context: Any = self.socket.context
            self._pipe_uuid = os.urandom(16)
            receiving = context.socket(zmq.PULL)
            receiving.linger = 0
            receiving.bind(address)
            self._pipe_in = ZMQStream(receiving, self.io_loop)
            self._pipe_in.on_recv(self._handle_pipe_msg)

        def _setup_pipe_out(self) -> tuple[Any, Any]:
            context: Any = zmq.Context()  # that of the parent cannot be used after a fork
            sending = context.socket(zmq.PUSH)
            sending.linger = 3000
            sending.connect(address)
            return context, sending

    setattr(ipykernel.kernelapp, "IOPubThread", PublishThread)  # noqa: B010

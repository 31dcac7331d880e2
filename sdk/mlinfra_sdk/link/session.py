"""The session: ordered, exactly-once messages on prioritised channels, over one wire after another.

`LinkSession` is what both ends share.  It numbers every frame of data when it is first put on a
wire, keeps it until the other side acknowledges it, and sends everything that is not acknowledged
again on the next wire; the receiver accepts each number once.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

import anyio
import msgspec

from mlinfra_sdk.errors import LinkClosed, LinkError, ProtocolError
from mlinfra_sdk.link.flow import OVERHEAD, Inbox, Message, Outbox, Outgoing
from mlinfra_sdk.link.frames import (
    CHANNELS,
    MAX_MESSAGE,
    Buffer,
    Channel,
    Decoder,
    Frame,
    Header,
    Kind,
    encode,
    encode_frame,
)
from mlinfra_sdk.link.handshake import Close, Peer, Resume, closed, closing, unpack
from mlinfra_sdk.link.pace import Pace
from mlinfra_sdk.link.state import Counters, State, Status, Timing
from mlinfra_sdk.link.wire import Wire

_DATA = int(Kind.DATA)
_CONSUMED = struct.Struct(f"!{CHANNELS}Q")
_BATCH = 256 << 10
_BATCH_BUFFERS = 256
_SMALL = 4 << 10
_ACK_FRAMES = 64
_ACK_COST = 256 << 10


class LinkSession:
    """One end of a link.  Get one from `client.connect` or from `server.LinkServer`.

    Use it in the event loop that it was made in; it is not thread-safe.
    """

    def __init__(
        self,
        session_id: bytes,
        *,
        timing: Timing,
        windows: Mapping[Channel, int],
        on_status: Callable[[Status], None] | None = None,
    ) -> None:
        self.id = session_id
        self.timing = timing
        self.status = Status(State.CONNECTING, time.time())
        self.counters = Counters()
        self.peer: Peer | None = None
        self.on_status = on_status
        self.windows = [windows[channel] for channel in Channel]
        # What may be sent is the other side's to say, at the first handshake.
        self._outboxes = [Outbox(channel, 0) for channel in Channel]
        self._inboxes = [Inbox(channel, self.windows[channel]) for channel in Channel]
        self._number = 0
        self._received = 0
        self._unacked: deque[tuple[int, tuple[Buffer, ...]]] = deque()
        self._repeat: deque[tuple[int, tuple[Buffer, ...]]] = deque()
        self._pace = Pace()
        self._urgent: list[bytes] = []
        self._wake = anyio.Event()
        self._ack_started = anyio.Event()
        self._ack_now = False
        self._ack_frames = 0
        self._ack_cost = 0
        self._heard = True
        self._farewell: bytes | None = None
        self._closing = False
        self._begun = anyio.Event()
        self._ended = anyio.Event()
        self._settled = anyio.Event()
        self._scope: anyio.CancelScope | None = None
        self._driving = anyio.Lock()

    # -- what the application uses ----------------------------------------------------------

    def send_nowait(self, channel: Channel, data: Buffer, stream: int = 0) -> bool:
        """Queue a message; ``False`` if the channel's window has no room (then use `send`).

        Read-only buffers are not copied: they must keep their content until the other side has
        acknowledged them.  Raises :class:`LinkClosed` on a closed session.
        """
        outbox = self._outboxes[channel]
        if outbox.turn.locked():
            self._check_open()
            return False
        return self._admit(outbox, data, stream)

    async def send(self, channel: Channel, data: Buffer, stream: int = 0) -> None:
        """Queue a message, waiting while the channel's window has no room.

        ``stream`` (0 to 2**32-1) travels with the message.  A message has at most 64 MiB.  While
        the link reconnects, the window fills up and then this waits.
        """
        if self.send_nowait(channel, data, stream):
            return
        outbox = self._outboxes[channel]
        async with outbox.turn:
            while not self._admit(outbox, data, stream):
                await outbox.room.wait()

    async def receive(self, channel: Channel) -> AsyncIterator[Message]:
        """The messages of a channel, in order; ends when the session is closed in good order.

        Raises :class:`LinkClosed` when the session was lost.  What is not taken from here holds
        the sender back.
        """
        inbox = self._inboxes[channel]
        while True:
            message = self.receive_nowait(channel)
            if message is not None:
                yield message
            elif self.status.state is not State.CLOSED:
                if inbox.arrived.is_set():
                    inbox.arrived = anyio.Event()
                await inbox.arrived.wait()
            elif self.status.error is not None:
                raise LinkClosed(self.status.error.message, hint=self.status.error.hint)
            else:
                return

    def receive_nowait(self, channel: Channel) -> Message | None:
        """The next message of a channel if there is one."""
        inbox = self._inboxes[channel]
        if not inbox.ready:
            return None
        message, cost = inbox.take()
        self._consumed(cost)
        return message

    def flow(self, channel: Channel) -> tuple[int, int]:
        """Bytes that the channel was given in all, and how many of them the other side's
        application has taken; both with what fragments cost."""
        outbox = self._outboxes[channel]
        return outbox.admitted, outbox.consumed

    async def flush(self) -> None:
        """Wait until the other side has received everything that is under way."""
        while True:
            self._check_open()
            if not self._unacked and not any(outbox.queue for outbox in self._outboxes):
                return
            await self._settled.wait()

    async def aclose(self, reason: LinkError | None = None, *, patience: float = 2.0) -> None:
        """End the session on both sides, after a flush that lasts at most ``patience`` seconds.

        The other side meets ``reason`` as an error if there is one.  Without a connection only
        this side ends.
        """
        if self.status.state is State.CONNECTED:
            self._closing = True
            with anyio.move_on_after(patience, shield=True), suppress(LinkClosed):
                await self.flush()
                code = "failed" if reason else "bye"
                self._farewell = closing(code, str(reason or ""))
                self._wake.set()
                await self._ended.wait()
        self.finish(reason)

    async def wait_connected(self) -> None:
        """Wait until the session has been connected for the first time."""
        await self._begun.wait()

    async def wait_closed(self) -> None:
        """Wait until the session is closed, by whomever."""
        await self._ended.wait()

    # -- what client and server use ---------------------------------------------------------

    def finish(self, error: LinkError | None) -> None:
        """Close this side for good; ``error`` says why unless it is in good order."""
        if self.status.state is State.CLOSED:
            return
        self._change(State.CLOSED, error)
        self._begun.set()
        self._ended.set()
        self._settled.set()
        for outbox in self._outboxes:
            outbox.queue.clear()
            outbox.wake()
        for inbox in self._inboxes:
            inbox.arrived.set()
        self._unacked.clear()
        self._repeat.clear()
        if self._scope is not None:
            self._scope.cancel()

    @property
    def progress(self) -> int:
        """How many frames have reached this side or are known to have reached the other."""
        return self._received + self._number - len(self._unacked)

    def resume_point(self) -> Resume:
        """What the other side needs to know to go on."""
        return Resume(self._received, [inbox.consumed for inbox in self._inboxes])

    async def drive(
        self,
        wire: Wire,
        decoder: Decoder,
        peer: Peer,
        point: Resume,
        *,
        current: Callable[[], bool] = lambda: True,
        greet: bool = False,
    ) -> LinkError:
        """Carry messages over an authenticated wire until it ends, and say why it ended.

        A wire that is still driven is cut first; ``current`` tells whether this one is still the
        newest when its turn comes.  ``greet`` sends READY, which tells the client where this side
        goes on.  Raises :class:`LinkClosed` if the two sides cannot go on from where they are.
        """
        if self._scope is not None:
            self._scope.cancel()
        async with self._driving:
            if not current():
                return LinkError("A newer connection took over.")
            self._go_on(peer, point)
            self._pace = Pace()
            self._urgent.clear()
            if greet:
                ready = msgspec.msgpack.encode(self.resume_point())
                self._urgent.append(encode_frame(Kind.READY, ready))
            decoder.target = self._target
            faults: list[LinkError] = []
            self.counters.wires += 1
            self._heard = True
            self._change(State.CONNECTED)
            self._begun.set()
            try:
                async with anyio.create_task_group() as tasks:
                    self._scope = tasks.cancel_scope

                    async def guard(job: Callable[[], Awaitable[None]]) -> None:
                        try:
                            await job()
                        except LinkError as error:
                            faults.append(error)
                            tasks.cancel_scope.cancel()

                    tasks.start_soon(guard, lambda: self._write(wire))
                    tasks.start_soon(guard, self._beat)
                    tasks.start_soon(self._remind)
                    await guard(lambda: self._read(wire, decoder))
            finally:
                self._scope = None
                fault = faults[0] if faults else LinkError("A newer connection took over.")
                if self._closing:
                    self.finish(None)
                elif self.status.state is not State.CLOSED:
                    self._change(State.RECONNECTING, fault)
            return fault

    # -- sending ----------------------------------------------------------------------------

    def _admit(self, outbox: Outbox, data: Buffer, stream: int) -> bool:
        self._check_open()
        view = memoryview(data)
        if view.nbytes > MAX_MESSAGE:
            raise ValueError(f"A message of {view.nbytes} bytes is above the limit of 64 MiB.")
        view = view.cast("B") if view.readonly else memoryview(bytes(view))
        if not outbox.admit(Outgoing(view, stream)):
            return False
        self._wake.set()
        return True

    async def _write(self, wire: Wire) -> None:
        while True:
            if self._wake.is_set():
                self._wake = anyio.Event()
            batch = self._batch()
            if batch:
                await wire.send(batch)
                self.counters.bytes_sent += sum(map(len, batch))
            elif self._farewell is not None:
                await wire.send([self._farewell])
                self.finish(None)
                return  # a wire that never has to wait does not notice that it is cancelled
            else:
                await self._wake.wait()

    def _batch(self) -> list[Buffer]:
        """What to put on the wire next, most urgent first."""
        batch: list[Buffer] = []
        if self._urgent:
            batch += self._urgent
            self._urgent.clear()
        if self._ack_now:
            self._ack_now = False
            self._ack_frames = self._ack_cost = 0
            consumed = _CONSUMED.pack(*[inbox.consumed for inbox in self._inboxes])
            batch.append(encode_frame(Kind.ACK, consumed, number=self._received))
        pace = self._pace
        room = _BATCH
        number = 0
        while self._repeat and room > 0 and pace.open:
            number, buffers = self._repeat.popleft()
            batch += buffers
            size = sum(map(len, buffers))
            room -= size
            pace.add(size)
            self.counters.repeated_frames += 1
        if not self._repeat:
            for outbox in self._outboxes:
                while outbox.queue and room > 0 and len(batch) < _BATCH_BUFFERS:
                    # Control is never held back: it is little, and others wait for it.
                    if not pace.open and outbox.channel != Channel.CONTROL:
                        break
                    cut = outbox.next_fragment(pace.fragment)
                    if cut is None:
                        break
                    batch += self._frame(outbox.channel, *cut)
                    number = self._number
                    size = len(cut[1]) + OVERHEAD
                    room -= size
                    pace.add(size)
        if number:
            pace.mark(number, time.monotonic())
        return batch

    def _frame(self, channel: int, message: Outgoing, fragment: memoryview) -> tuple[Buffer, ...]:
        self._number += 1
        header = encode(
            _DATA,
            fragment,
            channel=channel,
            stream=message.stream,
            number=self._number,
            size=message.size,
        )
        small = len(fragment) <= _SMALL
        buffers = (header + fragment,) if small else (header, fragment)
        self._unacked.append((self._number, buffers))
        return buffers

    def _acknowledged(self, number: int, consumed: Sequence[int]) -> None:
        unacked = self._unacked
        if len(consumed) != CHANNELS:
            raise ProtocolError("The other side knows other channels.")
        if not self._number - len(unacked) <= number <= self._number:
            raise ProtocolError("The other side acknowledged what was never sent.")
        while unacked and unacked[0][0] <= number:
            unacked.popleft()
        self._pace.acknowledged(number, time.monotonic())
        for outbox, total in zip(self._outboxes, consumed, strict=True):
            outbox.was_consumed(total)
        self._wake.set()
        if not unacked:
            self._settled.set()
            self._settled = anyio.Event()

    # -- receiving --------------------------------------------------------------------------

    async def _read(self, wire: Wire, decoder: Decoder) -> None:
        count = 0
        while True:
            for frame in decoder.received(count):
                self._handle(frame)
            count = await wire.receive_into(decoder.space(), fill=decoder.direct)
            if not count:
                raise LinkError("The connection ended.")
            self._heard = True
            self.counters.bytes_received += count

    def _target(self, header: Header) -> memoryview | None:
        if header.kind == _DATA and header.number == self._received + 1:
            return self._inboxes[header.channel].place(header)
        return None

    def _handle(self, frame: Frame) -> None:
        header, payload = frame
        if header.kind == _DATA:
            self._handle_data(header, payload)
        elif header.kind == Kind.ACK:
            if len(payload) != _CONSUMED.size:
                raise ProtocolError("A malformed ACK arrived.")
            self._acknowledged(header.number, _CONSUMED.unpack(payload))
        elif header.kind == Kind.PING:
            self._urgent.append(encode_frame(Kind.PONG, number=header.number))
            self._wake.set()
        elif header.kind == Kind.PONG:
            self.counters.round_trip = max(0.0, (time.monotonic_ns() - header.number) / 1e9)
        elif header.kind == Kind.CLOSE:
            self._handle_close(payload)
        else:
            raise ProtocolError(f"Kind {header.kind} arrived after the handshake.")

    def _handle_data(self, header: Header, payload: memoryview) -> None:
        if header.number <= self._received:
            return
        if header.number != self._received + 1:
            raise ProtocolError(
                f"Number {header.number} arrived where {self._received + 1} belongs."
            )
        cost = self._inboxes[header.channel].accept(header, payload)
        self._received += 1
        self._ack_frames += 1
        self._consumed(cost)

    def _handle_close(self, payload: memoryview) -> None:
        reason = unpack(payload, Close)
        self.finish(None if reason.code == "bye" else closed(payload))

    def _consumed(self, cost: int) -> None:
        """Acknowledge soon, or at once if much has come together."""
        self._ack_cost += cost
        if self._ack_frames >= _ACK_FRAMES or self._ack_cost >= _ACK_COST:
            self._ack_now = True
            self._wake.set()
        elif not self._ack_started.is_set():
            self._ack_started.set()

    async def _remind(self) -> None:
        """Acknowledge what has been received when nothing more comes for a while."""
        while True:
            await self._ack_started.wait()
            await anyio.sleep(self.timing.ack_delay)
            self._ack_started = anyio.Event()
            if self._ack_frames or self._ack_cost:
                self._ack_now = True
                self._wake.set()

    async def _beat(self) -> None:
        """Ping, and find a dead peer.

        Silence is counted in ticks, not on the clock: a process that could not run for a while
        (a held GIL, a suspended laptop) must not take its own absence for the peer's.
        """
        timing = self.timing
        tick = min(timing.heartbeat, timing.dead_after) / 5
        silent = 0.0
        until_ping = 0.0
        while True:
            until_ping -= tick
            if until_ping <= 0:
                until_ping += timing.heartbeat
                self._urgent.append(encode_frame(Kind.PING, number=time.monotonic_ns()))
                self._wake.set()
            await anyio.sleep(tick)
            silent = 0.0 if self._heard else silent + tick
            self._heard = False
            if silent >= timing.dead_after:
                raise LinkError(f"The other side has been silent for {silent:.0f} s.")

    # -- state ------------------------------------------------------------------------------

    def _go_on(self, peer: Peer, point: Resume) -> None:
        self._check_open()
        try:
            self._acknowledged(point.received, point.consumed)
        except ProtocolError:
            raise LinkClosed(
                "The two sides of the session no longer fit together.",
                hint="One of them was started anew; attach to the run with a new session.",
            ) from None
        self.peer = peer
        for outbox, window in zip(self._outboxes, peer.windows, strict=True):
            outbox.window = window
            outbox.wake()
        self._repeat = deque(self._unacked)

    def _check_open(self) -> None:
        if self.status.state is State.CLOSED:
            error = self.status.error
            raise LinkClosed(
                error.message if error else "The session with the agent is closed.",
                hint=error.hint if error else "",
            )

    def _change(self, state: State, error: LinkError | None = None) -> None:
        if state is self.status.state:
            return
        self.status = Status(state, time.time(), error)
        if self.on_status is not None:
            self.on_status(self.status)

"""What a kernel publishes, one message at a time, as an agent numbers, keeps and sends it on."""

from __future__ import annotations

import msgspec


class Record(msgspec.Struct, array_like=True):
    """One message of a kernel, numbered within its run.

    ``msg_type`` is Jupyter's, or one of :data:`RESULT`, :data:`DIED`, :data:`LEFT`,
    :data:`INPUT`, :data:`HANDLED`.
    ``parent`` is the run that the message belongs to, or a front end's comm message.
    """

    kernel: str
    parent: str
    number: int
    msg_type: str
    content: bytes = b"{}"
    metadata: bytes = b"{}"
    buffers: list[bytes] = []


RESULT = "mlinfra_result"
"""The end of a run: content is the execute reply, the one buffer its encoded Outputs."""

DIED = "mlinfra_died"
"""The end of a run without a result: content is ``{"reason": text}``, and the ``generation`` of the
kernel's process if that has ended (``by_accident`` if nobody has ended it), and why the ``machine``
has if it did so with it; also sent without a run, to the kernel's client."""

LEFT = "mlinfra_left"
"""A client is sent nothing more of a run: content is ``{"reason": text}``."""

ENDING = "mlinfra_ending"
"""The machine, or the run that it belongs to, is going to end: content is an
:class:`mlinfra_sdk.worker.watchdog.End`. Also a control message from the agent to its kernels."""

INPUT = "input_request"

ASKING = "mlinfra_asking"
"""From a kernel to its agent: an input request comes, after all outputs up to here."""

HANDLED = "mlinfra_handled"
"""The end of a comm message: the kernel has handled it."""

ENDS = frozenset({RESULT, DIED, LEFT, HANDLED})
"""What comes last of a run, or of a comm message."""

PREPARING = "mlinfra_preparing"
"""What is being done for an environment: content is ``{"text": text}``."""

METRICS = "mlinfra_metrics"
"""What a run that is under way does to its machine: content is a
:class:`mlinfra_sdk.worker.run_usage.Reading`. Only news: not journaled, and dropped for a client
that is slow."""

USAGE = "mlinfra_usage"
"""What a run has used: content is a :class:`mlinfra_sdk.worker.run_usage.RunUsage`. Comes before
its result, if it took longer than a second or counted anything."""

COUNT = "mlinfra_count"
"""A control message from the agent to its kernel: tell how far the loops of ``run`` are."""

METERS = "mlinfra_meters"
"""A kernel's answer: content is
``{"meters": [...]}``, each a :class:`mlinfra_sdk.meters.Meter`."""

CHECKPOINT = "mlinfra_checkpoint"
"""A checkpoint is safe on the machine: content is ``worker.checkpoints.Saved``, the one buffer its
manifest."""

WANTED = "mlinfra_checkpoint_wanted"
"""The kernel waits for a newer checkpoint, or word that there is none: content is
``worker.checkpoints.Wanted``."""

BEGUN = "mlinfra_begun"
"""A run that waited for others has been handed to the kernel; only the agent sees this."""

decode_record = msgspec.msgpack.Decoder(Record).decode

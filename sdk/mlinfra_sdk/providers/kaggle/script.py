"""The program that is pushed to Kaggle: one run with all that it needs, as the text of a script."""

from __future__ import annotations

import base64
import io
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import msgspec

from mlinfra_sdk import units
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.namespace.delta import Inputs
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.providers import packages
from mlinfra_sdk.worker import batch
from mlinfra_sdk.worker.wheel import build_wheel

LARGEST = 1_000_000
"""Bytes of a script. Kaggle publishes no limit; this is ours."""
OUTPUT = "mlinfra-result.tar"
_SDK = "sdk/"
_ALL = 1 << 62

_TEMPLATE = """\
# A run of jupyter-mlinfra: its code, variables and the SDK are in DATA.
import base64, importlib.metadata, io, os, shutil, subprocess, sys, tarfile, tempfile

DATA = "{data}"
here, there = "%d.%d" % sys.version_info[:2], "{python}"
if here != there:
    sys.exit("Kaggle has Python %s, but the notebook has %s." % (here, there))
folder = tempfile.mkdtemp()
with tarfile.open(fileobj=io.BytesIO(base64.b85decode(DATA)), mode="r:xz") as archive:
    archive.extractall(folder)  # our own

def has(pin):
    name, _, version = pin.partition("==")
    try:
        return importlib.metadata.version(name) == version
    except importlib.metadata.PackageNotFoundError:
        return False

needed = [pin for pin in {pins!r} if not has(pin)]
if needed:
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", *needed])
path = os.pathsep.join(filter(None, [os.path.join(folder, "sdk"), os.environ.get("PYTHONPATH")]))
command = [sys.executable, "-m", "mlinfra_sdk.worker.batch", folder]
subprocess.check_call(command, env={{**os.environ, "PYTHONPATH": path}})
shutil.move(os.path.join(folder, {result!r}), {output!r})
"""


def compose(job: batch.Job, store: ChunkStore) -> str:
    """The script. Raises :class:`RequestError` if the variables are too much for one."""
    inputs = msgspec.msgpack.decode(job.request.inputs, type=Inputs)
    # Nothing can stay behind on a machine that ends with the run, and nobody answers there.
    inputs = msgspec.structs.replace(inputs, eager_limit=_ALL)
    request = msgspec.structs.replace(
        job.request, inputs=msgspec.msgpack.encode(inputs), allow_stdin=False
    )
    job = msgspec.structs.replace(job, request=request)
    with tempfile.TemporaryDirectory(prefix="mlinfra-") as place:
        own = ChunkStore(Path(place) / batch.STORE)
        sizes = 0
        for digest in inputs.digests():
            data = store.read_chunk(digest)
            sizes += len(data)
            if sizes > 50 * LARGEST:
                break
            own.put_chunk(data)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:xz") as archive:
            with zipfile.ZipFile(build_wheel(Path(place))) as wheel:
                for name in wheel.namelist():
                    _add(archive, _SDK + name, wheel.read(name))
            _add(archive, batch.JOB, msgspec.msgpack.encode(job))
            archive.add(Path(place) / batch.STORE, batch.STORE)
    text = _TEMPLATE.format(
        python=f"{sys.version_info[0]}.{sys.version_info[1]}",
        pins=packages.pins().split(),
        result=batch.RESULT,
        output=OUTPUT,
        data=base64.b85encode(packed.getvalue()).decode(),
    )
    if sizes > 50 * LARGEST or len(text) > LARGEST:
        raise RequestError(
            f"The variables of this cell ({units.format_size(sizes)}) are too much for Kaggle: a "
            f"run is pushed as one script, of {units.format_size(LARGEST)} at most.",
            hint="Have the cell read its data there: name Kaggle datasets by `datasets` of the "
            "target, or download it in the cell.",
        )
    return text


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))

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
LARGEST_INPUTS = 10 << 30
"""Bytes of variables that are sent. Ours, too."""
_TRIED = 8 * LARGEST
"""Bytes above which variables are not compressed to see whether they fit into the script."""
_SDK = "sdk/"
_ALL = 1 << 62

_TEMPLATE = """\
# A run of jupyter-mlinfra: its code, variables and the SDK are in DATA.
import base64, glob, importlib.metadata, io, os, shutil, subprocess, sys, tarfile, tempfile

DATA = "{data}"
here, there = "%d.%d" % sys.version_info[:2], "{python}"
if here != there:
    sys.exit("Kaggle has Python %s, but the notebook has %s." % (here, there))
folder = tempfile.mkdtemp()
with tarfile.open(fileobj=io.BytesIO(base64.b85decode(DATA)), mode="r:xz") as archive:
    archive.extractall(folder)  # our own
inputs = {inputs!r}  # a private dataset with a file of this name
if inputs:
    places = [inputs, os.path.join("datasets", "*", inputs)]
    found = [it for place in places for it in glob.glob(os.path.join("..", "input", place, inputs))]
    if not found:
        sys.exit("The variables, which are the dataset %s, are not below ../input." % inputs)
    with tarfile.open(found[0]) as archive:
        archive.extractall(folder)  # our own, too

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


def compose(job: batch.Job, store: ChunkStore, extra: Path) -> str:
    """The script. Variables that are too much for it become the file ``extra``, by whose name the
    script looks for it. Raises :class:`RequestError` if that is too large, or the code."""
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
            if sizes > LARGEST_INPUTS:
                raise RequestError(
                    "The variables of this cell are too much for Kaggle: at most "
                    f"{units.format_size(LARGEST_INPUTS)} are sent.",
                    hint="Have the cell read its data there: name Kaggle datasets by `datasets` of "
                    "the target, or download it in the cell.",
                )
            own.put_chunk(data)
        if sizes <= _TRIED:
            text = _script(job, own.root)
            if len(text) <= LARGEST:
                return text
        with tarfile.open(extra, "w") as archive:
            archive.add(own.root, batch.STORE)
    text = _script(job, None, extra.name)
    if len(text) > LARGEST:
        raise RequestError(
            "The code of this cell is too much for Kaggle: a run is pushed as one script, of "
            f"{units.format_size(LARGEST)} at most.",
            hint="Keep data in variables, which are sent beside it.",
        )
    return text


def _script(job: batch.Job, store: Path | None, inputs: str = "") -> str:
    """With the chunks of ``store`` in it, or with those that lie in the file ``inputs``."""
    packed = io.BytesIO()
    with (
        tarfile.open(fileobj=packed, mode="w:xz") as archive,
        tempfile.TemporaryDirectory(prefix="mlinfra-") as place,
    ):
        with zipfile.ZipFile(build_wheel(Path(place))) as wheel:
            for name in wheel.namelist():
                _add(archive, _SDK + name, wheel.read(name))
        _add(archive, batch.JOB, msgspec.msgpack.encode(job))
        if store is not None:
            archive.add(store, batch.STORE)
    return _TEMPLATE.format(
        python=f"{sys.version_info[0]}.{sys.version_info[1]}",
        pins=packages.pins().split(),
        inputs=inputs,
        result=batch.ARCHIVE,
        output=OUTPUT,
        data=base64.b85encode(packed.getvalue()).decode(),
    )


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))

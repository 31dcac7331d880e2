"""A wheel of the very SDK that runs here, so that every machine gets the same one.

No build backend and no network is needed, and it makes no difference whether the SDK is installed
or editable. The same files give the same bytes: a digest of the wheel identifies what is in it.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import mlinfra_sdk
from mlinfra_sdk.errors import ProviderError

_DISTRIBUTION = "mlinfra-sdk"
_TAGS = "Wheel-Version: 1.0\nGenerator: mlinfra-sdk\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip archive can hold


def build_wheel(folder: Path) -> Path:
    """Write the wheel into ``folder`` under its proper name and give its path; an older one is
    replaced in one step. Raises :class:`ProviderError` if this SDK is not installed at all."""
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise ProviderError(
            f"{_DISTRIBUTION} runs here without being installed, so it cannot be sent elsewhere.",
            hint="Install it: pip install mlinfra-sdk (or -e ./sdk in a source tree).",
        ) from None
    stem = f"{_DISTRIBUTION.replace('-', '_')}-{distribution.version}"
    info = f"{stem}.dist-info"
    files = dict(_package())
    files |= {f"{info}/{name}": data for name, data in _metadata(distribution)}
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD")
    path = folder / f"{stem}-py3-none-any.whl"
    fd, unfinished = tempfile.mkstemp(dir=folder, prefix=".wheel-")
    try:
        with open(fd, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                entry = zipfile.ZipInfo(name, _EPOCH)
                entry.external_attr = 0o100644 << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, data)
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    return path


def _package() -> Iterator[tuple[str, bytes]]:
    """(name in the wheel, content) of every file of the package, in a fixed order."""
    assert mlinfra_sdk.__file__ is not None
    root = Path(mlinfra_sdk.__file__).parent
    for path in sorted(root.rglob("*")):
        inner = path.relative_to(root)
        skipped = any(part.startswith((".", "__pycache__")) for part in inner.parts)
        if path.is_file() and not skipped:
            yield (Path(root.name) / inner).as_posix(), path.read_bytes()


def _metadata(distribution: importlib.metadata.Distribution) -> Iterator[tuple[str, bytes]]:
    """What describes the distribution: of an installed one just as its installer left it."""
    for name in ("METADATA", "entry_points.txt", *_licenses(distribution)):
        text = distribution.read_text(name)
        if text is not None:
            yield name, text.encode()
    yield "WHEEL", _TAGS.encode()


def _licenses(distribution: importlib.metadata.Distribution) -> list[str]:
    return [f"licenses/{name}" for name in distribution.metadata.get_all("License-File", [])]


def _record(files: dict[str, bytes], own_name: str) -> bytes:
    """The table of digests and sizes that installers check; it does not contain itself."""
    lines = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}")
    return "\n".join([*lines, f"{own_name},,", ""]).encode()

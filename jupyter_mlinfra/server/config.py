"""Settings written into the user's ``config.toml``, whose other lines and comments stay."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping

import tomlkit

from mlinfra_sdk import paths, spec, toml_files
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.kinds import CONFIRM, MONEY


class FieldError(RequestError):
    """A value that is not accepted, and whose it is."""

    def __init__(self, field: str, error: RequestError) -> None:
        super().__init__(error.message, hint=error.hint)
        self.field = field


def write(changes: Mapping[str, str]) -> None:
    """Set these settings to texts as a user writes them; an empty one takes its setting out. All
    of them are written or none. Raises :class:`RequestError`."""
    path = os.path.realpath(paths.config_file())  # a link into a folder of dot files stays one
    values = {key: _checked(key, text.strip()) for key, text in changes.items()}
    before = toml_files.read(path)
    text = changed(before, values)
    if text == before:
        return
    folder = os.path.dirname(path)
    temporary = ""
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=folder, prefix=".config-")  # 0600
        with open(fd, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise RequestError(
            f"The settings file {path} cannot be written: {error.strerror}.",
            hint="Mend the permissions of its folder.",
        ) from None


def _checked(key: str, text: str) -> str | int | float | None:
    """What the file is to say; None: nothing."""
    if not text:
        return None
    try:
        layer = spec.parse({key: text}, place=spec.CONFIG, origin="the form")
    except RequestError as error:
        raise FieldError(key, error) from None
    kind = spec.SETTINGS[key].kind
    if kind in (MONEY, CONFIRM) and re.fullmatch(r"(0|[1-9]\d{0,8})(\.\d{1,2})?", text):
        return float(text) if "." in text else int(text)
    # An address of on= has lost its token by being parsed: no secret gets into the file.
    return str(layer.values[key]) if key == "on" else text


def changed(text: str, values: Mapping[str, str | int | float | None]) -> str:
    """The text of a settings file with these values on its first level."""
    head, rest = _split(text)
    document = tomlkit.parse(head)
    for key, value in values.items():
        if value is not None:
            document[key] = value
        elif key in document:
            del document[key]
    head = document.as_string()
    apart = "\n" if head and rest and rest.strip("\r")[0] != "\n" else ""
    return head + apart + rest


def _split(text: str) -> tuple[str, str]:
    """What stands before the first table, and that table with all that follows. What is said right
    above it is about it: tomlkit would add keys between the two."""
    lines = re.split(r"(?<=\n)", text)
    for number, line in enumerate(lines):
        if line.lstrip().startswith("[") and _complete("".join(lines[:number])):
            while number and lines[number - 1].lstrip().startswith("#"):
                number -= 1
            while number and not lines[number - 1].strip():
                number -= 1
            return "".join(lines[:number]), "".join(lines[number:])
    return text, ""


def _complete(text: str) -> bool:
    """Whether no text or list of several lines is open at its end."""
    try:
        tomlkit.parse(text)
    except tomlkit.exceptions.ParseError:
        return False
    return True

"""What a person does while remote cells run; the same script checks them run locally."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .conftest import Browser

INPUT = """\
from getpass import getpass

name = input("Name: ")
print(f"{name} has a password of {len(getpass())} letters")"""

LOOP = """\
import time

print("running")
while True:
    time.sleep(0.05)"""


@pytest.mark.parametrize("mode", ["local", "remote"])
def test_interaction(jupyter: Callable[[str], Browser], mode: str) -> None:
    browser = jupyter("lab")
    magic = "%%remote\n" if mode == "remote" else ""
    cells = [magic + cell for cell in (INPUT, LOOP)]
    path = browser.save(mode, ["%load_ext jupyter_mlinfra" if magic else "", *cells])
    browser.run("interaction.mjs", NOTEBOOK=path, MODE=mode)

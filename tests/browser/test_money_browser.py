"""Money in a real browser: quotes, the question before a launch, budgets, the countdown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from .conftest import Browser

CLOUDS = Path(__file__).parents[1] / "integration"
# A cloud of the tests' own, as a plug-in of the kernel.
SETUP = f"""\
import sys
from pathlib import Path

sys.path.insert(0, {str(CLOUDS)!r})
from clouds import A10G, clouds

plans = {{
    "cheap": {{"gpus": {{"A10": 8.0}}, "has": A10G}},
    "dear": {{"gpus": {{"A10": 9.5}}, "has": A10G}},
    "odd": {{"gpus": {{"A10": None}}, "has": A10G}},
}}
stack = clouds(Path("clouds").absolute(), **plans)
stack.__enter__()
%load_ext jupyter_mlinfra"""
QUOTE = "%remote quote gpu=A10"
ASKED = "%%remote gpu=A10 on=cheap\nsum(range(10))"
BUDGET = "%remote use price=3600"
SPENT = """\
%%remote budget=10
import time

while True:
    time.sleep(0.05)"""


def test_money_as_a_user_sees_it(jupyter: Callable[[str], Browser]) -> None:
    browser = jupyter("lab")
    cells = [SETUP, QUOTE, ASKED, ASKED, "%remote use idle=10s", ASKED, BUDGET, SPENT]
    path = browser.save("money", cells)
    browser.run("money.mjs", NOTEBOOK=path)
    saved = json.loads((browser.folder / path).read_text())
    (card,) = [it for it in saved["cells"][7]["outputs"] if "mlinfra" in it.get("metadata", {})]
    assert "This run was stopped: its budget was spent: budget=$10.00." in "".join(
        card["data"]["text/plain"]
    )

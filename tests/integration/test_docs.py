"""What the documentation shows works, and its tables are those of the program.

Blocks marked ``python cell`` are the cells of one notebook, ``python script`` is a script, the
lines after ``$`` in ``console run`` are commands of one shell.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from live import opened
from scripts import place

from jupyter_mlinfra.magics.grammar import SUBCOMMANDS
from mlinfra_sdk.spec import CELL, SETTINGS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(mark: str) -> list[pytest.ParameterSet]:
    return [
        pytest.param(found, id=page.name)
        for page in PAGES
        if (found := re.findall(rf"^```{mark}\n(.*?)^```$", page.read_text(), re.M | re.S))
    ]


@pytest.mark.parametrize("cells", blocks("python cell"))
def test_cells(cells: list[str], tmp_path: Path) -> None:
    with opened(tmp_path / "notebook") as notebook:
        for code in cells:
            cell = notebook.run(code)
            assert cell.reply["status"] == "ok", (code, cell.error)


@pytest.mark.parametrize("scripts", blocks("python script"))
def test_scripts(scripts: list[str], tmp_path: Path) -> None:
    with place(tmp_path) as here:
        for code in scripts:
            here.script(code)


@pytest.mark.parametrize("consoles", blocks("console run"))
def test_commands(consoles: list[str], tmp_path: Path) -> None:
    with place(tmp_path) as here:
        here.env["PATH"] = f"{Path(sys.executable).parent}:{here.env['PATH']}"
        for text in consoles:
            commands = "\n".join(re.findall(r"^\$ (.*)$", text, re.M))
            done = subprocess.run(
                ["bash", "-ec", commands],
                cwd=tmp_path,
                env=here.env,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stdout + done.stderr


def table_rows(text: str) -> set[str]:
    return {line for line in text.splitlines() if line.startswith("| `")}


def test_tables_of_the_readme() -> None:
    rows = {
        f"| `{name}` | {row.help} | {row.kind.show(row.default)} | `{row.example}` |"
        for name, row in SETTINGS.items()
        if CELL in row.where
    }
    rows |= {f"| `%remote {sub.usage}` | {sub.help} |" for sub in SUBCOMMANDS.values()}
    assert table_rows((ROOT / "README.md").read_text()) == rows


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_package_has_its_place_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for root in ("sdk/mlinfra_sdk", "jupyter_mlinfra"):
        for item in (ROOT / root).iterdir():
            if (item / "__init__.py").exists() or (
                item.suffix == ".py" and not item.name.startswith("_")
            ):
                assert item.name in text, item

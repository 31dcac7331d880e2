"""The wheel that the SDK makes of itself, installed by pip into an environment of its own."""

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from mlinfra_sdk import __version__
from mlinfra_sdk.worker.wheel import build_wheel


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with nothing but the wheel, by pip."""
    folder = tmp_path_factory.mktemp("wheel")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-index", "--no-deps", str(build_wheel(folder))], check=True)
    return python


def run(python: Path, code: str) -> str:
    command = [python, "-I", "-c", code]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def test_it_is_installed_and_imported_from_there(environment: Path) -> None:
    shown = run(environment, "import mlinfra_sdk as m; print(m.__version__, m.__file__)")
    version, file = shown.split(" ", 1)
    assert version == __version__
    assert Path(file).is_relative_to(environment.parent.parent)
    assert (environment.parent / "mlinfra").exists()


def test_metadata_arrives_with_it(environment: Path) -> None:
    shown = run(
        environment,
        "import importlib.metadata as m; d = m.distribution('mlinfra-sdk');"
        "print(any('ipykernel' in r for r in d.requires),"
        " any(e.group == 'mlinfra.providers' and e.name == 'local' for e in d.entry_points),"
        " all(f.hash is None or f.locate().is_file() for f in d.files))",
    )
    assert shown == "True True True"


def test_a_machine_makes_the_same_wheel_of_its_copy(environment: Path, tmp_path: Path) -> None:
    shown = run(
        environment,
        "from pathlib import Path; from mlinfra_sdk.worker.wheel import build_wheel;"
        f"print(build_wheel(Path({str(tmp_path)!r})))",
    )
    here = tmp_path / "here"
    here.mkdir()
    wheels = [Path(shown), build_wheel(here)]
    assert len({hashlib.sha256(wheel.read_bytes()).digest() for wheel in wheels}) == 1
    assert [path.name for path in here.iterdir()] == [Path(shown).name], (
        "an unfinished file is left"
    )

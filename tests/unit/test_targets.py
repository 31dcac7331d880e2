"""What ``on=`` may name."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlinfra_sdk import paths, providers, spec
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.spec import CELL, NOTEBOOK, parse, resolve


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pyproject.toml of the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "config_file", lambda: tmp_path / "config.toml")
    return tmp_path / "pyproject.toml"


def cell(**values: object) -> spec.Resolved:
    return resolve([*spec.configured(), parse(values, place=CELL, origin="the cell")])


def test_a_target_has_options_of_its_provider_and_settings_of_its_own(project: Path) -> None:
    project.write_text(
        '[tool.mlinfra]\nidle = "20m"\n'
        '[tool.mlinfra.targets.lab]\nprovider = "ssh"\nhost = "me@gpu1:2222"\nidle = "1h"\n'
        "price = 0.5\n"
    )
    found = cell(on="lab")
    assert (found.request.idle, found.request.price) == (3600, 500_000)
    assert found.origins["idle"] == f"{project} [tool.mlinfra.targets.lab]"
    assert cell(on="lab", idle="5m").request.idle == 300
    assert cell(on="local").request.idle == 1200
    provider = providers.load("lab")
    assert provider.name == "ssh"
    assert spec.target_options("lab") == {"host": "me@gpu1:2222"}


def test_the_users_file_has_targets_too_and_the_project_the_last_word(project: Path) -> None:
    user = paths.config_file()
    user.write_text(
        '[targets.lab]\nprovider = "ssh"\nhost = "a"\n[targets.ssh]\nhome = "/scratch"\n'
    )
    assert spec.target_options("lab") == {"host": "a"}
    assert spec.target_options("ssh") == {"home": "/scratch"}
    project.write_text('[tool.mlinfra.targets.lab]\nprovider = "ssh"\nhost = "b"\n')
    assert spec.target_options("lab") == {"host": "b"}


@pytest.mark.parametrize(
    ("on", "table", "message"),
    [
        ("lab", 'provider = "locla"', "'locla' .* is no installed provider. Did you mean 'local'"),
        ("lab", 'provider = "ssh"\nhots = "x"', "unknown field `hots`"),
        ("lab", 'provider = "ssh"\nhost = "x"\nidle = "soon"', "idle=soon"),
        ("local:here", "", "takes nothing behind a colon"),
        ("ssh:", "", "There is no target"),
        ("locla", "", "There is no target 'locla'. Did you mean 'local'"),
    ],
)
def test_mistakes_are_named(project: Path, on: str, table: str, message: str) -> None:
    if table:
        project.write_text(f"[tool.mlinfra.targets.lab]\n{table}\n")
    with pytest.raises(RequestError, match=message):
        resolve([parse({"on": "lab"}, place=NOTEBOOK, origin="a test")] if table else [])
        providers.load(on)

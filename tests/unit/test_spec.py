"""The table of settings, its values and their layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlinfra_sdk import spec
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.spec import CELL, CONFIG, NOTEBOOK, SETTINGS, Gpu, Gpus, Request


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without settings, and a folder for a notebook with no project above it."""
    monkeypatch.setattr("mlinfra_sdk.paths.config_file", lambda: tmp_path / "config.toml")
    for name in SETTINGS:
        monkeypatch.delenv(f"MLINFRA_{name.upper()}", raising=False)
    return tmp_path


def cell(**values: object) -> dict[str, object]:
    return dict(spec.parse(values, place=CELL, origin="the cell").values)


def test_every_setting_is_a_field_and_every_field_a_setting() -> None:
    fields = {setting.field or name for name, setting in SETTINGS.items()}
    by_launches = {"paid", "paid_by"}  # filled in when a machine is launched
    assert fields | by_launches == set(Request.__struct_fields__)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_example_of_every_setting_is_accepted_where_it_may_stand(name: str) -> None:
    key, equals, text = SETTINGS[name].example.partition("=")
    assert key == name
    for place in SETTINGS[name].where:
        value = spec.parse({key: text if equals else "yes"}, place=place, origin="x").values[key]
        assert SETTINGS[name].kind.show(value)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_suggestion_is_accepted(name: str) -> None:
    setting = SETTINGS[name]
    for text in setting.kind.suggestions():
        setting.kind.parse(text)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_shown_value_reads_back_as_itself(name: str) -> None:
    setting = SETTINGS[name]
    shown = setting.kind.show(setting.default)
    if name not in ("machine", "name", "kernel"):  # their defaults cannot be written
        assert setting.kind.parse(shown) == setting.default


def test_values() -> None:
    assert cell(gpu="A10") == {"gpu": Gpus((Gpu("A10", 1),))}
    assert cell(gpu="A100-80GB:8") == {"gpu": Gpus((Gpu("A100-80GB", 8),))}
    assert cell(gpu="none", time="none") == {"gpu": None, "time": None}
    assert cell(on="local", idle="1h30m", time="90s") == {"on": "local", "idle": 5400, "time": 90}
    assert cell(isolate="yes", quiet="off", eager_limit="2GiB") == {
        "isolate": True,
        "quiet": False,
        "eager_limit": 2 << 30,
    }
    assert cell(isolate=True, gpu=None) == {"isolate": True, "gpu": None}
    assert spec.parse({"price": 0.12}, place=CONFIG, origin="x").values == {"price": 120_000}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gpu", ""),
        ("gpu", "A10:0"),
        ("gpu", "A10:two"),
        ("gpu", "A10,"),
        ("gpu", "A10:2:3"),
        ("gpu", "A10|"),
        ("gpu", "0GB"),
        ("gpu", "none|A10"),
        ("on", "nowhere"),
        ("idle", "15"),
        ("idle", "0s"),
        ("idle", "none"),
        ("idle", 15),
        ("time", "soon"),
        ("name", "-x"),
        ("name", "a/b"),
        ("name", "x" * 64),
        ("isolate", "maybe"),
        ("quiet", ["yes"]),
        ("eager_limit", "64"),
        ("eager_limit", "-1MB"),
    ],
)
def test_a_malformed_value_names_key_value_and_accepted_form(key: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        spec.parse({key: value}, place=CELL, origin="the cell")
    text = str(caught.value)
    assert f"{key}={value}" in text
    assert "the cell" in text
    assert SETTINGS[key].kind.accepts in text


def test_unknown_keys_and_targets_get_a_proposal() -> None:
    with pytest.raises(RequestError, match=r"Unknown key 'gpuu' in the cell. Did you mean 'gpu'"):
        cell(gpuu="A10")
    with pytest.raises(RequestError, match="Known keys: gpu, on, idle") as caught:
        cell(xyz="1")
    assert "Did you mean" not in str(caught.value)
    with pytest.raises(RequestError, match="Did you mean 'local'"):
        cell(on="locla")


def test_a_setting_is_refused_where_it_has_no_place() -> None:
    with pytest.raises(RequestError, match=r"'price' cannot be set in the cell.*%remote use"):
        cell(price="1")
    with pytest.raises(RequestError, match="'machine' cannot be set in"):
        spec.parse({"machine": "x"}, place=CONFIG, origin="config.toml")


def test_later_layers_win_and_origins_are_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "config.toml").write_text(
        'idle = "5m"\ntime = "1h"\neager_limit = "1MB"\nprice = 0.5\n'
    )
    (home / "pyproject.toml").write_text(
        '[project]\nname = "x"\n[tool.mlinfra]\ntime = "2h"\neager_limit = "2MB"\nisolate = true\n'
    )
    monkeypatch.setenv("MLINFRA_EAGER_LIMIT", "3MB")
    folder = home / "a" / "b"
    folder.mkdir(parents=True)
    resolved = spec.resolve(
        [
            *spec.configured(folder),
            spec.parse({"gpu": "T4", "isolate": "no"}, place=NOTEBOOK, origin="%remote use"),
            spec.parse({"gpu": "A10"}, place=CELL, origin="the cell"),
        ]
    )
    assert resolved.request == Request(
        gpu=Gpus((Gpu("A10"),)), idle=300, time=7200, eager_limit=3_000_000, price=500_000
    )
    origins = resolved.origins
    assert origins["on"] == "default"
    assert origins["idle"] == str(home / "config.toml")
    assert origins["time"] == f"{home / 'pyproject.toml'} [tool.mlinfra]"
    assert origins["eager_limit"] == "the environment variable MLINFRA_EAGER_LIMIT"
    assert origins["isolate"] == "%remote use"
    assert origins["gpu"] == "the cell"
    assert ("gpu", "A10", "the cell") in resolved.rows()
    assert ("price", "0.5", str(home / "config.toml")) in resolved.rows()
    lasting = [name for name, setting in SETTINGS.items() if setting.where != (CELL,)]
    assert [row[0] for row in resolved.rows()] == lasting


def test_only_the_nearest_project_counts(home: Path) -> None:
    (home / "pyproject.toml").write_text('[tool.mlinfra]\nidle = "1m"\n')
    inner = home / "inner"
    inner.mkdir()
    (inner / "pyproject.toml").write_text("[project]\n")
    assert spec.resolve(spec.configured(inner)).request.idle == Request().idle
    assert spec.resolve(spec.configured(home)).request.idle == 60


def test_a_changed_file_is_read_again(home: Path) -> None:
    config = home / "config.toml"
    config.write_text('idle = "1m"')
    assert spec.resolve(spec.configured(home)).request.idle == 60
    config.write_text('idle = "10m"')
    assert spec.resolve(spec.configured(home)).request.idle == 600
    config.unlink()
    assert spec.resolve(spec.configured(home)).request.idle == Request().idle


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.toml", 'quiet = true\nidle = 15m"\n', r"config.toml is not valid TOML.*line 2"),
        ("config.toml", 'quiet = true\nidle = "15"\n', r"idle=15 in .*config.toml, line 2"),
        ("config.toml", "gpu = [1]\n", r"gpu=\[1\] in .*config.toml, line 1"),
        (
            "pyproject.toml",
            '[project]\nidle = 1\n[tool.mlinfra]\nidle = "x"\n',
            r"idle=x in .*pyproject.toml \[tool.mlinfra\], line 4",
        ),
        ("pyproject.toml", "[tool.mlinfra]\nidel = 1\n", "Unknown key 'idel'.*Did you mean 'idle'"),
        ("pyproject.toml", "[tool]\nmlinfra = 3\n", "is not a table"),
        ("pyproject.toml", "tool = \n", "line 1"),
    ],
)
def test_a_bad_file_is_one_error_with_its_place(
    home: Path, file: str, text: str, message: str
) -> None:
    (home / file).write_text(text)
    with pytest.raises(RequestError, match=message):
        spec.configured(home)


def test_a_file_that_is_no_text_is_explained(home: Path) -> None:
    (home / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="cannot be read"):
        spec.configured(home)


def test_a_bad_environment_variable_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLINFRA_IDLE", "soon")
    with pytest.raises(RequestError, match="idle=soon in the environment variable MLINFRA_IDLE"):
        spec.configured(home)


def test_help_names_every_key_that_the_place_accepts() -> None:
    for place in (CELL, NOTEBOOK, CONFIG):
        lines = spec.describe(place).splitlines()
        keys = {line.split()[0] for line in lines if not line.startswith(" ")}
        assert keys == {name for name, setting in SETTINGS.items() if place in setting.where}

"""Settings written into a file of the user's own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jupyter_mlinfra.server import config
from mlinfra_sdk import paths
from mlinfra_sdk.errors import RequestError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "own" / "config.toml"
    monkeypatch.setattr(paths, "config_file", lambda: path)
    return path


FILE = """\
# mine
idle = "15m"  # long enough

note = [
  "x",
]

# the box below the desk
[targets.box]
provider = "ssh"
idle = "2h"
"""


def test_everything_else_stays_as_it_is() -> None:
    text = config.changed(FILE, {"idle": "5m", "gpu": "A10", "month_budget": 200, "time": None})
    assert text == FILE.replace('"15m"', '"5m"').replace(
        "]\n\n# the box", ']\ngpu = "A10"\nmonth_budget = 200\n\n# the box'
    )
    assert config.changed(text, {"gpu": None, "month_budget": None, "idle": "15m"}) == FILE


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", 'gpu = "T4"\n'),
        ('idle = "5m"', 'idle = "5m"\ngpu = "T4"\n'),
        ("# all\n\n[targets.a]\n", '# all\ngpu = "T4"\n\n[targets.a]\n'),
        ("# a's\n[targets.a]\n", 'gpu = "T4"\n\n# a\'s\n[targets.a]\n'),
        ('s = """\n[no]\n"""\n[a]\n', 's = """\n[no]\n"""\ngpu = "T4"\n\n[a]\n'),
        ("s = [\n[1],\n]\n\n[a]\n", 's = [\n[1],\n]\ngpu = "T4"\n\n[a]\n'),
        ('"gpu" = "A10" # g\r\n\r\n[a]\r\n', '"gpu" = "T4" # g\r\n\r\n[a]\r\n'),
        ("targets.a.host = 'x'\n# end\n", "targets.a.host = 'x'\n# end\ngpu = \"T4\"\n"),
    ],
)
def test_where_a_new_key_goes(before: str, after: str) -> None:
    assert config.changed(before, {"gpu": "T4"}) == after


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
COMMENTS = st.text(st.sampled_from("[]#'\"= \ta\u2028"), max_size=6)


@given(st.lists(COMMENTS), st.dictionaries(st.sampled_from("abc"), st.none() | TEXTS), TEXTS)
def test_any_text_is_what_is_read(
    comments: list[str], values: dict[str, str | None], table: str
) -> None:
    lines = [f"#{comment}\n{'abcd'[n % 4]}{n} = 1\n" for n, comment in enumerate(comments)]
    before = config.changed('a = "x"\n' + "".join(lines) + "#[\n[t]\n", {"b": table})
    known = tomllib.loads(before)
    after = tomllib.loads(config.changed(before, values))
    wanted = known | values
    assert after == {key: value for key, value in wanted.items() if value is not None}


def test_it_is_written_whole_or_not_at_all(file: Path) -> None:
    config.write({"idle": " 5m ", "budget": "2.50", "confirm": "yes"})
    text = 'idle = "5m"\nbudget = 2.5\nconfirm = "yes"\n'
    assert file.read_text() == text
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    with pytest.raises(config.FieldError, match="idle=soon in the form") as caught:
        config.write({"gpu": "A10", "idle": "soon"})
    assert caught.value.field == "idle"
    assert file.read_text() == text
    config.write({"idle": "", "budget": "", "confirm": "", "time": ""})
    assert file.read_text() == ""
    assert os.listdir(file.parent) == [file.name]


def test_a_link_stays_a_link_and_no_token_gets_into_the_file(file: Path, tmp_path: Path) -> None:
    real = tmp_path / "dotfiles" / "mlinfra.toml"
    real.parent.mkdir()
    real.write_text("quiet = true\n")
    file.parent.mkdir()
    file.symlink_to(real)
    config.write({"on": "jupyter:http://127.0.0.1:8888/?token=abcdef"})
    assert file.is_symlink()
    assert real.read_text() == 'quiet = true\non = "jupyter:http://127.0.0.1:8888/"\n'


def test_a_file_that_cannot_be_written_is_one_error(file: Path) -> None:
    file.parent.write_text("no folder")
    with pytest.raises(RequestError, match=r"config\.toml cannot be"):
        config.write({"idle": "5m"})

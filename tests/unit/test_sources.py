"""How ``data=`` is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlinfra_sdk import sources
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.sources import Source


@pytest.mark.parametrize(
    "text, expected",
    [
        ("./images", ("images", "./images")),
        ("images/", ("images", "images/")),
        ("train=../x/images", ("train", "../x/images")),
        ("s3://bucket", ("bucket", "s3://bucket")),
        ("s3://bucket/a/train/", ("train", "s3://bucket/a/train/")),
        ("t=s3://bucket/a=1/b", ("t", "s3://bucket/a=1/b")),
        ("s3://bucket/year", ("year", "s3://bucket/year")),
        (
            "https://host/a/weights.bin?download=1",
            ("weights.bin", "https://host/a/weights.bin?download=1"),
        ),
        ("hf://datasets/ag_news", ("ag_news", "hf://datasets/ag_news")),
        ("ftp://host/x", None),
        ("memory://x", None),
        ("file:///etc", None),
        ("simplecache::s3://bucket/x", None),
        ("https://user:password@host/x", None),
        ("x y", None),
    ],
)
def test_one(text: str, expected: tuple[str, str] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError):
            sources.parse(text)
    else:
        assert sources.parse(text) == (Source(*expected),)
        assert sources.parse(sources.show(sources.parse(text))) == sources.parse(text)


def test_the_name_of_a_folder_that_is_written_with_dots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert [source.name for source in sources.parse(".")] == ["here"]


def test_several() -> None:
    assert [it.name for it in sources.parse("./a, s3://b/c ,d=./a")] == ["a", "c", "d"]
    assert sources.parse("") == ()
    with pytest.raises(ValueError, match="same name"):
        sources.parse("./a,s3://b/a")


def test_which_lie_inside_of_a_folder(tmp_path: Path) -> None:
    wanted = sources.parse(f"./a/b,../c,d=.,e={tmp_path}/e,s3://bucket/f,g=a/../g")
    assert sources.inside(wanted, tmp_path) == ["a/b", "e", "g"]


def test_data_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sources.VARIABLE, raising=False)
    with pytest.raises(RequestError, match="data="):
        sources.data("x")
    (tmp_path / "target").mkdir()
    os.symlink(tmp_path / "target", tmp_path / "x")
    monkeypatch.setenv(sources.VARIABLE, str(tmp_path))
    assert sources.data("x") == (tmp_path / "target").resolve()
    for name in ("y", "../x", ""):
        with pytest.raises(RequestError, match="Known"):
            sources.data(name)
